//! Whether the addresses of services are free on this host, and how names are resolved.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;

use super::finding::Finding;
use super::tools::look;
use crate::capture::CaptureConfig;
use crate::dns::{ResolvConf, resolved_runs};

/// A route this wide is for everything (a default, or a VPN's half of the Internet); our rule comes before it.
const WIDE: u8 = 4;
/// Of the running meshd: for names (dns/integrate/resolved.rs), and for the tun backend.
const OUR_LINKS: [&str; 2] = ["meshd-dns", "meshd-vip"];

#[derive(Clone, Debug, Deserialize)]
struct Route {
    dst: String,
    #[serde(default)]
    dev: String,
    #[serde(default)]
    table: String,
}

#[derive(Deserialize)]
struct Link {
    #[serde(default)]
    ifname: String,
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    local: Option<String>,
}

pub(super) struct NetworkFacts {
    routes: Vec<Route>,
    /// Interface and address.
    addresses: Vec<(String, IpAddr)>,
    /// Where resolv.conf leads if it is a link, and what it says.
    resolv_conf: (Option<PathBuf>, String),
    resolved_runs: bool,
}

impl NetworkFacts {
    pub(super) fn gather() -> NetworkFacts {
        let routes =
            ["-4", "-6"].into_iter().filter_map(|family| look("ip", &["-j", family, "route", "show", "table", "all"]));
        NetworkFacts {
            routes: routes.flat_map(|json| parse_routes(&json)).collect(),
            addresses: parse_addresses(&look("ip", &["-j", "address"]).unwrap_or_default()),
            resolv_conf: (
                std::fs::read_link("/etc/resolv.conf").ok(),
                std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            ),
            resolved_runs: resolved_runs(),
        }
    }
}

fn parse_routes(json: &str) -> Vec<Route> {
    serde_json::from_str(json).unwrap_or_default()
}

fn parse_addresses(json: &str) -> Vec<(String, IpAddr)> {
    let links: Vec<Link> = serde_json::from_str(json).unwrap_or_default();
    let of_link = |link: Link| {
        let addresses = link.addr_info.into_iter().filter_map(|address| address.local?.parse().ok());
        addresses.map(|address| (link.ifname.clone(), address)).collect::<Vec<_>>()
    };
    links.into_iter().flat_map(of_link).collect()
}

pub(super) fn judge(facts: &NetworkFacts, capture: &CaptureConfig) -> Vec<Finding> {
    vec![virtual_ips(facts, capture), names(facts)]
}

fn virtual_ips(facts: &NetworkFacts, capture: &CaptureConfig) -> Finding {
    let check = "the virtual IPs are free";
    let remedy = "choose other ranges for [capture] vip4 and vip6 in meshd.toml";
    let ours = [IpNet::from(capture.vip4), IpNet::from(capture.vip6)];
    let mut foreign = facts.addresses.iter().filter(|(device, _)| !is_our_link(device));
    if let Some((device, address)) = foreign.find(|(_, address)| ours.iter().any(|net| net.contains(address))) {
        return Finding::failed(check, format!("{address} of {device} is one of them"), remedy);
    }
    let table = capture.table.to_string();
    let others = facts.routes.iter().filter(|route| route.table != table && !is_our_link(&route.dev));
    let taken = others
        .filter_map(|route| Some((route, network(&route.dst)?)))
        .find(|(_, net)| net.prefix_len() >= WIDE && ours.iter().any(|our| our.contains(net) || net.contains(our)));
    match taken {
        Some((Route { dst, dev, .. }, _)) => {
            let detail = format!("{dst} is routed to {dev}, and its hosts would be out of reach");
            Finding::warning(check, detail, remedy)
        }
        None => Finding::ok(check, format!("{}, {}", capture.vip4, capture.vip6)),
    }
}

fn is_our_link(device: &str) -> bool {
    OUR_LINKS.contains(&device)
}

