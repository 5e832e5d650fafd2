//! Stories of replicas and shards on a board in memory, with time by hand.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;

use super::*;

/// A board that can be away, or refuse to be written.
#[derive(Clone, Debug, Default)]
struct Paper(Arc<Mutex<Sheet>>);

#[derive(Debug, Default)]
struct Sheet {
    state: BoardState,
    away: bool,
    read_only: bool,
    epochs: Vec<u64>,
}

impl Paper {
    fn written<T>(&self, write: impl FnOnce(&mut Sheet) -> T) -> Result<T, &'static str> {
        let mut sheet = self.0.lock();
        if sheet.away || sheet.read_only { Err("no") } else { Ok(write(&mut sheet)) }
    }
}

impl Board for Paper {
    type Error = &'static str;

    async fn load(&self) -> Result<BoardState, Self::Error> {
        let sheet = self.0.lock();
        if sheet.away { Err("away") } else { Ok(sheet.state.clone()) }
    }

    async fn lead(&self, me: &str, seen_leader: &str, seen_beat: i64) -> Result<bool, Self::Error> {
        self.written(|sheet| {
            let state = &mut sheet.state;
            let same = state.leader == seen_leader && state.beat == seen_beat;
            if same {
                (state.leader, state.beat) = (me.to_owned(), seen_beat + 1);
            }
            same
        })
    }

    async fn put_ring(&self, me: &str, beat: i64, seen_epoch: u64, next: &RingSpec) -> Result<bool, Self::Error> {
        self.written(|sheet| {
            let state = &mut sheet.state;
            let same = state.leader == me && state.beat == beat && state.ring.epoch == seen_epoch;
            if same {
                state.ring = next.clone();
                sheet.epochs.push(next.epoch);
            }
            same
        })
    }
}

fn id(name: &str) -> ShardId {
    name.parse().unwrap()
}

/// Replicas, shards that report every two seconds, and a clock.
struct Story {
    board: Paper,
    replicas: Vec<(Membership, bool)>,
    reporting: BTreeSet<&'static str>,
    start: Instant,
    ms: u64,
}

const STEP: u64 = 500;

impl Story {
    fn new(replicas: usize) -> Self {
        let replica = |i| (Membership::new(format!("control-{i}")), true);
        let replicas = (0..replicas).map(replica).collect();
        Self { board: Paper::default(), replicas, reporting: BTreeSet::new(), start: Instant::now(), ms: 0 }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.ms)
    }

    /// A report.
    fn report(&self, name: &str, change: impl FnOnce(&mut StoredLease)) {
        let mut sheet = self.board.0.lock();
        if sheet.away || sheet.read_only {
            return;
        }
        let leases = &mut sheet.state.leases;
        let at = leases.binary_search_by(|l| l.name.cmp(&id(name))).unwrap_or_else(|at| {
            let fresh = StoredLease {
                name: id(name),
                addresses: vec![format!("{name}:7500")],
                version: "1".into(),
                edges: 0,
                last_seen: 0,
                beat: 0,
                state: ShardState::Serving,
                weight: 100,
                epoch: 0,
                streams: 0,
                started: 0,
                number: 0,
            };
            leases.insert(at, fresh);
            at
        });
        leases[at].beat += 1;
        change(&mut leases[at]);
    }

    /// Half a second of everybody's life.
    async fn step(&mut self) {
        self.ms += STEP;
        if self.ms.is_multiple_of(2000) {
            for name in self.reporting.clone() {
                self.report(name, |_| ());
            }
        }
        let now = self.now();
        for (replica, runs) in &mut self.replicas {
            if *runs {
                _ = replica.round(&self.board, now).await;
            }
        }
        let epochs = self.board.0.lock().epochs.clone();
        assert!(epochs.is_sorted_by(|a, b| a < b), "epochs only grow: {epochs:?}");
    }

    async fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds * 1000 / STEP {
            self.step().await;
        }
    }

    /// Waits until the ring has these members. Returns after how many milliseconds.
    async fn until(&mut self, members: &[&str]) -> u64 {
        let began = self.ms;
        while self.ring() != members {
            assert!(self.ms - began < 60_000, "{:?} instead of {members:?}", self.ring());
            self.step().await;
        }
        self.ms - began
    }

    fn ring(&self) -> Vec<String> {
        self.board.0.lock().state.ring.members.iter().map(|m| m.shard.to_string()).collect()
    }

    fn epoch(&self) -> u64 {
        self.board.0.lock().state.ring.epoch
    }

    fn leader(&self) -> String {
        self.board.0.lock().state.leader.clone()
    }

    /// A mesh at rest.
    async fn with(replicas: usize, shards: &[&'static str]) -> Self {
        let mut story = Self::new(replicas);
        story.step().await;
        for shard in shards {
            story.report(shard, |_| ());
            story.reporting.insert(shard);
        }
        story.step().await;
        assert_eq!(story.ring(), shards);
        story.wait(10).await;
        story
    }
}

