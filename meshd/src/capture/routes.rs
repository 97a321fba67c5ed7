//! The routes that keep virtual IPs on this host, in a table of their own: they stay out of the `local`
//! table that Docker's `--dst-type LOCAL` rules look at.

use super::tool::{CaptureError, IP};
use super::wanted::Wanted;

/// With numbers, whatever names the host gives its tables.
const LIST_RULES: &str = "-N rule show";
/// Our policy rules come before everybody's: main is 32766, Tailscale starts at 5210.
pub(super) const PREFERENCE: u32 = 100;

/// The `ip` commands of one address family.
struct Family {
    option: &'static str,
    add_route: String,
    add_rule: String,
    delete_route: String,
    delete_rule: String,
}

fn families(wanted: &Wanted) -> [Family; 2] {
    let table = wanted.table;
    [("-4", wanted.vip4.to_string(), "127.0.0.1"), ("-6", wanted.vip6.to_string(), "::1")].map(
        |(option, net, source)| Family {
            option,
            // `protocol kernel` keeps systemd-networkd from deleting them as foreign (systemd#19106).
            add_route: format!("route replace local {net} dev lo src {source} table {table} protocol kernel"),
            add_rule: format!("rule add to {net} lookup {table} pref {PREFERENCE} protocol kernel"),
            delete_route: format!("route del local {net} dev lo table {table}"),
            delete_rule: format!("rule del to {net} lookup {table} pref {PREFERENCE}"),
        },
    )
}

/// Leads packets with the raw mark to this host, whatever their destination. In the same table: what gets there by
/// the other rule has a route of its own.
fn raw_families(wanted: &Wanted) -> [Family; 2] {
    let Wanted { table, mark_mask, .. } = wanted;
    let mark = wanted.raw_mark();
    ["-4", "-6"].map(|option| Family {
        option,
        add_route: format!("route replace local default dev lo table {table} protocol kernel"),
        add_rule: format!("rule add fwmark {mark:#x}/{mark_mask:#x} lookup {table} pref {PREFERENCE} protocol kernel"),
        delete_route: format!("route del local default dev lo table {table}"),
        delete_rule: format!("rule del fwmark {mark:#x}/{mark_mask:#x} lookup {table} pref {PREFERENCE}"),
    })
}

/// Gives virtual IPs a local route. Safe to repeat.
pub(super) fn install(wanted: &Wanted) -> Result<(), CaptureError> {
    install_families(&families(wanted))
}

/// Gives captured raw addresses one. Safe to repeat; does nothing by itself.
pub(super) fn install_raw(wanted: &Wanted) -> Result<(), CaptureError> {
    install_families(&raw_families(wanted))
}

fn install_families(families: &[Family]) -> Result<(), CaptureError> {
    for family in families.iter().filter(|family| present(family.option)) {
        ip(family.option, &family.add_route)?;
        ensure_rule(family.option, &family.add_rule)?;
    }
    Ok(())
}

/// Adds a rule unless it is there.
pub(super) fn ensure_rule(option: &str, add: &str) -> Result<(), CaptureError> {
    match ip(option, add) {
        Err(CaptureError::Failed { stderr, .. }) if stderr.contains("File exists") => Ok(()),
        other => other.map(drop),
    }
}

/// Whether all of them are there.
pub(super) fn intact(wanted: &Wanted) -> Result<bool, CaptureError> {
    let table = wanted.table.to_string();
    for family in families(wanted).iter().filter(|family| present(family.option)) {
        let net = if family.option == "-4" { wanted.vip4.to_string() } else { wanted.vip6.to_string() };
        let rules = ip(family.option, LIST_RULES)?;
        // An empty table does not exist for `ip`, which says so with an error.
        let routes = ip(family.option, &format!("route show table {table}")).unwrap_or_default();
        if !rules.contains(&format!("to {net} lookup {table}")) || !routes.contains(&format!("local {net} ")) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether those of raw addresses are there.
pub(super) fn raw_intact(wanted: &Wanted) -> Result<bool, CaptureError> {
    let table = wanted.table.to_string();
    for family in raw_families(wanted).iter().filter(|family| present(family.option)) {
        let rules = ip(family.option, LIST_RULES)?;
        let routes = ip(family.option, &format!("route show table {table}")).unwrap_or_default();
        if !rules.contains(&format!("fwmark {:#x}", wanted.raw_mark())) || !routes.contains("local default ") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes them; fine when there is nothing left.
pub(super) fn remove(wanted: &Wanted) {
    remove_families(&families(wanted));
}

pub(super) fn remove_raw(wanted: &Wanted) {
    remove_families(&raw_families(wanted));
}

fn remove_families(families: &[Family]) {
    for family in families.iter().filter(|family| present(family.option)) {
        while ip(family.option, &family.delete_rule).is_ok() {}
        let _ = ip(family.option, &family.delete_route);
    }
}

/// As an operator would type them.
pub(super) fn render(wanted: &Wanted) -> String {
    render_families(families(wanted))
}

pub(super) fn render_raw(wanted: &Wanted) -> String {
    render_families(raw_families(wanted))
}

fn render_families(families: [Family; 2]) -> String {
    let lines = families
        .into_iter()
        .map(|family| format!("ip {0} {1}\nip {0} {2}\n", family.option, family.add_route, family.add_rule));
    lines.collect()
}

/// Whether there is routing of this family to set up.
pub(super) fn present(option: &str) -> bool {
    option == "-4" || crate::host::has_ipv6()
}

pub(super) fn ip(option: &str, command: &str) -> Result<String, CaptureError> {
    let arguments: Vec<&str> = std::iter::once(option).chain(command.split(' ')).collect();
    IP.run(&arguments, "")
}
