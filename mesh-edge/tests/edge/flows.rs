//! UDP flows that come through the tunnel.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use mesh_edge::config::EdgeConfig;
use proto::{
    code::{RefuseCode, ResetCode},
    message::ServiceKind,
    stream::{Open, Refusal},
};
use runtime::{
    flow::{
        PacketSink, PacketSource, Side,
        stream::{StreamSink, StreamSource, side},
    },
    link::Link,
    shutdown::Tasks,
};
use tokio::net::UdpSocket;

use crate::fake::{FakeShard, LONG, TestEdge, mesh, open_as, soon};

type Flow = Side<StreamSource, StreamSink>;

/// A UDP server that sends back what it gets.
async fn echo(tasks: &Tasks) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    }));
    address
}

/// Opens a flow as a shard does, with a first datagram right behind the Open.
#[allow(clippy::unwrap_in_result, reason = "only the refusal is a result")]
async fn open(link: &Link, target: &str) -> Result<(Flow, String), Refusal> {
    let open = Open::flow(target.parse().unwrap());
    let (stream, address) = open_as(link, open, b"\0\x05early").await?;
    let mut flow = side(stream);
    flow.sink.opened();
    Ok((flow, address))
}

async fn next(flow: &mut Flow) -> Bytes {
    soon("a datagram", flow.source.next()).await.unwrap().expect("the flow ended")
}

/// Sends one and hears the same.
async fn back(flow: &mut Flow, payload: Bytes) {
    flow.sink.put(payload.clone());
    let Side { source, sink } = flow;
    let heard = async {
        tokio::select! {
            biased;
            heard = source.next() => heard.unwrap().expect("the flow ended"),
            broken = async { loop { if let Err(e) = sink.flush().await { break e } } } => panic!("{broken}"),
        }
    };
    assert_eq!(soon("an echo", heard).await, payload);
}

struct Mesh {
    edge: TestEdge,
    link: Link,
    tasks: Tasks,
}

impl Mesh {
    async fn start(change: impl FnOnce(&mut EdgeConfig)) -> Self {
        let (ca, tasks) = mesh();
        let shard = FakeShard::start(&ca, "s-1");
        let edge = TestEdge::start(&ca, &[&shard], change);
        let link = shard.welcome().await.keep_alive(&tasks);
        edge.connected(&shard).await;
        Self { edge, link, tasks }
    }

    async fn end(self) {
        self.edge.end().await;
        assert_eq!(self.tasks.drained(LONG).await, 0);
    }
}

fn service(name: &str, kind: ServiceKind, address: SocketAddr) -> mesh_edge::config::ServiceConfig {
    let (name, address) = (name.parse().unwrap(), address.to_string().parse().unwrap());
    mesh_edge::config::ServiceConfig { name, kind, address, labels: std::collections::BTreeMap::new() }
}

#[tokio::test]
async fn a_flow_to_a_service_carries_datagrams_and_leaves_a_record() {
    let servers = Tasks::new();
    let target = echo(&servers).await;
    let mut mesh = Mesh::start(|config| config.services.push(service("dns", ServiceKind::Udp, target))).await;
    let (mut flow, address) = open(&mesh.link, "shop-1/dns").await.unwrap();
    assert_eq!((address, next(&mut flow).await), (target.to_string(), Bytes::from_static(b"early")));
    for size in [0, 1, 1000, 9000, 65_507] {
        back(&mut flow, Bytes::from(vec![7; size])).await;
    }
    flow.sink.finish().await;
    let record = mesh.edge.record().await;
    let carried = 5 + 1 + 1000 + 9000 + 65_507;
    assert_eq!((record.outcome, record.up, record.down), ("finished", carried, carried));
    assert_eq!(record.rule, "service dns");
    assert_eq!(mesh.edge.sample("mesh_edge_datagrams_total{direction=\"up\"}"), Some(6.0));
    assert_eq!(mesh.edge.sample("mesh_edge_udp_flows_active"), Some(0.0));
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn silence_ends_a_flow_cleanly() {
    let servers = Tasks::new();
    let target = echo(&servers).await;
    let mut mesh = Mesh::start(|config| {
        config.allow.push(format!("{target}/udp").parse().unwrap());
        config.udp_idle = Duration::from_millis(200);
    })
    .await;
    let (mut flow, _) = open(&mesh.link, &format!("shop-1/{target}/udp")).await.unwrap();
    assert_eq!(next(&mut flow).await, b"early"[..]);
    assert_eq!(soon("the end", flow.source.next()).await, Ok(None));
    flow.sink.finish().await;
    assert_eq!(mesh.edge.record().await.outcome, "finished");
    mesh.end().await;
}

#[tokio::test]
async fn nothing_is_reached_that_is_not_opened_for_udp() {
    let servers = Tasks::new();
    let target = echo(&servers).await;
    let mesh = Mesh::start(|config| {
        config.allow.push(target.to_string().parse().unwrap());
        config.services.push(service("web", ServiceKind::Http, target));
        config.services.push(service("dns", ServiceKind::Udp, target));
    })
    .await;
    for (to, code) in [
        (format!("shop-1/{target}"), RefuseCode::Unsupported),
        ("shop-1/web".into(), RefuseCode::Unsupported),
        ("shop-1:10250/udp".into(), RefuseCode::EdgeDenied),
        ("shop-1:22/udp".into(), RefuseCode::EdgeDenied),
        ("shop-1/10.0.0.1:53/udp".into(), RefuseCode::EdgeDenied),
    ] {
        let refusal = open(&mesh.link, &to).await.err().unwrap_or_else(|| panic!("{to} was opened"));
        assert_eq!(refusal.code, code, "{to}: {refusal}");
    }
    // Whoever speaks no datagrams is not given any: an older shard that passes bytes on, or the HTTP door.
    let bytes = Open::new("shop-1/dns".parse().unwrap());
    assert_eq!(open_as(&mesh.link, bytes, b"").await.unwrap_err().code, RefuseCode::Unsupported);
    mesh.end().await;
}

#[tokio::test]
async fn flows_are_bounded_and_streams_are_not_bounded_by_them() {
    let servers = Tasks::new();
    let target = echo(&servers).await;
    let mesh = Mesh::start(|config| {
        config.limits.udp_flows = 1;
        config.services.push(service("dns", ServiceKind::Udp, target));
    })
    .await;
    let (flow, _) = open(&mesh.link, "shop-1/dns").await.unwrap();
    assert_eq!(open(&mesh.link, "shop-1/dns").await.err().unwrap().code, RefuseCode::LimitReached);
    crate::fake::open(&mesh.link, "shop-1/(probe)").await.unwrap().0.abort(ResetCode::Cancelled);
    drop(flow);
    soon("room for another flow", async {
        while let Err(refusal) = open(&mesh.link, "shop-1/dns").await {
            assert_eq!(refusal.code, RefuseCode::LimitReached);
        }
    })
    .await;
    mesh.end().await;
}

#[tokio::test]
async fn a_closed_port_is_told_by_a_reset() {
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut mesh = Mesh::start(|config| config.services.push(service("dns", ServiceKind::Udp, nobody))).await;
    match open(&mesh.link, "shop-1/dns").await {
        Ok((mut flow, _)) => {
            assert_eq!(soon("a reset", flow.source.next()).await.unwrap_err().code, ResetCode::PeerReset);
        }
        Err(refusal) => assert_eq!(refusal.code, RefuseCode::TargetRefused, "the reset came first"),
    }
    let record = mesh.edge.record().await;
    assert_eq!((record.outcome, record.detail.as_str()), ("reset", "nothing listens on that UDP port"));
    mesh.end().await;
}
