//! An edge's life, top to bottom: dial along the [`Course`], say Hello, serve until the tunnel is lost, is ordered
//! elsewhere, or the process ends.
//!
//! The [`Course`] is pure and holds every rule about where to go next and when; [`Life`] is what does it.
//! Going elsewhere is make-before-break: the next shard is dialled while the old tunnel still serves, and the old one
//! is retired when its streams have ended, or at its deadline.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use proto::{
    code::CloseCode,
    id::{EdgeId, ShardId},
    message::{BYE_MOVED, Candidate, EdgeToShard},
};
use runtime::{
    link::{Carrier, EndCause, Link, LinkEnd},
    tls::LiveIdentity,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    class::Class,
    course::{Course, Outcome, Step},
    dice::Dice,
    link::{Event, Leave, Tunnel, TunnelParts},
    load::Load,
    serve::Server,
    ways::Ways,
};

mod carriers;
mod greet;

/// How long a tunnel that was left by a Move may keep its streams: long sessions are to end by themselves, and yet one
/// tunnel per edge is the rule.
const RETIRE: Duration = Duration::from_secs(3600);
/// Tunnels that are being retired at once; of more, the oldest ends.
const MOST_RETIRING: usize = 4;
/// How long no stream must have come before a tunnel is closed: when moving, and when the process waits to end.
const QUIET: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(100));
/// Time for the carrier to send its last packet.
const LAST_WORD: Duration = Duration::from_millis(30);

/// Where an edge stands, for readiness, metrics and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was tried yet.
    Starting,
    /// An address is being tried.
    Dialing {
        /// From 1, since there was last a tunnel.
        attempt: u32,
        /// Which address.
        address: String,
    },
    /// A tunnel serves.
    Connected {
        /// To whom.
        shard: ShardId,
        /// Since when.
        since: Instant,
    },
    /// Between two tries.
    Waiting {
        /// When the next one comes.
        until: Instant,
        /// What the last one ended with.
        why: String,
    },
    /// A shard, or this machine, found that the edge cannot be served as it is.
    Refused {
        /// The kind, as in the metric.
        kind: &'static str,
        /// Cause and remedy.
        why: String,
        /// When it is tried again.
        until: Instant,
    },
    /// The edge has ended.
    Stopped,
}

/// The kind of problem with who somebody is, if it is one: each has its own log line, metric and phase.
const fn identity_problem(cause: EndCause) -> Option<&'static str> {
    if Class::of(cause).is_identity() { Some(cause.slug()) } else { None }
}

/// What a life needs.
#[derive(Debug)]
pub struct LifeParts {
    /// Who lives.
    pub name: EdgeId,
    /// Dials; replaced when the certificate is renewed.
    pub ways: Arc<Mutex<Ways>>,
    /// Serves streams.
    pub server: Arc<Server>,
    /// For each tunnel.
    pub tunnel: TunnelParts,
    /// Jitter.
    pub dice: Dice,
    /// How long streams may go on when the process ends.
    pub drain: Duration,
    /// Where the phase goes.
    pub phase: watch::Sender<Phase>,
    /// Where the present tunnel's line goes.
    pub line: watch::Sender<Line>,
    /// What is shown in handshakes: tells a certificate that has ended from a clock that is wrong.
    pub identity: LiveIdentity,
}

/// The way to the shard that serves now, for whoever has something to say to it.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Messages go in here; `None` while there is no tunnel.
    pub say: Option<mpsc::Sender<EdgeToShard>>,
    /// When the shard last answered a ping.
    pub pulse: Option<watch::Receiver<Option<Instant>>>,
    /// The tunnel itself, to look at, and for the streams that this edge itself opens.
    pub link: Option<Link>,
    /// What counts those streams.
    pub load: Option<Load>,
    /// What was dialled.
    pub address: String,
}

/// An edge.
#[derive(Debug)]
pub struct Life {
    parts: LifeParts,
    course: Course,
    instance: u64,
    epoch: AtomicU64,
    retiring: VecDeque<CancellationToken>,
    /// What carried the last tunnel.
    carrier: Option<Carrier>,
    /// The last tunnel over QUIC did not live long.
    quic_was_short: bool,
}

