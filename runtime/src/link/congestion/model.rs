//! The model of a path: how fast it delivers and how long it is when its queue is empty. From both follows how much may
//! be in flight. Pure: time, packets and losses are told, and a window is read.
//!
//! Shape: [`Model`] takes the events and holds the window; `phase` is what the flow does (looks for the bandwidth,
//! empties the queue, cruises, tries for more); `delivery` measures, `filter` remembers, `loss` judges losses.
//!
//! Units: nanoseconds since the beginning ([`Nanos`]), bytes, bytes per second.

mod delivery;
mod dice;
mod filter;
mod loss;
mod phase;

use delivery::{Delivery, Sample};
use dice::Dice;
use filter::{CycleMax, Heaps, MinRtt};
use loss::Losses;
use phase::Course;
pub use phase::Phase;

/// Time since the beginning of the model, in nanoseconds.
pub type Nanos = u64;
const MILLI: Nanos = 1_000_000;
const SECOND: Nanos = 1000 * MILLI;

/// Packets that may be in flight before anything is known (RFC 9002, 7.2).
const FIRST_WINDOW: u64 = 10;
/// The same in bytes, for large packets.
const FIRST_WINDOW_BYTES: u64 = 14_720;
/// Least packets in flight, so that acknowledgements go on to come.
const LEAST_WINDOW: u64 = 4;
/// Most bytes in flight: above 4 GB quinn would not pace.
const MOST_WINDOW: f64 = 2e9;

/// Something was lost, or marked by the network.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// When the newest of the packets was sent.
    pub sent: Nanos,
    /// How many bytes; 0 if the network marked packets instead of dropping them (ECN).
    pub bytes: u64,
    /// Whether everything was lost for longer than can be chance.
    pub persistent: bool,
}

/// What the model believes, for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// What the flow does.
    pub phase: Phase,
    /// Bytes per second that the path delivers.
    pub bandwidth: f64,
    /// Round trip with an empty queue.
    pub min_rtt: Nanos,
    /// Share of packets that is lost by chance, from 0 to 1.
    pub chance_loss: f64,
    /// Bytes that may be in flight.
    pub window: u64,
}

/// What happened in the present round trip.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// It ends when a packet is acknowledged that was sent after so much had been delivered.
    until: u64,
    acked: u64,
    lost: u64,
    /// Shortest round trip; 0 before the first.
    min_rtt: Nanos,
    samples: u32,
    /// Largest rate in bytes per second.
    best: f64,
    app_limited: bool,
    marked: bool,
}

/// The controller.
#[derive(Clone, Debug)]
pub struct Model {
    mtu: u64,
    window: u64,
    in_flight: u64,
    srtt: Nanos,
    delivery: Delivery,
    bandwidth: CycleMax,
    min_rtt: MinRtt,
    heaps: Heaps,
    losses: Losses,
    round: Round,
    course: Course,
    dice: Dice,
    /// Bytes acknowledged in the present batch.
    batch: u64,
}

impl Model {
    /// A flow of which nothing is known; the seed is for the lengths of its cycles.
    #[must_use]
    pub fn new(mtu: u16, seed: u64) -> Self {
        let mut model = Self {
            mtu: u64::from(mtu),
            window: 0,
            in_flight: 0,
            srtt: 0,
            delivery: Delivery::default(),
            bandwidth: CycleMax::default(),
            min_rtt: MinRtt::default(),
            heaps: Heaps::default(),
            losses: Losses::default(),
            round: Round::default(),
            course: Course::default(),
            dice: Dice::new(seed),
            batch: 0,
        };
        model.window = model.first_window();
        model.losses.begin(0, Phase::Startup, false);
        model
    }

    /// Notes that bytes are sent.
    pub fn sent(&mut self, now: Nanos, bytes: u64) {
        self.delivery.sent(now, self.in_flight == 0, self.min_rtt.get());
        self.in_flight += bytes;
    }

    /// Notes that a packet is acknowledged; a batch of them is ended by [`Model::acks_end`].
    pub fn acked(&mut self, now: Nanos, sent: Nanos, bytes: u64) {
        self.delivery.acked(sent, bytes);
        self.batch += bytes;
        self.round.acked += bytes;
        let empty = !self.min_rtt.shows_queue(now.saturating_sub(sent));
        self.losses.acked(sent, bytes, empty);
    }

    /// The end of a batch of acknowledgements. `app_limited` if there was nothing more to send before it came.
    pub fn acks_end(&mut self, now: Nanos, in_flight: u64, app_limited: bool) {
        self.in_flight = in_flight;
        if app_limited {
            self.delivery.app_limited(in_flight);
        }
        let acked = std::mem::take(&mut self.batch);
        let Some(sample) = self.delivery.sample(now) else { return };
        self.learn(now, acked, &sample);
        if sample.prior >= self.round.until {
            self.end_round(now, &sample);
            self.round = Round { until: self.delivery.delivered(), ..Round::default() };
        }
        self.step(now, &sample);
        self.resize(acked);
        if in_flight == 0 {
            self.delivery.rest();
        }
    }

