//! The rules that hold after every step, whatever happens (sections 6 and 10 of the design), and what must have been seen
//! before to tell whether they do.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Once,
};

use anyhow::{Context, bail, ensure};
use proto::{api::ShardOrder, id::ShardId, ring::RingSpec};

use super::Cluster;

thread_local! {
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Rules {
    /// The ring of each epoch.
    rings: BTreeMap<u64, RingSpec>,
    /// The epoch of each process.
    epochs: BTreeMap<String, u64>,
    /// How many looks there were.
    looks: u64,
}

/// Counts panics of this thread from now on, also those that a runtime catches.
pub fn watch_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
    PANICS.set(0);
}

impl Rules {
    /// How many looks there were.
    #[must_use]
    pub const fn looks(&self) -> u64 {
        self.looks
    }

    /// Epochs that were seen.
    #[must_use]
    pub fn epochs(&self) -> usize {
        self.rings.len()
    }

    /// Looks at the mesh as it is now.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub fn look(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.looks += 1;
        ensure!(PANICS.get() == 0, "rule 3: a task ended by a panic");
        self.see("database".to_owned(), &cluster.control.database.ring(), false)?;
        for replica in cluster.control.running() {
            self.see(format!("replica {}", replica.name()), &replica.ring(), true)?;
        }
        for seat in &cluster.shards {
            if let Some(process) = &seat.running {
                let spec = process.state.borrow().ring.spec();
                self.see(format!("{} (start {})", seat.id, seat.starts), &spec, true)?;
            }
        }
        // A look at each edge costs what a few of its datagrams do.
        if self.looks.is_multiple_of(1 + cluster.edges.len() as u64 / 100) {
            if let Some(name) = cluster.ended_by_itself() {
                bail!("rule 3: {name} has ended by itself");
            }
            one_owner_serves(cluster)?;
        }
        Ok(())
    }

    /// A ring somewhere: a later one than there was, and the same as everywhere else at its epoch.
    fn see(&mut self, at: String, ring: &RingSpec, grows: bool) -> anyhow::Result<()> {
        if ring.epoch == 0 {
            return Ok(());
        }
        if let Some(known) = self.rings.get(&ring.epoch) {
            ensure!(known == ring, "rule 7: {at} has another ring of epoch {}: {ring:?} and {known:?}", ring.epoch);
        } else {
            self.rings.insert(ring.epoch, ring.clone());
        }
        let before = self.epochs.entry(at.clone()).or_default();
        ensure!(!grows || *before <= ring.epoch, "rule 7: {at} went back from epoch {before} to {}", ring.epoch);
        *before = ring.epoch;
        Ok(())
    }
}

/// Of the shards that hold a tunnel of an edge and believe to own it, no two go by the same epoch.
fn one_owner_serves(cluster: &Cluster) -> anyhow::Result<()> {
    for seat in &cluster.edges {
        let holders: Vec<_> = cluster.shards.iter().filter(|s| s.holds(&seat.name)).collect();
        if holders.len() < 2 {
            continue;
        }
        let mut owners: BTreeMap<u64, &ShardId> = BTreeMap::new();
        for shard in holders {
            let state = shard.running.as_ref().context("it holds an edge")?.state.borrow().clone();
            if state.ring.owner(&seat.name).is_some_and(|owner| owner.shard == shard.id) {
                let (epoch, other) = (state.ring.epoch(), owners.insert(state.ring.epoch(), &shard.id));
                let other = other.map(ShardId::as_str);
                ensure!(
                    other.is_none(),
                    "rule 8: {} is owned by {} and {other:?} at epoch {epoch}",
                    seat.name,
                    shard.id
                );
            }
        }
    }
    Ok(())
}

impl Cluster {
    fn ended_by_itself(&self) -> Option<String> {
        let shards = self.shards.iter().filter_map(|s| s.running.as_ref().map(|p| (&p.tasks, s.id.as_str())));
        let edges = self.edges.iter().filter_map(|e| e.running.as_ref().map(|p| (&p.tasks, e.name.as_str())));
        shards.chain(edges).find(|(tasks, _)| tasks.running() == 0).map(|(_, name)| name.to_owned())
    }

    fn is_walled_off(&self, from: IpAddr, shard: &ShardId) -> bool {
        let seat = self.shards.iter().find(|s| s.id == *shard);
        seat.is_some_and(|s| self.net.is_cut(from, s.address.ip()) || self.net.is_cut(s.address.ip(), from))
    }

    /// Whether each edge that lives has its one tunnel, at its owner unless it cannot reach that one or is kept by a cordoned
    /// one; nobody else has any; every shard that serves is in the ring, goes by the same one and is linked to every other.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.disorder().is_none()
    }

    /// What is not as it is to be when all is calm.
    #[must_use]
    pub fn disorder(&self) -> Option<String> {
        let orders = self.control.database.orders();
        let serving: Vec<_> = self.shards.iter().filter(|s| s.running.is_some()).collect();
        let mut rings = serving.iter().map(|s| s.ring());
        let ring = rings.next().flatten();
        if let Some(other) = rings.find(|r| r.as_ref().map(|r| r.epoch()) != ring.as_ref().map(|r| r.epoch())) {
            return Some(format!("shards go by different rings: {ring:?} and {other:?}"));
        }
        if let Some(ring) = &ring {
            let wanted: BTreeSet<_> = serving.iter().map(|s| &s.id).filter(|id| !orders.contains_key(*id)).collect();
            let members: BTreeSet<_> = ring.members().map(|m| &m.shard).collect();
            if wanted != members {
                return Some(format!("{members:?} are in the ring, {wanted:?} serve"));
            }
        }
        for shard in &serving {
            let Some(process) = &shard.running else { continue };
            let lost = serving.iter().find(|s| s.id != shard.id && !process.shard.peers.has(&s.id));
            if let Some(lost) = lost.filter(|lost| !self.is_walled_off(shard.address.ip(), &lost.id)) {
                return Some(format!("{} has no link to {}", shard.id, lost.id));
            }
        }
        self.edges.iter().find_map(|seat| {
            let holders: Vec<_> = self.shards.iter().filter(|s| s.holds(&seat.name)).map(|s| &s.id).collect();
            if !seat.runs() || seat.revoked {
                return (!holders.is_empty()).then(|| format!("{} is gone and has tunnels at {holders:?}", seat.name));
            }
            if holders.len() != 1 || !seat.is_connected() {
                return Some(format!("{} has tunnels at {holders:?}", seat.name));
            }
            let owner = ring.as_ref().and_then(|r| r.owner(&seat.name)).map(|m| &m.shard);
            let cordoned = orders.get(holders[0]) == Some(&ShardOrder::Cordon);
            let stays =
                cordoned || owner.is_none_or(|owner| owner == holders[0] || self.is_walled_off(seat.host, owner));
            (!stays).then(|| format!("{} is at {} and not at its owner {owner:?}", seat.name, holders[0]))
        })
    }
}
