use super::*;

#[test]
fn a_profile_becomes_a_route_that_lets_through_what_it_does_not_name_and_a_policy() {
    let resources = resources_of(EXAMPLES[6].1);
    let [Resource::Http(route), Resource::Service(policy), Resource::Http(split), Resource::Tcp(bytes)] =
        &resources[..]
    else {
        panic!("{resources:?}")
    };
    let rules = &route.spec.rules;
    assert!(rules[0].matches[0].path.matches("/books/12") && !rules[0].matches[0].path.matches("/books/12/x"));
    let retry = rules[0].retry.as_ref().unwrap();
    assert!(retry.non_idempotent && retry.codes == (500..600).collect::<Vec<_>>());
    assert_eq!(rules[0].timeouts.request, Some(Span::from_millis(300)));
    assert_eq!(rules[1].matches.len(), 2);
    assert!(rules[2].matches.is_empty() && rules[2].backend_refs.is_empty());
    assert_eq!((policy.spec.retry_budget.percent, policy.spec.retry_budget.min_per_second), (20, 10));
    let weights = |backends: &[Backend]| backends.iter().map(|backend| backend.weight).collect::<Vec<_>>();
    assert_eq!(weights(&split.spec.rules[0].backend_refs), weights(&bytes.spec.rules[0].backend_refs));
    assert_eq!(weights(&split.spec.rules[0].backend_refs), [90, 10]);
}

/// As in Linkerd, where HTTPRoutes know an order of their own.
#[test]
fn the_first_route_of_a_profile_that_matches_comes_first() {
    let text = profile(
        "{ routes: [ { name: reads, condition: { method: GET } }, { name: books, condition: { pathRegex: /books } } ] }",
    );
    let resources = resources_of(&text);
    let [Resource::Http(route)] = &resources[..] else { panic!("{resources:?}") };
    let mut rules: Vec<&HttpRule> = route.spec.rules.iter().filter(|rule| !rule.matches.is_empty()).collect();
    rules.sort_by_key(|rule| std::cmp::Reverse(rule.matches[0].specificity()));
    assert_eq!(rules.iter().filter_map(|rule| rule.name.as_deref()).collect::<Vec<_>>(), ["reads", "books"]);
    assert!(rules[0].matches[0].path.matches("/books"));
}

#[test]
fn of_a_profile_what_would_become_something_else_is_refused() {
    let class = |range: &str| {
        format!(
            "routes: [ {{ name: r, isRetryable: true, condition: {{ method: GET }}, responseClasses: [ {{ isFailure: true, condition: \
             {{ status: {{ {range} }} }} }} ] }} ]"
        )
    };
    let budget =
        |ratio: &str, ttl: &str| format!("retryBudget: {{ retryRatio: {ratio}, minRetriesPerSecond: 1, ttl: {ttl} }}");
    for (spec, expected) in [
        (class("min: 300, max: 599"), "statuses below 400 cannot be retried"),
        (class("min: 503, max: 500"), "`max` is less than `min`"),
        (budget("0.004", "10s"), "less than one in a hundred"),
        (budget("0.2", "0s"), "from 1s to 60s"),
        (budget("0.2", "99999h"), "from 1s to 60s"),
        (budget("10.1", "10s"), "from 0 to 10"),
    ] {
        let problems = problems_of(&profile(&format!("{{ {spec} }}")));
        assert!(problems.len() == 1 && problems[0].contains(expected), "{spec}\n{problems:?}");
    }
    for spec in
        [class("min: 400"), class("min: 500, max: 0"), budget("0", "1s"), budget("0.01", "60s"), budget("2", "1.5s")]
    {
        assert_eq!(problems_of(&profile(&format!("{{ {spec} }}"))), Vec::<String>::new(), "{spec}");
    }
}

#[test]
fn an_import_takes_the_place_of_no_document_of_its_name() {
    let split = document(
        "split.smi-spec.io/v1alpha4",
        "TrafficSplit",
        "{ service: web, backends: [ { service: a, weight: 1k } ] }",
    );
    let both = resources_of(&format!("{split}---\n{}", http("rules: [ {} ]")));
    let ids: Vec<String> = both.iter().map(|resource| resource.id().to_string()).collect();
    assert_eq!(ids, ["HTTPRoute shop/trafficsplit/web", "TCPRoute shop/trafficsplit/web", "HTTPRoute shop/web"]);
}

#[test]
fn of_a_profile_what_means_nothing_here_is_warned_of() {
    let route = "{ name: r, condition: { method: GET }, timeout: 1.5s }";
    let routes = vec![route; 20].join(", ");
    let text = profile(&format!("{{ opaquePorts: [ \"3306\" ], routes: [ {routes} ] }}"));
    let found = validate(&[Text { file: "p.yaml".to_owned(), text: text.clone() }], &trust_domain()).0;
    let told: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert!(told.iter().any(|told| told.contains("warning: spec.opaquePorts: is passed over")), "{told:?}");
    assert!(found.iter().all(|found| found.severity == Severity::Warning), "{told:?}");
    let [Resource::Http(route)] = &resources_of(&text)[..] else { panic!("{text}") };
    assert_eq!((route.spec.rules.len(), route.spec.rules[0].timeouts.request), (21, Some(Span::from_millis(1500))));
}
