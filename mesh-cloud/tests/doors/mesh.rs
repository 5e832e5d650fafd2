//! A mesh of one shard and one edge.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_cloud::{
    Parts, Shard,
    config::{DoorsConfig, EgressConfig, ShardConfig},
    doors::egress::{EgressDoor, Opening},
    endpoint_config,
    live::LiveCredentials,
    metrics::Metrics,
    peer_config, peer_limits, start_with,
    state::MeshState,
    tcp_door,
};
use prometheus::Registry as Families;
use proto::{
    ALPN_MESH,
    api::{AccessToken, WatchEvent},
    audit::AccessRecord,
    code::RefuseCode,
    frame::{MAX_SHARD_TO_EDGE, MAX_STREAM_HEAD},
    identity::Role,
    message::{EdgeToShard, Hello, Service, ServiceKind, ShardToEdge},
    policy::{Ports, Rule},
    stream::{Answer, Open, Refusal},
    target::Target,
};
use runtime::{
    access::AccessWriter,
    admin::Ready,
    clock,
    flow::{self, PacketSink, Terms, relay, socket},
    frames::FrameReader,
    link::{
        Link, Stream,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
        tcp::TcpDialer,
    },
    shutdown::Tasks,
    splice::{Meter, TcpEnd, splice},
    tls::{self, LiveIdentity, MeshVerifier, testing::TestCa},
};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// How long anything may take before the test is wrong.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const TOKEN: &str = "alice-token";
/// `alice:alice-token`
pub(crate) const BASIC: &str = "Proxy-Authorization: Basic YWxpY2U6YWxpY2UtdG9rZW4=\r\n";
/// On this port the edge never answers.
pub(crate) const BLACK_HOLE: u16 = 1;

pub(crate) struct Mesh {
    pub(crate) ca: TestCa,
    pub(crate) shard: Shard,
    pub(crate) tasks: Tasks,
    pub(crate) state: watch::Sender<Arc<MeshState>>,
    pub(crate) live: LiveCredentials,
    pub(crate) records: mpsc::Receiver<AccessRecord>,
    /// Where tunnels come in over TCP.
    pub(crate) tcp: SocketAddr,
}

fn limits() -> LinkLimits {
    LinkLimits { streams: 1024, keep_alive: Some(Duration::from_secs(2)), ..LinkLimits::default() }
}

pub(crate) fn rule(name: &str, from: &str, to: &str) -> Rule {
    Rule {
        name: name.into(),
        from: vec![from.to_owned().try_into().unwrap()],
        to: vec![to.to_owned().try_into().unwrap()],
        ports: vec![Ports::ALL],
    }
}

fn token(user: &str, token: &str) -> AccessToken {
    AccessToken {
        id: user.into(),
        sha256: Sha256::digest(token).iter().map(|b| format!("{b:02x}")).collect(),
        user: user.parse().unwrap(),
        groups: Vec::new(),
        expires: clock::unix_now() + 3600,
    }
}

impl Mesh {
    /// Starts a shard, and the edge `shop-1` that announces services on these ports of this machine.
    pub(crate) async fn start(services: &[(&str, u16)]) -> Self {
        Self::start_with_config(services, |_| ()).await
    }

