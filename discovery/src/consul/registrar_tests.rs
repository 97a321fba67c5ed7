use super::super::read::{BASE, Reading};
use super::*;
use crate::consul::fake_agent::{Agent, Asked};
use crate::fake::trust_domain;
use crate::register::Offer;
use crate::{Change, Transport};

fn offer() -> Offer {
    crate::register::offer_for_tests()
}

fn said() -> Registration {
    let ports = vec![PortTarget { port: 80, target: 8080 }, PortTarget { port: 443, target: 8443 }];
    Registration {
        address: [10, 0, 0, 1].into(),
        mesh_port: 15009,
        ports,
        identity: Some("ns/shop/sa/payments".to_owned()),
        transport: Transport::Meshd,
        network: "lan".to_owned(),
        zone: "a".to_owned(),
        weight: 50,
        health: Health::Healthy,
        epoch: 7,
        version: "1.2".to_owned(),
    }
}

const NONCE: u32 = 5;

fn life(epoch: u64, nonce: u32) -> Value {
    let (key, said) = (offer().key, Registration { epoch, ..said() });
    body(&Stamp { epoch, nonce }.id(&key), &key, &said)
}

/// As the health endpoint shows what was registered.
fn shown(body: &Value, statuses: [&str; 2]) -> Value {
    let checks: Vec<Value> = (0..2)
        .map(|n| json!({ "CheckID": body["Checks"][n]["CheckID"], "Status": statuses[n] }))
        .chain([json!({ "CheckID": OF_THE_NODE, "Status": "passing" })])
        .collect();
    json!({
        "Node": { "Node": "n1", "Address": "10.0.0.9" }, "Checks": checks,
        "Service": { "ID": body["ID"], "Service": body["Name"], "Address": body["Address"], "Port": body["Port"],
                     "Meta": body["Meta"], "Weights": body["Weights"] },
    })
}

#[test]
fn what_is_registered_is_read_as_the_same_place() {
    let key = offer().key;
    let shown = shown(&life(7, NONCE), ["passing", "passing"]);
    let reading =
        Reading { trust_domain: trust_domain(), namespace: "default".into(), base: BASE.into(), resources: None };
    let instance = reading.instance("payments", shown.to_string().as_bytes()).unwrap().unwrap();
    let Change::Set(record) = &*instance.said else { panic!("{:?}", instance.said) };
    assert_eq!(record.service, key.service);
    assert_eq!(*record.places[0], said().place(&trust_domain()).unwrap());
}

/// What is found of the lives with these epochs, nonces and states of their nodes.
fn found_among(lives: &[(u64, u32, &str)]) -> Option<(u64, Option<(u64, bool)>)> {
    let entry = |(epoch, nonce, node): &(u64, u32, &str)| {
        // A stall of the host or of the agent; its program is not well, either.
        let mut shown = shown(&life(*epoch, *nonce), ["critical", "critical"]);
        shown["Checks"][2]["Status"] = (*node).into();
        serde_json::from_value::<Entry>(shown).unwrap()
    };
    let entries: Vec<Entry> = lives.iter().map(entry).collect();
    let found = found(&entries, &offer().key, NONCE)?;
    assert_eq!(found.epoch, found.version);
    Some((found.epoch, found.owner.map(|owner| (owner.epoch, owner.wins_ties))))
}

#[test]
fn a_later_life_is_the_owner_also_while_its_check_is_critical() {
    assert_eq!(found_among(&[(3, 1, "passing"), (7, 1, "passing"), (5, 1, "passing")]), Some((7, Some((7, false)))));
    assert_eq!(found_among(&[]), None);
    let entry = serde_json::from_value(shown(&life(3, 1), ["passing", "passing"])).unwrap();
    let other = Key { instance: "api-1.443".to_owned(), ..offer().key };
    assert_eq!(found(&[entry], &other, NONCE), None);
}

#[test]
fn of_a_node_that_is_gone_only_the_epoch_counts() {
    assert_eq!(found_among(&[(3, 1, "passing"), (900, 1, "critical")]), Some((900, Some((3, false)))));
    assert_eq!(found_among(&[(900, 1, "critical")]), Some((900, None)));
}

#[test]
fn of_two_lives_of_one_epoch_one_is_later_for_both() {
    assert_eq!(found_among(&[(7, NONCE, "passing"), (7, NONCE + 1, "passing")]), Some((7, Some((7, true)))));
    assert_eq!(found_among(&[(7, NONCE, "passing"), (7, NONCE - 1, "passing")]), Some((7, Some((7, false)))));
}

