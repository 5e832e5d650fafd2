//! Congestion control with quinn itself, over a simulated bottleneck in memory and on paused time: what our model, quinn's
//! CUBIC and quinn's BBR make of the same link. tokio's timers have a resolution of a millisecond, so packets arrive in
//! heaps of one, as they do from a busy host.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    dead_code,
    reason = "a test stops where something is wrong; it prints figures; its tasks end with it; it shares files"
)]

#[path = "congestion/link.rs"]
mod link;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use link::{Link as Bottleneck, Packet, Path};
use parking_lot::Mutex;
use proto::{ALPN_MESH, identity::Role};
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, TokioRuntime, TransportConfig, UdpPoller,
    congestion::BbrConfig,
    udp::{RecvMeta, Transmit},
};
use runtime::{
    link::{
        Link, Stream,
        congestion::Congestion,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
    },
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 1000);
const SERVER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), 2000);
/// IP and UDP headers.
const HEADERS: u64 = 28;

/// What is on its way: the bottleneck leads from the client to the server, and back it is only far.
struct World {
    began: Instant,
    bottleneck: Bottleneck,
    /// Datagrams in the bottleneck, by number.
    held: BTreeMap<u64, Vec<u8>>,
    events: BinaryHeap<Reverse<(u64, u64, Option<Flight>)>>,
    count: u64,
    inboxes: BTreeMap<SocketAddr, Inbox>,
    /// Nanoseconds of queue that packets met.
    delays: Vec<u64>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    to: SocketAddr,
    datagram: Vec<u8>,
}

#[derive(Default)]
struct Inbox {
    datagrams: VecDeque<Vec<u8>>,
    reader: Option<Waker>,
}

impl World {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn at(&mut self, at: u64, flight: Option<Flight>) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, flight)));
    }

    fn send(&mut self, to: SocketAddr, datagram: &[u8]) {
        let now = self.now();
        if to == CLIENT {
            let back = now + self.bottleneck.path.rtt / 2;
            return self.at(back, Some(Flight { to, datagram: datagram.to_vec() }));
        }
        self.count += 1;
        let packet = Packet { flow: 0, number: self.count, size: datagram.len() as u64 + HEADERS };
        let (before, queued) = (self.bottleneck.dropped + self.bottleneck.policed, self.bottleneck.queue_delay());
        self.delays.push(queued);
        let departs = self.bottleneck.offer(now, packet);
        if self.bottleneck.dropped + self.bottleneck.policed == before {
            self.held.insert(packet.number, datagram.to_vec());
        }
        if let Some(at) = departs {
            self.at(at, None);
        }
    }

    /// Does what is due, and says when the next is.
    fn turn(&mut self) -> Option<u64> {
        let now = self.now();
        while let Some(Reverse((at, ..))) = self.events.peek() {
            if *at > now {
                return Some(*at);
            }
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            match event {
                Some(flight) => {
                    let inbox = self.inboxes.entry(flight.to).or_default();
                    inbox.datagrams.push_back(flight.datagram);
                    inbox.reader.take().into_iter().for_each(Waker::wake);
                }
                None => {
                    let (arrival, next) = self.bottleneck.depart(at);
                    if let Some((arrives, packet)) = arrival {
                        let datagram = self.held.remove(&packet.number).unwrap_or_default();
                        self.at(arrives, Some(Flight { to: SERVER, datagram }));
                    }
                    if let Some(next) = next {
                        self.at(next, None);
                    }
                }
            }
        }
        None
    }
}

#[derive(Clone)]
struct Net(Arc<Mutex<World>>, Arc<Notify>);

impl Net {
    fn new(path: Path) -> Self {
        let world = World {
            began: Instant::now(),
            bottleneck: Bottleneck::new(path, 1),
            held: BTreeMap::new(),
            events: BinaryHeap::new(),
            count: 0,
            inboxes: BTreeMap::new(),
            delays: Vec::new(),
        };
        Self(Arc::new(Mutex::new(world)), Arc::new(Notify::new()))
    }

