//! The egress door: kube-apiserver comes in here, by its EgressSelector, for whatever of the cluster is behind an edge.
//!
//! Two ways of talking, on three kinds of sockets: HTTPConnect over a unix socket and over TCP with mutual TLS, and
//! konnectivity's gRPC over a unix socket. Each dial names a host and a port as kube-apiserver knows them, and the
//! address book that control keeps up to date says which edge that is. What is not in the book is refused, with the
//! reason; nothing is ever dialled past the mesh. Every dial is answered within the door's own bound.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use proto::{
    book::Resolved,
    code::RefuseCode,
    id::EdgeId,
    principal::Principal,
    stream::Refusal,
    target::{HostPort, Target},
};
use runtime::{shutdown::Tasks, tls::LiveIdentity};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use self::{answer::Failure, tls::LiveTls, unix::UnixDoor};
use super::{Door, Visitor};
use crate::{
    config::EgressConfig,
    flow::Opened,
    metrics::Metrics,
    route::{Request, Router},
};

mod answer;
mod connect;
mod grpc;
mod tls;
mod unix;

/// The name of the door.
const DOOR: &str = "egress";
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Endpoints of a service that are tried at most.
const ATTEMPTS: u64 = 3;
/// How long an endpoint may take while there are others.
const ATTEMPT: Duration = Duration::from_secs(3);

/// The door.
#[derive(Debug)]
pub struct EgressDoor {
    router: Router,
    within: Duration,
    stopping: CancellationToken,
    tasks: Tasks,
    /// Counted up with each dial, to take the endpoints of services in turn.
    turn: AtomicU64,
    ids: AtomicU64,
}

/// What the door is opened with.
#[derive(Debug)]
pub struct Opening<'a> {
    /// Opens streams.
    pub router: &'a Router,
    /// Shown over TLS, unless the door has a certificate of its own.
    pub identity: &'a LiveIdentity,
    /// Stopped when the shard wants no new connections.
    pub accepting: &'a Tasks,
    /// Runs the connections.
    pub streams: &'a Tasks,
    /// Counters.
    pub metrics: &'a Arc<Metrics>,
    /// Connections at once on each socket.
    pub connections: usize,
}

impl EgressDoor {
    /// Opens the sockets that are configured. Returns where the one over TCP listens.
    ///
    /// # Errors
    /// If one of them cannot be opened.
    pub fn open(config: &EgressConfig, with: &Opening<'_>) -> anyhow::Result<Option<SocketAddr>> {
        let door = Arc::new(Self {
            router: with.router.clone(),
            within: Duration::from_secs_f64(config.within_secs.clamp(0.1, 10.0)),
            stopping: with.accepting.token(),
            tasks: with.streams.clone(),
            turn: AtomicU64::new(0),
            ids: AtomicU64::new(1),
        });
        if let Some(path) = &config.socket {
            let door = Arc::clone(&door);
            let visit = move |socket: UnixStream| {
                let from = unix::who(&socket);
                Arc::clone(&door).connect(socket, from, None)
            };
            with.run_unix(path, config.mode.0, visit)?;
        }
        if let Some(path) = &config.grpc_socket {
            let door = Arc::clone(&door);
            with.run_unix(path, config.mode.0, move |socket| Arc::clone(&door).serve_grpc(socket))?;
        }
        let Some(tcp) = &config.tcp else { return Ok(None) };
        let tls = Arc::new(LiveTls::load(tcp, with.identity, with.metrics).context("the egress door's TLS")?);
        let listener = Door::open(DOOR, tcp.listen, with.connections, Arc::clone(with.metrics))
            .with_context(|| format!("cannot open the egress door on {}", tcp.listen))?;
        let address = listener.local_addr()?;
        let following = Arc::clone(&tls).follow();
        with.accepting.spawn(with.accepting.token().run_until_cancelled_owned(following));
        let visit = move |visitor| Arc::clone(&door).visit(visitor, Arc::clone(&tls));
        with.accepting.spawn(listener.run(with.accepting.clone(), with.streams.clone(), visit));
        Ok(Some(address))
    }

