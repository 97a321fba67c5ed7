use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::Name;
use meshd_discovery::fake;
use proptest::prelude::*;

use super::super::zone::ZoneError;
use super::*;

const VIP: Vip =
    Vip { v4: Ipv4Addr::new(240, 240, 7, 9), v6: Ipv6Addr::new(0xfd6d, 0x6573, 0x6864, 0, 0, 0, 0, 0x709) };

fn zones() -> Zones {
    zones_of("mesh", Some("cluster.local"))
}

fn zones_of(mesh: &str, kubernetes: Option<&str>) -> Zones {
    Zones { mesh: Zone::new(mesh).unwrap(), kubernetes: kubernetes.map(|domain| Zone::new(domain).unwrap()) }
}

fn reply(packet: &[u8], zones: &Zones, forwards: bool) -> Reply {
    respond(packet, &Knowledge { zones, directory: &directory(), forwards, unknown: Unknown::Nowhere }, vip_of)
}

fn bytes(reply: Reply) -> Option<Vec<u8>> {
    match reply {
        Reply::Answer(bytes, _) => Some(bytes),
        Reply::Silence => None,
        other => panic!("no answer: {other:?}"),
    }
}

fn directory() -> Directory {
    let names = ["payments.shop", "web.shop", "full.other"];
    Directory::from_services(names.map(|name| fake::service(name, "test", &[])))
}

fn vip_of(service: &ServiceName) -> Option<Vip> {
    (service.name() != "full").then_some(VIP)
}

fn ask_bytes(packet: &[u8]) -> Option<Message> {
    bytes(reply(packet, &zones(), false)).map(|bytes| Message::from_vec(&bytes).unwrap())
}

fn query(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    message
}

fn ask(name: &str, record_type: RecordType) -> Message {
    ask_bytes(&query(name, record_type).to_vec().unwrap()).unwrap()
}

/// `NOERROR A 240.240.7.9` / `NXDOMAIN soa`: code, answers, authority.
fn shown(message: &Message) -> String {
    let answers =
        message.answers.iter().map(|record| format!(" {} {} {}", record.record_type(), record.ttl, record.data));
    let authority = message.authorities.iter().map(|record| format!(" / {} {}", record.record_type(), record.ttl));
    format!("{:?}{}", message.metadata.response_code, answers.chain(authority).collect::<String>())
}

#[test]
fn every_kind_of_question_has_its_answer() {
    use RecordType::{A, AAAA, ANY, AXFR, HTTPS, MX, NS, PTR, SOA, SRV, TXT};
    let a = "NoError A 30 240.240.7.9";
    let aaaa = "NoError AAAA 30 fd6d:6573:6864::709";
    let soa = "NoError SOA 5 ns.mesh. hostmaster.mesh. 1 3600 600 86400 5";
    let (nodata, nxdomain) = ("NoError / SOA 5", "NXDomain / SOA 5");
    for (name, record_type, expected) in [
        ("payments.shop.mesh.", A, a),
        ("payments.shop.mesh.", AAAA, aaaa),
        ("payments.shop.mesh.", ANY, "NoError A 30 240.240.7.9 AAAA 30 fd6d:6573:6864::709"),
        ("payments.shop.mesh.", MX, nodata),
        ("payments.shop.mesh.", TXT, nodata),
        ("payments.shop.mesh.", SRV, nodata),
        ("payments.shop.mesh.", HTTPS, nodata),
        ("payments.shop.mesh.", RecordType::Unknown(65_000), nodata),
        ("orders.shop.mesh.", A, nxdomain),
        ("payments.billing.mesh.", A, nxdomain),
        ("shop.mesh.", A, nodata),
        ("billing.mesh.", A, nxdomain),
        ("www.payments.shop.mesh.", A, nxdomain),
        ("*.shop.mesh.", A, nxdomain),
        ("pay_ments.shop.mesh.", A, nxdomain),
        ("mesh.", A, nodata),
        ("mesh.", NS, nodata),
        ("mesh.", SOA, soa),
        ("mesh.", ANY, soa),
        ("mesh.", AXFR, "Refused"),
        ("full.other.mesh.", A, "ServFail"),
        ("payments.shop.", A, "Refused"),
        ("payments.shop.notmesh.", A, "Refused"),
        ("example.org.", A, "Refused"),
        ("9.7.240.240.in-addr.arpa.", PTR, "Refused"),
        (".", NS, "Refused"),
    ] {
        assert_eq!(shown(&ask(name, record_type)), expected, "{name} {record_type}");
    }
}

