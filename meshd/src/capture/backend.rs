//! The ways to make a kernel hand connections over, behind one small trait, and how one is chosen.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::flow::Recovery;
use super::iptables::{Iptables, Variant};
use super::ledger::Tally;
use super::nft::{Nft, NftCapture};
use super::owner::OwnerRecord;
use super::tool::CaptureError;
use super::tun::Tun;
use super::wanted::{Caller, Facts, Wanted};

/// `[capture] backend` in meshd.toml.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendChoice {
    /// The first of the others, in this order, that works on this host and can do what is configured.
    #[default]
    Auto,
    NftTproxy,
    NftRedirect,
    /// The variant that `iptables` stands for on this host.
    Iptables,
    IptablesNft,
    IptablesLegacy,
    Tun,
}

/// A way to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    NftTproxy,
    NftRedirect,
    IptablesNft,
    IptablesLegacy,
    Tun,
}

impl BackendKind {
    /// In the order `auto` tries them: TPROXY leaves addresses and conntrack alone, REDIRECT needs only NAT,
    /// iptables no nft program, TUN no netfilter.
    pub const ALL: [BackendKind; 5] = [
        BackendKind::NftTproxy,
        BackendKind::NftRedirect,
        BackendKind::IptablesNft,
        BackendKind::IptablesLegacy,
        BackendKind::Tun,
    ];

    pub fn label(self) -> &'static str {
        match self {
            BackendKind::NftTproxy => "nft-tproxy",
            BackendKind::NftRedirect => "nft-redirect",
            BackendKind::IptablesNft => "iptables-nft",
            BackendKind::IptablesLegacy => "iptables-legacy",
            BackendKind::Tun => "tun",
        }
    }

    /// What it can do besides capturing virtual IPs.
    pub fn can(self) -> Capabilities {
        match self {
            BackendKind::NftTproxy | BackendKind::NftRedirect | BackendKind::IptablesNft => {
                Capabilities { strict: true, ledger: true, raw: true, raw_units: true, transparent: true }
            }
            BackendKind::IptablesLegacy => {
                Capabilities { strict: true, ledger: true, raw: true, raw_units: false, transparent: true }
            }
            BackendKind::Tun => {
                Capabilities { strict: false, ledger: false, raw: false, raw_units: false, transparent: false }
            }
        }
    }

    /// Whether `auto` may take it: an iptables variant the host does not use would split its rules in two.
    fn suits_this_host(self) -> bool {
        match self {
            BackendKind::IptablesNft | BackendKind::IptablesLegacy => {
                // Without iptables the nft variant stands for both, and says what is missing.
                Variant::of_host().map_or(BackendKind::IptablesNft, Variant::kind) == self
            }
            _ => true,
        }
    }

    pub fn open(self) -> Box<dyn Backend> {
        match self {
            BackendKind::NftTproxy => Box::new(Nft::new(NftCapture::Tproxy)),
            BackendKind::NftRedirect => Box::new(Nft::new(NftCapture::Redirect)),
            BackendKind::IptablesNft => Box::new(Iptables::new(Variant::Nft)),
            BackendKind::IptablesLegacy => Box::new(Iptables::new(Variant::Legacy)),
            BackendKind::Tun => Box::<Tun>::default(),
        }
    }
}

/// What a backend can make the kernel do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Refuse plaintext callers of strict ports.
    pub strict: bool,
    /// Count who still calls permissive ports in clear.
    pub ledger: bool,
    /// Capture raw service addresses.
    pub raw: bool,
    /// The same for callers that are units or known by a port, not only users.
    pub raw_units: bool,
    /// Let applications see the caller's address.
    pub transparent: bool,
}

/// Where captured connections arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAt {
    pub addresses: Vec<SocketAddr>,
    /// Connections keep the destination they were sent to (IP_TRANSPARENT).
    pub transparent: bool,
}

/// One way to make the kernel do what is wanted. Implementations hold no policy: they render and apply.
pub trait Backend: Send {
    fn kind(&self) -> BackendKind;

    /// Whether this host can do it, and if not, why: tried without leaving a trace.
    fn probe(&self, wanted: &Wanted) -> Result<(), CaptureError>;

    /// Before listeners are bound: makes what they are bound to.
    fn prepare(&mut self, wanted: &Wanted) -> Result<ListenAt, CaptureError>;

    /// How workers learn whom a captured connection was for.
    fn recovery(&self) -> Recovery;

    /// Where it records who opened connections, as `probe` found this host can.
    fn owners(&self) -> OwnerRecord {
        OwnerRecord::default()
    }

    /// Whether it must be told who is enrolled, to record that.
    fn records_enrolled(&self) -> bool {
        false
    }

    /// The rules as an operator reads them.
    fn render(&self, wanted: &Wanted, facts: &Facts) -> String;

