//! Which capture backend the meshds of a run use: the same scenarios hold for each.

/// Set by whoever runs the scenarios; `auto` otherwise.
pub const VARIABLE: &str = "MESHD_LAB_BACKEND";

/// As written in meshd.toml.
pub fn chosen() -> String {
    std::env::var(VARIABLE).unwrap_or_else(|_| "auto".to_owned())
}

/// Whether the kernel can refuse plaintext callers for it.
pub fn can_be_strict() -> bool {
    chosen() != "tun"
}

/// Whether the kernel records who opens connections, whoever it is.
pub fn records_owners() -> bool {
    ["auto", "nft-tproxy", "nft-redirect"].contains(&chosen().as_str())
}

/// The iptables backend of this run, or the one that works in every run.
pub fn some_iptables() -> String {
    if iptables().is_some() { chosen() } else { "iptables-nft".to_owned() }
}

/// The variant of iptables that rules are kept by, if they are.
pub fn iptables() -> Option<&'static str> {
    match chosen().as_str() {
        "iptables-nft" => Some("nft"),
        "iptables-legacy" => Some("legacy"),
        _ => None,
    }
}

/// What meshd's unit must grant it: legacy iptables speaks to the kernel by a raw socket.
pub(crate) fn capabilities() -> &'static str {
    if chosen() == "iptables-legacy" {
        "-all,+net_admin,+net_bind_service,+net_raw"
    } else {
        "-all,+net_admin,+net_bind_service"
    }
}

/// Whether rules can tell the units of a host apart (docs/capture.md).
pub fn can_tell_units() -> bool {
    can_be_strict() && chosen() != "iptables-legacy"
}
