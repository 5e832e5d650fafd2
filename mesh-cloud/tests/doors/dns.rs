//! The DNS door, over UDP and TCP.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use mesh_cloud::config::DnsConfig;
use proto::{api::WatchEvent, message::Candidate};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::mesh::{Mesh, PATIENCE};

/// A mesh whose shard is at two addresses.
async fn mesh(answers_per_sec: f64) -> Mesh {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let dns = DnsConfig { listen, ttl_secs: 5, answers_per_sec };
    let mesh = Mesh::start_with_config(&[], |config| config.doors.dns = Some(dns)).await;
    mesh.state.send_modify(|state| {
        let addresses = vec!["192.0.2.1:7400".into(), "[2001:db8::1]:7400".into()];
        let shards = Some(vec![Candidate { shard: "s1".parse().unwrap(), addresses }]);
        let event = WatchEvent { revision: state.revision + 1, shards, ..WatchEvent::default() };
        *state = Arc::new(state.after(event));
    });
    mesh
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut asked = Message::new(1, MessageType::Query, OpCode::Query);
    asked.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    asked.set_edns(Edns::new());
    asked.to_vec().unwrap()
}

async fn client(mesh: &Mesh) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    socket.connect(mesh.shard.dns.unwrap()).await.unwrap();
    socket
}

async fn ask(client: &UdpSocket, question: &[u8]) -> Message {
    client.send(question).await.unwrap();
    let mut answer = vec![0; 4096];
    let length = timeout(PATIENCE, client.recv(&mut answer)).await.expect("an answer in time").unwrap();
    Message::from_vec(&answer[..length]).unwrap()
}

fn records(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn edges_lead_to_the_shard_that_has_them_by_udp_and_by_tcp() {
    let mesh = mesh(1000.0).await;
    let client = client(&mesh).await;
    let told: BTreeMap<&str, _> = [
        ("shop-1.mesh.test.", RecordType::A),
        ("SHOP-1.mesh.test", RecordType::AAAA),
        ("web.shop-1.mesh.test.", RecordType::A),
        ("shop-9.mesh.test.", RecordType::A),
        ("example.org.", RecordType::A),
    ]
    .into_iter()
    .collect();
    let mut by_tcp = TcpStream::connect(mesh.shard.dns.unwrap()).await.unwrap();
    for (name, kind) in told {
        let answer = ask(&client, &question(name, kind)).await;
        let expected = match (name, kind) {
            ("shop-9.mesh.test.", _) => (ResponseCode::NXDomain, vec![]),
            ("example.org.", _) => (ResponseCode::Refused, vec![]),
            (_, RecordType::A) => (ResponseCode::NoError, vec!["192.0.2.1".to_owned()]),
            _ => (ResponseCode::NoError, vec!["2001:db8::1".to_owned()]),
        };
        assert_eq!((answer.metadata.response_code, records(&answer)), expected, "{name}");
        let asked = question(name, kind);
        by_tcp.write_u16(u16::try_from(asked.len()).unwrap()).await.unwrap();
        by_tcp.write_all(&asked).await.unwrap();
        let length = by_tcp.read_u16().await.unwrap();
        let mut same = vec![0; length.into()];
        by_tcp.read_exact(&mut same).await.unwrap();
        assert_eq!(Message::from_vec(&same).unwrap(), answer);
    }
}

#[tokio::test]
async fn whoever_asks_too_often_is_sent_to_tcp() {
    let mesh = mesh(1.0).await;
    let client = client(&mesh).await;
    let asked = question("shop-1.mesh.test.", RecordType::A);
    for _ in 0..2 {
        assert!(!ask(&client, &asked).await.metadata.truncation);
    }
    let limited = ask(&client, &asked).await;
    assert!(limited.metadata.truncation && limited.answers.is_empty());
    assert_eq!(mesh.shard.router.metrics().dns.with_label_values(&["limited"]).get(), 1);
}

#[tokio::test]
async fn a_shard_that_has_heard_nothing_says_so() {
    let mesh = mesh(1000.0).await;
    mesh.state.send_modify(|state| *state = Arc::default());
    let answer = ask(&client(&mesh).await, &question("shop-1.mesh.test.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(mesh.tasks.drained(PATIENCE).await, 0);
}
