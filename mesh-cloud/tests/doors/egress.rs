//! The egress door over HTTPConnect, byte by byte as kube-apiserver speaks it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_cloud::config::{EgressConfig, EgressTcpConfig, Mode, ShardConfig};
use proto::{
    api::WatchEvent,
    book::{AddressKind, BookChange, BookSpec, Endpoint, Node, NodeAddress, ObjectKey, Pod, Service, ServicePort},
    identity::Role,
};
use runtime::tls::{self, LiveIdentity, MeshVerifier, testing::TestCa};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::mesh::{BLACK_HOLE, Mesh, PATIENCE, Stage, echo, rule, until};

pub(crate) const ESTABLISHED: &str = "HTTP/1.1 200 Connection Established\r\n\r\n";

/// A folder for sockets and certificates.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cw-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn node(name: &str, ips: &[&str]) -> Node {
    let address = |ip: &&str| NodeAddress { kind: AddressKind::InternalIP, address: (*ip).to_owned() };
    Node {
        name: name.into(),
        edge: Some(name.parse().unwrap()),
        addresses: ips.iter().map(address).collect(),
        kubelet_port: 10250,
        pod_cidrs: vec![],
    }
}

fn endpoint(ip: &str, port: u16) -> Endpoint {
    Endpoint { ip: ip.parse().unwrap(), port, node: None }
}

/// What control says of a cluster whose only living node is `shop-1`.
fn book(hook: u16) -> BookChange {
    let pod = |name: &str, node: &str, ip: &str| Pod {
        key: ObjectKey::new("default", name),
        ips: vec![ip.parse().unwrap()],
        node: node.into(),
        host_network: false,
    };
    let hook = Service {
        key: ObjectKey::new("default", "hook"),
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: String::new(),
            port: 443,
            endpoints: vec![endpoint("10.244.2.1", hook), endpoint("10.244.1.1", hook)],
        }],
    };
    let put = BookSpec {
        nodes: vec![
            node("shop-1", &["10.0.0.1", "fd00::1", "192.168.1.5"]),
            node("shop-2", &["10.0.0.2", "192.168.1.5"]),
        ],
        pods: vec![pod("here", "shop-1", "10.244.1.1"), pod("there", "shop-2", "10.244.2.1")],
        services: vec![hook],
    };
    BookChange { fresh: true, put, ..BookChange::default() }
}

/// A mesh with the egress door on a unix socket, kube-apiserver allowed everything, and a book.
pub(crate) async fn mesh(folder: &Folder, hook: u16, change: impl FnOnce(&mut EgressConfig)) -> Mesh {
    let mut egress = EgressConfig { socket: Some(folder.file("e.sock")), ..EgressConfig::default() };
    change(&mut egress);
    let mesh = Mesh::start_with_config(&[], |config: &mut ShardConfig| config.doors.egress = egress).await;
    tell(
        &mesh,
        WatchEvent {
            policy: Some(vec![rule("kubernetes", "apiserver", "edge/*")]),
            book: Some(book(hook)),
            ..WatchEvent::default()
        },
    );
    mesh
}

fn tell(mesh: &Mesh, event: WatchEvent) {
    let next = mesh.state.borrow().after(WatchEvent { revision: 2, ..event });
    mesh.state.send_replace(Arc::new(next));
}

pub(crate) async fn call(folder: &Folder, target: &str) -> UnixStream {
    let mut socket = UnixStream::connect(folder.file("e.sock")).await.unwrap();
    ask(&mut socket, target).await;
    socket
}

async fn ask<C: AsyncWrite + Unpin>(socket: &mut C, target: &str) {
    // As kube-apiserver does it, with a Host that means nothing.
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
}

/// What one read brings, as Go's buffered reader would see it.
async fn one_read<C: AsyncRead + Unpin>(socket: &mut C) -> String {
    let mut buffer = vec![0; 8192];
    let read = timeout(PATIENCE, socket.read(&mut buffer)).await.expect("an answer in time").unwrap();
    String::from_utf8_lossy(&buffer[..read]).into_owned()
}

