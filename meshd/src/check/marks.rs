//! Other users of our bits of the packet mark: Tailscale, Calico, Cilium and kube-proxy each claim some, and nothing
//! in the kernel keeps them apart.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::finding::Finding;
use super::ruleset::Chain;
use crate::capture::{CaptureConfig, table_beside};

/// Which bits of the mark are ours, and what ours look like.
#[derive(Clone, Copy, Debug)]
pub(super) struct OurMark {
    /// The last: on captured connections to raw addresses, where there are any.
    pub values: [Option<u32>; 3],
    pub mask: u32,
    pub tables: [u32; 2],
}

impl OurMark {
    pub(super) fn of(config: &CaptureConfig) -> OurMark {
        let wanted = config.bare(0);
        let raw = (!config.raw.is_empty()).then(|| wanted.raw_mark());
        OurMark {
            values: [Some(wanted.mark), Some(wanted.answer_mark()), raw],
            mask: wanted.mark_mask,
            tables: [wanted.table, table_beside(wanted.table)],
        }
    }
}

/// What a rule of somebody else does with marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Holds for packets with this value in these bits.
    Tests { value: u32, mask: u32 },
    /// Changes these bits.
    Writes { bits: u32 },
}

/// One rule that has to do with marks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MarkUse {
    pub owner: &'static str,
    pub place: String,
    pub act: Act,
}

impl MarkUse {
    fn new(place: String, act: Act) -> MarkUse {
        MarkUse { owner: owner(&place, act), place, act }
    }

    fn touches(&self, ours: OurMark) -> bool {
        let bits = match self.act {
            Act::Tests { mask, .. } => mask,
            Act::Writes { bits } => bits,
        };
        bits & ours.mask != 0
    }

    /// It takes our packets for its own.
    fn mistakes(&self, ours: OurMark) -> bool {
        match self.act {
            Act::Tests { value, mask } => mask != 0 && ours.values.iter().flatten().any(|own| own & mask == value),
            Act::Writes { .. } => false,
        }
    }

    fn describe(&self) -> String {
        match self.act {
            Act::Tests { value, mask } => format!("{} tests {value:#x}/{mask:#x}", self.place),
            Act::Writes { bits: u32::MAX } => format!("{} sets the whole mark", self.place),
            Act::Writes { bits } => format!("{} sets bits {bits:#x}", self.place),
        }
    }
}

pub(super) fn judge(uses: &[MarkUse], ours: OurMark) -> Finding {
    let check = "no other tool uses meshd's mark bits";
    let touching: Vec<&MarkUse> = uses.iter().filter(|used| used.touches(ours)).collect();
    if touching.is_empty() {
        return Finding::ok(check, format!("mask {:#x}", ours.mask));
    }
    let mut by_owner: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for used in &touching {
        let places = by_owner.entry(used.owner).or_default();
        let place = used.describe();
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let detail: Vec<String> = by_owner
        .into_iter()
        .map(|(owner, places)| match &places[..] {
            [first, rest @ ..] if !rest.is_empty() => format!("{owner}: {first} (and {} more)", rest.len()),
            _ => format!("{owner}: {}", places.join("")),
        })
        .collect();
    let taken = touching.iter().fold(ours.mask, |all, used| match used.act {
        Act::Tests { mask: bits, .. } | Act::Writes { bits } if bits != u32::MAX => all | bits,
        _ => all,
    });
    let (detail, remedy) = (detail.join("; "), remedy(taken));
    match touching.iter().any(|used| used.mistakes(ours)) {
        true => Finding::failed(check, detail, remedy),
        false => Finding::warning(check, detail, remedy),
    }
}

/// Eight free bits next to each other, if there are any.
fn remedy(taken: u32) -> String {
    let free = (0..=24).rev().map(|shift| 0xff_u32 << shift).find(|mask| mask & taken == 0);
    match free {
        Some(mask) => {
            let mark = (0x4d << mask.trailing_zeros()) & mask;
            format!("set [capture] mark = {mark:#x} and mark_mask = {mask:#x} in meshd.toml, or other free bits")
        }
        None => "set [capture] mark and mark_mask in meshd.toml to bits none of them uses".into(),
    }
}

/// Who it probably is: by the names in the rule, else by the bits each is known for.
fn owner(place: &str, act: Act) -> &'static str {
    const NAMES: [(&str, &str); 8] = [
        ("ts-", "Tailscale"),
        ("lookup 52", "Tailscale"),
        ("cali", "Calico"),
        ("CILIUM", "Cilium"),
        ("KUBE", "kube-proxy"),
        ("kube-proxy", "kube-proxy"),
        ("ISTIO", "Istio"),
        ("istio", "Istio"),
    ];
    if let Some((_, owner)) = NAMES.iter().find(|(name, _)| place.contains(name)) {
        return owner;
    }
    match act {
        Act::Tests { mask: 0x00ff_0000, .. } | Act::Writes { bits: 0x00ff_0000 } => "Tailscale, probably",
        Act::Tests { mask: 0xffff_0000, .. } | Act::Writes { bits: 0xffff_0000 } => "Calico, probably",
        Act::Tests { mask: 0x0f00 | 0xffff_0f00, .. } => "Cilium, probably",
        Act::Tests { mask: 0x4000 | 0x8000, .. } | Act::Writes { bits: 0x4000 | 0x8000 } => "kube-proxy, probably",
        Act::Tests { value: 0x539, .. } => "Istio, probably",
        _ => "another tool",
    }
}