/// A registration with epoch 7 that was written through an agent, by the token `old`.
struct Bed {
    agent: Agent,
    registrar: ConsulRegistrar,
    token_file: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Bed {
    async fn make() -> Bed {
        let (agent, directory) = (Agent::start().await, tempfile::tempdir().unwrap());
        let token_file = directory.path().join("token");
        std::fs::write(&token_file, "old").unwrap();
        let address = Some(agent.url());
        let settings = Settings { address, token_file: Some(token_file.clone()), ..Settings::default() };
        let mut registrar = ConsulRegistrar::new("consul".to_owned(), Arc::new(settings));
        (registrar.nonce, registrar.look_every) = (NONCE, Duration::ZERO);
        Bed { agent, registrar, token_file, _directory: directory }
    }

    async fn write(&self, over: Over) -> Option<Hold> {
        self.registrar.write(&offer().key, &said(), over).await.unwrap()
    }

    async fn keep(&self, hold: Hold) -> bool {
        self.registrar.keep(&offer().key, hold).await.unwrap()
    }

    fn own(&self) -> String {
        self.registrar.stamp(7).id(&offer().key)
    }

    fn registered_by(&self) -> Vec<String> {
        let path = "/v1/agent/service/register";
        let registers = |asked: &Asked| asked.path.starts_with(path).then(|| asked.token.clone());
        self.agent.asked().iter().filter_map(registers).collect()
    }
}

#[tokio::test]
async fn what_was_registered_by_another_token_is_registered_anew_with_the_next_beat_and_only_once() {
    let bed = Bed::make().await;
    let hold = bed.write(Over::Version(0)).await.unwrap();
    assert!(bed.keep(hold).await);
    assert_eq!(bed.registered_by(), ["old"]);
    std::fs::write(&bed.token_file, "new").unwrap();
    assert!(bed.keep(hold).await && bed.keep(hold).await);
    assert_eq!(bed.registered_by(), ["old", "new"]);
    assert_eq!(bed.agent.ids(), [bed.own()]);
}

#[tokio::test]
async fn a_write_leaves_alone_what_came_after_it_looked_and_takes_away_what_it_found() {
    let bed = Bed::make().await;
    for left in [life(3, 1), life(4, 1), life(6, 1)] {
        bed.agent.add(&left);
    }
    // The catalog is behind the agent.
    bed.agent.hide(&life(6, 1));
    assert!(bed.write(Over::Version(4)).await.is_some());
    assert_eq!(bed.agent.ids(), [life(6, 1)["ID"].as_str().unwrap().to_owned(), bed.own()]);
}

#[tokio::test]
async fn two_processes_of_one_epoch_write_two_ids_and_the_lesser_takes_its_own_away() {
    let bed = Bed::make().await;
    let hold = bed.write(Over::Version(0)).await.unwrap();
    bed.agent.add(&life(7, NONCE - 1));
    assert!(bed.keep(hold).await);
    let later = life(7, NONCE + 1);
    bed.agent.add(&later);
    assert!(!bed.keep(hold).await);
    assert!(!bed.agent.ids().contains(&bed.own()) && bed.agent.ids().len() == 2, "{:?}", bed.agent.ids());
    assert_eq!(bed.write(Over::Own(hold)).await, None);
}

#[tokio::test]
async fn the_catalog_is_looked_through_for_a_later_life_less_often_than_beats_are() {
    let mut bed = Bed::make().await;
    bed.registrar.look_every = Duration::from_secs(3600);
    let hold = bed.write(Over::Version(0)).await.unwrap();
    let looked = |bed: &Bed| bed.agent.asked().iter().filter(|it| it.path.starts_with("/v1/health/")).count();
    let before = looked(&bed);
    assert!(bed.keep(hold).await && bed.keep(hold).await);
    assert_eq!(looked(&bed), before);
    bed.registrar.look_every = Duration::ZERO;
    assert!(bed.keep(hold).await);
    assert_eq!(looked(&bed), before + 1);
}

#[tokio::test]
async fn what_cannot_be_cleared_away_does_not_make_a_registration_fail() {
    let bed = Bed::make().await;
    bed.agent.add(&life(3, 1));
    bed.agent.refuse("/v1/agent/service/deregister/");
    let hold = bed.write(Over::Version(3)).await;
    assert_eq!(hold, Some(Hold { lease: 0, version: 7 }));
    assert_eq!(bed.agent.ids().len(), 2);
}

#[test]
fn those_outside_the_mesh_get_the_nearest_whole_share() {
    let share = |weight| body("id", &offer().key, &Registration { weight, ..said() })["Weights"]["Passing"].clone();
    assert_eq!([0, 1, 149, 150, 199, 1_000_000].map(share), [1, 1, 1, 2, 2, 10_000]);
}

#[test]
fn one_that_leaves_or_is_not_well_is_critical_for_everybody() {
    assert_eq!(state(&said()).0, "passing");
    assert_eq!(state(&Registration { weight: 0, ..said() }).0, "critical");
    assert_eq!(state(&Registration { health: Health::Unhealthy, ..said() }).0, "critical");
}
