//! Which shards live, by their beats. Pure: what the board says and what time it is go in, members come out.

use std::{collections::BTreeMap, time::Duration};

use proto::{
    api::ShardState,
    id::ShardId,
    ring::{MAX_WEIGHT, Member},
};
use tokio::time::Instant;

use super::BoardState;
use crate::presence::LEASE;

/// How long a shard that was declared dead must report without a break before it is a member again.
const RETURN: Duration = Duration::from_secs(3);

/// Somebody else must have reported this lately before silence means death. Reports come every two seconds, so whoever is
/// blind has heard nobody for four seconds when the first lease ends.
const PROOF: Duration = Duration::from_secs(3);

/// How long a shard that says it stops is believed. It reports to every replica, and an older word of it may come later
/// by another one.
const LEAVING: Duration = Duration::from_secs(1);

/// How long a mesh must have had a ring before newcomers wait for one another; one that is just starting up has no time.
const GROWN: Duration = Duration::from_secs(30);
/// Shards that come this soon after one another come into the ring together, so that the edges which have to move do so
/// once: an autoscaler starts several at a time.
const TOGETHER: Duration = Duration::from_secs(5);
/// How long the first of them waits at most.
const LONGEST: Duration = Duration::from_secs(15);

/// What is known about the life of each shard.
#[derive(Debug, Default)]
pub(super) struct Census {
    shards: BTreeMap<ShardId, Sighting>,
    held: bool,
    /// Since when there is a ring.
    ring_since: Option<Instant>,
}

#[derive(Debug)]
struct Sighting {
    /// As it was seen last; `None` for a member that the board has no lease of.
    beat: Option<i64>,
    /// When it moved last, or when a fresh lease was given.
    moved: Instant,
    life: Life,
    /// When it said last that it stops.
    left: Option<Instant>,
    /// When it came, of one that has never been in the ring.
    came: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// It has a record and gives no sign: it left, or was never seen to live. The next sign is enough.
    Quiet,
    /// Its lease holds.
    Living,
    /// It fell silent while it should have served.
    Lost,
    /// It was lost and reports again, since then.
    Returning(Instant),
}

impl Sighting {
    const fn new(beat: Option<i64>, life: Life, now: Instant) -> Self {
        Self { beat, moved: now, life, left: None, came: None }
    }

    fn beats(&mut self, beat: i64, now: Instant) {
        self.life = match self.life {
            Life::Quiet | Life::Living => Life::Living,
            Life::Lost => Life::Returning(now),
            Life::Returning(since) => Life::Returning(since),
        };
        (self.beat, self.moved) = (Some(beat), now);
    }
}

impl Census {
    /// Takes over what the board says. `blind` if something may have been missed since the last look.
    pub(super) fn look(&mut self, seen: &BoardState, blind: bool, now: Instant) {
        let mut signs = false;
        for lease in &seen.leases {
            let serves = seen.is_out(&lease.name).is_none();
            let Some(sighting) = self.shards.get_mut(&lease.name) else {
                signs |= serves;
                // A record that was there before may be that of a shard which died long ago.
                let life = if blind { Life::Quiet } else { Life::Living };
                let came = (!blind && serves && !is_member(seen, &lease.name)).then_some(now);
                let sighting = Sighting { came, ..Sighting::new(Some(lease.beat), life, now) };
                self.shards.insert(lease.name.clone(), sighting);
                continue;
            };
            if sighting.beat != Some(lease.beat) {
                signs |= serves;
                sighting.beats(lease.beat, now);
                if lease.state == ShardState::Draining {
                    sighting.left = Some(now);
                }
            }
        }
        self.shards.retain(|shard, _| seen.lease(shard).is_some() || is_member(seen, shard));
        for member in &seen.ring.members {
            let unknown = || Sighting::new(None, Life::Living, now);
            self.shards.entry(member.shard.clone()).or_insert_with(unknown).came = None;
        }
        self.ring_since = if seen.ring.members.is_empty() { None } else { self.ring_since.or(Some(now)) };
        if blind || (self.held && signs) {
            self.pardon(seen, now);
        }
        self.expire(seen, now);
    }