/// One of `ip -j rule`.
#[derive(Deserialize)]
struct PolicyRule {
    priority: u32,
    fwmark: Option<String>,
    fwmask: Option<String>,
    #[serde(default)]
    table: String,
}

/// `ip -j rule`; rules that lead to our own tables are ours.
pub(super) fn in_policy_rules(json: &str, ours: OurMark) -> Vec<MarkUse> {
    let rules: Vec<PolicyRule> = serde_json::from_str(json).unwrap_or_default();
    let own = |rule: &PolicyRule| ours.tables.iter().any(|table| rule.table == table.to_string());
    let uses = rules.iter().filter(|rule| !own(rule)).filter_map(|rule| {
        let value = number(rule.fwmark.as_ref()?)?;
        // Without a mask all bits count.
        let mask = rule.fwmask.as_deref().and_then(number).unwrap_or(u32::MAX);
        let place = format!("ip rule {} (lookup {})", rule.priority, rule.table);
        Some(MarkUse::new(place, Act::Tests { value, mask }))
    });
    uses.collect()
}

/// Every chain but ours.
pub(super) fn in_chains(chains: &[Chain]) -> Vec<MarkUse> {
    let others = chains.iter().filter(|chain| !chain.is_ours());
    others.flat_map(|chain| chain.rules.iter().flat_map(|rule| in_rule(rule, &chain.place()))).collect()
}

fn in_rule(rule: &str, place: &str) -> Vec<MarkUse> {
    let words: Vec<&str> = rule.split_whitespace().collect();
    let acts = words.iter().enumerate().filter_map(|(at, word)| {
        let (before, after) = (&words[..at], &words[at + 1..]);
        match *word {
            "mark" => in_nft_expression(before.last().copied(), after),
            option => in_iptables_option(option, after),
        }
    });
    acts.map(|act| MarkUse::new(place.to_owned(), act)).collect()
}

/// What follows `meta mark` or `ct mark`. nft writes both `& 0xff` and `and 0xff`.
fn in_nft_expression(kind: Option<&str>, words: &[&str]) -> Option<Act> {
    let of_packet = matches!(kind, Some("meta" | "ct"));
    match words {
        ["set", rest @ ..] => Some(Act::Writes { bits: written(kind, rest) }),
        // An operand of the `set` before it.
        _ if !of_packet => None,
        ["&" | "and", mask, "==" | "!=", value, ..] => Some(Act::Tests { value: number(value)?, mask: number(mask)? }),
        ["==" | "!=", value, ..] => Some(whole(number(value)?)),
        [value, ..] => number(value).map(whole),
        [] => None,
    }
}

fn whole(value: u32) -> Act {
    Act::Tests { value, mask: u32::MAX }
}

/// The bits an assignment may change: all but those it takes over from the same mark.
fn written(kind: Option<&str>, expression: &[&str]) -> u32 {
    let operations = match expression {
        ["meta" | "ct", "mark", rest @ ..] if kind == expression.first().copied() => rest,
        ["mark", rest @ ..] if kind != Some("ct") => rest,
        _ => return u32::MAX,
    };
    operations.chunks_exact(2).fold(0, |bits, operation| match (operation[0], number(operation[1])) {
        ("&" | "and", Some(kept)) => bits | !kept,
        ("|" | "or" | "^" | "xor", Some(changed)) => bits | changed,
        _ => bits,
    })
}

