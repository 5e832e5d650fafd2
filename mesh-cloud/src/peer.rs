//! Links between shards. Each shard dials every other one that lives and keeps that link: over it go the streams that it
//! passes on, and what it has to say about edges of the other one's arc.
//!
//! What comes in over a link that another shard dialled is in [`hear`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::pending,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use proto::{
    backoff::Backoff,
    code::{CloseCode, RefuseCode, ResetCode},
    frame::MAX_STREAM_HEAD,
    id::{EdgeId, ServiceName, ShardId},
    peer::{Held, MAX_ANNOUNCED, MAX_HELD, ShardToShard},
    stream::{Answer, Open, Refusal, Routed},
};
use runtime::{
    frames::FrameReader,
    link::{Link, Stream, quic::Dialer},
    shutdown::Tasks,
    telemetry,
};
use tokio::{
    sync::{Notify, futures::Notified, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{Instrument, info_span};

use crate::{metrics::Metrics, registry::Registry, state::MeshState};

pub mod hear;

/// Bounds of the pause before a peer that cannot be reached is dialled again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long a peer may take to find an edge for a stream; it may have to ask another one.
const ROUTE: Duration = Duration::from_secs(3);
/// How long a message may take to be taken off our hands.
const WRITE: Duration = Duration::from_secs(5);
/// Changes that come within this time are told together.
const GATHER: Duration = Duration::from_millis(20);
/// How long a peer may take to contradict the network, at least, and in round trips.
const CONTRADICT: (Duration, u32) = (Duration::from_millis(250), 2);
/// How long resolving a peer's name may take.
const RESOLVE: Duration = Duration::from_secs(3);

/// The links to other shards. Clones are the same links.
#[derive(Clone, Debug)]
pub struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    me: ShardId,
    dialer: Dialer,
    links: Mutex<BTreeMap<ShardId, Link>>,
    /// When the links to those ended to whom there is none now.
    lost: Mutex<BTreeMap<ShardId, Instant>>,
    metrics: Arc<Metrics>,
    /// Those who wait are woken in the order in which they came, so that a simulated run is like the one before.
    news: Notify,
    /// Ends the pauses of those who dial.
    wanted: Notify,
    /// How many streams wait for a link.
    wanting: AtomicUsize,
}

/// A stream waits for a link, until dropped.
#[derive(Debug)]
pub struct Wanting(Peers);

impl Drop for Wanting {
    fn drop(&mut self) {
        self.0.0.wanting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why another shard did not find an edge's tunnel.
#[derive(Clone, Debug)]
pub enum NotThere {
    /// It said nothing: what it knows is not known here.
    Unreached(String),
    /// It said no.
    Refused(Refusal),
}

impl Peers {
    /// None yet; [`Peers::run`] finds them.
    #[must_use]
    pub fn new(me: ShardId, dialer: Dialer, metrics: Arc<Metrics>) -> Self {
        let (news, wanted, wanting) = (Notify::new(), Notify::new(), AtomicUsize::new(0));
        let (links, lost) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { me, dialer, links, lost, metrics, news, wanted, wanting }))
    }

    /// Whether there is a link to this shard.
    #[must_use]
    pub fn has(&self, shard: &ShardId) -> bool {
        self.link(shard).is_some()
    }

    /// When the link to this shard ended, if there was one and is none now.
    #[must_use]
    pub fn lost_at(&self, shard: &ShardId) -> Option<Instant> {
        let link = self.0.links.lock().get(shard).and_then(Link::end).map(|_| Instant::now());
        link.or_else(|| self.0.lost.lock().get(shard).copied())
    }

    /// How many shards there is a link to.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.links.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn link(&self, shard: &ShardId) -> Option<Link> {
        self.0.links.lock().get(shard).filter(|link| link.end().is_none()).cloned()
    }

    /// Waits until there is a new link, or control has said something new. Cancel-safe.
    pub fn news(&self) -> Notified<'_> {
        self.0.news.notified()
    }

    /// Has peers without a link dialled soon, for as long as the answer is held: a stream waits for one.
    #[must_use]
    pub fn want(&self) -> Wanting {
        self.0.wanting.fetch_add(1, Ordering::Relaxed);
        self.0.wanted.notify_waiters();
        Wanting(self.clone())
    }

    /// Passes a stream on to another shard, and waits until it has found the edge's tunnel. The edge's own answer is
    /// still to come.
    ///
    /// # Errors
    /// If that shard cannot be reached, or refuses.
    pub async fn open(&self, shard: &ShardId, open: &Open) -> Result<(Stream, Routed), NotThere> {
        let answer = match self.link(shard) {
            Some(link) => {
                let late = || Err(NotThere::Unreached("it did not answer in time".to_owned()));
                timeout(ROUTE, ask(&link, shard, open)).await.unwrap_or_else(|_| late())
            }
            None => Err(NotThere::Unreached("there is no link to it".to_owned())),
        };
        let outcome = match &answer {
            Ok(_) => "routed",
            Err(NotThere::Unreached(_)) => "unreached",
            Err(NotThere::Refused(refusal)) => refusal.code.slug(),
        };
        self.0.metrics.forwarded.with_label_values(&[outcome]).inc();
        answer
    }

    /// Keeps a link to every other shard that lives, until the tasks stop.
    pub async fn run(self, mut state: watch::Receiver<Arc<MeshState>>, registry: Registry, tasks: Tasks) {
        let mut kept: BTreeMap<ShardId, Tasks> = BTreeMap::new();
        loop {
            let alive: BTreeSet<ShardId> = {
                let state = state.borrow_and_update();
                state.shards.iter().map(|c| c.shard.clone()).filter(|s| *s != self.0.me).collect()
            };
            self.0.news.notify_waiters();
            kept.retain(|shard, task| {
                let lives = alive.contains(shard);
                if !lives {
                    task.stop();
                    self.0.lost.lock().remove(shard);
                }
                lives
            });
            for shard in alive {
                if kept.contains_key(&shard) {
                    continue;
                }
                let task = tasks.child();
                let keeper = Keeper {
                    peers: self.clone(),
                    peer: shard.clone(),
                    state: state.clone(),
                    registry: registry.clone(),
                    tasks: task.clone(),
                };
                let span = info_span!("peer", shard = %shard);
                tasks.spawn(keeper.run().instrument(span));
                kept.insert(shard, task);
            }
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                changed = state.changed() => if changed.is_err() { return },
            }
        }
    }
}