#[test]
fn kubernetes_names_have_the_same_addresses_and_negative_answers_of_their_own_zone() {
    use RecordType::{A, AAAA, NS, SOA, SRV};
    let (nodata, nxdomain) = ("NoError / SOA 5", "NXDomain / SOA 5");
    for (name, record_type, expected) in [
        ("payments.shop.svc.cluster.local.", A, "NoError A 30 240.240.7.9"),
        ("Payments.Shop.SVC.Cluster.LOCAL.", AAAA, "NoError AAAA 30 fd6d:6573:6864::709"),
        ("payments.shop.svc.cluster.local.", SRV, nodata),
        ("shop.svc.cluster.local.", A, nodata),
        ("svc.cluster.local.", A, nodata),
        ("cluster.local.", NS, nodata),
        ("cluster.local.", SOA, "NoError SOA 5 ns.cluster.local. hostmaster.cluster.local. 1 3600 600 86400 5"),
        ("orders.shop.svc.cluster.local.", A, nxdomain),
        ("billing.svc.cluster.local.", A, nxdomain),
        ("_http._tcp.payments.shop.svc.cluster.local.", SRV, nxdomain),
        ("payments.shop.pod.cluster.local.", A, nxdomain),
        ("payments.shop.cluster.local.", A, nxdomain),
        ("full.other.svc.cluster.local.", A, "ServFail"),
        ("payments.shop.svc.local.", A, "Refused"),
    ] {
        assert_eq!(shown(&ask(name, record_type)), expected, "{name} {record_type}");
    }
    let apex = |name: &str| ask(name, A).authorities[0].name.to_ascii();
    assert_eq!(apex("orders.shop.svc.cluster.local."), "cluster.local.");
    assert_eq!(apex("orders.shop.mesh."), "mesh.");
}

#[test]
fn with_a_server_to_ask_only_what_is_known_here_is_answered_here() {
    let packet = |name: &str, record_type| query(name, record_type).to_vec().unwrap();
    let forwarded = |name: &str, record_type| match reply(&packet(name, record_type), &zones(), true) {
        Reply::Forward { question_end } => {
            assert_eq!(question_end, packet(name, record_type).len(), "{name}");
            true
        }
        Reply::Answer(bytes, _) => {
            assert!(Message::from_vec(&bytes).unwrap().metadata.recursion_available);
            false
        }
        Reply::Silence | Reply::LookUp(_) => panic!("no reply to {name}"),
    };
    use RecordType::{A, AXFR, PTR, SRV};
    for (name, record_type) in [
        ("example.org.", A),
        (".", RecordType::NS),
        ("1.0.0.10.in-addr.arpa.", PTR),
        ("orders.shop.svc.cluster.local.", A),
        ("billing.svc.cluster.local.", A),
        ("_http._tcp.payments.shop.svc.cluster.local.", SRV),
        ("1-2-3-4.shop.pod.cluster.local.", A),
    ] {
        assert!(forwarded(name, record_type), "{name} is answered here");
    }
    for (name, record_type) in [
        ("payments.shop.mesh.", A),
        ("orders.shop.mesh.", A),
        ("a.b.c.mesh.", A),
        ("payments.shop.svc.cluster.local.", A),
        ("payments.shop.svc.cluster.local.", SRV),
        ("shop.svc.cluster.local.", A),
        ("example.org.", AXFR),
    ] {
        assert!(!forwarded(name, record_type), "{name} is forwarded");
    }
}

