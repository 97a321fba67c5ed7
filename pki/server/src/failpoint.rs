//! Ends the process where a test asks for it, as a power cut would. Builds with debug assertions only.

/// `step.point`: the step that is taken, and how far it has come.
#[cfg(debug_assertions)]
const VARIABLE: &str = "MESHD_PKI_KILL_AT";

#[cfg(debug_assertions)]
pub(crate) fn reach(step: &str, point: &str) {
    use nix::sys::signal::{Signal, kill};

    if std::env::var(VARIABLE).is_ok_and(|asked| asked == format!("{step}.{point}")) {
        eprintln!("{VARIABLE}: {step}.{point} is reached");
        _ = kill(nix::unistd::Pid::this(), Signal::SIGKILL);
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn reach(_step: &str, _point: &str) {}
