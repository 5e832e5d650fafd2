//! The path of the stories: a bottleneck there, and acknowledgements that come back as the path lets them.

use loadtest::bottleneck::{Bottleneck, Conditions};
pub(crate) use loadtest::bottleneck::{Chance, MILLI, SECOND};

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
    /// Mean length of a burst of losses in packets; 1 is chance alone.
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

    /// What the way there is like.
    fn there(&self) -> Conditions {
        let Self { rate, queue, loss, burst, policer, reorder, jitter, .. } = *self;
        Conditions { rate, delay: self.rtt / 2, jitter, queue, loss, burst, reorder, policer, mtu: u64::MAX }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) flow: usize,
    pub(crate) number: u64,
}

/// The path in use.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) path: Path,
    pub(crate) there: Bottleneck<Packet>,
}

impl Link {
    pub(crate) fn new(path: Path, seed: u64) -> Self {
        Self { path, there: Bottleneck::new(path.there(), seed) }
    }

    pub(crate) fn change(&mut self, path: Path) {
        self.path = path;
        self.there.conditions = path.there();
    }
}
