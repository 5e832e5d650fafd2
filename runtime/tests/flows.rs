//! UDP flows: the same over every carrier, and between peers of which one has no datagrams.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run beside each other and stop where it is wrong"
)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use proto::{ALPN_MESH, code::ResetCode, identity::Role};
use runtime::{
    flow::{
        Finished, PacketSink, PacketSource, Side, Tally, Terms,
        port::UdpPort,
        relay, socket,
        stream::{StreamSink, StreamSource, side},
    },
    link::{
        Link,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
        tcp::{TcpDialer, TcpDoor},
    },
    shutdown::Tasks,
    splice::Meter,
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use tokio::{net::UdpSocket, time::timeout};
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(30);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// From nothing to what UDP over IPv4 takes at most.
const SIZES: [usize; 7] = [0, 1, 512, 1_100, 1_400, 9_000, 65_507];

type LinkSide = Side<StreamSource, StreamSink>;

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
}

/// How two peers are linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Quic,
    /// The dialer has no datagrams, as the version before this one.
    QuicToOlder,
    Tcp,
}

const WAYS: [Way; 3] = [Way::Quic, Way::QuicToOlder, Way::Tcp];

/// Both ends of a link, and what keeps them.
async fn link(way: Way) -> (Link, Link, Listener) {
    let (ca, limits) = (TestCa::new(), LinkLimits::default());
    let shown = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
    let tls = || server_config(&shown, MeshVerifier::of_clients(ca.bundle(), true), &[ALPN_MESH]).unwrap();
    let door = TcpDoor::bind(ANY, tls(), &limits).unwrap();
    let tcp = door.local_addr();
    let listener = Listener::bind(ANY, quic::server_config(tls(), &limits).unwrap(), &limits).unwrap().with_tcp(door);
    let identity = LiveIdentity::new(&ca.issue("edge/e1")).unwrap();
    let verifier = Arc::new(MeshVerifier::of_servers(ca.bundle(), Role::Shard));
    let client = client_config(Some(&identity), verifier, &[ALPN_MESH]).unwrap();
    let older = LinkLimits { datagrams: 0, ..limits };
    let limits = if way == Way::QuicToOlder { older } else { limits };
    let dial = async {
        match way {
            Way::Quic | Way::QuicToOlder => {
                let dialer = Dialer::new(quic::client_config(client, &limits).unwrap(), &limits);
                dialer.dial(listener.local_addr().unwrap(), "s1").await.unwrap()
            }
            Way::Tcp => TcpDialer::new(client, &limits).dial(tcp, "s1").await.unwrap(),
        }
    };
    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let (near, far) = soon("a link", async { tokio::join!(dial, accept) }).await;
    assert_eq!((near.has_datagrams(), far.has_datagrams()), (way == Way::Quic, way == Way::Quic));
    (near, far, listener)
}

/// Both ends of a flow.
async fn flow(near: &Link, far: &Link) -> (LinkSide, LinkSide) {
    let mut here = side(near.open().await.unwrap());
    here.sink.put(Bytes::from_static(b"first"));
    let there = async {
        let mut there = side(far.accept().await.unwrap());
        assert_eq!(there.source.next().await.unwrap().unwrap(), b"first"[..], "it goes behind the Open");
        there
    };
    let mut there = soon("a flow", flushed(&mut here, there)).await;
    here.sink.opened();
    there.sink.opened();
    (here, there)
}

/// Works while one end writes what it has kept.
async fn flushed<T>(end: &mut LinkSide, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            flushed = end.sink.flush() => flushed.unwrap(),
        }
    }
}

