//! The Admin API as operators reach it: through the socket, and from afar with a role.

use std::path::PathBuf;

use data_encoding::BASE64;
use meshd_pki::admin::{Actor, Readers, Role, bind, run_on, serve_socket};
use meshd_pki_api::admin::admin_client::AdminClient;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{
    AuthorityList, AuthorityPrepare, AuthorityTaint, Command as Message, DenyAdd, DenyWhom, EntryAdd, EntryList,
    EntryRemove, HostBan, HostEvict, HostList, RoleGrant, RoleList, RoleRevoke, TokenCreate, deny_whom,
};
use meshd_pki_client::operator::{Channel, Proof, is_absent, over_socket, over_tls};
use meshd_pki_client::{Proof as HostProof, Svid, join_in};
use tonic::Code;

use crate::support::{Lab, workload};

const LIST: Command = Command::HostList(HostList { after: String::new() });
const PREPARE: Command = Command::AuthorityPrepare(AuthorityPrepare {});

fn grant(role: &str) -> Command {
    Command::RoleGrant(RoleGrant { identity: "ns/shop/sa/alice".to_owned(), role: role.to_owned() })
}

fn ban(host: &str) -> Command {
    Command::HostBan(HostBan { host: host.to_owned(), reason: String::new() })
}

fn entry(identity: &str) -> Command {
    Command::EntryAdd(EntryAdd { host: "web".to_owned(), identity: identity.to_owned(), ..EntryAdd::default() })
}

async fn run(client: &mut AdminClient<Channel>, command: Command) -> Result<Reply, (Code, String)> {
    let answer = client.run(Message { command: Some(command) }).await;
    let refused = |status: tonic::Status| (status.code(), status.message().to_owned());
    Ok(answer.map_err(refused)?.into_inner().reply.unwrap())
}

async fn refusal(client: &mut AdminClient<Channel>, command: Command) -> String {
    let (code, why) = run(client, command).await.unwrap_err();
    assert_eq!(code, Code::PermissionDenied, "{why}");
    why
}

impl Lab {
    /// What an operator does on the PKI's own machine.
    pub(crate) fn command(&self, command: Command) -> Result<Reply, meshd_pki::admin::AdminError> {
        self.pki().command(&Actor { name: "root".to_owned(), role: Role::Admin }, command)
    }

    async fn operator(&self, svid: &Svid) -> AdminClient<Channel> {
        let files = self.write(svid);
        let proof = Proof { certificate: &files[0], key: &files[1], bundle: &files[2] };
        over_tls(&self.address(), &proof).await.unwrap()
    }