    /// Notes lost or marked packets.
    pub fn lost(&mut self, now: Nanos, loss: &Loss) {
        self.in_flight = self.in_flight.saturating_sub(loss.bytes);
        if loss.persistent {
            self.start_again(now);
            return;
        }
        self.round.lost += loss.bytes;
        self.round.marked |= loss.bytes == 0;
        let empty = !self.min_rtt.shows_queue(self.srtt);
        self.losses.lost(loss.sent, loss.bytes, empty, self.mtu);
        // What was lost makes room in flight, which is not to be filled while there is too much.
        let target = self.target_now();
        if self.bandwidth.get() > 0.0 && target < self.window {
            self.window = self.window.saturating_sub(loss.bytes).max(target);
        }
    }

    /// The path takes packets of this size.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu);
        self.window = self.window.max(self.least_window());
    }

    /// Bytes that may be in flight.
    #[must_use]
    pub const fn window(&self) -> u64 {
        self.window
    }

    /// Bytes that may be in flight before anything is known.
    #[must_use]
    pub fn first_window(&self) -> u64 {
        (FIRST_WINDOW * self.mtu).min(FIRST_WINDOW_BYTES).max(self.least_window())
    }

    /// Bytes per second at which the window should be spent.
    #[must_use]
    pub fn pacing_rate(&self) -> f64 {
        let rtt = self.srtt.max(self.min_rtt.get()).max(1);
        (self.window as f64 * 1e9 / rtt as f64).min(self.course.gain() * self.bandwidth.get()).max(1.0)
    }

    /// What is believed now.
    #[must_use]
    pub fn state(&self) -> State {
        State {
            phase: self.course.phase(),
            bandwidth: self.bandwidth.get(),
            min_rtt: self.min_rtt.get(),
            chance_loss: self.losses.chance(),
            window: self.window,
        }
    }

    const fn least_window(&self) -> u64 {
        LEAST_WINDOW * self.mtu
    }

    /// Everything was lost for long: the path may be another one now.
    fn start_again(&mut self, now: Nanos) {
        self.bandwidth.set(0.0);
        self.heaps = Heaps::default();
        self.window = self.least_window();
        self.course = Course::default();
        self.round = Round { until: self.delivery.delivered(), ..Round::default() };
        self.losses.begin(now, Phase::Startup, false);
    }

    fn learn(&mut self, now: Nanos, acked: u64, sample: &Sample) {
        self.srtt = if self.srtt == 0 { sample.rtt } else { (7 * self.srtt + sample.rtt) / 8 };
        if self.min_rtt.offer(now, sample.rtt) {
            self.losses.forget_chance();
            self.course.meet_others();
        }
        self.dice.stir(now);
        let round = &mut self.round;
        round.min_rtt = if round.samples == 0 { sample.rtt } else { round.min_rtt.min(sample.rtt) };
        round.samples += 1;
        round.app_limited |= sample.app_limited;
        if sample.interval as f64 >= 0.9 * self.min_rtt.get() as f64 {
            round.best = round.best.max(sample.rate);
            // Elsewhere one sample of each round does: the best of many is that of the most uneven acknowledgements.
            if self.course.is_probing() && (!sample.app_limited || sample.rate > self.bandwidth.get()) {
                self.bandwidth.offer(sample.rate);
            }
        }
        self.heaps.acked(now, acked, self.bandwidth.get());
    }

    /// Bytes that fill a path of this length with so many times the bandwidth. Nothing is added for bytes that are lost
    /// and use the link as well: whoever answers to loss by sending more makes a policer's loss grow without end.
    fn target(&self, gain: f64, rtt: f64) -> f64 {
        gain * self.bandwidth.get() * rtt / 1e9 + self.heap_room() + (2 * self.mtu) as f64
    }

    /// Room for acknowledgements that come in heaps.
    fn heap_room(&self) -> f64 {
        let most = self.bandwidth.get() * (self.min_rtt.get() / 20).max(3 * MILLI) as f64 / 1e9;
        (0.9 * self.heaps.get() as f64).min(most)
    }

    /// Moves the window towards its target: up by what is acknowledged, down by half of that, so that small requests go
    /// on to flow while a queue is emptied.
    fn resize(&mut self, acked: u64) {
        if self.bandwidth.get() <= 0.0 {
            self.window += acked;
            return;
        }
        let target = self.target_now();
        self.window = if target >= self.window {
            target.min(self.window + acked)
        } else if self.course.phase() == Phase::ProbeRtt {
            // At once: what counts is that all flows that see a path's length do so at the same time.
            target
        } else {
            target.max(self.window.saturating_sub(acked / 2))
        };
    }

    /// The window that is wanted, within its bounds.
    fn target_now(&self) -> u64 {
        (self.wanted().min(MOST_WINDOW) as u64).max(self.least_window())
    }
}
