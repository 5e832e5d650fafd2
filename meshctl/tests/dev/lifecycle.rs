//! Commands in good days and bad ones.

use std::{fs, process::Stdio, time::Duration};

use tokio::time::Instant;

use crate::mesh::{DEADLINE, Mesh, command, finish, run, signal};

#[tokio::test]
async fn wrong_usage_is_status_two() {
    let home = tempfile::tempdir().unwrap();
    for (line, words) in [
        ("", "Usage: meshctl"),
        ("pnig edge-1", "similar subcommands exist: 'ring', 'ping'"),
        ("ping Edge_1", "edge name \"Edge_1\""),
        ("proxy edge-1", "write EDGE:PORT, EDGE/HOST:PORT or EDGE/SERVICE"),
        ("forward edge-1", "has no port"),
        ("policy allow --from alice --to edge/x --ports 1", "write user/NAME"),
        ("policy allow --from user/alice --to edge/x", "names no ports"),
        ("token create", "--edge|--shard|--user"),
        ("user revoke alice", "--yes"),
        ("login", "this is no join line"),
    ] {
        run(home.path(), line, b"").await.failed(2, words);
    }
}

#[tokio::test]
async fn tables_are_for_people_and_documents_for_programs() {
    let mesh = Mesh::shared();
    let edges = mesh.run("edge ls").await.done();
    assert!(edges.text().starts_with("NAME    STATE "), "{edges:?}");
    assert!(!edges.text().contains('\x1b'), "colour in a pipe");
    for line in ["edge ls", "edge show edge-1", "shard ls", "policy ls", "token ls", "whoami"] {
        let document = mesh.run(&format!("{line} -o json")).await.done().json();
        assert!(document.is_array() || document.is_object(), "{line}: {document}");
    }
    let shards = mesh.run("shard ls -o json").await.done().json();
    assert_eq!(shards[0]["addresses"][0].as_str().unwrap(), mesh.address("/shards/0/mesh").to_string());
    for shell in ["bash", "zsh", "fish"] {
        assert!(mesh.run(&format!("completions {shell}")).await.done().text().contains("forward"));
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_crash() {
    let mesh = Mesh::shared();
    let mut child = command(&mesh.home(), "completions bash").spawn().unwrap();
    drop(child.stdout.take());
    let said = finish(child, b"").await;
    assert!(said.status.is_some() && said.err.is_empty(), "{said:?}");
}

#[tokio::test]
async fn streams_go_on_without_control_and_say_so_where_it_matters() {
    let mesh = Mesh::shared();
    let home = mesh.login("grace").await;
    let note = fs::read_to_string(home.path().join("shards")).unwrap();
    mesh.run("policy allow --name grace --from user/grace --to edge/* --ports *").await.done();
    crate::mesh::eventually(home.path(), "ping edge-1 -c 1", |said| said.status == Some(0)).await;
    // Control is away, and the note of the shards is old.
    fs::write(home.path().join("control"), "127.0.0.1:1\n").unwrap();
    fs::write(home.path().join("shards"), note.replace("\"fetched\":", "\"fetched\":1,\"was\":")).unwrap();
    run(home.path(), "ping edge-1 -c 1", b"").await.done();
    let who = run(home.path(), "whoami", b"").await.done();
    assert!(who.err.contains("control at 127.0.0.1:1 cannot be reached"), "{who:?}");
    run(home.path(), "edge ls", b"").await.failed(4, "control at 127.0.0.1:1 cannot be reached");
    // Now the shards are away as well: one that is dead, and one whose name does not exist.
    let dead = r#"{"fetched":1,"shards":[{"shard":"s1","addresses":["127.0.0.1:1"]},{"shard":"s2","addresses":["x.invalid:7400"]}]}"#;
    fs::write(home.path().join("shards"), dead).unwrap();
    let begun = Instant::now();
    let lost = run(home.path(), "ping edge-1 -c 1", b"").await;
    lost.failed(4, "shard s1 at 127.0.0.1:1: No");
    lost.failed(4, "shard s2 at x.invalid:7400: The name cannot be resolved");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_damaged_login_is_named_with_a_remedy() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("identity.pem"), "nonsense").unwrap();
    run(home.path(), "edge ls", b"").await.failed(1, "enrol again");
}

#[tokio::test]
async fn a_mesh_ends_without_a_trace() {
    let mut mesh = Mesh::start();
    let folder = mesh.home().parent().unwrap().to_owned();
    assert!(folder.join("control").exists());
    let ping = command(&mesh.home(), "ping edge-1 -c 1").stdout(Stdio::null()).spawn().unwrap();
    finish(ping, b"").await.done();
    let _input = mesh.process.stdin.take();
    signal(mesh.process.id(), "TERM");
    let status = tokio::task::spawn_blocking(move || mesh.process.wait().unwrap());
    let status = tokio::time::timeout(DEADLINE, status).await.expect("it did not end").unwrap();
    assert!(status.success(), "{status}");
    assert!(!folder.exists(), "the temporary folder is still there");
}
