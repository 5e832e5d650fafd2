//! Networks that let no UDP through, from the start or all of a sudden, and let it through again.

use std::time::Duration;

use mesh_edge::{
    config::{EdgeConfig, ProxyAddress},
    life::Phase,
};
use proto::code::CloseCode;
use runtime::{
    link::{Carrier, Link},
    tls::testing::TestCa,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use crate::{
    fake::{FakeShard, LONG, TestEdge, Visit, closed_with, echo, mesh, open, server, soon},
    relay::Relay,
};

/// A shard whose UDP goes through a relay, with its TCP on the same port.
fn shard(ca: &TestCa) -> (FakeShard, Relay) {
    let shard = FakeShard::start(ca, "s-1");
    let relay = Relay::start(&shard);
    (shard.with_tcp(relay.address), relay)
}

/// An edge that may use both carriers.
fn edge(ca: &TestCa, relay: &Relay, change: impl FnOnce(&mut EdgeConfig)) -> TestEdge {
    TestEdge::start_as(ca, ca.issue("edge/shop-1"), None, |config| {
        config.shards = vec![relay.address.to_string()];
        config.carriers.tcp = true;
        config.proxy.url = ProxyAddress::Off;
        change(config);
    })
}

fn carrier_of(edge: &TestEdge) -> (f64, f64) {
    let sample = |carrier| edge.sample(&format!("mesh_edge_carrier{{carrier=\"{carrier}\"}}")).unwrap();
    (sample("quic"), sample("tcp"))
}

fn changes_to(edge: &TestEdge, carrier: &str) -> f64 {
    edge.sample(&format!("mesh_edge_carrier_changes_total{{to=\"{carrier}\"}}")).unwrap_or(0.0)
}

/// The edge's next tunnel, over this carrier.
async fn next(shard: &FakeShard, carrier: Carrier) -> Visit {
    let visit = shard.welcome().await;
    assert_eq!(visit.link.carrier(), carrier);
    visit
}

/// Ends the last tunnel with the edge.
async fn all_ends(edge: TestEdge, link: &Link) {
    edge.end().await;
    assert_eq!(closed_with(link).await, Some(CloseCode::Shutdown));
}

#[tokio::test]
async fn a_network_without_udp_is_got_through_at_once_and_left_for_quic_when_that_opens() {
    let (ca, tasks) = mesh();
    let (shard, relay) = shard(&ca);
    relay.swallow();
    let began = Instant::now();
    let edge = edge(&ca, &relay, |_| ());
    let over_tcp = next(&shard, Carrier::Tcp).await.keep_alive(&tasks);
    let (mut stream, _) = open(&over_tcp, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"through").await;
    assert!(began.elapsed() < Duration::from_secs(2), "the first stream took {:?}", began.elapsed());
    assert_eq!(carrier_of(&edge), (0.0, 1.0));
    assert_eq!(changes_to(&edge, "tcp"), 1.0);

    relay.let_through();
    let opened = Instant::now();
    let over_quic = next(&shard, Carrier::Quic).await.keep_alive(&tasks);
    assert!(opened.elapsed() < Duration::from_secs(60), "{:?}", opened.elapsed());
    soon("the edge counts it", async {
        while changes_to(&edge, "quic") == 0.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(carrier_of(&edge), (1.0, 0.0));
    echo(&mut stream, b"and still on the old one").await;
    let (mut newer, _) = open(&over_quic, "shop-1/(probe)").await.unwrap();
    echo(&mut newer, b"beside the new one").await;
    stream.send.finish();
    assert_eq!(closed_with(&over_tcp).await, Some(CloseCode::Moved));
    newer.send.finish();
    all_ends(edge, &over_quic).await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn udp_that_is_blocked_in_mid_life_is_replaced_within_ten_seconds() {
    let (ca, tasks) = mesh();
    let (shard, relay) = shard(&ca);
    let edge = edge(&ca, &relay, |_| ());
    let over_quic = next(&shard, Carrier::Quic).await.keep_alive(&tasks);
    edge.connected(&shard).await;
    let (mut stream, _) = open(&over_quic, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"before").await;
    assert_eq!(changes_to(&edge, "tcp"), 0.0);

    relay.swallow();
    let blocked = Instant::now();
    let over_tcp = next(&shard, Carrier::Tcp).await.keep_alive(&tasks);
    let (mut stream, _) = open(&over_tcp, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"behind").await;
    assert!(blocked.elapsed() < Duration::from_secs(10), "it took {:?}", blocked.elapsed());
    assert_eq!(changes_to(&edge, "tcp"), 1.0);
    stream.send.finish();
    all_ends(edge, &over_tcp).await;
    over_quic.close(CloseCode::Done, "");
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_closed_udp_port_sends_the_edge_to_tcp_without_waiting() {
    let (ca, tasks) = mesh();
    let (shard, mut relay) = shard(&ca);
    relay.close().await;
    // So that only the refusal can be the reason.
    let edge = edge(&ca, &relay, |config| config.carriers.head_start = LONG);
    let link = next(&shard, Carrier::Tcp).await.keep_alive(&tasks);
    edge.connected(&shard).await;
    assert_eq!(edge.sample("mesh_edge_handshakes_total{carrier=\"quic\",outcome=\"nobody-listens\"}"), Some(1.0));
    all_ends(edge, &link).await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn what_the_shard_says_by_quic_is_not_asked_again_by_tcp() {
    let (ca, tasks) = mesh();
    let (_shard, relay) = shard(&TestCa::new());
    let accepting = _shard.link();
    let edge = edge(&ca, &relay, |_| ());
    let refused = edge.phase("the edge sees another mesh", |phase| matches!(phase, Phase::Refused { .. }));
    let (phase, _) = tokio::join!(refused, accepting);
    let Phase::Refused { kind, .. } = phase else { panic!("{phase:?}") };
    assert_eq!(kind, "wrong-ca");
    let tcp = edge.sample("mesh_edge_handshakes_total{carrier=\"tcp\",outcome=\"wrong-ca\"}");
    assert_eq!(tcp, None, "no TCP connection was made");
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_proxy_is_the_way_where_there_is_no_other() {
    let (ca, tasks) = mesh();
    let (shard, relay) = shard(&ca);
    relay.swallow();
    let proxy = server(&tasks, |mut client| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.contains("Proxy-Authorization: Basic bWU6c2VjcmV0"), "{head}");
        let mut shard = TcpStream::connect(head.split(' ').nth(1).unwrap()).await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut client, &mut shard).await;
    })
    .await;
    let edge = edge(&ca, &relay, |config| {
        config.proxy.url = ProxyAddress::At(format!("http://me:secret@{proxy}").parse().unwrap());
    });
    let link = next(&shard, Carrier::Tcp).await.keep_alive(&tasks);
    let (mut stream, _) = open(&link, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"through").await;
    stream.send.finish();
    all_ends(edge, &link).await;
    assert_eq!(tasks.drained(LONG).await, 0);
}