enum Change {
    To(Box<Tunnel>),
    Stay,
    Ended(Event),
    Stop,
}

impl Life {
    /// An edge that has not begun.
    #[must_use]
    pub fn new(parts: LifeParts, course: Course) -> Self {
        let instance = parts.dice.number();
        Self {
            parts,
            course,
            instance,
            epoch: AtomicU64::new(0),
            retiring: VecDeque::new(),
            carrier: None,
            quic_was_short: false,
        }
    }

    /// Lives until the tasks are asked to stop.
    pub async fn run(mut self) {
        let tasks = self.parts.tunnel.tasks.clone();
        self.parts.tunnel.journal.begun();
        let mut step = self.course.first(Duration::ZERO, Instant::now());
        loop {
            let mut course = self.course.clone();
            let arrived = tokio::select! {
                biased;
                () = tasks.stopping() => break,
                tunnel = self.arrive(&mut course, step, true) => tunnel,
            };
            self.course = course;
            match self.serve(arrived).await {
                Some(next) => step = next,
                None => break,
            }
        }
        self.parts.line.send_replace(Line::default());
        self.parts.phase.send_replace(Phase::Stopped);
    }

    /// Dials along the course until a shard says Welcome.
    async fn arrive(&self, course: &mut Course, mut step: Step, show: bool) -> Tunnel {
        let mut attempt = 0;
        loop {
            sleep(step.delay).await;
            attempt += 1;
            if show {
                self.parts.phase.send_replace(Phase::Dialing { attempt, address: step.address.clone() });
            }
            let attempt = self.attempt(&step, course.avoided(Instant::now())).await;
            course.heard_of(self.epoch.load(Ordering::Relaxed));
            let outcome = match attempt {
                Ok((tunnel, candidates)) => {
                    course.arrived(&tunnel.shard, &candidates);
                    return tunnel;
                }
                Err(outcome) => outcome,
            };
            let address = std::mem::take(&mut step.address);
            step = course.step(&outcome, Instant::now(), self.parts.dice.fraction());
            self.tell(&address, &outcome, &step, show);
        }
    }

    /// Dials one address and says Hello.
    async fn attempt(&self, step: &Step, avoid: Vec<ShardId>) -> Result<(Tunnel, Vec<Candidate>), Outcome> {
        let dials = &self.parts.tunnel.metrics.dials;
        let greeted = async {
            let ways = self.parts.ways.lock().clone();
            let link = ways.dial(&step.address, &self.parts.tunnel.metrics).await?;
            self.greeted(link, &step.address, avoid).await
        };
        let result = match step.within {
            None => greeted.await,
            Some(within) => timeout(within, greeted).await.unwrap_or_else(|_| {
                let why = format!("no tunnel within {} s", within.as_secs());
                Err(Outcome::Failed(LinkEnd::new(EndCause::TimedOut, why)))
            }),
        };
        let result = result.map_err(|outcome| self.by_own_clock(outcome));
        let outcome = match &result {
            Ok(_) => "welcome",
            Err(Outcome::Redirected(_)) => "redirect",
            Err(Outcome::Refused(refuse)) => refuse.code.slug(),
            Err(Outcome::Failed(end) | Outcome::Lost(end, _)) => end.cause.slug(),
        };
        dials.with_label_values(&[outcome]).inc();
        result
    }

