//! A replica of a simulated control.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

use control::{
    membership::{Board, BoardState, Membership, Round},
    presence::{Heard, Presence},
    sight::Sight,
};
use parking_lot::Mutex;
use proto::{
    api::{ShardReport, WatchEvent},
    id::ShardId,
    ring::RingSpec,
};
use runtime::{clock, shutdown::Tasks};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};

use super::database::{Connection, Unavailable};

/// Between two rounds, as `control::leader` makes them.
const ROUND: Duration = Duration::from_millis(400);
/// How often leases are looked through.
const LEASES: Duration = Duration::from_millis(500);
/// How often the database is asked what another replica wrote.
const POLL: Duration = Duration::from_secs(1);

/// A replica that runs. Clones are the same one.
#[derive(Clone)]
pub struct Replica(Arc<Inner>);

struct Inner {
    name: String,
    board: SeenBoard,
    word: Mutex<Arc<WatchEvent>>,
    /// Those who follow, in the order in which they came: tokio's own watch wakes its waiters in one that differs from
    /// run to run.
    followers: Mutex<BTreeMap<u64, Arc<Notify>>>,
    round: Mutex<Round>,
    /// A report changed something that the ring depends on.
    due: Notify,
    /// Something was written through this replica.
    written: Notify,
    tasks: Tasks,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replica({} {})", self.0.name, self.picture())
    }
}

impl Replica {
    pub(super) fn start(name: String, connection: Connection, alone: bool, tasks: &Tasks) -> Self {
        let inner = Inner {
            name,
            board: SeenBoard {
                connection,
                presence: Presence::default(),
                alone,
                sight: Sight::new(alone, Instant::now()),
            },
            word: Mutex::default(),
            followers: Mutex::default(),
            round: Mutex::default(),
            due: Notify::new(),
            written: Notify::new(),
            tasks: tasks.clone(),
        };
        let replica = Self(Arc::new(inner));
        let stop = tasks.token();
        tasks.spawn(stop.clone().run_until_cancelled_owned(replica.clone().decide()));
        tasks.spawn(stop.clone().run_until_cancelled_owned(replica.clone().read()));
        tasks.spawn(stop.clone().run_until_cancelled_owned(replica.clone().count()));
        let (sight, followed) = (replica.0.board.sight.clone(), replica.clone());
        let kept = sight.keep(move |_| followed.0.followers.lock().values().for_each(|f| f.notify_one()));
        tasks.spawn(stop.run_until_cancelled_owned(kept));
        replica
    }

    pub(super) fn stop(&self) {
        self.0.tasks.stop();
    }

    /// Its name, like no other process's.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its host.
    #[must_use]
    pub fn host(&self) -> IpAddr {
        self.0.board.connection.host()
    }

    /// The ring in force, as far as this replica knows.
    #[must_use]
    pub fn ring(&self) -> RingSpec {
        self.0.round.lock().ring.clone()
    }

    /// Whether it believes to lead.
    #[must_use]
    pub fn is_leading(&self) -> bool {
        self.0.round.lock().leading
    }

    /// Begins to follow. `None` if this replica has nothing to say, as others may know better.
    #[must_use]
    pub fn follow(&self) -> Option<Follower> {
        if self.0.board.sight.is_lost() {
            return None;
        }
        let news = Arc::new(Notify::new());
        news.notify_one();
        let mut followers = self.0.followers.lock();
        let number = followers.last_key_value().map_or(0, |(last, _)| last + 1);
        followers.insert(number, Arc::clone(&news));
        Some(Follower { replica: self.clone(), number, news, seen: 0 })
    }

    pub(super) fn hear(&self) {
        self.0.written.notify_one();
        self.0.due.notify_one();
    }

    /// Takes a shard's report.
    ///
    /// # Errors
    /// If other replicas could not be told; the shard then tries one of them.
    pub async fn report(&self, shard: &ShardId, report: ShardReport) -> Result<(), Unavailable> {
        let epoch = report.epoch;
        let taken = self.0.board.presence.report(shard, report, Instant::now(), clock::unix_now());
        let Some(Heard { lease, stirs, silent }) = taken.map_err(|_| Unavailable::Away)? else { return Ok(()) };
        if !self.0.board.alone {
            self.0.board.connection.beat(lease, silent).await?;
        }
        if stirs || epoch > self.ring().epoch {
            self.0.due.notify_one();
        }
        Ok(())
    }

    fn tell(&self, change: impl FnOnce(&mut WatchEvent) -> bool) {
        let mut word = self.0.word.lock();
        let mut next = WatchEvent::clone(&word);
        if change(&mut next) {
            next.revision += 1;
            *word = Arc::new(next);
            self.0.followers.lock().values().for_each(|follower| follower.notify_one());
        }
    }

