//! The driver of [`Membership`]: a round about twice a second on the board that is the database, and what comes of it
//! goes to the watch, to the metrics and to `/readyz`.

use std::{sync::Arc, time::Duration};

use runtime::{admin::ReadyPart, shutdown::Tasks};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    membership::{Board, BoardState, Membership, Round},
    metrics::Metrics,
    presence::Presence,
    sight::{BLIND, Sight},
    store::{Dialect, Store, StoreError, ring::StoredRing},
    watch::Hub,
};

/// How often a replica looks. An epoch that another one made is here after this time, and a report that went to another
/// one than the leader takes it twice: well below the second that shards are promised.
const ROUND: Duration = Duration::from_millis(400);
/// Longest time to give the lead up when control stops.
const RESIGN: Duration = Duration::from_secs(2);

/// The database as the place where replicas meet.
///
/// With PostgreSQL everything is there. SQLite has one replica, which hears all shards itself: leases come from memory,
/// so that a database which cannot be written neither makes shards look dead nor wears a disk out by beats; and a leader
/// need not show to anybody that it lives.
#[derive(Clone, Debug)]
pub struct StoreBoard {
    store: Store,
    presence: Arc<Presence>,
    sight: Sight,
}

impl StoreBoard {
    /// On this database.
    #[must_use]
    pub const fn new(store: Store, presence: Arc<Presence>, sight: Sight) -> Self {
        Self { store, presence, sight }
    }
}

impl Board for StoreBoard {
    type Error = StoreError;

    async fn load(&self) -> Result<BoardState, StoreError> {
        let begun = Instant::now();
        let leases = match self.store.dialect() {
            Dialect::Sqlite => self.presence.leases(),
            Dialect::Postgres => {
                let leases = self.store.leases().await?;
                self.presence.adopt(leases.clone(), Instant::now());
                leases
            }
        };
        let orders = self.store.orders().await?;
        let StoredRing { ring, leader, beat } = self.store.ring().await?;
        self.sight.saw(begun);
        Ok(BoardState { ring, leader, beat, leases, orders })
    }

    async fn lead(&self, me: &str, seen_leader: &str, seen_beat: i64) -> Result<bool, StoreError> {
        if self.store.dialect() == Dialect::Sqlite && me == seen_leader {
            return Ok(true);
        }
        self.store.lead(me, seen_leader, seen_beat).await
    }

    async fn put_ring(
        &self,
        me: &str,
        beat: i64,
        seen_epoch: u64,
        next: &proto::ring::RingSpec,
    ) -> Result<bool, StoreError> {
        let beat = (self.store.dialect() == Dialect::Postgres).then_some(beat);
        self.store.put_ring(me, beat, seen_epoch, next).await
    }
}

/// Where the results of rounds go.
#[derive(Debug)]
pub struct Outlets {
    /// What shards follow.
    pub hub: Hub,
    /// What is counted.
    pub metrics: Metrics,
    /// What `/readyz` says.
    pub ready: ReadyPart,
}

/// Ends watches when this replica has not seen the database for too long, until the tasks stop.
pub async fn keep_sight(sight: Sight, metrics: Metrics, ready: ReadyPart, tasks: Tasks) {
    ready.up();
    let kept = sight.keep(|lost| {
        metrics.blind.set(i64::from(lost));
        if lost {
            let secs = BLIND.as_secs();
            ready.down(format!("the database could not be read for {secs} s; shards are sent to other replicas"));
            tracing::warn!(
                secs,
                "the database cannot be read; watches are ended, so that shards follow another replica"
            );
        } else {
            ready.up();
            tracing::info!("the database can be read again; shards can follow this replica");
        }
    });
    tasks.token().run_until_cancelled(kept).await;
}

/// Makes rounds until the tasks stop: from time to time, and at once when `stir` says that a report or an order may have
/// changed something.
pub async fn run(me: String, board: StoreBoard, outlets: Outlets, stir: Arc<Notify>, tasks: Tasks) {
    let mut membership = Membership::new(me);
    let mut tick = interval(ROUND);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            biased;
            () = tasks.stopping() => break,
            () = stir.notified() => {}
            _ = tick.tick() => {}
        }
        let round = tasks.token().run_until_cancelled(membership.round(&board, Instant::now())).await;
        match round {
            None => break,
            Some(Ok(round)) => {
                if failing {
                    tracing::info!(epoch = round.ring.epoch, "the ring is looked after again");
                }
                failing = false;
                outlets.tell(&round);
            }
            Some(Err(error)) => {
                if !failing {
                    let epoch = membership.known().ring.epoch;
                    tracing::warn!(%error, epoch, "the ring cannot be looked after; it stays as it is until that works");
                }
                failing = true;
                outlets.failed(&membership.known(), &error);
            }
        }
    }
    if let Ok(Err(error)) = timeout(RESIGN, membership.resign(&board)).await {
        tracing::debug!(%error, "the lead could not be given up; it ends by itself");
    }
}

impl Outlets {
    fn tell(&self, round: &Round) {
        self.hub.set_ring(&round.ring, &round.orders);
        self.hub.set_leads(round.leading);
        self.count(round);
        for (_, cause) in &round.causes {
            self.metrics.ring_changes.with_label_values(&[cause.as_str()]).inc();
        }
        let who = if round.leading {
            format!("this replica leads ({})", round.leader)
        } else if round.leader.is_empty() {
            "nobody leads yet".to_owned()
        } else {
            format!("{} leads", round.leader)
        };
        let held = if round.held { "; no member reports, so the ring stays as it is" } else { "" };
        let (epoch, members) = (round.ring.epoch, round.ring.members.len());
        self.ready.detail(format!("epoch {epoch} with {members} shards, {who}{held}"));
    }

    fn failed(&self, known: &Round, error: &StoreError) {
        self.metrics.ring_rounds_failed.inc();
        self.hub.set_leads(false);
        self.count(known);
        let (epoch, members) = (known.ring.epoch, known.ring.members.len());
        self.ready.detail(format!("epoch {epoch} with {members} shards stays in force: {error}"));
    }

    fn count(&self, round: &Round) {
        let (epoch, members) = (round.ring.epoch, round.ring.members.len());
        self.metrics.ring_epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
        self.metrics.ring_members.set(i64::try_from(members).unwrap_or(i64::MAX));
        self.metrics.leading.set(i64::from(round.leading));
        self.metrics.ring_held.set(i64::from(round.held));
    }
}
