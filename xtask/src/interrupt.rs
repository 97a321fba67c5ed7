//! Ctrl-C and SIGTERM still clean up.

use std::sync::Mutex;

use meshd_tests::lab::Lab;
use tokio::signal::unix::{SignalKind, signal};

static LABS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The lab of this name is removed when the command is interrupted.
pub(crate) fn remove_on_interrupt(lab: &str) {
    LABS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(lab.to_owned());
}

pub(crate) fn watch() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(interrupted());
        eprintln!("\ninterrupted: cleaning up");
        for lab in LABS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            Lab::remove(lab);
        }
        if let Some(built) = crate::built::known() {
            meshd_tests::root::give_back(&built.target);
        }
        std::process::exit(130);
    });
}

async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
}