    /// Serves until there is no tunnel. Returns what to do then; `None` when the process ends.
    async fn serve(&mut self, mut tunnel: Tunnel) -> Option<Step> {
        let tasks = self.parts.tunnel.tasks.clone();
        self.take_up(&tunnel);
        loop {
            let present = Self::present(&tunnel);
            let event = tokio::select! {
                biased;
                () = tasks.stopping() => {
                    self.leave(tunnel).await;
                    return None;
                }
                event = tunnel.event() => event,
                (next, candidates) = self.other_carrier(present) => {
                    self.course.arrived(&next.shard, &candidates);
                    let old = std::mem::replace(&mut tunnel, next);
                    self.carried(&old);
                    self.take_up(&tunnel);
                    self.retire(old, None);
                    continue;
                }
            };
            let Event::Leave(order) = event else { return Some(self.lost(&tunnel, event)) };
            let until = order.until;
            match self.change(&mut tunnel, order).await {
                Change::To(next) => {
                    let old = std::mem::replace(&mut tunnel, *next);
                    self.carried(&old);
                    self.take_up(&tunnel);
                    self.retire(old, until);
                }
                Change::Stay => {}
                Change::Ended(event) => return Some(self.lost(&tunnel, event)),
                Change::Stop => {
                    self.leave(tunnel).await;
                    return None;
                }
            }
        }
    }

    /// Finds the next tunnel while this one still serves.
    async fn change(&mut self, tunnel: &mut Tunnel, mut order: Leave) -> Change {
        let tasks = self.parts.tunnel.tasks.clone();
        loop {
            info!(shard = %tunnel.shard, order = order.why, streams = tunnel.load.count(), "ordered to another shard");
            self.heard_of(order.epoch);
            let epoch = self.epoch.load(Ordering::Relaxed);
            self.course.heard_of(epoch);
            if let Some(until) = order.until {
                let now = Instant::now();
                self.course.leaves(&tunnel.shard, epoch, now, until - now);
            }
            let Some(mut aside) = self.course.aside(&order.to) else {
                warn!(order = order.why, "no other shard is known: staying until the link ends");
                return Change::Stay;
            };
            let first = aside.first(order.wait, Instant::now());
            let next = tokio::select! {
                biased;
                () = tasks.stopping() => return Change::Stop,
                event = tunnel.event() => match event {
                    // A newer order replaces the older one.
                    Event::Leave(newer) => {
                        self.course.stayed(aside, &[], Instant::now());
                        order = newer;
                        continue;
                    }
                    Event::Lost(_) | Event::Refused(_) => {
                        let now = Instant::now();
                        self.course.stayed(aside, &[], now);
                        self.course.prefer(&order.to, now);
                        return Change::Ended(event);
                    }
                },
                next = timeout_at(order.by, self.arrive(&mut aside, first, false)) => next,
            };
            let Ok(next) = next else {
                warn!(order = order.why, "no other shard took this edge in time: staying");
                let missed = if order.until.is_none() { order.to.as_slice() } else { &[] };
                self.course.stayed(aside, missed, Instant::now());
                return Change::Stay;
            };
            self.course.returned(aside);
            return Change::To(Box::new(next));
        }
    }

    fn take_up(&mut self, tunnel: &Tunnel) {
        let (carrier, peer) = (tunnel.link.carrier(), tunnel.link.remote_address());
        info!(shard = %tunnel.shard, address = tunnel.address, %peer, %carrier, "tunnel up");
        self.carried_by(Some(carrier));
        self.parts.tunnel.metrics.connected.set(1);
        self.parts.tunnel.journal.up();
        self.parts.line.send_replace(Line {
            say: Some(tunnel.line()),
            pulse: Some(tunnel.pulse()),
            link: Some(tunnel.link.clone()),
            load: Some(tunnel.load.clone()),
            address: tunnel.address.clone(),
        });
        self.parts.phase.send_replace(Phase::Connected { shard: tunnel.shard.clone(), since: tunnel.since });
    }

