//! A shard that speaks the control stream as a test tells it to, and an edge to go with it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_edge::{
    Edge, EdgeParts, client_config, client_tls,
    config::{CarriersConfig, EdgeConfig},
    life::Phase,
    proxy::Proxies,
    ways::Ways,
};
use prometheus::Registry;
use proto::{
    ALPN_MESH,
    code::{CloseCode, RefuseCode, ResetCode},
    frame::{MAX_EDGE_TO_SHARD, MAX_STREAM_HEAD},
    identity::Role,
    message::{Candidate, EdgeToShard, Hello, ShardToEdge, Welcome},
    principal::Principal,
    standing::Standing,
    stream::{Answer, Open, Refusal},
};
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::{AccessRecord, AccessWriter},
    clock,
    frames::{FrameReader, ReadFrameError},
    identity::{Credentials, IdentityDir},
    link::{
        Link, LinkEnd, RecvHalf, SendHalf, Stream, StreamError,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
        tcp::{TcpDialer, TcpDoor},
    },
    shutdown::Tasks,
    tls::{self, LiveIdentity, MeshVerifier, testing::TestCa},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

/// What only a failure waits for.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Waits for what must happen.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
}

pub(crate) struct FakeShard {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    listener: Listener,
    tls: rustls::ServerConfig,
}

/// Binds to a port that TCP has free as well. It is none of those that the system gives to whoever connects, so that a
/// TCP port of the same number can be opened later.
pub(crate) fn on_free_port<T>(bind: impl Fn(SocketAddr) -> io::Result<T>) -> T {
    for _ in 0..100 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(12_000..32_000)));
        if std::net::TcpListener::bind(address).is_err() {
            continue;
        }
        match bind(address) {
            Ok(bound) => return bound,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}"),
        }
    }
    panic!("no port is free");
}

/// A link that an edge made, behind its Hello.
pub(crate) struct Visit {
    pub(crate) link: Link,
    pub(crate) hello: Hello,
    /// What the edge said last of how it got here.
    pub(crate) standing: Option<Standing>,
    send: SendHalf,
    recv: RecvHalf,
    reader: FrameReader,
}

impl FakeShard {
    pub(crate) fn start(ca: &TestCa, name: &str) -> Self {
        Self::start_as(ca, &ca.issue(&format!("shard/{name}")), name)
    }

    pub(crate) fn start_as(ca: &TestCa, credentials: &Credentials, name: &str) -> Self {
        let identity = LiveIdentity::new(credentials).unwrap();
        let clients = MeshVerifier::of_clients(ca.bundle(), true);
        let mut tls = tls::server_config(&identity, clients, &[ALPN_MESH]).unwrap();
        // As shards do: whoever comes again resumes, unless it has another certificate by then.
        tls.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let limits = LinkLimits::default();
        let config = quic::server_config(tls.clone(), &limits).unwrap();
        let listener = on_free_port(|address| Listener::bind(address, config.clone(), &limits));
        Self { name: name.to_owned(), address: listener.local_addr().unwrap(), listener, tls }
    }

    /// Takes links over TCP as well, at this address.
    pub(crate) fn with_tcp(self, address: SocketAddr) -> Self {
        let door = TcpDoor::bind(address, self.tls.clone(), &LinkLimits::default()).unwrap();
        Self { listener: self.listener.with_tcp(door), ..self }
    }

    pub(crate) fn candidate(&self) -> Candidate {
        Candidate { shard: self.name.parse().unwrap(), addresses: vec![self.address.to_string()] }
    }

    pub(crate) async fn link(&self) -> Result<Link, LinkEnd> {
        soon("an edge dials", self.listener.accept()).await.unwrap().accept().await
    }

    /// The next link, if its handshake works out.
    pub(crate) async fn try_link(&self) -> Option<Link> {
        self.listener.accept().await?.accept().await.ok()
    }

    /// The next edge, behind its Hello.
    pub(crate) async fn visit(&self) -> Visit {
        let link = self.link().await.unwrap();
        let Stream { send, mut recv } = soon("a control stream", link.accept()).await.unwrap();
        let mut reader = FrameReader::new(MAX_EDGE_TO_SHARD);
        let hello = soon("Hello", reader.next(&mut recv)).await.unwrap().unwrap();
        let Some(EdgeToShard::Hello(hello)) = EdgeToShard::decode(hello).unwrap() else { panic!("no Hello") };
        Visit { link, hello, standing: None, send, recv, reader }
    }

    /// The next edge, welcomed.
    pub(crate) async fn welcome(&self) -> Visit {
        let mut visit = self.visit().await;
        visit.say(ShardToEdge::Welcome(self.welcome_message())).await;
        visit
    }

