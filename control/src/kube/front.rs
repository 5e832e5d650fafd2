//! The listener for `custom.metrics.k8s.io`: kube-apiserver's aggregation layer and nobody else.
//!
//! kube-apiserver has authenticated and authorised whoever asks; it shows that it is itself by a client certificate of the
//! front-proxy CA, which stands in the ConfigMap `kube-system/extension-apiserver-authentication`. Nobody without such a
//! certificate gets through the handshake.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use anyhow::Context;
use axum::{
    Router,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, api::ListParams};
use runtime::{
    admin::ReadyPart,
    clock::unix_now,
    shutdown::Tasks,
    tls::{LiveIdentity, provider},
};
use rustls::{
    RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde::Deserialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    hpa::{self, VERSIONS},
    objects::Pod,
};
use crate::presence::Presence;

/// Where the front proxy's CA stands.
const NAMESPACE: &str = "kube-system";
const CONFIG_MAP: &str = "extension-apiserver-authentication";
/// How often it is read again, and how soon after a failure.
const READ: Duration = Duration::from_secs(60);
const READ_AGAIN: Duration = Duration::from_secs(5);
/// Longest handshake, longest time for a request's head, and for kube-apiserver's answer to which pods there are.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once; kube-apiservers keep one or two each.
const CONNECTIONS: usize = 128;
/// Most pods of one answer.
const PODS: u32 = 5000;

/// Whom the front proxy may be.
#[derive(Clone, Debug)]
struct Front {
    tls: Arc<ServerConfig>,
    /// Common names; empty for any.
    names: Arc<Vec<String>>,
}

/// What the answers are made of.
#[derive(Clone)]
struct Source {
    presence: Arc<Presence>,
    client: Client,
}

/// Serves until the tasks stop.
pub(super) fn start(
    listener: TcpListener,
    identity: LiveIdentity,
    (presence, client): (Arc<Presence>, Client),
    ready: ReadyPart,
    tasks: &Tasks,
) {
    let (front, fronts) = watch::channel(None);
    let token = tasks.token();
    tasks.spawn(token.clone().run_until_cancelled_owned(read_fronts(client.clone(), identity, front, ready)));
    let router = router(Source { presence, client });
    let group = tasks.clone();
    tasks.spawn(token.run_until_cancelled_owned(accept(listener, fronts, router, group)));
}

/// Keeps the CA of the front proxy up to date.
async fn read_fronts(client: Client, identity: LiveIdentity, front: watch::Sender<Option<Front>>, ready: ReadyPart) {
    let mut known: Option<BTreeMap<String, String>> = None;
    ready.detail("the CA of the front proxy is not read yet");
    loop {
        let read = match timeout(PATIENCE, read(&client)).await {
            Ok(read) => read,
            Err(_) => Err(anyhow::anyhow!("kube-apiserver does not answer")),
        };
        let read = read.and_then(|data| {
            if known.as_ref() != Some(&data) {
                front.send_replace(Some(Front::new(&data, &identity)?));
                tracing::info!("the front proxy of kube-apiserver is known; custom metrics are served");
                known = Some(data);
            }
            Ok(())
        });
        let wait = match read {
            Ok(()) => {
                ready.up();
                READ
            }
            Err(error) => {
                let stays = if known.is_some() { "; the one that was read last stays in force" } else { "" };
                let text = format!("the CA of the front proxy cannot be read: {error:#}{stays}");
                tracing::warn!("{text}");
                ready.detail(text);
                READ_AGAIN
            }
        };
        sleep(wait).await;
    }
}

async fn read(client: &Client) -> anyhow::Result<BTreeMap<String, String>> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let map = maps.get(CONFIG_MAP).await.with_context(|| {
        format!("{NAMESPACE}/{CONFIG_MAP} (the role extension-apiserver-authentication-reader allows it)")
    })?;
    Ok(map.data.unwrap_or_default())
}

impl Front {
    fn new(data: &BTreeMap<String, String>, identity: &LiveIdentity) -> anyhow::Result<Self> {
        let pem = data
            .get("requestheader-client-ca-file")
            .context("kube-apiserver runs without --requestheader-client-ca-file")?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            roots
                .add(root.context("the front proxy's CA is no PEM")?)
                .context("the front proxy's CA is no certificate")?;
        }
        let provider = provider();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(identity.clone()));
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
        let names = data.get("requestheader-allowed-names").map_or(Ok(vec![]), |names| serde_json::from_str(names));
        let names = names.context("requestheader-allowed-names is no list")?;
        Ok(Self { tls: Arc::new(tls), names: Arc::new(names) })
    }

    fn may(&self, chain: Option<&[CertificateDer<'_>]>) -> bool {
        let Some(leaf) = chain.and_then(<[_]>::first) else { return false };
        let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return false };
        let mut names = leaf.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        self.names.is_empty() || names.any(|name| self.names.iter().any(|allowed| allowed == name))
    }
}