async fn ask(link: &Link, shard: &ShardId, open: &Open) -> Result<(Stream, Routed), NotThere> {
    let lost = |why: &dyn fmt::Display| NotThere::Unreached(why.to_string());
    let refused = |code, why: String| NotThere::Refused(Refusal::because(code, why));
    let head = open.encode().map_err(|e| refused(RefuseCode::BadRequest, e.to_string()))?;
    let mut stream = link.open().await.map_err(|end| lost(&end))?;
    stream.send.write_one(head).await.map_err(|e| lost(&e))?;
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let body = match reader.next(&mut stream.recv).await {
        Ok(Some(body)) => body,
        Ok(None) => return Err(lost(&"it ended the stream")),
        Err(e) => return Err(lost(&e)),
    };
    match Answer::decode(body) {
        Ok(Answer::Routed(routed)) => {
            stream.recv.unread(reader.into_rest());
            Ok((stream, routed))
        }
        Ok(Answer::Refused(refusal)) => {
            stream.abort(ResetCode::Refused);
            Err(NotThere::Refused(refusal))
        }
        Ok(Answer::Opened { .. }) | Err(_) => {
            stream.abort(ResetCode::ProtocolError);
            Err(refused(RefuseCode::Internal, format!("shard {shard} answered nonsense")))
        }
    }
}

/// Keeps the link to one peer.
struct Keeper {
    peers: Peers,
    peer: ShardId,
    state: watch::Receiver<Arc<MeshState>>,
    registry: Registry,
    tasks: Tasks,
}

