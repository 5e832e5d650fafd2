//! The proxy door: people and tools say who they are and where they want to go. CONNECT and absolute-form HTTP with TLS
//! or without, and SOCKS5, all on one port.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, ext::ReasonPhrase, http::uri::Scheme, server::conn::http1,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use proto::{proxy::destination::Destination, target::Target};
use runtime::{shutdown::Tasks, tls};
use rustls::ServerConfig;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::service_fn;

use self::credentials::{Caller, Peer};
use super::{
    Visitor,
    http::{
        Closing, IDLE, MAX_FIELDS, MAX_HEAD, Tunnel,
        answer::Answer,
        body::{self, Body},
        forward::Forwarder,
        guard::{Abrupt, Guard},
        headers, serve, upgrade,
    },
    visit,
};
use crate::{
    flow::io::BrokenOff,
    route::{self, Router},
};

mod authorization;
mod credentials;
mod socks;

/// The name of the door.
const DOOR: &str = "proxy";
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// First byte of a TLS record with a handshake message (RFC 8446, 5.1).
const TLS: u8 = 0x16;

/// The door.
#[derive(Debug)]
pub struct ProxyDoor {
    /// Opens streams.
    pub router: Router,
    /// How it speaks TLS: a client certificate of the mesh is asked for and not needed, the protocol is `http/1.1`.
    pub tls: Arc<ServerConfig>,
    /// Whether tokens are taken without TLS from other machines than this one.
    pub plain_tokens: bool,
    /// The domain below which services have names.
    pub domain: String,
    /// Cancelled when the shard wants no new requests.
    pub stopping: CancellationToken,
    /// Runs what goes on beside a connection.
    pub tasks: Tasks,
}

/// One visitor.
struct Visit {
    door: Arc<ProxyDoor>,
    from: String,
    peer: Peer,
    forwarder: Forwarder,
}

impl ProxyDoor {
    /// Serves a visitor's requests until it leaves, or the shard does.
    pub async fn visit(self: Arc<Self>, visitor: Visitor) {
        let Some(first) = visit::first_byte(&visitor.socket, &self.stopping).await else { return };
        if visitor.socket.set_nodelay(true).is_err() {
            return;
        }
        let trusted = self.plain_tokens || visitor.from.ip().is_loopback();
        match first {
            // In boxes of their own, so that a visitor who says nothing does not occupy the room that a server needs.
            TLS => Box::pin(self.visit_over_tls(visitor)).await,
            socks::SOCKS5 => {
                let Visitor { socket, from } = visitor;
                Box::pin(self.visit_by_socks(socket, from.to_string(), trusted)).await;
            }
            _ => {
                let peer = if trusted { Peer::Plain } else { Peer::PlainFromAfar };
                let Visitor { socket, from } = visitor;
                Box::pin(self.serve(socket, from, peer)).await;
            }
        }
    }

    async fn visit_over_tls(self: Arc<Self>, Visitor { socket, from }: Visitor) {
        let handshake = timeout(HANDSHAKE, TlsAcceptor::from(Arc::clone(&self.tls)).accept(socket));
        let stream = match self.stopping.run_until_cancelled(handshake).await {
            Some(Ok(Ok(stream))) => stream,
            Some(Ok(Err(error))) => {
                self.turned_away("tls");
                tracing::debug!(%from, %error, "a TLS handshake failed at the proxy door");
                return;
            }
            Some(Err(_)) => return self.turned_away("tls"),
            None => return,
        };
        match tls::peer_facts(stream.get_ref().1.peer_certificates()) {
            Ok(facts) => self.serve(stream, from, Peer::Tls(facts.map(Arc::new))).await,
            // The verifier has read the same certificate before.
            Err(error) => tracing::warn!(%from, %error, "a certificate was let in that cannot be read"),
        }
    }

    async fn serve<T: Abrupt + 'static>(self: Arc<Self>, stream: T, from: std::net::SocketAddr, peer: Peer) {
        let broken_off = BrokenOff::default();
        let forwarder = Forwarder::new(self.router.clone(), self.tasks.clone(), from.ip(), broken_off.clone());
        let visit = Arc::new(Visit { door: Arc::clone(&self), from: from.to_string(), peer, forwarder });
        let service = service_fn(move |request| {
            let visit = Arc::clone(&visit);
            async move { Ok::<_, Infallible>(visit.answer(request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_FIELDS)
            .serve_connection(TokioIo::new(Guard::new(stream, broken_off)), TowerToHyperService::new(service))
            .with_upgrades();
        serve(connection, |c| c.graceful_shutdown(), &self.stopping, &self.router).await;
    }

    fn turned_away(&self, reason: &str) {
        self.router.metrics().door_refusals.with_label_values(&[DOOR, reason]).inc();
    }
}

impl Visit {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let closing = Closing::after(&request);
        let response = self.respond(request).await.unwrap_or_else(|answer| {
            self.door.turned_away("request");
            answer.response()
        });
        closing.mark(response)
    }

    async fn respond(&self, request: Request<Incoming>) -> Result<Response<Body>, Answer> {
        let destination = destination(&request)?;
        self.door.router.knows_people().await?;
        let state = self.door.router.state();
        let caller = self.peer.caller(request.headers(), &state)?;
        let target = destination.target(&self.door.domain, |edge| state.edges.contains_key(edge))?;
        drop(state);
        let route = self.route(caller, target);
        if request.method() == Method::CONNECT {
            return self.connect(request, route).await;
        }
        let authority = headers::authority(&request).map_err(Answer::bad_request)?;
        Ok(self.forwarder.forward(request, &authority, route).await)
    }

    fn route(&self, caller: Caller, target: Target) -> route::Request {
        let request = route::Request::new(caller.principal, self.from.clone(), DOOR, target);
        route::Request { credential: Some(caller.credential), ..request }
    }

    /// Opens the tunnel first and only then says so. If the client goes away meanwhile, this future is dropped and the
    /// edge gives up its dial.
    async fn connect(&self, mut request: Request<Incoming>, route: route::Request) -> Result<Response<Body>, Answer> {
        let opened = self.door.router.open(route).await?.opened().await?;
        let client = hyper::upgrade::on(&mut request);
        self.door.tasks.spawn(upgrade::tunnel(client, opened));
        let mut response = Response::new(body::empty());
        *response.status_mut() = StatusCode::OK;
        response.extensions_mut().insert(ReasonPhrase::from_static(b"Connection Established"));
        response.extensions_mut().insert(Tunnel);
        Ok(response)
    }
}

/// Where a request to a proxy wants to go.
fn destination(request: &Request<Incoming>) -> Result<Destination, Answer> {
    let uri = request.uri();
    let Some(authority) = uri.authority() else {
        return Err(Answer::bad_request(
            "this is a proxy: it takes CONNECT HOST:PORT and requests for http://HOST/; the http door serves names",
        ));
    };
    if authority.as_str().contains('@') {
        return Err(Answer::bad_request("a user name does not belong in the target; send Proxy-Authorization"));
    }
    let port = if request.method() == Method::CONNECT {
        authority.port_u16()
    } else if uri.scheme() == Some(&Scheme::HTTP) {
        authority.port().map_or(Some(80), |port| port.as_str().parse().ok())
    } else {
        return Err(Answer::bad_request("only http:// is forwarded; everything else goes by CONNECT HOST:PORT"));
    };
    let port = port.filter(|&port| port != 0);
    let port = port.ok_or_else(|| Answer::bad_request(format!("{authority} has no port; write HOST:PORT")))?;
    Ok(Destination { host: authority.host().to_owned(), port })
}
