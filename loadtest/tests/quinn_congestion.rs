//! Congestion control with quinn itself, on the simulated network: what our model, quinn's CUBIC and quinn's BBR make of
//! the same link. tokio's timers have a resolution of a millisecond, so packets arrive in heaps of one, as they do from a
//! busy host.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test stops where something is wrong; it prints figures; its tasks end with it"
)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use loadtest::simnet::{Entry, Fate, Net, Path};
use parking_lot::Mutex;
use proto::{ALPN_MESH, identity::Role};
use quinn::{TransportConfig, congestion::BbrConfig};
use runtime::{
    link::{
        Link, Stream,
        congestion::Congestion,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
    },
    shutdown::Tasks,
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use tokio::time::{Instant, sleep};

const CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 1000);
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), 2000);

/// A link of so many Mbit/s each way, with this round trip and a queue of so many bandwidth-delay products.
fn link(mbit: f64, rtt_ms: u64, queue: f64) -> Path {
    let rtt = Duration::from_millis(rtt_ms);
    Path {
        latency: rtt / 2,
        jitter: Duration::ZERO,
        loss: 0.0,
        rate: Some((mbit * 1e6 / 8.0) as u64),
        queue: rtt.mul_f64(queue),
    }
}

/// Whose congestion control.
#[derive(Clone, Copy, Debug)]
enum Who {
    Ours,
    Cubic,
    QuinnBbr,
}

fn limits(congestion: Congestion) -> LinkLimits {
    // Wide enough that flow control decides nothing.
    let (stream_window, link_window, send_window) = (16 << 20, 64 << 20, 32 << 20);
    LinkLimits { congestion, stream_window, link_window, send_window, streams: 1000, ..LinkLimits::default() }
}

async fn links(net: &Net, who: Who) -> (Link, Link) {
    let ca = TestCa::new();
    let congestion = if matches!(who, Who::Ours) { Congestion::Model } else { Congestion::Cubic };
    let limits = limits(congestion);
    let shown = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
    let tls = server_config(&shown, MeshVerifier::of_clients(ca.bundle(), true), &[ALPN_MESH]).unwrap();
    let server = net.endpoint(SERVER, Some(quic::server_config(tls, &limits).unwrap())).unwrap();
    let listener = Listener::from_endpoint(server, &limits);
    let identity = LiveIdentity::new(&ca.issue("edge/e1")).unwrap();
    let verifier = Arc::new(MeshVerifier::of_servers(ca.bundle(), Role::Shard));
    let tls = client_config(Some(&identity), verifier, &[ALPN_MESH]).unwrap();
    let mut config = quic::client_config(tls, &limits).unwrap();
    if matches!(who, Who::QuinnBbr) {
        let mut transport = TransportConfig::default();
        transport.send_window(limits.send_window).congestion_controller_factory(Arc::new(BbrConfig::default()));
        config.transport_config(Arc::new(transport));
    }
    let dialer = Dialer::from_endpoint(net.endpoint(CLIENT, None).unwrap(), config, &limits);
    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let (near, far) = tokio::join!(dialer.dial(SERVER, "s1"), accept);
    (near.unwrap(), far)
}

/// Figures of a run.
#[derive(Debug)]
struct Figures {
    /// Mbit/s of payload over the whole run.
    mbit: f64,
    /// Share of what was sent that found no room in the queue.
    dropped: f64,
    /// Milliseconds of queue that packets met: median, 99th percentile.
    queue: [f64; 2],
    /// Milliseconds of small requests beside the bulk: median, 99th percentile.
    requests: [f64; 2],
}

fn part(values: &mut [u64], part: f64) -> f64 {
    values.sort_unstable();
    values.get((values.len() as f64 * part) as usize).or_else(|| values.last()).map_or(0.0, |v| *v as f64 / 1e6)
}

async fn serve(far: Link, received: Arc<Mutex<u64>>) {
    while let Ok(mut stream) = far.accept().await {
        let received = Arc::clone(&received);
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = stream.recv.chunk(1 << 20).await {
                *received.lock() += chunk.len() as u64;
                if chunk.len() == 1 && chunk[0] == b'?' {
                    stream.send.write_one(chunk).await.unwrap();
                    stream.send.finish();
                }
            }
        });
    }
}

/// Asks something small, over and over, from when the bulk has begun.
async fn ask(near: Link, times: Arc<Mutex<Vec<u64>>>) {
    sleep(Duration::from_secs(1)).await;
    loop {
        let (near, times) = (near.clone(), Arc::clone(&times));
        tokio::spawn(async move {
            let began = Instant::now();
            let Stream { mut send, mut recv } = near.open().await.unwrap();
            send.write_one(Bytes::from_static(b"?")).await.unwrap();
            send.finish();
            if let Ok(Some(_)) = recv.chunk(64).await {
                times.lock().push(began.elapsed().as_nanos() as u64);
            }
        });
        sleep(Duration::from_millis(50)).await;
    }
}

