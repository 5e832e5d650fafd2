//! The listener: TCP, TLS 1.3, HTTP/1.1. A client certificate is welcome and not needed, since enrolment comes before
//! it; a connection without one counts against a bound of its own, so that strangers never keep shards out.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use runtime::{
    shutdown::Tasks,
    tls::{LiveIdentity, MeshVerifier, TrustBundle, peer_facts, server_config},
};
use rustls::{ServerConfig, server::NoServerSessionStorage};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::guard::Peer;
use crate::metrics::Metrics;

/// Longest TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest time for the head of a request, and longest silence between two requests.
const HEAD: Duration = Duration::from_secs(15);
/// Handshakes at once; more wait in the kernel's queue.
const HANDSHAKES: usize = 512;
/// Connections with a certificate at once.
const MEMBERS: usize = 8192;
/// Connections without one at once.
const STRANGERS: usize = 512;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 32 * 1024;
/// How long a client may leave what was sent to it unread or unacknowledged, before its connection is given up.
const UNREAD: Duration = Duration::from_secs(30);
/// How long a request that has begun may take once control stops.
const FAREWELL: Duration = Duration::from_secs(5);

/// The listener of the API.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    router: Router,
    metrics: Metrics,
    limits: Limits,
}

#[derive(Clone, Debug)]
struct Limits {
    handshakes: Arc<Semaphore>,
    members: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Server {
    /// Puts the server together. Certificate and roots may be replaced while it runs.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(
        listener: TcpListener,
        identity: &LiveIdentity,
        bundle: TrustBundle,
        router: Router,
        metrics: Metrics,
    ) -> Result<Self, rustls::Error> {
        let mut tls = server_config(identity, MeshVerifier::of_clients(bundle, false), &[b"http/1.1"])?;
        // A resumed session would bring a certificate along that nobody looked at again.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
        let limits = Limits {
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            members: Arc::new(Semaphore::new(MEMBERS)),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
        };
        Ok(Self { listener, tls: Arc::new(tls), router, metrics, limits })
    }

    /// Serves until the tasks stop; requests that have begun are answered.
    pub async fn run(self, tasks: Tasks) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = tasks.stopping() => return,
                accepted = self.accept() => accepted,
            };
            let Some((socket, address, permit)) = accepted else { continue };
            let connection = Connection {
                tls: TlsAcceptor::from(Arc::clone(&self.tls)),
                router: self.router.clone(),
                metrics: self.metrics.clone(),
                limits: self.limits.clone(),
                address,
            };
            tasks.spawn(connection.serve(socket, permit, tasks.clone()));
        }
    }

    async fn accept(&self) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = Arc::clone(&self.limits.handshakes).acquire_owned().await.ok()?;
        match self.listener.accept().await {
            Ok((socket, address)) => Some((socket, address, permit)),
            Err(error) => {
                tracing::warn!(%error, "the API cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                None
            }
        }
    }
}

struct Connection {
    tls: TlsAcceptor,
    router: Router,
    metrics: Metrics,
    limits: Limits,
    address: SocketAddr,
}

impl Connection {
    async fn serve(self, socket: TcpStream, handshake: OwnedSemaphorePermit, tasks: Tasks) {
        let begun = tokio::select! {
            biased;
            () = tasks.stopping() => return,
            begun = timeout(HANDSHAKE, self.handshake(socket)) => begun,
        };
        drop(handshake);
        let (outcome, stream) = match begun {
            Err(_) => ("handshake-timeout", None),
            Ok(Ok(Some(stream))) => ("ok", Some(stream)),
            Ok(Ok(None)) => ("plain-http", None),
            Ok(Err(error)) => {
                tracing::debug!(address = %self.address, %error, "TLS handshake failed");
                ("handshake-failed", None)
            }
        };
        let Some(stream) = stream else { return self.count(outcome) };
        // Verified by the handshake; what is left to fail is a certificate of the CA that is not a member's.
        let facts = match peer_facts(stream.get_ref().1.peer_certificates()) {
            Ok(facts) => facts.map(Arc::new),
            Err(error) => {
                tracing::debug!(address = %self.address, %error, "a certificate that is no member's");
                return self.count("bad-certificate");
            }
        };
        let slots = if facts.is_some() { &self.limits.members } else { &self.limits.strangers };
        let Ok(_slot) = Arc::clone(slots).try_acquire_owned() else {
            tracing::warn!(address = %self.address, member = facts.is_some(), "too many connections; this one is closed");
            return self.count("too-many");
        };
        self.count(outcome);
        self.metrics.connections_open.inc();
        let open = self.metrics.connections_open.clone();
        self.http(stream, facts, tasks).await;
        open.dec();
    }

    fn count(&self, outcome: &str) {
        self.metrics.connections.with_label_values(&[outcome]).inc();
    }

    /// The handshake; `None` if somebody spoke plain HTTP and was told so.
    async fn handshake(&self, mut socket: TcpStream) -> io::Result<Option<TlsStream<TcpStream>>> {
        prepare(&socket)?;
        let mut first = [0];
        if socket.peek(&mut first).await? == 1 && first[0].is_ascii_uppercase() {
            const BODY: &str = "this is the API of mesh-control, which speaks HTTPS only\n";
            let answer = format!(
                "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{BODY}",
                BODY.len()
            );
            socket.write_all(answer.as_bytes()).await?;
            socket.shutdown().await?;
            // Closing with bytes unread would reset the connection before the answer is read.
            let mut rest = [0; 1024];
            while tokio::io::AsyncReadExt::read(&mut socket, &mut rest).await? > 0 {}
            return Ok(None);
        }
        self.tls.accept(socket).await.map(Some)
    }

    async fn http(self, stream: TlsStream<TcpStream>, facts: Option<Arc<runtime::cert::CertFacts>>, tasks: Tasks) {
        let router = self.router.layer(Extension(Peer { address: self.address, facts }));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            biased;
            () = tasks.stopping() => {
                connection.as_mut().graceful_shutdown();
                match timeout(FAREWELL, connection).await {
                    Ok(ended) => ended,
                    Err(_) => return,
                }
            }
            ended = connection.as_mut() => ended,
        };
        if let Err(error) = ended {
            tracing::debug!(address = %self.address, %error, "connection ended");
        }
    }
}

/// A peer that vanished, or reads nothing, is noticed by the kernel.
fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(UNREAD).with_interval(UNREAD / 3))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNREAD))?;
    Ok(())
}