    /// Puts everything in force, in one transaction where the kernel has them. Safe to repeat; a failure leaves
    /// what was in force before.
    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError>;

    /// Whether what `apply` did is all still there.
    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError>;

    /// Who called in clear, and who was refused, since rules were last replaced; nothing where nobody counts.
    fn tally(&self) -> Result<Tally, CaptureError> {
        Ok(Tally::default())
    }

    /// Whether the kernel tells of changes to these rules; if not, they are looked at every second.
    fn notified(&self) -> bool {
        true
    }

    /// Removes only what is ours. Works on what another process applied, and when nothing is left.
    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError>;
}

/// Why a backend is not the one, for `auto`'s explanation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    pub backend: BackendKind,
    pub reason: String,
}

/// The backend in force and why the others are not.
pub struct Chosen {
    pub backend: Box<dyn Backend>,
    pub passed_over: Vec<PassedOver>,
}

/// The configured backend, or the first that works and can enforce what is wanted.
pub fn choose(choice: BackendChoice, wanted: &Wanted) -> Result<Chosen, CaptureError> {
    let candidates: Vec<BackendKind> = match choice {
        BackendChoice::Auto => BackendKind::ALL.to_vec(),
        BackendChoice::NftTproxy => vec![BackendKind::NftTproxy],
        BackendChoice::NftRedirect => vec![BackendKind::NftRedirect],
        BackendChoice::Iptables => vec![Variant::of_host()?.kind()],
        BackendChoice::IptablesNft => vec![BackendKind::IptablesNft],
        BackendChoice::IptablesLegacy => vec![BackendKind::IptablesLegacy],
        BackendChoice::Tun => vec![BackendKind::Tun],
    };
    let mut passed_over = Vec::new();
    let mut last = None;
    for kind in candidates {
        if choice == BackendChoice::Auto && !kind.suits_this_host() {
            continue;
        }
        let backend = kind.open();
        match can_enforce(kind, wanted).and_then(|()| backend.probe(wanted)) {
            Ok(()) => return Ok(Chosen { backend, passed_over }),
            Err(error) => {
                passed_over.push(PassedOver { backend: kind, reason: error.to_string() });
                last = Some(error);
            }
        }
    }
    // One candidate was configured: its own reason says most. Of several, each is in the log.
    Err(last.filter(|_| passed_over.len() == 1).unwrap_or_else(|| CaptureError::Cannot {
        backend: "auto",
        what: passed_over.iter().map(|passed| format!("[{}: {}]", passed.backend.label(), passed.reason)).collect(),
        remedy: "see docs/capture.md for what each backend needs",
    }))
}

/// Refuses a backend that would leave undone what the configuration says.
pub fn can_enforce(kind: BackendKind, wanted: &Wanted) -> Result<(), CaptureError> {
    let can = kind.can();
    let cannot = |what: String, remedy| Err(CaptureError::Cannot { backend: kind.label(), what, remedy });
    if let (false, Some(strict)) = (can.strict, wanted.strict.first()) {
        return cannot(format!("strict ports (port {})", strict.port), "make them permissive, or use another backend");
    }
    if !can.raw && !wanted.raw_callers.is_empty() {
        return cannot("raw service addresses".into(), "remove [capture] raw, or use another backend");
    }
    let unit = wanted.raw_callers.iter().find(|caller| !matches!(caller, Caller::Uid(_)));
    if let (false, Some(caller)) = (can.raw_units, unit) {
        let what = format!("raw service addresses for callers that are not enrolled by uid ({})", caller.label());
        return cannot(what, "enrol them by uid, remove [capture] raw, or use another backend");
    }
    if let (false, Some(address)) = (can.transparent, wanted.transparent.first()) {
        let what = format!("transparent client addresses (deliver {address})");
        return cannot(what, "set client_address to \"none\", or use another backend");
    }
    if wanted.answer_mark() == 0 && wanted.transparent.iter().any(|address| !address.ip().is_loopback()) {
        let what = "transparent client addresses with a single bit in [capture] mark_mask".into();
        return cannot(what, "give it two bits, or deliver to a loopback address");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn legacy_iptables_refuses_raw_addresses_of_callers_it_cannot_tell_apart() {
        let by_uid = Wanted { raw_callers: [Caller::Uid(1001)].into(), ..wanted() };
        assert!(can_enforce(BackendKind::IptablesLegacy, &by_uid).is_ok());
        for caller in [Caller::Unit("web.service".into()), Caller::Port(8080)] {
            let label = caller.label();
            let wanted = Wanted { raw_callers: [Caller::Uid(1001), caller].into(), ..wanted() };
            let refused = can_enforce(BackendKind::IptablesLegacy, &wanted).unwrap_err().to_string();
            assert!(refused.contains(&label) && refused.contains("by uid"), "{refused}");
            assert!(can_enforce(BackendKind::IptablesNft, &wanted).is_ok());
        }
    }
}
