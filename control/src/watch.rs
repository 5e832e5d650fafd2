//! The state that shards follow, and how it reaches them.
//!
//! The state has nine sections, each kept as the JSON that goes out, with the revision at which it changed. A follower
//! remembers which revision of each section it has sent and sends what is newer when there is room: a slow one skips
//! to the newest state, and nothing ever queues up for it.
//!
//! Sections of the database are read again when this process commits, when PostgreSQL announces that another replica did,
//! and when the once-a-second poll finds a new revision all the same. When the database is away the last state stays in force. The ring and
//! the orders come from [`crate::leader`].

pub mod book;
mod state;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use proto::{api::ShardOrder, id::ShardId, ring::RingSpec, ssh::Trust};
use runtime::{admin::ReadyPart, clock::unix_now, shutdown::Tasks, tls::TrustBundle};
use serde::Serialize;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

pub use self::state::{Follower, State};
use self::{book::SharedBook, state::Part};
use crate::{
    metrics::Metrics,
    presence::Presence,
    sight::Sight,
    store::{Dialect, Revisions, Store, StoreError},
};

/// How often the database is asked whether another process changed it.
const POLL: Duration = Duration::from_secs(1);
/// How often leases are looked through.
const LEASES: Duration = Duration::from_millis(500);
/// The pause between two readings of all edges, for each edge, so that a fleet that enrols does not read itself to death:
/// 5 s for a hundred thousand, which is some ten times what it takes. It depends on nothing but the number, since a
/// machine that is busy would else make a small fleet wait.
const EDGE_PAUSE: Duration = Duration::from_micros(50);
/// Callers wait for edges to be in force up to this pause; those who enrol a large fleet do not.
const AWAITED: Duration = Duration::from_millis(250);
/// How long a change waits to be in force before its caller is answered anyway.
const IN_FORCE: Duration = Duration::from_secs(2);

/// Keeps the state current. Clones share it.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: watch::Sender<State>,
    /// The revision of the database that is in force.
    stored: watch::Sender<i64>,
    /// The revision at which the edges changed last.
    edges_at: watch::Sender<i64>,
    /// The one at which they changed last among those that are in force.
    edges_in: watch::Sender<i64>,
    store: Store,
    /// The same with connections that no call of the API holds.
    followed: Store,
    presence: Arc<Presence>,
    metrics: Metrics,
    /// Whether this replica can know what the others decide.
    sight: Sight,
    /// The address book of the cluster, if there is one.
    book: SharedBook,
    /// Whether this replica leads.
    leads: watch::Sender<bool>,
    /// Who may come in by SSH: the authorities come from files and the keys from the database.
    ssh: Mutex<Trust>,
    /// When the commit that is not yet in force happened.
    pending: Mutex<Option<Instant>>,
}