fn payload(size: usize) -> Bytes {
    (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect::<Vec<_>>().into()
}

#[tokio::test]
async fn datagrams_of_every_size_arrive_whole_both_ways() {
    for way in WAYS {
        let (near, far, _listener) = link(way).await;
        let (mut here, mut there) = flow(&near, &far).await;
        for size in SIZES {
            here.sink.put(payload(size));
            let came = soon("a datagram", flushed(&mut here, there.source.next())).await.unwrap().unwrap();
            assert_eq!(came, payload(size), "{way:?}, {size} bytes there");
            there.sink.put(came);
            let back = soon("a datagram", flushed(&mut there, here.source.next())).await.unwrap().unwrap();
            assert_eq!(back, payload(size), "{way:?}, {size} bytes back");
        }
        assert_eq!((here.sink.dropped(), there.sink.dropped()), (0, 0));
        here.sink.finish().await;
        assert_eq!(soon("the end", there.source.next()).await, Ok(None), "{way:?}");
    }
}

#[tokio::test]
async fn flows_of_one_link_are_kept_apart_and_leave_nothing() {
    let (near, far, _listener) = link(Way::Quic).await;
    let mut flows = Vec::new();
    for _ in 0..20 {
        flows.push(flow(&near, &far).await);
    }
    for (i, (here, _)) in flows.iter_mut().enumerate() {
        here.sink.put(Bytes::from(format!("for {i}")));
    }
    for (i, (_, there)) in flows.iter_mut().enumerate().rev() {
        let came = soon("a datagram", there.source.next()).await.unwrap().unwrap();
        assert_eq!(came, format!("for {i}"));
    }
    drop(flows);
    // What comes for a flow that is over is for nobody, and the next one does not get it.
    let (mut here, mut there) = flow(&near, &far).await;
    here.sink.put(Bytes::from_static(b"fresh"));
    assert_eq!(soon("a datagram", there.source.next()).await.unwrap().unwrap(), b"fresh"[..]);
}

#[tokio::test]
async fn a_flow_that_breaks_is_seen_to_break() {
    for way in WAYS {
        let (near, far, _listener) = link(way).await;
        let (mut here, mut there) = flow(&near, &far).await;
        here.sink.abort(ResetCode::Revoked);
        assert_eq!(soon("a reset", there.source.next()).await.unwrap_err().code, ResetCode::Revoked, "{way:?}");
        let (_here, mut there) = flow(&near, &far).await;
        near.close(proto::code::CloseCode::Shutdown, "");
        assert_eq!(soon("the end", there.source.next()).await.unwrap_err().code, ResetCode::LinkLost, "{way:?}");
    }
}

#[tokio::test]
async fn what_is_no_datagram_breaks_the_flow() {
    let (near, far, _listener) = link(Way::Tcp).await;
    let mut stream = near.open().await.unwrap();
    stream.send.write_one(Bytes::from_static(b"\xff\xffxx")).await.unwrap();
    let mut there = side(soon("a stream", far.accept()).await.unwrap());
    assert_eq!(soon("an error", there.source.next()).await.unwrap_err().code, ResetCode::ProtocolError);
}

/// A UDP server that sends back what it gets.
async fn echo(tasks: &Tasks) -> SocketAddr {
    let socket = UdpSocket::bind(ANY).await.unwrap();
    let address = socket.local_addr().unwrap();
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    }));
    address
}

/// A port that leads over a link to a target, as a door and an edge make it. Returns where it is.
fn way_through(near: Link, far: Link, target: SocketAddr, idle: Duration, tasks: &Tasks) -> SocketAddr {
    let port = UdpPort::bind(ANY).unwrap();
    let address = port.local_addr().unwrap();
    let carry = move |visitor: runtime::flow::port::Visitor| {
        let near = near.clone();
        async move {
            // As an Open and its answer: before that, the other side knows nothing of the flow.
            let mut stream = near.open().await.unwrap();
            stream.send.write_one(Bytes::from_static(b"?")).await.unwrap();
            stream.recv.chunk(1).await.unwrap();
            let mut edge = side(stream);
            edge.sink.opened();
            let (meter, cancel) = (Meter::default(), CancellationToken::new());
            let terms = Terms { meter: &meter, idle: None, cancel: &cancel };
            let _ = relay(&mut visitor.side(), &mut edge, &terms).await;
        }
    };
    tasks.spawn(port.run(tasks.clone(), tasks.clone(), 2, carry));
    let serving = tasks.clone();
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        while let Ok(mut stream) = far.accept().await {
            serving.spawn(async move {
                stream.recv.chunk(1).await.unwrap();
                stream.send.write_one(Bytes::from_static(b"!")).await.unwrap();
                let (mut shard, mut target) = (side(stream), socket::side(socket::connect(target).await.unwrap()));
                shard.sink.opened();
                let (meter, cancel) = (Meter::default(), CancellationToken::new());
                let terms = Terms { meter: &meter, idle: Some(idle), cancel: &cancel };
                relay(&mut shard, &mut target, &terms).await
            });
        }
    }));
    address
}

async fn ask(client: &UdpSocket, text: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; 65_536];
    client.send(text).await.unwrap();
    let length = soon("an answer", client.recv(&mut buffer)).await.unwrap();
    buffer.truncate(length);
    buffer
}

