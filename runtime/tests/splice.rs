//! Bytes between real sockets through a real link: `client socket | splice | link | splice | server socket`.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use proto::{ALPN_MESH, code::ResetCode, identity::Role};
use runtime::{
    link::{
        Link, Stream, StreamError,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
    },
    splice::{Broken, IoEnd, Meter, TcpEnd, splice},
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
const SOON: Duration = Duration::from_secs(10);

/// Two members with a link between them.
struct Pair {
    near: Link,
    far: Link,
    _listener: Listener,
}

impl Pair {
    async fn new(limits: LinkLimits) -> Self {
        let ca = TestCa::new();
        let (shard, edge) =
            (LiveIdentity::new(&ca.issue("shard/s1")).unwrap(), LiveIdentity::new(&ca.issue("edge/e1")).unwrap());
        let server = server_config(&shard, MeshVerifier::of_clients(ca.bundle(), true), &[ALPN_MESH]).unwrap();
        let listener =
            Listener::bind(SocketAddr::from(LOOPBACK), quic::server_config(server, &limits).unwrap(), &limits).unwrap();
        let verifier = Arc::new(MeshVerifier::of_servers(ca.bundle(), Role::Shard));
        let client = client_config(Some(&edge), verifier, &[ALPN_MESH]).unwrap();
        let dialer = Dialer::new(quic::client_config(client, &limits).unwrap(), &limits);
        let address = listener.local_addr().unwrap();
        let (far, near) =
            tokio::join!(dialer.dial(address, "s1"), async { listener.accept().await.unwrap().accept().await });
        Self { near: near.unwrap(), far: far.unwrap(), _listener: listener }
    }

    /// A stream, seen from both members. Its first bytes make the other member see it.
    async fn stream(&self) -> (Stream, Stream) {
        let mut near = self.near.open().await.unwrap();
        near.send.write_one(Bytes::from_static(b"!")).await.unwrap();
        let mut far = self.far.accept().await.unwrap();
        assert_eq!(far.recv.chunk(1).await.unwrap().unwrap(), "!");
        (near, far)
    }
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(LOOPBACK).await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

/// What the two splices said in the end.
type Ends = (Result<(), Broken>, Result<(), Broken>);

/// A client and a server that are connected through the pair, and the two splices between them.
async fn through(pair: &Pair) -> (TcpStream, TcpStream, tokio::task::JoinHandle<Ends>, CancellationToken) {
    let ((client, door), (target, server)) = (sockets().await, sockets().await);
    let (near, far) = pair.stream().await;
    let cancel = CancellationToken::new();
    let token = cancel.clone();
    #[allow(clippy::disallowed_methods, reason = "the test holds the handle")]
    let task = tokio::spawn(async move {
        let (meter_a, meter_b) = (Arc::default(), Arc::<Meter>::default());
        let never = CancellationToken::new();
        tokio::join!(
            splice(TcpEnd::new(door, Bytes::new()).unwrap(), near, &meter_a, &token),
            splice(far, TcpEnd::new(target, Bytes::new()).unwrap(), &meter_b, &never),
        )
    });
    (client, server, task, cancel)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let pair = Pair::new(LinkLimits::default()).await;
    let (mut client, mut server, task, _) = through(&pair).await;
    let question = pattern(3_000_000);
    let asked = question.clone();
    let client_side = async {
        client.write_all(&question).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let server_side = async {
        let mut got = Vec::new();
        // The client's end arrives while this direction is still open.
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, asked);
        server.write_all(&got[..2_000_000]).await.unwrap();
        drop(server);
    };
    let (answer, ()) = timeout(SOON, async { tokio::join!(client_side, server_side) }).await.unwrap();
    assert_eq!(answer, asked[..2_000_000]);
    let (near, far) = timeout(SOON, task).await.unwrap().unwrap();
    assert_eq!((near, far), (Ok(()), Ok(())));
}

#[tokio::test]
async fn a_reset_is_seen_as_a_reset_at_the_other_end() {
    let pair = Pair::new(LinkLimits::default()).await;
    let (mut client, server, task, _) = through(&pair).await;
    socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop(server);
    let error = timeout(SOON, client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    let (near, far) = timeout(SOON, task).await.unwrap().unwrap();
    assert_eq!(near.unwrap_err().code, ResetCode::PeerReset);
    assert_eq!(far.unwrap_err().code, ResetCode::PeerReset);
}

#[tokio::test]
async fn a_link_that_breaks_in_mid_stream_is_never_a_clean_end() {
    let pair = Pair::new(LinkLimits::default()).await;
    let (mut client, mut server, task, _) = through(&pair).await;
    server.write_all(b"half of an answ").await.unwrap();
    let mut got = [0; 15];
    timeout(SOON, client.read_exact(&mut got)).await.unwrap().unwrap();
    pair.far.close(proto::code::CloseCode::Shutdown, "");
    let error = timeout(SOON, client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    let error = timeout(SOON, server.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    let (near, _) = timeout(SOON, task).await.unwrap().unwrap();
    assert_eq!(near.unwrap_err().code, ResetCode::LinkLost);
}

#[tokio::test]
async fn a_shutdown_cuts_with_its_own_code() {
    let pair = Pair::new(LinkLimits::default()).await;
    let (mut client, _server, task, cancel) = through(&pair).await;
    cancel.cancel();
    assert!(timeout(SOON, client.read_u8()).await.unwrap().is_err());
    let (near, far) = timeout(SOON, task).await.unwrap().unwrap();
    assert_eq!(near.unwrap_err().code, ResetCode::Shutdown);
    assert_eq!(far.unwrap_err().code, ResetCode::Shutdown);
}

#[tokio::test]
async fn a_dropped_stream_is_a_reset_and_not_an_end() {
    let pair = Pair::new(LinkLimits::default()).await;
    let (near, mut far) = pair.stream().await;
    drop(near);
    let error = timeout(SOON, far.recv.chunk(1)).await.unwrap().unwrap_err();
    assert_eq!(error, StreamError::Reset(ResetCode::Cancelled));
}

#[tokio::test]
async fn one_reader_that_stops_stalls_nobody_and_holds_no_more_than_its_window() {
    let limits = LinkLimits { stream_window: 256 * 1024, ..LinkLimits::default() };
    let pair = Pair::new(limits).await;
    let (mut stalled, _kept) = pair.stream().await;
    let flood = async {
        let chunk = Bytes::from(pattern(64 * 1024));
        let mut sent = 0_usize;
        while timeout(Duration::from_millis(300), stalled.send.write_one(chunk.clone())).await.is_ok() {
            sent += chunk.len();
        }
        sent
    };
    let sent = timeout(SOON, flood).await.unwrap();
    assert!((128 * 1024..=256 * 1024 + 64 * 1024).contains(&sent), "{sent} bytes were taken for a reader that stopped");

    let (mut client, mut server, _task, _) = through(&pair).await;
    for _ in 0..200 {
        client.write_all(b"ping").await.unwrap();
        let mut got = [0; 4];
        timeout(Duration::from_secs(1), server.read_exact(&mut got)).await.expect("others are served").unwrap();
    }
}

#[tokio::test]
async fn a_thousand_streams_at_once_on_one_link() {
    let limits = LinkLimits { streams: 2000, ..LinkLimits::default() };
    let pair = Pair::new(limits).await;
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(pair.stream().await);
    }
    for (i, (near, far)) in streams.iter_mut().enumerate() {
        far.send.write_one(Bytes::from(i.to_string())).await.unwrap();
        far.send.finish();
        let got = timeout(SOON, near.recv.chunk(100)).await.unwrap().unwrap().unwrap();
        assert_eq!(got, i.to_string());
        assert_eq!(timeout(SOON, near.recv.chunk(1)).await.unwrap(), Ok(None));
    }
}

/// A reader at the near member that takes what comes, or nothing.
fn reader(near: Stream) -> (tokio::io::DuplexStream, tokio::task::JoinHandle<Result<(), Broken>>) {
    let (ours, theirs) = tokio::io::duplex(1024);
    #[allow(clippy::disallowed_methods, reason = "the test holds the handle")]
    let task = tokio::spawn(async move {
        let (read, write) = tokio::io::split(theirs);
        splice(IoEnd::new(read, write, Bytes::new()), near, &Arc::default(), &CancellationToken::new()).await
    });
    (ours, task)
}

#[tokio::test]
async fn many_readers_that_stop_give_way_before_the_others_suffer() {
    // Room for 16 whole stream windows, three quarters of which may be held by readers that stopped.
    let limits = LinkLimits { stream_window: 64 * 1024, link_window: 1024 * 1024, ..LinkLimits::default() };
    let pair = Pair::new(limits).await;
    let mut stopped = Vec::new();
    for _ in 0..20 {
        let (near, mut far) = pair.stream().await;
        #[allow(clippy::disallowed_methods, reason = "ends with the link")]
        tokio::spawn(async move {
            let chunk = Bytes::from(pattern(16 * 1024));
            while far.send.write_one(chunk.clone()).await.is_ok() {}
        });
        stopped.push(reader(near));
    }
    let (near, mut far) = pair.stream().await;
    let (mut ours, _task) = reader(near);
    let mut got = [0; 4];
    let served = async {
        far.send.write_one(Bytes::from_static(b"ping")).await.unwrap();
        ours.read_exact(&mut got).await.unwrap();
    };
    timeout(SOON, served).await.expect("whoever reads is served");
    let broken = async {
        let mut broken = 0;
        while broken < 8 {
            broken = stopped.iter().filter(|(_, task)| task.is_finished()).count();
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, broken).await.expect("those that stopped give way");
    let (_, task) = stopped.swap_remove(stopped.iter().position(|(_, task)| task.is_finished()).unwrap());
    assert_eq!(task.await.unwrap().unwrap_err().code, ResetCode::Stalled);
}

#[tokio::test]
async fn a_stream_costs_a_few_kilobytes() {
    let pair = Pair::new(LinkLimits::default()).await;
    let ((near, _far), (door, _client)) = (pair.stream().await, sockets().await);
    let (meter, cancel) = (Arc::default(), CancellationToken::new());
    let future = splice(TcpEnd::new(door, Bytes::new()).unwrap(), near, &meter, &cancel);
    let size = size_of_val(&future);
    assert!((2048..=6144).contains(&size), "a splice takes {size} bytes");
}