/// None for `default`.
fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn names(facts: &NetworkFacts) -> Finding {
    let check = "names can be resolved";
    let (link, text) = &facts.resolv_conf;
    let file = ResolvConf::parse(text);
    let is_resolveds = link.as_ref().is_some_and(|link| link.to_string_lossy().contains("systemd/resolve"));
    if (is_resolveds || file.asks_resolved()) && !facts.resolved_runs {
        return Finding::warning(
            check,
            "/etc/resolv.conf leads to systemd-resolved, which does not run",
            "systemctl enable --now systemd-resolved, or give the host a resolv.conf of its own",
        );
    }
    match file.servers[..] {
        [] => Finding::warning(check, "/etc/resolv.conf names no server", "add a `nameserver` line"),
        _ if file.asks_resolved() => Finding::ok(check, "by systemd-resolved"),
        _ => Finding::ok(check, format!("by {}", file.servers.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    fn facts(routes: &str, addresses: &str) -> NetworkFacts {
        NetworkFacts {
            routes: parse_routes(routes),
            addresses: parse_addresses(addresses),
            resolv_conf: (None, "nameserver 10.0.0.1\n".into()),
            resolved_runs: false,
        }
    }

    fn taken(facts: &NetworkFacts) -> Verdict {
        virtual_ips(facts, &CaptureConfig::default()).verdict
    }

    #[test]
    fn a_host_within_the_range_of_virtual_ips_is_in_the_way() {
        let addresses = r#"[{"ifname":"lo","addr_info":[{"local":"127.0.0.1"}]},
            {"ifname":"eth0","addr_info":[{"local":"240.240.1.1"}]}]"#;
        assert_eq!(taken(&facts("[]", addresses)), Verdict::Failed);
    }

    #[test]
    fn routes_into_the_range_are_reported_and_wide_ones_are_not() {
        let route = |dst: &str, table: &str| format!(r#"[{{"dst":"{dst}","dev":"tun0","table":"{table}"}}]"#);
        assert_eq!(taken(&facts(&route("240.0.0.0/4", ""), "[]")), Verdict::Warning);
        assert_eq!(taken(&facts(&route("240.240.3.3", ""), "[]")), Verdict::Warning);
        assert_eq!(taken(&facts(&route("fd6d:6573:6864::/48", ""), "[]")), Verdict::Warning);
        for wide in ["default", "128.0.0.0/1", "10.0.0.0/8"] {
            assert_eq!(taken(&facts(&route(wide, ""), "[]")), Verdict::Ok, "{wide}");
        }
        assert_eq!(taken(&facts(&route("240.240.0.0/16", "7471"), "[]")), Verdict::Ok, "our own");
    }

    #[test]
    fn what_meshd_made_itself_is_not_in_its_way() {
        let addresses = r#"[{"ifname":"meshd-dns","addr_info":[{"local":"240.240.0.0"}]},
            {"ifname":"meshd-vip","addr_info":[{"local":"240.240.0.1"}]}]"#;
        let routes = r#"[{"dst":"240.240.0.0","dev":"meshd-dns","table":"local"},
            {"dst":"240.240.0.0/16","dev":"meshd-vip"}]"#;
        assert_eq!(taken(&facts(routes, addresses)), Verdict::Ok);
    }

    #[test]
    fn a_resolver_that_does_not_run_is_noticed() {
        let mut facts = facts("[]", "[]");
        assert_eq!(names(&facts).verdict, Verdict::Ok);
        facts.resolv_conf.0 = Some("../run/systemd/resolve/stub-resolv.conf".into());
        assert_eq!(names(&facts).verdict, Verdict::Warning);
        facts.resolved_runs = true;
        assert_eq!(names(&facts).verdict, Verdict::Ok);
        facts.resolv_conf.1.clear();
        assert_eq!(names(&facts).verdict, Verdict::Warning);
    }

    #[test]
    fn a_file_that_names_resolved_is_judged_by_whether_resolved_runs_link_or_not() {
        let mut facts = facts("[]", "[]");
        facts.resolv_conf.1 = "# by hand\nnameserver\t127.0.0.53\noptions edns0\n".into();
        assert_eq!(names(&facts).verdict, Verdict::Warning);
        facts.resolved_runs = true;
        assert_eq!((names(&facts).verdict, names(&facts).detail.as_str()), (Verdict::Ok, "by systemd-resolved"));
        // It runs, and nobody asks it.
        facts.resolv_conf.1 = "nameserver 10.0.0.1\n".into();
        assert_eq!(names(&facts).detail, "by 10.0.0.1");
    }
}
