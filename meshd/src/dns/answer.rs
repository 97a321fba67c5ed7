//! From the bytes of a query to the bytes of its answer. Pure.
//!
//! Authoritative for our zones: RFC 1035, negative answers by RFC 2308, EDNS(0) by RFC 6891, names below an
//! existing name by RFC 8020, at most one question by RFC 9619. What is not ours is for `forward`.

use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use meshd_discovery::{Directory, Looked, ServiceName};

use super::vips::Vip;
use super::zone::{Place, Zone, Zones, may_be_a_namespace};
use crate::telemetry::DnsOutcome;

/// Seconds; what ztunnel and Istio use. Addresses are stable, so this only bounds how long a removed service resolves.
pub(super) const TTL: u32 = 30;
/// What survives every path unfragmented (DNS flag day 2020). Our answers are far smaller.
const UDP_PAYLOAD: u16 = 1232;

/// What a packet deserves.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    /// Shorter than a header, or itself an answer: two servers answering each other would never stop.
    Silence,
    /// Always fits into 512 bytes.
    Answer(Vec<u8>, DnsOutcome),
    /// Not ours, and well-formed up to the end of its question, which is at this byte.
    Forward { question_end: usize },
    /// To be answered when it is known whether there is such a service.
    LookUp(ServiceName),
}

/// What of a name that is not in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// There is no such service.
    Nowhere,
    /// It was not looked for yet.
    LookUp,
    /// It was looked for, with this result.
    Looked(Looked),
}

/// What answers are made of.
pub(super) struct Knowledge<'a> {
    pub(super) zones: &'a Zones,
    pub(super) directory: &'a Directory,
    /// Whether whoever asks may have other names looked up, and there is a server to do it.
    pub(super) forwards: bool,
    pub(super) unknown: Unknown,
}

pub(super) fn respond(packet: &[u8], known: &Knowledge<'_>, vip_of: impl Fn(&ServiceName) -> Option<Vip>) -> Reply {
    let mut decoder = BinDecoder::new(packet);
    let Ok(header) = Header::read(&mut decoder) else { return Reply::Silence };
    if header.metadata.message_type == MessageType::Response {
        return Reply::Silence;
    }
    let query = match question(&header, &mut decoder) {
        Ok(query) => query,
        Err(code) => return error(&header, code),
    };
    let found = find(&query, known, vip_of);
    match found {
        Found::Elsewhere => return Reply::Forward { question_end: decoder.index() },
        Found::ToLookUp(service) => return Reply::LookUp(service),
        _ => {}
    }
    match Message::from_vec(packet) {
        Ok(message) => answer(&message, query, found, known),
        Err(_) => error(&header, ResponseCode::FormErr),
    }
}

/// The answer that says only that there is none, for a packet that was to be forwarded.
pub(super) fn failure(packet: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let header = Header::read(&mut BinDecoder::new(packet)).ok()?;
    let mut response = Message::new(header.metadata.id, MessageType::Response, OpCode::Query);
    response.metadata = Metadata::response_from_request(&header.metadata);
    response.metadata.response_code = code;
    if let Ok(message) = Message::from_vec(packet) {
        if let Some(theirs) = &message.edns {
            response.set_edns(edns(theirs));
        }
        response.add_queries(message.queries);
    }
    response.to_vec().ok()
}

fn error(header: &Header, code: ResponseCode) -> Reply {
    let mut response = Message::new(0, MessageType::Response, OpCode::Query);
    response.metadata = Metadata::response_from_request(&header.metadata);
    response.metadata.response_code = code;
    response.to_vec().map_or(Reply::Silence, |bytes| Reply::Answer(bytes, DnsOutcome::Invalid))
}

/// Counts are looked at before anything is decoded or allocated.
fn question(header: &Header, decoder: &mut BinDecoder<'_>) -> Result<Query, ResponseCode> {
    if header.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    if header.counts.queries != 1 {
        return Err(ResponseCode::FormErr);
    }
    Query::read(decoder).map_err(|_| ResponseCode::FormErr)
}

