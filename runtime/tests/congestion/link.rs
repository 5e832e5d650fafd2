//! A bottleneck: a policer, a queue that drops what does not fit, a rate, losses by chance or in bursts, and the length
//! of the path. Everything may change in the middle of a run. Times are in nanoseconds, sizes in bytes.

use std::collections::VecDeque;

pub(crate) const MILLI: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MILLI;

/// Chance with a seed (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What a path is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    /// Bits per second.
    pub(crate) rate: f64,
    /// Round trip with an empty queue.
    pub(crate) rtt: u64,
    /// Bytes that the queue holds.
    pub(crate) queue: u64,
    /// Share of packets that is lost by chance.
    pub(crate) loss: f64,
    /// Mean length of a burst of losses in packets; 1 is chance alone (Gilbert-Elliott with everything lost in the bad
    /// state).
    pub(crate) burst: f64,
    /// Bits per second and bytes at once that a policer lets through.
    pub(crate) policer: Option<(f64, f64)>,
    /// Share of packets that come later than those sent after them, and by how much at most.
    pub(crate) reorder: (f64, u64),
    /// Noise of every packet's way that keeps their order, at most.
    pub(crate) jitter: u64,
    /// Acknowledgements come only at multiples of this.
    pub(crate) ack_every: u64,
    /// Share of acknowledgements that is lost.
    pub(crate) ack_loss: f64,
}

impl Path {
    /// A clean path with a queue of so many bandwidth-delay products.
    pub(crate) fn new(mbit: f64, rtt_ms: u64, queue_bdp: f64) -> Self {
        let bdp = mbit * 1e6 / 8.0 * rtt_ms as f64 / 1e3;
        Self {
            rate: mbit * 1e6,
            rtt: rtt_ms * MILLI,
            queue: (bdp * queue_bdp) as u64,
            loss: 0.0,
            burst: 1.0,
            policer: None,
            reorder: (0.0, 0),
            jitter: 0,
            ack_every: 0,
            ack_loss: 0.0,
        }
    }

    pub(crate) fn lossy(self, loss: f64) -> Self {
        Self { loss, ..self }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) flow: usize,
    pub(crate) number: u64,
    /// On the wire.
    pub(crate) size: u64,
}

/// The bottleneck itself.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) path: Path,
    waiting: VecDeque<Packet>,
    pub(crate) queued: u64,
    tokens: f64,
    tokens_at: u64,
    bad: bool,
    weather_at: u64,
    last_arrival: u64,
    pub(crate) chance: Chance,
    pub(crate) dropped: u64,
    pub(crate) policed: u64,
    pub(crate) lost: u64,
    pub(crate) offered: u64,
}

impl Link {
    pub(crate) fn new(path: Path, seed: u64) -> Self {
        let tokens = path.policer.map_or(0.0, |(_, burst)| burst);
        let chance = Chance(seed);
        Self {
            path,
            waiting: VecDeque::new(),
            queued: 0,
            tokens,
            tokens_at: 0,
            bad: false,
            weather_at: 0,
            last_arrival: 0,
            chance,
            dropped: 0,
            policed: 0,
            lost: 0,
            offered: 0,
        }
    }

    /// Takes a packet. Returns when it will have been sent if the link was idle.
    pub(crate) fn offer(&mut self, now: u64, packet: Packet) -> Option<u64> {
        self.offered += 1;
        if let Some((rate, burst)) = self.path.policer {
            let more = (now - self.tokens_at) as f64 * rate / 8e9;
            (self.tokens, self.tokens_at) = ((self.tokens + more).min(burst), now);
            if self.tokens < packet.size as f64 {
                self.policed += 1;
                return None;
            }
            self.tokens -= packet.size as f64;
        }
        // The packet that is being sent is not in the queue.
        let in_service = self.waiting.front().map_or(0, |first| first.size);
        if !self.waiting.is_empty() && self.queued - in_service + packet.size > self.path.queue {
            self.dropped += 1;
            return None;
        }
        self.waiting.push_back(packet);
        self.queued += packet.size;
        (self.waiting.len() == 1).then(|| now + self.time_of(packet.size))
    }

    fn time_of(&self, size: u64) -> u64 {
        (size as f64 * 8e9 / self.path.rate) as u64
    }

    /// The first packet has been sent. Returns it with the time of its arrival, unless it is lost, and when the next one
    /// will have been sent.
    pub(crate) fn depart(&mut self, now: u64) -> (Option<(u64, Packet)>, Option<u64>) {
        let Some(packet) = self.waiting.pop_front() else { return (None, None) };
        self.queued -= packet.size;
        let next = self.waiting.front().map(|p| now + self.time_of(p.size));
        if self.is_lost(now) {
            self.lost += 1;
            return (None, next);
        }
        let jitter = (self.chance.roll() * self.path.jitter as f64) as u64;
        let mut at = (now + self.path.rtt / 2 + jitter).max(self.last_arrival + 1);
        if self.chance.roll() < self.path.reorder.0 {
            at += (self.chance.roll() * self.path.reorder.1 as f64) as u64;
        } else {
            self.last_arrival = at;
        }
        (Some((at, packet)), next)
    }

    fn is_lost(&mut self, now: u64) -> bool {
        let Path { loss, burst, .. } = self.path;
        if burst <= 1.0 {
            return loss > 0.0 && self.chance.roll() < loss;
        }
        // In the bad state everything is lost; it is left so that a burst has the mean length, and entered so that the
        // mean loss is right. The weather goes on while nothing is sent: what counts is the time of so many packets.
        let leave = 1.0 / burst;
        let enter = loss * leave / (1.0 - loss);
        let packets = (now - self.weather_at) as f64 * self.path.rate / 12e12;
        self.weather_at = now;
        let before = if self.bad { 1.0 } else { 0.0 };
        self.bad = self.chance.roll() < loss + (before - loss) * (1.0 - enter - leave).powf(packets);
        self.bad
    }

    /// How long the queue is.
    pub(crate) fn queue_delay(&self) -> u64 {
        (self.queued as f64 * 8e9 / self.path.rate) as u64
    }
}