    pub(crate) fn welcome_message(&self) -> Welcome {
        Welcome {
            shard: self.name.parse().unwrap(),
            epoch: 7,
            candidates: vec![],
            unix_ms: clock::unix_millis(),
            ping: Duration::from_millis(500),
            generation: 1,
            seen_as: "192.0.2.7:4433".into(),
        }
    }
}

impl Visit {
    pub(crate) async fn say(&mut self, message: ShardToEdge) {
        self.send.write_one(message.encode().unwrap()).await.unwrap();
    }

    /// The next message that is no ping and no standing; pings are answered.
    pub(crate) async fn hear(&mut self) -> Option<EdgeToShard> {
        loop {
            if let Some(message) = self.hear_once().await? {
                return Some(message);
            }
        }
    }

    /// Takes the next message; `None` inside for one that was dealt with.
    pub(crate) async fn hear_once(&mut self) -> Option<Option<EdgeToShard>> {
        let body = self.reader.next(&mut self.recv).await.ok()??;
        match EdgeToShard::decode(body).unwrap() {
            Some(EdgeToShard::Ping(token)) => {
                let pong = ShardToEdge::Pong(token).encode().unwrap();
                self.send.write_one(pong).await.ok()?;
                Some(None)
            }
            Some(EdgeToShard::Standing(standing)) => {
                self.standing = Some(standing);
                Some(None)
            }
            message => Some(message),
        }
    }

    /// Says the last word, and lets the edge close the link.
    pub(crate) async fn dismiss(mut self, message: ShardToEdge) {
        self.say(message).await;
        soon("the edge leaves", self.link.ended()).await;
    }

    /// Answers pings until the edge says something else, which is returned.
    pub(crate) async fn expect(&mut self, what: &str) -> EdgeToShard {
        soon(what, self.hear()).await.unwrap_or_else(|| panic!("the link ended before {what}"))
    }

    /// Answers pings in the background, and hands out the link.
    pub(crate) fn keep_alive(mut self, tasks: &Tasks) -> Link {
        let link = self.link.clone();
        tasks.spawn(async move { while self.hear().await.is_some() {} });
        link
    }
}

/// Opens a stream as a shard does for alice.
pub(crate) async fn open(link: &Link, target: &str) -> Result<(Stream, String), Refusal> {
    open_with(link, target, b"").await
}

#[allow(clippy::unwrap_in_result, reason = "only the refusal is a result")]
pub(crate) async fn open_with(link: &Link, target: &str, early: &'static [u8]) -> Result<(Stream, String), Refusal> {
    let target = match target.strip_suffix("(probe)") {
        Some(edge) => proto::target::Target::Probe { edge: edge.trim_end_matches('/').parse().unwrap() },
        None => target.parse().unwrap(),
    };
    let principal = Some(Principal::User { name: "alice".parse().unwrap(), groups: vec![] });
    open_as(link, Open { principal, door: "proxy".into(), ..Open::new(target) }, early).await
}

/// As [`open_with`], for whomever the shard says.
#[allow(clippy::unwrap_in_result, reason = "only the refusal is a result")]
pub(crate) async fn open_as(link: &Link, open: Open, early: &'static [u8]) -> Result<(Stream, String), Refusal> {
    let mut stream = soon("a stream", link.open()).await.unwrap();
    let mut head = [open.encode().unwrap(), Bytes::from_static(early)];
    stream.send.write(&mut head).await.unwrap();
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let answer = match soon("an answer", reader.next(&mut stream.recv)).await {
        // A reset overtakes the answer. Shards take it for this.
        Err(ReadFrameError::Stream(StreamError::Reset(ResetCode::PeerReset))) => {
            return Err(Refusal::new(RefuseCode::TargetRefused));
        }
        answer => answer.unwrap().unwrap(),
    };
    stream.recv.unread(reader.into_rest());
    match Answer::decode(answer).unwrap() {
        Answer::Opened { address, .. } => Ok((stream, address)),
        Answer::Refused(refusal) => Err(refusal),
        Answer::Routed(_) => panic!("edges do not pass streams on"),
    }
}

pub(crate) async fn read_exactly(recv: &mut RecvHalf, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < count {
        let chunk = soon("bytes", recv.chunk(count - all.len())).await.unwrap().expect("ended too early");
        all.extend_from_slice(&chunk);
    }
    all
}

pub(crate) async fn read_to_end(recv: &mut RecvHalf) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = soon("bytes or the end", recv.chunk(65536)).await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    all
}

/// Says something and hears the same.
pub(crate) async fn echo(stream: &mut Stream, text: &'static [u8]) {
    stream.send.write_one(Bytes::from_static(text)).await.unwrap();
    assert_eq!(read_exactly(&mut stream.recv, text.len()).await, text);
}

