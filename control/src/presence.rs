//! Which shards live and which edges they hold, from the reports of the shards. In memory only: the database would be
//! wrong within seconds. A shard that has not reported for [`LEASE`] is dead, and so is what it said.
//!
//! Another replica of control hears other shards; it writes that down as a counter that moves ([`StoredLease`]), which
//! [`Presence::adopt`] takes over. Where edges are is known only to the replica that their shard reports to.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use parking_lot::Mutex;
use proto::{
    api::{self, ShardOrder, ShardReport, ShardView},
    id::{EdgeId, ShardId},
    message::Candidate,
};
use tokio::{sync::Notify, time::Instant};

use crate::store::shards::StoredLease;

/// How long a report holds.
pub const LEASE: Duration = Duration::from_secs(6);
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
    /// Whether it is dead and its edges have been counted as gone. They are kept, because the shard may only have been
    /// silent, and its next report then tells what changed and nothing else.
    mourned: bool,
}

impl Lease {
    /// Of a shard that is heard of for the first time, and not by its own report.
    fn new(told: StoredLease, now: Instant) -> Self {
        Self { told, edges: HashMap::new(), heard: now, heard_here: false, reports: 0, mourned: false }
    }

    fn alive(&self, now: Instant) -> bool {
        now.duration_since(self.heard) <= LEASE
    }
}

/// A report spoke for another shard than the one that sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the report of shard {sender} speaks for shard {named}")]
pub struct WrongSender {
    sender: ShardId,
    named: ShardId,
}

