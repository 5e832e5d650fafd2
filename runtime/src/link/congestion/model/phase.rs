//! What a flow does: it looks for the bandwidth, empties the queue that this has made, and then goes round in a cycle.
//!
//! `Startup` doubles until the bandwidth grows no more. `Drain` sends a little less than the link carries until the
//! queue is empty, and measures what is left of it: that of others. `Cruise` fills the link, `ProbeUp` tries for more.
//! `ProbeRtt` sends little, if the shortest round trip has not been seen for long.

use super::{MILLI, Model, Nanos, Round, SECOND, Sample};

/// What a flow does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Doubles what it sends, to find the bandwidth.
    #[default]
    Startup,
    /// Sends less than the link carries, to empty the queue.
    Drain,
    /// Fills the link.
    Cruise,
    /// Sends more than the link carried, in case it has become faster.
    ProbeUp,
    /// Sends little, to see the length of the path.
    ProbeRtt,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Startup, Self::Drain, Self::Cruise, Self::ProbeUp, Self::ProbeRtt];

    /// A short name, for logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Drain => "drain",
            Self::Cruise => "cruise",
            Self::ProbeUp => "probe-up",
            Self::ProbeRtt => "probe-rtt",
        }
    }
}

/// How much is sent in each phase, in bandwidths.
const DRAIN: f64 = 0.9;
const UP: f64 = 1.25;
const STARTUP: f64 = 2.0;
const PROBE_RTT: f64 = 0.5;
/// Packets that trying for more is at least.
const UP_PACKETS: u64 = 3;
/// How long a probe of the path's length lasts once little is in flight.
const PROBE_RTT_TIME: Nanos = 200 * MILLI;
/// Growth of the bandwidth in a round below which Startup has found it, and for how many rounds.
const STARTUP_GROWTH: f64 = 1.25;
const STARTUP_ROUNDS: u32 = 3;
/// Growth in a round of ProbeUp that makes it go on.
const UP_GROWTH: f64 = 1.1;
/// Share lost beyond chance that is too much.
const TOO_LOSSY: f64 = 0.01;
/// The same in ProbeUp, whose packets are judged by themselves.
const UP_TOO_LOSSY: f64 = 0.03;
/// The same elsewhere if nothing but the loss says so.
const PLAINLY_TOO_LOSSY: f64 = 0.12;
/// Times the empty round trip that a queue of others may make the window longer.
const LONGEST: f64 = 2.0;
/// The window makes up for the queue of others, and for the less of it the more is lost at queues: so much of it at most,
/// when such a share is lost beyond chance. What was lost in a cycle fades by this in the next.
const MAKE_UP: f64 = 0.9;
const YIELDS: f64 = 0.5;
const CROWDED: f64 = 0.007;
const CROWD_FADES: f64 = 0.9;
/// Rounds of cruising without queue that lost something and delivered less than the bandwidth, after which the bandwidth
/// is not believed any more, and how much less.
const DOUBT: (u32, f64) = (3, 0.97);
/// Most loss by chance that explains it.
const DOUBTLESS: f64 = 0.12;
/// Probes of the path's length that must agree, on a path that loses packets, that it has become longer, and how far
/// they lie apart at least.
const AGREE: u32 = 3;
const AGAIN: Nanos = 2 * SECOND;
/// Times the empty round trip that is left after a drain if there are others.
const OTHERS: f64 = 1.08;
/// Drains whose findings about others are kept.
const DRAINS: usize = 3;

/// Where in its course a flow is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Course {
    phase: Phase,
    /// When the phase began.
    since: Nanos,
    /// Rounds that ended in this phase.
    rounds: u32,
    /// Bandwidth that the next round is compared with.
    before: f64,
    /// Bandwidth when ProbeUp began.
    base: f64,
    /// Rounds without growth in Startup, rounds with growth in ProbeUp.
    count: u32,
    /// When little enough was in flight, in Drain and ProbeRtt.
    reached: Option<Nanos>,
    /// Sum and number of round trips measured after that.
    measured: (Nanos, u32),
    /// Shortest round trip measured after that.
    shortest: Nanos,
    /// Mean round trip of the last drains; 0 for none.
    drained: [Nanos; DRAINS],
    /// Rounds in a row of Startup that lost too much.
    lossy: u32,
    /// Short cruises that are left, after a Startup that may have ended too early.
    soon: u32,
    /// Drains until others are forgotten whose queue was seen.
    others: u32,
    /// Part of the queue of others that the window does not make up for, from 0 to 1.
    yielding: f64,
    /// Bytes delivered and lost in this cycle while there was a queue.
    queued: (f64, f64),
    /// How long, and for how many rounds, to cruise.
    cruise: (Nanos, u32),
    /// Most bytes in flight, after too many were lost.
    cap: Option<f64>,
    /// Rounds in a row that showed a slower link.
    slower: u32,
    /// Rounds in a row of cruising that delivered less than the bandwidth, and the most that one of them did.
    doubt: (u32, f64),
    /// Probes that found the path longer, the shortest that they found, and when to try again.
    tries: u32,
    longest_try: Nanos,
    again: Nanos,
    /// Whether the length of the path is to be taken from the next drain.
    relearn: bool,
}

