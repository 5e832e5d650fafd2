//! Sends edges to their owners, at a bounded pace, after the ring has changed.
//!
//! Who has to move follows from the ring alone, never from loads or averages: a member that is dead is not in the ring,
//! and cannot make anybody move. Edges without streams go first. The pace is bounded for each shard that edges go to, with
//! the other members taken to send there as well; a shard that comes anew is so met with the same pace however many send.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc, time::Duration};

use proto::{
    api::ShardOrder,
    id::{EdgeId, ShardId},
    message::ShardToEdge,
    ring::Ring,
};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use crate::{directory::Directory, metrics::Metrics, registry::Registry, session::EdgeHandle, state::MeshState};

/// How often some edges are asked to move.
const TICK: Duration = Duration::from_millis(100);
/// How long a new ring is left to settle, so that two changes in a row move each edge once.
const SETTLE: Duration = Duration::from_millis(500);
/// How long an edge may take to move before it stays for now.
const WITHIN: Duration = Duration::from_secs(30);
/// When an edge that did not move is asked again; each time twice as late, up to the second.
const AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(900));
/// How often all edges are looked at though the ring has not changed.
const LOOK: Duration = Duration::from_secs(30);

/// Moves edges. It runs for as long as the shard does.
#[derive(Debug)]
pub struct Rebalance {
    /// This shard.
    pub me: ShardId,
    /// Its tunnels.
    pub registry: Registry,
    /// Where edges that go were sent is noted here.
    pub directory: Directory,
    /// The ring.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Edges per second that one shard is sent, by all others together.
    pub rate: f64,
}

/// When an edge was asked to move, and how often.
#[derive(Clone, Copy, Debug)]
struct Asked {
    again: Instant,
    times: u32,
}

impl Rebalance {
    /// Runs until dropped.
    pub async fn run(mut self) {
        let mut asked: BTreeMap<EdgeId, Asked> = BTreeMap::new();
        let mut budgets: BTreeMap<ShardId, f64> = BTreeMap::new();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut epoch, mut order, mut settled, mut look) = (0, ShardOrder::Serve, Instant::now(), Instant::now());
        loop {
            ticks.tick().await;
            let (state, now) = (Arc::clone(&self.state.borrow_and_update()), Instant::now());
            let my_order = state.orders.get(&self.me).copied().unwrap_or_default();
            if (epoch, order) != (state.ring.epoch(), my_order) {
                (epoch, order) = (state.ring.epoch(), my_order);
                (settled, look) = (now + SETTLE, now + SETTLE);
                asked.clear();
                budgets.clear();
            }
            self.metrics.directory.set(i64::try_from(self.directory.len()).unwrap_or(i64::MAX));
            if now < settled || now < look {
                continue;
            }
            let strangers = strangers(&self.me, &state.ring, self.registry.all());
            let unowned = strangers.len();
            self.metrics.tunnels_unowned.set(i64::try_from(unowned).unwrap_or(i64::MAX));
            let mut due = match order {
                ShardOrder::Cordon => Vec::new(),
                ShardOrder::Serve | ShardOrder::Drain => {
                    due(strangers, &asked, now, |shard| self.directory.speaks_since(shard))
                }
            };
            self.metrics.moves_pending.set(i64::try_from(due.len()).unwrap_or(i64::MAX));
            if due.is_empty() {
                asked.retain(|_, a| a.again > now);
                look = now + if unowned == 0 { LOOK } else { Duration::from_secs(1) };
                continue;
            }
            let senders = state.ring.len().saturating_sub(1).max(1);
            #[allow(clippy::cast_precision_loss, reason = "a small number")]
            let per_tick = self.rate * TICK.as_secs_f64() / senders as f64;
            // Idle ones first, and those that are alike in an order that chance gave them.
            due.sort_by_cached_key(|(handle, _)| (handle.streams() > 0, Reverse(Ring::position(&handle.id))));
            for member in state.ring.members() {
                let budget = budgets.entry(member.shard.clone()).or_insert(1.0);
                *budget = (*budget + per_tick).min(self.rate.max(1.0));
            }
            let affordable = |(_, to): &(Arc<EdgeHandle>, ShardId)| {
                budgets.get_mut(to).filter(|budget| **budget >= 1.0).is_some_and(|budget| {
                    *budget -= 1.0;
                    true
                })
            };
            let batch: Vec<_> = due.into_iter().filter(affordable).collect();
            let apart = TICK / u32::try_from(batch.len() + 1).unwrap_or(u32::MAX);
            for (handle, to) in batch {
                let Some(member) = state.ring.member(&to) else { continue };
                if handle.order(ShardToEdge::Move { to: member.candidate(), epoch, within: WITHIN }) {
                    self.metrics.moves.with_label_values(&["move"]).inc();
                    self.directory.sent(handle.id.clone(), to);
                    let times = asked.get(&handle.id).map_or(0, |a| a.times);
                    let pause = AGAIN.0.saturating_mul(1 << times.min(8)).min(AGAIN.1);
                    asked.insert(handle.id.clone(), Asked { again: now + WITHIN + pause, times: times + 1 });
                }
                // Those who move at once make a crowd where they arrive, and streams there wait behind it.
                sleep(apart).await;
                if self.state.has_changed().unwrap_or(true) {
                    break;
                }
            }
        }
    }
}

/// Edges here that another shard owns, with that shard.
fn strangers(me: &ShardId, ring: &Ring, edges: Vec<Arc<EdgeHandle>>) -> Vec<(Arc<EdgeHandle>, ShardId)> {
    let owner = |handle: Arc<EdgeHandle>| {
        let owner = ring.owner(&handle.id).filter(|o| o.shard != *me)?.shard.clone();
        Some((handle, owner))
    };
    edges.into_iter().filter_map(owner).collect()
}

/// Those that are to be asked now: not those that were asked a while ago, nor those that came here because they cannot
/// reach their owner, who are asked from time to time. An owner that began to speak after they came has started again, or
/// was cut off and is back: what they had against it is over.
fn due(
    strangers: Vec<(Arc<EdgeHandle>, ShardId)>,
    asked: &BTreeMap<EdgeId, Asked>,
    now: Instant,
    speaks_since: impl Fn(&ShardId) -> Option<Instant>,
) -> Vec<(Arc<EdgeHandle>, ShardId)> {
    let rested = |handle: &EdgeHandle, owner: &ShardId| match asked.get(&handle.id) {
        Some(asked) => asked.again <= now,
        None => {
            !handle.avoids.contains(owner)
                || handle.came.elapsed() >= AGAIN.0
                || speaks_since(owner).is_some_and(|since| since > handle.came)
        }
    };
    strangers.into_iter().filter(|(handle, owner)| rested(handle, owner)).collect()
}
