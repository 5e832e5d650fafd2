//! A sender and its receiver as quinn has them: a window, a pacer that fills the window in four fifths of a round trip in
//! bursts, losses found by three later packets or by time, probes when everything is silent; an acknowledgement for every
//! second packet, at once when one is missing, and after 25 ms at the latest.

use std::collections::BTreeMap;

use runtime::link::congestion::model::{Loss, Model};

use super::{
    link::MILLI,
    rival::{Kind, Rival},
};

/// Bytes of a packet for the controller, and what the wire adds.
pub(crate) const MTU: u64 = 1452;
pub(crate) const WIRE: u64 = 28;
const ACK_DELAY: u64 = 25 * MILLI;
const BURST_TIME: u64 = 2 * MILLI;

/// Decides about the window.
pub(crate) trait Control: std::fmt::Debug {
    fn on_sent(&mut self, _now: u64, _bytes: u64) {}
    fn on_ack(&mut self, now: u64, sent: u64, bytes: u64, app_limited: bool);
    fn on_acks_end(&mut self, _now: u64, _in_flight: u64, _app_limited: bool) {}
    fn on_loss(&mut self, now: u64, sent: u64, bytes: u64, persistent: bool);
    fn window(&self) -> u64;
    fn paced(&self) -> bool {
        true
    }
}

impl Control for Model {
    fn on_sent(&mut self, now: u64, bytes: u64) {
        self.sent(now, bytes);
    }
    fn on_ack(&mut self, now: u64, sent: u64, bytes: u64, _: bool) {
        self.acked(now, sent, bytes);
    }
    fn on_acks_end(&mut self, now: u64, in_flight: u64, app_limited: bool) {
        self.acks_end(now, in_flight, app_limited);
    }
    fn on_loss(&mut self, now: u64, sent: u64, bytes: u64, persistent: bool) {
        self.lost(now, &Loss { sent, bytes, persistent });
    }
    fn window(&self) -> u64 {
        Self::window(self)
    }
}

/// What a flow has to send.
#[derive(Clone, Copy, Debug)]
pub(crate) enum App {
    Bulk,
    /// So many bits per second in portions, one every 20 ms.
    Trickle(f64),
}

#[derive(Debug, Default)]
struct Receiver {
    next: u64,
    pending: Vec<u64>,
    timer: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) control: Box<dyn Control>,
    app: App,
    pub(crate) start: u64,
    pub(crate) stop: u64,
    /// Added to the path's round trip.
    pub(crate) extra: u64,
    next: u64,
    in_flight: BTreeMap<u64, (u64, u64)>,
    bytes_in_flight: u64,
    largest_acked: u64,
    pub(crate) srtt: u64,
    latest: u64,
    var: u64,
    tokens: u64,
    pacer: (u64, u64, u64),
    app_limited: bool,
    owed: f64,
    owed_at: u64,
    probes: u32,
    silent_since: u64,
    pto_count: u32,
    receiver: Receiver,
    pub(crate) delivered: u64,
    pub(crate) sent_packets: u64,
    pub(crate) lost_packets: u64,
    pub(crate) wake: u64,
}

impl Flow {
    pub(crate) fn new(control: Box<dyn Control>) -> Self {
        Self {
            control,
            app: App::Bulk,
            start: 0,
            stop: u64::MAX,
            extra: 0,
            next: 0,
            in_flight: BTreeMap::new(),
            bytes_in_flight: 0,
            largest_acked: 0,
            srtt: 0,
            latest: 333 * MILLI,
            var: 333 * MILLI / 2,
            tokens: 10 * MTU,
            pacer: (0, 0, 10 * MTU),
            app_limited: false,
            owed: 0.0,
            owed_at: 0,
            probes: 0,
            silent_since: 0,
            pto_count: 0,
            receiver: Receiver::default(),
            delivered: 0,
            sent_packets: 0,
            lost_packets: 0,
            wake: u64::MAX,
        }
    }

