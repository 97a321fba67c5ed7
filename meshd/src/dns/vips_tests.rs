use std::collections::BTreeSet;

use meshd_discovery::fake;
use proptest::prelude::*;

use super::*;

const DAY: u64 = 24 * 3600;

fn open_in(dir: &Path, v4: &str) -> Result<Vips, VipsError> {
    Vips::open(&dir.join("vips.json"), v4.parse().unwrap(), "fd6d:6573:6864::/64".parse().unwrap())
}

fn open(dir: &Path) -> Vips {
    open_in(dir, "240.240.0.0/16").unwrap()
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn directory<'n>(names: impl IntoIterator<Item = &'n str>) -> Directory {
    Directory::from_services(names.into_iter().map(|name| fake::service(name, "test", &[])))
}

#[test]
fn a_service_is_found_by_either_of_its_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open(dir.path());
    let vip = vips.assign(&name("payments.shop")).unwrap();
    assert_eq!(vips.service_of(vip.v4.into()), Some(name("payments.shop")));
    assert_eq!(vips.service_of(vip.v6.into()), Some(name("payments.shop")));
    assert_eq!(vips.service_of(vip.v4.to_ipv6_mapped().into()), Some(name("payments.shop")));
    for other in ["10.0.0.1", "240.240.0.0", "fd6d:6573:6864::", "fd6d:6573:6864::1:0:0", "::1"] {
        assert_eq!(vips.service_of(other.parse().unwrap()), None, "{other}");
    }
}

#[test]
fn the_same_name_hashes_to_the_same_addresses_on_every_host() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let assigned = |dir: &Path| open(dir).assign(&name("payments.shop")).unwrap();
    assert_eq!(assigned(one.path()), assigned(two.path()));
}

#[test]
fn addresses_survive_a_restart_and_the_removal_of_the_service() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open(dir.path());
    vips.sync(&directory(["a.shop", "b.shop"]));
    let before = (vips.get(&name("a.shop")).unwrap(), vips.get(&name("b.shop")).unwrap());
    vips.sync(&directory(["b.shop"]));
    vips.save().unwrap();
    let vips = open(dir.path());
    assert_eq!((vips.get(&name("a.shop")).unwrap(), vips.get(&name("b.shop")).unwrap()), before);
    assert_eq!(vips.service_of(before.0.v4.into()), Some(name("a.shop")));
}

#[test]
fn addresses_are_reused_only_when_none_is_free_and_after_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open_in(dir.path(), "240.240.0.0/28").unwrap();
    let names: Vec<String> = (0..14).map(|index| format!("s{index}.shop")).collect();
    vips.sync_at(&directory(names.iter().map(String::as_str)), 1000);
    let gone = vips.get(&name("s3.shop")).unwrap();
    assert!(vips.assign(&name("new.shop")).is_none());

    let mut with_new: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != "s3.shop").collect();
    vips.sync_at(&directory(with_new.iter().copied()), 2000);
    with_new.push("new.shop");
    vips.sync_at(&directory(with_new.iter().copied()), 2000 + DAY - 1);
    assert_eq!(vips.get(&name("new.shop")), None);
    assert_eq!(vips.service_of(gone.v4.into()), Some(name("s3.shop")));
    vips.sync_at(&directory(with_new.iter().copied()), 2000 + DAY);
    assert_eq!(vips.get(&name("new.shop")), Some(gone));
    assert_eq!(vips.service_of(gone.v6.into()), Some(name("new.shop")));
}

#[test]
fn a_service_that_came_back_is_not_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open_in(dir.path(), "240.240.0.0/28").unwrap();
    let names: Vec<String> = (0..14).map(|index| format!("s{index}.shop")).collect();
    let all = directory(names.iter().map(String::as_str));
    vips.sync_at(&all, 1000);
    vips.sync_at(&Directory::default(), 2000);
    vips.sync_at(&all, 3000);
    let more = directory(names.iter().map(String::as_str).chain(["new.shop"]));
    vips.sync_at(&more, 3000 + 2 * DAY);
    assert_eq!(vips.get(&name("new.shop")), None);
}

