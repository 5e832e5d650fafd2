//! How many tokens one source may guess. Pure: the time is an argument.
//!
//! Only guesses count: a token that is known and used up, expired or for another name is not one, and a whole site may
//! stand behind one address. Guessing is hopeless anyway with 160 bits; the limit keeps it from costing anything.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// Guesses that are free.
const BURST: u32 = 20;
/// How often one more is.
const REFILL: Duration = Duration::from_secs(6);
/// Sources that are remembered; beyond that, those that have waited longest are forgotten.
const SOURCES: usize = 10_000;

/// Failures by source.
#[derive(Debug, Default)]
pub struct FailureLimit {
    /// Until when each source's allowance would take to be whole again.
    whole_at: Mutex<HashMap<IpAddr, Instant>>,
}

impl FailureLimit {
    /// How long this source must wait before it may try again; `None` if it may now.
    #[must_use]
    pub fn wait(&self, source: IpAddr, now: Instant) -> Option<Duration> {
        let debt = self.whole_at.lock().get(&network(source))?.saturating_duration_since(now);
        let over = debt.checked_sub(REFILL * (BURST - 1))?;
        (!over.is_zero()).then_some(over)
    }

    /// Counts a guess.
    pub fn failed(&self, source: IpAddr, now: Instant) {
        let mut all = self.whole_at.lock();
        if all.len() >= SOURCES {
            all.retain(|_, whole_at| *whole_at > now);
        }
        if all.len() >= SOURCES {
            let soonest = all.iter().min_by_key(|(_, at)| **at).map(|(source, _)| *source);
            soonest.map(|source| all.remove(&source));
        }
        let whole_at = all.entry(network(source)).or_insert(now);
        *whole_at = (*whole_at).max(now) + REFILL;
    }
}

/// One household has a whole IPv6 /64, so that is one source.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_guesses_waits_and_others_do_not() {
        let limit = FailureLimit::default();
        let (bad, good): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.wait(bad, start), None);
            limit.failed(bad, start);
        }
        assert_eq!(limit.wait(bad, start), Some(REFILL));
        assert_eq!(limit.wait("::ffff:192.0.2.1".parse().unwrap(), start), Some(REFILL));
        assert_eq!(limit.wait(good, start), None);
        assert_eq!(limit.wait(bad, start + REFILL), None);
    }

    #[test]
    fn a_network_of_ipv6_is_one_source_and_memory_is_bounded() {
        let limit = FailureLimit::default();
        let start = Instant::now();
        for host in 0..BURST + 1 {
            limit.failed(format!("2001:db8::{host:x}").parse().unwrap(), start);
        }
        assert!(limit.wait("2001:db8::ffff".parse().unwrap(), start).is_some());
        assert!(limit.wait("2001:db8:0:1::1".parse().unwrap(), start).is_none());
        for net in 0..u32::try_from(SOURCES).unwrap() + 10 {
            limit.failed(IpAddr::V4(std::net::Ipv4Addr::from_bits(net)), start);
        }
        assert!(limit.whole_at.lock().len() <= SOURCES);
    }
}
