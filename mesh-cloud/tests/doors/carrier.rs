//! Edges whose network lets no UDP through come over TCP, and are edges like all others.

use proto::code::CloseCode;
use runtime::link::Carrier;
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::mesh::{BASIC, Mesh, PATIENCE, echo, edge_over_tcp, until};

fn tunnels(mesh: &Mesh, carrier: Carrier) -> i64 {
    mesh.shard.router.metrics().carriers.with_label_values(&[carrier.slug()]).get()
}

#[tokio::test]
async fn a_tunnel_over_tcp_serves_and_is_drained_like_any_other() {
    let mut mesh = Mesh::start(&[]).await;
    let port = echo().await;
    let link = edge_over_tcp(&mesh, "shop-2", &[]).await;
    until(|| tunnels(&mesh, Carrier::Tcp) == 1 && tunnels(&mesh, Carrier::Quic) == 1).await;
    let mut client = mesh.proxy().await;
    client.say(&format!("CONNECT shop-2:{port} HTTP/1.1\r\n{BASIC}\r\n")).await;
    assert!(client.head().await.starts_with("HTTP/1.1 200"));
    client.say("through TCP").await;
    client.hear("through TCP").await;
    drop(client);
    let record = mesh.record().await;
    assert!(record.target.starts_with("shop-2"), "{record:?}");

    mesh.tasks.stop();
    let end = tokio::time::timeout(PATIENCE, link.ended()).await.unwrap();
    assert!(matches!(end.close_code(), Some(CloseCode::Drained | CloseCode::Shutdown)), "{end}");
    assert_eq!(mesh.tasks.drained(PATIENCE).await, 0);
    assert_eq!(tunnels(&mesh, Carrier::Tcp), 0);
    assert!(TcpStream::connect(mesh.tcp).await.is_err(), "the port is closed");
}

#[tokio::test]
async fn a_tunnel_that_comes_back_by_the_other_carrier_takes_the_place_of_the_first() {
    let mesh = Mesh::start(&[]).await;
    let shop = "shop-1".parse().unwrap();
    let first = mesh.shard.registry.find(&shop).unwrap().generation;
    let _link = edge_over_tcp(&mesh, "shop-1", &[]).await;
    until(|| mesh.shard.registry.find(&shop).is_some_and(|edge| edge.generation > first)).await;
    let present = mesh.shard.registry.find(&shop).unwrap();
    assert_eq!((present.link.carrier(), mesh.shard.registry.len()), (Carrier::Tcp, 1));
}

#[tokio::test]
async fn hundreds_who_only_connect_keep_nobody_out() {
    let mesh = Mesh::start(&[]).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(mesh.tcp).await.unwrap());
    }
    edge_over_tcp(&mesh, "shop-2", &[]).await;
    until(|| tunnels(&mesh, Carrier::Tcp) == 1).await;
    let mut end = [0];
    let ended = silent[0].read(&mut end);
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("the silent are sent away");
    assert!(matches!(ended, Ok(0) | Err(_)));
}
