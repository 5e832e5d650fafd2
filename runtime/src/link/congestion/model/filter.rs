//! What is remembered of the measurements: the fastest, the shortest, and how unevenly acknowledgements come.

use super::{MILLI, Nanos, SECOND};

/// For how long the shortest round trip is believed without being seen again.
const MIN_RTT_LASTS: Nanos = 10 * SECOND;
/// Rounds over which the largest heap of acknowledgements is remembered, in two halves.
const HEAP_ROUNDS: u32 = 5;

/// The largest value of this cycle and the one before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CycleMax {
    this: f64,
    last: f64,
}

impl CycleMax {
    pub(super) const fn get(&self) -> f64 {
        self.this.max(self.last)
    }

    pub(super) const fn offer(&mut self, value: f64) {
        self.this = self.this.max(value);
    }

    /// Begins a cycle. One in which nothing was measured does not count.
    pub(super) fn advance(&mut self) {
        if self.this > 0.0 {
            (self.last, self.this) = (self.this, 0.0);
        }
    }

    /// Forgets everything for a value that is known to be right.
    pub(super) const fn set(&mut self, value: f64) {
        (self.this, self.last) = (value, 0.0);
    }
}

/// The shortest round trip: that of an empty queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MinRtt {
    value: Nanos,
    seen: Nanos,
}

impl MinRtt {
    /// 0 before the first.
    pub(super) const fn get(&self) -> Nanos {
        self.value
    }

    /// Takes a round trip into account. Returns whether the path is much shorter than was believed.
    pub(super) const fn offer(&mut self, now: Nanos, rtt: Nanos) -> bool {
        let shorter = rtt < self.value / 10 * 9;
        if self.value == 0 || rtt <= self.value {
            self.set(now, rtt);
        }
        shorter
    }

    /// Believes this one instead.
    pub(super) const fn set(&mut self, now: Nanos, rtt: Nanos) {
        (self.value, self.seen) = (rtt, now);
    }

    /// Whether it has not been seen for so long that the path may have changed.
    pub(super) const fn is_old(&self, now: Nanos) -> bool {
        now.saturating_sub(self.seen) > MIN_RTT_LASTS
    }

    /// Whether a round trip is so much longer that there must be a queue.
    pub(super) fn shows_queue(&self, rtt: Nanos) -> bool {
        rtt > self.value + (self.value / 8).max(3 * MILLI)
    }
}

/// By how much acknowledgements run ahead of the bandwidth, because they come in heaps. A window without room for that
/// would leave the link idle between two heaps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heaps {
    since: Nanos,
    acked: u64,
    this: u64,
    last: u64,
    rounds: u32,
}

impl Heaps {
    pub(super) fn get(&self) -> u64 {
        self.this.max(self.last)
    }

    pub(super) fn acked(&mut self, now: Nanos, bytes: u64, bandwidth: f64) {
        let expected = bandwidth * now.saturating_sub(self.since) as f64 / 1e9;
        if self.acked as f64 <= expected {
            (self.since, self.acked) = (now, 0);
        }
        self.acked += bytes;
        let ahead = self.acked as f64 - bandwidth * now.saturating_sub(self.since) as f64 / 1e9;
        self.this = self.this.max(ahead.max(0.0) as u64);
    }

    pub(super) const fn round(&mut self) {
        self.rounds += 1;
        if self.rounds >= HEAP_ROUNDS {
            (self.last, self.this, self.rounds) = (self.this, 0, 0);
        }
    }
}
