//! The proxy door.

use std::{sync::Arc, time::Duration};

use mesh_cloud::state::MeshState;
use proto::identity::Role;
use runtime::tls::{self, LiveIdentity, MeshVerifier};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::mesh::{BASIC, BLACK_HOLE, Ended, Mesh, Stage, Talk, echo, until, web};

async fn connected(mesh: &Mesh, port: u16) -> Talk {
    let mut talk = mesh.proxy().await;
    talk.say(&format!("CONNECT shop-1:{port} HTTP/1.1\r\nHost: shop-1:{port}\r\n{BASIC}\r\n")).await;
    let head = talk.head().await;
    assert!(head.starts_with("HTTP/1.1 200 Connection Established\r\n"), "{head}");
    talk
}

#[tokio::test]
async fn what_the_client_sends_early_arrives() {
    let mut mesh = Mesh::start(&[]).await;
    let port = echo().await;
    // As ssh's `nc -X connect` writes it, and as everybody else does.
    for version in ["1.0", "1.1"] {
        let mut talk = mesh.proxy().await;
        talk.say(&format!("CONNECT shop-1:{port} HTTP/{version}\r\n{BASIC}Host: shop-1\r\n\r\nEARLY\0\n\r\n")).await;
        let head = talk.head().await;
        assert!(head.starts_with(&format!("HTTP/{version} 200 Connection Established\r\n")), "{head}");
        assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
        assert_eq!(talk.exactly(9).await, "EARLY\0\n\r\n");
        talk.say("later").await;
        assert_eq!(talk.exactly(5).await, "later");
        talk.finish().await;
        assert_eq!(talk.rest().await, (String::new(), Ended::Cleanly));
        let record = mesh.record().await;
        assert_eq!((record.who.as_str(), &*record.outcome, record.up, record.down), ("user/alice", "finished", 14, 14));
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_and_half_closes_are_kept() {
    let mesh = Mesh::start(&[]).await;
    let stage = Stage::new().await;
    let mut client = mesh.proxy().await;
    let port = stage.port();
    client.say(&format!("CONNECT shop-1:{port} HTTP/1.1\r\nHost: x\r\n{BASIC}\r\n")).await;
    let mut server = stage.enter().await;
    server.say("SSH-2.0-banner\r\n").await;
    client.head().await;
    assert_eq!(client.hear("\r\n").await, "SSH-2.0-banner\r\n");
    client.say("last question").await;
    client.finish().await;
    assert_eq!(server.rest().await, ("last question".into(), Ended::Cleanly));
    server.say("the answer after the end").await;
    drop(server);
    assert_eq!(client.rest().await, ("the answer after the end".into(), Ended::Cleanly));
}

#[tokio::test]
async fn a_reset_behind_the_tunnel_is_a_reset_in_front_of_it() {
    let mesh = Mesh::start(&[]).await;
    let stage = Stage::new().await;
    let mut client = connected(&mesh, stage.port()).await;
    let mut server = stage.enter().await;
    server.say("half").await;
    assert_eq!(client.exactly(4).await, "half");
    server.reset();
    assert_eq!(client.rest().await.1, Ended::ByReset);
}

#[tokio::test]
async fn every_refusal_says_why_and_what_to_do() {
    let mesh = Mesh::start(&[]).await;
    let closed = { Stage::new().await.port() };
    let bob = "Proxy-Authorization: Bearer bob-token\r\n";
    let cases: Vec<(String, &str, u16, &str, &[&str])> = vec![
        ("shop-1:22".into(), "", 407, "unauthenticated", &["Proxy-Authenticate: Basic", "curl: --proxy-user"]),
        ("shop-1:22".into(), "Proxy-Authorization: x\r\n", 407, "unauthenticated", &["cannot be understood"]),
        ("shop-1:22".into(), "Proxy-Authorization: Basic\r\n", 407, "unauthenticated", &["cannot be understood"]),
        ("shop-1:22".into(), "Proxy-Authorization: Basic YQ==\r\n", 407, "unauthenticated", &["cannot be understood"]),
        ("shop-1:22".into(), "Proxy-Authorization: Bearer no\r\n", 407, "unauthenticated", &["not known"]),
        // bob's name with alice's token
        (
            "shop-1:22".into(),
            "Proxy-Authorization: Basic Ym9iOmFsaWNlLXRva2Vu\r\n",
            407,
            "unauthenticated",
            &["another user's"],
        ),
        ("shop-1:22".into(), bob, 403, "policy-denied", &["x-mesh-fault: policy", "user/bob"]),
        ("shop-9:22".into(), BASIC, 404, "edge-unknown", &["shop-9", "meshctl edge ls"]),
        ("shop-2:22".into(), BASIC, 503, "edge-offline", &["x-mesh-fault: edge", "retry-after: 5", "shop-2"]),
        (format!("shop-1:{closed}"), BASIC, 502, "target-refused", &["x-mesh-fault: target", "retry-after: 1"]),
        ("10.0.0.1:22".into(), BASIC, 501, "unsupported", &["10.0.0.1 is an address"]),
        ("[::1]:22".into(), BASIC, 501, "unsupported", &["is an address"]),
        ("no_name:22".into(), BASIC, 400, "bad-request", &["no_name"]),
        ("x.shop-1.mesh.test:80".into(), BASIC, 404, "service-unknown", &["shop-1/x"]),
    ];
    for (target, credentials, status, slug, texts) in cases {
        let mut talk = mesh.proxy().await;
        talk.say(&format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{credentials}\r\n")).await;
        let (answer, ended) = talk.rest().await;
        let what = format!("{target} {credentials}: {answer}");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} {slug}\r\n")), "{what}");
        assert_eq!(ended, Ended::Cleanly, "{what}");
        for text in texts.iter().copied().chain([&*format!("x-mesh-error: {slug}\r\n"), "connection: close"]) {
            assert!(answer.to_lowercase().contains(&text.to_lowercase()), "{text:?} is not in {what}");
        }
        assert!(answer.ends_with('\n') && !answer.contains("alice-token"), "{what}");
    }
}

#[tokio::test]
async fn whoever_comes_before_control_was_heard_waits_for_its_word_and_is_not_a_stranger() {
    let mesh = Mesh::start(&[]).await;
    let stage = Stage::new().await;
    let known = mesh.state.send_replace(Arc::new(MeshState::default()));
    let coming = connected(&mesh, stage.port());
    tokio::pin!(coming);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut coming).await;
    assert!(early.is_err(), "nobody can be told yet whether they are known");
    mesh.state.send_replace(known);
    let mut tunnel = coming.await;
    stage.enter().await.say("hello").await;
    tunnel.hear("hello").await;
}

#[tokio::test]
async fn requests_that_are_no_use_to_a_proxy_are_told_so() {
    let mesh = Mesh::start(&[]).await;
    for (line, text) in [
        ("GET / HTTP/1.1", "this is a proxy"),
        ("GET https://shop-1/ HTTP/1.1", "CONNECT"),
        ("GET http://shop-1:0/ HTTP/1.1", "no port"),
        ("CONNECT shop-1 HTTP/1.1", ""),
        ("CONNECT shop-1:99999 HTTP/1.1", ""),
        ("CONNECT :22 HTTP/1.1", ""),
        ("CONNECT alice@shop-1:22 HTTP/1.1", ""),
    ] {
        let mut talk = mesh.proxy().await;
        talk.say(&format!("{line}\r\nHost: shop-1\r\n{BASIC}\r\n")).await;
        let (answer, _) = talk.rest().await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{line}: {answer}");
        assert!(answer.contains(text), "{line}: {answer}");
    }
}

#[tokio::test]
async fn one_connection_reaches_many_targets_request_by_request() {
    let (one, two) = (web("one").await, web("two").await);
    let mesh = Mesh::start(&[("web", two)]).await;
    let mut talk = mesh.proxy().await;
    for (host, name) in [
        (format!("shop-1:{one}"), "one"),
        (format!("shop-1.mesh.test:{two}"), "two"),
        ("web.shop-1.mesh.test".to_owned(), "two"),
        (format!("shop-1:{one}"), "one"),
    ] {
        talk.say(&format!(
            "GET http://{host}/path?q HTTP/1.1\r\nHost: {host}\r\n{BASIC}Connection: X-Hop\r\nX-Hop: 1\r\nProxy-Connection: keep-alive\r\nX-End: 1\r\n\r\n"
        ))
        .await;
        let (head, body) = talk.response().await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(body.starts_with(&format!("{name}: GET /path?q HTTP/1.1\r\n")), "{body}");
        let body = body.to_lowercase();
        for text in [&*format!("host: {host}"), "x-end: 1", "via: 1.1 causeway", "x-forwarded-for: 127.0.0.1"] {
            assert!(body.contains(text), "{text}: {body}");
        }
        for text in ["proxy-", "x-hop", "basic"] {
            assert!(!body.contains(text), "{text}: {body}");
        }
    }
    // Without credentials it is another matter, on the same connection too.
    talk.say(&format!("GET http://shop-1:{one}/ HTTP/1.1\r\nHost: shop-1:{one}\r\n\r\n")).await;
    assert!(talk.response().await.0.starts_with("HTTP/1.1 407 "));
    talk.say(&format!("GET http://shop-1:{one}/ HTTP/1.1\r\nHost: shop-1:{one}\r\n{BASIC}\r\n")).await;
    assert!(talk.response().await.0.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_token_that_is_revoked_ends_what_it_opened() {
    let mut mesh = Mesh::start(&[]).await;
    let stage = Stage::new().await;
    let mut tunnel = connected(&mesh, stage.port()).await;
    let mut behind = stage.enter().await;
    behind.say("half").await;
    tunnel.hear("half").await;
    let mut client = mesh.proxy().await;
    let port = stage.port();
    client.say(&format!("GET http://shop-1:{port}/ HTTP/1.1\r\nHost: shop-1:{port}\r\n{BASIC}\r\n")).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\n\r\nhalf").await;
    client.hear("half").await;
    assert_eq!(mesh.live.end_where(|credential| credential != "token:alice"), 1);
    for talk in [&mut tunnel, &mut client, &mut behind, &mut service] {
        assert_eq!(talk.rest().await.1, Ended::ByReset);
    }
    for _ in 0..2 {
        let record = mesh.record().await;
        assert_eq!((&*record.outcome, &*record.code), ("reset", "revoked"));
    }
    // The edge's own certificate stays in use.
    until(|| mesh.live.len() == 1).await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_dial_with_it() {
    let mut mesh = Mesh::start(&[]).await;
    let mut talk = mesh.proxy().await;
    talk.say(&format!("CONNECT shop-1:{BLACK_HOLE} HTTP/1.1\r\nHost: x\r\n{BASIC}\r\n")).await;
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 1).await;
    drop(talk);
    let record = mesh.record().await;
    assert_eq!((&*record.outcome, record.target), ("cancelled", format!("shop-1:{BLACK_HOLE}")));
    until(|| edge.streams() == 0).await;
}

async fn over_tls(mesh: &Mesh, who: Option<&str>) -> TlsStream<TcpStream> {
    let identity = who.map(|who| LiveIdentity::new(&mesh.ca.issue(who)).unwrap());
    let verifier = Arc::new(MeshVerifier::of_servers(mesh.ca.bundle(), Role::Shard));
    let config = tls::client_config(identity.as_ref(), verifier, &[b"http/1.1"]).unwrap();
    let socket = TcpStream::connect(mesh.shard.proxy.unwrap()).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect("shard.test".try_into().unwrap(), socket).await.unwrap()
}

async fn asked(tls: &mut TlsStream<TcpStream>, text: &str, mark: &str) -> String {
    tls.write_all(text.as_bytes()).await.unwrap();
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(mark) {
        assert_ne!(tls.read_buf(&mut heard).await.unwrap(), 0, "{}", String::from_utf8_lossy(&heard));
    }
    String::from_utf8_lossy(&heard).into_owned()
}

#[tokio::test]
async fn over_tls_a_certificate_says_who_asks() {
    let mut mesh = Mesh::start(&[]).await;
    let port = echo().await;
    let request = |more: &str| format!("CONNECT shop-1:{port} HTTP/1.1\r\nHost: x\r\n{more}\r\nearly");
    let mut alice = over_tls(&mesh, Some("user/alice")).await;
    let heard = asked(&mut alice, &request(""), "early").await;
    assert!(heard.starts_with("HTTP/1.1 200 "), "{heard}");
    alice.shutdown().await.unwrap();
    let mut rest = Vec::new();
    alice.read_to_end(&mut rest).await.expect("close_notify, not a cut");
    assert_eq!(mesh.record().await.outcome, "finished");
    let mut nobody = over_tls(&mesh, None).await;
    assert!(asked(&mut nobody, &request(BASIC), "early").await.starts_with("HTTP/1.1 200 "));
    for (who, status, text) in [
        (None, "407", "--proxy-user"),
        (Some("user/bob"), "403", "user/bob"),
        (Some("edge/shop-1"), "403", "only users"),
        (Some("shard/s2"), "403", "only users"),
    ] {
        let mut tls = over_tls(&mesh, who).await;
        let heard = asked(&mut tls, &request(""), text).await;
        assert!(heard.starts_with(&format!("HTTP/1.1 {status} ")), "{who:?}: {heard}");
    }
}

#[tokio::test]
async fn garbage_and_half_handshakes_end_and_the_door_stays_open() {
    let mesh = Mesh::start(&[]).await;
    let port = echo().await;
    let mut half = mesh.proxy().await;
    half.say_bytes(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc").await;
    for (garbage, answer) in [
        (&b"\x05\x01\x00"[..], &b"\x05\xff"[..]),
        (b"\x00\x01\x02\x03", b"HTTP/1.1 400"),
        (b"\x16\x03\x01\xff\xff\xff\xff\xff\xff\xff\xff", b"\x15\x03"),
        (b"hello\r\n\r\n", b"HTTP/1.1 400"),
        (b"CONNECT  HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
    ] {
        let mut talk = mesh.proxy().await;
        talk.say_bytes(garbage).await;
        let (heard, _) = talk.rest().await;
        assert!(heard.starts_with(&*String::from_utf8_lossy(answer)), "{garbage:?}: {heard:?}");
    }
    let mut talk = connected(&mesh, port).await;
    talk.say("still here").await;
    assert_eq!(talk.exactly(10).await, "still here");
}
