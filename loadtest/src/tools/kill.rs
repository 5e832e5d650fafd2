//! One shard is killed, or falls silent: how soon its edges serve again through the others, what their users are told
//! meanwhile, and whether anybody else notices.

use std::{collections::HashSet, process::ExitCode, sync::Arc, time::Duration};

use clap::Args;
use loadtest::probe::StreamEnd;
use parking_lot::Mutex;
use proto::{api::EdgeView, code::RefuseCode, id::EdgeId};
use rustix::process::Signal;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::fleet::{
    self, Fleet, Plan,
    load::{self, Load},
    report::Report,
    user::{HUNG, Outcome, Ways},
};

/// How long the fleet may take to come to rest before.
const SETTLE: Duration = Duration::from_secs(180);
/// How long lost edges are asked for.
const WATCHED: Duration = Duration::from_secs(30);
/// Pause between an answer that was no service and the next try.
const AGAIN: Duration = Duration::from_secs(1);
/// How much slower the others may be.
const OTHERS: f64 = 1.5;
/// For how long after the death the others are measured.
const AFTERMATH: Duration = Duration::from_secs(15);
/// Silence after which users take a shard for lost; short, so that they ask others about the edges.
const SILENCE: Duration = Duration::from_secs(3);

/// Which fleet, and which load.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Shards, one of which dies
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=20))]
    shards: u16,
    /// Edges
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    edges: u32,
    /// Streams to the other shards' edges that send something every second, and compare what comes back
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// New short streams per second to the other shards' edges
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// The shard is stopped and not killed, so that its packets are lost and nobody is told
    #[arg(long)]
    silent: bool,
    /// How many seconds to measure before
    #[arg(long, default_value_t = 15.0)]
    before: f64,
    /// Keeps configurations and logs
    #[arg(long)]
    keep: bool,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Kills a shard of a fleet under load.
pub(crate) async fn run(args: KillArgs) -> anyhow::Result<ExitCode> {
    let plan = Plan { silence: SILENCE, ..Plan::of(args.shards, args.edges, args.keep) };
    let json = args.json;
    fleet::run(plan, json, async move |fleet| measure(fleet, &args).await).await
}

/// What became of the lost edges and of requests to them.
#[derive(Debug, Default)]
struct Aftermath {
    /// After how long each served again.
    back: Vec<Duration>,
    refused: Vec<RefuseCode>,
    broken: usize,
    hung: usize,
}

impl Aftermath {
    /// Notes how a request ended; whether the edge served.
    fn note(&mut self, outcome: Outcome, took: Duration, back: Option<Duration>) -> bool {
        self.hung += usize::from(took >= HUNG);
        match outcome {
            Outcome::Served => {
                self.back.extend(back);
                return true;
            }
            Outcome::Hung => {}
            Outcome::Failed(StreamEnd::Refused(code)) => self.refused.push(code),
            Outcome::Failed(StreamEnd::Exact | StreamEnd::Broken(_) | StreamEnd::Wrong(_)) => self.broken += 1,
        }
        false
    }
}

async fn measure(fleet: &mut Fleet, args: &KillArgs) -> anyhow::Result<Report> {
    fleet.settled(fleet.shards.len(), SETTLE).await?;
    let victim = fleet.shards.len() - 1;
    let (lost, others) = edges_of(fleet, victim).await?;
    let survivors: Vec<usize> = (0..victim).collect();
    let plan = load::Plan {
        streams: args.streams,
        rate: args.rate,
        life: None,
        edges: others,
        through: Some(survivors.clone()),
    };
    let load = fleet.load(plan).await?;
    let (quiet, rested) = (Instant::now(), fleet.cpu());
    sleep(Duration::from_secs_f64(args.before)).await;
    fleet.note(format_args!("{} dies with {} edges", fleet.shards[victim].name, lost.len()));
    // What came up before is of no interest.
    while fleet.up.try_recv().is_ok() {}
    let (died, cpu) = (Instant::now(), fleet.cpu());
    let before = cpu.since(&rested);
    if args.silent {
        fleet.shards[victim].signal(Signal::STOP)?;
    } else {
        fleet.shards[victim].kill().await?;
    }
    let count = lost.len();
    let aftermath = watch(fleet, lost, &Arc::new(survivors), died).await?;
    sleep_until(died + AFTERMATH).await;
    let used = format!("{before}; {}", fleet.cpu().since(&cpu));
    report(args, fleet, &aftermath, count, (load, quiet, died, used)).await
}

/// The edges that a shard holds, as control says, and all others.
async fn edges_of(fleet: &Fleet, number: usize) -> anyhow::Result<(Vec<EdgeId>, Vec<EdgeId>)> {
    let edges: Vec<EdgeView> = fleet.api()?.get("/v1/edges").await?;
    let name = &fleet.shards[number].name;
    let here = |edge: &EdgeView| edge.presence.as_ref().is_some_and(|p| p.shard.as_str() == name);
    let (here, elsewhere): (Vec<_>, Vec<_>) = edges.into_iter().partition(here);
    let names = |edges: Vec<EdgeView>| edges.into_iter().map(|edge| edge.name).collect();
    Ok((names(here), names(elsewhere)))
}

