//! Which shards live and which edges they hold, from the reports of the shards. In memory only: the database would be
//! wrong within seconds. A shard that has not reported for [`LEASE`] is dead, and so is what it said.
//!
//! Another replica of control hears other shards; it writes that down as a counter that moves ([`StoredLease`]), which
//! [`Presence::adopt`] takes over. Where edges are is known only to the replica that their shard reports to.

mod rate;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use parking_lot::Mutex;
use proto::{
    api::{self, Parting, ShardOrder, ShardReport, ShardView},
    id::{EdgeId, ShardId},
    message::Candidate,
};
use tokio::{sync::Notify, time::Instant};

use self::rate::Rate;
use crate::store::shards::StoredLease;

/// How long a report holds.
pub const LEASE: Duration = Duration::from_secs(6);
/// Edges of which it is kept why they went. One more, and the oldest of them are forgotten.
const PARTINGS: usize = 100_000;
/// How long a dead shard is still shown to people.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// What the shards say.
#[derive(Debug, Default)]
pub struct Presence {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    shards: BTreeMap<ShardId, Lease>,
    /// Edges that went, and when they were last seen, until that is written down.
    gone: HashMap<EdgeId, i64>,
    /// Why shards had to do without edges last.
    partings: HashMap<EdgeId, Parting>,
}

#[derive(Debug)]
struct Lease {
    /// As it reported last, here or to another replica, whose beat this has.
    told: StoredLease,
    edges: HashMap<EdgeId, api::Presence>,
    heard: Instant,
    /// By a report, not by another replica.
    heard_here: bool,
    /// How often it reported here.
    reports: i64,
    /// Process and number of the report that was taken last here.
    numbered: (u64, u64),
    bytes: Rate,
    handshakes: Rate,
    /// Whether it is dead and its edges have been counted as gone. They are kept, because the shard may only have been
    /// silent, and its next report then tells what changed and nothing else.
    mourned: bool,
}

impl Lease {
    /// Of a shard that is heard of for the first time, and not by its own report.
    fn new(told: StoredLease, now: Instant) -> Self {
        Self {
            told,
            edges: HashMap::new(),
            heard: now,
            heard_here: false,
            reports: 0,
            numbered: (0, 0),
            bytes: Rate::default(),
            handshakes: Rate::default(),
            mourned: false,
        }
    }

    fn take_edges(&mut self, report: ShardReport, gone: &mut HashMap<EdgeId, i64>, unix: i64) {
        if report.full {
            let named: HashSet<&EdgeId> = report.online.iter().map(|p| &p.edge).collect();
            gone.extend(self.edges.keys().filter(|e| !named.contains(e)).map(|e| (e.clone(), unix)));
            self.edges.clear();
        }
        for edge in report.offline {
            if self.edges.remove(&edge).is_some() {
                gone.insert(edge, unix);
            }
        }
        self.edges.extend(report.online.into_iter().map(|p| (p.edge.clone(), p)));
    }

    fn alive(&self, now: Instant) -> bool {
        now.duration_since(self.heard) <= LEASE
    }
}

/// How loaded a shard is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Edges that it holds.
    pub tunnels: u64,
    /// Streams that go through it.
    pub streams: u64,
    /// Bytes that it moves, both ways.
    pub bytes_per_second: f64,
    /// Links that want in.
    pub arrivals_per_second: f64,
    /// Seconds since its last report.
    pub age: i64,
}

/// A report that is the latest word of its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The lease as it should be kept for other replicas.
    pub lease: StoredLease,
    /// Whether it says something that may change the ring.
    pub stirs: bool,
    /// The beat at which the kept lease has not moved for a lease's time, as far as is known here.
    pub silent: Option<i64>,
}

/// A report spoke for another shard than the one that sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the report of shard {sender} speaks for shard {named}")]
pub struct WrongSender {
    sender: ShardId,
    named: ShardId,
}

fn told(shard: &ShardId, report: &ShardReport, unix: i64) -> StoredLease {
    StoredLease {
        name: shard.clone(),
        addresses: report.addresses.clone(),
        version: report.version.clone(),
        edges: 0,
        last_seen: unix,
        beat: 0,
        state: report.state,
        weight: report.weight,
        epoch: report.epoch,
        streams: report.streams,
        started: report.started,
        number: report.number,
    }
}

/// Keeps the latest of each edge.
fn take_partings(kept: &mut HashMap<EdgeId, Parting>, news: &[Parting]) {
    for parting in news {
        if kept.get(&parting.edge).is_none_or(|known| known.at <= parting.at) {
            kept.insert(parting.edge.clone(), parting.clone());
        }
    }
    if kept.len() > PARTINGS {
        let mut times: Vec<i64> = kept.values().map(|parting| parting.at).collect();
        times.sort_unstable();
        let middle = times[times.len() / 2];
        kept.retain(|_, parting| parting.at > middle);
    }
}