#[test]
fn one_zone_inside_the_other_is_asked_where_it_is_deeper() {
    let asked = |mesh: &str, kubernetes: &str, name: &str| {
        let packet = query(name, RecordType::A).to_vec().unwrap();
        shown(&Message::from_vec(&bytes(reply(&packet, &zones_of(mesh, Some(kubernetes)), false)).unwrap()).unwrap())
    };
    let address = "NoError A 30 240.240.7.9";
    assert_eq!(asked("mesh.corp", "corp", "payments.shop.mesh.corp."), address);
    assert_eq!(asked("mesh.corp", "corp", "payments.shop.svc.corp."), address);
    assert_eq!(asked("corp", "k8s.corp", "payments.shop.svc.k8s.corp."), address);
    assert_eq!(asked("corp", "k8s.corp", "payments.shop.corp."), address);
}

#[test]
fn switched_off_kubernetes_names_are_anybodys() {
    let packet = query("payments.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    let zones = zones_of("mesh", None);
    assert!(matches!(reply(&packet, &zones, false), Reply::Answer(_, DnsOutcome::Refused)));
    assert!(matches!(reply(&packet, &zones, true), Reply::Forward { .. }));
}

#[test]
fn every_answer_is_counted_as_what_it_is() {
    for (name, record_type, expected) in [
        ("payments.shop.mesh.", RecordType::A, DnsOutcome::Answered),
        ("payments.shop.mesh.", RecordType::MX, DnsOutcome::Nodata),
        ("orders.shop.mesh.", RecordType::A, DnsOutcome::Nxdomain),
        ("example.org.", RecordType::A, DnsOutcome::Refused),
        ("full.other.mesh.", RecordType::A, DnsOutcome::NoAddress),
    ] {
        let packet = query(name, record_type).to_vec().unwrap();
        assert!(matches!(reply(&packet, &zones(), false), Reply::Answer(_, outcome) if outcome == expected), "{name}");
    }
    let damaged = &query("payments.shop.mesh.", RecordType::A).to_vec().unwrap()[..20];
    assert!(matches!(reply(damaged, &zones(), false), Reply::Answer(_, DnsOutcome::Invalid)));
}

#[test]
fn a_failure_keeps_id_question_and_edns() {
    let mut asked = query("example.org.", RecordType::A);
    asked.set_edns(Edns::new());
    let answer = failure(&asked.to_vec().unwrap(), ResponseCode::ServFail).unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!((answer.metadata.id, shown(&answer).as_str()), (4711, "ServFail"));
    assert!(answer.edns.is_some() && answer.queries == asked.queries);
}

#[test]
fn the_header_tells_a_server_with_authority_and_without_recursion() {
    let answer = ask("payments.shop.mesh.", RecordType::A);
    let header = answer.metadata;
    assert_eq!((header.id, header.message_type), (4711, MessageType::Response));
    assert!(header.authoritative && header.recursion_desired && !header.recursion_available && !header.truncation);
    assert!(!ask("example.org.", RecordType::A).metadata.authoritative);
}

#[test]
fn case_does_not_matter_and_comes_back_as_it_was_asked() {
    let answer = ask("pAyMeNtS.sHoP.mEsH.", RecordType::A);
    assert_eq!(answer.queries[0].name().to_ascii(), "pAyMeNtS.sHoP.mEsH.");
    assert_eq!(answer.answers[0].name.to_ascii(), "pAyMeNtS.sHoP.mEsH.");
    assert_eq!(shown(&answer), "NoError A 30 240.240.7.9");
    assert_eq!(shown(&ask("SHOP.MESH.", RecordType::A)), "NoError / SOA 5");
}

#[test]
fn an_opt_is_answered_by_an_opt_and_none_by_none() {
    let mut asked = query("payments.shop.mesh.", RecordType::A);
    assert!(ask_bytes(&asked.to_vec().unwrap()).unwrap().edns.is_none());
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    asked.set_edns(edns);
    let answer = ask_bytes(&asked.to_vec().unwrap()).unwrap();
    let ours = answer.edns.as_ref().unwrap();
    assert_eq!((ours.version(), ours.max_payload(), ours.flags().dnssec_ok), (0, 1232, true));
    assert_eq!(shown(&answer), "NoError A 30 240.240.7.9");
}

#[test]
fn an_edns_version_of_the_future_is_refused_by_its_own_code() {
    let mut asked = query("payments.shop.mesh.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    asked.set_edns(edns);
    let answer = ask_bytes(&asked.to_vec().unwrap()).unwrap();
    // Code 16 has two names; without a TSIG it is BADVERS.
    assert_eq!(u16::from(answer.metadata.response_code), 16);
    assert!(answer.answers.is_empty() && answer.edns.is_some());
}

#[test]
fn other_classes_and_operations_are_refused() {
    let mut chaos = query("payments.shop.mesh.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(shown(&ask_bytes(&chaos.to_vec().unwrap()).unwrap()), "Refused");
    let mut update = query("payments.shop.mesh.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    let answer = ask_bytes(&update.to_vec().unwrap()).unwrap();
    assert_eq!((answer.metadata.response_code, answer.metadata.id), (ResponseCode::NotImp, 4711));
}

#[test]
fn packets_that_are_no_question_get_a_format_error_or_silence() {
    let good = query("payments.shop.mesh.", RecordType::A).to_vec().unwrap();
    for length in 0..12 {
        assert!(ask_bytes(&good[..length]).is_none(), "{length} bytes");
    }
    for length in 12..good.len() {
        assert_eq!(shown(&ask_bytes(&good[..length]).unwrap()), "FormErr", "{length} bytes");
    }
    let mut response = query("payments.shop.mesh.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(ask_bytes(&response.to_vec().unwrap()).is_none());
    for count in [0, 2] {
        let mut asked = query("payments.shop.mesh.", RecordType::A);
        let question = asked.queries.remove(0);
        asked.add_queries(vec![question; count]);
        assert_eq!(shown(&ask_bytes(&asked.to_vec().unwrap()).unwrap()), "FormErr", "{count} questions");
    }
    // 65,535 questions promised in 12 bytes.
    assert_eq!(shown(&ask_bytes(&[0, 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0]).unwrap()), "FormErr");
}

#[test]
fn a_domain_of_several_labels_works_and_bad_ones_are_refused() {
    let zones = zones_of("mesh.example.org.", None);
    let asked = query("payments.shop.mesh.example.org.", RecordType::A).to_vec().unwrap();
    let answer = Message::from_vec(&bytes(reply(&asked, &zones, false)).unwrap()).unwrap();
    assert_eq!(shown(&answer), "NoError A 30 240.240.7.9");
    for bad in ["", ".", "Mesh", "a..b", "-a", "a b", "é", &"a".repeat(64)] {
        let error = Zone::new(bad).unwrap_err().to_string();
        assert!(error.contains("is not a domain"), "{bad}: {error}");
    }
    assert!(matches!(Zone::new(&["abcdefgh"; 20].join(".")), Err(ZoneError::Long(_))));
}

proptest! {
    #[test]
    fn random_bytes_never_panic_and_answers_keep_the_id(packet in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Some(answer) = bytes(reply(&packet, &zones(), false)) {
            prop_assert_eq!(&answer[..2], &packet[..2]);
            prop_assert!(answer[2] & 0x80 != 0);
        }
    }

    #[test]
    fn what_is_forwarded_has_its_question_within_the_packet(packet in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Reply::Forward { question_end } = reply(&packet, &zones(), true) {
            prop_assert!((12 + 5..=packet.len()).contains(&question_end));
            prop_assert!(failure(&packet, ResponseCode::ServFail).is_some());
        }
    }

    #[test]
    fn a_damaged_query_never_panics(
        at in 0usize..64, byte in any::<u8>(), cut in 0usize..64, opt in any::<bool>(),
    ) {
        let mut asked = query("payments.shop.mesh.", RecordType::A);
        if opt {
            asked.set_edns(Edns::new());
        }
        let mut packet = asked.to_vec().unwrap();
        let length = packet.len();
        packet[at % length] = byte;
        packet.truncate(length - cut % length);
        if let Some(answer) = bytes(reply(&packet, &zones(), false)) {
            prop_assert!(Message::from_vec(&answer).is_ok());
        }
    }

    #[test]
    fn every_answer_fits_into_a_plain_udp_packet(
        labels in prop::collection::vec("[a-zA-Z0-9]{1,63}", 0..4), zone_label in "[a-z]{1,60}", record_type in 0u16..300, opt in any::<bool>(),
    ) {
        let zones = zones_of(&format!("{zone_label}.{zone_label}"), None);
        let name = labels.iter().map(|label| format!("{label}.")).collect::<String>() + &format!("{zone_label}.{zone_label}.");
        prop_assume!(name.len() <= 254);
        let mut asked = query(&name.to_uppercase(), RecordType::from(record_type));
        if opt {
            asked.set_edns(Edns::new());
        }
        let Ok(packet) = asked.to_vec() else { return Ok(()) };
        let answer = bytes(reply(&packet, &zones, false));
        prop_assert!(answer.is_none_or(|answer| answer.len() <= 512));
    }
}

/// What is answered to a question for an A record, where names may be looked up.
fn looked_up(name: &str, unknown: Unknown, forwards: bool) -> String {
    let packet = query(name, RecordType::A).to_vec().unwrap();
    let known = Knowledge { zones: &zones(), directory: &directory(), forwards, unknown };
    match respond(&packet, &known, vip_of) {
        Reply::Answer(bytes, outcome) => {
            format!("{:?} {}", Message::from_vec(&bytes).unwrap().metadata.response_code, outcome.label())
        }
        Reply::LookUp(service) => format!("look up {service}"),
        Reply::Forward { .. } => "forward".to_owned(),
        Reply::Silence => "silence".to_owned(),
    }
}

#[test]
fn a_name_that_is_not_known_is_looked_up_and_then_absent_only_if_every_source_says_so() {
    let unsure = Unknown::Looked(Looked::Unsure);
    let nowhere = Unknown::Looked(Looked::Nowhere);
    for (name, unknown, forwards, expected) in [
        ("payments.shop.mesh.", Unknown::LookUp, true, "NoError answered"),
        ("Orders.Shop.mesh.", Unknown::LookUp, true, "look up orders.shop"),
        ("orders.shop.svc.cluster.local.", Unknown::LookUp, true, "look up orders.shop"),
        ("orders.shop.mesh.", nowhere, true, "NXDomain nxdomain"),
        ("orders.shop.mesh.", unsure, true, "ServFail unsure"),
        // The cluster's own servers may know it.
        ("orders.shop.svc.cluster.local.", nowhere, true, "forward"),
        ("orders.shop.svc.cluster.local.", unsure, true, "forward"),
        ("orders.shop.svc.cluster.local.", unsure, false, "ServFail unsure"),
        // What cannot be a service is not looked up.
        ("a.orders.shop.mesh.", Unknown::LookUp, true, "NXDomain nxdomain"),
        ("under_score.shop.mesh.", Unknown::LookUp, true, "NXDomain nxdomain"),
        // Names below it may be services.
        ("elsewhere.mesh.", Unknown::LookUp, true, "NoError nodata"),
        ("elsewhere.mesh.", Unknown::Nowhere, true, "NXDomain nxdomain"),
        ("example.org.", Unknown::LookUp, true, "forward"),
    ] {
        assert_eq!(looked_up(name, unknown, forwards), expected, "{name} {unknown:?}");
    }
}