    pub(crate) async fn start_with_config(services: &[(&str, u16)], change: impl FnOnce(&mut ShardConfig)) -> Self {
        let ca = TestCa::new();
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let doors = DoorsConfig { proxy: Some(local), http: Some(local), https: Some(local), ..DoorsConfig::default() };
        let mut config = ShardConfig {
            listen: local,
            domain: "mesh.test".into(),
            doors,
            drain_secs: 5,
            linger_secs: 0,
            ..ShardConfig::default()
        };
        change(&mut config);
        let identity = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
        let endpoint = endpoint_config(&identity, &ca.bundle(), &limits()).unwrap();
        let event = WatchEvent {
            revision: 1,
            policy: Some(vec![
                rule("alice", "user/alice", "edge/shop-*"),
                rule("http", "door/http", "service/*"),
                rule("https", "door/https", "service/*"),
            ]),
            access_tokens: Some(vec![token("alice", TOKEN), token("bob", "bob-token")]),
            edges: Some(BTreeMap::from([("shop-1".parse().unwrap(), None), ("shop-2".parse().unwrap(), None)])),
            ..WatchEvent::default()
        };
        let (state, receiver) = watch::channel(Arc::new(MeshState::default().after(event)));
        let (sender, records) = mpsc::channel(8192);
        let live = LiveCredentials::default();
        let door = tcp_door(&identity, &ca.bundle(), local, &limits()).unwrap();
        let tcp = door.local_addr();
        let parts = Parts {
            shard: "s1".parse().unwrap(),
            peers: Dialer::new(peer_config(&identity, &ca.bundle(), &peer_limits()).unwrap(), &peer_limits()),
            identity,
            bundle: ca.bundle(),
            listener: Listener::bind(config.listen, endpoint, &limits()).unwrap().with_tcp(door),
            state: receiver,
            live: live.clone(),
            access: AccessWriter::to_channel(sender),
            metrics: Arc::new(Metrics::new(&Families::new()).unwrap()),
            renewals: mpsc::channel(1).0,
            ready: Ready::new().part("doors"),
        };
        let tasks = Tasks::new();
        let shard = start_with(&config, parts, &tasks).unwrap();
        edge(&ca, "shop-1", shard.mesh, services).await;
        let mesh = Self { ca, shard, tasks, state, live, records, tcp };
        until(|| {
            let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap());
            edge.is_some_and(|e| e.services().len() == services.len())
        })
        .await;
        mesh
    }

    /// Has the edge `shop-2` come by another way to the shard.
    pub(crate) async fn second_edge(&self, way: SocketAddr) {
        edge(&self.ca, "shop-2", way, &[]).await;
        until(|| self.shard.registry.find(&"shop-2".parse().unwrap()).is_some()).await;
    }

    /// Tries to open egress doors beside those of this mesh.
    #[allow(clippy::unwrap_in_result, reason = "the result is what is tested")]
    pub(crate) fn try_doors(&self, egress: EgressConfig) -> anyhow::Result<()> {
        let identity = LiveIdentity::new(&self.ca.issue("shard/s2")).unwrap();
        let (accepting, streams) = (Tasks::new(), Tasks::new());
        let opening = Opening {
            router: &self.shard.router,
            identity: &identity,
            accepting: &accepting,
            streams: &streams,
            metrics: self.shard.router.metrics(),
            connections: 1,
        };
        EgressDoor::open(&egress, &opening).map(drop)
    }

    pub(crate) async fn http(&self) -> Talk {
        Talk::with(self.shard.http.unwrap()).await
    }

    pub(crate) async fn proxy(&self) -> Talk {
        Talk::with(self.shard.proxy.unwrap()).await
    }

    pub(crate) async fn https(&self) -> Talk {
        Talk::with(self.shard.https.unwrap()).await
    }

    /// The next access record.
    pub(crate) async fn record(&mut self) -> AccessRecord {
        timeout(PATIENCE, self.records.recv()).await.expect("a record in time").unwrap()
    }
}

/// Waits for a condition.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("the condition in time");
}

/// An edge that greets, announces and serves.
async fn edge(ca: &TestCa, name: &str, shard: SocketAddr, services: &[(&str, u16)]) {
    let dialer = Dialer::new(quic::client_config(edge_tls(ca, name), &limits()).unwrap(), &limits());
    greet(dialer.dial(shard, "shard").await.unwrap(), name, services).await;
}

fn edge_tls(ca: &TestCa, name: &str) -> rustls::ClientConfig {
    let identity = LiveIdentity::new(&ca.issue(&format!("edge/{name}"))).unwrap();
    let verifier = Arc::new(MeshVerifier::of_servers(ca.bundle(), Role::Shard));
    tls::client_config(Some(&identity), verifier, &[ALPN_MESH]).unwrap()
}

/// The same over TCP.
pub(crate) async fn edge_over_tcp(mesh: &Mesh, name: &str, services: &[(&str, u16)]) -> Link {
    let dialer = TcpDialer::new(edge_tls(&mesh.ca, name), &limits());
    let link = dialer.dial(mesh.tcp, "shard").await.unwrap();
    greet(link.clone(), name, services).await;
    link
}