impl Course {
    pub(super) const fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether each sample may show more bandwidth.
    pub(super) const fn is_probing(&self) -> bool {
        matches!(self.phase, Phase::Startup | Phase::ProbeUp)
    }

    pub(super) const fn gain(&self) -> f64 {
        match self.phase {
            Phase::Startup => STARTUP,
            Phase::Drain => DRAIN,
            Phase::Cruise => 1.0,
            Phase::ProbeUp => UP,
            Phase::ProbeRtt => PROBE_RTT,
        }
    }

    /// The path is shorter than was believed: what was taken for its length was the queue of others.
    pub(super) const fn meet_others(&mut self) {
        self.others = DRAINS as u32;
    }

    /// Median of the mean round trips of the last drains: what noise and the queue of others cost.
    fn drained(&self) -> Option<Nanos> {
        let mut known = self.drained;
        known.sort_unstable();
        // Zeros come first: one or two that are known are the largest.
        known.get(if known[0] == 0 { 2 } else { 1 }).copied().filter(|rtt| *rtt > 0)
    }
}

impl Model {
    /// The window that the phase wants.
    pub(super) fn wanted(&self) -> f64 {
        let (gain, empty) = (self.course.gain(), self.min_rtt.get() as f64);
        let wanted = match self.course.phase {
            // Not less than at the beginning: what an application with little to send showed is no bound.
            Phase::Startup => self.target(gain, empty).max(self.first_window() as f64),
            Phase::Drain | Phase::ProbeRtt => self.target(gain, empty),
            Phase::Cruise => self.target(gain, self.usual_rtt()),
            Phase::ProbeUp => self.target(gain, self.usual_rtt()) + (UP_PACKETS * self.mtu) as f64,
        };
        self.course.cap.map_or(wanted, |cap| wanted.min(cap))
    }

    /// The round trip with the queue of others, but without ours.
    fn usual_rtt(&self) -> f64 {
        let empty = self.min_rtt.get() as f64;
        self.course.drained().map_or(empty, |rtt| {
            (empty + (MAKE_UP - self.course.yielding) * (rtt as f64 - empty)).clamp(empty, LONGEST * empty)
        })
    }

    fn enter(&mut self, now: Nanos, phase: Phase) {
        let course = &mut self.course;
        (course.phase, course.since, course.rounds, course.count) = (phase, now, 0, 0);
        (course.reached, course.measured, course.shortest) = (None, (0, 0), 0);
        (course.slower, course.doubt, course.lossy) = (0, (0, 0.0), 0);
        course.before = self.bandwidth.get();
        match phase {
            Phase::Cruise => self.plan_cruise(),
            Phase::ProbeUp => {
                self.course.base = self.bandwidth.get();
                self.bandwidth.advance();
            }
            Phase::Startup | Phase::Drain | Phase::ProbeRtt => {}
        }
        self.round = Round { until: self.delivery.delivered(), ..Round::default() };
        self.losses.begin(now, phase, false);
    }

    /// How long to cruise: a second or two, and less next to others, so that shares become even soon.
    fn plan_cruise(&mut self) {
        let (acked, lost) = self.course.queued;
        let excess = lost / (acked + lost).max(1.0) - self.losses.usual();
        self.course.queued = (acked * CROWD_FADES, lost * CROWD_FADES);
        self.course.yielding = (excess / CROWDED).clamp(0.0, YIELDS);
        let roll = self.dice.roll();
        let time = 1200 * MILLI + (roll * 800.0) as u64 * MILLI;
        let short = self.course.others > 0 || self.course.soon > 0;
        self.course.soon = self.course.soon.saturating_sub(1);
        let rounds = if short {
            5 + (roll * 4.0) as u32
        } else {
            u32::try_from(self.window / self.mtu).unwrap_or(u32::MAX).min(62)
        };
        self.course.cruise = (time, rounds);
    }

