use tokio::time::Instant;

use super::super::ResourceNews;
use super::*;
use crate::{Belief, Epoch, fake};

fn held(texts: &[&str]) -> HeldResources {
    let mut held = HeldResources::new(Belief::Always);
    let records = texts.iter().enumerate().map(|(n, text)| fake::resources(&n.to_string(), text)).collect();
    let (prefix, epoch) = ("".into(), Epoch::default());
    held.apply(ResourceNews::Listed { prefix, epoch, records, refused: vec![] }, Instant::now());
    held
}

fn service(name: &str) -> Target {
    Target::Service(name.parse().unwrap())
}

/// A source whose documents cannot be understood.
fn refusing(texts: &[&str]) -> HeldResources {
    let refusal = |(n, text): (usize, &&str)| {
        let document = crate::resources::read(text, &fake::trust_domain()).remove(0);
        let id = document.id.clone().unwrap();
        let key: Arc<str> = n.to_string().into();
        let record = |resource| ResourceRecord { key: key.clone(), origin: key.clone(), resources: vec![resource] };
        let meanwhile = document.meanwhile(&id).map(record);
        crate::resources::ResourceRefusal { key: key.clone(), problems: vec![], meanwhile }
    };
    let refused = texts.iter().enumerate().map(refusal).collect();
    let mut held = HeldResources::new(Belief::Always);
    let (prefix, epoch) = ("".into(), Epoch::default());
    held.apply(ResourceNews::Listed { prefix, epoch, records: vec![], refused }, Instant::now());
    held
}

struct Granted {
    source: Arc<str>,
    routes: Namespaces,
    policies: Namespaces,
    held: HeldResources,
}

impl Granted {
    fn everything(source: &str, texts: &[&str]) -> Granted {
        let (routes, policies) = (Namespaces::everything(), Namespaces::everything());
        Granted { source: source.into(), routes, policies, held: held(texts) }
    }

    fn layer(&self) -> Layer<'_> {
        Layer { source: &self.source, routes: &self.routes, policies: &self.policies, held: &self.held }
    }
}

