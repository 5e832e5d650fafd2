//! The ring: which shard owns which edge, by consistent hashing. An immutable value that every process builds alike.
//!
//! Each shard stands on a circle of 64-bit hashes at [`POINTS`] places (at weight 100). An edge belongs to the shard
//! whose place comes first at or behind the edge's own hash; the shards whose places come next are where it goes if its
//! owner is lost. So taking a shard out moves its edges, each to the next one on its list, and nobody else's; adding one
//! takes edges from all others and gives none to them (Karger et al., *Consistent Hashing and Random Trees*, 1997).
//!
//! The hash is SipHash 1-3 (Aumasson, Bernstein 2012) with an all-zero key, over bytes that do not depend on the machine:
//! the edge's name; the shard's name, a zero byte, and the number of the place as 64 bits in little-endian order. A table
//! in the tests pins it: another result is another ring, and two processes that disagree send edges to and fro.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
};

use consistent_hash::{DefaultHash, Node, RingHash, StaticHashRing};
use serde::{Deserialize, Serialize};

use crate::{
    id::{EdgeId, ShardId},
    message::Candidate,
};

/// Places of a shard of weight 100. With 4096 of them the arcs of equal shards differ by 1.6 % (standard deviation),
/// which is less than what chance does to 1,000 edges on each (3.2 %).
pub const POINTS: u32 = 4096;
/// The weight of a shard that is as good as any other.
pub const WEIGHT: u32 = 100;
/// Largest weight: sixteen times as good.
pub const MAX_WEIGHT: u32 = 1600;

/// A shard in the ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub shard: ShardId,
    /// Where edges and other shards reach it: `host:port`, best first.
    pub addresses: Vec<String>,
    /// How much it takes compared with others, 1 to [`MAX_WEIGHT`]; [`WEIGHT`] is usual.
    pub weight: u32,
}

impl Member {
    /// How edges are told of it.
    #[must_use]
    pub fn candidate(&self) -> Candidate {
        Candidate { shard: self.shard.clone(), addresses: self.addresses.clone() }
    }
}

/// A ring as it is kept and sent: all that [`Ring::new`] needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingSpec {
    /// Grows by one with each change; 0 for the empty ring before the first.
    pub epoch: u64,
    /// In the order of their names, each once.
    pub members: Vec<Member>,
}

/// Epoch and members, and from them the owner of every edge.
pub struct Ring {
    epoch: u64,
    members: BTreeMap<ShardId, Member>,
    points: StaticHashRing<'static, Place, (), Pinned>,
}

impl Ring {
    /// Builds the ring: about 2 ms for ten shards. A shard that is named twice counts as it is named first; weights are
    /// brought into their bounds.
    #[must_use]
    pub fn new(spec: RingSpec) -> Self {
        let mut members = BTreeMap::new();
        for member in spec.members {
            members.entry(member.shard.clone()).or_insert(member);
        }
        let nodes: Vec<_> = members
            .values()
            .map(|m| {
                let quantity = u64::from(POINTS) * u64::from(m.weight.clamp(1, MAX_WEIGHT)) / u64::from(WEIGHT);
                Node::new(Place(m.shard.clone())).quantity(usize::try_from(quantity).unwrap_or(usize::MAX))
            })
            .collect();
        Self { epoch: spec.epoch, members, points: StaticHashRing::new(Pinned, nodes.into_iter()) }
    }

    /// Its number among all rings of the mesh.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether nobody is in it, as before the first word from control.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// How many shards are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// The shards, by name.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// One of them.
    #[must_use]
    pub fn member(&self, shard: &ShardId) -> Option<&Member> {
        self.members.get(shard)
    }

    /// The shard that owns an edge; `None` if the ring is empty.
    #[must_use]
    pub fn owner(&self, edge: &EdgeId) -> Option<&Member> {
        self.preference(edge).next()
    }

    /// All shards in the order in which this edge goes to them: its owner, then whoever owns it if that one is lost,
    /// and so on.
    pub fn preference(&self, edge: &EdgeId) -> impl Iterator<Item = &Member> {
        self.points.calc_candidates(&Name(edge.as_str())).filter_map(|node| self.members.get(&node.key.0))
    }

