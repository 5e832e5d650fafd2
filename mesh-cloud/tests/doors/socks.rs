//! The proxy door, spoken to in SOCKS5.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::{net::UdpSocket, time::timeout};

use crate::mesh::{BLACK_HOLE, Ended, Mesh, PATIENCE, Stage, TOKEN, Talk, echo, udp_echo, until};

/// Says hello and who it is; whether that was taken.
async fn login(mesh: &Mesh, user: &str, token: &str) -> (Talk, bool) {
    let mut talk = mesh.proxy().await;
    talk.say_bytes(&[5, 2, 0, 2]).await;
    assert_eq!(talk.exactly(2).await.as_bytes(), [5, 2]);
    let mut login = vec![1];
    for text in [user, token] {
        login.push(u8::try_from(text.len()).unwrap());
        login.extend_from_slice(text.as_bytes());
    }
    talk.say_bytes(&login).await;
    let answer = talk.exactly(2).await;
    assert_eq!(answer.as_bytes()[0], 1);
    (talk, answer.as_bytes()[1] == 0)
}

fn connect(host: &str, port: u16) -> Vec<u8> {
    let mut request = vec![5, 1, 0, 3, u8::try_from(host.len()).unwrap()];
    request.extend_from_slice(host.as_bytes());
    request.extend_from_slice(&port.to_be_bytes());
    request
}

/// Asks for a target; the number of the reply.
async fn ask(talk: &mut Talk, request: &[u8]) -> u8 {
    talk.say_bytes(request).await;
    let reply = talk.exactly(10).await;
    assert_eq!(reply.as_bytes()[0], 5);
    reply.as_bytes()[1]
}

#[tokio::test]
async fn a_tunnel_by_socks_carries_everything_and_leaves_a_record() {
    let mut mesh = Mesh::start(&[]).await;
    let port = echo().await;
    let (mut talk, known) = login(&mesh, "alice", TOKEN).await;
    assert!(known);
    // What comes right behind the request is for the target.
    let asked = [&connect("shop-1.mesh.test", port)[..], b"EARLY"].concat();
    assert_eq!(ask(&mut talk, &asked).await, 0);
    assert_eq!(talk.exactly(5).await, "EARLY");
    talk.say("later").await;
    assert_eq!(talk.exactly(5).await, "later");
    talk.finish().await;
    assert_eq!(talk.rest().await, (String::new(), Ended::Cleanly));
    let record = mesh.record().await;
    assert_eq!((record.who.as_str(), &*record.outcome, record.up, record.down), ("user/alice", "finished", 10, 10));
}