#[tokio::test]
async fn shards_join_leave_die_and_return() {
    let mut story = Story::with(1, &["a", "b", "c"]).await;
    let epoch = story.epoch();
    story.wait(60).await;
    assert_eq!(story.epoch(), epoch, "a ring that equals the present one is no new ring");

    // One that stops says so, and is out with the next round.
    story.report("b", |l| l.state = ShardState::Draining);
    story.reporting.remove("b");
    assert_eq!(story.until(&["a", "c"]).await, STEP);
    story.wait(20).await;
    story.report("b", |l| l.state = ShardState::Serving);
    story.reporting.insert("b");
    assert_eq!(story.until(&["a", "b", "c"]).await, STEP, "it was not lost, so it is taken at once");

    // One that dies is out after its lease.
    story.wait(4).await;
    story.reporting.remove("c");
    let silent = story.until(&["a", "b"]).await;
    assert!((6000..=6500).contains(&silent), "{silent}");

    // When it returns, it must prove itself.
    story.report("c", |_| ());
    story.reporting.insert("c");
    let back = story.until(&["a", "b", "c"]).await;
    assert!((3000..=4000).contains(&back), "{back}");
    story.report("d", |_| ());
    story.reporting.insert("d");
    let new = story.until(&["a", "b", "c", "d"]).await;
    assert!((5000..=5500).contains(&new), "a new one waits for others: {new}");
}

#[tokio::test]
async fn shards_that_come_soon_after_one_another_are_one_ring() {
    let mut story = Story::with(2, &["a"]).await;
    story.wait(30).await;
    let epoch = story.epoch();
    for shard in ["b", "c"] {
        story.report(shard, |_| ());
        story.reporting.insert(shard);
        story.wait(4).await;
        assert_eq!(story.ring(), ["a"]);
    }
    assert_eq!(story.until(&["a", "b", "c"]).await, 1000 + STEP);
    assert_eq!(story.epoch(), epoch + 1, "who has to move moves once");

    // A stream of them does not keep the first one waiting for ever.
    let names = ["d", "e", "f", "g", "h"];
    for shard in names {
        story.report(shard, |_| ());
        story.reporting.insert(shard);
        story.wait(4).await;
    }
    assert_eq!(
        story.ring(),
        ["a", "b", "c", "d", "e", "f", "g"],
        "d waited for 15 s and took those along who had come"
    );

    // If nobody else is left there is nothing to wait for.
    let mut story = Story::with(1, &["a"]).await;
    story.wait(30).await;
    story.report("a", |l| l.state = ShardState::Draining);
    story.reporting.remove("a");
    story.report("b", |_| ());
    story.reporting.insert("b");
    assert_eq!(story.until(&["b"]).await, STEP);
}

#[tokio::test]
async fn a_shard_that_is_silent_for_less_than_its_lease_changes_nothing() {
    let mut story = Story::with(2, &["a", "b"]).await;
    let epoch = story.epoch();
    story.reporting.remove("b");
    story.wait(5).await;
    story.report("b", |_| ());
    story.reporting.insert("b");
    story.wait(20).await;
    assert_eq!(story.epoch(), epoch);
}

#[tokio::test]
async fn an_older_word_that_comes_later_brings_nobody_back() {
    let mut story = Story::with(2, &["a", "b"]).await;
    story.reporting.remove("b");
    story.report("b", |l| l.state = ShardState::Draining);
    story.until(&["a"]).await;
    let epoch = story.epoch();
    // By way of another replica.
    story.report("b", |l| l.state = ShardState::Serving);
    story.step().await;
    story.report("b", |l| l.state = ShardState::Draining);
    story.wait(5).await;
    assert_eq!(story.epoch(), epoch);
}

#[tokio::test]
async fn a_shard_that_reports_now_and_then_stays_out() {
    let mut story = Story::with(1, &["a", "flap"]).await;
    story.reporting.remove("flap");
    story.until(&["a"]).await;
    let epoch = story.epoch();
    for _ in 0..10 {
        story.report("flap", |_| ());
        story.wait(5).await;
    }
    assert_eq!((story.ring(), story.epoch()), (vec!["a".to_owned()], epoch));
}

