//! The TCP door.

use std::net::{Ipv4Addr, SocketAddr};

use mesh_cloud::config::TcpDoorConfig;
use proto::api::WatchEvent;
use std::sync::Arc;

use crate::mesh::{Ended, Mesh, Stage, Talk, rule};

/// A mesh with a door to `port` of the edge.
async fn mesh(port: u16, proxy_protocol: bool) -> Mesh {
    let door = TcpDoorConfig {
        name: "till".into(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        target: format!("shop-1:{port}").parse().unwrap(),
        proxy_protocol,
    };
    let mesh = Mesh::start_with_config(&[], |config| config.doors.tcp.push(door)).await;
    let policy = Some(vec![rule("till", "door/till", "edge/shop-1")]);
    mesh.state.send_modify(|state| {
        let event = WatchEvent { revision: state.revision + 1, policy, ..WatchEvent::default() };
        *state = Arc::new(state.after(event));
    });
    mesh
}

#[tokio::test]
async fn a_target_that_asks_for_it_is_told_first_from_where_a_visitor_comes() {
    for proxy_protocol in [false, true] {
        let stage = Stage::new().await;
        let mesh = mesh(stage.port(), proxy_protocol).await;
        let door = mesh.shard.tcp[0].1;
        let mut visitor = Talk::with(door).await;
        visitor.say("hello").await;
        let mut server = stage.enter().await;
        if proxy_protocol {
            let head = server.exactly_bytes(28).await;
            assert_eq!(&head[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
            let ports = [visitor.socket.local_addr().unwrap().port(), door.port()].map(u16::to_be_bytes).concat();
            assert_eq!(&head[16..], [&[127, 0, 0, 1, 127, 0, 0, 1][..], &ports].concat());
        }
        assert_eq!(server.exactly(5).await, "hello");
        server.say("and a good day").await;
        drop(server);
        assert_eq!(visitor.rest().await, ("and a good day".into(), Ended::Cleanly));
    }
}

#[tokio::test]
async fn a_visitor_to_nobody_is_reset() {
    let closed = { Stage::new().await.port() };
    let mesh = mesh(closed, false).await;
    let mut visitor = Talk::with(mesh.shard.tcp[0].1).await;
    assert_eq!(visitor.rest().await.1, Ended::ByReset);
}