    async fn run(self) {
        loop {
            let (next, began) = {
                let mut world = self.0.lock();
                (world.turn(), world.began)
            };
            let due = async {
                match next {
                    Some(at) => sleep_until(began + Duration::from_nanos(at)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.1.notified() => {}
                () = due => {}
            }
        }
    }

    fn endpoint(&self, address: SocketAddr, server: Option<quinn::ServerConfig>) -> Endpoint {
        let socket = Arc::new(Socket { net: self.clone(), address });
        Endpoint::new_with_abstract_socket(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime)).unwrap()
    }
}

struct Socket {
    net: Net,
    address: SocketAddr,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Socket({})", self.address)
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let mut world = self.net.0.lock();
        transmit.contents.chunks(size).for_each(|datagram| world.send(transmit.destination, datagram));
        self.net.1.notify_one();
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut world = self.net.0.lock();
        let addr = if self.address == CLIENT { SERVER } else { CLIENT };
        let inbox = world.inboxes.entry(self.address).or_default();
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some(datagram) = inbox.datagrams.pop_front() else { break };
            buf[..datagram.len()].copy_from_slice(&datagram);
            *meta = RecvMeta { addr, len: datagram.len(), stride: datagram.len(), ecn: None, dst_ip: None };
            count += 1;
        }
        if count == 0 {
            inbox.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn max_transmit_segments(&self) -> usize {
        10
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
    let server = net.endpoint(SERVER, Some(quic::server_config(tls, &limits).unwrap()));
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
    let dialer = Dialer::from_endpoint(net.endpoint(CLIENT, None), config, &limits);
    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let (near, far) = tokio::join!(dialer.dial(SERVER, "s1"), accept);
    (near.unwrap(), far)
}

/// Figures of a run.
#[derive(Debug)]
struct Figures {
    /// Mbit/s of payload over the whole run.
    mbit: f64,
    /// Share of what was sent that found no room in the queue, or that a policer dropped.
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
    let net = Net::new(path);
    let pump = tokio::spawn(net.clone().run());
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
    pump.abort();
    let mut world = net.0.lock();
    let lost = world.bottleneck.dropped + world.bottleneck.policed;
    let dropped = lost as f64 / world.bottleneck.offered as f64;
    let queue = [part(&mut world.delays, 0.5), part(&mut world.delays, 0.99)];
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
    let path = Path::new(50.0, 50, 1.0).lossy(0.01);
    let ours = bulk(Who::Ours, path, 8).await;
    println!("{}", ours.row("ours"));
    let cubic = bulk(Who::Cubic, path, 8).await;
    println!("{}", cubic.row("CUBIC"));
    // 50 Mbit/s on the wire are 46.5 of payload, and 1 % of it is lost.
    assert!(ours.mbit >= 0.85 * 46.5 && ours.dropped <= 0.02 && ours.requests[0] <= 65.0);
    assert!(ours.mbit >= 4.0 * cubic.mbit);
}

/// The first row of the table; with `CONGESTION=all` in the environment all of it, which takes a minute.
#[tokio::test(start_paused = true)]
async fn table() {
    let rows = if std::env::var_os("CONGESTION").is_some() { usize::MAX } else { 1 };
    let paths = [
        ("0 %", Path::new(100.0, 50, 1.0)),
        ("1 %", Path::new(100.0, 50, 1.0).lossy(0.01)),
        ("3 %", Path::new(100.0, 50, 1.0).lossy(0.03)),
        ("queue 0.2 BDP", Path::new(100.0, 50, 0.2)),
        ("20 Mbit/s, 200 ms, 2 %", Path::new(20.0, 200, 1.0).lossy(0.02)),
        ("500 Mbit/s, 10 ms", Path::new(500.0, 10, 1.0)),
        ("policer 20 Mbit/s, 100 kB", Path { policer: Some((20e6, 1e5)), ..Path::new(100.0, 50, 1.0) }),
    ];
    for (name, path) in paths.into_iter().take(rows) {
        for who in [Who::Ours, Who::Cubic, Who::QuinnBbr] {
            let report = bulk(who, path, 10).await;
            println!("{}", report.row(&format!("{name} | {who:?}")));
            assert!(report.mbit > 0.0, "{name} | {who:?}: nothing arrived");
        }
    }
}
