//! What comes through the tunnel.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use mesh_edge::config::EdgeConfig;
use proto::{
    code::{RefuseCode, ResetCode},
    stream::Open,
};
use runtime::{
    link::{Link, StreamError},
    shutdown::Tasks,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use crate::fake::{
    FakeShard, LONG, TestEdge, echo, echo_server, mesh, open, open_with, read_exactly, read_to_end, server, soon,
};

/// An edge with a tunnel; the other side of it.
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

fn allowing(addresses: &[SocketAddr]) -> impl FnOnce(&mut EdgeConfig) {
    let rules = addresses.iter().map(|a| a.to_string().parse().unwrap()).collect();
    |config| config.allow = rules
}

fn to(address: SocketAddr) -> String {
    format!("shop-1/{address}")
}

#[tokio::test]
async fn an_allowed_target_is_reached_and_leaves_a_record() {
    let servers = Tasks::new();
    let target = echo_server(&servers).await;
    let mut mesh = Mesh::start(allowing(&[target])).await;
    let (mut stream, address) = open_with(&mesh.link, &to(target), b"early").await.unwrap();
    assert_eq!(address, target.to_string());
    assert_eq!(read_exactly(&mut stream.recv, 5).await, b"early", "what came behind Open is not lost");
    echo(&mut stream, b"hello").await;
    stream.send.finish();
    assert_eq!(read_to_end(&mut stream.recv).await, b"");
    let record = mesh.edge.record().await;
    assert_eq!((&*record.outcome, record.up, record.down), ("finished", 10, 10));
    assert_eq!((record.who.as_str(), record.from.as_str(), record.door.as_str()), ("user/alice", "s-1", "proxy"));
    assert_eq!((record.edge.as_str(), record.rule.as_str()), ("shop-1", target.to_string().as_str()));
    assert_eq!(mesh.edge.sample("mesh_edge_bytes_total{direction=\"up\"}"), Some(10.0));
    assert_eq!(mesh.edge.sample("mesh_edge_streams_total{outcome=\"finished\"}"), Some(1.0));
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_service_is_reached_by_its_name() {
    let servers = Tasks::new();
    let target = echo_server(&servers).await;
    let mut mesh = Mesh::start(|config| {
        let text = format!("services=[{{name = \"echo\", address = \"localhost:{}\"}}]", target.port());
        config.services = runtime::config::load::<EdgeConfig>(None, &[text]).unwrap().services;
    })
    .await;
    for name in ["shop-1/echo", "*/echo", &format!("shop-1:{}", target.port())] {
        let (mut stream, _) = open(&mesh.link, name).await.unwrap();
        echo(&mut stream, b"by name").await;
        stream.send.finish();
        assert_eq!(read_to_end(&mut stream.recv).await, b"");
        assert_eq!(mesh.edge.record().await.rule, "service echo");
    }
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn what_is_not_allowed_not_there_or_not_understood_is_refused_with_its_own_code() {
    let servers = Tasks::new();
    let secret = echo_server(&servers).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut mesh = Mesh::start(|config| {
        config.allow = vec![nobody.to_string().parse().unwrap(), "no-such-name.invalid:80".parse().unwrap()];
        config.sshd = false;
    })
    .await;
    for (target, code) in [
        (to(secret).as_str(), RefuseCode::EdgeDenied),
        ("shop-1:22", RefuseCode::EdgeDenied),
        ("shop-1/169.254.169.254:80", RefuseCode::EdgeDenied),
        (to(nobody).as_str(), RefuseCode::TargetRefused),
        ("shop-1/no-such-name.invalid:80", RefuseCode::TargetNameUnknown),
        ("shop-1/web", RefuseCode::ServiceUnknown),
        ("shop-2/web", RefuseCode::EdgeUnknown),
    ] {
        let refusal = open(&mesh.link, target).await.unwrap_err();
        assert_eq!(refusal.code, code, "{target}: {refusal}");
        let record = mesh.edge.record().await;
        assert_eq!((&*record.outcome, &*record.code), ("refused", code.slug()), "{target}");
        assert!(!record.detail.is_empty());
    }
    let mut nonsense = mesh.link.open().await.unwrap();
    nonsense.send.write_one(Bytes::from_static(&[0, 0, 0, 2, 0xff, 0xff])).await.unwrap();
    let head = read_to_end(&mut nonsense.recv).await;
    let answer = proto::stream::Answer::decode(Bytes::copy_from_slice(&head[4..])).unwrap();
    assert!(matches!(answer, proto::stream::Answer::Refused(r) if r.code == RefuseCode::BadRequest));
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let servers = Tasks::new();
    // Answers with what it got, but only after its client has ended.
    let patient = server(&servers, |mut socket| async move {
        let mut all = Vec::new();
        socket.read_to_end(&mut all).await.unwrap();
        socket.write_all(&all).await.unwrap();
    })
    .await;
    // Ends first, and tells how much came after.
    let (counts, mut counted) = mpsc::channel(1);
    let hasty = server(&servers, move |mut socket| {
        let counts = counts.clone();
        async move {
            socket.write_all(b"that is all").await.unwrap();
            socket.shutdown().await.unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).await.unwrap();
            counts.send(all.len()).await.unwrap();
        }
    })
    .await;
    let mesh = Mesh::start(allowing(&[patient, hasty])).await;

    let (mut stream, _) = open(&mesh.link, &to(patient)).await.unwrap();
    let big = Bytes::from(vec![7; 3_000_000]);
    let (mut send, mut recv) = (stream.send, stream.recv);
    let sender = async {
        send.write_one(big.clone()).await.unwrap();
        send.finish();
        send.delivered().await.unwrap();
    };
    let ((), all) = soon("both", async { tokio::join!(sender, read_to_end(&mut recv)) }).await;
    assert_eq!(all, big);

    stream = open(&mesh.link, &to(hasty)).await.unwrap().0;
    assert_eq!(read_to_end(&mut stream.recv).await, b"that is all");
    stream.send.write_one(big.clone()).await.unwrap();
    stream.send.finish();
    assert_eq!(soon("the count", counted.recv()).await, Some(big.len()));
    drop(stream);
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_reset_is_seen_as_a_reset_on_the_other_side() {
    let servers = Tasks::new();
    let breaking = server(&servers, |mut socket| async move {
        let mut buffer = [0; 4];
        let _ = socket.read_exact(&mut buffer).await;
        socket.set_zero_linger().unwrap();
    })
    .await;
    let (ends, mut ended) = mpsc::channel(1);
    let watching = server(&servers, move |mut socket| {
        let ends = ends.clone();
        async move {
            let mut buffer = [0; 4];
            socket.read_exact(&mut buffer).await.unwrap();
            let end = socket.read(&mut buffer).await.map_err(|e| e.kind());
            ends.send(end).await.unwrap();
        }
    })
    .await;
    let mut mesh = Mesh::start(allowing(&[breaking, watching])).await;
    let (mut stream, _) = open(&mesh.link, &to(breaking)).await.unwrap();
    stream.send.write_one(Bytes::from_static(b"ping")).await.unwrap();
    let error = soon("a reset", stream.recv.chunk(10)).await.unwrap_err();
    assert_eq!(error, StreamError::Reset(ResetCode::PeerReset));
    let record = mesh.edge.record().await;
    assert_eq!((&*record.outcome, &*record.code), ("reset", "peer-reset"));
    drop(stream);

    let (stream, _) = open_with(&mesh.link, &to(watching), b"ping").await.unwrap();
    stream.abort(ResetCode::PeerReset);
    assert_eq!(soon("an end", ended.recv()).await, Some(Err(std::io::ErrorKind::ConnectionReset)));
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

/// A listener whose queue is full: the kernel drops every further SYN, as a black hole does.
struct BlackHole {
    address: SocketAddr,
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl BlackHole {
    fn dig() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        loop {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let full = socket.connect_timeout(&address, Duration::from_millis(200)).is_err();
            queued.push(socket);
            if full {
                let address = address.as_socket().unwrap();
                return Self { address, _listener: listener, _queued: queued };
            }
        }
    }
}

#[tokio::test]
async fn a_black_hole_costs_its_own_deadline_and_nobody_elses() {
    let servers = Tasks::new();
    let (hole, live) = (BlackHole::dig(), echo_server(&servers).await);
    let mesh = Mesh::start(|config| {
        allowing(&[hole.address, live])(config);
        config.dial_timeout = Duration::from_secs(2);
    })
    .await;
    let began = tokio::time::Instant::now();
    let holes = (0..20).map(|_| {
        let (link, target) = (mesh.link.clone(), to(hole.address));
        mesh.tasks.spawn(async move { open(&link, &target).await.map(drop) })
    });
    let holes: Vec<_> = holes.collect();
    for _ in 0..20 {
        let (mut stream, _) = open(&mesh.link, &to(live)).await.unwrap();
        echo(&mut stream, b"quick").await;
    }
    let lively = began.elapsed();
    assert!(lively < Duration::from_secs(2), "the living waited for the dead: {lively:?}");
    for hole in holes {
        assert_eq!(hole.await.unwrap().unwrap_err().code, RefuseCode::TargetTimeout);
    }
    let all = began.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(5)).contains(&all), "{all:?}");
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn an_opener_that_goes_away_ends_the_dialing() {
    let hole = BlackHole::dig();
    let mut mesh = Mesh::start(|config| {
        allowing(&[hole.address])(config);
        config.dial_timeout = Duration::from_secs(600);
    })
    .await;
    let mut stream = mesh.link.open().await.unwrap();
    stream.send.write_one(Open::new(to(hole.address).parse().unwrap()).encode().unwrap()).await.unwrap();
    soon("the dial", async {
        while mesh.edge.sample("mesh_edge_streams_active") != Some(1.0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stream.abort(ResetCode::Cancelled);
    let record = mesh.edge.record().await;
    assert_eq!((&*record.outcome, &*record.code), ("reset", "cancelled"));
    mesh.end().await;
}

#[tokio::test]
async fn one_stream_too_many_is_refused_at_once() {
    let mesh = Mesh::start(|config| config.limits.streams = 2).await;
    let (mut first, _) = open(&mesh.link, "shop-1/(probe)").await.unwrap();
    let (second, _) = open(&mesh.link, "shop-1/(probe)").await.unwrap();
    let refusal = open(&mesh.link, "shop-1/(probe)").await.unwrap_err();
    assert_eq!(refusal.code, RefuseCode::LimitReached);
    echo(&mut first, b"others go on").await;
    second.abort(ResetCode::Cancelled);
    soon("room", async {
        while mesh.edge.sample("mesh_edge_streams_active") != Some(1.0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    open(&mesh.link, "shop-1/(probe)").await.unwrap();
    drop(first);
    mesh.end().await;
}

#[tokio::test]
async fn a_stream_that_nobody_reads_does_not_hold_up_another() {
    let servers = Tasks::new();
    let flood = server(&servers, |mut socket| async move {
        let block = vec![1; 65536];
        while socket.write_all(&block).await.is_ok() {}
    })
    .await;
    let mesh = Mesh::start(allowing(&[flood])).await;
    let (ignored, _) = open(&mesh.link, &to(flood)).await.unwrap();
    let (mut lively, _) = open(&mesh.link, "shop-1/(probe)").await.unwrap();
    for _ in 0..100 {
        echo(&mut lively, b"tick").await;
    }
    drop((ignored, lively));
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_broken_link_breaks_the_targets_connection_and_leaves_nothing() {
    let servers = Tasks::new();
    let (ends, mut ended) = mpsc::channel(1);
    let watching = server(&servers, move |mut socket: TcpStream| {
        let ends = ends.clone();
        async move {
            let mut buffer = [0; 4];
            socket.read_exact(&mut buffer).await.unwrap();
            let end = socket.read(&mut buffer).await.map_err(|e| e.kind());
            ends.send(end).await.unwrap();
        }
    })
    .await;
    let mut mesh = Mesh::start(allowing(&[watching])).await;
    let (_stream, _) = open_with(&mesh.link, &to(watching), b"ping").await.unwrap();
    mesh.link.close(proto::code::CloseCode::Shutdown, "crash");
    assert_eq!(soon("an end", ended.recv()).await, Some(Err(std::io::ErrorKind::ConnectionReset)));
    assert_eq!(mesh.edge.record().await.code, "link-lost");
    mesh.end().await;
    assert_eq!(servers.drained(LONG).await, 0);
}
