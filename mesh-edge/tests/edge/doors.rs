//! The doors of an edge: programs on its machine that reach into the mesh.

use std::net::SocketAddr;

use bytes::Bytes;
use mesh_edge::config::{DoorsConfig, EdgeConfig, ForwardConfig, ProxyDoor};
use proto::{
    code::RefuseCode,
    frame::MAX_STREAM_HEAD,
    stream::{Answer, Open, Refusal},
};
use runtime::{
    flow::{PacketSink, PacketSource, stream::side},
    frames::FrameReader,
    link::{Link, Stream},
    shutdown::Tasks,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

use crate::fake::{FakeShard, LONG, TestEdge, mesh, read_exactly, soon};

const ANY: &str = "127.0.0.1:0";

/// An edge whose doors are open, and the shard's side of its tunnel.
struct Mesh {
    edge: TestEdge,
    link: Link,
    tasks: Tasks,
}

impl Mesh {
    async fn start(forward: Vec<ForwardConfig>) -> Self {
        let (ca, tasks) = mesh();
        let shard = FakeShard::start(&ca, "s-1");
        let mut edge = TestEdge::start(&ca, &[&shard], |_| ());
        let link = shard.welcome().await.keep_alive(&tasks);
        edge.connected(&shard).await;
        let doors = DoorsConfig { proxy: ProxyDoor::At(ANY.parse().unwrap()), domain: "mesh.test".into(), forward };
        let (config, group) = (EdgeConfig { doors, ..EdgeConfig::default() }, edge.tasks.clone());
        edge.edge.open_doors(&config, &group).await.unwrap();
        Self { edge, link, tasks }
    }

    async fn proxy(&self) -> TcpStream {
        TcpStream::connect(self.edge.edge.doors().proxy.unwrap()).await.unwrap()
    }

    /// The next stream that the edge opens, and what for.
    async fn asked(&self) -> (Stream, Open) {
        let mut stream = soon("the edge opens a stream", self.link.accept()).await.unwrap();
        let mut reader = FrameReader::new(MAX_STREAM_HEAD);
        let open = soon("Open", reader.next(&mut stream.recv)).await.unwrap().unwrap();
        stream.recv.unread(reader.into_rest());
        (stream, Open::decode(open).unwrap())
    }

    /// Lets the next stream through.
    async fn opened(&self, target: &str) -> Stream {
        let (mut stream, open) = self.asked().await;
        assert_eq!(open.target.to_string(), target);
        assert_eq!(open.principal, None, "for whom it is, its certificate says");
        let answer = Answer::Opened { edge: "shop-2".parse().unwrap(), address: "there".into() };
        stream.send.write_one(answer.encode()).await.unwrap();
        stream
    }

    async fn end(self) {
        self.edge.end().await;
        assert_eq!(self.tasks.drained(LONG).await, 0);
    }
}

async fn hear(socket: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut heard = vec![0; length];
    soon("bytes", socket.read_exact(&mut heard)).await.unwrap();
    heard
}

async fn rest(socket: &mut TcpStream) -> String {
    let mut heard = String::new();
    soon("the end", socket.read_to_string(&mut heard)).await.unwrap();
    heard
}

#[tokio::test]
async fn connect_leads_to_another_edge() {
    let mesh = Mesh::start(vec![]).await;
    for (host, target) in [
        ("shop-2:5432", "shop-2:5432"),
        ("shop-2.mesh.test:5432", "shop-2:5432"),
        ("web.shop-2.mesh.test:80", "shop-2/web"),
    ] {
        let mut program = mesh.proxy().await;
        program.write_all(format!("CONNECT {host} HTTP/1.1\r\nHost: x\r\n\r\nearly").as_bytes()).await.unwrap();
        let mut stream = mesh.opened(target).await;
        let established = b"HTTP/1.1 200 Connection Established\r\n\r\n";
        assert_eq!(hear(&mut program, established.len()).await, established);
        assert_eq!(read_exactly(&mut stream.recv, 5).await, b"early");
        stream.send.write_one(Bytes::from_static(b"hello")).await.unwrap();
        stream.send.finish();
        assert_eq!(rest(&mut program).await, "hello");
    }
    mesh.end().await;
}

#[tokio::test]
async fn a_refusal_says_who_is_at_fault() {
    let mesh = Mesh::start(vec![]).await;
    let refuse = async || {
        let (mut stream, _) = mesh.asked().await;
        let refusal = Refusal::because(RefuseCode::PolicyDenied, "no rule allows edge/shop-1 to do that");
        stream.send.write_one(Answer::Refused(refusal).encode()).await.unwrap();
        stream.send.finish();
    };
    let mut program = mesh.proxy().await;
    program.write_all(b"CONNECT shop-2:22 HTTP/1.1\r\n\r\n").await.unwrap();
    refuse().await;
    let answer = rest(&mut program).await;
    assert!(answer.starts_with("HTTP/1.1 403 policy-denied\r\n") && answer.ends_with("to do that\n"), "{answer}");
    let mut program = mesh.proxy().await;
    program.write_all(b"\x05\x01\x00\x05\x01\x00\x03\x06shop-2\x00\x16").await.unwrap();
    refuse().await;
    assert_eq!(hear(&mut program, 12).await, [5, 0, 5, 2, 0, 1, 0, 0, 0, 0, 0, 0]);
    for (words, answer) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "HTTP/1.1 400 bad-request\r\n"),
        (b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n", "HTTP/1.1 501 unsupported\r\n"),
    ] {
        let mut program = mesh.proxy().await;
        program.write_all(words).await.unwrap();
        assert!(rest(&mut program).await.starts_with(answer));
    }
    let mut program = mesh.proxy().await;
    program.write_all(b"\x05\x01\x02").await.unwrap();
    assert_eq!(hear(&mut program, 2).await, [5, 0xff], "nobody has to log in here");
    mesh.end().await;
}