/// An edge under test.
pub(crate) struct TestEdge {
    pub(crate) edge: Edge,
    pub(crate) tasks: Tasks,
    pub(crate) records: mpsc::Receiver<AccessRecord>,
    pub(crate) registry: Registry,
}

impl TestEdge {
    pub(crate) fn start(ca: &TestCa, shards: &[&FakeShard], change: impl FnOnce(&mut EdgeConfig)) -> Self {
        let shards: Vec<_> = shards.iter().map(|s| s.address.to_string()).collect();
        Self::start_as(ca, ca.issue("edge/shop-1"), None, |config| {
            config.shards = shards;
            change(config);
        })
    }

    /// An edge that knows these addresses.
    pub(crate) fn start_at(ca: &TestCa, shards: Vec<String>) -> Self {
        Self::start_as(ca, ca.issue("edge/shop-1"), None, |config| config.shards = shards)
    }

    pub(crate) fn start_as(
        ca: &TestCa,
        credentials: Credentials,
        folder: Option<&Path>,
        change: impl FnOnce(&mut EdgeConfig),
    ) -> Self {
        let carriers = CarriersConfig { tcp: false, ..CarriersConfig::default() };
        let mut config = EdgeConfig { drain: Duration::from_secs(5), carriers, ..EdgeConfig::default() };
        change(&mut config);
        let (identity, bundle, limits) = (LiveIdentity::new(&credentials).unwrap(), ca.bundle(), config.link_limits());
        let mut ways = Ways::from(Dialer::new(client_config(&identity, &bundle, &limits).unwrap(), &limits));
        if config.carriers.tcp {
            let tcp = TcpDialer::new(client_tls(&identity, &bundle).unwrap(), &limits);
            ways = ways.with_tcp(tcp, Proxies::new(&config.proxy).unwrap(), config.carriers.head_start);
        }
        let (sender, records) = mpsc::channel(64);
        let (tasks, registry) = (Tasks::new(), Registry::new());
        let parts = EdgeParts {
            config,
            credentials,
            identity,
            bundle,
            ways,
            access: AccessWriter::to_channel(sender),
            registry: registry.clone(),
            rng: StdRng::seed_from_u64(1),
            store: folder.map(|f| IdentityDir::open(f).unwrap()),
        };
        let edge = mesh_edge::start_with(parts, tasks.clone()).unwrap();
        Self { edge, tasks, records, registry }
    }

    pub(crate) async fn phase(&self, what: &str, fits: impl FnMut(&Phase) -> bool) -> Phase {
        soon(what, self.edge.phase().wait_for(fits)).await.unwrap().clone()
    }

    pub(crate) async fn connected(&self, shard: &FakeShard) {
        self.phase(
            &format!("connected to {}", shard.name),
            |phase| matches!(phase, Phase::Connected { shard: s, .. } if s.as_str() == shard.name),
        )
        .await;
    }

    /// The next access record.
    pub(crate) async fn record(&mut self) -> AccessRecord {
        soon("an access record", self.records.recv()).await.unwrap()
    }

    /// A sample as it stands in `/metrics`, such as `mesh_edge_streams_total{outcome="finished"}`.
    pub(crate) fn sample(&self, name: &str) -> Option<f64> {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Ends it and checks that nothing is left.
    pub(crate) async fn end(self) {
        assert_eq!(self.tasks.drained(LONG).await, 0, "tasks are left");
        assert_eq!(*self.edge.phase().borrow(), Phase::Stopped);
        assert_eq!(self.sample("mesh_edge_streams_active"), Some(0.0));
        assert_eq!(self.sample("mesh_edge_connected"), Some(0.0));
    }
}

/// A TCP server on loopback that gives each connection to the function.
pub(crate) async fn server<F, Fut>(tasks: &Tasks, mut handle: F) -> SocketAddr
where
    F: FnMut(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let group = tasks.clone();
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        while let Ok((socket, _)) = listener.accept().await {
            group.spawn(group.token().run_until_cancelled_owned(handle(socket)));
        }
    }));
    address
}

pub(crate) async fn echo_server(tasks: &Tasks) -> SocketAddr {
    server(tasks, |mut socket| async move {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = socket.read(&mut buffer).await {
            if socket.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// What the edge closed a link with.
pub(crate) async fn closed_with(link: &Link) -> Option<CloseCode> {
    soon("the edge closes the link", link.ended()).await.close_code()
}

/// The role is part of the name everywhere else; this only proves it to the reader.
pub(crate) fn is_edge(link: &Link) -> bool {
    link.peer().identity.role == Role::Edge
}

/// Shared by all.
pub(crate) fn mesh() -> (Arc<TestCa>, Tasks) {
    (Arc::new(TestCa::new()), Tasks::new())
}