impl Keeper {
    async fn run(mut self) {
        let tasks = self.tasks.clone();
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let dialled = tokio::select! {
                biased;
                () = tasks.stopping() => return,
                dialled = self.dial() => dialled,
            };
            match dialled {
                Ok(link) => {
                    let begun = Instant::now();
                    self.keep(&link).await;
                    if tasks.is_stopping() {
                        return link.close(CloseCode::Shutdown, CloseCode::Shutdown.sentence());
                    }
                    link.close(CloseCode::Done, "");
                    backoff.link_lived(begun.elapsed());
                }
                Err(why) => tracing::debug!(%why, "the peer cannot be reached"),
            }
            // A peer has no crowd of its own kind to be spread from: half of the pause is all the jitter that it needs.
            let pause = backoff.next_delay(0.5);
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                () = self.rest(pause) => {}
            }
        }
    }

    /// Waits before the next try; for the shortest pause only, if a stream waits for a link.
    async fn rest(&self, pause: Duration) {
        let (least, peers) = (RETRY.0.min(pause), &self.peers.0);
        sleep(least).await;
        let wanted = peers.wanted.notified();
        if peers.wanting.load(Ordering::Relaxed) == 0 {
            // Whether somebody wants it or the pause is over, it is time.
            let _ = timeout(pause - least, wanted).await;
        }
    }

    /// Dials the peer's addresses, one after the other.
    async fn dial(&self) -> anyhow::Result<Link> {
        let addresses = {
            let state = self.state.borrow();
            state.shards.iter().find(|c| c.shard == self.peer).map(|c| c.addresses.clone()).unwrap_or_default()
        };
        let mut last = anyhow::anyhow!("it has no address");
        for address in addresses {
            for resolved in resolve(&address).await? {
                match self.peers.0.dialer.dial(resolved, self.peer.as_str()).await {
                    Ok(link) if link.peer().identity.shard().as_ref() == Some(&self.peer) => return Ok(link),
                    Ok(link) => {
                        last = anyhow::anyhow!("{address} is {} and not shard {}", link.peer().identity, self.peer);
                        link.close(CloseCode::NameMismatch, &last.to_string());
                        tracing::warn!(error = %last, "another shard answers at a peer's address; correct 'advertise'");
                    }
                    Err(end) => last = end.into(),
                }
            }
        }
        Err(last)
    }

    /// Holds the link up until it ends or the peer is not wanted any more.
    async fn keep(&mut self, link: &Link) {
        let links = &self.peers.0.links;
        links.lock().insert(self.peer.clone(), link.clone());
        self.peers.0.lost.lock().remove(&self.peer);
        self.peers.0.news.notify_waiters();
        self.peers.0.metrics.peers.inc();
        let tasks = self.tasks.clone();
        let ended = link.clone();
        let telling = self.tell(link);
        tokio::select! {
            biased;
            () = tasks.stopping() => {}
            end = ended.ended() => tracing::info!(cause = %end.cause, "the link to a peer ended"),
            () = nobody_listens(link) => {
                tracing::info!("the host of a peer says that nobody listens there any more");
                link.close(CloseCode::Done, "");
            }
            told = telling => if let Err(error) = told {
                tracing::warn!(%error, "a peer does not listen");
            },
        }
        self.peers.0.metrics.peers.dec();
        if !tasks.is_stopping() {
            self.peers.0.lost.lock().insert(self.peer.clone(), Instant::now());
        }
        self.peers.0.links.lock().remove(&self.peer);
    }

    /// Tells the peer what it must know, and what changes.
    async fn tell(&mut self, link: &Link) -> anyhow::Result<()> {
        let mut voice = Voice { stream: link.open().await?, told: BTreeMap::new(), services: None };
        voice.stream.send.go_first();
        let changes = self.registry.changes();
        let mut epoch = None;
        loop {
            let state = Arc::clone(&self.state.borrow_and_update());
            let suspects: BTreeSet<EdgeId> = if epoch == Some(state.ring.epoch()) {
                changes.take()
            } else {
                // Everything has to be looked at again; what changed besides is among it.
                drop(changes.take());
                self.registry.all().iter().map(|h| h.id.clone()).chain(voice.told.keys().cloned()).collect()
            };
            if epoch.is_none() {
                let version = telemetry::version().to_owned();
                voice.say(ShardToShard::Greeting { epoch: state.ring.epoch(), version }).await?;
            }
            voice.tell(epoch.is_none(), suspects, |edge| self.held_for_peer(&state, edge)).await?;
            if epoch != Some(state.ring.epoch()) {
                // From here on the peer can tell that an edge of its arc is not here.
                let version = telemetry::version().to_owned();
                voice.say(ShardToShard::Greeting { epoch: state.ring.epoch(), version }).await?;
            }
            voice.announce(self.registry.services()).await?;
            epoch = Some(state.ring.epoch());
            sleep(GATHER).await;
            tokio::select! {
                biased;
                changed = self.state.changed() => changed?,
                () = changes.some() => {}
            }
        }
    }

    /// When the edge said Hello, if its tunnel ends here and the peer owns it.
    fn held_for_peer(&self, state: &MeshState, edge: &EdgeId) -> Option<u64> {
        let owner = state.ring.owner(edge)?;
        if owner.shard != self.peer {
            return None;
        }
        Some(self.registry.find(edge)?.unix_ms)
    }
}

