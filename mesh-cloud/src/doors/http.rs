//! The HTTP door: services by their host names, `<service>.<edge>.<domain>`, in HTTP/1.1 and HTTP/2 without TLS.
//!
//! A reverse proxy that keeps what HTTP can say: bodies are streamed, trailers, upgrades and `100 Continue` go through,
//! and a response that breaks off at the service breaks off at the client.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::Incoming,
    header::{CONNECTION, HeaderValue, UPGRADE},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use proto::{code::RefuseCode, hostname, id::ServiceName, principal::Principal, stream::Refusal, target::Target};
use runtime::shutdown::Tasks;
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};

use self::{
    answer::Answer,
    body::Body,
    forward::Forwarder,
    guard::Guard,
    upstream::{CONNECTION_WINDOW, InTasks, PING, STREAM_WINDOW},
};
use super::{Visitor, visit};
use crate::{
    flow::io::BrokenOff,
    route::{self, Router},
};

pub(crate) mod answer;
pub(crate) mod body;
pub(crate) mod forward;
pub(crate) mod guard;
pub(crate) mod headers;
mod screen;
pub(crate) mod upgrade;
pub(crate) mod upstream;

/// The name of the door, and of the service that `<edge>.<domain>` means.
const DOOR: &str = "http";
/// How long a connection may be idle between two requests. A head that has begun has less ([`guard`]).
pub(crate) const IDLE: Duration = Duration::from_secs(60);
/// Longest head of a request in bytes, and most bytes that are read ahead.
pub(crate) const MAX_HEAD: usize = 64 * 1024;
/// Most fields of a head.
pub(crate) const MAX_FIELDS: usize = 128;
/// Requests of one connection that are served at once; HTTP/2 clients are told, and more wait.
const STREAMS: u32 = 64;
/// How long a connection has for its last bytes once the time of a drain is over.
const LAST_BYTES: Duration = Duration::from_millis(500);

/// The door.
#[derive(Debug)]
pub struct HttpDoor {
    /// Opens streams.
    pub router: Router,
    /// The domain below which services have names.
    pub domain: String,
    /// Cancelled when the shard wants no new requests.
    pub stopping: CancellationToken,
    /// Runs what goes on beside a connection.
    pub tasks: Tasks,
}

/// One visitor.
struct Visit {
    door: Arc<HttpDoor>,
    from: String,
    forwarder: Forwarder,
}

impl HttpDoor {
    /// Serves a visitor's requests until it leaves, or the shard does.
    pub async fn visit(self: Arc<Self>, visitor: Visitor) {
        if visit::first_byte(&visitor.socket, &self.stopping).await.is_some()
            && visitor.socket.set_nodelay(true).is_ok()
        {
            // In a box of its own, so that a visitor who says nothing does not occupy the room that a server needs.
            Box::pin(self.serve(visitor)).await;
        }
    }

    async fn serve(self: Arc<Self>, Visitor { socket, from }: Visitor) {
        let broken_off = BrokenOff::default();
        let forwarder = Forwarder::new(self.router.clone(), self.tasks.clone(), from.ip(), broken_off.clone());
        let visit = Arc::new(Visit { door: Arc::clone(&self), from: from.to_string(), forwarder });
        let answer = service_fn(move |request| {
            let visit = Arc::clone(&visit);
            async move { Ok::<_, Infallible>(visit.answer(request).await) }
        });
        let service = ServiceBuilder::new().concurrency_limit(STREAMS as usize).service(answer);
        let mut server = auto::Builder::new(InTasks(self.tasks.clone()));
        server
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_FIELDS)
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING);
        let io = TokioIo::new(Guard::new(socket, broken_off));
        let connection = server.serve_connection_with_upgrades(io, TowerToHyperService::new(service));
        serve(connection, |c| c.graceful_shutdown(), &self.stopping, &self.router).await;
    }
}

/// Serves a connection. Once `stopping` is cancelled it takes no new requests; once the router's time is over it is
/// dropped with what is left.
pub(crate) async fn serve<C: Future>(
    connection: C,
    shut_down: impl FnOnce(Pin<&mut C>),
    stopping: &CancellationToken,
    router: &Router,
) {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        () = stopping.cancelled() => shut_down(connection.as_mut()),
        _ = connection.as_mut() => return,
    }
    let over = async {
        router.ending().cancelled().await;
        tokio::time::sleep(LAST_BYTES).await;
    };
    tokio::select! {
        biased;
        () = over => {}
        _ = connection => {}
    }
}

impl Visit {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let closing = Closing::after(&request);
        closing.mark(self.respond(request).await)
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let authority = match headers::authority(&request) {
            Ok(authority) => authority,
            Err(why) => return Answer::bad_request(why).response(),
        };
        if request.method() == Method::CONNECT {
            let why = "the http door takes requests for services; CONNECT is for the proxy door";
            return Answer::bad_request(why).response();
        }
        match self.door.target(authority.as_str()) {
            Ok(target) => {
                let principal = Principal::Door { name: DOOR.into() };
                let route = route::Request::new(principal, self.from.clone(), DOOR, target);
                self.forwarder.forward(request, &authority, route).await
            }
            Err(refusal) => Answer::from(refusal).response(),
        }
    }
}

impl HttpDoor {
    fn target(&self, host: &str) -> Result<Target, Refusal> {
        let door: ServiceName =
            DOOR.parse().map_err(|_| Refusal::because(RefuseCode::Internal, "the door has no name"))?;
        hostname::target_of(host, &self.domain, &door)
            .map_err(|e| Refusal::because(RefuseCode::ServiceUnknown, e.to_string()))
    }
}

/// Whether a connection of HTTP/1 must end with the answer: what the client may have sent behind a request for another
/// protocol is no HTTP, and after a request that was no good nobody knows what comes next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closing {
    applies: bool,
    otherwise_changed: bool,
}

impl Closing {
    pub(crate) fn after<B>(request: &Request<B>) -> Self {
        let otherwise_changed = request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE);
        Self { applies: request.version() < Version::HTTP_2, otherwise_changed }
    }

    pub(crate) fn mark(self, mut response: Response<Body>) -> Response<Body> {
        let status = response.status();
        let changes = status == StatusCode::SWITCHING_PROTOCOLS || response.extensions().get::<Tunnel>().is_some();
        let no_good = status == StatusCode::BAD_REQUEST && response.headers().contains_key(answer::MESH_ERROR);
        if self.applies && !changes && (self.otherwise_changed || no_good) {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Marks the answer to a CONNECT that was granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tunnel;
