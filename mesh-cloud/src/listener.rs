//! Who comes over QUIC, or over TCP: edges with their tunnels, people's tools with their streams, other shards with what they pass on.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use proto::{
    ALPN_PEER,
    api::{Parting, ShardState},
    code::CloseCode,
    id::ShardId,
    identity::{Identity, Role},
    message::{Refuse, ShardToEdge, Welcome},
    principal::Principal,
};
use runtime::{
    clock,
    link::{
        Link,
        listen::{Arriving, Listener},
    },
    shutdown::Tasks,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tracing::{Instrument, info_span};

use crate::{
    admit::{Standing, Verdict, candidates, ping_period},
    config::LimitsConfig,
    directory::Directory,
    fair::{Arrivals, UserShares},
    live::Lease,
    metrics::Metrics,
    opener::{OnBehalf, Opener},
    partings::{self, Partings},
    peer::hear::Hearing,
    registry::{Registered, Registry},
    route::Router,
    session::{EdgeHandle, Notice, Renewals, Session, SessionEnd},
};

/// Arrivals that wait for their handshake; one more is turned away.
const WAITING: usize = 2048;
/// How long an arrival may wait: whoever has waited longer has given up, or will before its handshake is through.
const PATIENCE: Duration = Duration::from_millis(2500);
/// A turn of everything that is ready takes no longer on a shard that has time for another handshake.
const BUSY: Duration = Duration::from_millis(2);
/// The longest pause between two handshakes, however busy the shard is: so many arrivals are served at the least.
const BREATH: Duration = Duration::from_millis(5);
/// What edges are told that come too soon after the last time, at least.
const SLOW_DOWN: Duration = Duration::from_secs(1);

/// What every arrival needs.
#[derive(Clone, Debug)]
pub struct Reception {
    /// This shard.
    pub shard: ShardId,
    /// Tunnels.
    pub registry: Registry,
    /// Opens streams.
    pub router: Router,
    /// What other shards say.
    pub directory: Directory,
    /// Whether this shard is about to stop.
    pub standing: watch::Receiver<ShardState>,
    /// Credentials in use.
    pub live: crate::live::LiveCredentials,
    /// Passes renewals to control.
    pub renewals: Renewals,
    /// Why edges are here no longer.
    pub partings: Partings,
    /// How often each edge comes.
    pub arrivals: Arc<Arrivals>,
    /// Links of each user.
    pub user_links: UserShares,
    /// Streams of each user.
    pub user_streams: UserShares,
    /// Bounds.
    pub limits: LimitsConfig,
}

/// Who waits for a handshake, in the order of coming.
type Queue = VecDeque<(Arriving, Instant)>;

/// A tunnel that waits for its last streams to end, counted until dropped.
struct Leaving(Arc<Metrics>);

impl Leaving {
    fn new(metrics: Arc<Metrics>) -> Self {
        metrics.tunnels_leaving.inc();
        Self(metrics)
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.tunnels_leaving.dec();
    }
}

/// Lets streams go before handshakes, each of which takes as much of a core as a hundred small requests: waits until
/// everything else that is ready has had its turn, and that did not take long.
async fn breathe() {
    let begun = Instant::now();
    let mut turn = begun;
    loop {
        tokio::task::yield_now().await;
        let now = Instant::now();
        if now - turn < BUSY || now - begun >= BREATH {
            return;
        }
        turn = now;
    }
}

impl Reception {
    /// Accepts until the listener is closed. Links live on in `sessions`, streams in `streams`.
    pub async fn run(self, listener: Listener, sessions: Tasks, streams: Tasks) {
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        let mut queue = Queue::new();
        loop {
            let arriving = tokio::select! {
                biased;
                () = sessions.stopping() => return,
                permit = Arc::clone(&handshakes).acquire_owned(), if !queue.is_empty() => {
                    if let (Some(arriving), Ok(permit)) = (self.next(&mut queue), permit) {
                        self.shake_hands(arriving, permit, &sessions, &streams);
                        breathe().await;
                    }
                    continue;
                }
                arriving = listener.accept() => arriving,
            };
            let Some(arriving) = arriving else { return };
            let room = handshakes.available_permits();
            self.arrive(arriving, listener.links(), room, &mut queue);
        }
    }

    /// Lets an arrival into the queue, has it prove its address first, or turns it away.
    fn arrive(&self, arriving: Arriving, links: usize, room: usize, queue: &mut Queue) {
        // A tenth more than edges and people may have, so that shards still reach each other when that is full.
        if links > self.limits.links + self.limits.links / 10 {
            self.count("full");
            return arriving.refuse();
        }
        // From half of the room on, everybody proves the own address first, which costs this shard nothing. So nobody
        // waits in the queue who is not really there.
        let arriving = if room * 2 <= self.limits.handshakes || !queue.is_empty() {
            match arriving.retry() {
                Ok(()) => return self.count("retry"),
                Err(proven) => proven,
            }
        } else {
            arriving
        };
        if queue.len() >= WAITING {
            self.count("busy");
            return arriving.refuse();
        }
        queue.push_back((arriving, Instant::now()));
        self.waiting(queue);
    }

    /// The next one in the queue that has not waited in vain.
    fn next(&self, queue: &mut Queue) -> Option<Arriving> {
        while let Some((arriving, since)) = queue.pop_front() {
            self.waiting(queue);
            if since.elapsed() < PATIENCE {
                return Some(arriving);
            }
            self.count("late");
            arriving.refuse();
        }
        None
    }

    fn waiting(&self, queue: &Queue) {
        self.router.metrics().arrivals_waiting.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
    }

    fn shake_hands(&self, arriving: Arriving, permit: OwnedSemaphorePermit, sessions: &Tasks, streams: &Tasks) {
        let (this, streams) = (self.clone(), streams.clone());
        sessions.spawn(async move {
            let (from, carrier) = (arriving.remote_address(), arriving.carrier());
            let link = match arriving.accept().await {
                Ok(link) => link,
                Err(end) => {
                    this.count(end.cause.slug());
                    tracing::info!(%from, %carrier, cause = %end.cause, detail = end.detail, "a handshake failed");
                    return;
                }
            };
            drop(permit);
            this.receive(link, streams).await;
        });
    }

    fn count(&self, outcome: &str) {
        self.router.metrics().arrivals.with_label_values(&[outcome]).inc();
    }

    async fn receive(self, link: Link, tasks: Tasks) {
        let facts = link.peer();
        let identity = facts.identity.clone();
        let outcome = |outcome: &str| self.count(outcome);
        let lease = self.live.lease(&facts.serial);
        if !self.router.state().is_good(&facts.serial) {
            outcome("revoked");
            tracing::warn!(%identity, from = %link.remote_address(), "a revoked certificate was shown");
            link.close(CloseCode::Revoked, CloseCode::Revoked.sentence());
            return;
        }
        // A resumed session shows the certificate of its first handshake.
        if facts.not_after < clock::unix_now() {
            outcome("expired");
            link.close(CloseCode::Expired, CloseCode::Expired.sentence());
            return;
        }
        match identity.role {
            Role::Edge => {
                outcome("edge");
                let span = info_span!("edge", id = %identity.name, generation = tracing::field::Empty);
                self.edge(link, &identity, lease, tasks).instrument(span).await;
            }
            Role::User => {
                outcome("user");
                let span = info_span!("user", name = %identity.name);
                self.user(link, &identity, lease, tasks).instrument(span).await;
            }
            Role::Shard if link.alpn().as_deref() == Some(ALPN_PEER) => {
                outcome("shard");
                let span = info_span!("peer", shard = %identity.name);
                self.peer(link, &identity, lease, tasks).instrument(span).await;
            }
            Role::Shard | Role::Control => {
                outcome("wrong-role");
                let reason = format!("a {} certificate may not connect here", identity.role);
                link.close(CloseCode::WrongRole, &reason);
            }
        }
    }

    async fn edge(&self, link: Link, identity: &Identity, lease: Lease, tasks: Tasks) {
        let metrics = self.router.metrics();
        let Some(id) = identity.edge() else { return };
        let from = link.remote_address();
        let generation = self.registry.next_generation();
        tracing::Span::current().record("generation", generation);
        let end = match Session::greet(link, id, generation).await {
            Ok(session) => match self.welcome(session).await {
                Ok((session, registered)) => {
                    let carrier = session.handle.link.carrier();
                    tracing::info!(%from, %carrier, version = session.handle.version, "connected");
                    let carried = metrics.carriers.with_label_values(&[carrier.slug()]);
                    metrics.tunnels.inc();
                    carried.inc();
                    let end = self.tunnel(session, registered, lease, tasks).await;
                    carried.dec();
                    metrics.tunnels.dec();
                    end
                }
                Err(end) => end,
            },
            Err(end) => end,
        };
        let cause = match &end {
            SessionEnd::Link(end) => end.cause.slug(),
            SessionEnd::Bye(_) => "bye",
            SessionEnd::Refused(refuse) => refuse.code.slug(),
        };
        metrics.session_ends.with_label_values(&[cause]).inc();
        tracing::info!(%from, cause, %end, "disconnected");
        self.part(identity, from, cause, &end);
    }

    /// Notes why an edge went, unless it went elsewhere.
    fn part(&self, identity: &Identity, from: SocketAddr, cause: &str, end: &SessionEnd) {
        let (Some(edge), Some(detail)) = (identity.edge(), partings::detail(end)) else { return };
        let (cause, from) = (cause.to_owned(), from.to_string());
        self.partings.note(Parting { edge, shard: self.shard.clone(), at: clock::unix_now(), cause, detail, from });
    }

    /// Whether the edge is served here; if not, it has been told.
    async fn admit(&self, mut session: Session) -> Result<Session, SessionEnd> {
        let (edge, state) = (session.handle.id.clone(), self.router.state());
        let too_often = self.arrivals.come(&edge, Instant::now()).err();
        let standing = Standing {
            me: &self.shard,
            ring: &state.ring,
            order: state.orders.get(&self.shard).copied().unwrap_or_default(),
            draining: *self.standing.borrow() == ShardState::Draining,
            full: self.registry.len() >= self.limits.links && self.registry.find(&edge).is_none(),
        };
        let verdict = match too_often {
            Some(wait) => Verdict::Refuse(Refuse {
                retry_after: Some(wait.max(SLOW_DOWN)),
                ..Refuse::because(CloseCode::Overloaded, "this edge comes too often; it has to wait a moment")
            }),
            None => standing.admit(&session.hello),
        };
        match verdict {
            Verdict::Serve => Ok(session),
            Verdict::Redirect(to) => {
                self.count("redirected");
                let shard = to.shard.clone();
                session.say(ShardToEdge::Redirect { to, epoch: state.ring.epoch() }).await?;
                Err(session.redirected(&shard).await)
            }
            Verdict::Refuse(refuse) => {
                self.count(refuse.code.slug());
                Err(session.refuse(refuse).await)
            }
        }
    }

    /// Enters the edge and says Welcome, or turns it away.
    async fn welcome(&self, session: Session) -> Result<(Session, Registered), SessionEnd> {
        let mut session = self.admit(session).await?;
        let skew = i128::from(session.hello.unix_ms) - i128::from(clock::unix_millis());
        if skew.unsigned_abs() > 60_000 {
            tracing::warn!(skew_ms = %skew, "the edge's clock is wrong");
        }
        let (registered, old) = match self.registry.enter(Arc::clone(&session.handle)) {
            Ok(entered) => entered,
            Err(duplicate) => {
                self.router.metrics().duplicate_identities.inc();
                let (here, there) = (session.handle.address(), duplicate.incumbent);
                tracing::warn!(%here, %there, "two machines use one identity; enrol one of them anew");
                let reason = format!(
                    "the machine at {there} is connected with the same identity; enrol one of the two anew under a name of its own"
                );
                return Err(session.refuse(Refuse::because(CloseCode::DuplicateIdentity, reason)).await);
            }
        };
        if let Some(old) = old.filter(|old| old.instance != session.handle.instance) {
            old.replaced();
        }
        session.say(ShardToEdge::Welcome(self.welcome_for(&session.handle))).await?;
        Ok((session, registered))
    }

    fn welcome_for(&self, edge: &EdgeHandle) -> Welcome {
        let state = self.router.state();
        Welcome {
            shard: self.shard.clone(),
            epoch: state.ring.epoch(),
            candidates: candidates(&state.ring, &self.shard, &edge.id),
            unix_ms: clock::unix_millis(),
            ping: ping_period(self.registry.len(), Duration::from_millis(self.limits.ping_ms)),
            generation: edge.generation,
            seen_as: edge.address().to_string(),
        }
    }

    async fn tunnel(&self, session: Session, registered: Registered, lease: Lease, tasks: Tasks) -> SessionEnd {
        let handle = Arc::clone(&session.handle);
        let who = Principal::Edge { name: handle.id.clone(), site: handle.site.clone() };
        let opener = Opener {
            router: self.router.clone(),
            on_behalf: OnBehalf::Of { principal: who, credential: None, shares: None },
            link: handle.link.clone(),
        };
        let opening = opener.run_small(self.limits.streams_per_link, tasks);
        let leaving = OnceLock::new();
        let notify = |notice| match notice {
            Notice::Announced(services) => registered.announce(services),
            Notice::Stands(standing) => registered.stands(standing),
            Notice::Leaving => {
                leaving.get_or_init(|| Leaving::new(Arc::clone(self.router.metrics())));
                registered.leave();
            }
        };
        let serving = session.serve(notify, &self.renewals, lease.ended());
        tokio::pin!(serving);
        tokio::select! {
            biased;
            end = &mut serving => end,
            // It ends with the link, of which the session knows more.
            _ = opening => serving.await,
        }
    }

    async fn user(&self, link: Link, identity: &Identity, lease: Lease, tasks: Tasks) {
        let Some(name) = identity.user() else { return };
        let Some(_one_of_its_links) = self.user_links.take(&name) else {
            self.count("too-many-links");
            let most = self.limits.links_per_user;
            return link.close(CloseCode::Overloaded, &format!("user/{name} has {most} links here, which is the most"));
        };
        let metrics = self.router.metrics();
        metrics.user_links.inc();
        link.allow_streams(self.limits.streams_per_link);
        let on_behalf = OnBehalf::Of {
            principal: Principal::User { name: name.clone(), groups: link.peer().groups.clone() },
            credential: Some(link.peer().serial.clone()),
            shares: Some((name, self.user_streams.clone())),
        };
        let opener = Opener { router: self.router.clone(), on_behalf, link: link.clone() };
        tokio::select! {
            biased;
            () = lease.ended().cancelled() => link.close(CloseCode::Revoked, CloseCode::Revoked.sentence()),
            end = opener.run(tasks) => tracing::debug!(cause = %end.cause, "the user left"),
        }
        metrics.user_links.dec();
    }

    async fn peer(&self, link: Link, identity: &Identity, lease: Lease, tasks: Tasks) {
        let Some(peer) = identity.shard() else { return };
        link.carry_many(self.limits.streams_per_peer);
        let opener = Opener { router: self.router.clone(), on_behalf: OnBehalf::Stated, link: link.clone() };
        let hearing = Hearing { peer, link: link.clone(), directory: self.directory.clone() };
        tokio::select! {
            biased;
            () = lease.ended().cancelled() => link.close(CloseCode::Revoked, CloseCode::Revoked.sentence()),
            end = hearing.run(|stream| opener.serve(stream, &tasks)) => {
                tracing::info!(cause = %end.cause, "a peer left");
            }
        }
    }
}