async fn accept(listener: TcpListener, fronts: watch::Receiver<Option<Front>>, router: Router, tasks: Tasks) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "the metrics API cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Before the front proxy's CA is known nobody can be let in; kube-apiserver tries again.
        let Some(front) = fronts.borrow().clone() else { continue };
        let (router, token) = (router.clone(), tasks.token());
        tasks.spawn(async move {
            if let Some(Err(error)) = token.run_until_cancelled_owned(serve(socket, front, router)).await {
                tracing::debug!(%error, "a connection to the metrics API ended");
            }
            drop(slot);
        });
    }
}

async fn serve(socket: TcpStream, front: Front, router: Router) -> io::Result<()> {
    let stream = timeout(PATIENCE, TlsAcceptor::from(Arc::clone(&front.tls)).accept(socket)).await??;
    if !front.may(stream.get_ref().1.peer_certificates()) {
        tracing::warn!("a client of the front proxy's CA is not called as requestheader-allowed-names says; refused");
        return Ok(());
    }
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    connection.await.map_err(io::Error::other)
}

fn router(source: Source) -> Router {
    let json = |value: serde_json::Value| get(move || async move { axum::Json(value) });
    let group = format!("/apis/{}", hpa::GROUP);
    let mut router = Router::new().route("/apis", json(hpa::groups())).route(&group, json(hpa::group()));
    for version in VERSIONS {
        let ask = move |State(source): State<Source>, Path(path): Path<Asked>, Query(query): Query<Selectors>| async move {
            answer(&source, version, path, query).await
        };
        router = router
            .route(&format!("{group}/{version}"), json(hpa::resources(version)))
            .route(&format!("{group}/{version}/namespaces/{{namespace}}/pods/{{pod}}/{{metric}}"), get(ask));
    }
    router.fallback(|| async { failure(404, "NotFound", "there is no such path here") }).with_state(source)
}

#[derive(Debug, Deserialize)]
struct Asked {
    namespace: String,
    pod: String,
    metric: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Selectors {
    label_selector: Option<String>,
    metric_label_selector: Option<String>,
}

fn failure(code: u16, reason: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, axum::Json(hpa::status(code, reason, message))).into_response()
}

async fn answer(source: &Source, version: &str, asked: Asked, selectors: Selectors) -> Response {
    let Asked { namespace, pod, metric } = asked;
    let Some(known) = hpa::metric(&metric) else {
        let names: Vec<_> = hpa::METRICS.iter().map(|(name, _)| *name).collect();
        return failure(404, "NotFound", &format!("there is no metric {metric}; there are {}", names.join(", ")));
    };
    if selectors.metric_label_selector.is_some_and(|selector| !selector.is_empty()) {
        return failure(400, "BadRequest", "these metrics have no labels; leave the selector of the metric out");
    }
    let pods = match source.pods(&namespace, &pod, selectors.label_selector.as_deref()).await {
        Ok(pods) => pods,
        Err(error) => {
            tracing::warn!(%error, "kube-apiserver cannot be asked for the pods of a metric");
            return failure(
                503,
                "ServiceUnavailable",
                &format!("kube-apiserver did not tell which pods there are: {error}"),
            );
        }
    };
    let loads = source.presence.loads(Instant::now());
    let values = hpa::values(version, (&namespace, &pods), (&metric, known), &loads, unix_now());
    if pod != "*" && values["items"].as_array().is_none_or(Vec::is_empty) {
        return failure(404, "NotFound", &format!("the pod {namespace}/{pod} is no shard that reports"));
    }
    axum::Json(values).into_response()
}

impl Source {
    /// The pods that are asked about. Only kube-apiserver knows labels and namespaces.
    async fn pods(&self, namespace: &str, pod: &str, selector: Option<&str>) -> Result<Vec<String>, String> {
        let mut params = ListParams::default().limit(PODS);
        params = match selector {
            Some(selector) => params.labels(selector),
            None => params,
        };
        if pod != "*" {
            params = params.fields(&format!("metadata.name={pod}"));
        }
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        match timeout(PATIENCE, api.list_metadata(&params)).await {
            Ok(Ok(list)) => Ok(list.items.into_iter().filter_map(|pod| pod.metadata.name).collect()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }
}
