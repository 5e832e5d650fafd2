//! Who may, who may not any more, and how it is told.

use tokio::io::AsyncWriteExt;

use crate::mesh::{Mesh, Said, command, eventually, finish, read_until, run};

#[tokio::test]
async fn a_refusal_names_the_rule_that_is_missing_and_the_rule_helps() {
    let mesh = Mesh::shared();
    let alice = mesh.login("alice").await;
    let refused = run(alice.path(), "proxy edge-2/web", b"").await;
    refused.failed(3, "no rule allows user/alice to reach edge-2/web");
    refused.failed(3, "meshctl policy allow --from user/alice --to service/web");
    run(alice.path(), "ping edge-2", b"").await.failed(3, "[policy-denied; fault: policy;");
    mesh.run("policy test --from user/alice edge-2/web").await.failed(3, "no rule allows user/alice");
    // What the refusal says to do is what helps.
    let added = mesh.run("policy allow --from user/alice --to service/web").await.done();
    assert_eq!(added.text(), "Rule alice-to-web is added.\n");
    let test = mesh.run("policy test --from user/alice edge-2/web -o json").await.done().json();
    assert_eq!((test["allowed"].as_bool(), test["rule"].as_str()), (Some(true), Some("alice-to-web")));
    eventually(alice.path(), "proxy edge-2/web", |said| said.status == Some(0)).await;
    run(alice.path(), "proxy edge-2/echo", b"").await.failed(3, "edge-2/echo");
    assert!(mesh.run("policy ls").await.done().text().contains("alice-to-web  user/alice            service/web  -"));
    mesh.run("policy rm alice-to-web").await.done();
    eventually(alice.path(), "proxy edge-2/web", |said| said.status == Some(3)).await;
    mesh.run("policy rm alice-to-web").await.failed(1, "there is no rule \"alice-to-web\"");
}

#[tokio::test]
async fn only_administrators_change_things() {
    let mesh = Mesh::shared();
    let bob = mesh.login("bob").await;
    run(bob.path(), "edge ls", b"").await.done();
    for line in ["edge revoke edge-1 --yes", "user revoke bob --yes", "policy rm admins", "token ls"] {
        run(bob.path(), line, b"").await.failed(3, "is for users of the group 'admin'");
    }
}

#[tokio::test]
async fn a_token_is_shown_once_used_as_often_as_it_allows_and_can_be_taken_back() {
    let mesh = Mesh::shared();
    let created = mesh.run("token create --user carol --ttl 30m --group ops").await.done();
    let line = created.text();
    assert!(line.starts_with("causeway://") && line.lines().count() == 1, "{created:?}");
    assert!(created.err.contains("meshctl login") && created.err.contains("only this once"), "{created:?}");
    let token = line.strip_prefix("causeway://").and_then(|l| l.split('@').next()).unwrap();
    let id = created.err.split("meshctl token rm ").nth(1).unwrap().split_whitespace().next().unwrap();
    let listed = mesh.run("token ls").await.done();
    let row = listed.text().lines().find(|l| l.starts_with(id)).expect("it is listed");
    assert!(row.contains("carol") && row.contains("ops") && row.contains("user/admin"), "{row}");
    assert!(!listed.text().contains(token) && !created.err.contains(token), "the token shows");

    let home = tempfile::tempdir().unwrap();
    run(home.path(), "login", line.as_bytes()).await.done();
    run(home.path(), "login", line.as_bytes()).await.failed(2, "already logged in as");
    let second = tempfile::tempdir().unwrap();
    run(second.path(), "login", line.as_bytes()).await.failed(3, "token");
    let who = run(home.path(), "whoami -o json", b"").await.done().json();
    assert_eq!(who["identity"], "spiffe://mesh.local/user/carol");
    assert_eq!((&who["groups"][0], &who["control_reachable"]), (&"ops".into(), &true.into()));

    let taken = mesh.run("token create --user dave -o json").await.done().json();
    mesh.run(&format!("token rm {}", taken["id"].as_str().unwrap())).await.done();
    run(second.path(), "login", taken["join"].as_str().unwrap().as_bytes()).await.failed(3, "token");
    mesh.run("token rm nothing").await.failed(1, "there is no token");

    let edge = mesh.run("token create --edge --name shop-1").await.done();
    assert!(edge.err.contains("mesh-edge join"), "{edge:?}");
    run(second.path(), "login", &edge.out).await.failed(2, "this join line is for an edge");
    run(second.path(), "whoami", b"").await.failed(3, "not logged in");
    run(home.path(), "logout", b"").await.done();
    run(home.path(), "whoami", b"").await.failed(3, "not logged in");
}

#[tokio::test]
async fn a_join_line_for_another_ca_is_refused() {
    let join = Mesh::shared().run("token create --user erin").await.done();
    let (line, _) = join.text().split_once("sha256:").unwrap();
    let home = tempfile::tempdir().unwrap();
    let other = format!("{line}sha256:{}\n", "0".repeat(64));
    run(home.path(), "login", other.as_bytes()).await.failed(3, "has another CA than the join line says");
    // The token was not sent, so it is still good.
    run(home.path(), "login", &join.out).await.done();
}

#[tokio::test]
async fn revoking_an_edge_ends_what_runs_and_refuses_the_rest() {
    let mesh = Mesh::shared();
    mesh.run("edge revoke edge-3").await.failed(2, "say yes with --yes");
    let mut running = command(&mesh.home(), "proxy edge-3/echo").spawn().unwrap();
    let mut stdin = running.stdin.take().unwrap();
    stdin.write_all(b"are you there?").await.unwrap();
    read_until(running.stdout.as_mut().unwrap(), "there?").await;
    mesh.run("edge revoke edge-3 --yes").await.done();
    let ended = finish(running, b"").await;
    assert!(matches!(ended.status, Some(1 | 3)) && ended.err.contains("meshctl:"), "{ended:?}");
    drop(stdin);
    eventually(&mesh.home(), "ping edge-3 -c 1", |said: &Said| matches!(said.status, Some(1 | 4))).await;
    let shown = mesh.run("edge show edge-3 -o json").await.done().json();
    assert_eq!(shown["revoked"], true);
    assert!(mesh.run("edge ls").await.done().text().lines().any(|l| l.starts_with("edge-3  revoked")));
}

#[tokio::test]
async fn revoking_a_user_ends_their_forward_and_refuses_the_rest() {
    let mesh = Mesh::shared();
    let frank = mesh.login("frank").await;
    let mut forward = command(frank.path(), "forward edge-1/web 0").spawn().unwrap();
    read_until(forward.stdout.as_mut().unwrap(), "Ctrl-C ends it").await;
    mesh.run("user revoke frank --yes").await.done();
    finish(forward, b"").await.failed(3, "revoked");
    run(frank.path(), "whoami", b"").await.failed(3, "revoked");
    run(frank.path(), "ping edge-1", b"").await.failed(3, "revoked");
}
