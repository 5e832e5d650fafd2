//! The load: streams that tick, and new short streams at a fixed rate. Every time counts from the moment when something
//! was due, whatever held it up, and every sample is kept.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use loadtest::probe::{StreamEnd, pattern};
use parking_lot::Mutex;
use proto::id::EdgeId;
use runtime::{link::Stream, shutdown::Tasks};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    report::Report,
    user::{HUNG, Outcome, Ways},
};
use crate::tools::figures::Times;

/// Time between two ticks of a stream.
const TICK: Duration = Duration::from_secs(1);
/// Bytes of a tick.
const SIZE: u64 = 64;
/// Time between the openings of two ticking streams, at the start.
const SPACING: Duration = Duration::from_millis(3);
/// A tick that comes back later than this was starved.
const STARVED: Duration = Duration::from_secs(2);
/// How many failures are kept as examples.
const EXAMPLES: usize = 5;

/// Which load.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Streams that tick.
    pub(crate) streams: usize,
    /// New streams per second.
    pub(crate) rate: f64,
    /// How long a ticking stream lives before another one takes its place; without it, until the end.
    pub(crate) life: Option<Range<Duration>>,
    /// Towards these edges.
    pub(crate) edges: Vec<EdgeId>,
    /// Through these shards only.
    pub(crate) through: Option<Vec<usize>>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    due: Instant,
    took: Duration,
}

#[derive(Debug, Default)]
struct Seen {
    requests: Vec<Sample>,
    ticks: Vec<Sample>,
    failed: usize,
    hung: usize,
    broken: usize,
    broken_with_shard: usize,
    ended_well: usize,
    examples: BTreeMap<&'static str, Vec<String>>,
}

#[derive(Debug)]
struct Shared {
    ways: Ways,
    plan: Plan,
    seen: Mutex<Seen>,
    open: AtomicUsize,
    stop: CancellationToken,
}

/// A load that runs until it is stopped.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    tasks: Tasks,
}

impl Load {
    /// Begins.
    pub(crate) fn start(ways: &Ways, plan: Plan, tasks: &Tasks) -> Self {
        let streams = plan.streams;
        let shared = Shared {
            ways: ways.clone(),
            plan,
            seen: Mutex::default(),
            open: AtomicUsize::new(0),
            stop: CancellationToken::new(),
        };
        let load = Self { shared: Arc::new(shared), tasks: tasks.child() };
        for number in 0..streams {
            let shared = Arc::clone(&load.shared);
            load.tasks.spawn(async move {
                sleep(SPACING * u32::try_from(number).unwrap_or_default()).await;
                shared.keep_ticking().await;
            });
        }
        load.tasks.spawn(Arc::clone(&load.shared).keep_asking(load.tasks.clone()));
        load
    }

    /// How many streams tick now.
    pub(crate) fn open(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// How long the new streams took that were due in that time.
    pub(crate) fn requests(&self, within: Range<Instant>) -> Times {
        times(&self.shared.seen.lock().requests, within)
    }

    /// Ends all streams cleanly, and tells what came of everything.
    pub(crate) async fn stop(self) -> Outcomes {
        self.shared.stop.cancel();
        self.tasks.finished(HUNG * 2).await;
        self.tasks.stop();
        let seen = self.shared.seen.lock();
        Outcomes {
            requests: seen.requests.len(),
            failed: seen.failed,
            hung: seen.hung,
            ticks: seen.ticks.len(),
            starved: seen.ticks.iter().filter(|tick| tick.took > STARVED).count(),
            broken: seen.broken,
            broken_with_shard: seen.broken_with_shard,
            ended_well: seen.ended_well,
            examples: seen.examples.values().flatten().cloned().collect(),
        }
    }
}

/// What came of a load.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcomes {
    /// Requests that were served.
    pub(crate) requests: usize,
    /// Requests that were not, those that hung among them.
    pub(crate) failed: usize,
    /// Requests that got neither an answer nor a refusal.
    pub(crate) hung: usize,
    /// Ticks that came back.
    pub(crate) ticks: usize,
    /// Those that came back late.
    pub(crate) starved: usize,
    /// Ticking streams that broke.
    pub(crate) broken: usize,
    /// Those among them whose user lost the link to the shard.
    pub(crate) broken_with_shard: usize,
    /// Ticking streams that ended when they should, with every byte.
    pub(crate) ended_well: usize,
    /// What some of the failures said.
    pub(crate) examples: Vec<String>,
}

impl Outcomes {
    /// Tells in a report what has no goal of its own.
    pub(crate) fn tell(&self, report: &mut Report) {
        report.note("requests served, hung", format_args!("{}, {}", self.requests, self.hung));
        report.note("ticks that came back, late ones among them", format_args!("{}, {}", self.ticks, self.starved));
        report.note("ticking streams that ended well", self.ended_well);
        report.note("ticking streams that lost their shard", self.broken_with_shard);
        for example in &self.examples {
            report.note(&format!("for example: {example}"), "");
        }
    }
}

fn times(samples: &[Sample], within: Range<Instant>) -> Times {
    let mut times = Times::default();
    samples.iter().filter(|sample| within.contains(&sample.due)).for_each(|sample| times.add(sample.took));
    times
}