/// The control stream of a link, and what was said in it.
struct Voice {
    stream: Stream,
    told: BTreeMap<EdgeId, u64>,
    services: Option<BTreeMap<ServiceName, u32>>,
}

impl Voice {
    async fn say(&mut self, message: ShardToShard) -> anyhow::Result<()> {
        timeout(WRITE, self.stream.send.write_one(message.encode()?)).await??;
        Ok(())
    }

    /// Tells what is different from what was told; `first` says that nothing was.
    async fn tell(
        &mut self,
        first: bool,
        suspects: BTreeSet<EdgeId>,
        held_now: impl Fn(&EdgeId) -> Option<u64>,
    ) -> anyhow::Result<()> {
        let (mut held, mut released) = (Vec::new(), Vec::new());
        for edge in suspects {
            match held_now(&edge) {
                Some(unix_ms) => {
                    if self.told.insert(edge.clone(), unix_ms) != Some(unix_ms) {
                        held.push(Held { edge, unix_ms });
                    }
                }
                None => {
                    if self.told.remove(&edge).is_some() {
                        released.push(edge);
                    }
                }
            }
        }
        if first && held.is_empty() {
            self.say(ShardToShard::Held { all: true, edges: Vec::new() }).await?;
        }
        let mut all = first;
        for part in held.chunks(MAX_HELD) {
            self.say(ShardToShard::Held { all, edges: part.to_vec() }).await?;
            all = false;
        }
        for part in released.chunks(MAX_HELD) {
            self.say(ShardToShard::Released(part.to_vec())).await?;
        }
        Ok(())
    }

    async fn announce(&mut self, services: BTreeMap<ServiceName, u32>) -> anyhow::Result<()> {
        let services: BTreeMap<_, _> = services.into_iter().take(MAX_ANNOUNCED).collect();
        if self.services.as_ref() != Some(&services) {
            self.services = Some(services.clone());
            self.say(ShardToShard::Announced(services)).await?;
        }
        Ok(())
    }
}

/// Waits until the network has said twice that nobody listens there, and the peer has not contradicted it: streams that
/// it might have passed on need not wait for the end of a silence.
async fn nobody_listens(link: &Link) {
    let Some(mut signs) = link.signs() else { return pending().await };
    loop {
        let first = signs.borrow_and_update().refused;
        // The link holds the sender.
        if signs.changed().await.is_err() {
            return pending().await;
        }
        let (received, patience) = (link.stats().received_bytes, CONTRADICT.0.max(link.rtt() * CONTRADICT.1));
        sleep(patience).await;
        if signs.borrow().refused >= first + 2 && link.stats().received_bytes == received {
            return;
        }
    }
}

/// An IP address with a port as it is; anything else by DNS.
async fn resolve(address: &str) -> anyhow::Result<Vec<SocketAddr>> {
    if let Ok(address) = address.parse() {
        return Ok(vec![address]);
    }
    let until = Instant::now() + RESOLVE;
    Ok(timeout_at(until, tokio::net::lookup_host(address)).await??.collect())
}