fn in_iptables_option(option: &str, words: &[&str]) -> Option<Act> {
    let masked = |text: &str| match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    };
    let mask_of = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        number(words.get(at + 1)?)
    };
    match option {
        "--mark" => masked(words.first()?).map(|(value, mask)| Act::Tests { value, mask }),
        "--set-xmark" | "--set-mark" => masked(words.first()?).map(|(value, mask)| Act::Writes { bits: value | mask }),
        "--restore-mark" => Some(Act::Writes { bits: mask_of("--nfmask").unwrap_or(u32::MAX) }),
        "--save-mark" => Some(Act::Writes { bits: mask_of("--ctmask").unwrap_or(u32::MAX) }),
        _ => None,
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::ruleset::{from_iptables, from_nft};
    use super::*;

    const OURS: OurMark =
        OurMark { values: [Some(0x004d_0000), Some(0x004c_0000), None], mask: 0x00ff_0000, tables: [7471, 7472] };

    fn acts(rule: &str) -> Vec<Act> {
        in_rule(rule, "x").into_iter().map(|used| used.act).collect()
    }

    #[test]
    fn nft_expressions_are_understood() {
        let tests = |value, mask| vec![Act::Tests { value, mask }];
        assert_eq!(acts("meta mark & 0x00ff0000 == 0x00040000 accept"), tests(0x40000, 0xff_0000));
        assert_eq!(acts("ct mark and 0xff != 3 drop"), tests(3, 0xff));
        assert_eq!(acts("meta mark 0x00000007 accept"), tests(7, u32::MAX));
        let writes = |bits| vec![Act::Writes { bits }];
        assert_eq!(acts("meta mark set 0x5"), writes(u32::MAX));
        assert_eq!(acts("meta mark set meta mark & 0xff00ffff | 0x00740000"), writes(0xff_0000));
        assert_eq!(acts("meta mark set mark and 0xff00ffff xor 0x80000"), writes(0xff_0000));
        assert_eq!(acts("meta mark set mark or 0x4000"), writes(0x4000));
        assert_eq!(acts("ct mark set meta mark"), writes(u32::MAX));
        assert_eq!(acts("tcp dport 22 accept"), []);
    }

    #[test]
    fn iptables_options_are_understood() {
        assert_eq!(
            acts("-m mark --mark 0x40000/0xff0000 -j MARK --set-xmark 0x80000/0xff0000"),
            [Act::Tests { value: 0x40000, mask: 0xff_0000 }, Act::Writes { bits: 0xff_0000 }]
        );
        assert_eq!(acts("-j CONNMARK --restore-mark --nfmask 0xf00 --ctmask 0xff"), [Act::Writes { bits: 0xf00 }]);
        assert_eq!(acts("-j CONNMARK --save-mark"), [Act::Writes { bits: u32::MAX }]);
        assert_eq!(acts("-m comment --comment mark -j ACCEPT"), []);
    }

    #[test]
    fn tailscale_is_named_with_free_bits_to_take_instead() {
        let json = r#"[{"priority":0,"src":"all","table":"local"},
            {"priority":5210,"src":"all","fwmark":"0x80000","fwmask":"0xff0000","table":"main"},
            {"priority":5270,"src":"all","table":"52"}]"#;
        let finding = judge(&in_policy_rules(json, OURS), OURS);
        assert_eq!(finding.verdict, Verdict::Warning);
        assert!(finding.detail.contains("Tailscale, probably: ip rule 5210"), "{}", finding.detail);
        assert!(finding.remedy.contains("mark = 0x4d000000 and mark_mask = 0xff000000"), "{}", finding.remedy);
    }

    #[test]
    fn a_rule_that_takes_our_packets_for_its_own_is_a_failure() {
        let text = "*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -m mark --mark 0x40000/0x40000 -j ACCEPT\n";
        assert_eq!(judge(&in_chains(&from_iptables(text)), OURS).verdict, Verdict::Failed);
    }

    #[test]
    fn the_mark_of_captured_raw_connections_is_ours_where_there_are_any() {
        let plain = CaptureConfig::default();
        let raw = CaptureConfig { raw: ["payments.shop".parse().unwrap()].into(), ..CaptureConfig::default() };
        let verdict = |config: &CaptureConfig| {
            let ours = OurMark::of(config);
            let value = config.bare(0).raw_mark();
            let text = format!(
                "*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -m mark --mark {value:#x}/{0:#x} -j ACCEPT\n",
                ours.mask
            );
            judge(&in_chains(&from_iptables(&text)), ours).verdict
        };
        assert_eq!((verdict(&plain), verdict(&raw)), (Verdict::Warning, Verdict::Failed));
    }

    #[test]
    fn calico_is_named_by_its_chains() {
        let text = "*filter\n:cali-FORWARD - [0:0]\n-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000\n";
        let finding = judge(&in_chains(&from_iptables(text)), OURS);
        assert!(finding.detail.starts_with("Calico: table filter, chain cali-FORWARD"), "{}", finding.detail);
    }

    #[test]
    fn other_bits_and_our_own_rules_are_no_conflict() {
        let nft = "table inet meshd {\nchain x {\nmeta mark & 0x00ff0000 == 0x004d0000 accept\n}\n}\n\
                   table ip nat {\nchain KUBE-POSTROUTING {\nmeta mark & 0x00004000 != 0x00004000 return\n}\n}\n";
        let own = r#"[{"priority":100,"fwmark":"0x4c0000","fwmask":"0xff0000","table":"7472"}]"#;
        let uses = [in_chains(&from_nft(nft)), in_policy_rules(own, OURS)].concat();
        assert_eq!(judge(&uses, OURS).verdict, Verdict::Ok);
    }
}
