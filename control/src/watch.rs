//! The state that shards follow, and how it reaches them.
//!
//! The state has six sections, each kept as the JSON that goes out, with the revision at which it changed. A follower
//! remembers which revision of each section it has sent and sends what is newer when there is room: a slow one skips
//! to the newest state, and nothing ever queues up for it.
//!
//! Sections of the database are read again when this process commits, and when the once-a-second poll finds a new
//! revision, as another replica may have committed. When the database is away the last state stays in force.

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use proto::message::Candidate;
use runtime::{admin::ReadyPart, clock::unix_now, shutdown::Tasks, tls::TrustBundle};
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    metrics::Metrics,
    presence::Presence,
    store::{Dialect, Revisions, Store, StoreError},
};

/// How often the database is asked whether another process changed it.
const POLL: Duration = Duration::from_secs(1);
/// How often a watch without news gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How often leases are looked through.
const LEASES: Duration = Duration::from_millis(500);
/// Reading all edges again may take this share of the time, so that a fleet that enrols does not read itself to death.
const EDGES_SHARE: u32 = 10;
/// How long a change waits to be in force before its caller is answered anyway.
const IN_FORCE: Duration = Duration::from_secs(2);

const NAMES: [&str; 6] = ["policy", "revoked", "access_tokens", "edges", "shards", "bundle"];
const POLICY: usize = 0;
const REVOKED: usize = 1;
const ACCESS: usize = 2;
const EDGES: usize = 3;
const SHARDS: usize = 4;
const BUNDLE: usize = 5;

/// The state at one moment.
#[derive(Clone)]
pub struct State {
    revision: u64,
    sections: [SectionState; 6],
    revoked: Arc<HashSet<String>>,
    shards: Arc<Vec<Candidate>>,
}

#[derive(Clone, Default)]
struct SectionState {
    at: u64,
    json: Bytes,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.sections.each_ref().map(|s| s.at);
        write!(f, "State(revision {}, sections {at:?})", self.revision)
    }
}

impl State {
    /// Whether a certificate is revoked.
    #[must_use]
    pub fn is_revoked(&self, serial: &str) -> bool {
        self.revoked.contains(serial)
    }

    /// The shards that live.
    #[must_use]
    pub fn shards(&self) -> Vec<Candidate> {
        self.shards.as_ref().clone()
    }

    /// Puts a section in place. Returns whether that is a change.
    fn put(&mut self, section: usize, json: Bytes) -> bool {
        if self.sections[section].json == json {
            return false;
        }
        self.revision += 1;
        self.sections[section] = SectionState { at: self.revision, json };
        true
    }

    /// The line with all sections that are newer than `seen`, which then are seen.
    fn line(&self, seen: &mut [u64; 6]) -> Option<Bytes> {
        let news: Vec<usize> = (0..NAMES.len()).filter(|&i| self.sections[i].at > seen[i]).collect();
        if news.is_empty() {
            return None;
        }
        let len: usize = news.iter().map(|&i| self.sections[i].json.len() + 24).sum();
        let mut line = BytesMut::with_capacity(len + 40);
        line.put_slice(format!("{{\"revision\":{}", self.revision).as_bytes());
        for i in news {
            line.put_slice(format!(",\"{}\":", NAMES[i]).as_bytes());
            line.put_slice(&self.sections[i].json);
            seen[i] = self.sections[i].at;
        }
        line.put_slice(b"}\n");
        Some(line.freeze())
    }

