//! The binary, as people meet it.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

/// How long control may take to say something.
const PATIENCE: Duration = Duration::from_secs(20);

fn mesh_control() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-control"));
    command.env_remove("CAUSEWAY_CONTROL_DATABASE");
    command
}

fn run(args: &[&str]) -> (bool, String, String) {
    let output = mesh_control().args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_configuration_can_be_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("control.toml");
    std::fs::write(&file, "listen = \"127.0.0.1:0\"\n[ca]\nextra_roots = []\n").unwrap();
    let file = file.to_str().unwrap();
    let (ok, out, _) = run(&["--config", file, "--check-config"]);
    assert!(ok && out.contains("is good"));
    std::fs::write(file, "listen = \"127.0.0.1:0\"\nlisden = 1\n").unwrap();
    let (ok, _, err) = run(&["--config", file, "--check-config"]);
    assert!(!ok && err.contains(":2:1: unknown field `lisden`"), "{err}");
    let (ok, _, err) = run(&["--check-config", "--set", "database=postgres://a:swordfish@db/x"]);
    assert!(!ok && err.contains("CAUSEWAY_CONTROL_DATABASE") && !err.contains("swordfish"), "{err}");
    let (ok, _, err) = run(&["ca-hash", "--data-dir", dir.path().to_str().unwrap()]);
    assert!(!ok && err.contains("the first start of mesh-control makes it"), "{err}");
}

#[test]
fn a_password_never_shows_when_the_database_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let output = mesh_control()
        .args(["--data-dir", dir.path().to_str().unwrap(), "--log", "trace"])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .env("CAUSEWAY_CONTROL_DATABASE", "postgres://mesh:swordfish@127.0.0.1:1/mesh")
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(err.contains("cannot open the database"), "{err}");
    assert!(!err.contains("swordfish"), "{err}");
}

#[test]
fn it_starts_says_where_the_way_in_lies_and_stops_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    let mut child = mesh_control()
        .args(["--data-dir", data, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log", "debug"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = child.stderr.take().unwrap();
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        // The test is over if nobody reads.
        BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)).ok()
    });
    let mut log = Vec::new();
    while !log.last().is_some_and(|line: &String| line.contains("control is up")) {
        log.push(lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("control is not up: {log:?}")));
    }
    let join = std::path::Path::new(data).join("admin.join");
    let line = std::fs::read_to_string(&join).unwrap();
    let (ok, hash, _) = run(&["ca-hash", "--data-dir", data]);
    assert!(ok && line.contains(hash.trim()), "{hash}");
    let (ok, path, err) = run(&["admin-token", "--data-dir", data, "--public", "control.test:7443"]);
    assert!(ok, "{err}");
    let renewed = std::fs::read_to_string(path.trim()).unwrap();
    assert!(renewed.contains("@control.test:7443?ca=") && renewed != line);

    let stopped = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(stopped.success());
    assert!(child.wait().unwrap().success());
    log.extend(lines);
    let log = log.join("\n");
    assert!(log.contains("admin.join") && log.contains("stopped"), "{log}");
    let secret = line.split("://").nth(1).unwrap().split('@').next().unwrap();
    assert!(!log.contains(secret.split('.').nth(1).unwrap()), "no token in the log");
    assert!(!log.contains("PRIVATE KEY"));
}
