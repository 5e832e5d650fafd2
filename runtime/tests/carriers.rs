//! The rules of links and streams, which are the same over every carrier.

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
use proto::{
    ALPN_MESH,
    code::{CloseCode, ResetCode},
    identity::Role,
};
use runtime::{
    link::{
        Carrier, EndCause, Link, LinkEnd, RecvHalf, SendHalf, Stream, StreamError,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
        tcp::{TcpDialer, TcpDoor, proxy::Proxy},
    },
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

const LONG: Duration = Duration::from_secs(30);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
}

/// A shard's door for both carriers, and an edge's ways to it.
struct Mesh {
    ca: TestCa,
    listener: Listener,
    tcp: SocketAddr,
    limits: LinkLimits,
}

impl Mesh {
    fn new() -> Self {
        Self::with(LinkLimits::default())
    }

    fn with(limits: LinkLimits) -> Self {
        let ca = TestCa::new();
        let shown = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
        let tls = || server_config(&shown, MeshVerifier::of_clients(ca.bundle(), true), &[ALPN_MESH]).unwrap();
        let door = TcpDoor::bind(ANY, tls(), &limits).unwrap();
        let tcp = door.local_addr();
        let listener = Listener::bind(ANY, quic::server_config(tls(), &limits).unwrap(), &limits).unwrap();
        Self { listener: listener.with_tcp(door), ca, tcp, limits }
    }

    fn tls(&self, ca: &TestCa, alpn: &[u8]) -> rustls::ClientConfig {
        let identity = LiveIdentity::new(&ca.issue("edge/e1")).unwrap();
        let verifier = MeshVerifier::of_servers(self.ca.bundle(), Role::Shard);
        client_config(Some(&identity), Arc::new(verifier), &[alpn]).unwrap()
    }

    async fn dial_as(&self, tls: rustls::ClientConfig, carrier: Carrier) -> Result<Link, LinkEnd> {
        match carrier {
            Carrier::Quic => {
                let dialer = Dialer::new(quic::client_config(tls, &self.limits).unwrap(), &self.limits);
                dialer.dial(self.listener.local_addr().unwrap(), "s1").await
            }
            Carrier::Tcp => TcpDialer::new(tls, &self.limits).dial(self.tcp, "s1").await,
        }
    }

    async fn accept(&self) -> Result<Link, LinkEnd> {
        soon("somebody comes", self.listener.accept()).await.unwrap().accept().await
    }

    /// Both ends of a link.
    async fn link(&self, carrier: Carrier) -> (Link, Link) {
        let dial = self.dial_as(self.tls(&self.ca, ALPN_MESH), carrier);
        let (near, far) = soon("a link", async { tokio::join!(dial, self.accept()) }).await;
        let (near, far) = (near.unwrap(), far.unwrap());
        assert_eq!((near.carrier(), far.carrier()), (carrier, carrier));
        (near, far)
    }
}

/// Both ends of a stream that has carried a byte.
async fn stream(near: &Link, far: &Link) -> (Stream, Stream) {
    let mut here = soon("room for a stream", near.open()).await.unwrap();
    here.send.write_one(Bytes::from_static(b"!")).await.unwrap();
    let mut there = soon("a stream", far.accept()).await.unwrap();
    assert_eq!(read(&mut there.recv, 1).await, b"!");
    (here, there)
}

async fn read(recv: &mut RecvHalf, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        all.extend(soon("bytes", recv.chunk(length - all.len())).await.unwrap().expect("more bytes"));
    }
    all
}

/// Everything up to the end, whatever that is.
async fn rest(recv: &mut RecvHalf) -> (usize, Result<(), StreamError>) {
    let mut length = 0;
    loop {
        match soon("an end", recv.chunk(usize::MAX)).await {
            Ok(Some(bytes)) => length += bytes.len(),
            Ok(None) => return (length, Ok(())),
            Err(error) => return (length, Err(error)),
        }
    }
}

async fn write(send: &mut SendHalf, bytes: usize) -> Result<(), StreamError> {
    let block = Bytes::from(vec![7; 32 * 1024]);
    let mut left = bytes;
    while left > 0 {
        let part = block.slice(..left.min(block.len()));
        left -= part.len();
        send.write_one(part).await?;
    }
    Ok(())
}

const fn reset(code: ResetCode) -> StreamError {
    StreamError::Reset(code)
}