#[tokio::test]
async fn addresses_weight_and_orders_make_new_epochs() {
    let mut story = Story::with(1, &["a", "b"]).await;
    let now = story.now();
    let board = story.board.clone();
    let replica = &mut story.replicas[0].0;
    let edit = |change: fn(&mut BoardState)| change(&mut board.0.lock().state);
    let mut causes = async |change: fn(&mut BoardState)| {
        edit(change);
        let round = replica.round(&board, now).await.unwrap();
        assert_eq!(round.changed, !round.causes.is_empty());
        round.causes.into_iter().map(|(s, c)| (s.unwrap().to_string(), c)).collect::<Vec<_>>()
    };
    let a = |cause| vec![("a".to_owned(), cause)];
    assert_eq!(causes(|s| s.leases[0].weight = 200).await, a(Cause::Change));
    assert_eq!(causes(|s| s.leases[0].weight = u32::MAX).await, a(Cause::Change));
    assert_eq!(board.0.lock().state.ring.members[0].weight, proto::ring::MAX_WEIGHT);
    assert_eq!(causes(|s| s.leases[0].addresses.push("x:1".into())).await, a(Cause::Change));
    assert_eq!(causes(|s| s.leases[0].streams = 7).await, []);
    assert_eq!(causes(|s| s.leases[0].addresses.clear()).await, a(Cause::Leave), "where nobody can go, nobody is sent");
    assert_eq!(causes(|s| s.leases[0].addresses.push("a:1".into())).await, a(Cause::Join));
    edit(|s| _ = s.orders.insert(id("a"), ShardOrder::Cordon));
    assert_eq!(causes(|_| ()).await, a(Cause::Order));
    edit(|s| s.orders.clear());
    assert_eq!(causes(|_| ()).await, a(Cause::Join));
}

#[tokio::test]
async fn a_ring_is_emptied_by_word_and_never_by_silence() {
    let mut story = Story::with(1, &["a", "b"]).await;
    let epoch = story.epoch();
    story.reporting.clear();
    story.wait(60).await;
    assert_eq!(story.epoch(), epoch, "nobody reports: control is blind");
    assert!(story.replicas[0].0.known().held);

    // With the first sign of life, everybody has another lease.
    story.report("a", |_| ());
    story.reporting.insert("a");
    story.wait(5).await;
    assert!(!story.replicas[0].0.known().held);
    assert_eq!(story.epoch(), epoch);
    story.until(&["a"]).await;

    // The last one may say that it goes, and may be ordered out when it cannot say anything any more.
    story.report("a", |l| l.state = ShardState::Draining);
    story.step().await;
    assert!(story.ring().is_empty());
    story.report("a", |l| l.state = ShardState::Serving);
    story.until(&["a"]).await;
    story.reporting.clear();
    story.wait(30).await;
    assert_eq!(story.ring(), ["a"]);
    story.board.0.lock().state.orders.insert(id("a"), ShardOrder::Drain);
    story.step().await;
    assert!(story.ring().is_empty());
}

#[tokio::test]
async fn one_that_goes_and_one_that_is_silent_leave_the_silent_one() {
    let mut story = Story::with(1, &["a", "b"]).await;
    story.reporting.remove("a");
    story.wait(5).await;
    story.report("b", |l| l.state = ShardState::Draining);
    story.wait(20).await;
    assert_eq!(story.ring(), ["a"], "b said that it goes, and a said nothing");
}

#[tokio::test]
async fn a_database_that_was_away_takes_nobody_out() {
    for read_only in [false, true] {
        let mut story = Story::with(2, &["a", "b", "c"]).await;
        let epoch = story.epoch();
        for outage in [3, 7, 60] {
            let broken = |on: bool| {
                let mut sheet = story.board.0.lock();
                if read_only { sheet.read_only = on } else { sheet.away = on }
            };
            broken(true);
            story.wait(outage).await;
            story.board.0.lock().read_only = false;
            story.board.0.lock().away = false;
            story.wait(20).await;
            assert_eq!(story.epoch(), epoch, "after {outage} s, read only: {read_only}");
        }
        // Who died meanwhile is found out after another lease.
        story.board.0.lock().away = true;
        story.reporting.remove("b");
        story.wait(30).await;
        story.board.0.lock().away = false;
        let found = story.until(&["a", "c"]).await;
        assert!((6000..=9000).contains(&found), "{found}");
    }
}

