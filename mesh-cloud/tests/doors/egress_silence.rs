//! The egress door when the link of an edge is cut without a word, or is only slow: a relay of datagrams stands between.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::UdpSocket,
    time::{Instant, sleep},
};

use crate::{
    egress::{ESTABLISHED, Folder, call, mesh, rest},
    mesh::{BLACK_HOLE, echo},
};

/// Passes datagrams on between one edge and the shard, later than they came, or not at all.
#[derive(Clone, Default)]
struct Way {
    cut: Arc<AtomicBool>,
    delay_ms: Arc<AtomicU64>,
}

impl Way {
    /// Returns where the edge shall go.
    async fn open(&self, shard: SocketAddr) -> SocketAddr {
        let local = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let (near, far) = (Arc::new(local().await.unwrap()), Arc::new(local().await.unwrap()));
        far.connect(shard).await.unwrap();
        let (address, way) = (near.local_addr().unwrap(), self.clone());
        tokio::spawn(async move {
            let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
            let mut edge = None;
            loop {
                tokio::select! {
                    biased;
                    Ok((length, from)) = near.recv_from(&mut up) => {
                        edge = Some(from);
                        way.pass(up[..length].to_vec(), &far, shard);
                    }
                    Ok(length) = far.recv(&mut down) => way.pass(down[..length].to_vec(), &near, edge.unwrap()),
                }
            }
        });
        address
    }

    fn pass(&self, datagram: Vec<u8>, socket: &Arc<UdpSocket>, to: SocketAddr) {
        if self.cut.load(Ordering::Relaxed) {
            return;
        }
        let (delay, socket) = (Duration::from_millis(self.delay_ms.load(Ordering::Relaxed)), Arc::clone(socket));
        tokio::spawn(async move {
            sleep(delay).await;
            // A connected socket takes no address.
            let sent = if socket.peer_addr().is_ok() {
                socket.send(&datagram).await
            } else {
                socket.send_to(&datagram, to).await
            };
            sent.unwrap();
        });
    }
}

/// What the door says, and how long that took.
async fn asked(folder: &Folder, target: &str) -> (String, Duration) {
    let begun = Instant::now();
    let mut socket = call(folder, target).await;
    let answer = rest(&mut socket).await;
    (String::from_utf8(answer).unwrap(), begun.elapsed())
}

#[tokio::test]
async fn an_edge_whose_link_is_cut_is_said_to_be_so_at_once() {
    let folder = Folder::new("cut");
    let mesh = mesh(&folder, 1, |_| ()).await;
    let way = Way::default();
    mesh.second_edge(way.open(mesh.shard.mesh).await).await;
    way.cut.store(true, Ordering::Relaxed);
    // Both that kubectl sends before it says no.
    for limit in [600, 300] {
        let (answer, took) = asked(&folder, "shop-2:10250").await;
        let first = answer.lines().next().unwrap();
        assert!(
            first.starts_with("HTTP/1.1 503 link-lost the link to edge/shop-2 is cut: nothing came back for 0."),
            "{first}"
        );
        assert!(first.contains("last heard") && first.ends_with("network"), "{first}");
        assert!(took < Duration::from_millis(limit), "{took:?}");
    }
    // The other one is not concerned.
    let mut socket = call(&folder, &format!("shop-1:{}", echo().await)).await;
    let mut answer = vec![0; ESTABLISHED.len()];
    tokio::io::AsyncReadExt::read_exact(&mut socket, &mut answer).await.unwrap();
    assert_eq!(answer, ESTABLISHED.as_bytes());
}

#[tokio::test]
async fn an_edge_that_is_only_slow_has_all_its_time() {
    let folder = Folder::new("slow");
    let mesh = mesh(&folder, 1, |egress| egress.within_secs = 3.0).await;
    let way = Way::default();
    mesh.second_edge(way.open(mesh.shard.mesh).await).await;
    // A round trip that was a millisecond is a third of a second from one moment to the next.
    way.delay_ms.store(160, Ordering::Relaxed);
    let mut socket = call(&folder, &format!("shop-2:{}", echo().await)).await;
    let mut answer = vec![0; ESTABLISHED.len()];
    tokio::io::AsyncReadExt::read_exact(&mut socket, &mut answer).await.unwrap();
    assert_eq!(answer, ESTABLISHED.as_bytes());
    // A link that lives, and an edge that does not answer: that takes as long as it takes.
    way.delay_ms.store(0, Ordering::Relaxed);
    let (answer, took) = asked(&folder, &format!("shop-2:{BLACK_HOLE}")).await;
    assert!(answer.starts_with("HTTP/1.1 504 mesh-timeout edge/shop-2 did not answer in time"), "{answer}");
    assert!(took > Duration::from_millis(2900), "{took:?}");
}
