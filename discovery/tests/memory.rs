//! What a host holds of each endpoint it imports: counted, not timed. A program of its own, because every allocation of
//! it counts.

use std::sync::Arc;

use meshd_discovery::{
    Belief, Configured, Definition, Directory, Epoch, Listing, Namespaces, Protocol, Provides, Record, Registration,
    Scope, ServicePort, Sink, Source, SourceEvent, SourceFuture, Wanted, Watcher,
};
use meshd_identity::TrustDomain;
use tokio::sync::watch;

#[global_allocator]
static COUNTED: dhat::Alloc = dhat::Alloc;

const SERVICES: usize = 1000;
const ENDPOINTS: usize = 10;
/// The goal is 1,024 with all that a connection to the backend and an allocator add; 736 when this was written.
const MOST_BYTES: usize = 800;

/// Says what etcd would: a document and ten registrations of each service, each under a key of its own.
struct Registered;

impl Source for Registered {
    fn name(&self) -> &str {
        "registered"
    }

    fn kind(&self) -> &'static str {
        "test"
    }

    fn watch(&self, _wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        Box::pin(async move {
            let records = (0..SERVICES).flat_map(|service| records_of(&format!("s{service}"))).collect();
            let (scope, epoch) = (Scope::Everything, Epoch::default());
            sink.send(SourceEvent::Listed(Listing { scope, epoch, records, refused: vec![] })).await;
            std::future::pending::<()>().await;
        })
    }
}

fn records_of(service: &str) -> Vec<Record> {
    let record = |what: &str| {
        let key: Arc<str> = format!("/meshd-discovery/v1/shop/{service}/{what}").into();
        let service = format!("{service}.shop").parse().unwrap();
        Record { origin: key.clone(), key, service, definition: None, places: vec![] }
    };
    let endpoint = |number: usize| {
        let zone = number % 3;
        let text = format!(
            r#"{{"address":"10.0.0.{number}","ports":[{{"port":80,"target":8080}}],"zone":"zone-{zone}",
                "identity":"ns/shop/sa/{service}"}}"#,
        );
        let place = Registration::read(text.as_bytes(), &trust_domain()).unwrap();
        Record { places: vec![Arc::new(place)], ..record(&format!("endpoints/web-{number}.payments.service")) }
    };
    let definition = Definition {
        ports: vec![ServicePort { port: 80, protocol: Protocol::Http }],
        identities: vec![],
        allow_plaintext: false,
        addresses: vec![],
    };
    let document = Record { definition: Some(Arc::new(definition)), ..record("service") };
    std::iter::once(document).chain((1..=ENDPOINTS).map(endpoint)).collect()
}

fn trust_domain() -> TrustDomain {
    "example.org".parse().unwrap()
}

#[tokio::test]
async fn an_endpoint_that_is_imported_takes_less_than_800_bytes_of_heap() {
    let _counting = dhat::Profiler::builder().testing().build();
    let before = dhat::HeapStats::get().curr_bytes;
    let source = Configured {
        source: Box::new(Registered),
        authority: Namespaces::everything(),
        provides: Provides::everything(),
        belief: Belief::Guarded,
        registrar: None,
    };
    let wanted = Wanted { everything: true, ..Wanted::default() };
    let watcher = Watcher::new(vec![source], trust_domain()).wanting(wanted);
    let mut directory = watcher.directory();
    let running = tokio::spawn(watcher.run());
    let held = |directory: &Arc<Directory>| directory.services().map(|service| service.endpoints.len()).sum::<usize>();
    directory.wait_for(|directory| held(directory) == SERVICES * ENDPOINTS).await.unwrap();
    let each = (dhat::HeapStats::get().curr_bytes - before) / (SERVICES * ENDPOINTS);
    println!("{each} bytes of heap for each endpoint");
    assert!(each < MOST_BYTES, "{each} bytes for each endpoint");
    running.abort();
}
