//! Whether an edge is served here. Pure: what the edge said, the ring and how this shard stands in; a verdict out.

use std::time::Duration;

use proto::{
    api::ShardOrder,
    code::CloseCode,
    id::{EdgeId, ShardId},
    message::{Candidate, Hello, Refuse},
    ring::{Member, Ring},
};

/// CPU that one edge costs a shard in each period of its keep-alive, measured on the reference machine.
const PING_COST: Duration = Duration::from_micros(46);
/// Share of a core that keep-alives may take before edges are asked to ping more seldom.
const PING_SHARE: f64 = 0.15;
/// The longest period, unless more is asked for: it still finds a silent death within QUIC's idle time.
const PING: Duration = Duration::from_secs(8);
/// Between what the shortest period may be set to.
const LEAST_PING: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// Most candidates that an edge is told.
const CANDIDATES: usize = 8;

/// What becomes of an edge that has said Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is served.
    Serve,
    /// Another shard owns it.
    Redirect(Candidate),
    /// Nobody can serve it now.
    Refuse(Refuse),
}

/// How a shard stands when an edge comes.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// Who it is.
    pub me: &'a ShardId,
    /// Who owns whom.
    pub ring: &'a Ring,
    /// What an administrator wants of it.
    pub order: ShardOrder,
    /// Whether it is about to stop.
    pub draining: bool,
    /// Whether it holds as many tunnels as it may.
    pub full: bool,
}

impl Standing<'_> {
    /// Whether this edge is served here.
    ///
    /// An edge stays with a shard that does not own it if it cannot reach its owner, if nobody is known to own it, or if
    /// it has heard of a newer ring than this shard: whoever sent it here knew better.
    #[must_use]
    pub fn admit(&self, hello: &Hello) -> Verdict {
        let elsewhere = || {
            let mut others = self.ring.preference(&hello.name).filter(|m| m.shard != *self.me);
            others.find(|m| !hello.avoid.contains(&m.shard)).map(Member::candidate)
        };
        let owner = self.ring.owner(&hello.name);
        if self.draining || self.order != ShardOrder::Serve {
            return match (elsewhere(), self.draining) {
                (Some(to), _) => Verdict::Redirect(to),
                (None, false) => Verdict::Serve,
                (None, true) => {
                    let reason = "this shard is stopping, and it knows of no other one that this edge can reach";
                    Verdict::Refuse(Refuse::because(CloseCode::Drained, reason))
                }
            };
        }
        if self.full {
            return match elsewhere() {
                Some(to) if owner.is_some_and(|o| o.shard != *self.me) => Verdict::Redirect(to),
                Some(_) | None => {
                    let reason = "this shard holds as many links as it may (limits.links); another one serves";
                    Verdict::Refuse(Refuse::because(CloseCode::Overloaded, reason))
                }
            };
        }
        match owner {
            Some(owner) if owner.shard != *self.me => {
                if hello.avoid.contains(&owner.shard) || hello.epoch > self.ring.epoch() {
                    Verdict::Serve
                } else {
                    Verdict::Redirect(owner.candidate())
                }
            }
            Some(_) | None => Verdict::Serve,
        }
    }
}

/// Where an edge goes if this shard is lost or stops, best first.
#[must_use]
pub fn candidates(ring: &Ring, me: &ShardId, edge: &EdgeId) -> Vec<Candidate> {
    let others = ring.preference(edge).filter(|m| m.shard != *me);
    others.take(CANDIDATES).map(Member::candidate).collect()
}

/// How often each of so many edges is to ping: so often that keep-alives take no more than their share of a core, and
/// not more often than each `least` (held between 250 ms and 10 s).
#[must_use]
pub fn ping_period(edges: usize, least: Duration) -> Duration {
    let edges = u32::try_from(edges).unwrap_or(u32::MAX);
    let least = least.clamp(LEAST_PING.0, LEAST_PING.1);
    PING_COST.saturating_mul(edges).div_f64(PING_SHARE).clamp(least, PING.max(least))
}

#[cfg(test)]
mod tests {
    use proto::ring::RingSpec;

    use super::*;

    fn ring(shards: &[&str]) -> Ring {
        let member = |name: &&str| Member {
            shard: name.parse().unwrap(),
            addresses: vec![format!("{name}:7400")],
            weight: proto::ring::WEIGHT,
        };
        Ring::new(RingSpec { epoch: 5, members: shards.iter().map(member).collect() })
    }