#[tokio::test]
async fn a_conversation_may_come_byte_by_byte() {
    let mesh = Mesh::start(&[]).await;
    let port = echo().await;
    let mut talk = mesh.proxy().await;
    let login = [&[5, 1, 2, 1, 5][..], b"alice", &[11], TOKEN.as_bytes()].concat();
    for byte in login.iter().chain(&connect("shop-1", port)) {
        talk.say_bytes(&[*byte]).await;
    }
    assert_eq!(talk.exactly(14).await.as_bytes(), [5, 2, 1, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    talk.say("echo").await;
    assert_eq!(talk.exactly(4).await, "echo");
}

#[tokio::test]
async fn every_refusal_has_its_number() {
    let mesh = Mesh::start(&[]).await;
    let closed = { Stage::new().await.port() };
    let bind = [&[5, 2][..], &connect("shop-1", 53)[2..]].concat();
    let cases = [
        ("alice", TOKEN, connect("shop-1", closed), 5),
        ("alice", TOKEN, connect("shop-2", 22), 3),
        ("alice", TOKEN, connect("shop-9", 22), 4),
        ("alice", TOKEN, connect("x.shop-1.mesh.test", 80), 4),
        ("alice", TOKEN, connect("no_name", 22), 1),
        ("alice", TOKEN, vec![5, 1, 0, 1, 10, 0, 0, 1, 0, 22], 8),
        ("alice", TOKEN, vec![5, 1, 0, 9, 0, 0, 0], 8),
        ("alice", TOKEN, bind, 7),
        ("bob", "bob-token", connect("shop-1", 22), 2),
    ];
    for (user, token, request, number) in cases {
        let (mut talk, known) = login(&mesh, user, token).await;
        assert!(known);
        assert_eq!(ask(&mut talk, &request).await, number, "{request:?}");
        assert_eq!(talk.rest().await, (String::new(), Ended::Cleanly), "{request:?}");
    }
}

#[tokio::test]
async fn nobody_gets_in_without_a_token() {
    let mesh = Mesh::start(&[]).await;
    for (user, token) in [("alice", "wrong"), ("bob", TOKEN), ("", TOKEN)] {
        if user.is_empty() {
            let mut talk = mesh.proxy().await;
            talk.say_bytes(&[5, 1, 2, 1, 0]).await;
            talk.say_bytes(&[1, b'x']).await;
            assert_eq!(talk.exactly(2).await.as_bytes(), [5, 2]);
            assert_eq!(talk.rest().await.0, "");
            continue;
        }
        let (mut talk, known) = login(&mesh, user, token).await;
        assert!(!known, "{user}");
        assert_eq!(talk.rest().await, (String::new(), Ended::Cleanly));
    }
    // Somebody who cannot say who it is.
    let mut talk = mesh.proxy().await;
    talk.say_bytes(&[5, 1, 0]).await;
    let (answer, ended) = talk.rest_bytes().await;
    assert_eq!((answer.as_slice(), ended), (&[5, 0xff][..], Ended::Cleanly));
}

#[tokio::test]
async fn whoever_goes_away_takes_the_dial_along() {
    let mut mesh = Mesh::start(&[]).await;
    let (mut talk, _) = login(&mesh, "alice", TOKEN).await;
    talk.say_bytes(&connect("shop-1", BLACK_HOLE)).await;
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 1).await;
    drop(talk);
    assert_eq!(mesh.record().await.outcome, "cancelled");
    until(|| edge.streams() == 0).await;
}

/// Asks for a way for datagrams; where it begins.
async fn associate(talk: &mut Talk) -> SocketAddr {
    talk.say_bytes(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await;
    let reply = talk.exactly_bytes(10).await;
    assert_eq!(reply[..8], [5, 0, 0, 1, 127, 0, 0, 1]);
    SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from_be_bytes([reply[8], reply[9]])))
}

/// A datagram for a port of an edge.
fn to(host: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0, 0, 0, 3, u8::try_from(host.len()).unwrap()];
    datagram.extend_from_slice(host.as_bytes());
    datagram.extend_from_slice(&port.to_be_bytes());
    datagram.extend_from_slice(payload);
    datagram
}

async fn exchange(client: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    client.send(datagram).await.unwrap();
    let mut buffer = vec![0; 65_536];
    let length = timeout(PATIENCE, client.recv(&mut buffer)).await.expect("an answer in time").unwrap();
    buffer.truncate(length);
    buffer
}

#[tokio::test]
async fn datagrams_go_to_whom_they_name_for_as_long_as_the_connection_lives() {
    let mut mesh = Mesh::start(&[]).await;
    let (one, other) = (udp_echo().await, udp_echo().await);
    let (mut talk, _) = login(&mesh, "alice", TOKEN).await;
    let way = associate(&mut talk).await;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    client.connect(way).await.unwrap();
    for (host, port) in [("shop-1", one), ("shop-1.mesh.test", other), ("shop-1", one)] {
        let datagram = to(host, port, b"hello");
        assert_eq!(exchange(&client, &datagram).await, datagram, "it says from whom it is");
    }
    // Fragments, nonsense and what is not allowed are as good as lost.
    let mut fragment = to("shop-1", one, b"part");
    fragment[2] = 1;
    for lost in [fragment, vec![0; 3], to("shop-9", one, b"nobody"), to("10.0.0.1", one, b"an address")] {
        client.send(&lost).await.unwrap();
    }
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    assert_eq!(edge.streams(), 2, "one flow for each target");
    drop(talk);
    until(|| edge.streams() == 0).await;
    let mut finished = 0;
    for _ in 0..3 {
        let record = mesh.record().await;
        assert_eq!((record.who.as_str(), record.door.as_str()), ("user/alice", "proxy"));
        finished += usize::from(record.outcome == "finished");
    }
    assert_eq!(finished, 2, "and one was for an edge that is not there");
}
