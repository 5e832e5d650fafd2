//! How fast bytes arrive: what was delivered between two moments that lie at least a round trip apart.
//!
//! A mark is taken when something is sent: how much had been delivered by then, and when. When a packet is
//! acknowledged, the mark of its time says what was delivered since, and over what time. That time is the longer one of
//! the time over which the packets were sent and the time over which they were acknowledged, so that acknowledgements
//! that come in a heap do not look like a fast link.

use std::collections::VecDeque;

use super::{MILLI, Nanos};

/// Most marks that are kept: those of three round trips.
const MARKS: usize = 192;
/// Marks per round trip.
const PER_ROUND_TRIP: u64 = 64;

/// What was known when something was sent.
#[derive(Clone, Copy, Debug)]
struct Mark {
    sent: Nanos,
    /// Bytes delivered by then.
    delivered: u64,
    /// When the last of them was.
    delivered_at: Nanos,
    /// When the newest packet among them had been sent.
    first_sent: Nanos,
    app_limited: bool,
}

/// What one batch of acknowledgements says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Bytes per second.
    pub(super) rate: f64,
    /// Over how long that was.
    pub(super) interval: Nanos,
    /// Round trip of the newest packet.
    pub(super) rtt: Nanos,
    /// When the newest packet was sent.
    pub(super) sent: Nanos,
    /// Bytes that had been delivered when it was sent.
    pub(super) prior: u64,
    /// Whether there was too little to send, so that the link may be faster.
    pub(super) app_limited: bool,
}

/// Measures delivery.
#[derive(Clone, Debug, Default)]
pub(super) struct Delivery {
    /// Bytes delivered so far.
    delivered: u64,
    delivered_at: Nanos,
    first_sent: Nanos,
    /// Samples are limited by the application until so much is delivered.
    app_until: u64,
    /// The newest packet of the batch that is being acknowledged.
    newest: Option<Nanos>,
    marks: VecDeque<Mark>,
}

impl Delivery {
    pub(super) const fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Notes that something is sent; `idle` if nothing was in flight.
    pub(super) fn sent(&mut self, now: Nanos, idle: bool, min_rtt: Nanos) {
        if idle {
            (self.first_sent, self.delivered_at) = (now, now);
        }
        let spacing = (min_rtt / PER_ROUND_TRIP).min(10 * MILLI);
        if self.marks.back().is_some_and(|last| now < last.sent + spacing.max(1)) {
            return;
        }
        if self.marks.len() >= MARKS {
            self.marks.pop_front();
        }
        self.marks.push_back(Mark {
            sent: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            app_limited: self.delivered < self.app_until,
        });
    }

    /// Notes an acknowledged packet.
    pub(super) fn acked(&mut self, sent: Nanos, bytes: u64) {
        self.delivered += bytes;
        self.newest = Some(self.newest.map_or(sent, |newest| newest.max(sent)));
    }

    /// The end of a batch of acknowledgements.
    pub(super) fn sample(&mut self, now: Nanos) -> Option<Sample> {
        let newest = self.newest.take()?;
        self.delivered_at = now;
        let at = self.marks.partition_point(|mark| mark.sent <= newest);
        let mark = *self.marks.get(at.checked_sub(1)?)?;
        self.marks.drain(..at - 1);
        self.first_sent = self.first_sent.max(newest);
        let sending = newest.saturating_sub(mark.first_sent);
        let interval = sending.max(now.saturating_sub(mark.delivered_at)).max(1);
        Some(Sample {
            rate: (self.delivered - mark.delivered) as f64 * 1e9 / interval as f64,
            interval,
            rtt: now.saturating_sub(newest),
            sent: newest,
            prior: mark.delivered,
            app_limited: mark.app_limited,
        })
    }

    /// Notes that the application had nothing more to send while so much was in flight.
    pub(super) fn app_limited(&mut self, in_flight: u64) {
        self.app_until = self.delivered + in_flight.max(1);
    }

    /// Forgets what only a flow that sends needs, as nothing is in flight.
    pub(super) fn rest(&mut self) {
        self.marks.clear();
        self.marks.shrink_to(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Nanos = 50 * MILLI;

    /// Sends a packet of 1000 bytes each millisecond, acknowledged after a round trip, in heaps of so many milliseconds.
    fn last_rate(heap: u64) -> f64 {
        let (mut delivery, mut rate, mut acked) = (Delivery::default(), 0.0, 0);
        for now in 0..500 {
            delivery.sent(now * MILLI, now == 0, RTT);
            if now >= 50 && now % heap == 0 {
                for sent in acked..=now - 50 {
                    delivery.acked(sent * MILLI, 1000);
                }
                acked = now - 49;
                rate = delivery.sample(now * MILLI).unwrap().rate;
            }
        }
        rate
    }

    #[test]
    fn the_rate_is_that_of_the_packets_whether_acknowledgements_come_one_by_one_or_in_heaps() {
        assert!((last_rate(1) - 1e6).abs() < 2e4, "{}", last_rate(1));
        assert!((last_rate(10) - 1e6).abs() < 2e5, "{}", last_rate(10));
    }

    #[test]
    fn little_is_kept_however_much_is_sent() {
        let mut delivery = Delivery::default();
        (0..100_000).for_each(|now| delivery.sent(now * MILLI, false, RTT));
        assert!(delivery.marks.len() <= MARKS);
        delivery.rest();
        assert!(delivery.marks.capacity() <= 8);
    }

    #[test]
    fn who_has_nothing_to_send_shows_no_rate() {
        let mut delivery = Delivery::default();
        delivery.sent(0, true, RTT);
        delivery.app_limited(1000);
        delivery.sent(MILLI, false, RTT);
        delivery.acked(MILLI, 1000);
        assert!(delivery.sample(RTT).unwrap().app_limited);
    }
}