    /// A round trip is over.
    pub(super) fn end_round(&mut self, now: Nanos, sample: &Sample) {
        self.course.rounds += 1;
        self.heaps.round();
        let round = self.round;
        if self.min_rtt.shows_queue(round.min_rtt) {
            self.course.queued.0 += round.acked as f64;
            self.course.queued.1 += round.lost as f64;
        }
        let usable = sample.interval as f64 >= 0.9 * self.min_rtt.get() as f64;
        if usable && (!sample.app_limited || sample.rate > self.bandwidth.get()) {
            self.bandwidth.offer(sample.rate);
        }
        if self.is_slower(&round) {
            self.bandwidth.set(round.best);
            self.course.relearn = true;
            self.enter(now, Phase::Drain);
            return;
        }
        match self.course.phase {
            Phase::Startup => self.startup_round(now, &round),
            Phase::Cruise => self.cruise_round(now, &round, sample.rate),
            Phase::ProbeUp => self.up_round(now, &round),
            Phase::Drain | Phase::ProbeRtt => {}
        }
    }

    /// The path's length was probed.
    fn probed(&mut self, now: Nanos, rtt: Nanos) {
        let course = &mut self.course;
        course.longest_try = if course.tries == 0 { rtt } else { course.longest_try.min(rtt) };
        course.tries += 1;
        let longer = self.min_rtt.shows_queue(rtt);
        if longer && self.losses.chance() > TOO_LOSSY && course.tries < AGREE {
            // It may be the queue of others, that is full all the time. They probe as well.
            course.again = now + AGAIN + (self.dice.roll() * AGAIN as f64) as u64;
            return;
        }
        (course.tries, course.again) = (0, 0);
        let believed = if longer { course.longest_try } else { rtt };
        self.min_rtt.set(now, believed);
        course.drained = [0; DRAINS];
    }

    /// Whether the link has become much slower: a filter for the highest bandwidth would not notice for long.
    fn is_slower(&mut self, round: &Round) -> bool {
        let slow = round.best > 0.0 && round.best < 0.5 * self.bandwidth.get() && !round.app_limited;
        let queue = round.min_rtt as f64 > 1.5 * self.min_rtt.get() as f64;
        let course = &mut self.course;
        course.slower = if slow && queue && course.phase != Phase::Startup { course.slower + 1 } else { 0 };
        course.slower >= 2
    }

    fn too_lossy(&self, round: &Round) -> bool {
        let all = round.acked + round.lost;
        let by = if self.min_rtt.shows_queue(round.min_rtt) { TOO_LOSSY } else { PLAINLY_TOO_LOSSY };
        round.marked || self.losses.excess(round.lost, all, by, self.mtu)
    }

    /// Fewer bytes in flight from now on: not less than what fills the link.
    fn limit(&mut self, rate: f64, rtt: f64) {
        let floor = rate * rtt / 1e9 + self.heap_room();
        let cap = (0.85 * self.window as f64).max(floor);
        self.course.cap = Some(self.course.cap.map_or(cap, |old| old.min(cap)));
    }

    fn startup_round(&mut self, now: Nanos, round: &Round) {
        // Without a queue to see it may have been a burst of losses: it takes two rounds to believe.
        self.course.lossy = if self.too_lossy(round) { self.course.lossy + 1 } else { 0 };
        if self.course.lossy > 1 || (self.course.lossy > 0 && self.min_rtt.shows_queue(round.min_rtt)) {
            self.limit(self.bandwidth.get(), self.min_rtt.get() as f64);
            self.course.soon = DRAINS as u32;
            if !self.min_rtt.shows_queue(round.min_rtt) {
                self.bandwidth.set(round.best);
            }
            self.enter(now, Phase::Drain);
            return;
        }
        if round.app_limited {
            return;
        }
        let bandwidth = self.bandwidth.get();
        if bandwidth >= STARTUP_GROWTH * self.course.before {
            (self.course.before, self.course.count) = (bandwidth, 0);
            return;
        }
        self.course.count += 1;
        if self.course.count >= STARTUP_ROUNDS {
            self.enter(now, Phase::Drain);
        }
    }

    fn cruise_round(&mut self, now: Nanos, round: &Round, rate: f64) {
        if self.min_rtt.shows_queue(round.min_rtt) && self.too_lossy(round) {
            self.limit(rate, self.usual_rtt());
        }
        self.doubt(round, rate);
        let course = &self.course;
        let over = now.saturating_sub(course.since) >= course.cruise.0 || course.rounds >= course.cruise.1;
        if over && !round.app_limited {
            self.course.cap = self.course.cap.map(|cap| cap * 1.15);
            self.enter(now, Phase::ProbeUp);
        }
    }

