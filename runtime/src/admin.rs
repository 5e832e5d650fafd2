//! The admin server of every process: `/livez`, `/readyz`, `/metrics`.

use std::{collections::BTreeMap, convert::Infallible, fmt::Write, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use prometheus::{Encoder, IntGauge, Registry, TextEncoder};
use tokio::{net::TcpListener, runtime::Handle, sync::Semaphore};

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

/// Serves until the tasks stop. Returns the address, which tells the port if 0 was asked for.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(address: SocketAddr, registry: Registry, ready: Ready, tasks: &Tasks) -> io::Result<SocketAddr> {
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
            let (registry, ready, alive) = (registry.clone(), ready.clone(), alive.clone());
            let service = service_fn(move |request| {
                if let Some(alive) = &alive {
                    alive.set(i64::try_from(Handle::current().metrics().num_alive_tasks()).unwrap_or(i64::MAX));
                }
                let response = answer(&request, &registry, &ready);
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
) -> Option<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
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

fn answer(request: &Request<Incoming>, registry: &Registry, ready: &Ready) -> Response<Full<Bytes>> {
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
        (&Method::GET, _) => {
            (StatusCode::NOT_FOUND, "text/plain", b"there are /livez, /readyz and /metrics\n".to_vec())
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", b"only GET\n".to_vec()),
    };
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