impl Hub {
    /// Reads the first state.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn start(
        store: Store,
        presence: Arc<Presence>,
        bundle: &TrustBundle,
        metrics: Metrics,
        (ready, tasks): (ReadyPart, &Tasks),
    ) -> Result<Self, StoreError> {
        let leases = store.leases().await?;
        let (ring, orders) = (store.ring().await?.ring, store.orders().await?);
        let now = Instant::now();
        presence.adopt(leases, now);
        let sight = Sight::new(store.dialect() == Dialect::Sqlite, now);
        let inner = Inner {
            state: watch::channel(State::default()).0,
            stored: watch::channel(0).0,
            edges_at: watch::channel(0).0,
            edges_in: watch::channel(0).0,
            followed: store.for_followers(),
            store,
            presence,
            metrics,
            sight,
            book: SharedBook::default(),
            leads: watch::channel(false).0,
            ssh: Mutex::default(),
            pending: Mutex::new(None),
        };
        let hub = Self(Arc::new(inner));
        hub.set_bundle(bundle);
        hub.refresh_shards();
        hub.set_ring(&ring, &orders);
        let mut loaded = Revisions::default();
        hub.refresh(&mut loaded).await?;
        hub.refresh_edges(loaded.edges).await?;
        let heard = Arc::new(Notify::new());
        let (failing, told) = watch::channel(None);
        tasks.spawn(hub.clone().follow_store(loaded, Arc::clone(&heard), failing, tasks.clone()));
        tasks.spawn(hub.clone().probe(ready, told, tasks.clone()));
        let (listens, token) = (hub.0.followed.clone(), tasks.token());
        tasks.spawn(token.run_until_cancelled_owned(async move { listens.hear(|| heard.notify_one()).await }));
        tasks.spawn(hub.clone().follow_edges(loaded.edges, tasks.clone()));
        tasks.spawn(hub.clone().follow_shards(tasks.clone()));
        Ok(hub)
    }

    /// The present state.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.state.borrow().clone()
    }

    /// Whether a certificate is revoked.
    #[must_use]
    pub fn is_revoked(&self, serial: &str) -> bool {
        self.0.state.borrow().is_revoked(serial)
    }

    /// Waits until a revision that this process committed is in force here, at most two seconds.
    pub async fn in_force(&self, revision: i64) {
        let in_force = async {
            // The senders live as long as `self`.
            let _ = self.0.stored.subscribe().wait_for(|at| *at >= revision).await;
            let edges = *self.0.edges_at.borrow();
            if self.edges_pause() <= AWAITED {
                let _ = self.0.edges_in.subscribe().wait_for(|at| *at >= edges).await;
            }
        };
        if timeout(IN_FORCE, in_force).await.is_err() {
            tracing::warn!(revision, "a change is committed and not yet in force; the database is slow");
        }
    }

    /// Publishes the roots that are trusted.
    pub fn set_bundle(&self, bundle: &TrustBundle) {
        self.publish(Part::Bundle, &bundle.to_pem(), |_| ());
    }

    /// Publishes who signs SSH certificates of users, as lines.
    pub fn set_ssh_authorities(&self, lines: Vec<String>) {
        self.publish_ssh(|trust| trust.authorities = lines);
    }

    fn publish_ssh(&self, change: impl FnOnce(&mut Trust)) {
        let mut trust = self.0.ssh.lock();
        change(&mut trust);
        self.publish(Part::Ssh, &*trust, |_| ());
    }

    /// Begins to follow: the first line has the whole state. `None` if this replica has nothing to say, as others may
    /// know better.
    #[must_use]
    pub fn follow(&self) -> Option<Follower> {
        let (state, sight) = (self.0.state.subscribe(), self.0.sight.follow());
        (!self.0.sight.is_lost()).then(|| Follower::new(state, self.0.book.clone(), sight, self.0.metrics.clone()))
    }

    /// The address book of the cluster.
    #[must_use]
    pub fn book(&self) -> &SharedBook {
        &self.0.book
    }

    /// Says whether this replica leads.
    pub fn set_leads(&self, leads: bool) {
        self.0.leads.send_if_modified(|before| std::mem::replace(before, leads) != leads);
    }

    /// Tells whether this replica leads.
    #[must_use]
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.0.leads.subscribe()
    }

    /// Tells of each change of the state.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<State> {
        self.0.state.subscribe()
    }

    /// Whether this replica can know what the others decide.
    #[must_use]
    pub fn sight(&self) -> &Sight {
        &self.0.sight
    }

    /// Publishes the ring and the orders in force, in one line.
    pub fn set_ring(&self, ring: &RingSpec, orders: &BTreeMap<ShardId, ShardOrder>) {
        let (Some(ring_json), Some(orders_json)) = (json(Part::Ring, ring), json(Part::Orders, orders)) else {
            return;
        };
        self.0.state.send_if_modified(|state| {
            let new_ring = state.put(Part::Ring, ring_json);
            if new_ring {
                state.ring = Arc::new(ring.clone());
            }
            let new_orders = state.put(Part::Orders, orders_json);
            if new_orders {
                state.orders = Arc::new(orders.clone());
            }
            new_ring || new_orders
        });
    }

    /// Waits until an order is in force here, at most two seconds.
    pub async fn ordered(&self, shard: &ShardId, order: ShardOrder) {
        let mut state = self.0.state.subscribe();
        let is = |state: &State| state.orders.get(shard).copied().unwrap_or_default() == order;
        if timeout(IN_FORCE, state.wait_for(is)).await.is_err() {
            tracing::warn!(%shard, %order, "an order is written down and not yet in force; the database is slow");
        }
    }

    fn publish<T: Serialize>(&self, part: Part, value: &T, also: impl FnOnce(&mut State)) {
        let Some(json) = json(part, value) else { return };
        self.0.state.send_if_modified(|state| {
            let changed = state.put(part, json);
            if changed {
                also(state);
            }
            changed
        });
    }

    /// Follows the database: commits of this process and those that are heard of at once, others by polling. It only reads,
    /// so that nobody who writes holds it up.
    async fn follow_store(
        self,
        mut loaded: Revisions,
        heard: Arc<Notify>,
        failing: watch::Sender<Option<String>>,
        tasks: Tasks,
    ) {
        let mut commits = self.0.store.commits();
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                changed = commits.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.0.pending.lock().get_or_insert_with(Instant::now);
                }
                () = heard.notified() => {}
                _ = poll.tick() => {}
            }
            let error = self.refresh(&mut loaded).await.err().map(|e| e.to_string());
            failing.send_if_modified(|before| std::mem::replace(before, error.clone()) != error);
        }
    }

    /// Looks from time to time whether the database can be written, which may wait for those who write, and says how it is.
    async fn probe(self, ready: ReadyPart, mut failing: watch::Receiver<Option<String>>, tasks: Tasks) {
        let mut ticks = interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut up = None;
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                changed = failing.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {}
            }
            let unread = failing.borrow_and_update().clone();
            let error = match unread {
                Some(error) => Some(error),
                None => self.0.store.probe().await.err().map(|e| e.to_string()),
            };
            self.tell(error.as_deref(), &ready, &mut up);
        }
    }

    fn tell(&self, error: Option<&str>, ready: &ReadyPart, up: &mut Option<bool>) {
        let now_up = error.is_none();
        self.0.metrics.store_up.set(i64::from(now_up));
        match error {
            None => {
                ready.up();
                if *up == Some(false) {
                    tracing::info!("the database works again");
                }
            }
            Some(error) => {
                ready.down(format!("{error}; enrolments and changes are refused, watches go on from the last state"));
                if *up != Some(false) {
                    tracing::error!(%error, "the database cannot be used; changes are refused until it works again");
                }
            }
        }
        *up = Some(now_up);
    }

    /// Reads the sections that changed, except for the edges.
    async fn refresh(&self, loaded: &mut Revisions) -> Result<(), StoreError> {
        let store = &self.0.followed;
        let found = store.revisions().await?;
        let now = unix_now();
        if found.policy != loaded.policy {
            self.publish(Part::Policy, &store.rules().await?, |_| ());
            loaded.policy = found.policy;
        }
        if found.revoked != loaded.revoked {
            let revoked = store.revoked(now).await?;
            let serials = Arc::new(revoked.iter().map(|r| r.serial.clone()).collect());
            self.publish(Part::Revoked, &revoked, |state| state.revoked = serials);
            loaded.revoked = found.revoked;
        }
        if found.access != loaded.access {
            self.publish(Part::Access, &store.access_tokens(now).await?, |_| ());
            loaded.access = found.access;
        }
        if found.ssh != loaded.ssh {
            let keys = store.ssh_keys().await?;
            self.publish_ssh(|trust| trust.keys = keys);
            loaded.ssh = found.ssh;
        }
        (loaded.edges, loaded.revision) = (found.edges, found.revision);
        self.0.edges_at.send_if_modified(|at| std::mem::replace(at, found.edges) != found.edges);
        self.0.state.send_if_modified(|state| {
            state.revision = state.revision.max(u64::try_from(found.revision).unwrap_or(0));
            false
        });
        self.0.stored.send_replace(found.revision);
        if let Some(since) = self.0.pending.lock().take() {
            self.0.metrics.publish_seconds.observe(since.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// Follows the edges in a task of its own: reading a hundred thousand takes a while, and a revocation must not wait
    /// for it.
    async fn follow_edges(self, mut loaded: i64, tasks: Tasks) {
        let mut edges_at = self.0.edges_at.subscribe();
        let follow = async {
            while edges_at.wait_for(|at| *at != loaded).await.is_ok() {
                let found = *edges_at.borrow();
                let pause = match self.refresh_edges(found).await {
                    Ok(()) => {
                        loaded = found;
                        self.edges_pause()
                    }
                    Err(_) => POLL,
                };
                tokio::time::sleep(pause).await;
            }
        };
        tasks.token().run_until_cancelled(follow).await;
    }

    fn edges_pause(&self) -> Duration {
        let edges = u32::try_from(self.0.state.borrow().edges.len()).unwrap_or(u32::MAX);
        EDGE_PAUSE.saturating_mul(edges)
    }

    /// Reads the edges as they are at this revision, or later.
    async fn refresh_edges(&self, revision: i64) -> Result<(), StoreError> {
        let edges = self.0.store.edge_sites().await?;
        self.0.metrics.edges.set(i64::try_from(edges.len()).unwrap_or(i64::MAX));
        let names = Arc::new(edges.keys().cloned().collect());
        self.publish(Part::Edges, &edges, |state| state.edges = names);
        self.0.edges_in.send_replace(revision);
        Ok(())
    }

    /// Follows reports and lets leases end.
    async fn follow_shards(self, tasks: Tasks) {
        let mut tick = interval(LEASES);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                () = self.0.presence.changed() => {}
                _ = tick.tick() => self.0.presence.expire(Instant::now()),
            }
            self.refresh_shards();
        }
    }

    fn refresh_shards(&self) {
        let now = Instant::now();
        let alive = self.0.presence.alive(now);
        self.0.metrics.shards.set(i64::try_from(alive.len()).unwrap_or(i64::MAX));
        self.0.metrics.edges_online.set(i64::try_from(self.0.presence.online(now)).unwrap_or(i64::MAX));
        let kept = Arc::new(alive.clone());
        self.publish(Part::Shards, &alive, |state| state.shards = kept);
    }

    /// Writes down, from time to time, when edges were last seen, and forgets what ended long ago.
    pub async fn keep_house(self, tasks: Tasks) {
        /// How often edges that went are written down.
        const SEEN: Duration = Duration::from_secs(10);
        /// Every so many times, those that are online are too, and old certificates and tokens are forgotten.
        const ALL: u32 = 180;
        /// How long what ended is still known, so that people are told "expired" and not "unknown": a week.
        const KEPT: i64 = 7 * 86_400;
        /// How long the lease of a shard that no longer reports is kept: an hour.
        const LEASE_KEPT: i64 = 3600;
        let mut round: u32 = 0;
        loop {
            if tasks.token().run_until_cancelled(tokio::time::sleep(SEEN)).await.is_none() {
                break;
            }
            round = round.wrapping_add(1);
            let all = round.is_multiple_of(ALL);
            self.write_seen(all).await;
            if all {
                let swept = self.0.store.sweep(unix_now() - KEPT).await;
                let forgotten = self.0.store.forget_shards(unix_now() - LEASE_KEPT).await;
                if let Err(error) = swept.map(|_| ()).and(forgotten) {
                    tracing::debug!(%error, "old records could not be forgotten now");
                }
            }
        }
        self.write_seen(true).await;
    }

    async fn write_seen(&self, online: bool) {
        /// Rows in one transaction, which hold up other writers for some ten milliseconds.
        const BATCH: usize = 500;
        let seen = self.0.presence.take_seen(online, Instant::now());
        let mut batches = seen.chunks(BATCH);
        while let Some(batch) = batches.next() {
            if let Err(error) = self.0.store.saw(batch).await {
                tracing::debug!(%error, "last sightings could not be written down; kept for later");
                let rest = batch.iter().chain(batches.flatten());
                self.0.presence.give_back(rest.cloned());
                return;
            }
        }
    }
}

fn json<T: Serialize>(part: Part, value: &T) -> Option<Bytes> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .inspect_err(|error| tracing::error!(%error, section = part.name(), "a section of the watch cannot be written"))
        .ok()
}
