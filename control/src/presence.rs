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
    api::{self, ShardOrder, ShardReport, ShardState, ShardView},
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
    addresses: Vec<String>,
    version: String,
    edges: HashMap<EdgeId, api::Presence>,
    /// As another replica counted them, if the shard reports there.
    counted: u64,
    heard: Instant,
    /// By a report, not by another replica.
    heard_here: bool,
    last_seen: i64,
    beat: i64,
    /// Whether it is dead and its edges have been counted as gone. They are kept, because the shard may only have been
    /// silent, and its next report then tells what changed and nothing else.
    mourned: bool,
}

impl Lease {
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
    /// Takes a report. Returns the lease as it should be kept for other replicas.
    ///
    /// # Errors
    /// If it speaks for another shard; then nothing of it is taken.
    pub fn report(
        &self,
        shard: &ShardId,
        report: ShardReport,
        now: Instant,
        unix: i64,
    ) -> Result<StoredLease, WrongSender> {
        if let Some(other) = report.online.iter().find(|p| p.shard != *shard) {
            return Err(WrongSender { sender: shard.clone(), named: other.shard.clone() });
        }
        let ShardReport { addresses, version, full, online, offline, .. } = report;
        let mut inner = self.inner.lock();
        let Inner { shards, gone } = &mut *inner;
        let lease = shards.entry(shard.clone()).or_insert_with(|| Lease {
            addresses: vec![],
            version: String::new(),
            edges: HashMap::new(),
            counted: 0,
            heard: now,
            heard_here: true,
            last_seen: unix,
            beat: 0,
            mourned: false,
        });
        let mut news = !lease.alive(now) || lease.addresses != addresses || lease.edges.is_empty();
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
        lease.addresses = addresses;
        lease.version = version;
        lease.counted = lease.edges.len() as u64;
        (lease.heard, lease.heard_here, lease.last_seen, lease.mourned) = (now, true, unix, false);
        let stored = StoredLease {
            name: shard.clone(),
            addresses: lease.addresses.clone(),
            version: lease.version.clone(),
            edges: i64::try_from(lease.counted).unwrap_or(i64::MAX),
            last_seen: unix,
            beat: 0,
        };
        drop(inner);
        if news {
            self.changed.notify_one();
        }
        Ok(stored)
    }

    /// Takes over what is kept. A beat that moved, or a shard that is not known yet, counts as a report just now: after
    /// a start, the shards that lived before get one lease of time to report.
    pub fn adopt(&self, leases: Vec<StoredLease>, now: Instant) {
        let mut inner = self.inner.lock();
        let mut news = false;
        for kept in leases {
            let counted = u64::try_from(kept.edges).unwrap_or(0);
            match inner.shards.get_mut(&kept.name) {
                Some(lease) => {
                    let moved = lease.beat != kept.beat;
                    lease.beat = kept.beat;
                    if moved && !(lease.heard_here && lease.alive(now)) {
                        news |= !lease.alive(now) || lease.addresses != kept.addresses;
                        lease.addresses = kept.addresses;
                        lease.version = kept.version;
                        lease.counted = counted;
                        (lease.heard, lease.heard_here, lease.last_seen) = (now, false, kept.last_seen);
                    }
                }
                None => {
                    news = true;
                    let StoredLease { name, addresses, version, last_seen, beat, .. } = kept;
                    let edges = HashMap::new();
                    let (heard, heard_here, mourned) = (now, false, false);
                    let lease =
                        Lease { addresses, version, edges, counted, heard, heard_here, last_seen, beat, mourned };
                    inner.shards.insert(name, lease);
                }
            }
        }
        drop(inner);
        if news {
            self.changed.notify_one();
        }
    }

    /// Completes when shards or their addresses may have changed. One waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The shards that live and have an address, by name. A shard that is leaving reports without one.
    #[must_use]
    pub fn alive(&self, now: Instant) -> Vec<Candidate> {
        let inner = self.inner.lock();
        let alive = inner.shards.iter().filter(|(_, lease)| lease.alive(now) && !lease.addresses.is_empty());
        alive.map(|(name, lease)| Candidate { shard: name.clone(), addresses: lease.addresses.clone() }).collect()
    }

    /// All shards that reported within the last hour.
    #[must_use]
    pub fn shards(&self, now: Instant) -> Vec<ShardView> {
        let inner = self.inner.lock();
        let view = |(name, lease): (&ShardId, &Lease)| ShardView {
            name: name.clone(),
            addresses: lease.addresses.clone(),
            version: lease.version.clone(),
            edges: if lease.alive(now) { lease.counted } else { 0 },
            last_seen: lease.last_seen,
            alive: lease.alive(now),
            state: ShardState::Serving,
            order: ShardOrder::Serve,
            weight: proto::ring::WEIGHT,
            epoch: 0,
            streams: 0,
        };
        inner.shards.iter().map(view).collect()
    }

    /// Where one edge is, and when it was last seen.
    #[must_use]
    pub fn of(&self, edge: &EdgeId, now: Instant) -> (Option<api::Presence>, Option<i64>) {
        let inner = self.inner.lock();
        let alive = inner.shards.values().filter(|lease| lease.alive(now));
        let found = alive.filter_map(|l| l.edges.get(edge).map(|p| (p, l.last_seen))).max_by_key(|(p, _)| p.since);
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
                    all.insert(edge.clone(), (Some(presence.clone()), lease.last_seen));
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
            gone.extend(lease.edges.keys().map(|edge| (edge.clone(), lease.last_seen)));
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
                seen.extend(lease.edges.keys().map(|e| (e.clone(), lease.last_seen)));
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
        ShardReport { addresses: vec!["a:1".into()], version: "1".into(), full, online, offline }
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