/// Runs a story over each carrier.
macro_rules! over_each_carrier {
    ($($name:ident)*) => {
        mod quic_carrier {
            $(#[tokio::test] async fn $name() { super::$name(super::Carrier::Quic).await; })*
        }
        mod tcp_carrier {
            $(#[tokio::test] async fn $name() { super::$name(super::Carrier::Tcp).await; })*
        }
    };
}

over_each_carrier! {
    both_ends_know_each_other
    half_closed_streams_carry_on_in_the_other_direction
    bytes_arrive_as_they_were_sent
    a_reset_breaks_one_direction
    what_is_stopped_is_refused_with_the_reason
    a_half_that_is_dropped_is_no_clean_end
    two_hundred_streams_do_not_wait_for_one_that_nobody_reads
    a_hundred_thousand_streams_one_after_the_other
    streams_wait_for_their_number
    a_link_that_is_closed_tells_why
    a_link_that_nobody_holds_ends
    a_link_that_is_cut_is_an_error_on_every_stream
    an_unread_link_holds_no_more_than_its_window
    nobody_is_let_in_by_another_ca
    another_protocol_is_known_for_what_it_is
    a_listener_that_closes_ends_every_link
}

async fn both_ends_know_each_other(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    assert_eq!(near.peer().identity.to_string(), "spiffe://mesh.test/shard/s1");
    assert_eq!(far.peer().identity.to_string(), "spiffe://mesh.test/edge/e1");
    assert_eq!(near.alpn().unwrap(), ALPN_MESH);
    assert_eq!(far.alpn().unwrap(), ALPN_MESH);
    assert!(far.remote_address().ip().is_loopback() && near.remote_address().ip().is_loopback());
    let before = near.stats();
    stream(&near, &far).await;
    assert!(near.stats().sent_bytes > before.sent_bytes);
    assert!(near.end().is_none() && near.rtt() < LONG);
}

async fn half_closed_streams_carry_on_in_the_other_direction(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.finish();
    assert_eq!(rest(&mut there.recv).await, (0, Ok(())));
    soon("it is known that all has arrived", here.send.delivered()).await.unwrap();
    let refused = timeout(Duration::from_millis(50), here.send.refused()).await;
    assert!(refused.is_err(), "what has arrived was not refused");
    write(&mut there.send, 300_000).await.unwrap();
    there.send.finish();
    assert_eq!(rest(&mut here.recv).await, (300_000, Ok(())));
    soon("the other end", there.send.delivered()).await.unwrap();
}

async fn bytes_arrive_as_they_were_sent(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (mut here, mut there) = stream(&near, &far).await;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let bytes = Bytes::from(sent.clone());
    let writes = async {
        let mut at = 0;
        for length in (1..).map(|i: usize| (i * i * 7919) % 60_000 + 1) {
            let end = (at + length).min(bytes.len());
            here.send.write(&mut [bytes.slice(at..end)]).await.unwrap();
            at = end;
            if at == bytes.len() {
                break;
            }
        }
        here.send.finish();
        here.send.delivered().await.unwrap();
    };
    let reads = async {
        let mut got = Vec::new();
        let mut pieces = [const { Bytes::new() }; 8];
        while let Some(count) = there.recv.chunks(&mut pieces).await.unwrap() {
            pieces[..count].iter().for_each(|piece| got.extend_from_slice(piece));
        }
        got
    };
    let ((), got) = soon("all of it", async { tokio::join!(writes, reads) }).await;
    assert!(got == sent);
}

async fn a_reset_breaks_one_direction(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.reset(ResetCode::Stalled);
    assert_eq!(rest(&mut there.recv).await.1, Err(reset(ResetCode::Stalled)));
    there.send.write_one(Bytes::from_static(b"the other one lives")).await.unwrap();
    there.send.finish();
    assert_eq!(rest(&mut here.recv).await, (19, Ok(())));
    assert!(near.end().is_none());
}

async fn what_is_stopped_is_refused_with_the_reason(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (mut here, mut there) = stream(&near, &far).await;
    let refused = here.send.refused();
    there.recv.stop(ResetCode::Refused);
    assert_eq!(soon("the refusal", refused).await, reset(ResetCode::Refused));
    assert_eq!(soon("the refusal again", here.send.delivered()).await, Err(reset(ResetCode::Refused)));
    assert_eq!(soon("writing ends", write(&mut here.send, 100_000_000)).await, Err(reset(ResetCode::Refused)));
    there.send.write_one(Bytes::from_static(b"the other one lives")).await.unwrap();
    assert_eq!(read(&mut here.recv, 19).await, b"the other one lives");

    // A writer that waits for room hears of it too, even if nothing of the other direction is read.
    let (mut here, mut there) = stream(&near, &far).await;
    let (waits, floods) = (write(&mut here.send, 100_000_000), write(&mut there.send, 100_000_000));
    let stops = async {
        sleep(Duration::from_millis(100)).await;
        there.recv.stop(ResetCode::Stalled);
    };
    let both = async {
        tokio::select! {
            (broken, ()) = async { tokio::join!(waits, stops) } => broken,
            _ = floods => panic!("nobody has read that"),
        }
    };
    assert_eq!(soon("the writer hears of it", both).await, Err(reset(ResetCode::Stalled)));
}

async fn a_half_that_is_dropped_is_no_clean_end(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (here, mut there) = stream(&near, &far).await;
    drop(here);
    assert_eq!(rest(&mut there.recv).await.1, Err(reset(ResetCode::Cancelled)));
    assert_eq!(soon("the refusal", there.send.refused()).await, reset(ResetCode::Cancelled));
    // A stream that was never used leaves nothing behind either.
    drop(near.open().await.unwrap());
    let mut unused = soon("a stream", far.accept()).await.unwrap();
    assert_eq!(rest(&mut unused.recv).await, (0, Err(reset(ResetCode::Cancelled))));
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.finish();
    assert_eq!(rest(&mut there.recv).await, (0, Ok(())));
}

async fn two_hundred_streams_do_not_wait_for_one_that_nobody_reads(carrier: Carrier) {
    let mesh = Mesh::with(LinkLimits { streams: 300, ..LinkLimits::default() });
    let (near, far) = mesh.link(carrier).await;
    let (mut stalled, unread) = stream(&near, &far).await;
    let mut work = JoinSet::new();
    work.spawn(async move {
        let _ = write(&mut stalled.send, 100_000_000).await;
    });
    let echo = far.clone();
    work.spawn(async move {
        let mut streams = JoinSet::new();
        while let Ok(mut stream) = echo.accept().await {
            streams.spawn(async move {
                while let Ok(Some(bytes)) = stream.recv.chunk(usize::MAX).await {
                    stream.send.write_one(bytes).await.unwrap();
                }
                stream.send.finish();
                let _ = stream.send.delivered().await;
            });
        }
    });
    let mut others = JoinSet::new();
    for _ in 0..200 {
        let near = near.clone();
        others.spawn(async move {
            let mut stream = near.open().await.unwrap();
            let sends = async {
                write(&mut stream.send, 100_000).await.unwrap();
                stream.send.finish();
            };
            let (_, got) = tokio::join!(sends, rest(&mut stream.recv));
            assert_eq!(got, (100_000, Ok(())));
        });
    }
    soon("the others are served", others.join_all()).await;
    drop(unread);
}

async fn a_hundred_thousand_streams_one_after_the_other(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    // So many that neither numbers nor room may get lost on the way.
    let count = if cfg!(debug_assertions) { 3_000 } else { 100_000 };
    let serves = async {
        for _ in 0..count {
            let mut stream = far.accept().await.unwrap();
            assert_eq!(rest(&mut stream.recv).await, (3, Ok(())));
            stream.send.finish();
        }
    };
    let opens = async {
        for _ in 0..count {
            let mut stream = near.open().await.unwrap();
            stream.send.write_one(Bytes::from_static(b"abc")).await.unwrap();
            stream.send.finish();
            assert_eq!(rest(&mut stream.recv).await, (0, Ok(())));
        }
    };
    timeout(LONG * 4, async { tokio::join!(serves, opens) }).await.unwrap();
}

async fn streams_wait_for_their_number(carrier: Carrier) {
    let mesh = Mesh::with(LinkLimits { streams: 2, ..LinkLimits::default() });
    let (near, far) = mesh.link(carrier).await;
    let (one, two) = (stream(&near, &far).await, stream(&near, &far).await);
    assert!(timeout(Duration::from_millis(100), near.open()).await.is_err(), "two are open");
    drop(one);
    let three = stream(&near, &far).await;
    assert!(timeout(Duration::from_millis(100), near.open()).await.is_err(), "two are open");
    far.allow_streams(3);
    stream(&near, &far).await;
    drop((two, three));
}

async fn a_link_that_is_closed_tells_why(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (mut here, mut there) = stream(&near, &far).await;
    write(&mut here.send, 200_000).await.unwrap();
    far.close(CloseCode::Drained, "until tomorrow");
    let end = soon("the end", near.ended()).await;
    assert_eq!((end.close_code(), end.detail.as_str()), (Some(CloseCode::Drained), "until tomorrow"));
    assert_eq!(near.end(), Some(end.clone()));
    assert_eq!(far.end().unwrap().cause, EndCause::Local);
    assert_eq!(rest(&mut here.recv).await.1, Err(StreamError::Link(end.clone())));
    assert_eq!(here.send.write_one(Bytes::from_static(b"x")).await, Err(StreamError::Link(end.clone())));
    assert_eq!(near.open().await.unwrap_err(), end);
    assert_eq!(far.accept().await.unwrap_err().cause, EndCause::Local);
    assert!(matches!(rest(&mut there.recv).await.1, Err(StreamError::Link(_))));
}

async fn a_link_that_nobody_holds_ends(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, far) = mesh.link(carrier).await;
    let (here, mut there) = stream(&near, &far).await;
    drop(near);
    there.send.write_one(Bytes::from_static(b"the stream holds it")).await.unwrap();
    assert!(far.end().is_none());
    drop(here);
    soon("the end", far.ended()).await;
    soon("nothing is left", async {
        while mesh.listener.links() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Passes TCP on until it is dropped.
async fn pass(front: TcpListener, behind: SocketAddr) {
    let mut pairs = JoinSet::new();
    while let Ok((mut client, _)) = front.accept().await {
        pairs.spawn(async move {
            let mut server = TcpStream::connect(behind).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
    }
}

async fn a_link_that_is_cut_is_an_error_on_every_stream(carrier: Carrier) {
    let mesh = Mesh::with(LinkLimits { idle: Duration::from_secs(2), ..LinkLimits::default() });
    let (near, far) = match carrier {
        Carrier::Quic => mesh.link(carrier).await,
        Carrier::Tcp => {
            let front = TcpListener::bind(ANY).await.unwrap();
            let address = front.local_addr().unwrap();
            let passing = tokio::spawn(pass(front, mesh.tcp));
            let dialer = TcpDialer::new(mesh.tls(&mesh.ca, ALPN_MESH), &mesh.limits);
            let both = async { tokio::join!(dialer.dial(address, "s1"), mesh.accept()) };
            let (near, far) = soon("a link", both).await;
            let (near, far) = (near.unwrap(), far.unwrap());
            let (mut here, mut there) = stream(&near, &far).await;
            write(&mut here.send, 10_000).await.unwrap();
            assert_eq!(read(&mut there.recv, 10_000).await.len(), 10_000);
            passing.abort();
            for recv in [&mut here.recv, &mut there.recv] {
                let (_, end) = rest(recv).await;
                assert!(matches!(end, Err(StreamError::Link(_))), "{end:?}");
            }
            let end = soon("the end", near.ended()).await;
            assert_eq!(end.cause, EndCause::PeerRestarted, "{end}");
            (near, far)
        }
    };
    if carrier == Carrier::Quic {
        // The same from the other side: it falls silent.
        let (_here, mut there) = stream(&near, &far).await;
        let (near_only, _) = (near.clone(), drop(near));
        near_only.close(CloseCode::Shutdown, "");
        let (_, end) = rest(&mut there.recv).await;
        assert!(matches!(end, Err(StreamError::Link(_))), "{end:?}");
        return;
    }
    soon("the end", near.ended()).await;
    soon("the end", far.ended()).await;
}

#[tokio::test]
async fn what_goes_first_overtakes_over_tcp() {
    let carrier = Carrier::Tcp;
    let mesh = Mesh::with(LinkLimits { streams: 100, ..LinkLimits::default() });
    let (near, far) = mesh.link(carrier).await;
    let mut bulk = JoinSet::new();
    for _ in 0..50 {
        let (mut here, mut there) = stream(&near, &far).await;
        bulk.spawn(async move {
            let _ = write(&mut here.send, 1_000_000_000).await;
        });
        bulk.spawn(async move {
            let _ = rest(&mut there.recv).await;
        });
    }
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.go_first();
    there.send.go_first();
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let began = Instant::now();
        here.send.write_one(Bytes::from_static(b"?")).await.unwrap();
        assert_eq!(read(&mut there.recv, 1).await, b"?");
        there.send.write_one(Bytes::from_static(b"!")).await.unwrap();
        assert_eq!(read(&mut here.recv, 1).await, b"!");
        longest = longest.max(began.elapsed());
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
}

async fn an_unread_link_holds_no_more_than_its_window(carrier: Carrier) {
    let limits = LinkLimits {
        streams: 100,
        stream_window: 64 * 1024,
        link_window: 512 * 1024,
        send_window: 512 * 1024,
        ..LinkLimits::default()
    };
    let mesh = Mesh::with(limits);
    let (near, far) = mesh.link(carrier).await;
    let mut writers = JoinSet::new();
    let mut unread = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(stream(&near, &far).await);
    }
    for (mut here, there) in streams {
        unread.push(there);
        writers.spawn(async move {
            let mut taken = 0;
            while taken < 10_000_000 {
                let block = Bytes::from_static(&[7; 1024]);
                if timeout(Duration::from_millis(500), here.send.write_one(block)).await.is_err() {
                    break;
                }
                taken += 1024;
            }
            (here, taken)
        });
    }
    let done = soon("the writers wait", writers.join_all()).await;
    let taken: usize = done.iter().map(|(_, taken)| taken).sum();
    // What the reader holds, what the writer holds, and what is between the two.
    assert!(taken < 4 * 1024 * 1024, "{taken} bytes were taken that nobody has read");
    // And everything goes on once it is read.
    let (mut here, there): (Vec<_>, _) = (done.into_iter().map(|(here, _)| here).collect(), unread);
    // All at once: what is not read holds up what is behind it.
    let reads = async {
        let mut readers = JoinSet::new();
        for mut stream in there {
            readers.spawn(async move { (rest(&mut stream.recv).await.0, stream) });
        }
        readers.join_all().await
    };
    here.iter_mut().for_each(|stream| stream.send.finish());
    let there = soon("it is read", reads).await;
    let all: usize = there.iter().map(|(bytes, _)| bytes).sum();
    assert!(all + 50 * 1024 >= taken, "{all} of {taken}");
}

async fn nobody_is_let_in_by_another_ca(carrier: Carrier) {
    let mesh = Mesh::new();
    // The shard does not know this edge's CA.
    let tls = mesh.tls(&TestCa::new(), ALPN_MESH);
    let (near, far) = soon("an end", async { tokio::join!(mesh.dial_as(tls, carrier), mesh.accept()) }).await;
    let end = match near {
        Err(end) => end,
        // QUIC's dialer hears of it after its own handshake.
        Ok(near) => soon("the end", near.ended()).await,
    };
    assert_eq!(end.cause, EndCause::Distrusted, "{end}");
    assert_eq!(far.unwrap_err().cause, EndCause::WrongCa);
    // This edge does not know the shard's.
    let identity = LiveIdentity::new(&mesh.ca.issue("edge/e1")).unwrap();
    let verifier = MeshVerifier::of_servers(TestCa::new().bundle(), Role::Shard);
    let tls = client_config(Some(&identity), Arc::new(verifier), &[ALPN_MESH]).unwrap();
    let (near, far) = soon("an end", async { tokio::join!(mesh.dial_as(tls, carrier), mesh.accept()) }).await;
    assert_eq!(near.unwrap_err().cause, EndCause::WrongCa);
    assert_eq!(far.unwrap_err().cause, EndCause::Distrusted);
}

async fn another_protocol_is_known_for_what_it_is(carrier: Carrier) {
    let mesh = Mesh::new();
    let tls = mesh.tls(&mesh.ca, b"something-else/1");
    let (near, far) = soon("an end", async { tokio::join!(mesh.dial_as(tls, carrier), mesh.accept()) }).await;
    assert_eq!(near.unwrap_err().cause, EndCause::NoCommonVersion);
    assert_eq!(far.unwrap_err().cause, EndCause::NoCommonVersion);
}

async fn a_listener_that_closes_ends_every_link(carrier: Carrier) {
    let mesh = Mesh::new();
    let (near, _far) = mesh.link(carrier).await;
    mesh.listener.refuse_new();
    stream(&near, &_far).await;
    mesh.listener.close(CloseCode::Shutdown);
    let end = soon("the end", near.ended()).await;
    assert_eq!(end.close_code(), Some(CloseCode::Shutdown));
    soon("the listener is idle", mesh.listener.idle()).await;
}

/// The first flight of a handshake.
fn client_hello(mesh: &Mesh) -> Vec<u8> {
    let config = Arc::new(mesh.tls(&mesh.ca, ALPN_MESH));
    let mut client = rustls::ClientConnection::new(config, "s1".try_into().unwrap()).unwrap();
    let mut flight = Vec::new();
    client.write_tls(&mut flight).unwrap();
    flight
}

#[tokio::test]
async fn garbage_and_silence_on_the_tcp_port_hinder_nobody() {
    let limits = LinkLimits { handshake: Duration::from_millis(500), ..LinkLimits::default() };
    let mesh = Mesh::with(limits);
    // Whoever says nothing, or no TLS, does not even become an arrival.
    let silent = TcpStream::connect(mesh.tcp).await.unwrap();
    let mut garbage = TcpStream::connect(mesh.tcp).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = soon("the end", garbage.read_to_end(&mut Vec::new())).await;

    // Whoever stops in the middle has its own time and no more.
    let mut slow = TcpStream::connect(mesh.tcp).await.unwrap();
    slow.write_all(&client_hello(&mesh)).await.unwrap();
    let arriving = soon("it comes", mesh.listener.accept()).await.unwrap();
    let slow_end = tokio::spawn(arriving.accept());
    let (near, far) = mesh.link(Carrier::Tcp).await;
    assert_eq!(soon("its time is over", slow_end).await.unwrap().unwrap_err().cause, EndCause::TimedOut);
    stream(&near, &far).await;
    drop((silent, slow));
}

#[tokio::test]
async fn a_port_without_listener_is_known_and_a_listener_without_an_answer_times_out() {
    let limits = LinkLimits { handshake: Duration::from_millis(500), ..LinkLimits::default() };
    let mesh = Mesh::with(limits);
    let dialer = TcpDialer::new(mesh.tls(&mesh.ca, ALPN_MESH), &limits);
    let nobody = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    assert_eq!(dialer.dial(nobody, "s1").await.unwrap_err().cause, EndCause::NobodyListens);
    let silent = TcpListener::bind(ANY).await.unwrap();
    let address = silent.local_addr().unwrap();
    assert_eq!(dialer.dial(address, "s1").await.unwrap_err().cause, EndCause::TimedOut);
}

/// A proxy that answers so, and passes on what it answers 200 to.
async fn proxy(answer: &'static str, expects: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.contains(expects), "{head}");
        let to = head.split(' ').nth(1).unwrap().to_owned();
        client.write_all(answer.as_bytes()).await.unwrap();
        if answer.contains(" 200 ") {
            let mut server = TcpStream::connect(to).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
    });
    address
}

#[tokio::test]
async fn a_proxy_is_a_way_or_says_why_not() {
    let mesh = Mesh::new();
    let dialer = TcpDialer::new(mesh.tls(&mesh.ca, ALPN_MESH), &mesh.limits);
    let to = mesh.tcp.to_string();

    let at = proxy("HTTP/1.1 200 Connection established\r\n\r\n", "Proxy-Authorization: Basic YWxpY2U6c2VjcmV0").await;
    let through: Proxy = format!("http://alice:secret@{at}").parse().unwrap();
    let both = async { tokio::join!(dialer.dial_through(&through, &to, "s1"), mesh.accept()) };
    let (near, far) = soon("a link", both).await;
    stream(&near.unwrap(), &far.unwrap()).await;

    for (answer, why) in [
        ("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "does not accept the credentials"),
        ("HTTP/1.1 403 Forbidden\r\n\r\n", "forbids that address"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "no HTTP proxy"),
    ] {
        let at = proxy(answer, "CONNECT").await;
        let through: Proxy = format!("http://alice:secret@{at}").parse().unwrap();
        let end = soon("an answer", dialer.dial_through(&through, &to, "s1")).await.unwrap_err();
        assert_eq!(end.cause, EndCause::ProxyRefused);
        assert!(end.detail.contains(why) && !end.detail.contains("secret"), "{end}");
    }
}
