//! What our flows compete with: CUBIC (RFC 9438) as TCP stacks do it, with a slow start that ends when round trips grow
//! (HyStart), and Reno.

use super::flow::Control;
use super::link::MILLI;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Cubic,
    Reno,
}

#[derive(Debug)]
pub(crate) struct Rival {
    kind: Kind,
    mtu: f64,
    window: f64,
    threshold: f64,
    /// CUBIC: where the window was at the last loss, and since when it grows.
    top: f64,
    epoch: Option<u64>,
    reno: f64,
    recovery: u64,
    min_rtt: u64,
    srtt: u64,
    round_end: u64,
    round_min: u64,
}

impl Rival {
    pub(crate) fn new(kind: Kind, mtu: u64) -> Self {
        let mtu = mtu as f64;
        Self {
            kind,
            mtu,
            window: 10.0 * mtu,
            threshold: f64::INFINITY,
            top: 0.0,
            epoch: None,
            reno: 0.0,
            recovery: 0,
            min_rtt: u64::MAX,
            srtt: 0,
            round_end: 0,
            round_min: u64::MAX,
        }
    }

    fn slow_start(&mut self, now: u64, sent: u64, rtt: u64, bytes: f64) {
        self.window += bytes;
        if sent >= self.round_end {
            (self.round_end, self.round_min) = (now, u64::MAX);
        }
        self.round_min = self.round_min.min(rtt);
        let high = self.min_rtt + (self.min_rtt / 8).clamp(4 * MILLI, 16 * MILLI);
        if self.window > 16.0 * self.mtu && self.round_min > high && self.round_min != u64::MAX {
            self.threshold = self.window;
        }
    }

    fn cubic(&mut self, now: u64, bytes: f64) {
        const C: f64 = 0.4;
        const BETA: f64 = 0.7;
        let epoch = *self.epoch.get_or_insert(now);
        if epoch == now {
            self.reno = self.window;
            self.top = self.top.max(self.window);
        }
        let k = ((self.top - self.window_at_epoch()) / self.mtu / C).max(0.0).cbrt();
        let t = (now - epoch) as f64 / 1e9 + self.srtt as f64 / 1e9;
        let target = (self.top + C * (t - k).powi(3) * self.mtu).clamp(self.window, 1.5 * self.window);
        self.reno += 3.0 * (1.0 - BETA) / (1.0 + BETA) * self.mtu * bytes / self.window;
        self.window += (target - self.window) / self.window * bytes;
        self.window = self.window.max(self.reno);
    }

    fn window_at_epoch(&self) -> f64 {
        0.7 * self.top
    }
}

impl Control for Rival {
    fn on_ack(&mut self, now: u64, sent: u64, bytes: u64, app_limited: bool) {
        let rtt = now - sent;
        self.min_rtt = self.min_rtt.min(rtt);
        self.srtt = if self.srtt == 0 { rtt } else { (7 * self.srtt + rtt) / 8 };
        if sent <= self.recovery || app_limited {
            return;
        }
        if self.window < self.threshold {
            self.slow_start(now, sent, rtt, bytes as f64);
        } else if self.kind == Kind::Cubic {
            self.cubic(now, bytes as f64);
        } else {
            self.window += self.mtu * bytes as f64 / self.window;
        }
    }

    fn on_loss(&mut self, now: u64, sent: u64, _: u64, persistent: bool) {
        if sent <= self.recovery {
            return;
        }
        self.recovery = now;
        self.epoch = None;
        let beta = if self.kind == Kind::Cubic { 0.7 } else { 0.5 };
        // Fast convergence: a flow that did not reach its old top leaves room for others.
        self.top = if self.window < self.top { self.window * (1.0 + beta) / 2.0 } else { self.window };
        self.window = (self.window * beta).max(2.0 * self.mtu);
        self.threshold = self.window;
        if persistent {
            self.window = 2.0 * self.mtu;
        }
    }

    fn window(&self) -> u64 {
        self.window as u64
    }

    fn paced(&self) -> bool {
        false
    }
}
