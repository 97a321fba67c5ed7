//! Strict ports: who may still call them in clear. Only SYNs are judged: making a port strict never cuts a
//! connection that is already open.

use std::fmt::Write;

use ipnet::IpNet;

use super::super::wanted::{Facts, Present, StrictPort, Wanted};
use crate::enrol::Cgroup;

pub(super) const SYN: &str = "tcp flags syn / fin,syn,rst,ack";

pub(super) fn chains(wanted: &Wanted, facts: &Facts) -> String {
    let mut text = String::new();
    if wanted.strict.is_empty() {
        return text;
    }
    let ports: Vec<String> = wanted.strict.iter().map(|strict| strict.port.to_string()).collect();
    let ports = ports.join(", ");
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    for strict in &wanted.strict {
        let _ = writeln!(text, "  counter strict_{} {{ }}", strict.port);
    }
    let _ = write!(
        text,
        "  chain strict_local {{\n\
         \x20   type filter hook output priority filter; policy accept;\n\
         \x20   oif lo tcp dport {{ {ports} }} {SYN} jump strict_caller\n\
         \x20 }}\n\
         \x20 chain strict_caller {{\n\
         \x20   meta skuid {daemon_uid} meta mark & {mark_mask:#010x} == {mark:#010x} accept\n"
    );
    wanted.strict.iter().for_each(|strict| local_callers(&mut text, strict, facts));
    wanted.strict.iter().for_each(|strict| refuse(&mut text, strict));
    let _ = write!(
        text,
        "  }}\n\
         \x20 chain strict_remote {{\n\
         \x20   type filter hook input priority filter; policy accept;\n\
         \x20   iif != lo tcp dport {{ {ports} }} {SYN} jump strict_stranger\n\
         \x20 }}\n\
         \x20 chain strict_stranger {{\n"
    );
    for (strict, net) in
        wanted.strict.iter().flat_map(|strict| strict.plaintext_from.iter().map(move |net| (strict, net)))
    {
        let family = if matches!(net, IpNet::V4(_)) { "ip" } else { "ip6" };
        let _ = writeln!(text, "    tcp dport {} {family} saddr {net} accept", strict.port);
    }
    wanted.strict.iter().for_each(|strict| refuse(&mut text, strict));
    text.push_str("  }\n");
    text
}

fn local_callers(text: &mut String, strict: &StrictPort, facts: &Facts) {
    let port = strict.port;
    for present in strict.local.iter().flat_map(|caller| facts.present(caller)) {
        let _ = match present {
            Present::Uid(uid) => writeln!(text, "    tcp dport {port} meta skuid {uid} accept"),
            Present::Cgroup(Cgroup { level, nft_path, .. }) => {
                writeln!(text, "    tcp dport {port} socket cgroupv2 level {level} \"{nft_path}\" accept")
            }
        };
    }
}

fn refuse(text: &mut String, strict: &StrictPort) {
    let port = strict.port;
    let _ = writeln!(text, "    tcp dport {port} counter name strict_{port} reject with tcp reset");
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::Caller;
    use super::super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn strict_ports_let_in_only_the_daemon_and_named_callers() {
        let mut wanted = wanted();
        let local = [Caller::Uid(997), Caller::Unit("pay.service".into()), Caller::Unit("off.service".into())];
        wanted.strict = [StrictPort {
            port: 8080,
            owner: Caller::Unit("pay.service".into()),
            local: local.into_iter().collect(),
            plaintext_from: ["10.9.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()].into_iter().collect(),
        }]
        .into();
        let path = "system.slice/pay.service".to_owned();
        let cgroup = Cgroup { nft_path: format!("unified/{path}"), path, level: 2, id: 7 };
        let facts = Facts { cgroups: [("pay.service".to_owned(), cgroup)].into(), ..Facts::default() };
        let text = chains(&wanted, &facts);
        for line in [
            "oif lo tcp dport { 8080 } tcp flags syn / fin,syn,rst,ack jump strict_caller",
            "meta skuid 998 meta mark & 0x00ff0000 == 0x004d0000 accept",
            "tcp dport 8080 meta skuid 997 accept",
            "tcp dport 8080 socket cgroupv2 level 2 \"unified/system.slice/pay.service\" accept",
            "tcp dport 8080 ip saddr 10.9.0.0/24 accept",
            "tcp dport 8080 ip6 saddr fd00::/64 accept",
            "tcp dport 8080 counter name strict_8080 reject with tcp reset",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
        assert!(!text.contains("off.service"), "{text}");
    }
}
