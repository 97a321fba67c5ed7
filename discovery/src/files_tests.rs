use std::fs;

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::*;

fn document(name: &str, port: &str) -> String {
    format!(
        "---\napiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ ports: [ {{ port: {port} }} ] }}\n"
    )
}

struct Fixture {
    dir: TempDir,
    files: Files,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let fixture = Fixture { files: Files::new(dir.path().to_owned(), crate::fake::trust_domain()), dir };
        files.iter().for_each(|(name, text)| fixture.write(name, text));
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// As `mv` puts a file in place: a new inode each time, so a change is always visible.
    fn write(&self, name: &str, text: &str) {
        let fresh = self.path(".fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.path(name)).unwrap();
    }

    /// Looks until two looks in a row show nothing new; what was said last, as (`name:port`, problems).
    fn settle(&mut self) -> (Vec<String>, Vec<String>) {
        let mut quiet = 0;
        while quiet < 2 {
            quiet = if self.files.look() == Look::Unchanged { quiet + 1 } else { 0 };
        }
        self.said()
    }

    fn said(&self) -> (Vec<String>, Vec<String>) {
        let Seen { records, refused, .. } = self.files.said.clone().unwrap();
        let shown =
            |record: &Record| format!("{}:{}", record.service, record.definition.as_ref().unwrap().ports[0].port);
        let problems = refused.iter().flat_map(|refused| &refused.problems);
        let prefix = format!("{}/", self.dir.path().display());
        (records.iter().map(shown).collect(), problems.map(|problem| problem.replace(&prefix, "")).collect())
    }
}

#[test]
fn yaml_files_are_read_at_once_at_start_and_other_files_never() {
    let mut fixture = Fixture::new(&[
        ("b.yml", &document("b", "80")),
        ("a.yaml", &document("a", "80")),
        (".hidden.yaml", &document("hidden", "80")),
        ("a.yaml~", &document("backup", "80")),
        ("README.md", "no YAML: ["),
    ]);
    assert!(matches!(fixture.files.look(), Look::Changed(..)));
    assert_eq!(fixture.said(), (vec!["a.shop:80".into(), "b.shop:80".into()], vec![]));
    let origin = fixture.files.said.as_ref().unwrap().records[0].origin.clone();
    assert!(origin.ends_with("/a.yaml:2"), "{origin}");
}

#[test]
fn a_change_counts_when_it_was_seen_twice() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    fixture.settle();
    fixture.write("a.yaml", "");
    assert_eq!(fixture.files.look(), Look::Unchanged);
    fixture.write("a.yaml", &document("a", "81"));
    assert_eq!(fixture.files.look(), Look::Unchanged);
    assert!(matches!(fixture.files.look(), Look::Changed(..)));
    assert_eq!(fixture.said().0, ["a.shop:81"]);
}

#[test]
fn a_file_replaced_by_delete_and_create_is_never_seen_as_gone() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    fixture.settle();
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    assert_eq!(fixture.files.look(), Look::Unchanged);
    fixture.write("a.yaml", &document("a", "81"));
    assert_eq!(fixture.files.look(), Look::Unchanged);
    assert_eq!(fixture.settle().0, ["a.shop:81"]);
}

#[test]
fn a_removed_file_removes_its_services_down_to_none() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80")), ("b.yaml", &document("b", "80"))]);
    fixture.settle();
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    assert_eq!(fixture.settle().0, ["b.shop:80"]);
    fs::remove_file(fixture.path("b.yaml")).unwrap();
    assert_eq!(fixture.settle(), (vec![], vec![]));
}

#[test]
fn a_bad_document_keeps_its_last_good_version_and_the_rest_of_the_file_moves_on() {
    let mut fixture = Fixture::new(&[("a.yaml", &(document("a", "80") + &document("b", "80")))]);
    fixture.settle();
    fixture.write("a.yaml", &(document("a", "zero") + &document("b", "81")));
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["b.shop:81", "a.shop:80"]);
    assert_eq!(problems.len(), 1);
    let expected = "a.yaml:5: spec.ports[0].port: must be a whole number from 1 to 65535, found the text `zero`";
    assert!(problems[0].starts_with(expected), "{problems:?}");
    assert!(problems[0].ends_with("(the last good version stays in force)"), "{problems:?}");

    fixture.write("a.yaml", &(document("a", "82") + &document("b", "81")));
    assert_eq!(fixture.settle(), (vec!["a.shop:82".into(), "b.shop:81".into()], vec![]));
}

