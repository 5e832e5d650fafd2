//! Bytes through the mesh.

use std::{io, net::Ipv4Addr, process::Stdio, time::Duration};

use serde_json::Value;
use socket2::SockRef;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use crate::mesh::{DEADLINE, Mesh, command, finish, read_until, run, signal};

/// Bytes without a pattern, the same each time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::from_fn(|| Some(next())).flatten().take(len).collect()
}

/// A port of this machine, which is also that of every edge here.
async fn target() -> (TcpListener, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let target = format!("edge-1/127.0.0.1:{}", listener.local_addr().unwrap().port());
    (listener, target)
}

async fn accept(listener: &TcpListener) -> TcpStream {
    timeout(DEADLINE, listener.accept()).await.expect("nobody came").unwrap().0
}

#[tokio::test]
async fn an_edge_answers_pings() {
    let mesh = Mesh::shared();
    let report = mesh.run("ping edge-1 -c 3 -i 0.05 -o json").await.done().json();
    assert_eq!((report["sent"].as_u64(), report["received"].as_u64()), (Some(3), Some(3)));
    assert_eq!((report["shard"].as_str(), report["carrier"].as_str()), (Some("shard-1"), Some("quic")));
    assert!(report["max_ms"].as_f64().unwrap() < 5000.0);
    let words = mesh.run("ping edge-2 -c 1").await.done();
    assert!(words.text().starts_with("edge-2 via shard-1 (quic, 127.0.0.1:"), "{words:?}");
    assert!(words.text().contains("1 sent, 1 came back, 0 lost; min/avg/max"), "{words:?}");
}

#[tokio::test]
async fn an_endless_ping_ends_with_a_summary() {
    let mesh = Mesh::shared();
    let mut child = command(&mesh.home(), "ping edge-1 -c 0 -i 0.02").spawn().unwrap();
    read_until(child.stdout.as_mut().unwrap(), "ping 5:").await;
    signal(child.id().unwrap(), "INT");
    let said = finish(child, b"").await.done();
    assert!(said.text().contains(", 0 lost; min/avg/max"), "{said:?}");
}

#[tokio::test]
async fn ten_megabytes_go_through_a_pipe_and_come_back_whole() {
    let mesh = Mesh::shared();
    let sent = noise(10_000_000);
    let said = run(&mesh.home(), "proxy edge-1/echo", &sent).await.done();
    assert!(said.out == sent, "{} bytes came back, of {}", said.out.len(), sent.len());
    assert_eq!(said.err, "");
}

#[tokio::test]
async fn each_direction_of_a_pipe_ends_by_itself() {
    let (listener, target) = target().await;
    let mut child = command(&Mesh::shared().home(), &format!("proxy {target}")).spawn().unwrap();
    let mut far = accept(&listener).await;
    far.write_all(b"that was all").await.unwrap();
    far.shutdown().await.unwrap();
    // Standard output ends for real, while the process and its input go on.
    let mut heard = Vec::new();
    timeout(DEADLINE, child.stdout.take().unwrap().read_to_end(&mut heard)).await.expect("no end").unwrap();
    assert_eq!(heard, b"that was all");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"here still").await.unwrap();
    drop(stdin);
    let mut heard = String::new();
    timeout(DEADLINE, far.read_to_string(&mut heard)).await.expect("no end").unwrap();
    assert_eq!(heard, "here still");
    drop(far);
    finish(child, b"").await.done();
}

#[tokio::test]
async fn a_reset_is_no_end() {
    let (listener, target) = target().await;
    let mut child = command(&Mesh::shared().home(), &format!("proxy {target}")).spawn().unwrap();
    let mut far = accept(&listener).await;
    far.write_all(b"hello").await.unwrap();
    read_until(child.stdout.as_mut().unwrap(), "hello").await;
    SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
    drop(far);
    // Its input is open and silent, and it ends nevertheless.
    let _stdin = child.stdin.take();
    finish(child, b"").await.failed(1, "the stream broke");
}

#[tokio::test]
async fn a_killed_pipe_leaves_no_connection_behind() {
    for (name, polite) in [("HUP", false), ("TERM", false), ("HUP", true)] {
        let (listener, target) = target().await;
        let mut child = command(&Mesh::shared().home(), &format!("proxy {target}")).spawn().unwrap();
        let mut far = accept(&listener).await;
        let stdin = child.stdin.take();
        let begun = Instant::now();
        if polite {
            // As ssh does it: it closes its end, and hangs up.
            drop(stdin);
        }
        signal(child.id().unwrap(), name);
        let end = timeout(DEADLINE, far.read_u8()).await.expect("the far side never heard of it").unwrap_err();
        // Well below the time after which silence ends a link.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let clean = end.kind() == io::ErrorKind::UnexpectedEof;
        assert!(polite || !clean, "{name}: {end}");
        drop(far);
        let said = finish(child, b"").await;
        assert!(said.err.is_empty(), "{said:?}");
    }
}

#[tokio::test]
async fn who_refuses_is_named() {
    let mesh = Mesh::shared();
    mesh.run("proxy edge-9/web").await.failed(1, "no edge edge-9 is enrolled");
    mesh.run("ping edge-9").await.failed(1, "fault: client; trying again will not help");
    mesh.run("proxy edge-1/nothing").await.failed(1, "[service-unknown;");
    let (listener, target) = target().await;
    drop(listener);
    mesh.run(&format!("proxy {target}")).await.failed(4, "[target-refused; fault: target; try again in");
}

