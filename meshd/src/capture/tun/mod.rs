//! Capture without netfilter: virtual IPs are routed into a device of ours, and the kernel's own TCP takes the
//! connections after their packets came back with other addresses.
//!
//! `pump` moves packets between device and kernel, `translate` says where one goes, `nat` remembers which
//! connection is which, `rewrite` changes bytes, `openers` asks whose connection it is, `flows` is what workers ask who
//! called whom; `device` is what `ip` is told. The device dies with the daemon, the policy rules stay: virtual IPs are
//! unreachable then, at once.

mod device;
mod flows;
mod metrics;
mod nat;
mod openers;
#[cfg(test)]
mod packets;
mod pump;
mod rewrite;
mod translate;

use std::io::ErrorKind;
use std::sync::Arc;

use meshd_sys::tun::Tun as Device;

pub use flows::Flows;

use super::backend::{Backend, BackendKind, ListenAt};
use super::flow::Recovery;
use super::owner::OwnerRecord;
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};
use pump::Pump;

/// Whether device, addresses, routes and rules are all there, whichever process made them.
pub(super) fn routes_are_there(wanted: &Wanted) -> Result<bool, CaptureError> {
    device::intact(wanted)
}

#[derive(Default)]
pub(super) struct Tun {
    /// The device, as long as it is ours.
    pump: Option<Pump>,
    /// Outlives a device that somebody deleted: workers ask it, and connections go on over the next one.
    flows: Option<Arc<Flows>>,
}

impl Tun {
    /// Makes the device unless it is there and served.
    fn ensure_device(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        if self.pump.as_ref().is_some_and(Pump::is_running) {
            return Ok(());
        }
        // What is left of an earlier one must be gone before its name is free.
        self.pump = None;
        let flows = self.flows.get_or_insert_with(|| Arc::new(device::flows(wanted))).clone();
        let made = Device::create(device::NAME).map_err(unavailable)?;
        device::configure(wanted)?;
        let pump = Pump::start(made, flows).map_err(|source| CaptureError::State {
            what: "cannot start the capture device's thread".into(),
            source,
        })?;
        self.pump = Some(pump);
        Ok(())
    }
}

impl Backend for Tun {
    fn kind(&self) -> BackendKind {
        BackendKind::Tun
    }

    fn probe(&self, _wanted: &Wanted) -> Result<(), CaptureError> {
        // The kernel fills in a free number; the device is gone again right away.
        Device::create(device::PROBE_NAME).map(drop).map_err(unavailable)
    }

    fn prepare(&mut self, wanted: &Wanted) -> Result<ListenAt, CaptureError> {
        self.ensure_device(wanted)?;
        Ok(ListenAt { addresses: device::listeners(wanted).to_vec(), transparent: false })
    }

    fn recovery(&self) -> Recovery {
        self.flows.clone().map_or(Recovery::Transparent, Recovery::Tun)
    }

    fn owners(&self) -> OwnerRecord {
        self.flows.clone().map_or(OwnerRecord::Nowhere, OwnerRecord::Tun)
    }

    fn render(&self, wanted: &Wanted, _facts: &Facts) -> String {
        device::render(wanted)
    }

    fn apply(&mut self, wanted: &Wanted, _facts: &Facts) -> Result<(), CaptureError> {
        self.ensure_device(wanted)?;
        device::configure(wanted)?;
        device::install_routes(wanted)
    }

    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        let served = self.pump.as_ref().is_some_and(Pump::is_running);
        Ok(served && device::intact(wanted)?)
    }

    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        device::remove_routes(wanted);
        self.pump = None;
        Ok(())
    }
}

fn unavailable(source: std::io::Error) -> CaptureError {
    let (what, remedy) = match source.kind() {
        ErrorKind::NotFound => ("a device: there is no /dev/net/tun", "load the kernel's module: modprobe tun"),
        ErrorKind::PermissionDenied => (
            "a device without CAP_NET_ADMIN and permission to read and write /dev/net/tun",
            "give meshd both; udev's default mode of /dev/net/tun is 0666",
        ),
        ErrorKind::ResourceBusy => ("a device: an interface of its name exists", "remove it: ip link delete meshd-vip"),
        _ => return CaptureError::State { what: "cannot make the capture device".into(), source },
    };
    CaptureError::Cannot { backend: BackendKind::Tun.label(), what: what.into(), remedy }
}