#[tokio::test]
async fn datagrams_of_an_association_reach_another_edge() {
    let mesh = Mesh::start(vec![]).await;
    let mut program = mesh.proxy().await;
    program.write_all(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0").await.unwrap();
    let reply = hear(&mut program, 12).await;
    assert_eq!(reply[..10], [5, 0, 5, 0, 0, 1, 127, 0, 0, 1]);
    let way = SocketAddr::from(([127, 0, 0, 1], u16::from_be_bytes([reply[10], reply[11]])));
    let socket = UdpSocket::bind(ANY).await.unwrap();
    socket.connect(way).await.unwrap();
    let datagram = b"\0\0\0\x03\x06shop-2\0\x35question";
    socket.send(datagram).await.unwrap();
    let mut flow = side(mesh.opened("shop-2:53/udp").await);
    flow.sink.opened();
    assert_eq!(soon("a datagram", flow.source.next()).await.unwrap().unwrap(), b"question"[..]);
    flow.sink.put(Bytes::from_static(b"answer"));
    let mut buffer = [0; 100];
    let length = soon("an answer", socket.recv(&mut buffer)).await.unwrap();
    assert_eq!(buffer[..length], *b"\0\0\0\x03\x06shop-2\0\x35answer");
    drop(program);
    assert_eq!(soon("the flow ends", flow.source.next()).await, Ok(None));
    flow.sink.finish().await;
    mesh.end().await;
}

#[tokio::test]
async fn forwards_lead_to_their_targets() {
    let forward =
        |target: &str, udp| ForwardConfig { listen: ANY.parse().unwrap(), target: target.parse().unwrap(), udp };
    let mesh = Mesh::start(vec![forward("shop-2/web", false), forward("shop-2:53", true)]).await;
    let [web, dns] = mesh.edge.edge.doors().forwards[..] else { panic!("two doors") };
    let mut program = TcpStream::connect(web).await.unwrap();
    program.write_all(b"hello").await.unwrap();
    let mut stream = mesh.opened("shop-2/web").await;
    assert_eq!(read_exactly(&mut stream.recv, 5).await, b"hello");
    stream.send.finish();
    assert_eq!(rest(&mut program).await, "");
    drop(program);
    let socket = UdpSocket::bind(ANY).await.unwrap();
    socket.connect(dns).await.unwrap();
    socket.send(b"question").await.unwrap();
    let mut flow = side(mesh.opened("shop-2:53/udp").await);
    assert_eq!(soon("a datagram", flow.source.next()).await.unwrap().unwrap(), b"question"[..]);
    drop(flow);
    mesh.end().await;
}

#[tokio::test]
async fn the_default_address_may_be_another_edges_and_a_named_one_may_not() {
    let taken = tokio::net::TcpListener::bind(ANY).await.unwrap();
    let mut mesh = Mesh::start(vec![]).await;
    let at = |proxy| EdgeConfig { doors: DoorsConfig { proxy, ..DoorsConfig::default() }, ..EdgeConfig::default() };
    let group = mesh.edge.tasks.clone();
    let named = at(ProxyDoor::At(taken.local_addr().unwrap()));
    assert!(mesh.edge.edge.open_doors(&named, &group).await.is_err());
    // Whoever has the default address, now it is taken.
    let first = mesh.edge.edge.open_doors(&at(ProxyDoor::Default), &group).await;
    let second = mesh.edge.edge.open_doors(&at(ProxyDoor::Default), &group).await;
    assert!(first.is_ok() && second.is_ok() && mesh.edge.edge.doors().proxy.is_none());
    assert!(mesh.edge.edge.open_doors(&at(ProxyDoor::Off), &group).await.is_ok());
    mesh.end().await;
}
