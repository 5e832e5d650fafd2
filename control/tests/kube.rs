//! Stories of a cluster, told by a hand-made kube-apiserver that speaks as much of its API as control listens to.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

#[path = "stories/apiserver.rs"]
mod apiserver;
#[path = "stories/world.rs"]
#[allow(dead_code, reason = "other stories need another part of it")]
mod world;

use std::{sync::Arc, time::Duration};

use apiserver::ApiServer;
use proto::{
    api::{ApiCode, ShardReport, ShardState, TokenKind, WatchEvent},
    book::{Book, BookChange, ObjectKey},
    join::JoinLine,
    secret::Secret,
};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair};
use runtime::api::Watch;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use world::{Kind, World, code, event, until};

const SECOND: Duration = Duration::from_secs(1);

fn node(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "resourceVersion": "1"}, "spec": {},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]}
    })
}

fn pod(name: &str, node: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "mesh", "resourceVersion": "1", "labels": {"app": "shard"}},
        "spec": {"nodeName": node}, "status": {"phase": "Running", "podIP": ip}
    })
}

async fn world(server: &ApiServer, metrics: bool) -> World {
    let kubeconfig = server.kubeconfig();
    World::with(Kind::Sqlite, |config| {
        let kubernetes = &mut config.kubernetes;
        (kubernetes.enabled, kubernetes.kubeconfig) = (true, Some(kubeconfig));
        kubernetes.shard_accounts = vec![ObjectKey::new("mesh", "shard")];
        kubernetes.metrics_listen = metrics.then(|| "127.0.0.1:0".parse().unwrap());
    })
    .await
}

/// A shard's book, and how it got it.
struct Follower {
    watch: Watch,
    book: Book,
}

impl Follower {
    fn new(watch: Watch) -> Self {
        Self { watch, book: Book::default() }
    }

    fn leads(&self, host: &str) -> Option<String> {
        self.book.resolve(host, 10250, 0).ok().map(|to| format!("{} {}", to.edge, to.to))
    }

