//! A kube-apiserver by hand: lists, watches, reviews of tokens, and the ConfigMap with the front proxy's CA.

use std::{collections::BTreeMap, convert::Infallible, path::PathBuf, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, RawQuery, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::broadcast, task::JoinSet};
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
struct Cluster {
    objects: Mutex<BTreeMap<String, Vec<Value>>>,
    front: Mutex<Value>,
    news: broadcast::Sender<(String, String)>,
    asked: Mutex<Vec<(String, String)>>,
    stop: CancellationToken,
}

/// A server that runs.
#[derive(Debug)]
pub(crate) struct ApiServer {
    pub(crate) port: u16,
    cluster: Arc<Cluster>,
    task: tokio::sync::Mutex<JoinSet<()>>,
    dir: TempDir,
}

impl ApiServer {
    /// Starts one with nothing in it.
    pub(crate) async fn start(port: Option<u16>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port.unwrap_or(0))).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let cluster = Arc::new(Cluster {
            objects: Mutex::default(),
            front: Mutex::default(),
            news: broadcast::channel(64).0,
            asked: Mutex::default(),
            stop: CancellationToken::new(),
        });
        let router = Router::new()
            .route("/api/v1/{plural}", get(all))
            .route("/apis/discovery.k8s.io/v1/{plural}", get(all))
            .route("/api/v1/namespaces/mesh/{plural}", get(some))
            .route("/api/v1/namespaces/kube-system/configmaps/{name}", get(front))
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .with_state(Arc::clone(&cluster));
        let stop = cluster.stop.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
            served.await.unwrap();
        });
        let task = tokio::sync::Mutex::new(task);
        Self { port, cluster, task, dir: tempfile::tempdir().unwrap() }
    }

    /// The end of it, and of all watches.
    pub(crate) async fn stop(&self) {
        self.cluster.stop.cancel();
        self.task.lock().await.shutdown().await;
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://127.0.0.1:{}", self.port)}}],
            "users": [{"name": "test", "user": {"token": "t"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]
        });
        let path = self.dir.path().join("kubeconfig");
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    pub(crate) fn put(&self, plural: &str, object: Value) {
        let mut objects = self.cluster.objects.lock();
        let all = objects.entry(plural.to_owned()).or_default();
        all.retain(|held| held["metadata"]["name"] != object["metadata"]["name"]);
        all.push(object.clone());
        self.cluster.tell(plural, "ADDED", &object);
    }

    pub(crate) fn delete(&self, plural: &str, object: &Value) {
        let mut objects = self.cluster.objects.lock();
        let all = objects.entry(plural.to_owned()).or_default();
        all.retain(|held| held["metadata"]["name"] != object["metadata"]["name"]);
        self.cluster.tell(plural, "DELETED", object);
    }

    /// Whom the front proxy is, and how it may be called.
    pub(crate) fn front_proxy(&self, ca: &str, names: &[&str]) {
        let names = json!(names).to_string();
        *self.cluster.front.lock() = json!({"requestheader-client-ca-file": ca, "requestheader-allowed-names": names});
    }

    /// What was asked for in the namespace `mesh`.
    pub(crate) fn asked(&self, plural: &str) -> Vec<String> {
        let asked = self.cluster.asked.lock();
        asked.iter().filter(|(what, _)| what == plural).map(|(_, query)| query.clone()).collect()
    }
}

impl Cluster {
    fn tell(&self, plural: &str, kind: &str, object: &Value) {
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        // Nobody may be listening.
        let _ = self.news.send((plural.to_owned(), line));
    }

    fn list(&self, plural: &str) -> Value {
        let objects = self.objects.lock();
        let items = objects.get(plural).cloned().unwrap_or_default();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
    }
}

async fn all(State(cluster): State<Arc<Cluster>>, Path(plural): Path<String>, RawQuery(query): RawQuery) -> Response {
    if !query.is_some_and(|query| query.contains("watch=true")) {
        return Json(cluster.list(&plural)).into_response();
    }
    let (news, stop) = (cluster.news.subscribe(), cluster.stop.clone());
    // What came between the list and the watch is told again.
    let first = cluster.list(&plural)["items"]
        .as_array()
        .unwrap()
        .iter()
        .fold(String::new(), |lines, object| format!("{lines}{}\n", json!({"type": "MODIFIED", "object": object})));
    let lines = futures::stream::unfold((news, plural, stop, Some(first)), |(mut news, plural, stop, first)| async {
        if let Some(first) = first {
            return Some((Ok::<_, Infallible>(first), (news, plural, stop, None)));
        }
        loop {
            let (of, line) = stop.run_until_cancelled(news.recv()).await?.ok()?;
            if of == plural {
                return Some((Ok(line), (news, plural, stop, None)));
            }
        }
    });
    Body::from_stream(lines).into_response()
}

async fn some(
    State(cluster): State<Arc<Cluster>>,
    Path(plural): Path<String>,
    RawQuery(query): RawQuery,
) -> Json<Value> {
    let query = query.unwrap_or_default();
    let name = query.split('&').find_map(|part| part.strip_prefix("fieldSelector=metadata.name%3D")).map(str::to_owned);
    let selector = query.split('&').find(|part| part.starts_with("labelSelector=")).unwrap_or_default();
    cluster.asked.lock().push((plural.clone(), selector.to_owned()));
    let mut list = cluster.list(&plural);
    if let Some(items) = list["items"].as_array_mut() {
        items.retain(|item| name.as_ref().is_none_or(|name| item["metadata"]["name"] == **name));
    }
    Json(list)
}

async fn front(State(cluster): State<Arc<Cluster>>, Path(name): Path<String>) -> Json<Value> {
    let data = cluster.front.lock().clone();
    Json(json!({"metadata": {"name": name, "namespace": "kube-system"}, "data": data}))
}

/// Knows tokens of the form `eyJ.POD.sig`, of pods that are called shard-something.
async fn review(Json(review): Json<Value>) -> Json<Value> {
    let token = review["spec"]["token"].as_str().unwrap();
    let pod = token.split('.').nth(1).unwrap();
    let status = if pod.starts_with("shard-") {
        json!({
            "authenticated": true, "audiences": review["spec"]["audiences"],
            "user": {
                "username": "system:serviceaccount:mesh:shard",
                "extra": {"authentication.kubernetes.io/pod-name": [pod]}
            }
        })
    } else {
        json!({"authenticated": false, "error": "invalid bearer token"})
    };
    Json(
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": review["spec"], "status": status}),
    )
}
