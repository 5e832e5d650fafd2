//! The DNS door, asked by datagrams and over connections.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use proto::{
    api::WatchEvent,
    ring::{Member, RingSpec},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::mesh::{Mesh, PATIENCE, until};

/// A mesh with a DNS door, which stands alone in its ring.
async fn mesh() -> Mesh {
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mesh = Mesh::start_with_config(&[], |config| config.doors.dns = Some(local)).await;
    let members =
        vec![Member { shard: "s1".parse().unwrap(), addresses: vec![mesh.shard.mesh.to_string()], weight: 100 }];
    tell(&mesh, WatchEvent { ring: Some(RingSpec { epoch: 1, members }), ..WatchEvent::default() });
    mesh
}

fn tell(mesh: &Mesh, event: WatchEvent) {
    mesh.state.send_modify(|state| {
        let event = WatchEvent { revision: state.revision + 1, ..event };
        *state = Arc::new(state.after(event));
    });
}

fn query(id: u16, name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

async fn client(mesh: &Mesh) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    socket.connect(mesh.shard.dns.unwrap()).await.unwrap();
    socket
}

/// Asks for the address of a name: the code, and what is answered.
async fn by_udp(mesh: &Mesh, name: &str) -> (ResponseCode, Vec<String>) {
    let client = client(mesh).await;
    client.send(&query(7, name, RecordType::A)).await.unwrap();
    let mut buffer = vec![0; 512];
    let length = timeout(PATIENCE, client.recv(&mut buffer)).await.expect("an answer in time").unwrap();
    said(&buffer[..length], 7)
}

fn said(answer: &[u8], id: u16) -> (ResponseCode, Vec<String>) {
    let answer = Message::from_vec(answer).unwrap();
    assert_eq!((answer.id, answer.message_type), (id, MessageType::Response));
    (answer.response_code, answer.answers.iter().map(|r| r.data.to_string()).collect())
}

async fn connected(mesh: &Mesh) -> TcpStream {
    TcpStream::connect(mesh.shard.dns.unwrap()).await.unwrap()
}

async fn read(socket: &mut TcpStream) -> Vec<u8> {
    let mut answer = vec![0; usize::from(timeout(PATIENCE, socket.read_u16()).await.unwrap().unwrap())];
    timeout(PATIENCE, socket.read_exact(&mut answer)).await.unwrap().unwrap();
    answer
}

fn framed(query: &[u8]) -> Vec<u8> {
    [&u16::try_from(query.len()).unwrap().to_be_bytes(), query].concat()
}

fn counted(mesh: &Mesh, over: &str, outcome: &str) -> u64 {
    mesh.shard.router.metrics().dns_queries.with_label_values(&[over, outcome]).get()
}

#[tokio::test]
async fn names_of_enrolled_edges_lead_to_the_shard() {
    let mesh = mesh().await;
    let here = (ResponseCode::NoError, vec!["127.0.0.1".to_owned()]);
    assert_eq!(by_udp(&mesh, "shop-1.mesh.test.").await, here);
    assert_eq!(by_udp(&mesh, "web.shop-1.mesh.test.").await, here);
    assert_eq!(by_udp(&mesh, "shop-7.mesh.test.").await.0, ResponseCode::NXDomain);
    assert_eq!(by_udp(&mesh, "example.org.").await.0, ResponseCode::Refused);
    // What control says counts from then on.
    let edges = BTreeMap::from([("shop-7".parse().unwrap(), None)]);
    tell(&mesh, WatchEvent { edges: Some(edges), ..WatchEvent::default() });
    assert_eq!(by_udp(&mesh, "shop-7.mesh.test.").await, here);
    assert_eq!(by_udp(&mesh, "shop-1.mesh.test.").await.0, ResponseCode::NXDomain);
    let counts = ["answered", "no-name", "refused"].map(|outcome| counted(&mesh, "udp", outcome));
    assert_eq!(counts, [3, 2, 1]);
}

#[tokio::test]
async fn a_connection_asks_many_times_in_pieces_or_at_once() {
    let mesh = mesh().await;
    let mut socket = connected(&mesh).await;
    let two = [framed(&query(1, "shop-1.mesh.test.", RecordType::A)), framed(&query(2, "x.mesh.test.", RecordType::A))];
    socket.write_all(&two.concat()).await.unwrap();
    assert_eq!(said(&read(&mut socket).await, 1).1, ["127.0.0.1"]);
    assert_eq!(said(&read(&mut socket).await, 2).0, ResponseCode::NXDomain);
    for byte in framed(&query(3, "shop-1.mesh.test.", RecordType::A)) {
        socket.write_all(&[byte]).await.unwrap();
        socket.flush().await.unwrap();
    }
    assert_eq!(said(&read(&mut socket).await, 3).1, ["127.0.0.1"]);
    assert_eq!((counted(&mesh, "tcp", "answered"), counted(&mesh, "tcp", "no-name")), (2, 1));
    // Nonsense ends the connection and nothing else.
    for nonsense in [&b"\xff\xffGET / HTTP/1.1"[..], b"\0\x05short", b"\0\0"] {
        let mut socket = connected(&mesh).await;
        socket.write_all(nonsense).await.unwrap();
        let end = timeout(PATIENCE, socket.read_u8()).await.expect("an end in time");
        assert!(end.is_err(), "{nonsense:?}");
    }
    socket.write_all(&framed(&query(4, "shop-1.mesh.test.", RecordType::A))).await.unwrap();
    assert_eq!(said(&read(&mut socket).await, 4).1, ["127.0.0.1"]);
}

#[tokio::test]
async fn a_flood_is_not_answered_and_connections_still_are() {
    let mesh = mesh().await;
    let client = client(&mesh).await;
    for id in 0..400 {
        client.send(&query(id, "shop-1.mesh.test.", RecordType::A)).await.unwrap();
    }
    until(|| counted(&mesh, "udp", "dropped") > 0).await;
    let mut socket = connected(&mesh).await;
    socket.write_all(&framed(&query(1, "shop-1.mesh.test.", RecordType::A))).await.unwrap();
    assert_eq!(said(&read(&mut socket).await, 1).1, ["127.0.0.1"]);
    // One network has its share of connections and no more.
    let mut all = Vec::new();
    for _ in 0..40 {
        all.push(connected(&mesh).await);
    }
    let refused = &mesh.shard.router.metrics().door_refusals;
    until(|| refused.with_label_values(&["dns", "source-limit"]).get() == 9).await;
}

#[tokio::test]
async fn a_drain_shuts_the_door() {
    let mesh = mesh().await;
    let mut socket = connected(&mesh).await;
    socket.write_all(&framed(&query(1, "shop-1.mesh.test.", RecordType::A))).await.unwrap();
    assert_eq!(said(&read(&mut socket).await, 1).1, ["127.0.0.1"]);
    assert_eq!(mesh.tasks.drained(PATIENCE).await, 0);
    assert!(timeout(PATIENCE, socket.read_u8()).await.expect("an end in time").is_err());
    assert!(TcpStream::connect(mesh.shard.dns.unwrap()).await.is_err());
}