#[test]
fn the_file_says_what_belongs_to_whom() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open(dir.path());
    vips.sync_at(&directory(["a.shop"]), 1000);
    vips.sync_at(&Directory::default(), 2000);
    vips.save().unwrap();
    let text = fs::read_to_string(dir.path().join("vips.json")).unwrap();
    let v4 = vips.get(&name("a.shop")).unwrap().v4;
    let expected = serde_json::json!({ "schema": 1, "services": { "a.shop": { "v4": v4, "unused_since": 2000 } } });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), expected);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn only_news_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open(dir.path());
    vips.save().unwrap();
    assert!(!dir.path().join("vips.json").exists());
    vips.sync(&directory(["a.shop"]));
    vips.save().unwrap();
    fs::remove_file(dir.path().join("vips.json")).unwrap();
    vips.sync(&directory(["a.shop"]));
    vips.save().unwrap();
    assert!(!dir.path().join("vips.json").exists());
}

#[test]
fn a_changed_range_gives_new_addresses_and_keeps_those_still_inside() {
    let dir = tempfile::tempdir().unwrap();
    let vips = open(dir.path());
    let before = vips.assign(&name("a.shop")).unwrap();
    vips.save().unwrap();
    let elsewhere = open_in(dir.path(), "240.241.0.0/16").unwrap();
    assert_eq!(elsewhere.get(&name("a.shop")), None);
    assert_eq!(elsewhere.assign(&name("a.shop")).unwrap().v4.octets()[..2], [240, 241]);
    assert_eq!(open_in(dir.path(), "240.240.0.0/15").unwrap().get(&name("a.shop")).unwrap().v4, before.v4);
}