impl Presence {
    /// Takes a report, unless it is older than what is known. Returns what is to be written down, if anything.
    ///
    /// # Errors
    /// If it speaks for another shard; then nothing of it is taken.
    pub fn report(
        &self,
        shard: &ShardId,
        report: ShardReport,
        now: Instant,
        unix: i64,
    ) -> Result<Option<Heard>, WrongSender> {
        let mut named = report.online.iter().map(|p| &p.shard).chain(report.partings.iter().map(|p| &p.shard));
        if let Some(other) = named.find(|named| *named != shard) {
            return Err(WrongSender { sender: shard.clone(), named: other.clone() });
        }
        let told = told(shard, &report, unix);
        let mut inner = self.inner.lock();
        let Inner { shards, gone, partings } = &mut *inner;
        let known = shards.contains_key(shard);
        let lease = shards.entry(shard.clone()).or_insert_with(|| Lease::new(told.clone(), now));
        let dead = known && !lease.alive(now);
        // Of a shard that is silent for a lease no later process lives, whatever the clocks of its processes say.
        let silent = dead.then_some(lease.told.beat);
        let after = !known || dead || told.is_after(&lease.told);
        let in_order = after || (told.started, told.number) > lease.numbered;
        if !in_order {
            return Ok(None);
        }
        let stirs = after && (!known || dead || lease.told.tells_of_ring() != told.tells_of_ring());
        let news = stirs || report.full || lease.edges.is_empty();
        lease.numbered = (told.started, told.number);
        lease.bytes.note(report.bytes, now);
        lease.handshakes.note(report.handshakes, now);
        take_partings(partings, &report.partings);
        lease.take_edges(report, gone, unix);
        let edges = i64::try_from(lease.edges.len()).unwrap_or(i64::MAX);
        if after {
            lease.told = StoredLease { edges, beat: lease.told.beat, ..told };
        }
        lease.reports = lease.reports.wrapping_add(1);
        (lease.heard, lease.heard_here, lease.mourned) = (now, true, false);
        let heard = after.then(|| Heard { lease: lease.told.clone(), stirs, silent });
        drop(inner);
        if news {
            self.changed.notify_one();
        }
        Ok(heard)
    }

    /// Takes over what is kept. A beat that moved, or a shard that is not known yet, counts as a report just now: after
    /// a start, the shards that lived before get one lease of time to report.
    pub fn adopt(&self, leases: Vec<StoredLease>, now: Instant) {
        let mut inner = self.inner.lock();
        let mut news = false;
        for kept in leases {
            let Some(lease) = inner.shards.get_mut(&kept.name) else {
                news = true;
                inner.shards.insert(kept.name.clone(), Lease::new(kept, now));
                continue;
            };
            let moved = lease.told.beat != kept.beat;
            lease.told.beat = kept.beat;
            let alive = lease.alive(now);
            let news_here = if kept.started == 0 { lease.heard_here } else { !kept.is_after(&lease.told) };
            if moved && !(news_here && alive) {
                news |= !alive || lease.told.addresses != kept.addresses;
                lease.told = kept;
                (lease.heard, lease.heard_here) = (now, false);
            }
        }
        drop(inner);
        if news {
            self.changed.notify_one();
        }
    }

    /// The leases of all shards as they were heard here, with a beat for each report. What decides about the ring where
    /// there is one replica only.
    #[must_use]
    pub fn leases(&self) -> Vec<StoredLease> {
        let inner = self.inner.lock();
        inner.shards.values().map(|lease| StoredLease { beat: lease.reports, ..lease.told.clone() }).collect()
    }

    /// Completes when shards or their addresses may have changed. One waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The shards that live and have an address, by name. A shard that is leaving reports without one.
    #[must_use]
    pub fn alive(&self, now: Instant) -> Vec<Candidate> {
        let inner = self.inner.lock();
        let alive = inner.shards.iter().filter(|(_, lease)| lease.alive(now) && !lease.told.addresses.is_empty());
        alive.map(|(name, lease)| Candidate { shard: name.clone(), addresses: lease.told.addresses.clone() }).collect()
    }

