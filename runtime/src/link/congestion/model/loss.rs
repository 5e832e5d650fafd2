//! What losses mean. A packet is judged by what the flow did when it was sent: lost while the flow sent less than the
//! link carries, it was lost by chance, and the share of such packets is what the path loses anyway. What is lost
//! beyond that share was too much for a queue or for a policer.

use std::collections::VecDeque;

use super::{Nanos, Phase};

/// Most that is believed to be lost by chance.
const MOST_CHANCE: f64 = 0.25;
/// Packets after which what was counted of chance weighs half.
const MEMORY: f64 = 4000.0;
/// Packets without loss that are assumed before anything was counted.
const PRIOR: f64 = 50.0;
/// Stretches of sending that are kept: what is acknowledged was sent at most two or three of them ago.
const SPANS: usize = 8;

/// A stretch of sending in one phase.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    from: Nanos,
    pub(super) phase: Phase,
    /// Whether the queue should be empty: nothing that is lost is lost for want of room.
    calm: bool,
    /// Bytes.
    pub(super) acked: u64,
    /// Bytes.
    pub(super) lost: u64,
}

/// Counts losses by when the packets were sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Losses {
    spans: VecDeque<Span>,
    /// Packets sent while it was calm, and those among them that were lost; both fade.
    calm: (f64, f64),
}

impl Losses {
    /// From now on packets are sent in this phase.
    pub(super) fn begin(&mut self, now: Nanos, phase: Phase, calm: bool) {
        if self.spans.len() >= SPANS {
            self.spans.pop_front();
        }
        self.spans.push_back(Span { from: now, phase, calm, acked: 0, lost: 0 });
    }

    fn span(&mut self, sent: Nanos) -> Option<&mut Span> {
        self.spans.iter_mut().rev().find(|span| span.from <= sent)
    }

    /// Notes a delivered packet; `empty` if its round trip shows no queue.
    pub(super) fn acked(&mut self, sent: Nanos, bytes: u64, empty: bool) {
        let Some(span) = self.span(sent) else { return };
        span.acked += bytes;
        if span.calm && empty {
            self.count(1.0, 0.0);
        }
    }

    /// Notes lost packets; `empty` if round trips show no queue.
    pub(super) fn lost(&mut self, sent: Nanos, bytes: u64, empty: bool, mtu: u64) {
        let Some(span) = self.span(sent) else { return };
        span.lost += bytes;
        if span.calm && empty {
            let packets = bytes as f64 / mtu as f64;
            self.count(packets, packets);
        }
    }

    fn count(&mut self, all: f64, lost: f64) {
        let fade = (1.0 - all / MEMORY).max(0.5);
        self.calm = (self.calm.0 * fade + all, self.calm.1 * fade + lost);
    }

    /// The stretch of this phase that was begun last.
    pub(super) fn last(&self, phase: Phase) -> Option<Span> {
        self.spans.iter().rev().find(|span| span.phase == phase).copied()
    }

    /// The share of packets that the path loses by chance, from 0 to 1.
    pub(super) fn chance(&self) -> f64 {
        (self.calm.1 / (self.calm.0 + PRIOR)).min(MOST_CHANCE)
    }

    /// Whether so many bytes lost of so many are more than chance explains, by at least this share.
    pub(super) fn excess(&self, lost: u64, all: u64, by: f64, mtu: u64) -> bool {
        if lost <= 6 * mtu || all == 0 {
            return false;
        }
        let (chance, packets) = (self.chance(), all as f64 / mtu as f64);
        let spread = 3.0 * (chance.max(0.002) / packets).sqrt();
        lost as f64 / all as f64 > chance + by.max(spread)
    }
}