    pub(crate) fn ours(seed: u64) -> Self {
        Self::new(Box::new(Model::new(MTU as u16, seed)))
    }

    pub(crate) fn rival(kind: Kind) -> Self {
        Self::new(Box::new(Rival::new(kind, MTU)))
    }

    pub(crate) fn between(self, start: u64, stop: u64) -> Self {
        Self { start, stop, owed_at: start, silent_since: start, ..self }
    }

    pub(crate) fn with_app(self, app: App) -> Self {
        Self { app, ..self }
    }

    pub(crate) fn with_extra(self, extra: u64) -> Self {
        Self { extra, ..self }
    }

    fn has_data(&mut self, now: u64) -> bool {
        if now < self.start || now >= self.stop {
            return false;
        }
        match self.app {
            App::Bulk => true,
            App::Trickle(rate) => {
                let portion = 20 * MILLI;
                let steps = (now - self.owed_at) / portion;
                self.owed += (steps * portion) as f64 * rate / 8e9;
                self.owed_at += steps * portion;
                self.owed >= MTU as f64
            }
        }
    }

    fn rtt(&self) -> u64 {
        if self.srtt == 0 { self.latest } else { self.srtt }
    }

    /// When the pacer lets the next packet go; `None` for now.
    fn pace(&mut self, now: u64) -> Option<u64> {
        if !self.control.paced() {
            return None;
        }
        let (window, rtt) = (self.control.window(), self.rtt());
        let (prev, last_window, mut capacity) = self.pacer;
        if window != last_window {
            capacity = (window as u128 * u128::from(BURST_TIME) / u128::from(rtt)) as u64;
            capacity = capacity.clamp(10 * MTU, 256 * MTU);
            self.tokens = self.tokens.min(capacity);
            self.pacer = (prev, window, capacity);
        }
        if self.tokens >= MTU {
            return None;
        }
        let more = window as f64 * 1.25 * (now - prev) as f64 / rtt as f64;
        self.tokens = (self.tokens + more as u64).min(capacity);
        self.pacer.0 = now;
        if self.tokens >= MTU {
            return None;
        }
        Some(now + (rtt as u128 * u128::from(MTU.max(capacity) - self.tokens) / u128::from(window)) as u64 / 5 * 4)
    }

    /// Sends what may be sent; returns the numbers of the packets.
    pub(crate) fn send(&mut self, now: u64) -> Vec<u64> {
        let mut out = Vec::new();
        let (mut blocked, mut burst) = (false, 0);
        self.wake = u64::MAX;
        while self.has_data(now) {
            if self.probes == 0 {
                if self.bytes_in_flight + MTU >= self.control.window() {
                    blocked = true;
                    break;
                }
                if let Some(at) = self.pace(now) {
                    self.wake = at.max(now + 1);
                    blocked = true;
                    break;
                }
            }
            self.probes = self.probes.saturating_sub(1);
            self.tokens = self.tokens.saturating_sub(MTU);
            self.owed -= MTU as f64;
            if self.in_flight.is_empty() {
                self.silent_since = now;
            }
            self.in_flight.insert(self.next, (now, MTU));
            self.bytes_in_flight += MTU;
            self.sent_packets += 1;
            out.push(self.next);
            self.next += 1;
            burst += MTU;
            if burst == 10 * MTU {
                self.control.on_sent(now, burst);
                burst = 0;
            }
        }
        if burst > 0 {
            self.control.on_sent(now, burst);
        }
        self.app_limited = out.is_empty() && !blocked;
        if self.app_limited && matches!(self.app, App::Trickle(_)) {
            self.wake = self.owed_at + 20 * MILLI;
        }
        out
    }

    fn pto(&self) -> u64 {
        (self.rtt() + (4 * self.var).max(MILLI) + ACK_DELAY) << self.pto_count.min(6)
    }

