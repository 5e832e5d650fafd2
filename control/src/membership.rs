//! Who is in the ring: from the leases of shards to ring epochs.
//!
//! Replicas of control share a [`Board`]. Each looks at it about twice a second ([`Membership::round`]); one of them
//! leads, and only that one puts a new ring. Both are compare-and-swap, so two that believe to lead do no harm: epochs
//! only grow, and each is decided once.
//!
//! A lease is judged by a beat that moves, as seen on the replica's own monotonic clock; no wall clock is ever compared.
//! Whoever could not see for a while gives everybody a fresh lease before it declares anybody dead, because what it
//! missed looks exactly like what did not happen. For the same reason a ring is never emptied by silence alone.

mod census;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, future::Future, time::Duration};

use proto::{
    api::{ShardOrder, ShardState},
    id::ShardId,
    ring::{Member, RingSpec},
};
use tokio::time::Instant;

use self::census::Census;
use crate::{presence::LEASE, store::shards::StoredLease};

/// Rounds that are further apart than this missed something.
const LATE: Duration = Duration::from_secs(2);
/// How far ahead of the board an epoch may be that a shard reports. More is a fault, and must not use up the numbers.
const LEAP: u64 = 1 << 32;

/// What all replicas share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BoardState {
    /// The ring in force.
    pub ring: RingSpec,
    /// The replica that leads; empty if nobody does.
    pub leader: String,
    /// Counts the rounds of leaders.
    pub beat: i64,
    /// What shards reported, by name.
    pub leases: Vec<StoredLease>,
    /// What administrators want of shards; those that are to serve are left out.
    pub orders: BTreeMap<ShardId, ShardOrder>,
}

impl BoardState {
    fn order(&self, shard: &ShardId) -> ShardOrder {
        self.orders.get(shard).copied().unwrap_or_default()
    }

    fn lease(&self, shard: &ShardId) -> Option<&StoredLease> {
        self.leases.iter().find(|lease| lease.name == *shard)
    }

    /// Why a shard is to be in no ring however well it lives.
    fn is_out(&self, shard: &ShardId) -> Option<Cause> {
        match self.order(shard) {
            ShardOrder::Cordon | ShardOrder::Drain => return Some(Cause::Order),
            ShardOrder::Serve => {}
        }
        self.lease(shard).filter(|l| l.state == ShardState::Draining || l.addresses.is_empty()).map(|_| Cause::Leave)
    }
}

/// Where replicas of control meet.
pub trait Board: Send + Sync {
    /// Why it could not be used.
    type Error: fmt::Display + Send;

    /// Reads all of it.
    fn load(&self) -> impl Future<Output = Result<BoardState, Self::Error>> + Send;

    /// Takes or keeps the lead: succeeds only if leader and beat are still as seen; then leader = me, beat = beat + 1.
    fn lead(
        &self,
        me: &str,
        seen_leader: &str,
        seen_beat: i64,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send;

    /// Puts the next ring: only if `me` still leads with this beat and the epoch is still `seen_epoch`.
    fn put_ring(
        &self,
        me: &str,
        beat: i64,
        seen_epoch: u64,
        next: &RingSpec,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send;
}

/// Why the ring changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A shard came.
    Join,
    /// A shard said that it stops.
    Leave,
    /// A shard fell silent.
    Dead,
    /// An administrator took a shard out.
    Order,
    /// A shard has another address or weight.
    Change,
    /// Somebody has seen a later ring than the board, which is an older copy of itself.
    Restored,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Join, Self::Leave, Self::Dead, Self::Order, Self::Change, Self::Restored];

    /// The word in metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Dead => "dead",
            Self::Order => "order",
            Self::Change => "change",
            Self::Restored => "restored",
        }
    }
}

/// What a round found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// The ring in force, as far as this replica knows.
    pub ring: RingSpec,
    /// The orders in force.
    pub orders: BTreeMap<ShardId, ShardOrder>,
    /// Whether this replica leads.
    pub leading: bool,
    /// Whether ring or orders are others than after the round before.
    pub changed: bool,
    /// Who leads; empty if nobody does.
    pub leader: String,
    /// Whether all members are silent and stay only because nobody else is there.
    pub held: bool,
    /// What this replica changed about the ring, once for each shard, and without a shard if only the epoch is new.
    pub causes: Vec<(Option<ShardId>, Cause)>,
}

/// One replica's view.
#[derive(Debug)]
pub struct Membership {
    me: String,
    ring: RingSpec,
    orders: BTreeMap<ShardId, ShardOrder>,
    leading: bool,
    /// The leader and its beat, and since when they have not moved.
    leader: Option<(String, i64, Instant)>,
    census: Census,
    /// When the last round began that went well; `None` after one that did not.
    last: Option<Instant>,
}

impl Membership {
    /// A replica that has seen nothing yet. `me` must be like no other replica's, and not empty.
    #[must_use]
    pub fn new(me: String) -> Self {
        Self {
            me,
            ring: RingSpec::default(),
            orders: BTreeMap::new(),
            leading: false,
            leader: None,
            census: Census::default(),
            last: None,
        }
    }

