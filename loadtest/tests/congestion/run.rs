//! Runs flows over a bottleneck, and what is measured.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{
    flow::{Flow, MTU, WIRE},
    link::{Chance, Link, MILLI, Packet, Path, SECOND},
};

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Depart,
    Arrive(usize, u64),
    AckDue(usize),
    Acked(usize, Vec<u64>),
    Wake(usize),
    Timer(usize),
    Change(usize),
    Look,
}

/// A run: the path, when it changes, the flows, for how long, and from when on it is measured.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) path: Path,
    pub(crate) changes: Vec<(u64, Path)>,
    pub(crate) flows: Vec<Flow>,
    pub(crate) time: u64,
    pub(crate) from: u64,
    pub(crate) seed: u64,
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Report {
    /// Mbit/s on the wire of each flow, from `Run::from` on.
    pub(crate) mbit: Vec<f64>,
    /// The same for each flow and second, from the beginning.
    pub(crate) seconds: Vec<Vec<f64>>,
    /// Part of what the link could carry after losses, from `Run::from` on, and from the beginning.
    pub(crate) used: f64,
    pub(crate) used_all: f64,
    /// Shares of the packets sent that found no room in the queue, and that a policer dropped.
    pub(crate) dropped: f64,
    pub(crate) policed: f64,
    /// Milliseconds of queue: median, 99th percentile, most; from `Run::from` on.
    pub(crate) queue: [f64; 3],
}

impl Report {
    pub(crate) fn total(&self) -> f64 {
        self.mbit.iter().sum()
    }

    /// Jain's index: 1 if all have the same, 1/n if one has everything.
    pub(crate) fn jain(&self) -> f64 {
        let squares: f64 = self.mbit.iter().map(|x| x * x).sum();
        self.total() * self.total() / (self.mbit.len() as f64 * squares)
    }

    pub(crate) fn share(&self, flow: usize) -> f64 {
        self.mbit[flow] / self.total()
    }

    /// A line of the table in the documentation.
    pub(crate) fn row(&self, name: &str) -> String {
        let shares: Vec<String> = self.mbit.iter().map(|x| format!("{x:.1}")).collect();
        let shares = if shares.len() > 4 { format!("Jain {:.3}", self.jain()) } else { shares.join(" : ") };
        format!(
            "| {name} | {:.1} | {:.1} | {:.2} | {:.0} / {:.0} | {shares} |",
            self.used * 100.0,
            self.used_all * 100.0,
            (self.dropped + self.policed) * 100.0,
            self.queue[0],
            self.queue[1],
        )
    }

    pub(crate) fn line(&self, name: &str) -> String {
        let shares: Vec<String> = self.mbit.iter().map(|x| format!("{x:.1}")).collect();
        format!(
            "{name:44} used {:5.1}% (all {:5.1}%) dropped {:5.2}% policed {:5.2}% queue p50 {:6.1} p99 {:6.1} max {:6.1} ms  jain {:.3}  [{}]",
            self.used * 100.0,
            self.used_all * 100.0,
            self.dropped * 100.0,
            self.policed * 100.0,
            self.queue[0],
            self.queue[1],
            self.queue[2],
            self.jain(),
            shares.join(" ")
        )
    }
}

struct World {
    now: u64,
    count: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    link: Link,
    flows: Vec<Flow>,
    timers: Vec<u64>,
}

impl Run {
    pub(crate) fn new(path: Path, flows: Vec<Flow>, seconds: u64) -> Self {
        Self { path, changes: Vec::new(), flows, time: seconds * SECOND, from: SECOND, seed: 1 }
    }

    pub(crate) fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    pub(crate) fn from(self, from: u64) -> Self {
        Self { from, ..self }
    }

    pub(crate) fn change(mut self, at: u64, path: Path) -> Self {
        self.changes.push((at, path));
        self
    }

    pub(crate) fn go(self) -> Report {
        let count = self.flows.len();
        let mut world = World {
            now: 0,
            count: 0,
            events: BinaryHeap::new(),
            link: Link::new(self.path, self.seed),
            flows: self.flows,
            timers: vec![u64::MAX; count],
        };
        // Nobody starts in the same nanosecond, and each seed is another story.
        let mut chance = Chance(self.seed ^ 0x5eed);
        for flow in 0..count {
            world.flows[flow].start += (chance.roll() * 30.0 * MILLI as f64) as u64;
            world.at(world.flows[flow].start, Event::Wake(flow));
        }
        self.changes.iter().enumerate().for_each(|(i, change)| world.at(change.0, Event::Change(i)));
        world.at(0, Event::Look);
        let mut seen = Seen::new(count, self.from);
        while let Some(Reverse((at, _, event))) = world.events.pop() {
            if at >= self.time {
                break;
            }
            world.now = at;
            if let Event::Change(i) = event {
                world.link.change(self.changes[i].1);
            } else if event == Event::Look {
                seen.look(&world);
                world.at(at + MILLI, Event::Look);
            } else {
                world.handle(event);
            }
        }
        seen.report(&world, self.time)
    }
}