async fn greet(link: Link, name: &str, services: &[(&str, u16)]) {
    let mut control = link.open().await.unwrap();
    let hello = Hello {
        name: name.parse().unwrap(),
        instance: 1,
        version: "test".into(),
        unix_ms: clock::unix_millis(),
        epoch: 0,
        avoid: vec![],
    };
    control.send.write_one(EdgeToShard::Hello(hello).encode().unwrap()).await.unwrap();
    let mut reader = FrameReader::new(MAX_SHARD_TO_EDGE);
    let welcome = reader.next(&mut control.recv).await.unwrap().unwrap();
    assert!(matches!(ShardToEdge::decode(welcome).unwrap(), Some(ShardToEdge::Welcome(_))));
    let announced = services.iter().map(|(name, port)| Service {
        name: name.parse().unwrap(),
        kind: ServiceKind::Http,
        port: *port,
        labels: BTreeMap::new(),
    });
    control.send.write_one(EdgeToShard::Announce(announced.collect()).encode().unwrap()).await.unwrap();
    let ports = services.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect();
    tokio::spawn(accept(link, control, Arc::new(ports)));
}

async fn accept(link: Link, _control: Stream, ports: Arc<BTreeMap<String, u16>>) {
    while let Ok(stream) = link.accept().await {
        tokio::spawn(serve(stream, Arc::clone(&ports)));
    }
}

async fn serve(mut stream: Stream, ports: Arc<BTreeMap<String, u16>>) {
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let Ok(Some(head)) = reader.next(&mut stream.recv).await else { return };
    stream.recv.unread(reader.into_rest());
    let open = Open::decode(head).unwrap();
    if open.datagrams {
        return serve_flow(stream, open.target).await;
    }
    let port = match open.target {
        Target::Tcp { to, .. } => to.port,
        Target::Service { name, .. } => ports[name.as_str()],
        other @ (Target::Udp { .. } | Target::Probe { .. }) => panic!("no test asks for {other}"),
    };
    if port == BLACK_HOLE {
        stream.send.refused().await;
        return;
    }
    let answer = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(socket) => Ok(socket),
        Err(_) => Err(Answer::Refused(Refusal::new(RefuseCode::TargetRefused))),
    };
    match answer {
        Ok(socket) => {
            let address = socket.peer_addr().unwrap().to_string();
            let opened = Answer::Opened { edge: "shop-1".parse().unwrap(), address };
            if stream.send.write_one(opened.encode()).await.is_ok() {
                let end = TcpEnd::new(socket, bytes::Bytes::new()).unwrap();
                let _ = splice(end, stream, &Arc::new(Meter::default()), &CancellationToken::new()).await;
            }
        }
        Err(refused) => {
            if stream.send.write_one(refused.encode()).await.is_ok() {
                stream.send.finish();
                let _ = stream.send.delivered().await;
            }
        }
    }
}

async fn serve_flow(mut stream: Stream, target: Target) {
    let Target::Udp { edge, to } = target else { panic!("no test asks for {target}") };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, to.port));
    let opened = Answer::Opened { edge, address: address.to_string() };
    stream.send.write_one(opened.encode()).await.unwrap();
    let (mut shard, mut target) = (flow::stream::side(stream), socket::side(socket::connect(address).await.unwrap()));
    shard.sink.opened();
    let (meter, cancel) = (Meter::default(), CancellationToken::new());
    let terms = Terms { meter: &meter, idle: None, cancel: &cancel };
    let _ = relay(&mut shard, &mut target, &terms).await;
}

/// A UDP service that sends back what it gets.
pub(crate) async fn udp_echo() -> u16 {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = socket.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    port
}

/// A service that a test plays by hand.
pub(crate) struct Stage(TcpListener);

impl Stage {
    pub(crate) async fn new() -> Self {
        Self(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap())
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    /// The next connection.
    pub(crate) async fn enter(&self) -> Talk {
        let (socket, _) = timeout(PATIENCE, self.0.accept()).await.expect("a connection in time").unwrap();
        Talk::new(socket)
    }

    /// Whether anybody has come who was not let in.
    pub(crate) async fn is_lonely(&self) -> bool {
        timeout(Duration::from_millis(50), self.0.accept()).await.is_err()
    }
}

/// A service that answers every connection with the bytes that it gets.
pub(crate) async fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = socket.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    port
}