    /// Where an edge stands on the circle, for people.
    #[must_use]
    pub fn position(edge: &EdgeId) -> u64 {
        Pinned.hash_item(&Name(edge.as_str()))
    }

    /// The share of all edges that each shard owns, by the lengths of the arcs; they add up to 1.
    #[must_use]
    pub fn shares(&self) -> BTreeMap<ShardId, f64> {
        let mut places: Vec<(u64, &ShardId)> = Vec::with_capacity(self.points.len());
        for node in self.points.nodes() {
            places.extend((0..node.quantity).map(|i| (Pinned.hash_vnode(&node.key, i), &node.key.0)));
        }
        places.sort_unstable();
        let mut shares: BTreeMap<ShardId, f64> = self.members.keys().map(|shard| (shard.clone(), 0.0)).collect();
        let mut before = places.last().map_or(0, |(at, _)| *at);
        let only = places.len() == 1;
        for (at, shard) in places {
            #[allow(clippy::cast_precision_loss, reason = "a share for people needs no more than 53 bits")]
            let arc = if only { 1.0 } else { at.wrapping_sub(before) as f64 / 2.0_f64.powi(64) };
            if let Some(share) = shares.get_mut(shard) {
                *share += arc;
            }
            before = at;
        }
        shares
    }

    /// As it is kept and sent.
    #[must_use]
    pub fn spec(&self) -> RingSpec {
        RingSpec { epoch: self.epoch, members: self.members.values().cloned().collect() }
    }
}

impl Default for Ring {
    fn default() -> Self {
        Self::new(RingSpec::default())
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards: Vec<&str> = self.members.keys().map(ShardId::as_str).collect();
        write!(f, "Ring(epoch {}, {shards:?})", self.epoch)
    }
}

/// The hash of a name, the same on every machine.
pub(crate) fn name_hash(name: &str) -> u64 {
    Pinned.hash_item(&Name(name))
}

/// Hashes bytes alike on every machine: only `write` is ever called, never a method for whole numbers.
#[derive(Clone, Copy, Debug)]
struct Pinned;

impl RingHash for Pinned {
    fn hash_item<T: Hash>(&self, item: &T) -> u64 {
        DefaultHash.hash_item(item)
    }

    fn hash_vnode<K: Hash>(&self, key: &K, number: usize) -> u64 {
        DefaultHash.hash_item(&Numbered { key, number: number as u64 })
    }
}

/// A shard as a key of the ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place(ShardId);

impl Hash for Place {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0.as_str().as_bytes());
    }
}

struct Numbered<'a, K> {
    key: &'a K,
    number: u64,
}

impl<K: Hash> Hash for Numbered<'_, K> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key.hash(state);
        state.write(&[0]);
        state.write(&self.number.to_le_bytes());
    }
}

struct Name<'a>(&'a str);