    /// One round, to be called about every 500 ms, and at once when a report changes something: looks at the board,
    /// takes or keeps the lead if nobody else lives, puts a new ring if one is due.
    ///
    /// # Errors
    /// If the board cannot be used. Then what was known stays in force: [`Membership::known`].
    pub async fn round<B: Board>(&mut self, board: &B, now: Instant) -> Result<Round, B::Error> {
        let (last, led) = (self.last.take(), std::mem::take(&mut self.leading));
        let seen = board.load().await?;
        let blind = last.is_none_or(|last| now.saturating_duration_since(last) > LATE);
        self.census.look(&seen, blind, now);
        let mut changed = self.learn(&seen);
        let mut causes = vec![];
        if let Some(beat) = self.lead(board, &seen, now).await? {
            if !led {
                tracing::info!(me = self.me, before = seen.leader, "this replica leads");
                self.census.pardon(&seen, now);
            }
            causes = self.decide(board, &seen, beat, now).await?;
            self.leading = true;
        } else if led {
            tracing::warn!(me = self.me, leader = seen.leader, "another replica leads now");
        }
        changed |= !causes.is_empty();
        self.last = Some(now);
        Ok(Round { changed, causes, ..self.known() })
    }

    /// What is in force as far as this replica knows, without looking.
    #[must_use]
    pub fn known(&self) -> Round {
        Round {
            ring: self.ring.clone(),
            orders: self.orders.clone(),
            leading: self.leading,
            changed: false,
            leader: self.leader.as_ref().map(|(leader, ..)| leader.clone()).unwrap_or_default(),
            held: self.census.held(),
            causes: vec![],
        }
    }

    /// Gives the lead up, so that the next one need not wait for this one's lease. Without the lead it does nothing.
    ///
    /// # Errors
    /// If the board cannot be used; then the lead ends by itself.
    pub async fn resign<B: Board>(&mut self, board: &B) -> Result<(), B::Error> {
        self.leading = false;
        let seen = board.load().await?;
        if seen.leader == self.me {
            board.lead("", &self.me, seen.beat).await?;
        }
        Ok(())
    }

    /// Takes over what the board says. A ring that is older than the known one is that of a database which was put
    /// back; what is known stays until the leader has put a newer one.
    fn learn(&mut self, seen: &BoardState) -> bool {
        let newer = seen.ring.epoch > self.ring.epoch;
        if newer {
            self.ring = seen.ring.clone();
        }
        let other = self.orders != seen.orders;
        if other {
            self.orders = seen.orders.clone();
        }
        newer || other
    }

    /// Takes or keeps the lead, if it is free. Returns the beat that it is held with.
    async fn lead<B: Board>(&mut self, board: &B, seen: &BoardState, now: Instant) -> Result<Option<i64>, B::Error> {
        let since = match &self.leader {
            Some((leader, beat, since)) if *leader == seen.leader && *beat == seen.beat => *since,
            Some(_) | None => now,
        };
        self.leader = Some((seen.leader.clone(), seen.beat, since));
        let free = seen.leader.is_empty() || seen.leader == self.me || now.saturating_duration_since(since) > LEASE;
        if !free || !board.lead(&self.me, &seen.leader, seen.beat).await? {
            return Ok(None);
        }
        let beat = seen.beat.wrapping_add(1);
        self.leader = Some((self.me.clone(), beat, now));
        Ok(Some(beat))
    }

    /// Puts a new ring if one is due. Returns what is new about it.
    async fn decide<B: Board>(
        &mut self,
        board: &B,
        seen: &BoardState,
        beat: i64,
        now: Instant,
    ) -> Result<Vec<(Option<ShardId>, Cause)>, B::Error> {
        let members = self.census.members(seen, now);
        let reported = seen.leases.iter().map(|l| l.epoch).filter(|e| *e <= seen.ring.epoch.saturating_add(LEAP)).max();
        let top = seen.ring.epoch.max(self.ring.epoch).max(reported.unwrap_or(0));
        if members == seen.ring.members && top == seen.ring.epoch {
            return Ok(vec![]);
        }
        let next = RingSpec { epoch: top.saturating_add(1), members };
        if !board.put_ring(&self.me, beat, seen.ring.epoch, &next).await? {
            tracing::warn!(epoch = next.epoch, "the ring was changed by somebody else; looking again");
            return Ok(vec![]);
        }
        let causes = causes(seen, &next.members);
        for (shard, cause) in &causes {
            let shard = shard.as_ref().map(ShardId::as_str);
            tracing::info!(epoch = next.epoch, members = next.members.len(), shard, cause = cause.as_str(), "new ring");
        }
        self.ring = next;
        Ok(causes)
    }
}

/// What is new about the next ring, in the order of the names.
fn causes(seen: &BoardState, next: &[Member]) -> Vec<(Option<ShardId>, Cause)> {
    let of = |members: &[Member]| -> BTreeMap<ShardId, Member> {
        members.iter().map(|m| (m.shard.clone(), m.clone())).collect()
    };
    let (before, after) = (of(&seen.ring.members), of(next));
    let mut causes = BTreeMap::new();
    for (shard, member) in &before {
        match after.get(shard) {
            None => _ = causes.insert(shard.clone(), seen.is_out(shard).unwrap_or(Cause::Dead)),
            Some(now) if now != member => _ = causes.insert(shard.clone(), Cause::Change),
            Some(_) => {}
        }
    }
    causes.extend(after.keys().filter(|s| !before.contains_key(*s)).map(|s| (s.clone(), Cause::Join)));
    if causes.is_empty() {
        return vec![(None, Cause::Restored)];
    }
    causes.into_iter().map(|(shard, cause)| (Some(shard), cause)).collect()
}
