//! From the bytes of a query to the bytes of its answer. Pure.
//!
//! Authoritative for one zone, never recursive: RFC 1035, negative answers by RFC 2308, EDNS(0) by RFC 6891,
//! names below an existing name by RFC 8020, at most one question by RFC 9619.

use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use meshd_discovery::{Directory, ServiceName};
use serde::Deserialize;

use super::vips::Vip;

/// Seconds; what ztunnel and Istio use. Addresses are stable, so this only bounds how long a removed service resolves.
pub(super) const TTL: u32 = 30;
/// Seconds a "no such name" may be remembered: a service appears within this time.
pub(super) const NEGATIVE_TTL: u32 = 5;
/// What survives every path unfragmented (DNS flag day 2020). Our answers are far smaller.
const UDP_PAYLOAD: u16 = 1232;
/// Two labels of 63 bytes and their lengths must fit in front of it.
const MAX_ZONE: usize = 253 - 2 * 64;

/// The mesh domain, for example `mesh`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Zone {
    name: Name,
    soa: Record,
}

/// Without the root's dot, as people write it.
impl std::fmt::Display for Zone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name.to_ascii().trim_end_matches('.'))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    #[error("`{0}` is not a domain; use DNS labels of a-z, 0-9 and `-`, separated by dots, for example `mesh`")]
    Label(String),
    #[error("`{0}` is too long; service names must fit in front of it, so it may have {MAX_ZONE} bytes")]
    Long(String),
}

impl Zone {
    pub fn new(domain: &str) -> Result<Zone, ZoneError> {
        let bare = domain.strip_suffix('.').unwrap_or(domain);
        let shown = || domain.chars().take(260).flat_map(char::escape_debug).collect::<String>();
        if bare.len() > MAX_ZONE {
            return Err(ZoneError::Long(shown()));
        }
        let wrong = |_| ZoneError::Label(shown());
        if !bare.split('.').all(is_label) {
            return Err(ZoneError::Label(shown()));
        }
        let name = Name::from_ascii(format!("{bare}.")).map_err(wrong)?;
        let (server, mailbox) =
            (name.prepend_label("ns").map_err(wrong)?, name.prepend_label("hostmaster").map_err(wrong)?);
        // Nobody transfers this zone, so serial and timers mean nothing; MINIMUM is the negative TTL.
        let soa = SOA::new(server, mailbox, 1, 3600, 600, 86_400, NEGATIVE_TTL);
        let soa = Record::from_rdata(name.clone(), NEGATIVE_TTL, RData::SOA(soa));
        Ok(Zone { name, soa })
    }

    /// The labels in front of the zone's own, or None for a name outside it.
    fn inside<'n>(&self, name: &'n Name) -> Option<Vec<&'n [u8]>> {
        let mut labels: Vec<&[u8]> = name.iter().collect();
        let inner = labels.len().checked_sub(self.name.iter().count())?;
        let ours = labels[inner..].iter().zip(self.name.iter()).all(|(theirs, ours)| theirs.eq_ignore_ascii_case(ours));
        labels.truncate(inner);
        ours.then_some(labels)
    }
}

fn is_label(label: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&label.len()) && label.bytes().all(allowed) && !label.starts_with('-') && !label.ends_with('-')
}

impl TryFrom<String> for Zone {
    type Error = ZoneError;

    fn try_from(domain: String) -> Result<Zone, ZoneError> {
        Zone::new(&domain)
    }
}

/// The answer to a packet, or None for one that deserves none: shorter than a header, or itself an answer (two
/// servers answering each other would never stop). An answer always fits into 512 bytes.
pub(super) fn respond(
    packet: &[u8],
    zone: &Zone,
    directory: &Directory,
    vip_of: impl Fn(&ServiceName) -> Option<Vip>,
) -> Option<Vec<u8>> {
    let header = Header::read(&mut BinDecoder::new(packet)).ok()?;
    if header.metadata.message_type == MessageType::Response {
        return None;
    }
    let response = match read(packet, &header) {
        Ok((message, query)) => answer(&message, query, zone, directory, vip_of),
        Err(code) => {
            let mut response = Message::new(0, MessageType::Response, OpCode::Query);
            response.metadata = Metadata::response_from_request(&header.metadata);
            response.metadata.response_code = code;
            response
        }
    };
    response.to_vec().ok()
}