async fn exactly<C: AsyncRead + Unpin>(socket: &mut C, length: usize) -> Vec<u8> {
    let mut buffer = vec![0; length];
    timeout(PATIENCE, socket.read_exact(&mut buffer)).await.expect("all bytes in time").unwrap();
    buffer
}

pub(crate) async fn rest<C: AsyncRead + Unpin>(socket: &mut C) -> Vec<u8> {
    let mut all = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut all)).await.expect("the end in time").unwrap();
    all
}

/// The first line of a refusal; its body has to say the same.
async fn refused(folder: &Folder, target: &str) -> String {
    let mut socket = call(folder, target).await;
    let text = String::from_utf8(rest(&mut socket).await).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    head.lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn the_answer_is_exactly_this_and_the_target_waits_for_the_client_to_have_read_it() {
    let folder = Folder::new("exact");
    let mesh = mesh(&folder, 1, |_| ()).await;
    let stage = Stage::new().await;
    let mut socket = call(&folder, &format!("shop-1:{}", stage.port())).await;
    let mut target = stage.enter().await;
    target.say("a target that speaks first").await;
    assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    assert_eq!(one_read(&mut socket).await, "a target that speaks first");

    // Whoever has sent something early has it passed on, and nothing is held back.
    let port = echo().await;
    let mut eager = UnixStream::connect(folder.file("e.sock")).await.unwrap();
    let words = format!("CONNECT shop-1:{port} HTTP/1.1\r\n\r\nearly");
    eager.write_all(words.as_bytes()).await.unwrap();
    let heard = exactly(&mut eager, ESTABLISHED.len() + 5).await;
    assert_eq!(String::from_utf8_lossy(&heard), format!("{ESTABLISHED}early"));
    drop((socket, eager, target));
    until(|| mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap().streams() == 0).await;
}

#[tokio::test]
async fn targets_are_what_kube_apiserver_calls_them() {
    let folder = Folder::new("forms");
    let port = echo().await;
    let mut mesh = mesh(&folder, port, |_| ()).await;
    for (target, expected) in [
        (format!("shop-1:{port}"), format!("shop-1/10.0.0.1:{port}")),
        (format!("10.0.0.1:{port}"), format!("shop-1/10.0.0.1:{port}")),
        (format!("[fd00::1]:{port}"), format!("shop-1/[fd00::1]:{port}")),
        (format!("10.244.1.1:{port}"), format!("shop-1/10.244.1.1:{port}")),
    ] {
        let mut socket = call(&folder, &target).await;
        assert_eq!(one_read(&mut socket).await, ESTABLISHED, "{target}");
        socket.write_all(b"ping").await.unwrap();
        socket.shutdown().await.unwrap();
        assert_eq!(rest(&mut socket).await, b"ping", "{target}");
        let record = mesh.record().await;
        assert_eq!(
            (record.who.as_str(), &*record.outcome, record.target),
            ("apiserver", "finished", expected),
            "{target}"
        );
        assert_eq!((record.door.as_str(), record.rule.as_str()), ("egress", "kubernetes"));
    }
    // Of a service's endpoints, the one on an edge that is away is passed over.
    for _ in 0..4 {
        let mut socket = call(&folder, "hook.default.svc:443").await;
        assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    }
}

#[tokio::test]
async fn a_refusal_names_its_cause_in_the_first_line() {
    let folder = Folder::new("refused");
    let mesh = mesh(&folder, 1, |_| ()).await;
    for (target, expected) in [
        (
            "shop-2:10250",
            "HTTP/1.1 503 edge-offline edge/shop-2 is not connected, and was not since this shard started",
        ),
        (
            "192.168.1.5:10250",
            "HTTP/1.1 502 ambiguous node address 192.168.1.5: shop-1, shop-2; set --kubelet-preferred-address-types=Hostname",
        ),
        (
            "8.8.8.8:53",
            "HTTP/1.1 502 unknown-host 8.8.8.8:53 is no node, pod or service of the cluster; nothing is dialled past the mesh",
        ),
        (
            "kubernetes.default.svc:443",
            "HTTP/1.1 502 unknown-host kubernetes.default.svc:443 is no node, pod or service of the cluster; nothing is dialled past the mesh",
        ),
        ("10.96.0.1:80", "HTTP/1.1 502 no-port service default/hook has no TCP port 80"),
        ("shop-1:2", "HTTP/1.1 502 target-refused The target refused the connection: nothing listens on that port."),
        (
            "shop-1",
            "HTTP/1.1 400 bad-request the request target is wrong: \"shop-1\" names no port and no service; write EDGE:PORT, EDGE/HOST:PORT or EDGE/SERVICE",
        ),
    ] {
        assert_eq!(refused(&folder, target).await, expected, "{target}");
    }
    tell(&mesh, WatchEvent { policy: Some(vec![]), ..WatchEvent::default() });
    let denied = refused(&folder, "shop-1:10250").await;
    assert!(
        denied.starts_with("HTTP/1.1 403 policy-denied no rule allows apiserver to reach shop-1/10.0.0.1:10250; "),
        "{denied}"
    );
    assert!(denied.ends_with("meshctl policy allow --from apiserver --to edge/shop-1 --ports 10250"), "{denied}");

    let mut socket = UnixStream::connect(folder.file("e.sock")).await.unwrap();
    socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(one_read(&mut socket).await.starts_with("HTTP/1.1 405 method-not-allowed "));
}

#[tokio::test]
async fn without_a_book_edges_are_found_by_their_names_and_the_rest_at_once_is_not() {
    let folder = Folder::new("bookless");
    let egress = EgressConfig { socket: Some(folder.file("e.sock")), ..EgressConfig::default() };
    let mesh = Mesh::start_with_config(&[], |config| config.doors.egress = egress).await;
    tell(&mesh, WatchEvent { policy: Some(vec![rule("k", "apiserver", "edge/*")]), ..WatchEvent::default() });
    let port = echo().await;
    let mut socket = call(&folder, &format!("shop-1:{port}")).await;
    assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    let begun = Instant::now();
    assert!(refused(&folder, "10.0.0.1:10250").await.starts_with("HTTP/1.1 503 no-book control has not said yet "));
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_silent_edge_is_answered_for_within_the_bound() {
    let folder = Folder::new("silent");
    let mut mesh = mesh(&folder, 1, |egress| egress.within_secs = 0.4).await;
    let begun = Instant::now();
    let line = refused(&folder, &format!("shop-1:{BLACK_HOLE}")).await;
    assert_eq!(line, "HTTP/1.1 504 mesh-timeout edge/shop-1 did not answer in time; its link may be down");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let record = mesh.record().await;
    assert_eq!((&*record.outcome, &*record.code), ("refused", "mesh-timeout"));
    assert!(EgressConfig::default().within_secs < 10.0);
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_dial_along() {
    let folder = Folder::new("leaves");
    let mut mesh = mesh(&folder, 1, |_| ()).await;
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    let socket = call(&folder, &format!("shop-1:{BLACK_HOLE}")).await;
    until(|| edge.streams() == 1).await;
    drop(socket);
    until(|| edge.streams() == 0).await;
    assert_eq!(mesh.record().await.outcome, "cancelled");
    let inside = mesh.shard.router.metrics().door_connections.with_label_values(&["egress"]);
    until(|| inside.get() == 0).await;
}

#[tokio::test]
async fn each_direction_ends_by_itself_and_delivers_everything_first() {
    let folder = Folder::new("halves");
    let mesh = mesh(&folder, 1, |_| ()).await;
    let stage = Stage::new().await;
    let target = format!("shop-1:{}", stage.port());
    let many = vec![7_u8; 3_000_000];

    // The client ends first, and the target goes on.
    let mut socket = call(&folder, &target).await;
    let mut other = stage.enter().await;
    assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    let (mut reader, mut writer) = socket.into_split();
    let sending = async {
        writer.write_all(&many).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let (heard, ()) = tokio::join!(other.rest(), sending);
    assert_eq!(heard.0.len(), many.len());
    other.say_bytes(&many).await;
    other.finish().await;
    assert_eq!(rest(&mut reader).await, many);

    // The target ends first, and the client goes on.
    let mut socket = call(&folder, &target).await;
    let mut other = stage.enter().await;
    assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    let sending = async {
        other.say_bytes(&many).await;
        other.finish().await;
    };
    let (heard, ()) = tokio::join!(rest(&mut socket), sending);
    assert_eq!(heard, many);
    socket.write_all(&many).await.unwrap();
    socket.shutdown().await.unwrap();
    assert_eq!(other.rest().await.0.len(), many.len());
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 0).await;
}

#[tokio::test]
async fn the_socket_is_for_its_owner_replaces_a_dead_one_and_goes_with_its_process() {
    let folder = Folder::new("socket");
    let path = folder.file("e.sock");
    // A crash leaves a file that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut mesh = mesh(&folder, 1, |egress| egress.mode = Mode(0o660)).await;
    let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);
    assert!(refused(&folder, "8.8.8.8:1").await.contains("502"));

    // A second process does not take the socket of a living one away.
    let config = EgressConfig { socket: Some(path.clone()), ..EgressConfig::default() };
    let error = Mesh::try_doors(&mesh, config).unwrap_err();
    assert!(format!("{error:#}").contains(&format!("another process serves {}", path.display())), "{error:#}");
    // Nor does anybody write over what is no socket.
    let file = folder.file("file");
    std::fs::write(&file, "precious").unwrap();
    let error =
        Mesh::try_doors(&mesh, EgressConfig { socket: Some(file.clone()), ..EgressConfig::default() }).unwrap_err();
    assert!(format!("{error:#}").contains("is no socket"), "{error:#}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    assert_eq!(mesh.tasks.drained(PATIENCE).await, 0);
    assert!(!path.exists(), "it goes with its process");
    mesh.records.close();
}

/// Writes the certificate files of the TCP side.
struct Files<'a> {
    folder: &'a Folder,
}

impl Files<'_> {
    fn cas(&self, cas: &[&TestCa]) -> PathBuf {
        let path = self.folder.file("clients.pem");
        let text: String = cas.iter().map(|ca| ca.bundle().to_pem()).collect();
        runtime::identity::write_atomically(&path, text.as_bytes()).unwrap();
        path
    }
}

async fn over_tls(
    address: SocketAddr,
    server_ca: &TestCa,
    client: Option<(&TestCa, &str)>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let identity = client.map(|(ca, who)| LiveIdentity::new(&ca.issue(who)).unwrap());
    let verifier = Arc::new(MeshVerifier::of_servers(server_ca.bundle(), Role::Shard));
    // No ALPN, as kube-apiserver does it.
    let config = tls::client_config(identity.as_ref(), verifier, &[]).unwrap();
    let socket = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect("mesh-egress".try_into().unwrap(), socket).await
}

async fn answer_over_tls(mesh: &Mesh, client: Option<(&TestCa, &str)>, target: &str) -> Option<String> {
    let mut tls = over_tls(mesh.shard.egress.unwrap(), &mesh.ca, client).await.ok()?;
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    tls.write_all(head.as_bytes()).await.ok()?;
    let mut buffer = vec![0; 4096];
    // With TLS 1.3 a client hears of its certificate's refusal with the first read.
    let read = timeout(PATIENCE, tls.read(&mut buffer)).await.expect("an answer in time").ok()?;
    Some(String::from_utf8_lossy(&buffer[..read]).into_owned())
}

#[tokio::test]
async fn over_tcp_a_client_certificate_of_the_right_ca_and_name_is_needed_and_files_are_followed() {
    let folder = Folder::new("tls");
    let (old, new) = (TestCa::new(), TestCa::new());
    let files = Files { folder: &folder };
    let client_ca = files.cas(&[&old]);
    let port = echo().await;
    let mesh = mesh(&folder, port, |egress| {
        egress.tcp = Some(EgressTcpConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            cert: None,
            key: None,
            client_ca,
            clients: vec!["spiffe://mesh.test/user/kube-apiserver".into()],
        });
    })
    .await;
    let target = format!("shop-1:{port}");
    let kas = "user/kube-apiserver";
    assert_eq!(answer_over_tls(&mesh, Some((&old, kas)), &target).await.as_deref(), Some(ESTABLISHED));
    let other = answer_over_tls(&mesh, Some((&old, "user/kubelet")), &target).await.unwrap();
    assert!(other.starts_with("HTTP/1.1 403 client-denied the client certificate is for "), "{other}");
    assert!(other.contains("spiffe://mesh.test/user/kubelet, which doors.egress.tcp.clients does not list"), "{other}");
    assert_eq!(answer_over_tls(&mesh, None, &target).await, None, "without a certificate");
    assert_eq!(answer_over_tls(&mesh, Some((&new, kas)), &target).await, None, "of another CA");

    // While kube-apiserver is moved to a new CA, both are good; then only the new one is.
    let changes = |outcome: &str| mesh.shard.router.metrics().egress_files.with_label_values(&[outcome]).get();
    files.cas(&[&old, &new]);
    until(|| changes("taken") == 1).await;
    assert_eq!(answer_over_tls(&mesh, Some((&new, kas)), &target).await.as_deref(), Some(ESTABLISHED));
    assert_eq!(answer_over_tls(&mesh, Some((&old, kas)), &target).await.as_deref(), Some(ESTABLISHED));
    // A file that is no use changes nothing.
    std::fs::write(folder.file("clients.pem"), "nonsense").unwrap();
    until(|| changes("unusable") == 1).await;
    assert_eq!(answer_over_tls(&mesh, Some((&new, kas)), &target).await.as_deref(), Some(ESTABLISHED));
    files.cas(&[&new]);
    until(|| changes("taken") == 2).await;
    assert_eq!(answer_over_tls(&mesh, Some((&old, kas)), &target).await, None, "of the CA that is gone");

    // And it carries bytes, in both directions, to a clean end.
    let mut tls = over_tls(mesh.shard.egress.unwrap(), &mesh.ca, Some((&new, kas))).await.unwrap();
    ask(&mut tls, &target).await;
    assert_eq!(one_read(&mut tls).await, ESTABLISHED);
    let many = vec![9_u8; 1_000_000];
    let (mut reader, mut writer) = tokio::io::split(tls);
    let sending = async {
        writer.write_all(&many).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let (heard, ()) = tokio::join!(rest(&mut reader), sending);
    assert_eq!(heard, many);
}

#[tokio::test]
async fn a_broken_target_is_not_taken_for_one_that_has_ended() {
    let folder = Folder::new("broken");
    let mut mesh = mesh(&folder, 1, |_| ()).await;
    let stage = Stage::new().await;
    let mut socket = call(&folder, &format!("shop-1:{}", stage.port())).await;
    let other = stage.enter().await;
    assert_eq!(one_read(&mut socket).await, ESTABLISHED);
    other.reset();
    // A unix socket knows no reset; the connection is gone in both directions, and the record says so.
    let _ = rest(&mut socket).await;
    assert_eq!(mesh.record().await.outcome, "reset");
    assert!(timeout(PATIENCE, async { while socket.write_all(b"x").await.is_ok() {} }).await.is_ok());
}