async fn bulk(who: Who, path: Path, seconds: u64) -> Figures {
    let network = Tasks::new();
    let net = Net::new(1, path, &network);
    let (near, far) = links(&net, who).await;
    let (received, times) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(Vec::new())));
    let tasks = [tokio::spawn(serve(far, Arc::clone(&received))), tokio::spawn(ask(near.clone(), Arc::clone(&times)))];
    let mut stream = near.open().await.unwrap();
    let began = Instant::now();
    let block = Bytes::from(vec![0x55; 64 * 1024]);
    let sending = async { while stream.send.write_one(block.clone()).await.is_ok() {} };
    let _ = tokio::time::timeout(Duration::from_secs(seconds), sending).await;
    assert_eq!(near.path_model().is_some(), matches!(who, Who::Ours));
    let mbit = *received.lock() as f64 * 8e-6 / began.elapsed().as_secs_f64();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    network.stop();
    let log = net.log();
    let sent = || {
        log.entries().iter().filter_map(|entry| match entry {
            Entry::Datagram { from, size, fate, .. } if *from == CLIENT => Some((*size, *fate)),
            Entry::Datagram { .. } | Entry::Message { .. } | Entry::Note { .. } => None,
        })
    };
    let share = |count: usize| count as f64 / sent().count() as f64;
    let dropped = share(sent().filter(|(_, fate)| *fate == Fate::Queued).count());
    let waited = |(size, fate)| match fate {
        Fate::Flies(after) => {
            let own = Duration::from_secs_f64(size as f64 / path.rate? as f64);
            Some(after.saturating_sub(path.latency + own).as_nanos() as u64)
        }
        Fate::Lost | Fate::Cut | Fate::Queued | Fate::Nobody | Fate::Overrun => None,
    };
    let mut delays: Vec<u64> = sent().filter_map(waited).collect();
    let queue = [part(&mut delays, 0.5), part(&mut delays, 0.99)];
    let mut times = times.lock();
    Figures { mbit, dropped, queue, requests: [part(&mut times, 0.5), part(&mut times, 0.99)] }
}

impl Figures {
    fn row(&self, name: &str) -> String {
        format!(
            "| {name} | {:.1} | {:.2} | {:.0} / {:.0} | {:.0} / {:.0} |",
            self.mbit,
            self.dropped * 100.0,
            self.queue[0],
            self.queue[1],
            self.requests[0],
            self.requests[1]
        )
    }
}

#[tokio::test(start_paused = true)]
async fn one_per_cent_of_loss_does_not_slow_quinn_down_with_our_model() {
    let path = Path { loss: 0.01, ..link(50.0, 50, 1.0) };
    let ours = bulk(Who::Ours, path, 8).await;
    println!("{}", ours.row("ours"));
    let cubic = bulk(Who::Cubic, path, 8).await;
    println!("{}", cubic.row("CUBIC"));
    // 50 Mbit/s are 47.5 of payload, and 1 % of it is lost.
    assert!(ours.mbit >= 0.85 * 47.5 && ours.dropped <= 0.02 && ours.requests[0] <= 65.0);
    assert!(ours.mbit >= 4.0 * cubic.mbit);
}

/// The first row of the table; with `CONGESTION=all` in the environment all of it, which takes a minute.
#[tokio::test(start_paused = true)]
async fn table() {
    let rows = if std::env::var_os("CONGESTION").is_some() { usize::MAX } else { 1 };
    let paths = [
        ("0 %", link(100.0, 50, 1.0)),
        ("1 %", Path { loss: 0.01, ..link(100.0, 50, 1.0) }),
        ("3 %", Path { loss: 0.03, ..link(100.0, 50, 1.0) }),
        ("queue 0.2 BDP", link(100.0, 50, 0.2)),
        ("20 Mbit/s, 200 ms, 2 %", Path { loss: 0.02, ..link(20.0, 200, 1.0) }),
        ("500 Mbit/s, 10 ms", link(500.0, 10, 1.0)),
    ];
    for (name, path) in paths.into_iter().take(rows) {
        for who in [Who::Ours, Who::Cubic, Who::QuinnBbr] {
            let report = bulk(who, path, 10).await;
            println!("{}", report.row(&format!("{name} | {who:?}")));
            assert!(report.mbit > 0.0, "{name} | {who:?}: nothing arrived");
        }
    }
}