/// Counts are looked at before anything is decoded or allocated.
fn read(packet: &[u8], header: &Header) -> Result<(Message, Query), ResponseCode> {
    if header.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    if header.counts.queries != 1 {
        return Err(ResponseCode::FormErr);
    }
    let message = Message::from_vec(packet).map_err(|_| ResponseCode::FormErr)?;
    let query = message.queries.first().cloned().ok_or(ResponseCode::FormErr)?;
    Ok((message, query))
}

fn answer(
    message: &Message,
    query: Query,
    zone: &Zone,
    directory: &Directory,
    vip_of: impl Fn(&ServiceName) -> Option<Vip>,
) -> Message {
    let mut response = Message::new(message.metadata.id, MessageType::Response, OpCode::Query);
    response.metadata = Metadata::response_from_request(&message.metadata);
    if let Some(theirs) = &message.edns {
        response.set_edns(edns(theirs));
        if theirs.version() > 0 {
            response.metadata.response_code = ResponseCode::BADVERS;
            response.add_query(query);
            return response;
        }
    }
    fill(&mut response, find(&query, zone, directory, vip_of), &query, zone);
    // As it came, so that a resolver that randomises case recognises its own question.
    response.add_query(query);
    response
}

/// RFC 6891 6.1.1: an OPT in the query asks for one in the answer; RFC 3225 3: with the DO bit copied.
fn edns(theirs: &Edns) -> Edns {
    let mut ours = Edns::new();
    ours.set_max_payload(UDP_PAYLOAD).set_version(0).set_dnssec_ok(theirs.flags().dnssec_ok);
    ours
}

enum Found {
    Service(Vip),
    /// The zone itself.
    Apex,
    /// A namespace: nothing to tell about it, but names below exist, and "no such name" would deny those too.
    Namespace,
    Nothing,
    NotOurs,
    /// The service exists, and there are no virtual IPs left.
    NoAddress,
}

fn find(query: &Query, zone: &Zone, directory: &Directory, vip_of: impl Fn(&ServiceName) -> Option<Vip>) -> Found {
    let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if query.query_class() != DNSClass::IN || transfer {
        return Found::NotOurs;
    }
    let Some(labels) = zone.inside(query.name()) else { return Found::NotOurs };
    match labels.as_slice() {
        [] => Found::Apex,
        [namespace] if text(namespace).is_some_and(|namespace| directory.has_namespace(&namespace)) => Found::Namespace,
        [name, namespace] => match service(name, namespace).filter(|service| directory.get(service).is_some()) {
            Some(service) => vip_of(&service).map_or(Found::NoAddress, Found::Service),
            None => Found::Nothing,
        },
        _ => Found::Nothing,
    }
}

fn service(name: &[u8], namespace: &[u8]) -> Option<ServiceName> {
    ServiceName::new(&text(name)?, &text(namespace)?).ok()
}

fn text(label: &[u8]) -> Option<String> {
    String::from_utf8(label.to_ascii_lowercase()).ok()
}

fn fill(response: &mut Message, found: Found, query: &Query, zone: &Zone) {
    response.metadata.authoritative = !matches!(found, Found::NotOurs | Found::NoAddress);
    match found {
        Found::Service(vip) => response.add_answers(addresses(vip, query)),
        Found::Apex if matches!(query.query_type(), RecordType::SOA | RecordType::ANY) => {
            response.add_answer(zone.soa.clone())
        }
        Found::Apex | Found::Namespace | Found::Nothing | Found::NotOurs | Found::NoAddress => response,
    };
    response.metadata.response_code = match found {
        Found::NotOurs => ResponseCode::Refused,
        Found::NoAddress => ResponseCode::ServFail,
        Found::Nothing => ResponseCode::NXDomain,
        Found::Service(_) | Found::Apex | Found::Namespace => ResponseCode::NoError,
    };
    // RFC 2308 2: a negative answer carries the SOA, whose MINIMUM says for how long to believe it.
    if response.metadata.authoritative && response.answers.is_empty() {
        response.add_authority(zone.soa.clone());
    }
}

fn addresses(vip: Vip, query: &Query) -> Vec<Record> {
    let record = |data| Record::from_rdata(query.name().clone(), TTL, data);
    let (v4, v6) = (RData::A(A(vip.v4)), RData::AAAA(AAAA(vip.v6)));
    match query.query_type() {
        RecordType::A => vec![record(v4)],
        RecordType::AAAA => vec![record(v6)],
        RecordType::ANY => vec![record(v4), record(v6)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