/// What is written down each millisecond.
struct Seen {
    from: u64,
    queue: Vec<u64>,
    seconds: Vec<Vec<f64>>,
    /// Bytes delivered at the last full second, and at `from`.
    last: Vec<u64>,
    at_from: Vec<u64>,
    /// Bits that the link could carry after losses, since `from` and since the beginning.
    carried: [f64; 2],
    /// Packets offered, dropped and policed until `from`.
    before: [u64; 3],
}

impl Seen {
    fn new(count: usize, from: u64) -> Self {
        let (queue, seconds, last) = (Vec::new(), vec![Vec::new(); count], vec![0; count]);
        Self { from, queue, seconds, at_from: last.clone(), last, carried: [0.0; 2], before: [0; 3] }
    }

    fn look(&mut self, world: &World) {
        let (path, at) = (world.link.path, world.now);
        let rate = path.policer.map_or(path.rate, |(rate, _)| rate.min(path.rate)) * (1.0 - path.loss);
        self.carried[1] += rate / 1e3;
        if at >= self.from {
            self.queue.push(world.link.there.queue_delay());
            self.carried[0] += rate / 1e3;
        }
        if at == self.from {
            self.at_from = world.flows.iter().map(|f| f.delivered).collect();
            let counts = world.link.there.counts;
            self.before = [counts.offered, counts.dropped, counts.policed];
        }
        if at > 0 && at.is_multiple_of(SECOND) {
            for (i, flow) in world.flows.iter().enumerate() {
                self.seconds[i].push((flow.delivered - self.last[i]) as f64 * 8e-6);
                self.last[i] = flow.delivered;
            }
        }
    }

    fn report(mut self, world: &World, until: u64) -> Report {
        self.queue.sort_unstable();
        let time = (until - self.from) as f64 / 1e9;
        let since = |(flow, from): (&Flow, &u64)| (flow.delivered - from) as f64 * 8e-6 / time;
        let mbit: Vec<f64> = world.flows.iter().zip(&self.at_from).map(since).collect();
        let all: u64 = world.flows.iter().map(|f| f.delivered).sum();
        let [offered, dropped, policed] = self.before;
        let counts = world.link.there.counts;
        let sent = (counts.offered - offered).max(1) as f64;
        let part = |p: f64| {
            let at = ((self.queue.len() as f64 * p) as usize).min(self.queue.len() - 1);
            self.queue[at] as f64 / 1e6
        };
        Report {
            used: mbit.iter().sum::<f64>() * 1e6 * time / self.carried[0],
            used_all: all as f64 * 8.0 / self.carried[1],
            dropped: (counts.dropped - dropped) as f64 / sent,
            policed: (counts.policed - policed) as f64 / sent,
            queue: [part(0.5), part(0.99), part(1.0)],
            mbit,
            seconds: self.seconds,
        }
    }
}

impl World {
    fn at(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at.max(self.now), self.count, event)));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Depart => {
                let (arrival, next) = self.link.there.depart(self.now);
                if let Some((at, packet)) = arrival {
                    let extra = self.flows[packet.flow].extra / 2;
                    self.at(at + extra, Event::Arrive(packet.flow, packet.number));
                }
                if let Some(next) = next {
                    self.at(next, Event::Depart);
                }
            }
            Event::Arrive(flow, number) => {
                if let Some(at) = self.flows[flow].arrived(self.now, number) {
                    self.at(at, Event::AckDue(flow));
                }
            }
            Event::AckDue(flow) => {
                let lost = self.link.path.ack_loss > 0.0 && self.link.there.chance.roll() < self.link.path.ack_loss;
                if let Some(numbers) = self.flows[flow].acknowledge(self.now, lost) {
                    let path = self.link.path;
                    let mut at = self.now + path.rtt / 2 + self.flows[flow].extra / 2;
                    if path.ack_every > 0 {
                        at = at.next_multiple_of(path.ack_every);
                    }
                    self.at(at, Event::Acked(flow, numbers));
                }
            }
            Event::Acked(flow, numbers) => {
                self.flows[flow].acknowledged(self.now, &numbers);
                self.send(flow);
            }
            Event::Wake(flow) => self.send(flow),
            Event::Timer(flow) => {
                self.timers[flow] = u64::MAX;
                if self.now >= self.flows[flow].deadline() {
                    self.flows[flow].timeout(self.now);
                }
                self.send(flow);
            }
            Event::Change(_) | Event::Look => {}
        }
    }

    fn send(&mut self, flow: usize) {
        let before = self.flows[flow].wake;
        for number in self.flows[flow].send(self.now) {
            let packet = Packet { flow, number };
            if let Some(at) = self.link.there.offer(self.now, MTU + WIRE, packet) {
                self.at(at, Event::Depart);
            }
        }
        let wake = self.flows[flow].wake;
        if wake != u64::MAX && wake != before {
            self.at(wake, Event::Wake(flow));
        }
        let deadline = self.flows[flow].deadline();
        if deadline != u64::MAX && (self.timers[flow] == u64::MAX || self.timers[flow] < self.now) {
            self.timers[flow] = deadline;
            self.at(deadline, Event::Timer(flow));
        }
    }
}