    fn write(&self, svid: &Svid) -> [PathBuf; 3] {
        let pem = |label: &str, der: &[u8]| {
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64.encode(der))
        };
        let dir = self.host_dir("operator");
        std::fs::create_dir_all(&dir).unwrap();
        let files = ["cert.pem", "key.pem", "bundle.json"].map(|name| dir.join(name));
        std::fs::write(&files[0], svid.chain.iter().map(|one| pem("CERTIFICATE", one)).collect::<String>()).unwrap();
        std::fs::write(&files[1], pem("PRIVATE KEY", svid.key.secret_der())).unwrap();
        std::fs::write(&files[2], self.pki().bundle(&[]).unwrap().jwks).unwrap();
        files
    }

    /// A certificate for a workload of host `web`.
    async fn alice(&self) -> std::sync::Arc<Svid> {
        let alice = workload("alice");
        self.join("web", &[&alice]).await.unwrap();
        let mut host = self.host("web");
        host.want(&[&alice]);
        host.until(|held| held.workloads.contains_key(&alice)).await.workloads[&alice].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_afar_a_role_decides_at_every_command() {
    let lab = Lab::start().await;
    let alice = lab.alice().await;
    let mut client = lab.operator(&alice).await;
    assert!(refusal(&mut client, LIST).await.contains("has no role"));

    lab.command(grant("read")).unwrap();
    assert!(matches!(run(&mut client, LIST).await, Ok(Reply::Hosts(hosts)) if hosts.hosts[0].id == "web"));
    run(&mut client, Command::AuthorityList(AuthorityList {})).await.unwrap();
    for command in [PREPARE, ban("web"), entry("ns/shop/sa/x"), grant("admin")] {
        let why = refusal(&mut client, command).await;
        assert!(why.contains("ns/shop/sa/alice") && why.contains("has the role `read`; this needs"), "{why}");
    }

    lab.command(grant("operate")).unwrap();
    run(&mut client, entry("ns/shop/sa/x")).await.unwrap();
    for command in [PREPARE, ban("web"), grant("admin")] {
        assert!(refusal(&mut client, command).await.contains("this needs `admin`"));
    }

    lab.command(grant("admin")).unwrap();
    run(&mut client, PREPARE).await.unwrap();
    lab.command(Command::RoleRevoke(RoleRevoke { identity: "ns/shop/sa/alice".to_owned() })).unwrap();
    assert!(refusal(&mut client, LIST).await.contains("has no role"), "on the connection that was open");

    let log = lab.audit_log();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |event: &str, result: &str| {
        lines.iter().filter(|line| line["event"] == event && line["result"] == result).count()
    };
    assert_eq!((of("role_grant", "ok"), of("role_revoke", "ok"), of("admin", "refused")), (3, 1, 9));
    let by = lines.iter().find(|line| line["event"] == "root_prepare").unwrap()["by"].as_str().unwrap();
    assert!(by.starts_with("spiffe://prod.example.org/ns/shop/sa/alice from 127.0.0.1:"), "{by}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_hands_out_more_than_they_have() {
    let lab = Lab::start().await;
    let alice = lab.alice().await;
    lab.command(grant("operate")).unwrap();
    let boss = || "ns/shop/sa/boss".to_owned();
    lab.command(Command::RoleGrant(RoleGrant { identity: boss(), role: "admin".to_owned() })).unwrap();
    let mut client = lab.operator(&alice).await;
    let asked = |host: &str, allow: Vec<String>| {
        let pki = vec!["10.0.0.1:1".into()];
        TokenCreate { host: host.to_owned(), allow, pki, ttl_s: 60, ..TokenCreate::default() }
    };
    let token = |host: &str, allow: Vec<String>| Command::TokenCreate(asked(host, allow));
    for command in [entry("ns/shop/sa/boss"), token("new", vec![boss()])] {
        let why = refusal(&mut client, command).await;
        assert!(why.contains("may not decide which host holds it"), "{why}");
    }
    run(&mut client, token("new", Vec::new())).await.unwrap();
    lab.join("db", &[&workload("boss")]).await.unwrap();
    let why = refusal(&mut client, token("db", Vec::new())).await;
    assert!(why.contains("may not decide"), "a token for a host that holds it: {why}");

    let identity = "ns/shop/sa/boss".to_owned();
    let for_labels = EntryAdd { identity, labels: vec!["desk=boss".to_owned()], ..EntryAdd::default() };
    let why = refusal(&mut client, Command::EntryAdd(for_labels.clone())).await;
    assert!(why.contains("may not decide"), "an entry by labels: {why}");
    lab.command(Command::EntryAdd(for_labels)).unwrap();
    let labels = vec!["desk=boss".to_owned(), "site=a".to_owned()];
    let labelled = Command::TokenCreate(TokenCreate { labels, ..asked("new", Vec::new()) });
    let why = refusal(&mut client, labelled).await;
    assert!(why.contains("may not decide"), "a token for hosts with such labels: {why}");

    let invited = TokenCreate { allow: vec![boss()], ..asked("desk-boss", Vec::new()) };
    lab.command(Command::TokenCreate(invited)).unwrap();
    let identity = "ns/shop/sa/boss".to_owned();
    let waits = EntryAdd { host: "desk-boss".to_owned(), identity, ..EntryAdd::default() };
    lab.command(Command::EntryAdd(waits)).unwrap();
    let several = Command::TokenCreate(TokenCreate { max_uses: 2, ..asked("desk", Vec::new()) });
    let why = refusal(&mut client, several).await;
    assert!(why.contains("may not decide"), "a token whose hosts may choose that name: {why}");
    let others = TokenCreate { max_uses: 2, labels: vec!["desk=clerk".to_owned()], ..asked("des", Vec::new()) };
    run(&mut client, Command::TokenCreate(others)).await.unwrap();
    let evict = |host: &str| Command::HostEvict(HostEvict { host: host.to_owned(), reason: String::new() });
    let why = refusal(&mut client, evict("db")).await;
    assert!(why.contains("may not decide"), "it holds a higher role: {why}");
    let (host, identity) = ("db".to_owned(), "ns/shop/sa/boss".to_owned());
    let remove = EntryRemove { host, identity, ..EntryRemove::default() };
    let why = refusal(&mut client, Command::EntryRemove(remove)).await;
    assert!(why.contains("may not decide"), "it would lose its higher role: {why}");
    lab.join("cache", &[]).await.unwrap();
    run(&mut client, evict("cache")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_made_before_a_role_was_granted_does_not_give_it() {
    let lab = Lab::start().await;
    let lead = workload("lead");
    let token = lab.token("new", &[&lead, &workload("checkout")]);
    let identity = "ns/shop/sa/lead".to_owned();
    let granted = lab.command(Command::RoleGrant(RoleGrant { identity, role: "admin".to_owned() })).unwrap();
    let Reply::Done(done) = granted else { panic!("{granted:?}") };
    assert!(done.follows.iter().any(|text| text.contains(&token.id)), "{done:?}");
    let proof = HostProof::JoinToken(token.clone());
    join_in(&lab.host_dir("new"), &token.pin(), &proof, None, &lab.surroundings()).await.unwrap();
    let show = Command::EntryList(EntryList { host: "new".to_owned() });
    let Reply::Entries(entries) = lab.command(show).unwrap() else { panic!("no entries") };
    let held: Vec<String> = entries.entries.into_iter().map(|entry| entry.identity).collect();
    assert_eq!(held, [workload("checkout").to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_denied_authority_has_signed_counts_for_nobody_at_the_pki_either() {
    let lab = Lab::start().await;
    let alice = lab.alice().await;
    lab.command(grant("admin")).unwrap();
    let mut client = lab.operator(&alice).await;
    run(&mut client, LIST).await.unwrap();
    let mut host = lab.host("web");
    let before = host.now().host.clone();
    let Reply::Authorities(list) = lab.command(Command::AuthorityList(AuthorityList {})).unwrap() else {
        panic!("no authorities")
    };
    let intermediate = list.authorities.into_iter().find(|one| one.kind == "intermediate").unwrap();
    lab.command(Command::AuthorityTaint(AuthorityTaint { id: intermediate.id.clone() })).unwrap();
    let whom = Some(DenyWhom { whom: Some(deny_whom::Whom::Authority(intermediate.id)) });
    lab.command(Command::DenyAdd(DenyAdd { whom, reason: String::new() })).unwrap();
    assert!(refusal(&mut client, LIST).await.contains("is denied"), "on the connection that was open");
    let after = host.until(|held| held.host.serial != before.serial).await;
    assert_ne!(after.host.chain[1], before.chain[1], "the host proved anew who it is");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_operator_is_refused_whatever_the_role() {
    let lab = Lab::start().await;
    let alice = lab.alice().await;
    lab.command(grant("admin")).unwrap();
    let mut client = lab.operator(&alice).await;
    run(&mut client, LIST).await.unwrap();
    let whom = Some(DenyWhom { whom: Some(deny_whom::Whom::Serial(alice.serial.clone())) });
    lab.command(Command::DenyAdd(DenyAdd { whom, reason: String::new() })).unwrap();
    assert!(refusal(&mut client, LIST).await.contains("is denied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_has_no_role_by_being_one() {
    let lab = Lab::start().await;
    let held = lab.join("web", &[]).await.unwrap();
    let mut client = lab.operator(&held.host).await;
    assert!(refusal(&mut client, LIST).await.contains("has no role"));
    let identity = "ns/meshd-system/sa/web".to_owned();
    let refused = lab.command(Command::RoleGrant(RoleGrant { identity, role: "read".to_owned() })).unwrap_err();
    assert!(refused.to_string().contains("namespace of hosts"), "{refused}");
    let refused = lab.command(grant("king")).unwrap_err().to_string();
    assert!(refused.contains("`king` is no role"), "{refused}");
    let nobody = Command::RoleRevoke(RoleRevoke { identity: "ns/shop/sa/nobody".to_owned() });
    assert!(lab.command(nobody).unwrap_err().to_string().contains("has no role"));
}

#[tokio::test(flavor = "multi_thread")]
async fn through_the_socket_the_kernel_says_who_calls() {
    let dir = tempfile::tempdir().unwrap();
    let now = std::time::SystemTime::now();
    meshd_pki::state_dir::init(dir.path(), &crate::support::domain(), None, now).unwrap();
    let socket = dir.path().join("admin.sock");
    assert!(is_absent(&over_socket(&socket).await.err().unwrap()));
    let pki = std::sync::Arc::new(meshd_pki::Pki::open(dir.path(), meshd_pki::Options::default()).unwrap());
    let readers = Readers::default();
    let server = tokio::spawn(serve_socket(pki.clone(), bind(&socket, &readers).unwrap(), readers));
    let mut client = over_socket(&socket).await.unwrap();
    run(&mut client, PREPARE).await.unwrap();
    let (code, why) = run(&mut client, PREPARE).await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition);
    assert!(why.contains("is prepared already"), "{why}");
    let log = std::fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    let uid = nix::unistd::getuid();
    assert!(log.lines().any(|line| line.contains("root_prepare") && line.contains(&format!("\"by\":\"uid {uid}"))));
    server.abort();
    _ = server.await;
    assert!(is_absent(&over_socket(&socket).await.err().unwrap()), "left behind, nobody listens");
    let reply = run_on(dir.path(), &Actor::local(), Command::RoleList(RoleList {}), now).unwrap();
    assert_eq!(reply, Reply::Roles(meshd_pki_api::admin::Roles::default()));
}
