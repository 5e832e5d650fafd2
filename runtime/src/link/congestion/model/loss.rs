//! What losses mean. A packet is judged by what the flow did when it was sent: lost while the flow sent less than the
//! link carries and no queue was seen, it was lost by chance. The share of such packets is what the path loses anyway;
//! what is lost beyond it was too much for a queue or for a policer.

use std::collections::VecDeque;

use super::{Nanos, Phase};

/// Most that is believed to be lost by chance, and most as long as it was seen only once.
const MOST_CHANCE: f64 = 0.25;
const MOST_ONCE: f64 = 0.04;
/// Packets that make up one look at chance.
const ENOUGH: f64 = 200.0;
/// Looks that are kept. The lowest is believed: a policer looks like chance as long as too much is sent.
const LOOKS: usize = 4;
/// Stretches of sending that are kept: what is acknowledged was sent at most two or three of them ago.
const SPANS: usize = 6;

/// A stretch of sending in one phase.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    from: Nanos,
    phase: Phase,
    /// Whether nothing that is lost should be lost for want of room.
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
    /// Packets of this look, and those among them that were lost.
    look: (f64, f64),
    /// Shares lost in the last looks, newest first.
    looks: VecDeque<f64>,
}

impl Losses {
    /// From now on packets are sent in this phase; `calm` if less than the link carries.
    pub(super) fn begin(&mut self, now: Nanos, phase: Phase, calm: bool) {
        if calm && self.look.0 >= ENOUGH {
            self.looks.truncate(LOOKS - 1);
            self.looks.push_front(self.look.1 / self.look.0);
            self.look = (0.0, 0.0);
        }
        self.spans.truncate(SPANS - 1);
        self.spans.push_front(Span { from: now, phase, calm, acked: 0, lost: 0 });
    }

    fn span(&mut self, sent: Nanos) -> Option<&mut Span> {
        self.spans.iter_mut().find(|span| span.from <= sent)
    }

    /// Notes a delivered packet; `empty` if its round trip shows no queue.
    pub(super) fn acked(&mut self, sent: Nanos, bytes: u64, empty: bool) {
        let Some(span) = self.span(sent) else { return };
        span.acked += bytes;
        if span.calm && empty {
            self.look.0 += 1.0;
        }
    }

    /// Notes lost packets; `empty` if round trips show no queue.
    pub(super) fn lost(&mut self, sent: Nanos, bytes: u64, empty: bool, mtu: u64) {
        let Some(span) = self.span(sent) else { return };
        span.lost += bytes;
        if span.calm && empty {
            let packets = bytes as f64 / mtu as f64;
            self.look = (self.look.0 + packets, self.look.1 + packets);
        }
    }

    /// The stretch of this phase that was begun last.
    pub(super) fn last(&self, phase: Phase) -> Option<Span> {
        self.spans.iter().find(|span| span.phase == phase).copied()
    }

    /// Forgets what was taken for chance: the queue was not as empty as it looked.
    pub(super) fn forget_chance(&mut self) {
        self.looks.clear();
        self.look = (0.0, 0.0);
    }

    /// The share of packets that the path loses by chance, from 0 to 1.
    pub(super) fn chance(&self) -> f64 {
        match self.looks.iter().copied().reduce(f64::min) {
            Some(lowest) if self.looks.len() > 1 => lowest.min(MOST_CHANCE),
            Some(only) => only.min(MOST_ONCE),
            None => (self.look.1 / (self.look.0 + ENOUGH)).min(MOST_ONCE),
        }
    }

    /// The same without the caution: what chance loses on average.
    pub(super) fn usual(&self) -> f64 {
        if self.looks.len() > 1 { self.looks.iter().sum::<f64>() / self.looks.len() as f64 } else { self.chance() }
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

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u64 = 1200;

    /// A stretch of calm sending in which one packet of so many is lost.
    fn calm(losses: &mut Losses, from: Nanos, packets: u64, one_of: u64) {
        losses.begin(from, Phase::Drain, true);
        for packet in 0..packets {
            if packet % one_of == 0 {
                losses.lost(from + packet, MTU, true, MTU);
            } else {
                losses.acked(from + packet, MTU, true);
            }
        }
    }

    #[test]
    fn what_is_lost_while_little_is_sent_is_chance_and_the_lowest_look_counts() {
        let mut losses = Losses::default();
        calm(&mut losses, 1000, 500, 20);
        assert!(losses.chance() <= MOST_ONCE, "one look is not believed far");
        calm(&mut losses, 2000, 500, 20);
        calm(&mut losses, 3000, 500, 20);
        assert!((losses.chance() - 0.05).abs() < 1e-9);
        calm(&mut losses, 4000, 500, u64::MAX);
        calm(&mut losses, 5000, 500, 20);
        assert!(losses.chance() < 0.01, "a policer that is not met drops nothing");
        losses.forget_chance();
        assert!(losses.chance() < 1e-9);
    }

    #[test]
    fn a_packet_counts_for_the_phase_in_which_it_was_sent() {
        let mut losses = Losses::default();
        losses.begin(0, Phase::Cruise, false);
        losses.begin(100, Phase::ProbeUp, false);
        losses.begin(200, Phase::Drain, false);
        losses.lost(150, 5 * MTU, false, MTU);
        losses.acked(50, MTU, false);
        let up = losses.last(Phase::ProbeUp).unwrap();
        assert_eq!((up.acked, up.lost), (0, 5 * MTU));
        assert_eq!(losses.last(Phase::Cruise).unwrap().acked, MTU);
    }

    #[test]
    fn a_few_lost_packets_are_no_excess() {
        let losses = Losses::default();
        assert!(!losses.excess(6 * MTU, 20 * MTU, 0.01, MTU));
        assert!(losses.excess(50 * MTU, 500 * MTU, 0.02, MTU));
        assert!(!losses.excess(50 * MTU, 500 * MTU, 0.12, MTU));
    }
}
