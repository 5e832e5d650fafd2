//! The admin server of every process: `/livez`, `/readyz`, `/metrics`, and pages of its own; and a client of it.

use std::{
    collections::BTreeMap, convert::Infallible, fmt, fmt::Write, io, net::SocketAddr, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use prometheus::{Encoder, IntGauge, Registry, TextEncoder};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::Semaphore,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use crate::shutdown::Tasks;

/// Connections that are served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(10);

/// Whether the process is ready: when every part of it says so.
#[derive(Clone, Debug, Default)]
pub struct Ready(Arc<Mutex<BTreeMap<&'static str, PartState>>>);

#[derive(Clone, Debug)]
struct PartState {
    up: bool,
    detail: String,
}

/// One part's say.
#[derive(Clone, Debug)]
pub struct ReadyPart {
    name: &'static str,
    ready: Ready,
}

impl Ready {
    /// Ready, as long as no part has been named.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Names a part, which is down until it says otherwise.
    #[must_use]
    pub fn part(&self, name: &'static str) -> ReadyPart {
        let part = ReadyPart { name, ready: self.clone() };
        part.down("starting");
        part
    }

    /// Whether every part is up.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.lock().values().all(|p| p.up)
    }

    /// One line per part, those that are down first.
    #[must_use]
    pub fn report(&self) -> String {
        let parts = self.0.lock();
        let (up, down): (Vec<_>, Vec<_>) = parts.iter().partition(|(_, p)| p.up);
        let mut text = String::new();
        for (name, part) in down.into_iter().chain(up) {
            let state = if part.up { "ok" } else { "not ready" };
            let colon = if part.detail.is_empty() { "" } else { ": " };
            let _ = writeln!(text, "{name} {state}{colon}{}", part.detail);
        }
        text
    }
}

impl ReadyPart {
    fn set(&self, up: bool, detail: String) {
        self.ready.0.lock().insert(self.name, PartState { up, detail });
    }

    /// The part is ready.
    pub fn up(&self) {
        self.set(true, String::new());
    }

    /// The part is ready, and there is something to say about it.
    pub fn detail(&self, text: impl Into<String>) {
        self.set(true, text.into());
    }

    /// The part is not ready, and why.
    pub fn down(&self, reason: impl Into<String>) {
        self.set(false, reason.into());
    }
}

/// A page that only one kind of process has.
#[derive(Clone)]
pub struct Page {
    path: &'static str,
    body: Arc<dyn Fn() -> String + Send + Sync>,
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({})", self.path)
    }
}

impl Page {
    /// A page of JSON, made anew for each reader. It holds no secret: whoever reaches the admin address reads it.
    #[must_use]
    pub fn json(path: &'static str, body: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self { path, body: Arc::new(body) }
    }
}

/// Longest answer of an admin server, in bytes.
const ANSWER: usize = 16 * 1024 * 1024;

/// Gets a page of an admin server within a time: its status and its body, 16 MiB at most.
///
/// # Errors
/// If nobody answers there, or not by HTTP.
pub async fn get(address: SocketAddr, path: &str, within: Duration) -> io::Result<(u16, Bytes)> {
    let whole = async {
        let socket = TcpStream::connect(address).await?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await;
        let (mut sender, connection) = handshake.map_err(io::Error::other)?;
        #[allow(clippy::disallowed_methods, reason = "ends with the handle, which the call holds")]
        let _driver = AbortOnDropHandle::new(tokio::spawn(connection));
        let request = Request::get(path).header(hyper::header::HOST, address.to_string());
        let request = request.body(Full::new(Bytes::new())).map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER).collect().await.map_err(io::Error::other)?;
        Ok((status, body.to_bytes()))
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", within.as_secs()));
    timeout(within, whole).await.unwrap_or_else(|_| Err(late()))
}

/// Serves until the tasks stop. Returns the address, which tells the port if 0 was asked for.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(address: SocketAddr, registry: Registry, ready: Ready, tasks: &Tasks) -> io::Result<SocketAddr> {
    serve_with(address, (registry, ready), Vec::new(), tasks).await
}

/// As [`serve`], with pages of the process's own.
///
/// # Errors
/// As there.
pub async fn serve_with(
    address: SocketAddr,
    (registry, ready): (Registry, Ready),
    pages: Vec<Page>,
    tasks: &Tasks,
) -> io::Result<SocketAddr> {
    let pages: Arc<[Page]> = pages.into();
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let alive = IntGauge::new("mesh_process_tasks", "tasks of this process that have not ended").ok();
    if let Some(alive) = &alive {
        // Whoever serves one registry twice has it already.
        let _ = registry.register(Box::new(alive.clone()));
    }
    let group = tasks.clone();
    tasks.spawn(async move {
        loop {
            let accepted = tokio::select! {
                biased;
                () = group.stopping() => return,
                accepted = accept(&listener, &permits) => accepted,
            };
            let Some((socket, permit)) = accepted else { continue };
            let (registry, ready, pages) = (registry.clone(), ready.clone(), Arc::clone(&pages));
            let alive = alive.clone();
            let service = service_fn(move |request| {
                if let Some(alive) = &alive {
                    alive.set(i64::try_from(Handle::current().metrics().num_alive_tasks()).unwrap_or(i64::MAX));
                }
                let response = answer(&request, &registry, &ready, &pages);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(socket), service);
            let stopping = group.token();
            group.spawn(async move {
                let _permit = permit;
                // How a scraper's connection ends is of no interest.
                let _ = stopping.run_until_cancelled(connection).await;
            });
        }
    });
    Ok(address)
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((socket, _)) => Some((socket, permit)),
        Err(e) => {
            tracing::warn!(error = %e, "the admin server cannot accept");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry, ready: &Ready, pages: &[Page]) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/livez") => (StatusCode::OK, "text/plain", b"ok\n".to_vec()),
        (&Method::GET, "/readyz") => {
            let status = if ready.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (status, "text/plain", ready.report().into_bytes())
        }
        (&Method::GET, "/metrics") => {
            let mut text = Vec::new();
            match TextEncoder::new().encode(&registry.gather(), &mut text) {
                Ok(()) => (StatusCode::OK, prometheus::TEXT_FORMAT, text),
                Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", e.to_string().into_bytes()),
            }
        }
        (&Method::GET, path) => match pages.iter().find(|page| page.path == path) {
            Some(page) => (StatusCode::OK, "application/json", (page.body)().into_bytes()),
            None => {
                let own: String = pages.iter().map(|page| format!(" {}", page.path)).collect();
                let text = format!("there are /livez, /readyz and /metrics{own}\n");
                (StatusCode::NOT_FOUND, "text/plain", text.into_bytes())
            }
        },
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", b"only GET\n".to_vec()),
    };
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