#[tokio::test]
async fn a_replica_that_was_paused_gives_everybody_time() {
    let mut story = Story::with(1, &["a", "b"]).await;
    let epoch = story.epoch();
    // The whole machine stood still: no report was taken either, and then they trickle in, one before the first round.
    story.reporting.clear();
    story.ms += 30_000;
    story.report("a", |_| ());
    story.reporting.insert("a");
    story.wait(4).await;
    story.report("b", |_| ());
    story.reporting.insert("b");
    story.wait(20).await;
    assert_eq!(story.epoch(), epoch);
}

#[tokio::test]
async fn the_lead_passes_on_when_the_leader_dies_and_comes_back_to_nobody() {
    let mut story = Story::with(2, &["a", "b", "c"]).await;
    let epoch = story.epoch();
    let first = story.leader();
    let leading = |story: &Story| story.replicas.iter().filter(|(r, runs)| *runs && r.known().leading).count();
    assert_eq!(leading(&story), 1);
    let dead = story.replicas.iter().position(|(r, _)| r.me == first).unwrap();
    story.replicas[dead].1 = false;
    // A shard dies just then; the new leader gives it a lease of its own.
    story.reporting.remove("c");
    let began = story.ms;
    while story.leader() == first {
        story.step().await;
        assert!(story.ms - began <= 7000, "within a lease and a round");
    }
    assert_eq!((story.epoch(), leading(&story)), (epoch, 1));
    let after = story.until(&["a", "b"]).await;
    assert!((6000..=6500).contains(&after), "{after}");
    // The old leader wakes and finds itself replaced. Nobody fights.
    story.replicas[dead].1 = true;
    story.wait(30).await;
    assert_ne!(story.leader(), first);
    assert_eq!(story.epoch(), epoch + 1);

    // One that resigns is followed at once.
    let (second, board) = (story.leader(), story.board.clone());
    let at = story.replicas.iter().position(|(r, _)| r.me == second).unwrap();
    story.replicas[at].0.resign(&board).await.unwrap();
    story.replicas[at].1 = false;
    story.step().await;
    assert_eq!(story.leader(), first);
}

#[tokio::test]
async fn a_leader_that_was_replaced_unawares_cannot_put_its_ring() {
    let mut story = Story::with(1, &["a"]).await;
    let (mut old, board, now) = (story.replicas.remove(0).0, story.board.clone(), story.now());
    let seen = board.load().await.unwrap();
    let beat = old.lead(&board, &seen, now).await.unwrap().unwrap();
    {
        let state = &mut board.0.lock().state;
        (state.leader, state.beat) = ("other".into(), state.beat + 1);
    }
    let mut stale = seen.clone();
    stale.leases[0].weight = 7;
    assert_eq!(old.decide(&board, &stale, beat, now).await.unwrap(), []);
    assert_eq!(board.load().await.unwrap().ring, seen.ring);
    assert_eq!(old.known().ring, seen.ring, "what was not put is not in force");
    assert!(!old.round(&board, now).await.unwrap().leading);
}

#[tokio::test]
async fn a_database_from_a_backup_does_not_turn_epochs_back() {
    let mut story = Story::with(2, &["a", "b"]).await;
    story.report("c", |l| l.epoch = 40);
    story.reporting.insert("c");
    story.step().await;
    assert_eq!(story.epoch(), 41, "above what any shard has seen");
    let backup = RingSpec { epoch: 3, ..story.board.0.lock().state.ring.clone() };
    story.board.0.lock().state.ring = backup;
    story.board.0.lock().epochs.clear();
    story.step().await;
    assert_eq!(story.epoch(), 42, "although the members are the same");
    story.wait(10).await;
    assert_eq!(story.epoch(), 42);
    assert!(story.replicas.iter().all(|(r, _)| r.known().ring.epoch == 42));
    // A number out of this world is a fault of the shard, and not the end of all numbers.
    story.report("c", |l| l.epoch = u64::MAX);
    story.wait(10).await;
    assert_eq!(story.epoch(), 42);
}

#[tokio::test]
async fn a_control_that_starts_asks_for_a_sign_of_life_before_it_believes_old_records() {
    let mut story = Story::with(1, &["a", "b"]).await;
    story.report("b", |l| l.state = ShardState::Draining);
    story.reporting.remove("b");
    story.until(&["a"]).await;
    story.report("b", |l| l.state = ShardState::Serving);
    story.replicas[0].0 = Membership::new("next".into());
    story.wait(20).await;
    assert_eq!(story.ring(), ["a"], "the record of b does not move");
    story.report("b", |_| ());
    story.step().await;
    assert_eq!(story.ring(), ["a", "b"]);
}