impl Hash for Name<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn spec(epoch: u64, shards: &[(&str, u32)]) -> RingSpec {
        let member = |(name, weight): &(&str, u32)| Member {
            shard: name.parse().unwrap(),
            addresses: vec![format!("{name}:7400")],
            weight: *weight,
        };
        RingSpec { epoch, members: shards.iter().map(member).collect() }
    }

    fn equal(count: usize) -> Ring {
        let names: Vec<_> = (1..=count).map(|i| format!("shard-{i}")).collect();
        Ring::new(spec(1, &names.iter().map(|n| (n.as_str(), WEIGHT)).collect::<Vec<_>>()))
    }

    fn edges(count: usize) -> impl Iterator<Item = EdgeId> {
        (0..count).map(|i| format!("shop-{i}").parse().unwrap())
    }

    fn load(ring: &Ring, count: usize) -> HashMap<ShardId, usize> {
        let mut load = HashMap::new();
        for edge in edges(count) {
            *load.entry(ring.owner(&edge).unwrap().shard.clone()).or_default() += 1;
        }
        load
    }

    // Computed by another program from the description at the head of this file.
    #[test]
    fn every_build_gives_the_same_owners() {
        let ring = equal(5);
        let table = [
            ("a", 0x4074_48d2_b89b_1813, "shard-2"),
            ("shop-1", 0xf78a_a142_b281_4207, "shard-3"),
            ("shop-2", 0xea77_c9fc_a071_88f4, "shard-3"),
            ("shop-17", 0x6703_7d56_8762_3270, "shard-1"),
            ("plant.example.org", 0xc835_a862_2fac_d5e4, "shard-5"),
            ("edge-0000", 0x7184_a29d_3448_14bc, "shard-4"),
            ("edge-9999", 0xbf1e_f89f_e9dc_9e18, "shard-2"),
            ("car-0f9a", 0x79f5_1521_92e2_4389, "shard-1"),
        ];
        let now: Vec<_> = table
            .iter()
            .map(|(edge, ..)| {
                let edge: EdgeId = edge.parse().unwrap();
                (edge.to_string(), Ring::position(&edge), ring.owner(&edge).unwrap().shard.to_string())
            })
            .collect();
        let golden: Vec<_> = table.iter().map(|(e, p, s)| (e.to_string(), *p, s.to_string())).collect();
        assert_eq!(now, golden, "another hash is another ring: edges would be sent to and fro during an update");
    }

    #[test]
    fn ten_equal_shards_share_ten_thousand_edges_evenly() {
        let load = load(&equal(10), 10_000);
        let max = *load.values().max().unwrap();
        assert_eq!(load.len(), 10);
        assert!(max <= 1100, "the fullest has {max} of 1000");
    }

    #[test]
    fn a_shard_that_comes_takes_its_share_from_all_and_moves_nobody_else() {
        let (before, after) = (equal(10), equal(11));
        let moved: Vec<_> = edges(10_000)
            .filter_map(|e| {
                let to = &after.owner(&e).unwrap().shard;
                (before.owner(&e).unwrap().shard != *to).then(|| to.clone())
            })
            .collect();
        assert!(moved.iter().all(|to| to.as_str() == "shard-11"));
        assert!(moved.len() <= 1000, "{} moved; 909 are its fair share", moved.len());
        // And the other way round: what it leaves goes to whoever was next on each edge's list.
        for edge in edges(10_000) {
            let mut list = after.preference(&edge);
            let owner = list.next().unwrap();
            let expected = if owner.shard.as_str() == "shard-11" { list.next().unwrap() } else { owner };
            assert_eq!(before.owner(&edge), Some(expected));
        }
    }

    #[test]
    fn weights_count_and_shares_say_so() {
        let ring = Ring::new(spec(7, &[("big", 200), ("small-1", 100), ("small-2", 100)]));
        let shares = ring.shares();
        let load = load(&ring, 20_000);
        for (shard, share) in &shares {
            let wanted = if shard.as_str() == "big" { 0.5 } else { 0.25 };
            assert!((share - wanted).abs() < 0.02, "{shard} has {share}");
            #[allow(clippy::cast_precision_loss, reason = "small numbers")]
            let edges = load[shard] as f64 / 20_000.0;
            assert!((edges - share).abs() < 0.015, "{shard} has {edges} of the edges and {share} of the ring");
        }
        assert!((shares.values().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn strange_rings_are_rings() {
        let edge: EdgeId = "a".parse().unwrap();
        assert_eq!(Ring::default().owner(&edge), None);
        assert!(Ring::default().is_empty() && Ring::default().shares().is_empty());
        let twice = Ring::new(spec(1, &[("a", 0), ("a", 5), ("b", u32::MAX)]));
        assert_eq!((twice.len(), twice.member(&"a".parse().unwrap()).unwrap().weight), (2, 0));
        assert_eq!(twice.preference(&edge).count(), 2);
        let one = equal(1);
        assert_eq!(one.owner(&edge).unwrap().shard.as_str(), "shard-1");
        assert_eq!(Ring::new(one.spec()).spec(), one.spec());
    }

    #[test]
    fn the_order_of_members_and_their_addresses_do_not_matter() {
        let mut turned = equal(7).spec();
        turned.members.reverse();
        turned.members.iter_mut().for_each(|m| m.addresses.clear());
        let (a, b) = (equal(7), Ring::new(turned));
        for edge in edges(1000) {
            assert_eq!(a.owner(&edge).unwrap().shard, b.owner(&edge).unwrap().shard);
        }
    }
}
