//! Many visitors who want nothing. Alone in its process, whose memory it measures.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run beside each other and stop where it is wrong"
)]

#[allow(dead_code, reason = "what the other tests of the doors need of it")]
#[path = "doors/mesh.rs"]
mod mesh;

use mesh::{Mesh, Talk, until, web};

const IDLE: usize = 2000;

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn two_thousand_silent_visitors_cost_little_and_hinder_nobody() {
    runtime::shutdown::raise_descriptor_limit();
    let mesh = Mesh::start(&[("web", web("web").await)]).await;
    let before = resident_kib();
    let mut crowd = Vec::with_capacity(IDLE);
    for i in 0..IDLE {
        let door = [mesh.shard.http, mesh.shard.https, mesh.shard.proxy][i % 3].unwrap();
        crowd.push(Talk::with(door).await);
    }
    let inside = || {
        let doors = ["http", "https", "proxy"];
        doors.iter().map(|d| mesh.shard.router.metrics().door_connections.with_label_values(&[*d]).get()).sum::<i64>()
    };
    until(|| inside() == i64::try_from(IDLE).unwrap()).await;
    let grown = resident_kib().saturating_sub(before);
    for _ in 0..20 {
        let mut client = mesh.http().await;
        client.say("GET / HTTP/1.1\r\nHost: web.shop-1.mesh.test\r\nConnection: close\r\n\r\n").await;
        assert!(client.rest().await.0.contains("web: GET"));
    }
    eprintln!("{grown} KiB for {IDLE} connections, both ends of which are in this process");
    assert!(grown / IDLE < 6, "{grown} KiB");
    drop(crowd);
    until(|| inside() == 0).await;
}
