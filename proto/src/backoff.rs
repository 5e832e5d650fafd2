//! How long to wait before the next try.

use std::time::Duration;

/// Exponential backoff with full jitter: the n-th delay is uniform in `[base, min(cap, base * 3^n)]` with n from 1, so that many
/// edges which lost the same shard at the same moment come back spread out
/// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).
///
/// It is reset only after a link has outlived the cap: a link that is accepted and dropped again at once must not make
/// the edge try without pause.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Starts at `base` and never waits longer than `cap`; a `cap` below `base` counts as `base`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap: cap.max(base), failures: 0 }
    }

    /// The next delay; `random` is uniform in `[0, 1)`, and what lies outside is clamped.
    pub fn next_delay(&mut self, random: f64) -> Duration {
        let ceiling = self.base.saturating_mul(3_u32.saturating_pow(self.failures.saturating_add(1))).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        self.base + (ceiling - self.base).mul_f64(random.clamp(0.0, 1.0))
    }

    /// Takes note of how long a link lived. Returns whether that was long enough to begin anew.
    pub fn link_lived(&mut self, lived: Duration) -> bool {
        let long = lived > self.cap;
        if long {
            self.failures = 0;
        }
        long
    }

    /// Delays given out since the last reset.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn delays_grow_to_the_cap() {
        let mut backoff = Backoff::new(SECOND, 30 * SECOND);
        let delays: Vec<_> = (0..5).map(|_| backoff.next_delay(1.0).as_secs()).collect();
        assert_eq!(delays, [3, 9, 27, 30, 30]);
    }

    #[test]
    fn only_a_link_that_outlives_the_cap_resets() {
        let mut backoff = Backoff::new(SECOND, 30 * SECOND);
        backoff.next_delay(0.5);
        assert!(!backoff.link_lived(30 * SECOND));
        assert_eq!(backoff.failures(), 1);
        assert!(backoff.link_lived(31 * SECOND));
        assert_eq!(backoff.failures(), 0);
    }

    proptest! {
        #[test]
        fn a_delay_is_always_between_base_and_cap(tries in 0_u32..200, random in -1.0..2.0) {
            let mut backoff = Backoff::new(SECOND, 30 * SECOND);
            for _ in 0..tries {
                backoff.next_delay(random);
            }
            let delay = backoff.next_delay(random);
            prop_assert!((SECOND..=30 * SECOND).contains(&delay));
        }
    }
}