    /// Gives a fresh lease to everybody who may live: members of the ring, and who was alive before.
    pub(super) fn pardon(&mut self, seen: &BoardState, now: Instant) {
        self.held = false;
        for (shard, sighting) in &mut self.shards {
            if is_member(seen, shard) || sighting.life == Life::Living {
                (sighting.life, sighting.moved) = (Life::Living, now);
            }
        }
    }

    /// Whether all members are silent, which is far more likely this replica's blindness than the end of them all.
    pub(super) const fn held(&self) -> bool {
        self.held
    }

    /// Who is to be in the ring, by name.
    pub(super) fn members(&self, seen: &BoardState, now: Instant) -> Vec<Member> {
        let stays = |s: &Sighting| s.left.is_none_or(|left| now.saturating_duration_since(left) >= LEAVING);
        let wait = self.newcomers_wait(seen, now);
        let serves = |(shard, s): &(&ShardId, &Sighting)| {
            s.life == Life::Living && stays(s) && seen.is_out(shard).is_none() && !(wait && s.came.is_some())
        };
        let living = self.shards.iter().filter(serves);
        let member = |shard: &ShardId| match seen.lease(shard) {
            Some(lease) => Some(Member {
                shard: shard.clone(),
                addresses: lease.addresses.clone(),
                weight: lease.weight.clamp(1, MAX_WEIGHT),
            }),
            None => seen.ring.members.iter().find(|m| m.shard == *shard).cloned(),
        };
        living.filter_map(|(shard, _)| member(shard)).collect()
    }

    /// Whether those that have never been in the ring wait for others that may come. Not if nobody else serves.
    fn newcomers_wait(&self, seen: &BoardState, now: Instant) -> bool {
        let since = |at: Instant| now.saturating_duration_since(at);
        let living = |(shard, s): &(&ShardId, &Sighting)| s.life == Life::Living && seen.is_out(shard).is_none();
        let came = || self.shards.iter().filter(living).filter_map(|(_, s)| s.came);
        let others = self.shards.iter().filter(living).any(|(_, s)| s.came.is_none());
        let (Some(first), Some(last)) = (came().min(), came().max()) else { return false };
        let grown = self.ring_since.is_some_and(|ring| since(ring) >= GROWN);
        others && grown && since(last) < TOGETHER && since(first) < LONGEST
    }

    fn expire(&mut self, seen: &BoardState, now: Instant) {
        for sighting in self.shards.values_mut() {
            let silent = now.saturating_duration_since(sighting.moved);
            if let Life::Returning(since) = sighting.life {
                if silent >= RETURN {
                    sighting.life = Life::Lost;
                } else if now.saturating_duration_since(since) >= RETURN {
                    sighting.life = Life::Living;
                }
            }
        }
        let lives = |s: &Sighting, limit| s.life == Life::Living && now.saturating_duration_since(s.moved) <= limit;
        let proof = self.shards.iter().any(|(shard, s)| lives(s, PROOF) && seen.is_out(shard).is_none());
        let mut held = vec![];
        for (shard, sighting) in &mut self.shards {
            if sighting.life != Life::Living || lives(sighting, LEASE) {
                continue;
            }
            if seen.is_out(shard).is_some() {
                sighting.life = Life::Quiet;
            } else if !proof && is_member(seen, shard) {
                held.push(shard.as_str());
            } else {
                sighting.life = Life::Lost;
            }
        }
        if !held.is_empty() && !self.held {
            tracing::warn!(shards = ?held, "no member of the ring reports any more; the ring stays as it is until one does");
        }
        self.held = !held.is_empty();
    }
}

fn is_member(seen: &BoardState, shard: &ShardId) -> bool {
    seen.ring.members.iter().any(|m| m.shard == *shard)
}