#[tokio::test]
async fn a_port_has_a_flow_for_each_who_talks_to_it_until_they_are_silent() {
    for way in WAYS {
        let tasks = Tasks::new();
        let target = echo(&tasks).await;
        let (near, far, _listener) = link(way).await;
        let before = tasks.running();
        let door = way_through(near, far, target, Duration::from_millis(300), &tasks);
        let mut clients = Vec::new();
        // The port has room for two flows: the first of three makes room for the third, and comes again.
        for i in 0..4 {
            let client = UdpSocket::bind(ANY).await.unwrap();
            client.connect(door).await.unwrap();
            assert_eq!(ask(&client, format!("client {i}").as_bytes()).await, format!("client {i}").as_bytes());
            clients.push(client);
        }
        assert_eq!(ask(&clients[0], &[7; 8000]).await, [7; 8000]);
        // Two tasks are the port and those who accept; flows have none after their silence.
        soon("flows end by silence", async {
            while tasks.running() > before + 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(ask(&clients[1], b"again").await, b"again", "{way:?}");
        assert_eq!(tasks.drained(LONG).await, 0, "{way:?}");
    }
}

#[tokio::test]
async fn a_target_where_nobody_listens_breaks_the_flow() {
    let nobody = std::net::UdpSocket::bind(ANY).unwrap().local_addr().unwrap();
    let (near, far, _listener) = link(Way::Quic).await;
    let (mut here, mut there) = flow(&near, &far).await;
    let relaying = tokio::spawn(async move {
        let mut target = socket::side(socket::connect(nobody).await.unwrap());
        let (meter, cancel) = (Meter::default(), CancellationToken::new());
        relay(&mut there, &mut target, &Terms { meter: &meter, idle: None, cancel: &cancel }).await
    });
    here.sink.put(Bytes::from_static(b"anybody?"));
    let broken = soon("a reset", here.source.next()).await.unwrap_err();
    assert_eq!(broken.code, ResetCode::PeerReset, "{broken}");
    let (result, tally) = relaying.await.unwrap();
    assert!(result.unwrap_err().detail.contains("nothing listens"));
    assert_eq!(tally, Tally { up: 1, down: 0, dropped: 0 });
}

#[tokio::test]
async fn a_flood_of_datagrams_does_not_starve_a_stream() {
    for way in [Way::Quic, Way::Tcp] {
        let (near, far, _listener) = link(way).await;
        let (mut here, mut there) = flow(&near, &far).await;
        let mut stream = near.open().await.unwrap();
        stream.send.write_one(Bytes::from_static(b"!")).await.unwrap();
        let mut beside = soon("a stream", far.accept()).await.unwrap();
        let flood = async {
            loop {
                for _ in 0..100 {
                    here.sink.put(payload(1_000));
                }
                let _ = timeout(Duration::ZERO, here.sink.flush()).await;
                tokio::task::yield_now().await;
            }
        };
        let sink = async { while let Ok(Some(_)) = there.source.next().await {} };
        let bytes = async {
            let block = Bytes::from(vec![1; 64 * 1024]);
            let writing = async {
                for _ in 0..32 {
                    stream.send.write_one(block.clone()).await.unwrap();
                }
            };
            let reading = async {
                let mut read = 0;
                while read < 32 * 64 * 1024 {
                    read += beside.recv.chunk(usize::MAX).await.unwrap().unwrap().len();
                }
            };
            tokio::join!(writing, reading)
        };
        tokio::select! {
            biased;
            _ = soon("2 MiB beside a flood", bytes) => {}
            () = flood => {}
            () = sink => panic!("the flow ended"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn silence_ends_a_flow_and_traffic_does_not() {
    /// Says something now and then, and then nothing.
    struct Ticks(u32);
    impl PacketSource for Ticks {
        async fn next(&mut self) -> Result<Option<Bytes>, runtime::splice::Broken> {
            if self.0 == 0 {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_secs(50)).await;
            self.0 -= 1;
            Ok(Some(Bytes::from_static(b"tick")))
        }
        fn stop(&mut self, _: ResetCode) {}
        fn dropped(&self) -> u64 {
            0
        }
    }
    struct Nowhere;
    impl PacketSink for Nowhere {
        fn put(&mut self, _: Bytes) {}
        async fn flush(&mut self) -> Result<(), runtime::splice::Broken> {
            std::future::pending().await
        }
        async fn finish(&mut self) {}
        fn abort(&mut self, _: ResetCode) {}
        fn dropped(&self) -> u64 {
            0
        }
    }
    let (meter, cancel, begun) = (Meter::default(), CancellationToken::new(), tokio::time::Instant::now());
    let terms = Terms { meter: &meter, idle: Some(Duration::from_secs(60)), cancel: &cancel };
    let (mut a, mut b) = (Side { source: Ticks(10), sink: Nowhere }, Side { source: Ticks(0), sink: Nowhere });
    let (result, tally) = relay(&mut a, &mut b, &terms).await;
    assert_eq!((result, tally), (Ok(Finished::Idle), Tally { up: 10, down: 0, dropped: 0 }));
    assert_eq!((begun.elapsed(), meter.up()), (Duration::from_secs(560), 40));
}