    fn lost(&mut self, tunnel: &Tunnel, event: Event) -> Step {
        let lived = tunnel.since.elapsed();
        self.carried(tunnel);
        self.carried_by(None);
        self.parts.tunnel.metrics.connected.set(0);
        self.parts.line.send_replace(Line::default());
        let outcome = match event {
            Event::Refused(refuse) => {
                self.course.was_present();
                Outcome::Refused(refuse)
            }
            Event::Lost(end) => Outcome::Lost(end, lived),
            Event::Leave(order) => Outcome::Lost(LinkEnd::new(EndCause::Local, order.why), lived),
        };
        let journal = &self.parts.tunnel.journal;
        let cause = match &outcome {
            Outcome::Refused(refuse) => {
                let end = LinkEnd::new(EndCause::Closed(refuse.code), refuse.reason.clone());
                journal.lost(tunnel.link.carrier(), &tunnel.address, &end);
                refuse.code.slug()
            }
            Outcome::Lost(end, _) | Outcome::Failed(end) => {
                journal.lost(tunnel.link.carrier(), &tunnel.address, end);
                end.cause.slug()
            }
            Outcome::Redirected(_) => "redirect",
        };
        self.parts.tunnel.metrics.link_ends.with_label_values(&[cause]).inc();
        let step = self.course.step(&outcome, Instant::now(), self.parts.dice.fraction());
        self.tell(&tunnel.address, &outcome, &step, true);
        step
    }

    /// Says what a step ended with and what comes next.
    fn tell(&self, address: &str, outcome: &Outcome, step: &Step, show: bool) {
        let (cause, why) = match outcome {
            Outcome::Redirected(to) => {
                debug!(address, shard = %to.shard, "redirected");
                return;
            }
            Outcome::Failed(end) | Outcome::Lost(end, _) => {
                (end.cause, format!("{} ({})", end.cause.sentence(), end.detail))
            }
            Outcome::Refused(refuse) => (EndCause::Closed(refuse.code), refuse.reason.clone()),
        };
        let (until, next_s) = (Instant::now() + step.delay, step.delay.as_secs_f32());
        let phase = if let Some(kind) = identity_problem(cause) {
            self.parts.tunnel.metrics.identity_errors.with_label_values(&[kind]).inc();
            error!(address, kind, remedy = cause.sentence(), next = step.address, next_s, "{why}");
            Phase::Refused { kind, why: format!("{address}: {}", cause.sentence()), until }
        } else {
            let lost = matches!(outcome, Outcome::Lost(..));
            let what = if lost { "tunnel lost" } else { "no tunnel" };
            warn!(address, cause = cause.slug(), why, next = step.address, next_s, "{what}");
            Phase::Waiting { until, why: format!("{address}: {why}") }
        };
        if show {
            self.parts.phase.send_replace(phase);
        }
    }

    fn heard_of(&self, epoch: u64) {
        self.epoch.fetch_max(epoch, Ordering::Relaxed);
    }

    /// Lets an old tunnel end by itself.
    fn retire(&mut self, tunnel: Tunnel, until: Option<Instant>) {
        let (tasks, drain, cut) = (self.parts.tunnel.tasks.clone(), self.parts.drain, CancellationToken::new());
        self.retiring.push_back(cut.clone());
        if self.retiring.len() > MOST_RETIRING {
            self.retiring.pop_front().inspect(CancellationToken::cancel);
        }
        tunnel.say_bye(BYE_MOVED);
        let until = until.unwrap_or_else(|| Instant::now() + RETIRE);
        self.parts.tunnel.tasks.spawn(async move {
            let stopped = async {
                tasks.stopping().await;
                sleep(drain).await;
            };
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = stopped => {}
                _ = tunnel.link.ended() => return,
                _ = timeout_at(until, tunnel.load.quiet(QUIET.0)) => {}
            }
            info!(shard = %tunnel.shard, streams = tunnel.load.count(), "old tunnel closed");
            tunnel.link.close(CloseCode::Moved, "the edge moved to another shard");
        });
    }

    /// Ends the last tunnel because the process ends.
    async fn leave(&mut self, tunnel: Tunnel) {
        let streams = tunnel.load.count();
        info!(shard = %tunnel.shard, streams, "leaving");
        self.parts.line.send_replace(Line::default());
        tunnel.say_bye("the edge is shutting down");
        if timeout(self.parts.drain, tunnel.load.quiet(QUIET.1)).await.is_err() {
            warn!(streams = tunnel.load.count(), "streams are cut: the drain deadline has passed");
        }
        self.parts.tunnel.metrics.connected.set(0);
        self.carried_by(None);
        tunnel.link.close(CloseCode::Shutdown, "the edge is shutting down");
        sleep(LAST_WORD).await;
    }
}