/// Waits for every lost edge to have a tunnel again, and asks it through a shard that lives whether it serves. One in
/// ten is asked all the time and through any shard, as users do who know of nothing.
async fn watch(
    fleet: &mut Fleet,
    lost: Vec<EdgeId>,
    through: &Arc<Vec<usize>>,
    died: Instant,
) -> anyhow::Result<Aftermath> {
    let seen = Arc::new(Mutex::new(Aftermath::default()));
    let until = died + WATCHED;
    let mut asking = Vec::with_capacity(lost.len() * 2);
    for edge in lost.iter().step_by(10) {
        let (ways, seen) = (fleet.ways.clone(), Arc::clone(&seen));
        let edge = edge.clone();
        asking.push(fleet.tasks.spawn(async move { ask(&ways, &edge, None, (died, until), &seen).await }));
    }
    let mut missing: HashSet<_> = lost.into_iter().collect();
    while let (false, Ok(Some(edge))) = (missing.is_empty(), timeout_at(until, fleet.up.recv()).await) {
        if missing.remove(&edge) {
            let (ways, seen, through) = (fleet.ways.clone(), Arc::clone(&seen), Arc::clone(through));
            asking
                .push(fleet.tasks.spawn(async move { ask(&ways, &edge, Some(&through), (died, until), &seen).await }));
        }
    }
    for task in asking {
        task.await?;
    }
    let seen = std::mem::take(&mut *seen.lock());
    Ok(seen)
}

async fn ask(
    ways: &Ways,
    edge: &EdgeId,
    through: Option<&[usize]>,
    (died, until): (Instant, Instant),
    seen: &Mutex<Aftermath>,
) {
    while Instant::now() < until {
        let begun = Instant::now();
        let outcome = ways.request(edge, through).await;
        // Only those who ask where it can be answered tell when the edge is back.
        let back = through.is_some().then(|| died.elapsed());
        if seen.lock().note(outcome, begun.elapsed(), back) {
            return;
        }
        // Those who ask all the time keep to what a patient user does.
        let pause = if through.is_some() { AGAIN / 10 } else { AGAIN };
        sleep(pause.mul_f64(0.5 + rand::random::<f64>())).await;
    }
}

async fn report(
    args: &KillArgs,
    fleet: &Fleet,
    aftermath: &Aftermath,
    lost: usize,
    (load, quiet, died, used): (Load, Instant, Instant, String),
) -> anyhow::Result<Report> {
    let (before, after) = (load.requests(quiet..died), load.requests(died..died + AFTERMATH));
    let outcomes = load.stop().await;
    let ratio = after.p99_over(&before);
    #[allow(clippy::cast_precision_loss, reason = "some thousands")]
    let back = |seconds: u64| {
        let limit = Duration::from_secs(seconds);
        aftermath.back.iter().filter(|took| **took <= limit).count() as f64 / lost.max(1) as f64
    };
    let mut report = Report::default();
    if args.silent {
        report.at_least("lost edges that serve again within 15 s", back(15), 0.99, "");
    } else {
        report.at_least("lost edges that serve again within 5 s", back(5), 0.99, "");
        report.at_least("lost edges that serve again within 10 s", back(10), 1.0, "");
    }
    report.none("requests to lost edges without any answer", aftermath.hung);
    report.at_most("p99 of new streams to others, after over before", ratio, OTHERS, "");
    report.none("streams to others that broke", outcomes.broken);
    report.none("requests to others that failed", outcomes.failed);
    report.note("lost edges", lost);
    let mut order = aftermath.back.clone();
    order.sort_unstable();
    let by = |percent: usize| {
        let at = (order.len() * percent / 100).min(order.len().saturating_sub(1));
        order.get(at).map_or(f64::NAN, Duration::as_secs_f64)
    };
    report.note(
        "half of them, 99 % and all served again after",
        format_args!("{:.1}, {:.1}, {:.1} s", by(50), by(99), by(100)),
    );
    let mut codes = aftermath.refused.clone();
    codes.sort_unstable();
    for group in codes.chunk_by(|a, b| a == b) {
        report.note(&format!("requests to lost edges refused with {}", group[0]), group.len());
    }
    report.note("requests to lost edges that broke", aftermath.broken);
    report.note("new streams to others before", before);
    report.note("new streams to others after", after);
    report.note("processors before; after", used);
    report.note("edges connected at the end", fleet.connected());
    outcomes.tell(&mut report);
    report.field("back_5s", back(5));
    report.field("back_10s", back(10));
    if args.silent {
        report.field("back_15s", back(15));
    }
    report.field("hung_requests", aftermath.hung);
    report.field("others_p99_ratio", ratio);
    Ok(report)
}
