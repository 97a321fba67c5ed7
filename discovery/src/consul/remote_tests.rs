use hyper::body::Bytes;

use super::super::read::BASE;
use super::*;

const TOLD: [(&str, &str); 2] = [("x-consul-index", "7"), ("x-consul-knownleader", "true")];

fn reply(status: u16, headers: &[(&'static str, &str)], body: &str) -> Reply {
    let headers = headers
        .iter()
        .map(|(name, value)| (hyper::header::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
    Reply {
        status: StatusCode::from_u16(status).unwrap(),
        headers: headers.collect(),
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn payments() -> Query {
    Query::Instances("payments".into())
}

fn shop() -> Query {
    Query::Documents(Some("shop".into()))
}

fn error(query: &Query, reply: &Reply) -> String {
    answer(query, reply, BASE).unwrap_err().to_string()
}

#[test]
fn documents_names_and_instances_are_read_with_their_index() {
    let stored =
        r#"[{"Key":"a/b","ModifyIndex":5,"Value":"ZG9j","Flags":0},{"Key":"a/","ModifyIndex":6,"Value":null}]"#;
    let answered = answer(&Query::Documents(None), &reply(200, &TOLD, stored), BASE).unwrap();
    let pairs = vec![
        Pair { key: "a/b".into(), modified: 5, value: b"doc".to_vec() },
        Pair { key: "a/".into(), modified: 6, value: vec![] },
    ];
    assert_eq!(answered, Answer { index: 7, content: Content::Documents(pairs) });
    let names = answer(&Query::Names, &reply(200, &TOLD, r#"{"consul":[],"Web_App":["x"],"payments":["a"]}"#), BASE);
    assert_eq!(names.unwrap().content, Content::Names(vec!["consul".into(), "payments".into()]));
    let none = answer(&payments(), &reply(200, &TOLD, "[]"), BASE).unwrap();
    assert_eq!(none.content, Content::Instances(vec![]));
}

#[test]
fn an_empty_store_is_an_answer_and_its_index_is_never_zero() {
    let zero = [("x-consul-index", "0"), ("x-consul-knownleader", "true")];
    let answered = answer(&Query::Documents(None), &reply(404, &zero, ""), BASE).unwrap();
    assert_eq!(answered, Answer { index: 1, content: Content::Documents(vec![]) });
    assert!(error(&payments(), &reply(404, &TOLD, "")).contains("service `payments` with 404"));
}

#[test]
fn an_empty_list_that_hides_something_is_trouble_that_names_the_rule() {
    let hidden = [&TOLD[..], &[("x-consul-results-filtered-by-acls", "true")]].concat();
    assert!(
        error(&payments(), &reply(200, &hidden, "[]"))
            .contains("service_prefix \"\" { policy = \"read\" } node_prefix")
    );
    assert!(error(&Query::Names, &reply(200, &hidden, "{}")).contains("`imports`"));
    let documents = error(&Query::Documents(None), &reply(404, &hidden, ""));
    assert!(documents.contains("`key_prefix \"meshd-discovery/v1/\" { policy = \"read\" }`"), "{documents}");
    let forbidden =
        error(&Query::Documents(None), &reply(403, &TOLD, "Permission denied: lacks permission 'key:list'"));
    assert!(forbidden.contains("key_prefix"), "{forbidden}");
    let narrower = error(&shop(), &reply(403, &TOLD, ""));
    assert!(narrower.contains("`key_prefix \"meshd-discovery/v1/shop/\" { policy = \"read\" }`"), "{narrower}");
}

#[test]
fn each_refusal_says_what_to_do() {
    for (status, body, expected) in [
        (403, "ACL not found", "refuses the token (ACL not found)"),
        (429, "Your IP is issuing too many", "limits.http_max_conns_per_client"),
        (503, "rate limit exceeded, try again later", "limits.request_limits"),
        (500, "No cluster leader", "has no leader"),
        (500, "rpc error\nx", "answers service `payments` with 500: rpc error\\nx"),
    ] {
        let said = error(&payments(), &reply(status, &[], body));
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn an_answer_of_who_knows_no_leader_or_says_no_index_is_not_believed() {
    for headers in [&[("x-consul-index", "7"), ("x-consul-knownleader", "false")][..], &[("x-consul-index", "7")]] {
        assert!(matches!(answer(&payments(), &reply(200, headers, "[]"), BASE), Err(Error::NoLeader)));
    }
    assert!(error(&payments(), &reply(200, &TOLD[1..], "[]")).contains("has no index"));
    assert!(error(&payments(), &reply(200, &TOLD, "<html>")).contains("service `payments` cannot be understood"));
}

#[test]
fn who_shows_no_token_is_somebody_where_the_agent_has_one_or_acls_are_off() {
    assert!(is_somebody(&reply(401, &[], "ACL support disabled")));
    assert!(is_somebody(&reply(200, &[], r#"{"AccessorID":"25bf7312-6412-c2f2-49d0-16ada6e10dc5"}"#)));
    assert!(!is_somebody(&reply(200, &[], r#"{"AccessorID":"00000000-0000-0000-0000-000000000002"}"#)));
    assert!(!is_somebody(&reply(403, &[], "token does not exist: ACL not found")));
}

#[test]
fn instances_are_asked_past_the_streaming_backend() {
    assert_eq!(payments().path(BASE), "/v1/health/service/payments?near=_agent&leader");
    assert_eq!(Query::Documents(None).path(BASE), "/v1/kv/meshd-discovery/v1/?recurse=true");
    assert_eq!(shop().path(BASE), "/v1/kv/meshd-discovery/v1/shop/?recurse=true");
}

#[test]
fn an_answer_is_taken_apart_into_its_instances() {
    let texts = |body: &'static str| elements(&Bytes::from_static(body.as_bytes()));
    assert_eq!(texts(" [ ]\n"), Some(vec![]));
    let two = texts(r#"[{"a": "}]"} ,{"b":[{}]}]"#).unwrap();
    assert_eq!(two, [&br#"{"a": "}]"}"#[..], br#"{"b":[{}]}"#]);
    for odd in ["", "{}", "[", "[{}", "[1]", "[{},1]", "[{}]]", "null"] {
        assert_eq!(texts(odd), None, "{odd}");
    }
}

#[test]
fn a_consul_that_hides_without_a_word_is_named_by_its_version() {
    let of = |versions: &[&str]| {
        let servers: Vec<_> =
            versions.iter().map(|it| serde_json::json!({ "ServiceMeta": { "version": it } })).collect();
        check_version(&reply(200, &TOLD, &serde_json::to_string(&servers).unwrap()))
    };
    assert!(of(&["1.20.6", "1.11.0"]).unwrap());
    let error = of(&["1.20.6", "1.9.17"]).unwrap_err().to_string();
    assert!(error.contains("1.9.17") && error.contains("to 1.11 or later"), "{error}");
    assert!(of(&[]).is_err());
    let filtered = [&TOLD[..], &[("x-consul-results-filtered-by-acls", "true")]].concat();
    assert!(check_version(&reply(200, &filtered, "[]")).unwrap(), "it says that it hides them");
    assert!(check_version(&reply(200, &TOLD, r#"[{"ServiceMeta":null}]"#)).unwrap());
}

#[test]
fn a_cluster_without_an_authority_of_its_own_is_followed_all_the_same() {
    assert!(has_no_authority("Connect must be enabled in order to use this endpoint"));
    assert!(has_no_authority("CA has not finished initializing"));
    assert!(!has_no_authority("rpc error making call: EOF"));
}