    fn sign_of_life(&self) -> Bytes {
        format!("{{\"revision\":{}}}\n", self.revision).into()
    }
}

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
    store: Store,
    presence: Arc<Presence>,
    metrics: Metrics,
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
        presence.adopt(leases, Instant::now());
        let state =
            State { revision: 0, sections: Default::default(), revoked: Arc::default(), shards: Arc::default() };
        let inner = Inner {
            state: watch::channel(state).0,
            stored: watch::channel(0).0,
            edges_at: watch::channel(0).0,
            store,
            presence,
            metrics,
            pending: Mutex::new(None),
        };
        let hub = Self(Arc::new(inner));
        hub.set_bundle(bundle);
        hub.refresh_shards();
        let mut loaded = Revisions::default();
        hub.refresh(&mut loaded).await?;
        hub.refresh_edges().await?;
        tasks.spawn(hub.clone().follow_store(loaded, ready, tasks.clone()));
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
        let mut stored = self.0.stored.subscribe();
        if timeout(IN_FORCE, stored.wait_for(|at| *at >= revision)).await.is_err() {
            tracing::warn!(revision, "a change is committed and not yet in force; the database is slow");
        }
    }

    /// Publishes the roots that are trusted.
    pub fn set_bundle(&self, bundle: &TrustBundle) {
        self.publish(BUNDLE, &bundle.to_pem(), |_| ());
    }

    /// Begins to follow: the first line has the whole state.
    #[must_use]
    pub fn follow(&self) -> Follower {
        self.0.metrics.watchers.inc();
        let mut state = self.0.state.subscribe();
        state.mark_changed();
        let mut beat = interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat.reset();
        Follower { state, seen: [0; 6], beat, metrics: self.0.metrics.clone() }
    }

    fn publish<T: Serialize>(&self, section: usize, value: &T, also: impl FnOnce(&mut State)) {
        let json = match serde_json::to_vec(value) {
            Ok(json) => Bytes::from(json),
            Err(error) => {
                tracing::error!(%error, section = NAMES[section], "a section of the watch cannot be written");
                return;
            }
        };
        self.0.state.send_if_modified(|state| {
            let changed = state.put(section, json);
            if changed {
                also(state);
            }
            changed
        });
    }

    /// Follows the database: this process' commits at once, those of others by polling.
    async fn follow_store(self, mut loaded: Revisions, ready: ReadyPart, tasks: Tasks) {
        let mut commits = self.0.store.commits();
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut up = None;
        loop {
            let polled = tokio::select! {
                biased;
                () = tasks.stopping() => return,
                changed = commits.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.0.pending.lock().get_or_insert_with(Instant::now);
                    false
                }
                _ = poll.tick() => true,
            };
            let health = match self.refresh(&mut loaded).await {
                Ok(()) if polled => self.poll_health().await,
                other => other,
            };
            self.tell(&health, &ready, &mut up);
        }
    }

    async fn poll_health(&self) -> Result<(), StoreError> {
        if self.0.store.dialect() == Dialect::Postgres {
            let leases = self.0.store.leases().await?;
            self.0.presence.adopt(leases, Instant::now());
        }
        self.0.store.probe().await
    }

    fn tell(&self, health: &Result<(), StoreError>, ready: &ReadyPart, up: &mut Option<bool>) {
        let now_up = health.is_ok();
        self.0.metrics.store_up.set(i64::from(now_up));
        match health {
            Ok(()) => {
                ready.up();
                if *up == Some(false) {
                    tracing::info!("the database works again");
                }
            }
            Err(error) => {
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
        let store = &self.0.store;
        let found = store.revisions().await?;
        let now = unix_now();
        if found.policy != loaded.policy {
            self.publish(POLICY, &store.rules().await?, |_| ());
            loaded.policy = found.policy;
        }
        if found.revoked != loaded.revoked {
            let revoked = store.revoked(now).await?;
            let serials = Arc::new(revoked.iter().map(|r| r.serial.clone()).collect());
            self.publish(REVOKED, &revoked, |state| state.revoked = serials);
            loaded.revoked = found.revoked;
        }
        if found.access != loaded.access {
            self.publish(ACCESS, &store.access_tokens(now).await?, |_| ());
            loaded.access = found.access;
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
                let (found, started) = (*edges_at.borrow(), Instant::now());
                let pause = match self.refresh_edges().await {
                    Ok(()) => {
                        loaded = found;
                        started.elapsed() * EDGES_SHARE
                    }
                    Err(_) => POLL,
                };
                tokio::time::sleep(pause).await;
            }
        };
        tasks.token().run_until_cancelled(follow).await;
    }

    async fn refresh_edges(&self) -> Result<(), StoreError> {
        let edges = self.0.store.edge_sites().await?;
        self.0.metrics.edges.set(i64::try_from(edges.len()).unwrap_or(i64::MAX));
        self.publish(EDGES, &edges, |_| ());
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
        self.publish(SHARDS, &alive, |state| state.shards = kept);
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

/// One that follows the state.
#[derive(Debug)]
pub struct Follower {
    state: watch::Receiver<State>,
    seen: [u64; 6],
    beat: tokio::time::Interval,
    metrics: Metrics,
}

impl Follower {
    /// The next line: what changed, or a sign of life. `None` once `serial` is revoked or control stops.
    pub async fn next(&mut self, serial: &str, tasks: &Tasks) -> Option<Bytes> {
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return None,
                changed = self.state.changed() => {
                    changed.ok()?;
                    let state = self.state.borrow_and_update();
                    if state.is_revoked(serial) {
                        return None;
                    }
                    if let Some(line) = state.line(&mut self.seen) {
                        drop(state);
                        self.beat.reset();
                        return Some(line);
                    }
                }
                _ = self.beat.tick() => return Some(self.state.borrow().sign_of_life()),
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.metrics.watchers.dec();
    }
}

#[cfg(test)]
mod tests {
    use proto::api::WatchEvent;

    use super::*;

    fn state() -> State {
        State { revision: 7, sections: Default::default(), revoked: Arc::default(), shards: Arc::default() }
    }

    #[test]
    fn a_line_holds_what_is_new_and_nothing_else() {
        let (mut state, mut seen) = (state(), [0; 6]);
        assert!(state.put(POLICY, Bytes::from_static(b"[]")));
        assert!(state.put(SHARDS, Bytes::from_static(b"[{\"shard\":\"s1\",\"addresses\":[\"a:1\"]}]")));
        let event: WatchEvent = serde_json::from_slice(&state.line(&mut seen).unwrap()).unwrap();
        assert_eq!((event.revision, event.policy, event.edges), (9, Some(vec![]), None));
        assert_eq!(event.shards.unwrap()[0].shard.as_str(), "s1");
        assert_eq!(state.line(&mut seen), None);
        assert!(!state.put(POLICY, Bytes::from_static(b"[]")), "the same again is no news");
        assert!(state.put(BUNDLE, Bytes::from_static(b"\"pem\"")));
        let event: WatchEvent = serde_json::from_slice(&state.line(&mut seen).unwrap()).unwrap();
        assert_eq!((event.revision, event.policy, event.bundle), (10, None, Some("pem".into())));
        let event: WatchEvent = serde_json::from_slice(&state.sign_of_life()).unwrap();
        assert_eq!(event, WatchEvent { revision: 10, ..WatchEvent::default() });
    }

    #[tokio::test]
    async fn a_slow_follower_skips_to_the_newest_state_and_a_revoked_one_is_let_go() {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let sender = watch::Sender::new(state());
        let mut receiver = sender.subscribe();
        receiver.mark_changed();
        let mut beat = interval(HEARTBEAT);
        beat.reset();
        let mut follower = Follower { state: receiver, seen: [0; 6], beat, metrics };
        let tasks = Tasks::new();
        for round in 0..1000 {
            sender.send_modify(|s| _ = s.put(POLICY, Bytes::from(format!("{round}"))));
        }
        let line = follower.next("1", &tasks).await.unwrap();
        assert_eq!(line, "{\"revision\":1007,\"policy\":999}\n", "one line, and the newest");
        let quiet = follower.next("1", &tasks).await.unwrap();
        assert_eq!(quiet, "{\"revision\":1007}\n", "and nothing behind it");
        sender.send_modify(|s| s.revoked = Arc::new(HashSet::from(["1".to_owned()])));
        assert_eq!(follower.next("1", &tasks).await, None);
    }
}
