//! Finding out what is wrong, where nothing is: what each command says of a mesh that works, and of what was done in it.

use std::io::Read;

use crate::mesh::{Mesh, eventually, run};

#[tokio::test]
async fn the_network_is_checked_with_the_users_login() {
    let mesh = Mesh::shared();
    let report = mesh.run("netcheck -o json").await.done().json();
    assert_eq!((report["reachable"].as_bool(), report["cause"].as_str()), (Some(true), Some("none")), "{report}");
    let checks = report["checks"].as_array().unwrap();
    for what in ["certificate", "dns", "udp", "tcp", "mtu", "clock"] {
        let check = checks.iter().find(|check| check["what"] == what).unwrap_or_else(|| panic!("{what}: {report}"));
        assert_eq!(check["verdict"], "ok", "{check}");
    }
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let said = mesh.run(&format!("netcheck --shard {nobody}")).await;
    assert_eq!(said.status, Some(4), "{said:?}");
    assert!(said.text().contains("No shard can be reached from here"), "{said:?}");
    let home = tempfile::tempdir().unwrap();
    run(home.path(), "netcheck", b"").await.failed(3, "not logged in");
}

#[tokio::test]
async fn an_edge_says_how_it_stands_to_whoever_is_on_its_machine() {
    let mesh = Mesh::shared();
    let admin = mesh.address("/edges/0/admin");
    let home = tempfile::tempdir().unwrap();
    // Nobody needs to be logged in for that.
    let here = run(home.path(), &format!("why --here --admin {admin}"), b"").await.done();
    assert!(here.text().starts_with("edge/edge-1 is connected to shard-1 over quic for "), "{here:?}");
    let status = run(home.path(), &format!("why --here --admin {admin} -o json"), b"").await.done().json();
    assert_eq!((&status["verdict"]["cause"], &status["state"]), (&"none".into(), &"connected".into()));
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    run(home.path(), &format!("why --here --admin {nobody}"), b"").await.failed(4, "does not run on this machine");
    run(home.path(), "why --here edge-1", b"").await.failed(2, "cannot be used with");
}

#[tokio::test]
async fn an_edge_is_shown_with_its_carrier_and_the_way_is_told() {
    let mesh = Mesh::shared();
    let standing = |view: &serde_json::Value| view["presence"]["standing"]["mtu"].as_u64().is_some();
    let shown = eventually(&mesh.home(), "edge show edge-1 -o json", |said| standing(&said.json())).await.json();
    assert_eq!(shown["presence"]["carrier"], "quic");
    assert_eq!(shown["presence"]["standing"]["allows"][3], "127.0.0.1:*");
    assert!(mesh.run("edge ls").await.done().text().contains("quic"));
    let report = mesh.run("ping edge-1 -c 3 -i 0.02 -o json").await.done().json();
    let path: Vec<_> = report["path"].as_array().unwrap().iter().map(|hop| hop["to"].as_str().unwrap()).collect();
    assert_eq!(path, ["shard-1", "edge-1"]);
    assert!(report["p99_ms"].as_f64().is_some() && report["sent_packets"].as_u64().is_some(), "{report}");
    let test = mesh.run("policy test --from user/admin --group admin edge-1:1 -o json").await.done().json();
    assert_eq!((test["rule"].as_str(), &test["edge"]["allowed"]), (Some("admins"), &"127.0.0.1:*".into()));
    let denied = mesh.run("policy test --from user/admin --group admin edge-1/192.0.2.1:1").await;
    denied.failed(3, "the edge itself does not");
}

#[tokio::test]
async fn what_was_done_is_found_in_the_audit() {
    let mesh = Mesh::shared();
    let dora = mesh.login("dora").await;
    run(dora.path(), "proxy edge-1/web", b"").await.failed(3, "policy-denied");
    let found = |said: &crate::mesh::Said| said.json()["records"].as_array().is_some_and(|records| !records.is_empty());
    let page = eventually(&mesh.home(), "audit --user dora -o json", found).await.json();
    let record = &page["records"][0];
    assert_eq!((&record["outcome"], &record["code"]), (&"refused".into(), &"policy-denied".into()));
    assert_eq!((&record["who"], &record["shard"]), (&"user/dora".into(), &"shard-1".into()));
    let told = mesh.run("audit --user dora --outcome policy-denied --since 1h").await.done();
    assert!(told.text().lines().nth(1).is_some_and(|line| line.contains("refused policy-denied")), "{told:?}");
    run(dora.path(), "audit", b"").await.failed(3, "is for users of the group 'admin'");
    assert!(mesh.run("audit --user nobody").await.done().text().lines().count() == 1);
}

#[tokio::test]
async fn an_archive_for_those_who_help_holds_no_secret() {
    let mesh = Mesh::shared();
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (folder.path().join("diag.tar.gz"), folder.path().join("edge.toml"));
    let data = mesh.home().parent().unwrap().join("edge-1");
    std::fs::write(
        &config,
        format!("data_dir = {data:?}\nservices = []\n[proxy]\nurl = \"http://me:swordfish@proxy.lan:3128\"\n"),
    )
    .unwrap();
    let token = mesh.run("token create --user eve").await.done();
    let log = folder.path().join("edge.log");
    std::fs::write(&log, format!("a line\nwith a join line {}\n", token.text())).unwrap();
    let [file, config, log] = [file, config, log].map(|path| path.display().to_string());
    let admin = mesh.address("/edges/0/admin");
    let line = format!("diag edge/edge-1 --file {file} --config {config} --log {log} --admin {admin}");
    let said = mesh.run(&line).await.done();
    assert!(said.text().contains("without secrets"), "{said:?}");
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(&file).unwrap()));
    let mut all = String::new();
    let mut names = Vec::new();
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        names.push(entry.path().unwrap().display().to_string());
        entry.read_to_string(&mut all).unwrap();
    }
    let status = format!("process/{}/status", admin.port());
    for name in ["manifest.json", "why.json", "netcheck.json", "control/policy.json", "config/edge.json", &status] {
        assert!(names.iter().any(|n| n.ends_with(name)), "{name}: {names:?}");
    }
    let mut secrets = vec!["swordfish".to_owned()];
    secrets.extend(token.text().strip_prefix("causeway://").and_then(|l| l.split('@').next()).map(str::to_owned));
    for folder in [mesh.home(), data] {
        let pem = std::fs::read_to_string(folder.join("identity.pem")).unwrap();
        let key = pem.split("-----END").next().unwrap();
        secrets.extend(key.lines().skip(1).map(str::to_owned));
    }
    assert!(secrets.len() > 5, "there are keys to look for");
    for secret in secrets {
        assert!(!all.contains(&secret), "{secret} is in the archive");
    }
    assert!(all.contains("http://proxy.lan:3128"), "where the proxy is may be known");
}
