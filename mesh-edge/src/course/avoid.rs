//! The shards that an edge does not want to be sent to, each for a while. Pure.

use std::time::Duration;

use proto::{id::ShardId, message::MAX_AVOIDED};
use tokio::time::Instant;

/// Why a shard is avoided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Nothing comes from it, or none of its addresses could be reached.
    Unreached,
    /// It is certainly gone: its host or its successor said so.
    Died,
    /// It asked to be left alone for a while.
    Asked,
    /// It is about to stop, and asked to be left; the newest ring that was known then has this epoch.
    Stopping(u64),
}

#[derive(Clone, Debug)]
struct Entry {
    shard: ShardId,
    why: Why,
    until: Instant,
}

/// A bounded list: of more than fit, the ones whose time is over first give way.
#[derive(Clone, Debug, Default)]
pub(super) struct Avoid(Vec<Entry>);

impl Avoid {
    /// Avoids a shard for so long; one that is avoided for the same reason already, for the longer of the two times.
    pub(super) fn add(&mut self, shard: &ShardId, why: Why, now: Instant, time: Duration) {
        self.0.retain(|entry| entry.until > now);
        let until = now + time;
        if let Some(entry) = self.0.iter_mut().find(|entry| entry.shard == *shard && entry.why == why) {
            entry.until = entry.until.max(until);
            return;
        }
        if self.0.len() >= MAX_AVOIDED
            && let Some(first) = (0..self.0.len()).min_by_key(|&i| self.0[i].until)
        {
            self.0.remove(first);
        }
        self.0.push(Entry { shard: shard.clone(), why, until });
    }

    /// A newer ring is known. Whoever stops is not in it, and whoever is in it serves: it knows better than those who
    /// asked to be left before.
    pub(super) fn heard_of(&mut self, epoch: u64) {
        self.0.retain(|entry| !matches!(entry.why, Why::Stopping(then) if then < epoch));
    }

    /// A shard serves, so nothing speaks against it.
    pub(super) fn take_off(&mut self, shard: &ShardId) {
        self.0.retain(|entry| entry.shard != *shard);
    }

    /// Nobody could be reached, so it was not them.
    pub(super) fn forgive_unreached(&mut self) {
        self.0.retain(|entry| entry.why != Why::Unreached);
    }

    /// Whether a shard is avoided now.
    pub(super) fn has(&self, shard: &ShardId, now: Instant) -> bool {
        self.0.iter().any(|entry| entry.shard == *shard && entry.until > now)
    }

    /// All that are avoided now.
    pub(super) fn list(&self, now: Instant) -> Vec<ShardId> {
        let mut list: Vec<ShardId> = Vec::new();
        for entry in self.0.iter().filter(|entry| entry.until > now) {
            if !list.contains(&entry.shard) {
                list.push(entry.shard.clone());
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(name: &str) -> ShardId {
        name.parse().unwrap()
    }

    fn names(avoid: &Avoid, now: Instant) -> Vec<String> {
        avoid.list(now).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_is_avoided_for_its_time_and_every_reason_has_its_own() {
        let (mut avoid, now, second) = (Avoid::default(), Instant::now(), Duration::from_secs(1));
        avoid.add(&shard("a"), Why::Died, now, 15 * second);
        avoid.add(&shard("b"), Why::Unreached, now, 60 * second);
        avoid.add(&shard("b"), Why::Died, now, 15 * second);
        assert_eq!(names(&avoid, now), ["a", "b"]);
        assert_eq!(names(&avoid, now + 15 * second), ["b"]);
        assert!(avoid.has(&shard("b"), now + 59 * second) && !avoid.has(&shard("b"), now + 60 * second));
        avoid.forgive_unreached();
        assert_eq!(names(&avoid, now), ["a", "b"], "b died as well");
        assert!(names(&avoid, now + 15 * second).is_empty());
        avoid.take_off(&shard("b"));
        assert_eq!(names(&avoid, now), ["a"]);
    }

    #[test]
    fn a_newer_ring_knows_better_than_a_shard_that_was_about_to_stop() {
        let (mut avoid, now, minute) = (Avoid::default(), Instant::now(), Duration::from_secs(60));
        avoid.add(&shard("a"), Why::Stopping(4), now, minute);
        avoid.add(&shard("b"), Why::Asked, now, minute);
        avoid.add(&shard("c"), Why::Unreached, now, minute);
        avoid.heard_of(4);
        assert_eq!(names(&avoid, now), ["a", "b", "c"], "that ring may be the one with it");
        avoid.heard_of(5);
        assert_eq!(names(&avoid, now), ["b", "c"], "no ring says that a shard has room, or can be reached");
    }

    #[test]
    fn the_list_is_bounded_and_the_one_that_ends_first_gives_way() {
        let (mut avoid, now) = (Avoid::default(), Instant::now());
        for i in 0..40_u64 {
            let time = if i == 3 { 1 } else { 100 + i };
            avoid.add(&shard(&format!("s{i}")), Why::Died, now, Duration::from_secs(time));
        }
        let list = names(&avoid, now);
        assert_eq!(list.len(), MAX_AVOIDED);
        assert_eq!((list[0].as_str(), list[MAX_AVOIDED - 1].as_str()), ("s24", "s39"));
    }
}
