//! How far the clocks of hosts are from ours.

use crate::store::hosts::Host;

/// Clocks of hosts heard within this time have a say.
pub(crate) const HEARD_LATELY_S: i64 = 600;
/// Worth an operator's look. NTP keeps hosts within a second.
pub(crate) const WARNING_MS: i64 = 60_000;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spread {
    pub(crate) lowest_ms: i64,
    pub(crate) median_ms: i64,
    pub(crate) highest_ms: i64,
}

/// Of hosts heard lately; nothing when there are none.
pub(crate) fn spread(hosts: &[Host], now: i64) -> Option<Spread> {
    let mut offsets: Vec<i64> = heard(hosts, now).map(|host| host.clock_offset_ms).collect();
    offsets.sort_unstable();
    let (lowest_ms, highest_ms) = (*offsets.first()?, *offsets.last()?);
    Some(Spread { lowest_ms, median_ms: offsets[offsets.len() / 2], highest_ms })
}

/// Hosts far off, the worst first.
pub(crate) fn far_off(hosts: &[Host], now: i64) -> Vec<&Host> {
    let mut far: Vec<&Host> = heard(hosts, now).filter(|host| host.clock_offset_ms.abs() >= WARNING_MS).collect();
    far.sort_by_key(|host| std::cmp::Reverse(host.clock_offset_ms.abs()));
    far
}

fn heard(hosts: &[Host], now: i64) -> impl Iterator<Item = &Host> {
    let lately = now - HEARD_LATELY_S..=now;
    hosts.iter().filter(move |host| lately.contains(&host.last_seen))
}