    /// Follows until a request leads there.
    async fn until(&mut self, host: &str, leads: Option<&str>) -> bool {
        let mut fresh = false;
        while self.leads(host).as_deref() != leads {
            let WatchEvent { book, .. } = event(&mut self.watch, 10 * SECOND, |e| e.book.is_some()).await;
            let BookChange { fresh: begins, put, gone, .. } = book.unwrap();
            if begins {
                self.book = Book::default();
            }
            fresh |= begins;
            self.book.remove(&gone);
            self.book.put(put);
        }
        fresh
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_have_the_book_of_the_cluster_and_keep_the_last_one() {
    let server = ApiServer::start(None).await;
    server.put("nodes", node("shop-1", "192.168.1.5"));
    let world = world(&server, false).await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let mut follower = Follower::new(shard.client.watch().await.unwrap());
    assert!(follower.watch.next().await.unwrap().policy.is_some(), "the sections come first");
    let unenrolled = event(&mut follower.watch, 10 * SECOND, |e| e.book.is_some()).await.book.unwrap();
    assert!(unenrolled.fresh);
    follower.book.put(unenrolled.put);
    assert!(follower.book.resolve("shop-1", 10250, 0).unwrap_err().to_string().contains("no edge of the mesh"));
    world.member(TokenKind::Edge, "shop-1").await;
    assert!(!follower.until("shop-1", Some("shop-1 192.168.1.5:10250")).await, "it changes and does not begin anew");
    server.put("pods", pod("web", "shop-1", "10.1.0.5"));
    follower.until("10.1.0.5", Some("shop-1 10.1.0.5:10250")).await;
    server.delete("pods", &pod("web", "shop-1", "10.1.0.5"));
    follower.until("10.1.0.5", None).await;
    server.put("pods", pod("db", "shop-1", "10.1.0.6"));
    follower.until("10.1.0.6", Some("shop-1 10.1.0.6:10250")).await;
    let ready = world.control.ready.clone();
    until("what /readyz says", 10 * SECOND, async || ready.report().contains("1 edges among 1 nodes, 1 pods")).await;

    // The cluster is away: the book stays, and a control that starts anew has it too.
    let url = control::store::open::sqlite_url(&world.config.data_dir.join("control.db")).unwrap();
    let errors = prometheus::IntCounter::new("errors", "errors").unwrap();
    let store = control::store::Store::open(&url, errors).await.unwrap();
    until("the book to be written down", 30 * SECOND, async || store.book().await.unwrap().len() == 2).await;
    store.close().await;
    server.stop().await;
    until("that to be told", 60 * SECOND, async || ready.report().contains("is in force")).await;
    assert!(ready.is_ready(), "control has the last book: {}", ready.report());
    assert!(world.control.metrics.kube_errors.with_label_values(&["pods"]).get() > 0);
    let world = world.restarted(|_| ()).await;
    let shard = shard.at(&world.address());
    let mut follower = Follower::new(shard.watch().await.unwrap());
    assert!(follower.until("10.1.0.6", Some("shop-1 10.1.0.6:10250")).await);

    // It is back, and other things have happened meanwhile.
    let port = server.port;
    let server = ApiServer::start(Some(port)).await;
    server.put("nodes", node("shop-1", "192.168.1.7"));
    follower.until("10.1.0.6", None).await;
    follower.until("192.168.1.7", Some("shop-1 192.168.1.7:10250")).await;
    server.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_enrols_as_the_shard_of_its_name() {
    let server = ApiServer::start(None).await;
    let world = world(&server, false).await;
    let line = world.join(TokenKind::Shard, |_| ()).await;
    let with = |token: &str| JoinLine { token: Secret::new(token.to_owned()), ..line.clone() };
    let shard = world.enrol(&with("eyJ.shard-a.sig"), None, &[]).await.unwrap();
    assert_eq!(shard.credentials.facts().identity.to_string(), "spiffe://mesh.test/shard/shard-a");
    assert!(shard.client.watch().await.is_ok(), "and is a shard like any other");
    assert!(world.enrol(&with("eyJ.shard-a.sig"), Some("shard-a"), &[]).await.is_ok(), "it may start again");
    assert_eq!(code(world.enrol(&with("eyJ.shard-a.sig"), Some("shard-b"), &[]).await), ApiCode::TokenMismatch);
    assert_eq!(code(world.enrol(&with("eyJ.unknown.sig"), None, &[]).await), ApiCode::TokenUnknown);
    server.stop().await;
    assert_eq!(code(world.enrol(&with("eyJ.shard-a.sig"), None, &[]).await), ApiCode::StoreUnavailable);
    world.end().await;
}

/// A CA and a client certificate of it.
fn front_proxy(name: &str) -> (String, CertificateDer<'static>, PrivateKeyDer<'static>) {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::from_params(&params, &ca_key);
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name.push(DnType::CommonName, name);
    leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    (ca.pem(), leaf.der().clone(), PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap())
}

/// What kube-apiserver's aggregation layer is answered: the status, and the body.
async fn ask(
    world: &World,
    client: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    path: &str,
) -> std::io::Result<(u16, Value)> {
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(world.control.bundle_pem().as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let builder = rustls::ClientConfig::builder_with_provider(runtime::tls::provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let tls = match client {
        Some((leaf, key)) => builder.with_client_auth_cert(vec![leaf], key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    let socket = TcpStream::connect(world.control.metrics_api.unwrap()).await?;
    let mut stream = TlsConnector::from(Arc::new(tls)).connect("localhost".try_into().unwrap(), socket).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    Ok((head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_autoscaler_asks_through_the_front_proxy_and_nobody_else_does() {
    let (ca, leaf, key) = front_proxy("front-proxy-client");
    let server = ApiServer::start(None).await;
    server.front_proxy(&ca, &["front-proxy-client"]);
    server.put("pods", pod("shard-a", "cloud-1", "10.1.0.5"));
    server.put("pods", pod("shard-b", "cloud-1", "10.1.0.6"));
    let world = world(&server, true).await;
    let shard = world.member(TokenKind::Shard, "shard-a").await;
    let report = ShardReport {
        started: 0,
        number: 0,
        addresses: vec!["a:1".into()],
        version: "1".into(),
        state: ShardState::Serving,
        weight: 100,
        epoch: 0,
        streams: 12,
        bytes: 0,
        handshakes: 0,
        full: true,
        online: vec![],
        offline: vec![],
        partings: vec![],
    };
    shard.client.post::<()>("/v1/shards/report", &report).await.unwrap();
    let front = || Some((leaf.clone(), key.clone_key()));
    let base = "/apis/custom.metrics.k8s.io/v1beta2";
    until("the front proxy to be known", 10 * SECOND, async || ask(&world, front(), base).await.is_ok()).await;
    let (status, list) = ask(&world, front(), base).await.unwrap();
    assert_eq!((status, &list["resources"][0]["name"]), (200, &json!("pods/mesh_shard_tunnels")));
    let path = format!("{base}/namespaces/mesh/pods/*/mesh_shard_streams?labelSelector=app%3Dshard");
    let (status, values) = ask(&world, front(), &path).await.unwrap();
    let items = values["items"].as_array().unwrap();
    assert_eq!((status, items.len()), (200, 1), "the other one has not reported: {values}");
    assert_eq!((&items[0]["describedObject"]["name"], &items[0]["value"]), (&json!("shard-a"), &json!("12")));
    assert_eq!(server.asked("pods").last().unwrap(), "labelSelector=app%3Dshard");
    for (path, expected) in [
        (format!("{base}/namespaces/mesh/pods/shard-a/nodes_per_pod"), 200),
        (format!("{base}/namespaces/mesh/pods/shard-b/nodes_per_pod"), 404),
        (format!("{base}/namespaces/mesh/pods/*/nonsense"), 404),
        ("/apis".to_owned(), 200),
        ("/metrics".to_owned(), 404),
    ] {
        assert_eq!(ask(&world, front(), &path).await.unwrap().0, expected, "{path}");
    }
    assert!(ask(&world, None, base).await.is_err(), "without a certificate");
    let (_, leaf, key) = front_proxy("front-proxy-client");
    assert!(ask(&world, Some((leaf, key)), base).await.is_err(), "of another CA");
    server.stop().await;
    world.end().await;
}
