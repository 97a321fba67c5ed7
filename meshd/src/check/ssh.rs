//! The way back in: nothing meshd does may touch it.

use std::collections::BTreeSet;

use super::finding::Finding;
use crate::capture::{CaptureError, Lifeline};

/// `strict` are the ports whose plaintext callers the kernel would refuse.
pub(super) fn judge(lifeline: Result<Lifeline, CaptureError>, strict: &BTreeSet<u16>) -> Finding {
    let check = "SSH is left alone";
    let ports = match lifeline {
        Ok(lifeline) => lifeline.ports,
        Err(error) => return Finding::warning(check, format!("{error}: not looked at"), "run this as root"),
    };
    let named = |ports: &mut dyn Iterator<Item = &u16>| ports.map(u16::to_string).collect::<Vec<_>>().join(", ");
    let closed = named(&mut ports.intersection(strict));
    if !closed.is_empty() {
        let detail = format!("a strict port is sshd's: {closed}; nobody could log in any more");
        return Finding::failed(check, detail, "make it permissive in enrol.d, or deliver to another port");
    }
    Finding::ok(check, format!("port {}", named(&mut ports.iter())))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_strict_ssh_port_is_a_failure() {
        let lifeline = |ports: &[u16]| Ok(Lifeline { ports: ports.iter().copied().collect(), session: None });
        let kept = judge(lifeline(&[22, 2222]), &[8080].into());
        assert_eq!((kept.verdict, kept.detail.as_str()), (Verdict::Ok, "port 22, 2222"));
        let locked = judge(lifeline(&[22, 2222]), &[8080, 2222].into());
        assert_eq!(locked.verdict, Verdict::Failed);
        assert!(locked.detail.contains("sshd's: 2222"), "{}", locked.detail);
    }
}
