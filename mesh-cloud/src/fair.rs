//! What one identity may ask of a shard, so that its storm is nobody else's.

use std::{collections::HashMap, hash::Hash, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::id::{EdgeId, UserId};
use tokio::time::Instant;

/// Arrivals of an edge that are taken in a row.
const BURST: u32 = 8;
/// After that, one in this time.
const REFILL: Duration = Duration::from_secs(2);
/// How many are remembered; when there are more, those that have been quiet long enough are forgotten, and then all.
const REMEMBERED: usize = 100_000;

/// How often edges come, or others who are told apart by a key. A token bucket for each, which is kept only while it is
/// not full.
#[derive(Debug)]
pub struct Arrivals<K = EdgeId> {
    buckets: Mutex<HashMap<K, (f64, Instant)>>,
    burst: f64,
    refill: Duration,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self::new(BURST, REFILL)
    }
}

impl<K: Clone + Eq + Hash> Arrivals<K> {
    /// So many in a row of each, and after that one in this time.
    #[must_use]
    pub fn new(burst: u32, refill: Duration) -> Self {
        Self { buckets: Mutex::default(), burst: f64::from(burst), refill }
    }

    /// Takes note of one that comes.
    ///
    /// # Errors
    /// If it comes too often: how long it must wait.
    pub fn come(&self, who: &K, now: Instant) -> Result<(), Duration> {
        let mut all = self.buckets.lock();
        if all.len() >= REMEMBERED {
            all.retain(|_, (tokens, at)| self.refilled(*tokens, *at, now) < self.burst);
        }
        if all.len() >= REMEMBERED {
            all.clear();
        }
        let (tokens, at) = all.get(who).copied().unwrap_or((self.burst, now));
        let tokens = self.refilled(tokens, at, now);
        if tokens < 1.0 {
            return Err(self.refill.mul_f64(1.0 - tokens));
        }
        all.insert(who.clone(), (tokens - 1.0, now));
        Ok(())
    }

    fn refilled(&self, tokens: f64, at: Instant, now: Instant) -> f64 {
        (tokens + now.duration_since(at).as_secs_f64() / self.refill.as_secs_f64()).min(self.burst)
    }
}

/// Counts what each identity has open, up to a bound for each.
#[derive(Clone, Debug)]
pub struct Shares<K: Eq + Hash>(Arc<Mutex<HashMap<K, usize>>>, usize);

/// One thing that an identity has open, until dropped.
#[derive(Debug)]
pub struct Share<K: Eq + Hash> {
    of: Shares<K>,
    who: K,
}

/// Links and streams of users.
pub type UserShares = Shares<UserId>;

impl<K: Clone + Eq + Hash> Shares<K> {
    /// At most so many for each.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self(Arc::default(), bound)
    }

    /// One more; `None` if this one has as many as it may.
    #[must_use]
    pub fn take(&self, who: &K) -> Option<Share<K>> {
        let mut all = self.0.lock();
        let count = all.entry(who.clone()).or_default();
        if *count >= self.1 {
            return None;
        }
        *count += 1;
        Some(Share { of: self.clone(), who: who.clone() })
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut all = self.of.0.lock();
        if let Some(count) = all.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_edge_that_comes_too_often_waits_and_nobody_else_does() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        for _ in 0..BURST {
            assert_eq!(arrivals.come(&a, now), Ok(()));
        }
        assert_eq!(arrivals.come(&a, now), Err(REFILL));
        assert_eq!(arrivals.come(&b, now), Ok(()));
        assert_eq!(arrivals.come(&a, now + REFILL / 2), Err(REFILL / 2));
        assert_eq!(arrivals.come(&a, now + REFILL), Ok(()));
    }

    #[test]
    fn what_is_closed_makes_room_and_leaves_nothing() {
        let shares: Shares<u8> = Shares::new(2);
        let (first, second) = (shares.take(&1), shares.take(&1));
        assert!(first.is_some() && second.is_some() && shares.take(&1).is_none() && shares.take(&2).is_some());
        drop(first);
        assert!(shares.take(&1).is_some());
        drop(second);
        assert!(shares.0.lock().is_empty());
    }
}