    /// The rounds of membership.
    async fn decide(self) {
        let mut membership = Membership::new(self.0.name.clone());
        let mut ticks = interval(ROUND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.0.due.notified() => {}
                _ = ticks.tick() => {}
            }
            let round = match membership.round(&self.0.board, Instant::now()).await {
                Ok(round) => round,
                Err(error) => {
                    tracing::warn!(replica = self.0.name, %error, "a round failed");
                    self.0.round.lock().leading = false;
                    continue;
                }
            };
            let Round { ring, orders, .. } = round.clone();
            *self.0.round.lock() = round;
            if ring.epoch == 0 {
                continue;
            }
            self.tell(|word| {
                let (ring, orders) = (Some(ring), Some(orders));
                let changed = word.ring != ring || word.orders != orders;
                (word.ring, word.orders) = (ring, orders);
                changed
            });
        }
    }

    /// Reads what administrators decided.
    async fn read(self) {
        let mut ticks = interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = 0;
        loop {
            tokio::select! {
                biased;
                () = self.0.written.notified() => {}
                _ = ticks.tick() => {}
            }
            let connection = &self.0.board.connection;
            let Ok(decided) = connection.decided().await else { continue };
            if decided.revision > known {
                known = decided.revision;
                self.tell(|word| {
                    let WatchEvent { policy, revoked, access_tokens, edges, .. } = WatchEvent::clone(&decided);
                    (word.policy, word.revoked, word.access_tokens, word.edges) =
                        (policy, revoked, access_tokens, edges);
                    true
                });
            }
        }
    }

    /// Counts the shards that live.
    async fn count(self) {
        let mut ticks = interval(LEASES);
        loop {
            tokio::select! {
                biased;
                () = self.0.board.presence.changed() => {}
                _ = ticks.tick() => {}
            }
            let alive = Some(self.0.board.presence.alive(Instant::now()));
            self.tell(|word| {
                let changed = word.shards != alive;
                word.shards = alive;
                changed
            });
        }
    }

    pub(super) fn picture(&self) -> String {
        let round = self.0.round.lock();
        let members: Vec<_> = round.ring.members.iter().map(|m| m.shard.as_str()).collect();
        let leads = if round.leading { " and leads" } else { "" };
        format!("is {}{leads}: epoch {} {members:?}", self.0.name, round.ring.epoch)
    }
}

/// Somebody who follows a replica, until dropped.
pub struct Follower {
    replica: Replica,
    number: u64,
    news: Arc<Notify>,
    seen: u64,
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Follower({} of {})", self.number, self.replica.0.name)
    }
}

impl Follower {
    /// The newest word that was not seen before, with all sections; `None` if the replica has ended, or has nothing to
    /// say any more.
    pub async fn next(&mut self) -> Option<Arc<WatchEvent>> {
        loop {
            tokio::select! {
                biased;
                () = self.replica.0.tasks.stopping() => return None,
                () = self.news.notified() => {}
            }
            if self.replica.0.board.sight.is_lost() {
                return None;
            }
            let word = Arc::clone(&self.replica.0.word.lock());
            if word.revision > self.seen {
                self.seen = word.revision;
                return Some(word);
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.replica.0.followers.lock().remove(&self.number);
    }
}

/// The board as a replica sees it, as `control::leader::StoreBoard` does: without sisters, leases come from memory, and
/// nobody needs to be shown that the leader lives.
struct SeenBoard {
    connection: Connection,
    presence: Presence,
    alone: bool,
    sight: Sight,
}

impl Board for SeenBoard {
    type Error = Unavailable;

    async fn load(&self) -> Result<BoardState, Unavailable> {
        let begun = Instant::now();
        let seen = self.connection.load().await?;
        self.sight.saw(begun);
        if self.alone {
            return Ok(BoardState { leases: self.presence.leases(), ..seen });
        }
        self.presence.adopt(seen.leases.clone(), Instant::now());
        Ok(seen)
    }

    async fn lead(&self, me: &str, seen_leader: &str, seen_beat: i64) -> Result<bool, Unavailable> {
        if self.alone && me == seen_leader {
            return Ok(true);
        }
        self.connection.lead(me, seen_leader, seen_beat).await
    }

    async fn put_ring(&self, me: &str, beat: i64, seen_epoch: u64, next: &RingSpec) -> Result<bool, Unavailable> {
        self.connection.put_ring(me, (!self.alone).then_some(beat), seen_epoch, next).await
    }
}
