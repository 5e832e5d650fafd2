//! The state as it goes out: one line at a time, with what a follower has not seen yet.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use proto::{
    api::ShardOrder,
    book::BookChange,
    id::{EdgeId, ShardId},
    message::Candidate,
    ring::RingSpec,
};
use runtime::shutdown::Tasks;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::book::{Seen, SharedBook};
use crate::metrics::Metrics;

/// How often a watch without news gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// How many sections there are.
const SECTIONS: usize = 9;
const NAMES: [&str; SECTIONS] =
    ["policy", "revoked", "access_tokens", "edges", "shards", "ring", "orders", "bundle", "ssh"];

/// A part of the state that is sent as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Policy,
    Revoked,
    Access,
    Edges,
    Shards,
    Ring,
    Orders,
    Bundle,
    Ssh,
}

impl Part {
    pub(super) const fn name(self) -> &'static str {
        NAMES[self as usize]
    }
}

/// The state at one moment.
#[derive(Clone, Default)]
pub struct State {
    pub(super) revision: u64,
    sections: [SectionState; SECTIONS],
    pub(super) revoked: Arc<HashSet<String>>,
    pub(super) shards: Arc<Vec<Candidate>>,
    pub(super) ring: Arc<RingSpec>,
    pub(super) orders: Arc<BTreeMap<ShardId, ShardOrder>>,
    pub(super) edges: Arc<HashSet<EdgeId>>,
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

    /// The ring in force.
    #[must_use]
    pub fn ring(&self) -> Arc<RingSpec> {
        Arc::clone(&self.ring)
    }

    /// What administrators want of shards; those that are to serve are left out.
    #[must_use]
    pub fn orders(&self) -> Arc<BTreeMap<ShardId, ShardOrder>> {
        Arc::clone(&self.orders)
    }

    /// The edges that are enrolled and not revoked.
    #[must_use]
    pub fn edges(&self) -> Arc<HashSet<EdgeId>> {
        Arc::clone(&self.edges)
    }

    /// Puts a section in place. Returns whether that is a change.
    pub(super) fn put(&mut self, part: Part, json: Bytes) -> bool {
        if self.sections[part as usize].json == json {
            return false;
        }
        self.revision += 1;
        self.sections[part as usize] = SectionState { at: self.revision, json };
        true
    }

    /// The line with all sections that are newer than `seen`, which then are seen.
    fn line(&self, seen: &mut [u64; SECTIONS]) -> Option<Bytes> {
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

    fn book_line(&self, change: &BookChange) -> Option<Bytes> {
        let json = serde_json::to_string(change)
            .inspect_err(|error| tracing::error!(%error, "the address book cannot be written"))
            .ok()?;
        Some(format!("{{\"revision\":{},\"book\":{json}}}\n", self.revision).into())
    }

    fn sign_of_life(&self) -> Bytes {
        format!("{{\"revision\":{}}}\n", self.revision).into()
    }
}

/// One that follows the state.
#[derive(Debug)]
pub struct Follower {
    state: watch::Receiver<State>,
    /// Whether the replica has lost sight of the others.
    lost: watch::Receiver<bool>,
    seen: [u64; SECTIONS],
    book: SharedBook,
    book_changes: watch::Receiver<u64>,
    book_seen: Seen,
    /// The first line is that of the sections.
    begun: bool,
    beat: tokio::time::Interval,
    metrics: Metrics,
}

impl Follower {
    /// One that has seen nothing yet.
    pub(super) fn new(
        mut state: watch::Receiver<State>,
        book: SharedBook,
        lost: watch::Receiver<bool>,
        metrics: Metrics,
    ) -> Self {
        metrics.watchers.inc();
        state.mark_changed();
        let mut beat = interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat.reset();
        let (book_changes, book_seen, begun) = (book.follow(), Seen::default(), false);
        Self { state, lost, seen: [0; SECTIONS], book, book_changes, book_seen, begun, beat, metrics }
    }