#[test]
fn a_bad_document_that_never_was_good_is_only_an_error() {
    let mut fixture = Fixture::new(&[("a.yaml", &(document("a", "0") + &document("b", "80")))]);
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["b.shop:80"]);
    assert!(problems.len() == 1 && !problems[0].contains("last good"), "{problems:?}");
}

#[test]
fn a_file_that_does_not_parse_keeps_all_its_last_good_documents_and_other_files_their_own() {
    let mut fixture =
        Fixture::new(&[("a.yaml", &(document("a", "80") + &document("b", "80"))), ("c.yaml", &document("c", "80"))]);
    fixture.settle();
    fixture.write("a.yaml", "services: {{ [\n");
    fixture.write("c.yaml", &document("c", "81"));
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["a.shop:80", "b.shop:80", "c.shop:81"]);
    assert!(problems[0].starts_with("a.yaml:") && problems[0].contains("not valid YAML"), "{problems:?}");
    fixture.write("a.yaml", &document("b", "82"));
    assert_eq!(fixture.settle(), (vec!["b.shop:82".into(), "c.shop:81".into()], vec![]));
}

#[test]
fn a_document_taken_out_of_a_good_file_is_gone() {
    let mut fixture = Fixture::new(&[("a.yaml", &(document("a", "80") + &document("b", "80")))]);
    fixture.settle();
    fixture.write("a.yaml", &(document("a", "80") + &document("c", "bad")));
    let (services, problems) = fixture.settle();
    assert_eq!((services, problems.len()), (vec!["a.shop:80".to_owned()], 1));
}

#[test]
fn a_service_defined_twice_is_one_error_and_the_first_holds() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80")), ("b.yaml", &document("a", "81"))]);
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["a.shop:80"]);
    let expected =
        "b.yaml:2: metadata.name: service a.shop is already defined at a.yaml:2, which holds; remove one of them";
    assert_eq!(problems, [expected]);
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    assert_eq!(fixture.settle(), (vec!["a.shop:81".into()], vec![]));
}

#[test]
fn a_directory_that_is_missing_is_an_error_and_not_an_empty_one() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    fixture.settle();
    let elsewhere = fixture.dir.path().with_extension("moved");
    fs::rename(fixture.dir.path(), &elsewhere).unwrap();
    for _ in 0..3 {
        let Look::Unreadable(error) = fixture.files.look() else { panic!("believed") };
        assert!(error.contains("cannot read directory") && error.contains("last known services stay"), "{error}");
    }
    fs::rename(&elsewhere, fixture.dir.path()).unwrap();
    assert_eq!(fixture.settle().0, ["a.shop:80"]);
}

#[test]
fn files_that_cannot_be_read_keep_what_they_said() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80")), ("b.yaml", &document("b", "80"))]);
    fixture.settle();
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    std::os::unix::fs::symlink("nowhere", fixture.path("a.yaml")).unwrap();
    let fresh = fixture.path(".fresh");
    fs::write(&fresh, b"kind: x\nname: \xff\n").unwrap();
    fs::rename(fresh, fixture.path("b.yaml")).unwrap();
    fs::create_dir(fixture.path("c.yaml")).unwrap();
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["a.shop:80", "b.shop:80"]);
    assert!(problems[0].starts_with("a.yaml: cannot be read: No such file"), "{problems:?}");
    assert!(problems[1].starts_with("b.yaml: cannot be read: line 2 is not UTF-8"), "{problems:?}");
    assert!(problems[2].starts_with("c.yaml: cannot be read: it is not a regular file"), "{problems:?}");
}

#[test]
fn touching_a_file_says_nothing() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    fixture.settle();
    fixture.write("a.yaml", &document("a", "80"));
    assert_eq!((fixture.files.look(), fixture.files.look()), (Look::Unchanged, Look::Unchanged));
}

#[test]
fn a_file_full_of_errors_reports_the_first_twenty() {
    let text: String = (0..30).map(|index| document(&format!("s{index}"), "0")).collect();
    let (_, problems) = Fixture::new(&[("a.yaml", &text)]).settle();
    assert_eq!(problems.len(), 21);
    assert_eq!(problems[20], "a.yaml: and 10 more problems");
}

