//! The UDP door, and flows on people's links.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use mesh_cloud::config::UdpDoorConfig;
use proto::api::WatchEvent;
use tokio::{net::UdpSocket, time::timeout};

use crate::mesh::{Mesh, PATIENCE, edge_over_tcp, rule, udp_echo, until};

/// A mesh with a UDP door.
async fn mesh(target: &str, idle_secs: f64, flows: usize) -> Mesh {
    let door = UdpDoorConfig {
        name: "dns".into(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        target: target.parse().unwrap(),
        idle_secs,
        flows,
    };
    let mesh = Mesh::start_with_config(&[], |config| config.doors.udp.push(door)).await;
    allow(&mesh, "edge/shop-*");
    mesh
}

fn allow(mesh: &Mesh, to: &str) {
    let policy = Some(vec![rule("dns", "door/dns", to)]);
    mesh.state.send_modify(|state| {
        let event = WatchEvent { revision: state.revision + 1, policy, ..WatchEvent::default() };
        *state = Arc::new(state.after(event));
    });
}

async fn client(mesh: &Mesh) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    socket.connect(mesh.shard.udp[0].1).await.unwrap();
    socket
}

async fn ask(client: &UdpSocket, payload: &[u8]) -> Vec<u8> {
    client.send(payload).await.unwrap();
    let mut buffer = vec![0; 65_536];
    let length = timeout(PATIENCE, client.recv(&mut buffer)).await.expect("an answer in time").unwrap();
    buffer.truncate(length);
    buffer
}

#[tokio::test]
async fn datagrams_go_there_and_back_until_silence_over_both_carriers() {
    let target = udp_echo().await;
    for edge in ["shop-1", "shop-2"] {
        let mut mesh = mesh(&format!("{edge}:{target}"), 0.3, 16).await;
        if edge == "shop-2" {
            edge_over_tcp(&mesh, edge, &[]).await;
        }
        until(|| mesh.shard.registry.find(&edge.parse().unwrap()).is_some()).await;
        let client = client(&mesh).await;
        let mut carried = 0;
        for size in [0, 5, 1_200, 4_000, 60_000] {
            assert_eq!(ask(&client, &vec![3; size]).await, vec![3; size], "{edge}, {size} bytes");
            carried += size as u64;
        }
        let record = mesh.record().await;
        assert_eq!((&*record.outcome, record.up, record.down), ("finished", carried, carried), "{edge}");
        assert_eq!((record.who.as_str(), record.door.as_str()), ("door/dns", "dns"));
        assert_eq!(record.target, format!("{edge}:{target}/udp"));
        let datagrams = &mesh.shard.router.metrics().datagrams;
        assert_eq!(datagrams.with_label_values(&["up"]).get(), 5);
        assert_eq!(datagrams.with_label_values(&["down"]).get(), 5);
        let held = mesh.shard.registry.find(&edge.parse().unwrap()).unwrap();
        until(|| held.streams() == 0).await;
        assert_eq!(mesh.shard.router.metrics().open_streams(), 0);
    }
}

#[tokio::test]
async fn each_client_has_its_own_flow_and_the_most_silent_makes_room() {
    let target = udp_echo().await;
    let mut mesh = mesh(&format!("shop-1:{target}"), 60.0, 2).await;
    let clients = [client(&mesh).await, client(&mesh).await, client(&mesh).await];
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(ask(client, format!("{i}").as_bytes()).await, format!("{i}").as_bytes());
    }
    let record = mesh.record().await;
    assert_eq!((record.from, &*record.outcome), (clients[0].local_addr().unwrap().to_string(), "finished"));
    assert_eq!(ask(&clients[0], b"again").await, b"again");
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 2).await;
}

#[tokio::test]
async fn what_is_not_allowed_is_as_good_as_lost_and_recorded() {
    let target = udp_echo().await;
    let mut mesh = mesh(&format!("shop-1:{target}"), 60.0, 16).await;
    allow(&mesh, "edge/other");
    let client = client(&mesh).await;
    client.send(b"anybody?").await.unwrap();
    let record = mesh.record().await;
    assert_eq!((&*record.outcome, &*record.code, record.up), ("refused", "policy-denied", 0));
    // More of the same are not more requests.
    for _ in 0..10 {
        client.send(b"anybody?").await.unwrap();
    }
    let mut nothing = [0; 10];
    let answer = timeout(std::time::Duration::from_millis(100), client.recv(&mut nothing));
    assert!(answer.await.is_err());
    assert!(mesh.records.try_recv().is_err());
}

#[tokio::test]
async fn a_drain_ends_flows() {
    let target = udp_echo().await;
    let mesh = mesh(&format!("shop-1:{target}"), 60.0, 16).await;
    let client = client(&mesh).await;
    assert_eq!(ask(&client, b"before").await, b"before");
    assert_eq!(mesh.tasks.drained(PATIENCE).await, 0);
    assert_eq!(mesh.shard.router.metrics().open_streams(), 0);
}