    /// When time alone makes something happen here.
    pub(crate) fn deadline(&self) -> u64 {
        if self.in_flight.is_empty() { u64::MAX } else { self.silent_since + self.pto() }
    }

    /// Nothing was heard for long.
    pub(crate) fn timeout(&mut self, now: u64) {
        if now >= self.deadline() {
            self.pto_count += 1;
            self.probes = 2;
            self.silent_since = now;
        }
        self.find_losses(now, false);
    }

    /// Acknowledged packets, in order of their numbers.
    pub(crate) fn acknowledged(&mut self, now: u64, numbers: &[u64]) {
        let mut newest = None;
        for number in numbers {
            let Some((sent, bytes)) = self.in_flight.remove(number) else { continue };
            self.bytes_in_flight -= bytes;
            self.delivered += bytes + WIRE;
            self.control.on_ack(now, sent, bytes, self.app_limited);
            if *number >= self.largest_acked {
                self.largest_acked = *number;
                newest = Some(sent);
            }
        }
        self.control.on_acks_end(now, self.bytes_in_flight, self.app_limited);
        if let Some(sent) = newest {
            let rtt = now - sent;
            self.latest = rtt;
            if self.srtt == 0 {
                (self.srtt, self.var) = (rtt, rtt / 2);
            } else {
                self.var = (3 * self.var + self.srtt.abs_diff(rtt)) / 4;
                self.srtt = (7 * self.srtt + rtt) / 8;
            }
            (self.silent_since, self.pto_count) = (now, 0);
        }
        self.find_losses(now, true);
    }

    fn find_losses(&mut self, now: u64, by_ack: bool) {
        let patience = (self.rtt().max(self.latest) as f64 * 9.0 / 8.0) as u64;
        let (mut lost, mut last, mut first, mut persistent) = (0, None, None, false);
        let period = 3 * (self.rtt() + 4 * self.var + ACK_DELAY);
        let mut before = None;
        let gone: Vec<u64> = self
            .in_flight
            .range(..self.largest_acked)
            .take_while(|(n, (sent, _))| self.largest_acked >= **n + 3 || now - sent >= patience)
            .map(|(n, _)| *n)
            .collect();
        for number in gone {
            let Some((sent, bytes)) = self.in_flight.remove(&number) else { continue };
            if before.is_some_and(|b: u64| b + 1 != number) {
                first = None;
            }
            before = Some(number);
            persistent |= by_ack && sent - *first.get_or_insert(sent) > period;
            lost += bytes;
            self.lost_packets += 1;
            self.bytes_in_flight -= bytes;
            last = Some(sent);
        }
        if let Some(sent) = last {
            self.control.on_loss(now, sent, lost, persistent);
        }
    }

    /// A packet arrived. Returns when an acknowledgement goes out: now, or later.
    pub(crate) fn arrived(&mut self, now: u64, number: u64) -> Option<u64> {
        let receiver = &mut self.receiver;
        let in_order = number == receiver.next;
        receiver.next = receiver.next.max(number + 1);
        receiver.pending.push(number);
        if receiver.pending.len() >= 2 || !in_order {
            return Some(now);
        }
        if receiver.timer.is_none() {
            receiver.timer = Some(now + ACK_DELAY);
            return receiver.timer;
        }
        None
    }

    /// What the acknowledgement says that goes out now, if it is due.
    pub(crate) fn acknowledge(&mut self, now: u64, lost: bool) -> Option<Vec<u64>> {
        let receiver = &mut self.receiver;
        let due = receiver.pending.len() >= 2 || receiver.timer.is_some_and(|at| at <= now);
        if !due || receiver.pending.is_empty() {
            return None;
        }
        receiver.timer = None;
        if lost {
            return None;
        }
        let mut numbers = std::mem::take(&mut receiver.pending);
        numbers.sort_unstable();
        Some(numbers)
    }
}