    /// The next line: what changed, or a sign of life. `None` once `serial` is revoked, control stops, or others may
    /// know better.
    pub async fn next(&mut self, serial: &str, tasks: &Tasks) -> Option<Bytes> {
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return None,
                _ = self.lost.wait_for(|lost| *lost) => return None,
                changed = self.state.changed() => {
                    changed.ok()?;
                    let state = self.state.borrow_and_update();
                    if state.is_revoked(serial) {
                        return None;
                    }
                    if let Some(line) = state.line(&mut self.seen) {
                        drop(state);
                        self.beat.reset();
                        self.begun = true;
                        return Some(line);
                    }
                }
                change = news_of(&self.book, &mut self.book_changes, &mut self.book_seen), if self.begun => {
                    self.beat.reset();
                    return self.state.borrow().book_line(&change?);
                }
                _ = self.beat.tick() => return Some(self.state.borrow().sign_of_life()),
            }
        }
    }
}

/// The next part of the book that is not seen yet; `None` when there will be no more.
async fn news_of(book: &SharedBook, changes: &mut watch::Receiver<u64>, seen: &mut Seen) -> Option<BookChange> {
    loop {
        if let Some(change) = book.next(seen) {
            return Some(change);
        }
        changes.changed().await.ok()?;
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
        State { revision: 7, ..State::default() }
    }

    #[test]
    fn a_line_holds_what_is_new_and_nothing_else() {
        let (mut state, mut seen) = (state(), [0; SECTIONS]);
        assert!(state.put(Part::Policy, Bytes::from_static(b"[]")));
        assert!(state.put(Part::Shards, Bytes::from_static(b"[{\"shard\":\"s1\",\"addresses\":[\"a:1\"]}]")));
        let event: WatchEvent = serde_json::from_slice(&state.line(&mut seen).unwrap()).unwrap();
        assert_eq!((event.revision, event.policy, event.edges), (9, Some(vec![]), None));
        assert_eq!(event.shards.unwrap()[0].shard.as_str(), "s1");
        assert_eq!(state.line(&mut seen), None);
        assert!(!state.put(Part::Policy, Bytes::from_static(b"[]")), "the same again is no news");
        assert!(state.put(Part::Bundle, Bytes::from_static(b"\"pem\"")));
        let event: WatchEvent = serde_json::from_slice(&state.line(&mut seen).unwrap()).unwrap();
        assert_eq!((event.revision, event.policy, event.bundle), (10, None, Some("pem".into())));
        let event: WatchEvent = serde_json::from_slice(&state.sign_of_life()).unwrap();
        assert_eq!(event, WatchEvent { revision: 10, ..WatchEvent::default() });
    }

    #[tokio::test]
    async fn a_slow_follower_skips_to_the_newest_state_and_a_revoked_one_is_let_go() {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let sender = watch::Sender::new(state());
        let lost = watch::Sender::new(false);
        let book = SharedBook::default();
        let mut follower = Follower::new(sender.subscribe(), book.clone(), lost.subscribe(), metrics.clone());
        let tasks = Tasks::new();
        for round in 0..1000 {
            sender.send_modify(|s| _ = s.put(Part::Policy, Bytes::from(format!("{round}"))));
        }
        let line = follower.next("1", &tasks).await.unwrap();
        assert_eq!(line, "{\"revision\":1007,\"policy\":999}\n", "one line, and the newest");
        let quiet = follower.next("1", &tasks).await.unwrap();
        assert_eq!(quiet, "{\"revision\":1007}\n", "and nothing behind it");
        sender.send_modify(|s| s.revoked = Arc::new(HashSet::from(["1".to_owned()])));
        assert_eq!(follower.next("1", &tasks).await, None);
        book.complete();
        let mut other = Follower::new(sender.subscribe(), book, lost.subscribe(), metrics);
        assert!(other.next("2", &tasks).await.is_some());
        let line = other.next("2", &tasks).await.unwrap();
        assert!(serde_json::from_slice::<WatchEvent>(&line).unwrap().book.unwrap().fresh, "and then the book");
        lost.send_replace(true);
        assert_eq!(other.next("2", &tasks).await, None, "others may know better");
    }
}