#[test]
fn broken_future_and_contradictory_files_are_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    for (text, expected) in [
        ("{", "vips.json: EOF while parsing"),
        ("{\"schema\": 9, \"addresses\": []}", "schema 9 was written by a newer meshd"),
        ("{\"schema\": 1, \"services\": {\"Bad\": {\"v4\": \"240.240.0.1\"}}}", "not a service name"),
        (
            "{\"schema\": 1, \"services\": {\"a.b\": {\"v4\": \"240.240.0.1\"}, \"c.d\": {\"v4\": \"240.240.0.1\"}}}",
            "c.d and a.b both have 240.240.0.1",
        ),
    ] {
        fs::write(dir.path().join("vips.json"), text).unwrap();
        let error = open_in(dir.path(), "240.240.0.0/16").err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn ranges_that_cannot_work_are_refused() {
    let open = |v4: &str, v6: &str| {
        Vips::open(Path::new("none"), v4.parse().unwrap(), v6.parse().unwrap())
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert!(open("240.240.0.0/30", "fd00::/64").unwrap_err().starts_with("capture.vip4 = 240.240.0.0/30: use a range"));
    assert!(open("0.0.0.0/0", "fd00::/64").is_err());
    assert!(open("240.240.0.0/16", "fd00::/113").unwrap_err().starts_with("capture.vip6 = fd00::/113: too small"));
    assert_eq!(open("240.240.0.0/16", "fd00::/112"), Ok(()));
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_and_the_addresses_hold() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("gone");
    let vips = open(&state);
    let vip = vips.assign(&name("a.shop")).unwrap();
    let error = vips.save().unwrap_err().to_string();
    assert!(error.starts_with("cannot write ") && error.contains("vips.json"), "{error}");
    assert_eq!(vips.service_of(vip.v4.into()), Some(name("a.shop")));
    fs::create_dir(&state).unwrap();
    vips.save().unwrap();
    assert_eq!(open(&state).get(&name("a.shop")), Some(vip));
}

#[tokio::test(start_paused = true)]
async fn the_keeper_saves_what_the_directory_brings_and_what_queries_assign_and_retries_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("late");
    let vips = Arc::new(open(&state));
    let publisher = watch::Sender::new(Arc::new(directory(["a.shop"])));
    let keeper = tokio::spawn(vips.clone().keep(publisher.subscribe()));
    // The paused clock moves on only when the keeper waits and nothing is being written.
    let saved_after = async |seconds: u64, service: &str| {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        open(&state).get(&name(service)).is_some()
    };
    assert!(!saved_after(1, "a.shop").await);
    fs::create_dir(&state).unwrap();
    assert!(saved_after(30, "a.shop").await, "retried after half a minute");
    publisher.send_replace(Arc::new(directory(["a.shop", "b.shop"])));
    assert!(saved_after(1, "b.shop").await, "saved because the directory changed");
    vips.assign(&name("c.shop")).unwrap();
    assert!(saved_after(1, "c.shop").await, "saved because a query needed it");
    drop(publisher);
    vips.assign(&name("d.shop")).unwrap();
    assert!(saved_after(1, "d.shop").await, "also without a publisher");
    assert!(!keeper.is_finished());
}

#[derive(Debug, Clone)]
enum Step {
    Assign(u8),
    Sync(BTreeSet<u8>),
    Restart,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let service = 0u8..40;
    prop_oneof![
        service.clone().prop_map(Step::Assign),
        prop::collection::btree_set(service, 0..20).prop_map(Step::Sync),
        Just(Step::Restart),
        (0..DAY).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A pool with more services than addresses, through assignments, removals, restarts and days.
    #[test]
    fn whatever_happens_no_address_is_shared_bad_or_handed_on_within_a_day(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let range = "240.240.1.240/28";
        let mut vips = open_in(dir.path(), range).unwrap();
        let mut now = unix_now();
        // When each service was last known to be used, and the addresses it had then.
        let mut last: BTreeMap<ServiceName, (u64, Vip)> = BTreeMap::new();
        let mut present = BTreeSet::new();
        for step in steps {
            match step {
                Step::Assign(n) => { vips.assign(&name(&format!("s{n}.shop"))); }
                Step::Sync(wanted) => {
                    let names: Vec<String> = wanted.iter().map(|n| format!("s{n}.shop")).collect();
                    present = names.iter().map(|text| name(text)).collect();
                    vips.sync_at(&directory(names.iter().map(String::as_str)), now);
                }
                Step::Restart => {
                    vips.save().unwrap();
                    vips = open_in(dir.path(), range).unwrap();
                }
                Step::Wait(seconds) => now += seconds,
            }
            let table = vips.table.load_full();
            prop_assert_eq!(table.by_name.len(), table.by_offset.len());
            for (service, entry) in &table.by_name {
                let vip = vips.range.vip(entry.offset);
                prop_assert!(vips.range.v4.contains(&vip.v4) && vips.range.v6.contains(&vip.v6));
                prop_assert!(!matches!(vip.v4.octets()[3], 0 | 255));
                prop_assert_eq!(vips.service_of(vip.v4.into()), Some(service.clone()));
                prop_assert_eq!(vips.service_of(vip.v6.into()), Some(service.clone()));
            }
            for (service, (when, vip)) in &last {
                let holder = vips.service_of(vip.v4.into());
                let rested = now - when >= DAY && !present.contains(service);
                prop_assert!(holder.as_ref() == Some(service) || rested, "{service} lost {vip:?} to {holder:?}");
            }
            last.retain(|service, _| table.by_name.contains_key(service));
            for (service, entry) in &table.by_name {
                if entry.unused_since.is_none() {
                    last.insert(service.clone(), (now, vips.range.vip(entry.offset)));
                }
            }
        }
    }

    #[test]
    fn an_address_once_given_stays_whatever_else_is_assigned(names in prop::collection::btree_set("[a-z]{1,6}\\.[a-z]{1,3}", 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let vips = open(dir.path());
        let given: Vec<(ServiceName, Vip)> = names.iter().map(|text| (name(text), vips.assign(&name(text)).unwrap())).collect();
        vips.save().unwrap();
        let again = open(dir.path());
        for (service, vip) in given {
            prop_assert_eq!(again.assign(&service), Some(vip));
            prop_assert!(!matches!(vip.v4.octets()[3], 0 | 255));
        }
    }
}
