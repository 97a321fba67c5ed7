use serde_json::json;

use super::super::samples::{self, object, pod, service, slice};
use super::*;

#[test]
fn of_a_service_tcp_ports_addresses_selector_and_our_annotations_are_kept() {
    let mut sample = service("payments", &[("identities", "ns/shop/sa/a")]);
    sample["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = json!("{}");
    let Object::Service(read) = object(Kind::Service, sample) else { panic!("no service") };
    assert_eq!(read.name.as_str(), "payments.shop");
    assert_eq!(read.ports, [Port { name: "web".into(), port: 80, protocol: Protocol::Http }]);
    assert_eq!(read.addresses, ["10.96.0.7".parse::<IpAddr>().unwrap()]);
    assert_eq!(read.selector, [("app".to_owned(), "payments".to_owned())].into());
    assert_eq!(read.notes, [("identities".to_owned(), "ns/shop/sa/a".to_owned())].into());
}

#[test]
fn a_headless_service_has_no_address_and_an_external_name_says_so() {
    let mut headless = service("payments", &[]);
    headless["spec"]["clusterIPs"] = json!(["None"]);
    headless["spec"]["type"] = json!("ExternalName");
    let Object::Service(read) = object(Kind::Service, headless) else { panic!("no service") };
    assert!(read.addresses.is_empty() && read.is_external);
}

#[test]
fn conditions_say_whether_an_endpoint_is_ready_ends_or_is_away() {
    let state = |conditions: serde_json::Value| {
        let mut sample = slice("payments-x", &["10.0.0.1"]);
        sample["endpoints"][0]["conditions"] = conditions;
        let Object::Slice(read) = object(Kind::Slice, sample) else { panic!("no slice") };
        read.endpoints[0].state
    };
    assert_eq!(state(json!(null)), State::Ready);
    assert_eq!(state(json!({})), State::Ready);
    assert_eq!(state(json!({ "ready": false })), State::Away);
    assert_eq!(state(json!({ "ready": false, "serving": true, "terminating": true })), State::Draining);
    assert_eq!(state(json!({ "ready": false, "serving": false, "terminating": true })), State::Away);
    assert_eq!(state(json!({ "ready": true, "serving": true, "terminating": true })), State::Ready);
}

#[test]
fn nulls_stand_wherever_something_is_missing() {
    let mut sample = slice("payments-x", &[]);
    (sample["endpoints"], sample["ports"]) = (json!(null), json!(null));
    let Object::Slice(read) = object(Kind::Slice, sample) else { panic!("no slice") };
    assert!(read.endpoints.is_empty() && read.ports.is_empty());
    assert!(read_list(Kind::Pod, br#"{"metadata":{"resourceVersion":"9"},"items":null}"#).unwrap().objects.is_empty());
}

#[test]
fn a_slice_of_no_service_is_none_of_ours() {
    let mut sample = slice("payments-x", &["10.0.0.1"]);
    sample["metadata"]["labels"] = json!(null);
    assert!(samples::objects(Kind::Slice, &[sample]).is_empty());
}

#[test]
fn a_pod_takes_hbone_by_istios_own_rule() {
    let takes = |sample: serde_json::Value| match object(Kind::Pod, sample) {
        Object::Pod(_, pod) => (pod.takes_hbone, pod.account),
        _ => panic!("no pod"),
    };
    assert_eq!(takes(pod("payments-0", "payer", true)), (true, "payer".into()));
    let mut sample = pod("payments-0", "", false);
    assert_eq!(takes(sample.clone()), (false, "default".into()));
    sample["metadata"]["labels"] = json!({ "networking.istio.io/tunnel": "http" });
    assert!(takes(sample).0);
}

#[test]
fn events_are_told_apart() {
    let line = |kind: &str, object: serde_json::Value| json!({ "type": kind, "object": object }).to_string();
    let mut sample = pod("payments-0", "payer", true);
    sample["metadata"]["resourceVersion"] = json!("12");
    let read = |text: String| read_event(Kind::Pod, text.as_bytes()).unwrap();
    assert!(matches!(read(line("ADDED", sample.clone())), Event::Set(Object::Pod(..), at) if at == "12"));
    assert!(matches!(read(line("DELETED", sample)), Event::Gone(Object::Pod(..), at) if at == "12"));
    let bookmark = json!({ "kind": "Pod", "metadata": { "resourceVersion": "90" }, "spec": { "containers": null } });
    assert!(matches!(read(line("BOOKMARK", bookmark)), Event::Bookmark(at) if at == "90"));
    let gone = json!({ "kind": "Status", "metadata": {}, "code": 410, "reason": "Expired", "message": "too old" });
    assert!(matches!(read(line("ERROR", gone)), Event::Expired));
    let other = json!({ "kind": "Status", "metadata": {}, "code": 500, "message": "etcd is away" });
    assert!(matches!(read(line("ERROR", other)), Event::Failed(reason) if reason == "etcd is away"));
    assert!(read_event(Kind::Pod, b"{}").is_err());
}

#[test]
fn a_refusal_is_what_the_server_says_in_one_line() {
    let status = br#"{"kind":"Status","message":"pods is forbidden: User \"reader\" cannot list resource\n\"pods\""}"#;
    assert_eq!(read_refusal(status), "pods is forbidden: User `reader` cannot list resource\\n`pods`");
    assert_eq!(read_refusal(b"<html>"), "<html>");
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let _ = read_event(Kind::Slice, &bytes);
        let _ = read_list(Kind::Service, &bytes);
        let _ = (read_life(&bytes).is_ok(), read_refusal(&bytes));
    }
}