/// A `meshctl forward` that has said where it listens.
async fn forward(line: &str) -> (tokio::process::Child, String) {
    let mut child = command(&Mesh::shared().home(), &format!("forward {line} -o json")).spawn().unwrap();
    let mut words = String::new();
    let mut out = BufReader::new(child.stdout.as_mut().unwrap());
    timeout(DEADLINE, out.read_line(&mut words)).await.expect("it did not start").unwrap();
    let told: Value = serde_json::from_str(&words).unwrap();
    let address = told["forwards"][0]["listen"][0].as_str().unwrap().to_owned();
    (child, address)
}

async fn get(address: &str, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.0\r\n\r\n")).await
}

async fn ask(address: &str, request: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    timeout(DEADLINE, socket.read_to_string(&mut page)).await.expect("no page").unwrap();
    page
}

#[tokio::test]
async fn a_local_port_leads_to_a_service() {
    let (child, address) = forward("edge-2/web 0").await;
    for visit in 0..3 {
        let page = get(&address, &format!("/{visit}")).await;
        assert!(page.ends_with(&format!("Hello from edge-2: you asked for /{visit}.\n")), "{page}");
    }
    let six = address.replace("127.0.0.1", "[::1]");
    if TcpStream::connect(&six).await.is_ok() {
        assert!(get(&six, "/six").await.contains("edge-2"));
    }
    signal(child.id().unwrap(), "INT");
    let said = finish(child, b"").await.done();
    assert_eq!(said.err, "");
}

#[tokio::test]
async fn a_local_port_leads_to_a_remote_port_and_says_which_connection_failed() {
    let (listener, _) = target().await;
    let port = listener.local_addr().unwrap().port();
    let (mut child, address) = forward(&format!("edge-1/127.0.0.1 {port}:0")).await;
    let mut near = TcpStream::connect(&address).await.unwrap();
    let mut far = accept(&listener).await;
    near.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    timeout(DEADLINE, far.read_exact(&mut four)).await.unwrap().unwrap();
    assert_eq!(&four, b"ping");
    drop((listener, near, far));
    let mut refused = TcpStream::connect(&address).await.unwrap();
    let end = timeout(DEADLINE, refused.read_u8()).await.expect("no end").unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset, "a refusal must not look like a clean end");
    let line = read_until(child.stderr.as_mut().unwrap(), "target-refused").await;
    assert!(line.contains(&refused.local_addr().unwrap().to_string()), "{line}");
    signal(child.id().unwrap(), "TERM");
    finish(child, b"").await.done();
}

#[tokio::test]
async fn the_doors_lead_where_meshctl_dev_says() {
    let mesh = Mesh::shared();
    let http = mesh.address("/shards/0/http").to_string();
    let page = ask(&http, "GET /door HTTP/1.1\r\nHost: web.edge-1.mesh.local\r\nConnection: close\r\n\r\n").await;
    assert!(page.contains("Hello from edge-1: you asked for /door."), "{page}");
    // What `curl -K` would do with the file.
    let config = std::fs::read_to_string(mesh.addresses["curl"].as_str().unwrap()).unwrap();
    let token = config.split("admin:").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let (proxy, web) = (mesh.address("/shards/0/proxy").to_string(), mesh.address("/edges/1/web").port());
    let request = |token: &str| {
        format!(
            "GET http://edge-2:{web}/proxy HTTP/1.1\r\nHost: edge-2:{web}\r\nConnection: close\r\n\
             Proxy-Authorization: Bearer {token}\r\n\r\n"
        )
    };
    let page = ask(&proxy, &request(token)).await;
    assert!(page.contains("Hello from edge-2: you asked for /proxy."), "{page}");
    let refused = ask(&proxy, &request("nonsense")).await;
    assert!(refused.starts_with("HTTP/1.1 407"), "{refused}");
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let (listener, _) = target().await;
    let port = listener.local_addr().unwrap().port();
    Mesh::shared()
        .run(&format!("forward edge-1 80:{port}"))
        .await
        .failed(1, &format!("cannot listen on localhost:{port}"));
}

#[tokio::test]
async fn ssh_speaks_through_the_mesh() {
    let mesh = Mesh::shared();
    let (listener, _) = target().await;
    let port = listener.local_addr().unwrap().port();
    let line = format!("ssh -l nobody edge-1/127.0.0.1 -F none -o BatchMode=yes -p {port}");
    let started = command(&mesh.home(), &line).stderr(Stdio::piped()).spawn().unwrap();
    let session = async {
        let (mut far, _) = listener.accept().await.unwrap();
        let mut hello = [0; 8];
        far.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"SSH-2.0-");
    };
    if !std::env::split_paths(&std::env::var_os("PATH").unwrap()).any(|folder| folder.join("ssh").exists()) {
        finish(started, b"").await.failed(1, "OpenSSH's client 'ssh' is not installed");
        return;
    }
    timeout(DEADLINE, session).await.expect("ssh did not come");
    assert_eq!(finish(started, b"").await.status, Some(255), "ssh's own status comes through");
    let child = command(&mesh.home(), "ssh edge-1").env("PATH", "").spawn().unwrap();
    finish(child, b"").await.failed(1, "OpenSSH's client 'ssh' is not installed");
}