    /// All shards that reported within the last hour. What is wanted of them is not known here.
    #[must_use]
    pub fn shards(&self, now: Instant) -> Vec<ShardView> {
        let inner = self.inner.lock();
        let view = |lease: &Lease| {
            let told = lease.told.clone();
            let alive = lease.alive(now);
            let count = |number: u64| if alive { number } else { 0 };
            ShardView {
                name: told.name,
                addresses: told.addresses,
                version: told.version,
                edges: count(u64::try_from(told.edges).unwrap_or(0)),
                last_seen: told.last_seen,
                alive,
                state: told.state,
                order: ShardOrder::Serve,
                weight: told.weight,
                epoch: told.epoch,
                streams: count(told.streams),
            }
        };
        inner.shards.values().map(view).collect()
    }

    /// How loaded the shards are that live, by name.
    #[must_use]
    pub fn loads(&self, now: Instant) -> BTreeMap<String, Load> {
        let inner = self.inner.lock();
        let alive = inner.shards.iter().filter(|(_, lease)| lease.alive(now));
        let load = |lease: &Lease| Load {
            tunnels: u64::try_from(lease.told.edges).unwrap_or(0),
            streams: lease.told.streams,
            bytes_per_second: lease.bytes.per_second(),
            arrivals_per_second: lease.handshakes.per_second(),
            age: i64::try_from(now.saturating_duration_since(lease.heard).as_secs()).unwrap_or(i64::MAX),
        };
        alive.map(|(name, lease)| (name.to_string(), load(lease))).collect()
    }

    /// Where one edge is, and when it was last seen.
    #[must_use]
    pub fn of(&self, edge: &EdgeId, now: Instant) -> (Option<api::Presence>, Option<i64>) {
        let inner = self.inner.lock();
        let alive = inner.shards.values().filter(|lease| lease.alive(now));
        let found = alive.filter_map(|l| l.edges.get(edge).map(|p| (p, l.told.last_seen))).max_by_key(|(p, _)| p.since);
        match found {
            Some((presence, seen)) => (Some(presence.clone()), Some(seen)),
            None => (None, inner.gone.get(edge).copied()),
        }
    }

    /// Why a shard had to do without an edge last.
    #[must_use]
    pub fn parting(&self, edge: &EdgeId) -> Option<Parting> {
        self.inner.lock().partings.get(edge).cloned()
    }

    /// Where all edges are, and when each was last seen. While an edge moves, two shards hold it; the newer one counts.
    #[must_use]
    pub fn all(&self, now: Instant) -> HashMap<EdgeId, (Option<api::Presence>, i64)> {
        let inner = self.inner.lock();
        let mut all: HashMap<EdgeId, (Option<api::Presence>, i64)> = HashMap::new();
        for (edge, seen) in &inner.gone {
            all.insert(edge.clone(), (None, *seen));
        }
        for lease in inner.shards.values().filter(|l| l.alive(now)) {
            for (edge, presence) in &lease.edges {
                let older = all.get(edge).and_then(|(p, _)| p.as_ref()).is_none_or(|p| p.since <= presence.since);
                if older {
                    all.insert(edge.clone(), (Some(presence.clone()), lease.told.last_seen));
                }
            }
        }
        all
    }

    /// Edges that shards hold now.
    #[must_use]
    pub fn online(&self, now: Instant) -> usize {
        self.inner.lock().shards.values().filter(|l| l.alive(now)).map(|l| l.edges.len()).sum()
    }

    /// Counts the edges of dead shards as gone, and forgets shards that died long ago.
    pub fn expire(&self, now: Instant) {
        let mut inner = self.inner.lock();
        let Inner { shards, gone, .. } = &mut *inner;
        for lease in shards.values_mut().filter(|l| !l.alive(now) && !l.mourned) {
            gone.extend(lease.edges.keys().map(|edge| (edge.clone(), lease.told.last_seen)));
            lease.mourned = true;
        }
        shards.retain(|_, lease| now.duration_since(lease.heard) < REMEMBERED);
    }

    /// Takes what should be written down: edges that went and, if `online`, those that are there.
    #[must_use]
    pub fn take_seen(&self, online: bool, now: Instant) -> Vec<(EdgeId, i64)> {
        let mut inner = self.inner.lock();
        let mut seen: Vec<_> = inner.gone.drain().collect();
        if online {
            for lease in inner.shards.values().filter(|l| l.alive(now)) {
                seen.extend(lease.edges.keys().map(|e| (e.clone(), lease.told.last_seen)));
            }
        }
        seen
    }

    /// Gives back what could not be written down.
    pub fn give_back(&self, seen: impl IntoIterator<Item = (EdgeId, i64)>) {
        let mut inner = self.inner.lock();
        for (edge, at) in seen {
            inner.gone.entry(edge).or_insert(at);
        }
    }
}
