//! One direction of a network path: a policer, a queue that drops what does not fit, a rate, losses by chance or in
//! bursts, and the length of the path. Everything may change in the middle of a run.
//!
//! Pure: packets and the time in, packets and times out. The congestion stories simulate with it, and the link emulator
//! (`mesh-loadtest link`) sends real packets through it. Times are in nanoseconds of any clock that never goes back,
//! sizes in bytes.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

mod delays;
#[cfg(test)]
mod tests;

pub use delays::Delays;

/// Nanoseconds of a millisecond.
pub const MILLI: u64 = 1_000_000;
/// Nanoseconds of a second.
pub const SECOND: u64 = 1000 * MILLI;
/// Packets that a path without a rate holds at most while they travel; more are dropped as by a full queue.
const MOST_FLYING: usize = 200_000;

/// Chance with a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Chance(pub u64);

impl Chance {
    /// A number from 0 to 1, without 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits are what an f64 holds")]
    pub fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What a direction is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// Bits per second; infinite for no bound.
    pub rate: f64,
    /// From the end of the queue to the other side.
    pub delay: u64,
    /// Noise of every packet's way that keeps their order, at most.
    pub jitter: u64,
    /// Bytes that the queue holds.
    pub queue: u64,
    /// Share of packets that is lost, from 0 to 1.
    pub loss: f64,
    /// Mean length of a burst of losses in packets; 1 is chance alone (Gilbert-Elliott with everything lost in the bad
    /// state).
    pub burst: f64,
    /// Share of packets that come later than those sent after them, and by how much at most.
    pub reorder: (f64, u64),
    /// Bits per second and bytes at once that a policer lets through.
    pub policer: Option<(f64, f64)>,
    /// The largest packet; larger ones vanish without a word.
    pub mtu: u64,
}

impl Default for Conditions {
    /// A wire: nothing is lost, nothing waits.
    fn default() -> Self {
        Self {
            rate: f64::INFINITY,
            delay: 0,
            jitter: 0,
            queue: 1_000_000,
            loss: 0.0,
            burst: 1.0,
            reorder: (0.0, 0),
            policer: None,
            mtu: u64::MAX,
        }
    }
}

/// What became of the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// That came to it.
    pub offered: u64,
    /// That found no room in the queue.
    pub dropped: u64,
    /// That a policer took.
    pub policed: u64,
    /// Larger than the path takes.
    pub too_big: u64,
    /// Lost on the way.
    pub lost: u64,
    /// That went out on the other side, or will.
    pub sent: u64,
    /// Bytes of these.
    pub sent_bytes: u64,
}

/// The bottleneck of a direction, as a discrete simulation asks it: when the first packet of the queue will have been
/// sent, and, then, when it arrives.
#[derive(Debug)]
pub struct Bottleneck<T> {
    /// What it is like; may be changed at any time.
    pub conditions: Conditions,
    /// What became of the packets so far.
    pub counts: Counts,
    /// What decides.
    pub chance: Chance,
    waiting: VecDeque<(u64, T)>,
    queued: u64,
    tokens: f64,
    tokens_at: u64,
    bad: bool,
    weather_at: u64,
    last_arrival: u64,
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times and sizes"
)]
impl<T> Bottleneck<T> {
    /// An empty one.
    #[must_use]
    pub fn new(conditions: Conditions, seed: u64) -> Self {
        Self {
            conditions,
            counts: Counts::default(),
            chance: Chance(seed),
            waiting: VecDeque::new(),
            queued: 0,
            tokens: conditions.policer.map_or(0.0, |(_, burst)| burst),
            tokens_at: 0,
            bad: false,
            weather_at: 0,
            last_arrival: 0,
        }
    }

    /// Takes a packet. Returns when it will have been sent if nothing waited before it.
    pub fn offer(&mut self, now: u64, size: u64, packet: T) -> Option<u64> {
        self.counts.offered += 1;
        if size > self.conditions.mtu {
            self.counts.too_big += 1;
            return None;
        }
        if !self.is_let_through(now, size) {
            self.counts.policed += 1;
            return None;
        }
        // The packet that is being sent is not in the queue.
        let in_service = self.waiting.front().map_or(0, |(size, _)| *size);
        if !self.waiting.is_empty() && self.queued - in_service + size > self.conditions.queue {
            self.counts.dropped += 1;
            return None;
        }
        self.waiting.push_back((size, packet));
        self.queued += size;
        (self.waiting.len() == 1).then(|| now + self.time_of(size))
    }

    fn is_let_through(&mut self, now: u64, size: u64) -> bool {
        let Some((rate, burst)) = self.conditions.policer else { return true };
        let more = (now - self.tokens_at) as f64 * rate / 8e9;
        (self.tokens, self.tokens_at) = ((self.tokens + more).min(burst), now);
        let enough = self.tokens >= size as f64;
        if enough {
            self.tokens -= size as f64;
        }
        enough
    }

    fn time_of(&self, size: u64) -> u64 {
        (size as f64 * 8e9 / self.conditions.rate) as u64
    }