    /// A policer drops what is beyond its rate without a queue, after it has let a burst pass that looked like a faster
    /// link. Then each round delivers less than what chance would leave of the bandwidth.
    fn doubt(&mut self, round: &Round, rate: f64) {
        let less = round.lost > 0 && !round.app_limited && !self.min_rtt.shows_queue(round.min_rtt);
        let course = &mut self.course;
        let chance = self.losses.chance().min(DOUBTLESS);
        if !less || rate >= DOUBT.1 * (1.0 - chance) * self.bandwidth.get() {
            course.doubt = (0, 0.0);
            return;
        }
        course.doubt = (course.doubt.0 + 1, course.doubt.1.max(rate));
        if course.doubt.0 >= DOUBT.0 {
            let rate = course.doubt.1;
            course.doubt = (0, 0.0);
            // Without the room for uneven acknowledgements, which is sent in vain here.
            course.cap = Some(rate * self.min_rtt.get() as f64 / 1e9);
            self.bandwidth.set(rate);
        }
    }

    fn up_round(&mut self, now: Nanos, round: &Round) {
        let own = self.losses.last(Phase::ProbeUp).map_or((0, 0), |span| (span.lost, span.lost + span.acked));
        if self.too_lossy(round) || self.losses.excess(own.0, own.1, UP_TOO_LOSSY, self.mtu) {
            // What passed without a queue and at the price of losses was a policer's burst.
            if !self.min_rtt.shows_queue(round.min_rtt) {
                self.bandwidth.set(self.course.base);
            }
            self.limit(self.bandwidth.get(), self.min_rtt.get() as f64);
            self.enter(now, Phase::Drain);
            return;
        }
        if self.course.rounds < 2 {
            return;
        }
        let bandwidth = self.bandwidth.get();
        // Next to others, more for us is less for them.
        let alone = self.course.others == 0 && !self.min_rtt.shows_queue(round.min_rtt);
        if alone && bandwidth >= UP_GROWTH * self.course.before {
            self.course.before = bandwidth;
            self.course.count += 1;
            if self.course.count >= 2 {
                self.course.cap = None;
                self.enter(now, Phase::Startup);
            }
            return;
        }
        self.course.cap = None;
        self.enter(now, Phase::Drain);
    }

    /// What may end a phase in the middle of a round.
    pub(super) fn step(&mut self, now: Nanos, sample: &Sample) {
        match self.course.phase {
            Phase::Startup => {
                let min = self.min_rtt.get();
                let high = min + (min / 8).clamp(4 * MILLI, 16 * MILLI);
                if self.round.samples >= 8 && self.round.min_rtt > high {
                    self.enter(now, Phase::Drain);
                }
            }
            Phase::Drain => self.drain_step(now, sample),
            Phase::ProbeRtt => self.probe_rtt_step(now, sample),
            Phase::Cruise | Phase::ProbeUp => {
                if self.min_rtt.is_old(now) && now >= self.course.again {
                    self.enter(now, Phase::ProbeRtt);
                }
            }
        }
    }

    fn measure(&mut self, from: Nanos, sample: &Sample) {
        if sample.sent >= from {
            let course = &mut self.course;
            course.measured = (course.measured.0 + sample.rtt, course.measured.1 + 1);
            course.shortest = if course.shortest == 0 { sample.rtt } else { course.shortest.min(sample.rtt) };
        }
    }

    fn drain_step(&mut self, now: Nanos, sample: &Sample) {
        let Some(reached) = self.course.reached else {
            if self.in_flight <= self.target_now() {
                self.course.reached = Some(now);
                self.losses.begin(now, Phase::Drain, true);
            }
            return;
        };
        let min = self.min_rtt.get();
        self.measure(reached + min / 2, sample);
        if sample.sent < reached + 3 * min / 4 {
            return;
        }
        let (sum, count) = self.course.measured;
        if count > 0 {
            self.course.drained.rotate_right(1);
            let rtt = sum / u64::from(count);
            self.course.drained[0] = rtt;
            let others = rtt as f64 > OTHERS * min as f64;
            self.course.others = if others { DRAINS as u32 } else { self.course.others.saturating_sub(1) };
        }
        if self.course.relearn && self.min_rtt.shows_queue(self.course.shortest) && self.losses.chance() < TOO_LOSSY {
            self.min_rtt.set(now, self.course.shortest);
            self.course.drained = [0; DRAINS];
        }
        self.course.relearn = false;
        self.enter(now, Phase::Cruise);
    }

    fn probe_rtt_step(&mut self, now: Nanos, sample: &Sample) {
        let Some(reached) = self.course.reached else {
            if self.in_flight <= self.target_now() {
                self.course.reached = Some(now);
            }
            return;
        };
        self.measure(reached, sample);
        if now.saturating_sub(reached) < PROBE_RTT_TIME || self.course.measured.1 == 0 {
            return;
        }
        self.probed(now, self.course.shortest);
        self.enter(now, Phase::Cruise);
    }
}