    /// Over TCP.
    async fn visit(self: Arc<Self>, Visitor { socket, from }: Visitor, tls: Arc<LiveTls>) {
        if socket.set_nodelay(true).is_err() {
            return;
        }
        let handshake = timeout(HANDSHAKE, TlsAcceptor::from(tls.config()).accept(socket));
        match self.stopping.run_until_cancelled(handshake).await {
            Some(Ok(Ok(stream))) => {
                let denied = tls.denies(stream.get_ref().1.peer_certificates());
                Box::pin(self.connect(stream, from.to_string(), denied)).await;
            }
            Some(Ok(Err(error))) => {
                self.turned_away("tls");
                tracing::info!(%from, %error, "a TLS handshake failed at the egress door");
            }
            Some(Err(_)) => self.turned_away("tls"),
            None => {}
        }
    }

    /// Opens a stream to what kube-apiserver calls by this name.
    async fn dial(&self, to: &HostPort, from: &str, deadline: Instant) -> Result<Opened, Failure> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut attempt = 0;
        loop {
            let resolved = self.resolve(to, turn.wrapping_add(attempt))?;
            attempt += 1;
            let last = attempt >= ATTEMPTS.min(1 + resolved.others as u64);
            let until = if last { deadline } else { deadline.min(Instant::now() + ATTEMPT) };
            let edge = resolved.edge.clone();
            // A little earlier than the bound, so that the edge's silence is told by the one who knows most of it.
            match timeout_at(until, self.try_open(resolved, from, until)).await {
                Ok(Ok(opened)) => return Ok(opened),
                Ok(Err(refusal)) if !last && may_work_elsewhere(refusal.code) => {
                    tracing::debug!(%edge, code = %refusal.code, "trying the next endpoint");
                }
                Ok(Err(refusal)) => return Err(refusal.into()),
                Err(_) if !last => {}
                Err(_) => {
                    let sentence = format!("edge/{edge} was not reached within {:.1} s", self.within.as_secs_f64());
                    return Err(Refusal::because(RefuseCode::MeshTimeout, sentence).into());
                }
            }
        }
    }

    async fn try_open(&self, resolved: Resolved, from: &str, until: Instant) -> Result<Opened, Refusal> {
        let target = Target::Tcp { edge: resolved.edge, to: resolved.to };
        let request = Request::new(Principal::Apiserver, from.to_owned(), DOOR, target);
        self.router.open(request).await?.opened_by(until - Duration::from_millis(50)).await
    }

    fn resolve(&self, to: &HostPort, turn: u64) -> Result<Resolved, Failure> {
        let state = self.router.state();
        if let Some(resolved) = state.book.resolve(&to.host, to.port, turn) {
            return Ok(resolved?);
        }
        // Without a book, what is called like an edge is that edge: nodes are enrolled under their own names.
        let edge = to.host.parse::<EdgeId>().ok().filter(|edge| state.edges.contains_key(edge));
        let here = |edge| Resolved { edge, to: HostPort { host: "localhost".into(), port: to.port }, others: 0 };
        edge.map(here).ok_or_else(|| {
            let sentence = format!(
                "control has not said yet where {to} is: its watch of Kubernetes has not begun, or is not configured; \
                 until then only edges are found, by their names"
            );
            Failure::new(503, "no-book", sentence)
        })
    }

    /// A number that no other connection of this door has, and that is not 0.
    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn turned_away(&self, reason: &str) {
        self.router.metrics().door_refusals.with_label_values(&[DOOR, reason]).inc();
    }
}

impl Opening<'_> {
    fn run_unix<F>(
        &self,
        path: &Path,
        mode: u32,
        visit: impl Fn(UnixStream) -> F + Send + 'static,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = UnixDoor::open(path, mode).context("the egress door")?;
        let bounds = (self.connections, Arc::clone(self.metrics));
        self.accepting.spawn(listener.run(self.accepting.clone(), self.streams.clone(), bounds, visit));
        Ok(())
    }
}

/// Whether another endpoint of a service may answer where this one does not.
const fn may_work_elsewhere(code: RefuseCode) -> bool {
    use RefuseCode as C;
    matches!(
        code,
        C::EdgeOffline
            | C::EdgeUnknown
            | C::LinkLost
            | C::MeshTimeout
            | C::TargetRefused
            | C::TargetUnreachable
            | C::TargetTimeout
    )
}
