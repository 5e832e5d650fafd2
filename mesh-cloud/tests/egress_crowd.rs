//! Ten thousand dials that nobody answers. Alone in its process, whose descriptors and tasks it counts.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run beside each other and stop where it is wrong"
)]

#[allow(dead_code, reason = "what the other tests of the doors need of it")]
#[path = "doors/mesh.rs"]
mod mesh;

use std::{path::PathBuf, sync::Arc};

use mesh::{BLACK_HOLE, Mesh, rule, until};
use mesh_cloud::config::EgressConfig;
use proto::api::WatchEvent;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinSet,
    time::Instant,
};

/// All of them, and how many at once: the edge of these tests lets 1,024 streams in.
const DIALS: usize = 10_000;
const AT_ONCE: usize = 800;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn into_the_void(path: Arc<PathBuf>, leave: bool) -> String {
    let mut socket = UnixStream::connect(&*path).await.unwrap();
    let head = format!("CONNECT shop-1:{BLACK_HOLE} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    if leave {
        return "left".into();
    }
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn ten_thousand_dials_to_black_holes_are_all_answered_and_leave_nothing_behind() {
    runtime::shutdown::raise_descriptor_limit();
    let path = Arc::new(std::env::temp_dir().join(format!("cw-crowd-{}.sock", std::process::id())));
    let egress = EgressConfig { socket: Some(path.to_path_buf()), within_secs: 0.5, ..EgressConfig::default() };
    let mut mesh = Mesh::start_with_config(&[], |config| config.doors.egress = egress).await;
    let policy = Some(vec![rule("kubernetes", "apiserver", "edge/*")]);
    let next = mesh.state.borrow().after(WatchEvent { revision: 2, policy, ..WatchEvent::default() });
    mesh.state.send_replace(Arc::new(next));
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    let before = (descriptors(), tokio::runtime::Handle::current().metrics().num_alive_tasks());

    let begun = Instant::now();
    let (mut dials, mut started, mut answered, mut left) = (JoinSet::new(), 0, 0, 0);
    while answered + left < DIALS {
        while started < DIALS && dials.len() < AT_ONCE {
            // Every fifth client does not wait for its answer.
            dials.spawn(into_the_void(Arc::clone(&path), started % 5 == 0));
            started += 1;
        }
        match dials.join_next().await.unwrap().unwrap().as_str() {
            "left" => left += 1,
            answer => {
                assert!(answer.starts_with("HTTP/1.1 504 mesh-timeout edge/shop-1 did not answer in time"), "{answer}");
                answered += 1;
            }
        }
        while mesh.records.try_recv().is_ok() {}
    }
    eprintln!("{answered} answered, {left} left, in {:?}", begun.elapsed());

    let inside = mesh.shard.router.metrics().door_connections.with_label_values(&["egress"]);
    until(|| inside.get() == 0).await;
    until(|| edge.streams() == 0).await;
    let open = mesh.shard.router.metrics().streams.with_label_values(&["egress"]);
    until(|| open.get() == 0).await;
    until(|| descriptors() <= before.0).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    until(|| tasks() <= before.1).await;
    let _ = std::fs::remove_file(&*path);
}