fn route(name: &str, namespace: &str, more: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: \
         {{ parentRefs: [ {{ group: \"\", kind: Service, name: payments, namespace: shop }} ]{more} }}\n"
    )
}

const EVERYBODY: &str = "apiVersion: meshd.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: all, namespace: \
                         meshd-system }\nspec: { targetRef: { group: meshd.dev, kind: TrustDomain }, action: deny, rules: [ {} ] }\n";
const NAMESPACE: &str = "apiVersion: meshd.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: closed, namespace: \
                         shop }\nspec: { targetRef: { kind: Namespace } }\n";

fn all(layers: &[Layer<'_>]) -> Attachments {
    let targets: std::collections::BTreeSet<Target> = layers
        .iter()
        .flat_map(|layer| layer.held.records().flat_map(|record| record.resources.iter().flat_map(Resource::targets)))
        .collect();
    targets.iter().fold(Attachments::default(), |attached, target| attached.with(target, layers))
}

#[test]
fn a_service_obeys_its_own_policies_those_of_its_namespace_and_those_for_everybody() {
    let own = fake::allowing("payments.shop", "web");
    let source = Granted::everything("files", &[&own, EVERYBODY, NAMESPACE]);
    let attached = all(&[source.layer()]);
    let names = |service: &str| {
        let service = service.parse().unwrap();
        attached.authorization(&service).map(|policy| policy.metadata.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names("payments.shop"), ["web", "closed", "all"]);
    assert_eq!(names("other.shop"), ["closed", "all"]);
    assert_eq!(names("other.bank"), ["all"]);
}

#[test]
fn of_one_name_the_first_source_that_may_say_it_holds_wherever_the_other_is_attached() {
    let (own, elsewhere) = (fake::allowing("payments.shop", "web"), fake::allowing("ledger.shop", "web"));
    let (mut first, second) = (Granted::everything("first", &[&own]), Granted::everything("second", &[&elsewhere]));
    let count = |layers: &[Layer<'_>], service: &str| {
        all(layers).of(&service.parse().unwrap()).map_or(0, |attached| attached.authorization.len())
    };
    let layers = [first.layer(), second.layer()];
    assert_eq!((count(&layers, "payments.shop"), count(&layers, "ledger.shop")), (1, 0));
    first.policies = Namespaces::new(["bank"]).unwrap();
    let layers = [first.layer(), second.layer()];
    assert_eq!((count(&layers, "payments.shop"), count(&layers, "ledger.shop")), (0, 1));
    let said: Vec<String> = layers[0].not_granted().collect();
    assert!(said[0].contains("`first` is not granted policies of namespace shop; add `provides"), "{said:?}");
}

#[test]
fn no_time_of_creation_puts_a_later_source_before_an_earlier_one() {
    let late = route("forged", "shop", "")
        .replace("name: forged,", "name: forged, creationTimestamp: \"1970-01-01T00:00:00Z\",");
    let files = Granted::everything("files", &[&route("own", "shop", "")]);
    let cluster = Granted::everything("cluster", &[&late]);
    let attached = all(&[files.layer(), cluster.layer()]);
    let routes = &attached.of(&"payments.shop".parse().unwrap()).unwrap().producers.http;
    assert_eq!(routes.iter().map(|route| &*route.metadata.name).collect::<Vec<_>>(), ["own", "forged"]);
}

#[test]
fn what_did_not_change_is_the_same_allocation() {
    let texts = [route("producer", "shop", ""), fake::allowing("ledger.shop", "web")];
    let source = Granted::everything("files", &texts.each_ref().map(String::as_str));
    let before = all(&[source.layer()]);
    let name = "payments.shop".parse().unwrap();
    for target in [service("ledger.shop"), service("payments.shop")] {
        let after = before.with(&target, &[source.layer()]);
        assert!(Arc::ptr_eq(before.of(&name).unwrap(), after.of(&name).unwrap()));
    }
    let empty = Granted::everything("files", &[]);
    assert!(before.with(&service("payments.shop"), &[empty.layer()]).of(&name).is_none());
}

#[test]
fn a_policy_that_cannot_be_understood_closes_what_it_is_for_and_nothing_else() {
    let own = fake::allowing("payments.shop", "web").replace("rules", "rulez");
    let namespace = NAMESPACE.replace("spec: {", "spec: { actoin: allow,").replace("shop", "bank");
    let lost = fake::allowing("payments.shop", "lost").replace("kind: Service, name: payments", "kind: Gateway");
    let mut source = Granted { held: refusing(&[&own, &namespace, &lost]), ..Granted::everything("etcd", &[]) };
    let closed = |attached: &Attachments, service: &str| {
        let names = attached.closed_by(&service.parse().unwrap()).map(|policy| policy.metadata.name.to_string());
        names.collect::<Vec<_>>()
    };
    let attached = all(&[source.layer()]);
    assert_eq!(closed(&attached, "payments.shop"), ["web"]);
    assert_eq!(closed(&attached, "anything.bank"), ["closed"]);
    assert_eq!(closed(&attached, "other.shop"), [""; 0]);
    assert_eq!(attached.unclear().iter().map(|policy| &*policy.metadata.name).collect::<Vec<_>>(), ["lost"]);
    let said: Vec<String> = source.layer().closed().collect();
    assert!(said[0].contains("shop/web cannot be understood and never was") && said[0].contains("(payments.shop)"));
    // Where the source may not say so, it closes nothing either.
    source.policies = Namespaces::new(["bank"]).unwrap();
    let attached = all(&[source.layer()]);
    assert_eq!(
        (closed(&attached, "payments.shop"), closed(&attached, "anything.bank")),
        (vec![], vec!["closed".into()])
    );
    assert!(attached.unclear().is_empty() && source.layer().closed().count() == 1);
}

#[test]
fn for_everybody_a_bad_policy_closes_everything() {
    let text = EVERYBODY.replace("action: deny", "action: dney");
    let source = Granted { held: refusing(&[&text]), ..Granted::everything("etcd", &[]) };
    assert_eq!(all(&[source.layer()]).closed_by(&"any.where".parse().unwrap()).count(), 1);
}