/// An HTTP service that answers every request with `name`.
pub(crate) async fn web(name: &'static str) -> u16 {
    let stage = Stage::new().await;
    let port = stage.port();
    tokio::spawn(async move {
        loop {
            let mut talk = stage.enter().await;
            tokio::spawn(async move {
                while let Some(head) = talk.try_head().await {
                    let body = format!("{name}: {head}");
                    talk.say(&format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())).await;
                }
            });
        }
    });
    port
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Cleanly,
    ByReset,
}

/// One side of a connection, spoken by hand.
pub(crate) struct Talk {
    pub(crate) socket: TcpStream,
    heard: Vec<u8>,
}

impl Talk {
    pub(crate) async fn with(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).await.unwrap())
    }

    fn new(socket: TcpStream) -> Self {
        socket.set_nodelay(true).unwrap();
        Self { socket, heard: Vec::new() }
    }

    pub(crate) async fn say(&mut self, text: &str) {
        self.say_bytes(text.as_bytes()).await;
    }

    pub(crate) async fn say_bytes(&mut self, bytes: &[u8]) {
        // Whoever has been turned away may not hear the rest.
        let _ = self.socket.write_all(bytes).await;
    }

    /// Says that there is no more.
    pub(crate) async fn finish(&mut self) {
        self.socket.shutdown().await.unwrap();
    }

    /// Reads up to and with `mark`.
    pub(crate) async fn hear(&mut self, mark: &str) -> String {
        match self.try_hear(mark).await {
            Some(text) => text,
            None => panic!("{mark:?} did not come, but {:?}", String::from_utf8_lossy(&self.heard)),
        }
    }

    async fn try_hear(&mut self, mark: &str) -> Option<String> {
        let hearing = async {
            loop {
                if let Some(at) = self.heard.windows(mark.len()).position(|w| w == mark.as_bytes()) {
                    let rest = self.heard.split_off(at + mark.len());
                    let text = std::mem::replace(&mut self.heard, rest);
                    return Some(String::from_utf8_lossy(&text).into_owned());
                }
                match self.socket.read_buf(&mut self.heard).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        timeout(PATIENCE, hearing).await.ok()?
    }

    /// Reads a head.
    pub(crate) async fn head(&mut self) -> String {
        self.hear("\r\n\r\n").await
    }

    pub(crate) async fn try_head(&mut self) -> Option<String> {
        self.try_hear("\r\n\r\n").await
    }

    /// Reads a response with a length.
    pub(crate) async fn response(&mut self) -> (String, String) {
        let head = self.head().await;
        let length = head
            .lines()
            .filter_map(|l| l.split_once(": "))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map_or(0, |(_, value)| value.trim().parse().unwrap());
        (head, self.exactly(length).await)
    }

    pub(crate) async fn exactly(&mut self, length: usize) -> String {
        String::from_utf8_lossy(&self.exactly_bytes(length).await).into_owned()
    }

    pub(crate) async fn exactly_bytes(&mut self, length: usize) -> Vec<u8> {
        let reading = async {
            while self.heard.len() < length {
                assert_ne!(self.socket.read_buf(&mut self.heard).await.unwrap(), 0, "it ended early");
            }
        };
        timeout(PATIENCE, reading).await.expect("all bytes in time");
        let rest = self.heard.split_off(length);
        std::mem::replace(&mut self.heard, rest)
    }

    /// Reads everything until the end, as text.
    pub(crate) async fn rest(&mut self) -> (String, Ended) {
        let (bytes, ended) = self.rest_bytes().await;
        (String::from_utf8_lossy(&bytes).into_owned(), ended)
    }

    /// Reads everything until the end.
    pub(crate) async fn rest_bytes(&mut self) -> (Vec<u8>, Ended) {
        let reading = async {
            loop {
                match self.socket.read_buf(&mut self.heard).await {
                    Ok(0) => return Ended::Cleanly,
                    Ok(_) => {}
                    Err(_) => return Ended::ByReset,
                }
            }
        };
        let ended = timeout(PATIENCE, reading).await.expect("the end in time");
        (std::mem::take(&mut self.heard), ended)
    }

    /// Closes with a reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
}