    /// The first packet has been sent. Returns it with the time of its arrival, unless it is lost, and when the next one
    /// will have been sent.
    pub fn depart(&mut self, now: u64) -> (Option<(u64, T)>, Option<u64>) {
        let Some((size, packet)) = self.waiting.pop_front() else { return (None, None) };
        self.queued -= size;
        let next = self.waiting.front().map(|(size, _)| now + self.time_of(*size));
        if self.is_lost(now) {
            self.counts.lost += 1;
            return (None, next);
        }
        let Conditions { delay, jitter, reorder, .. } = self.conditions;
        let jitter = (self.chance.roll() * jitter as f64) as u64;
        let mut at = (now + delay + jitter).max(self.last_arrival + 1);
        if self.chance.roll() < reorder.0 {
            at += (self.chance.roll() * reorder.1 as f64) as u64;
        } else {
            self.last_arrival = at;
        }
        self.counts.sent += 1;
        self.counts.sent_bytes += size;
        (Some((at, packet)), next)
    }

    fn is_lost(&mut self, now: u64) -> bool {
        let Conditions { loss, burst, rate, .. } = self.conditions;
        if burst <= 1.0 || loss >= 1.0 {
            return loss > 0.0 && self.chance.roll() < loss;
        }
        // In the bad state everything is lost; it is left so that a burst has the mean length, and entered so that the
        // mean loss is right. The weather goes on while nothing is sent: what counts is the time of so many packets.
        let leave = 1.0 / burst;
        let enter = loss * leave / (1.0 - loss);
        let packets = if rate.is_finite() { (now - self.weather_at) as f64 * rate / 12e12 } else { 1.0 };
        self.weather_at = now;
        let before = if self.bad { 1.0 } else { 0.0 };
        self.bad = self.chance.roll() < loss + (before - loss) * (1.0 - enter - leave).powf(packets);
        self.bad
    }

    /// How long a packet waits that comes now.
    #[must_use]
    pub fn queue_delay(&self) -> u64 {
        (self.queued as f64 * 8e9 / self.conditions.rate) as u64
    }
}

/// A whole direction: the bottleneck, and the packets that travel behind it. For whoever has no events of his own: packets
/// are put in as they come, and taken out as they are due.
#[derive(Debug)]
pub struct Lane<T> {
    bottleneck: Bottleneck<T>,
    departs: Option<u64>,
    flying: BinaryHeap<Reverse<Flight<T>>>,
    number: u64,
    delays: Delays,
}

#[derive(Debug)]
struct Flight<T> {
    due: u64,
    number: u64,
    packet: T,
}

impl<T> PartialEq for Flight<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.due, self.number) == (other.due, other.number)
    }
}

impl<T> Eq for Flight<T> {}

impl<T> PartialOrd for Flight<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Flight<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl<T> Lane<T> {
    /// An empty one.
    #[must_use]
    pub fn new(conditions: Conditions, seed: u64) -> Self {
        let bottleneck = Bottleneck::new(conditions, seed);
        Self { bottleneck, departs: None, flying: BinaryHeap::new(), number: 0, delays: Delays::default() }
    }

    /// What it is like.
    #[must_use]
    pub const fn conditions(&self) -> Conditions {
        self.bottleneck.conditions
    }

    /// Changes it from now on. What travels arrives as it would have, and the packet that is being sent leaves as it
    /// would have.
    pub fn change(&mut self, conditions: Conditions) {
        self.bottleneck.conditions = conditions;
    }

    /// What became of the packets, and how long the queue was when each came.
    #[must_use]
    pub const fn seen(&self) -> (&Counts, &Delays) {
        (&self.bottleneck.counts, &self.delays)
    }

    /// Counts from nothing again.
    pub fn forget(&mut self) {
        (self.bottleneck.counts, self.delays) = (Counts::default(), Delays::default());
    }

    /// Takes a packet.
    pub fn put(&mut self, now: u64, size: u64, packet: T) {
        self.advance(now);
        if self.flying.len() >= MOST_FLYING {
            self.bottleneck.counts.offered += 1;
            self.bottleneck.counts.dropped += 1;
            return;
        }
        self.delays.add(self.bottleneck.queue_delay());
        if let Some(at) = self.bottleneck.offer(now, size, packet) {
            self.departs = Some(at);
        }
    }

    /// A packet that has arrived by now; to be asked until there is none.
    pub fn take(&mut self, now: u64) -> Option<T> {
        self.advance(now);
        if self.flying.peek()?.0.due > now {
            return None;
        }
        self.flying.pop().map(|Reverse(flight)| flight.packet)
    }

    /// When to ask again if nothing is put in before.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        let arrives = self.flying.peek().map(|Reverse(flight)| flight.due);
        arrives.into_iter().chain(self.departs).min()
    }

    /// Lets everything leave the queue that should have. Each leaves at its time, however late it is asked, so that the
    /// rate is right.
    fn advance(&mut self, now: u64) {
        while let Some(at) = self.departs.filter(|at| *at <= now) {
            let (arrival, next) = self.bottleneck.depart(at);
            self.departs = next;
            if let Some((due, packet)) = arrival {
                self.number += 1;
                self.flying.push(Reverse(Flight { due, number: self.number, packet }));
            }
        }
    }
}
