//! Join tokens: one host each, or several for hosts that come and go by themselves.

use std::net::{IpAddr, SocketAddr};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use data_encoding::HEXLOWER;
use ipnet::IpNet;
use meshd_identity::sha256;
use meshd_pki_api::v1;

use crate::csr::Request;
use crate::enrol::{Invited, excerpt};
use crate::refused::Refused;
use crate::store::hosts;
use crate::store::tokens::{self, Seat, Token, Use};
use crate::store::{Records, View};
use crate::times::rfc3339;

/// Of the SHA-256 of the host's key, in a host id made of it: 40 bits, so that a thousand hosts hardly ever collide (and
/// are refused if they do).
const KEY_BYTES: usize = 5;

/// Uses the token, for this key, from this address.
pub(crate) fn invite(
    records: &mut dyn Records,
    proof: &v1::JoinTokenProof,
    request: &v1::EnrollRequest,
    csr: &Request,
    remote: &str,
    now: i64,
) -> Result<Invited, Refused> {
    let token = known_token(records, proof, now)?;
    let prefix = &token.host_id;
    if !token.from.is_empty() && !is_from(remote, &token.from) {
        let from: Vec<String> = token.from.iter().map(IpNet::to_string).collect();
        let (id, from) = (&token.id, from.join(", "));
        return Err(Refused::Forbidden(format!(
            "join token {id} for `{prefix}` is good from {from} only, and this host comes from {remote}; join from there, \
             or make a token with another --from"
        )));
    }
    let asked = request.host_id.as_str();
    let (host_id, allow, labels) = match token.max_uses {
        1 => use_once(records, token, asked, csr, now)?,
        _ => use_again(records, token, asked, csr, now)?,
    };
    Ok(Invited { host_id, allow, labels, enrolled_by: String::new() })
}

fn known_token(view: &mut dyn View, proof: &v1::JoinTokenProof, now: i64) -> Result<Token, Refused> {
    let token = tokens::token(view, &proof.id)?;
    let secret_hash = sha256(&proof.secret);
    // One answer for an unknown id and a wrong secret: ids are not secret, but nothing is gained by telling.
    let known = token.filter(|token| verify_slices_are_equal(&token.secret_hash, &secret_hash).is_ok());
    let Some(token) = known else {
        let text = "the join token is not known to this PKI; make a new one with `meshd-pki token create --host ID`";
        return Err(Refused::Unauthenticated(text.to_owned()));
    };
    if token.expires_at <= now {
        let (id, host, ended) = (&token.id, &token.host_id, rfc3339(token.expires_at));
        return Err(Refused::Forbidden(format!(
            "join token {id} for host `{host}` expired at {ended}; run `meshd-pki token create --host {host}`"
        )));
    }
    Ok(token)
}

type Used = (String, Vec<String>, std::collections::BTreeMap<String, String>);

fn use_once(
    records: &mut dyn Records,
    mut token: Token,
    asked: &str,
    csr: &Request,
    now: i64,
) -> Result<Used, Refused> {
    let host = &token.host_id;
    if !asked.is_empty() && asked != host {
        let asked = excerpt(asked);
        return Err(Refused::Forbidden(format!(
            "the host claims to be `{asked}`, the PKI permits this token `{host}`; join without a host id, or run \
             `meshd-pki token create --host {asked}`"
        )));
    }
    if let Some(used) = token.used.as_ref().filter(|used| used.key_id != csr.key_id) {
        let (id, used) = (&token.id, rfc3339(used.at));
        return Err(Refused::Forbidden(format!(
            "join token {id} was already used at {used} by another key, and serves only once; if that was not you, \
             somebody else enrolled as `{host}`: find out first, then run `meshd-pki token create --host {host}`"
        )));
    }
    token.used.get_or_insert_with(|| Use { key_id: csr.key_id.to_vec(), at: now });
    tokens::put_token(records, &token)?;
    Ok((token.host_id, token.allow, token.labels))
}

/// Each key is a host of its own, and is the same one whenever it comes again.
fn use_again(
    records: &mut dyn Records,
    mut token: Token,
    asked: &str,
    csr: &Request,
    now: i64,
) -> Result<Used, Refused> {
    let (id, prefix) = (token.id.clone(), token.host_id.clone());
    let given = match tokens::seat(records, &id, &csr.key_id)? {
        Some(seat) => {
            // Somebody else has enrolled as this host since, or it has a newer key itself: it is not to be replaced.
            if hosts::host(records, &seat.host)?.is_some_and(|host| host.key_current != csr.key_id) {
                return Err(taken(&seat.host));
            }
            seat.host
        }
        None => {
            if token.uses >= token.max_uses {
                let uses = token.max_uses;
                return Err(Refused::Forbidden(format!(
                    "join token {id} has enrolled {uses} hosts, as many as it may; run `meshd-pki token create --host \
                     {prefix} --max-uses {uses}`"
                )));
            }
            let host = if asked.is_empty() { derived(&prefix, csr) } else { asked.to_owned() };
            if hosts::host(records, &host)?.is_some() {
                return Err(taken(&host));
            }
            token.uses += 1;
            tokens::put_token(records, &token)?;
            tokens::put_seat(records, &id, &csr.key_id, &Seat { host: host.clone(), at: now })?;
            host
        }
    };
    let is_of_prefix = given.strip_prefix(&prefix).is_some_and(|rest| rest.len() > 1 && rest.starts_with('-'));
    if !is_of_prefix || !asked.is_empty() && asked != given {
        let asked = excerpt(asked);
        return Err(Refused::Forbidden(format!(
            "the host claims to be `{asked}`, the PKI permits this key and token `{}`; join without a host id",
            if is_of_prefix { given } else { format!("{prefix}-...") }
        )));
    }
    Ok((given, token.allow, token.labels))
}

fn taken(host: &str) -> Refused {
    let host = excerpt(host);
    Refused::Forbidden(format!(
        "host `{host}` is enrolled already, and a token for several hosts replaces none; join under another id, or run \
         `meshd-pki token create --host {host}`"
    ))
}

fn derived(prefix: &str, csr: &Request) -> String {
    format!("{prefix}-{}", HEXLOWER.encode(&csr.key_id[..KEY_BYTES]))
}

/// Whether `remote` (an address with its port) is in one of the networks.
pub(crate) fn is_from(remote: &str, networks: &[IpNet]) -> bool {
    let Ok(address) = remote.parse::<SocketAddr>() else { return false };
    let address: IpAddr = address.ip().to_canonical();
    networks.iter().any(|network| network.contains(&address))
}
