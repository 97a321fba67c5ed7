//! Which capture backend this host gets, and why.

use super::finding::Finding;
use crate::capture::{BackendChoice, BackendKind, CaptureError, Chosen, Wanted, choose};

/// Tried without a trace.
pub(super) fn check(choice: BackendChoice, wanted: &Wanted) -> (Finding, Option<BackendKind>) {
    let chosen = choose(choice, wanted);
    let kind = chosen.as_ref().ok().map(|chosen| chosen.backend.kind());
    (judge(choice, chosen), kind)
}

fn judge(choice: BackendChoice, chosen: Result<Chosen, CaptureError>) -> Finding {
    let check = "there is a way to capture connections";
    match chosen {
        Ok(chosen) => {
            let how = if choice == BackendChoice::Auto { "chosen by `auto`" } else { "as configured" };
            let passed: Vec<String> = chosen
                .passed_over
                .iter()
                .map(|over| format!("; not {}: {}", over.backend.label(), over.reason))
                .collect();
            Finding::ok(check, format!("{}, {how}{}", chosen.backend.kind().label(), passed.concat()))
        }
        Err(error) => Finding::failed(check, error.to_string(), "see the kernel features above"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::capture::PassedOver;

    #[test]
    fn the_choice_comes_with_its_reasons() {
        let reason = "no nft_tproxy".to_owned();
        let passed_over = vec![PassedOver { backend: BackendKind::NftTproxy, reason }];
        let finding = judge(BackendChoice::Auto, Ok(Chosen { backend: BackendKind::NftRedirect.open(), passed_over }));
        assert_eq!(finding.detail, "nft-redirect, chosen by `auto`; not nft-tproxy: no nft_tproxy");
    }

    #[test]
    fn no_backend_at_all_is_a_failure() {
        let error = CaptureError::Cannot { backend: "auto", what: "anything".into(), remedy: "give up" };
        assert_eq!(judge(BackendChoice::Auto, Err(error)).verdict, Verdict::Failed);
    }
}