impl Shared {
    fn some_edge(&self) -> &EdgeId {
        &self.plan.edges[rand::random_range(0..self.plan.edges.len())]
    }

    fn note_failure(&self, edge: &EdgeId, outcome: &Outcome) {
        let mut seen = self.seen.lock();
        seen.failed += 1;
        let why = match outcome {
            Outcome::Served => "served".to_owned(),
            Outcome::Hung => {
                seen.hung += 1;
                format!("neither answer nor refusal within {} s", HUNG.as_secs())
            }
            Outcome::Failed(end) => end.to_string(),
        };
        seen.example("request", format!("request to {edge}: {why}"));
    }

    /// One request when it is due, again and again.
    async fn keep_asking(self: Arc<Self>, tasks: Tasks) {
        if self.plan.rate <= 0.0 {
            return;
        }
        let period = Duration::from_secs_f64(1.0 / self.plan.rate);
        let mut due = Instant::now();
        while !self.stop.is_cancelled() {
            sleep_until(due).await;
            let (shared, was_due) = (Arc::clone(&self), due);
            tasks.spawn(async move {
                let edge = shared.some_edge();
                match shared.ways.request(edge, shared.plan.through.as_deref()).await {
                    Outcome::Served => {
                        let sample = Sample { due: was_due, took: was_due.elapsed() };
                        shared.seen.lock().requests.push(sample);
                    }
                    outcome @ (Outcome::Hung | Outcome::Failed(_)) => shared.note_failure(edge, &outcome),
                }
            });
            due += period;
        }
    }

    /// One ticking stream after the other.
    async fn keep_ticking(&self) {
        while !self.stop.is_cancelled() {
            let edge = self.some_edge();
            let (stream, link) = match self.ways.open(edge, self.plan.through.as_deref(), Instant::now() + HUNG).await {
                Ok(opened) => opened,
                Err(outcome) => {
                    self.note_failure(edge, &outcome);
                    sleep(TICK).await;
                    continue;
                }
            };
            self.open.fetch_add(1, Ordering::Relaxed);
            let until = self.plan.life.clone().map(|life| Instant::now() + rand::random_range(life));
            let end = self.tick(stream, until).await;
            self.open.fetch_sub(1, Ordering::Relaxed);
            let mut seen = self.seen.lock();
            match end {
                Ok(()) => seen.ended_well += 1,
                Err(end) => {
                    seen.broken += 1;
                    let lost = link.end();
                    seen.broken_with_shard += usize::from(lost.is_some());
                    let where_ = lost.map_or_else(|| "behind the shard".into(), |end| format!("with its link: {end}"));
                    seen.example("stream", format!("stream to {edge}: {end} ({where_})"));
                }
            }
        }
    }

    async fn tick(&self, mut stream: Stream, until: Option<Instant>) -> Result<(), StreamEnd> {
        let number = rand::random();
        let (mut due, mut sent, mut seen) = (Instant::now() + TICK.mul_f64(rand::random()), 0, 0);
        let mut outstanding: VecDeque<(u64, Instant)> = VecDeque::new();
        loop {
            let over = self.stop.is_cancelled() || until.is_some_and(|until| Instant::now() >= until);
            if over && outstanding.is_empty() {
                return end(stream).await;
            }
            let missing = outstanding.front().map_or(due, |(_, due)| *due) + HUNG;
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if !over => {}
                () = sleep_until(due), if !over => {
                    sent += SIZE;
                    outstanding.push_back((sent, due));
                    stream.send.write_one(pattern(number, sent - SIZE, SIZE)).await?;
                    due += TICK;
                }
                chunk = stream.recv.chunk(4096) => {
                    let Some(chunk) = chunk? else { return Err(StreamEnd::Wrong("a clean end in the middle".into())) };
                    if chunk != pattern(number, seen, chunk.len() as u64) {
                        return Err(StreamEnd::Wrong("other bytes came back".into()));
                    }
                    seen += chunk.len() as u64;
                    while let Some((_, due)) = outstanding.pop_front_if(|(end, _)| *end <= seen) {
                        self.seen.lock().ticks.push(Sample { due, took: due.elapsed() });
                    }
                }
                () = sleep_until(missing) => return Err(StreamEnd::Broken("an echo is missing".into())),
            }
        }
    }
}

/// The clean end, in both directions.
async fn end(mut stream: Stream) -> Result<(), StreamEnd> {
    stream.send.finish();
    match timeout(HUNG, stream.recv.chunk(4096)).await {
        Ok(Ok(None)) => Ok(()),
        Ok(Ok(Some(_))) => Err(StreamEnd::Wrong("bytes that nobody sent".into())),
        Ok(Err(e)) => Err(e.into()),
        Err(_) => Err(StreamEnd::Broken("the end was not answered".into())),
    }
}

impl Seen {
    fn example(&mut self, kind: &'static str, example: String) {
        let examples = self.examples.entry(kind).or_default();
        if examples.len() < EXAMPLES {
            examples.push(example);
        }
    }
}