fn watch(dir: &Path) -> mpsc::Receiver<(usize, SourceEvent)> {
    let source = Box::new(FilesSource::new("files", dir.to_owned(), crate::fake::trust_domain()));
    let (events, inbox) = mpsc::channel(1);
    tokio::spawn(source.watch(watch::Sender::default().subscribe(), Sink::new(0, events)));
    inbox
}

async fn next(inbox: &mut mpsc::Receiver<(usize, SourceEvent)>) -> SourceEvent {
    loop {
        match inbox.recv().await.unwrap().1 {
            SourceEvent::Resources(_) => {}
            event => return event,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_is_reported_within_two_polls() {
    let fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    let mut inbox = watch(fixture.dir.path());
    let start = Instant::now();
    assert!(matches!(next(&mut inbox).await, SourceEvent::Listed(listing) if listing.records.len() == 1));
    assert_eq!(start.elapsed(), Duration::ZERO);
    fixture.write("b.yaml", &document("b", "80"));
    assert!(matches!(next(&mut inbox).await, SourceEvent::Listed(listing) if listing.records.len() == 2));
    assert!(start.elapsed() <= POLL * 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn trouble_is_reported_once_and_recovery_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let resources = dir.path().join("resources.d");
    let mut inbox = watch(&resources);
    assert!(matches!(next(&mut inbox).await, SourceEvent::Unavailable { .. }));
    let silence = tokio::time::timeout(Duration::from_secs(60), next(&mut inbox)).await;
    assert!(silence.is_err(), "{silence:?}");
    fs::create_dir(&resources).unwrap();
    assert_eq!(next(&mut inbox).await, SourceEvent::Listed(Listing::empty(Scope::Everything, Epoch::default())));
    fs::rename(&resources, dir.path().join("away")).unwrap();
    assert!(matches!(next(&mut inbox).await, SourceEvent::Unavailable { .. }));
    fs::rename(dir.path().join("away"), &resources).unwrap();
    assert_eq!(next(&mut inbox).await, SourceEvent::InSync);
}

#[tokio::test(start_paused = true)]
async fn an_unchanged_directory_is_confirmed_every_ten_seconds() {
    let fixture = Fixture::new(&[("a.yaml", &document("a", "80"))]);
    let mut inbox = watch(fixture.dir.path());
    next(&mut inbox).await;
    let start = Instant::now();
    assert_eq!(next(&mut inbox).await, SourceEvent::InSync);
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[test]
fn of_a_document_that_is_bad_at_start_what_an_earlier_life_knew_is_kept() {
    let mut fixture = Fixture::new(&[("a.yaml", &document("a", "0"))]);
    fixture.settle();
    let Seen { records, refused, .. } = fixture.files.said.clone().unwrap();
    assert!(records.is_empty());
    assert!(refused.iter().any(|refused| &*refused.key == "a.shop"), "{refused:?}");
}

const POLICY: &str = "apiVersion: meshd.dev/v1alpha1\nkind: ServicePolicy\nmetadata: { name: a, namespace: shop }\nspec: { \
                      targetRef: { kind: Service, name: a } }\n";

#[test]
fn routes_and_policies_lie_beside_services_and_a_bad_version_leaves_the_good_one_in_force() {
    let mut fixture = Fixture::new(&[("a.yaml", &format!("{}---\n{POLICY}", document("a", "80")))]);
    assert_eq!(fixture.settle(), (vec!["a.shop:80".into()], vec![]));
    let good = fixture.files.said.clone().unwrap().resources;
    assert_eq!(good.iter().map(|record| &*record.key).collect::<Vec<_>>(), ["servicepolicy/shop/a"]);
    fixture.write("a.yaml", &format!("{}---\n{}", document("a", "81"), POLICY.replace("targetRef", "target")));
    let (services, problems) = fixture.settle();
    assert_eq!(services, ["a.shop:81"]);
    assert!(
        problems[0].contains("spec.target: unknown field") && problems[0].contains("stays in force"),
        "{problems:?}"
    );
    let kept = fixture.files.said.clone().unwrap().resources;
    assert_eq!(kept[0].resources, good[0].resources);
    fixture.write("b.yaml", POLICY);
    let (_, problems) = fixture.settle();
    assert!(problems.iter().any(|problem| problem.contains("ServicePolicy shop/a is already said by")), "{problems:?}");
}