    fn hello(epoch: u64, avoid: &[&str]) -> Hello {
        let avoid = avoid.iter().map(|s| s.parse().unwrap()).collect();
        Hello { name: "shop-1".parse().unwrap(), instance: 1, version: String::new(), unix_ms: 0, epoch, avoid }
    }

    /// What shard `me` says to an edge that belongs to shard-3 (of five), as one word.
    fn verdict(me: &str, hello: &Hello, change: impl FnOnce(&mut Standing<'_>)) -> String {
        let (me, ring) = (me.parse().unwrap(), ring(&["shard-1", "shard-2", "shard-3", "shard-4", "shard-5"]));
        assert_eq!(ring.owner(&hello.name).unwrap().shard.as_str(), "shard-3");
        let mut standing = Standing { me: &me, ring: &ring, order: ShardOrder::Serve, draining: false, full: false };
        change(&mut standing);
        match standing.admit(hello) {
            Verdict::Serve => "serve".into(),
            Verdict::Redirect(to) => to.shard.to_string(),
            Verdict::Refuse(refuse) => refuse.code.to_string(),
        }
    }

    #[test]
    fn an_edge_is_sent_to_its_owner_unless_it_has_a_reason_to_stay() {
        let next =
            ring(&["shard-1", "shard-2", "shard-4", "shard-5"]).owner(&hello(0, &[]).name).unwrap().shard.clone();
        assert_eq!(verdict("shard-3", &hello(5, &[]), |_| ()), "serve");
        assert_eq!(verdict("shard-1", &hello(5, &[]), |_| ()), "shard-3");
        assert_eq!(verdict("shard-1", &hello(4, &["shard-2"]), |_| ()), "shard-3");
        assert_eq!(verdict("shard-1", &hello(5, &["shard-3"]), |_| ()), "serve", "it cannot reach its owner");
        assert_eq!(verdict("shard-1", &hello(6, &[]), |_| ()), "serve", "it knows a newer ring");
        assert_eq!(verdict("shard-3", &hello(5, &[]), |s| s.full = true), "overloaded");
        assert_eq!(verdict("shard-1", &hello(5, &[]), |s| s.full = true), "shard-3");
        assert_eq!(verdict("shard-3", &hello(5, &[]), |s| s.draining = true), next.as_str());
        assert_eq!(verdict("shard-3", &hello(5, &[]), |s| s.order = ShardOrder::Drain), next.as_str());
        let all = ["shard-1", "shard-2", "shard-4", "shard-5"];
        assert_eq!(verdict("shard-3", &hello(5, &all), |s| s.draining = true), "drained");
        assert_eq!(verdict("shard-3", &hello(5, &all), |s| s.order = ShardOrder::Cordon), "serve");
    }

    #[test]
    fn without_a_ring_everybody_is_served() {
        let (me, none) = ("a".parse().unwrap(), Ring::default());
        let standing = Standing { me: &me, ring: &none, order: ShardOrder::Serve, draining: false, full: false };
        assert_eq!(standing.admit(&hello(0, &[])), Verdict::Serve);
        assert!(candidates(&none, &me, &hello(0, &[]).name).is_empty());
    }

    #[test]
    fn candidates_are_where_the_ring_sends_the_edge_without_this_shard() {
        let (me, all) = ("shard-3".parse().unwrap(), ring(&["shard-1", "shard-2", "shard-3", "shard-4", "shard-5"]));
        let edge = hello(0, &[]).name;
        let without = ring(&["shard-1", "shard-2", "shard-4", "shard-5"]);
        let expected: Vec<_> = without.preference(&edge).map(Member::candidate).collect();
        assert_eq!(candidates(&all, &me, &edge), expected);
    }

    #[test]
    fn keep_alives_never_take_more_than_their_share() {
        let period = |edges, least| ping_period(edges, Duration::from_millis(least)).as_millis();
        assert_eq!(period(0, 1500), 1500);
        assert_eq!(period(4_800, 1500), 1500);
        assert_eq!(period(20_000, 1500), 6133);
        assert_eq!(period(1_000_000, 1500), 8000);
        assert_eq!((period(0, 0), period(0, 9000), period(1_000_000, 60_000)), (250, 9000, 10_000));
    }
}