impl Presence {
    /// Takes a report. Returns the lease as it should be kept for other replicas, and whether it says something that
    /// may change the ring.
    ///
    /// # Errors
    /// If it speaks for another shard; then nothing of it is taken.
    pub fn report(
        &self,
        shard: &ShardId,
        report: ShardReport,
        now: Instant,
        unix: i64,
    ) -> Result<(StoredLease, bool), WrongSender> {
        if let Some(other) = report.online.iter().find(|p| p.shard != *shard) {
            return Err(WrongSender { sender: shard.clone(), named: other.shard.clone() });
        }
        let ShardReport { addresses, version, state, weight, epoch, streams, full, online, offline } = report;
        let (name, last_seen, beat, edges) = (shard.clone(), unix, 0, 0);
        let told = StoredLease { name, addresses, version, edges, last_seen, beat, state, weight, epoch, streams };
        let mut inner = self.inner.lock();
        let Inner { shards, gone } = &mut *inner;
        let mut stirs = !shards.contains_key(shard);
        let lease = shards.entry(shard.clone()).or_insert_with(|| Lease::new(told.clone(), now));
        stirs |= !lease.alive(now) || lease.told.tells_of_ring() != told.tells_of_ring();
        let mut news = stirs || lease.edges.is_empty();
        if full {
            let named: HashSet<&EdgeId> = online.iter().map(|p| &p.edge).collect();
            gone.extend(lease.edges.keys().filter(|e| !named.contains(e)).map(|e| (e.clone(), unix)));
            lease.edges.clear();
            news = true;
        }
        for edge in offline {
            if lease.edges.remove(&edge).is_some() {
                gone.insert(edge, unix);
            }
        }
        lease.edges.extend(online.into_iter().map(|p| (p.edge.clone(), p)));
        let edges = i64::try_from(lease.edges.len()).unwrap_or(i64::MAX);
        lease.told = StoredLease { edges, beat: lease.told.beat, ..told };
        lease.reports = lease.reports.wrapping_add(1);
        (lease.heard, lease.heard_here, lease.mourned) = (now, true, false);
        let stored = lease.told.clone();
        drop(inner);
        if news {
            self.changed.notify_one();
        }
        Ok((stored, stirs))
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
            if moved && !(lease.heard_here && lease.alive(now)) {
                news |= !lease.alive(now) || lease.told.addresses != kept.addresses;
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
        let Inner { shards, gone } = &mut *inner;
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

#[cfg(test)]
mod tests {
    use proto::api::ShardState;

    use super::*;

    fn shard(name: &str) -> ShardId {
        name.parse().unwrap()
    }

    fn held(edge: &str, by: &str, since: i64) -> api::Presence {
        api::Presence {
            edge: edge.parse().unwrap(),
            shard: shard(by),
            since,
            address: "192.0.2.1:4000".into(),
            version: "1".into(),
            services: vec![],
            rtt_us: 1,
            streams: 0,
        }
    }

    fn report(full: bool, online: Vec<api::Presence>, offline: &[&str]) -> ShardReport {
        let offline = offline.iter().map(|e| e.parse().unwrap()).collect();
        let (addresses, version, state) = (vec!["a:1".into()], "1".into(), ShardState::Serving);
        ShardReport { addresses, version, state, weight: 100, epoch: 0, streams: 0, full, online, offline }
    }

    fn where_is(presence: &Presence, edge: &str, now: Instant) -> Option<String> {
        presence.of(&edge.parse().unwrap(), now).0.map(|p| p.shard.to_string())
    }

    #[test]
    fn edges_come_move_and_go() {
        let presence = Presence::default();
        let now = Instant::now();
        presence
            .report(&shard("s1"), report(true, vec![held("a", "s1", 1), held("b", "s1", 1)], &[]), now, 10)
            .unwrap();
        presence.report(&shard("s2"), report(true, vec![held("a", "s2", 5)], &[]), now, 10).unwrap();
        assert_eq!(where_is(&presence, "a", now).unwrap(), "s2", "the newer tunnel counts while an edge moves");
        assert_eq!(presence.all(now).len(), 2);
        presence.report(&shard("s1"), report(false, vec![], &["b"]), now, 12).unwrap();
        assert_eq!(where_is(&presence, "b", now), None);
        assert_eq!(presence.take_seen(false, now), [("b".parse().unwrap(), 12)]);
        presence.report(&shard("s2"), report(true, vec![], &[]), now, 13).unwrap();
        assert_eq!(where_is(&presence, "a", now).unwrap(), "s1");
    }

    #[test]
    fn a_silent_shard_dies_with_all_that_it_held() {
        let presence = Presence::default();
        let start = Instant::now();
        presence.report(&shard("s1"), report(true, vec![held("a", "s1", 1)], &[]), start, 10).unwrap();
        let later = start + LEASE + Duration::from_millis(1);
        assert_eq!(presence.alive(start + LEASE).len(), 1);
        assert!(presence.alive(later).is_empty());
        assert_eq!(where_is(&presence, "a", later), None);
        presence.expire(later);
        assert_eq!(presence.of(&"a".parse().unwrap(), later).1, Some(10));
        assert!(!presence.shards(later)[0].alive, "still shown to people");
        presence.report(&shard("s1"), report(false, vec![], &[]), later, 20).unwrap();
        assert_eq!(where_is(&presence, "a", later).unwrap(), "s1", "it had only been silent");
        let start = later;
        presence.expire(start + REMEMBERED);
        assert!(presence.shards(later).is_empty(), "forgotten after an hour");
    }

    #[test]
    fn a_shard_speaks_for_itself_only() {
        let presence = Presence::default();
        let now = Instant::now();
        assert!(presence.report(&shard("s1"), report(true, vec![held("a", "s2", 1)], &[]), now, 10).is_err());
        assert!(presence.shards(now).is_empty());
    }

    #[test]
    fn what_another_replica_hears_counts_as_long_as_its_beat_moves() {
        let presence = Presence::default();
        let start = Instant::now();
        let kept = |beat| StoredLease {
            name: shard("s1"),
            addresses: vec!["a:1".into()],
            version: "1".into(),
            edges: 7,
            last_seen: 10,
            beat,
            state: ShardState::Serving,
            weight: 100,
            epoch: 0,
            streams: 0,
        };
        presence.adopt(vec![kept(1)], start);
        let at = |secs| start + Duration::from_secs(secs);
        assert_eq!(presence.shards(at(1))[0].edges, 7);
        presence.adopt(vec![kept(1)], at(5));
        assert!(presence.alive(at(7)).is_empty(), "the same beat is no sign of life");
        presence.adopt(vec![kept(2)], at(7));
        assert_eq!(presence.alive(at(13)).len(), 1);
    }

    #[test]
    fn a_shard_without_an_address_is_leaving() {
        let presence = Presence::default();
        let now = Instant::now();
        let leaving = ShardReport { addresses: vec![], ..report(true, vec![], &[]) };
        presence.report(&shard("s1"), leaving, now, 10).unwrap();
        assert!(presence.alive(now).is_empty());
        assert!(presence.shards(now)[0].alive);
    }
}