fn answer(message: &Message, query: Query, found: Found<'_>, known: &Knowledge<'_>) -> Reply {
    let mut response = Message::new(message.metadata.id, MessageType::Response, OpCode::Query);
    response.metadata = Metadata::response_from_request(&message.metadata);
    response.metadata.recursion_available = known.forwards;
    if let Some(theirs) = &message.edns {
        response.set_edns(edns(theirs));
    }
    let outcome = if message.edns.as_ref().is_some_and(|theirs| theirs.version() > 0) {
        response.metadata.response_code = ResponseCode::BADVERS;
        DnsOutcome::Invalid
    } else {
        fill(&mut response, &found, &query)
    };
    // As it came, so that a resolver that randomises case recognises its own question.
    response.add_query(query);
    response.to_vec().map_or(Reply::Silence, |bytes| Reply::Answer(bytes, outcome))
}

/// RFC 6891 6.1.1: an OPT in the query asks for one in the answer; RFC 3225 3: with the DO bit copied.
fn edns(theirs: &Edns) -> Edns {
    let mut ours = Edns::new();
    ours.set_max_payload(UDP_PAYLOAD).set_version(0).set_dnssec_ok(theirs.flags().dnssec_ok);
    ours
}

enum Found<'z> {
    Service(&'z Zone, Vip),
    Apex(&'z Zone),
    Between(&'z Zone),
    Nothing(&'z Zone),
    Elsewhere,
    /// Nobody here answers that.
    Refused,
    /// The service exists, and there are no virtual IPs left.
    NoAddress,
    ToLookUp(ServiceName),
    /// Who may know the name has not said so.
    Unsure,
}

fn find<'z>(query: &Query, known: &Knowledge<'z>, vip_of: impl Fn(&ServiceName) -> Option<Vip>) -> Found<'z> {
    let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if query.query_class() != DNSClass::IN || transfer {
        return Found::Refused;
    }
    let unsure = known.unknown == Unknown::Looked(Looked::Unsure);
    match known.zones.place(query.name(), known.directory) {
        Place::Nowhere(_, Some(service)) | Place::NotKnownHere(_, Some(service))
            if known.unknown == Unknown::LookUp =>
        {
            Found::ToLookUp(service)
        }
        Place::Service(zone, service) => vip_of(&service).map_or(Found::NoAddress, |vip| Found::Service(zone, vip)),
        Place::Apex(zone) => Found::Apex(zone),
        Place::Between(zone) => Found::Between(zone),
        Place::NotKnownHere(..) | Place::Outside if known.forwards => Found::Elsewhere,
        Place::Nowhere(_, Some(_)) | Place::NotKnownHere(_, Some(_)) if unsure => Found::Unsure,
        // Services below it are known once they are asked for; "no such name" would deny them (RFC 8020).
        Place::Nowhere(zone, _) if known.unknown != Unknown::Nowhere && may_be_a_namespace(zone, query.name()) => {
            Found::Between(zone)
        }
        Place::Nowhere(zone, _) | Place::NotKnownHere(zone, _) => Found::Nothing(zone),
        Place::Outside => Found::Refused,
    }
}

fn fill(response: &mut Message, found: &Found<'_>, query: &Query) -> DnsOutcome {
    let (zone, code, records) = match *found {
        Found::Service(zone, vip) => (zone, ResponseCode::NoError, addresses(vip, query)),
        Found::Apex(zone) if matches!(query.query_type(), RecordType::SOA | RecordType::ANY) => {
            (zone, ResponseCode::NoError, vec![zone.soa().clone()])
        }
        Found::Apex(zone) | Found::Between(zone) => (zone, ResponseCode::NoError, Vec::new()),
        Found::Nothing(zone) => (zone, ResponseCode::NXDomain, Vec::new()),
        Found::Elsewhere | Found::Refused | Found::ToLookUp(_) => {
            response.metadata.response_code = ResponseCode::Refused;
            return DnsOutcome::Refused;
        }
        Found::NoAddress => {
            response.metadata.response_code = ResponseCode::ServFail;
            return DnsOutcome::NoAddress;
        }
        // "No such name" is believed, and remembered; this is asked again.
        Found::Unsure => {
            response.metadata.response_code = ResponseCode::ServFail;
            return DnsOutcome::Unsure;
        }
    };
    response.metadata.authoritative = true;
    response.metadata.response_code = code;
    if !records.is_empty() {
        response.add_answers(records);
        return DnsOutcome::Answered;
    }
    // RFC 2308 2: a negative answer carries the SOA, whose MINIMUM says for how long to believe it.
    response.add_authority(zone.soa().clone());
    if code == ResponseCode::NXDomain { DnsOutcome::Nxdomain } else { DnsOutcome::Nodata }
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
