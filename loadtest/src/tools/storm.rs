//! Very many edges come back to one shard at once: first because it was killed and is started again; then because their
//! way to it was cut, while other edges and their streams stay.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Args;
use proto::id::EdgeId;
use runtime::shutdown::Tasks;
use rustix::process::Signal;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};

use crate::fleet::{
    self, Fleet, Plan,
    load::{self, Load, Outcomes},
    report::Report,
    user::{Outcome, Ways},
};

/// What must hold.
const SECONDS: f64 = 60.0;
const MEMORY: f64 = 1024.0;
/// How long a storm may last before the run gives up.
const GIVE_UP: Duration = Duration::from_secs(300);
/// How long a shard may take to forget edges that fell silent.
const FORGET: Duration = Duration::from_secs(60);
/// Requests at once, when every edge is asked.
const AT_ONCE: usize = 64;
/// Load after a storm, to see what comes late.
const AFTER: Duration = Duration::from_secs(5);

/// How many.
#[derive(Debug, Args)]
pub(crate) struct StormArgs {
    /// Edges that come back at once
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    edges: u32,
    /// Edges whose way is not cut, for the streams that live through it
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    live: u16,
    /// Streams to these that send something every second, and compare what comes back
    #[arg(long, default_value_t = 200)]
    streams: usize,
    /// Keeps configurations and logs
    #[arg(long)]
    keep: bool,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Lets both storms loose on a fleet of one shard.
pub(crate) async fn run(args: StormArgs) -> anyhow::Result<ExitCode> {
    let plan = Plan::of(1, args.edges, args.keep);
    let json = args.json;
    fleet::run(plan, json, async move |fleet| measure(fleet, &args).await).await
}

/// What a storm came to.
struct Storm {
    seconds: f64,
    peak_mib: f64,
    unserved: usize,
    used: String,
    live: Outcomes,
}

impl Storm {
    /// A stream that broke is one that starved to death.
    const fn starved(&self) -> usize {
        self.live.starved + self.live.broken
    }
}

async fn measure(fleet: &mut Fleet, args: &StormArgs) -> anyhow::Result<Report> {
    let stormy = fleet.edges.len();
    fleet.add_edges("live", args.live.into()).await?;
    let live: Vec<EdgeId> = fleet.names[fleet.names.len() - usize::from(args.live)..].to_vec();
    let plan = load::Plan { streams: args.streams, rate: 0.0, life: None, edges: live, through: None };
    let crash = crash(fleet, plan.clone()).await?;
    let cut = cut(fleet, stormy, plan).await?;

    let mut report = Report::default();
    let seconds = cut.seconds.max(crash.seconds);
    let peak = cut.peak_mib.max(crash.peak_mib);
    let starved = cut.starved() + crash.starved();
    report.at_most("all edges served after their way was cut", cut.seconds, SECONDS, " s");
    report.at_most("all edges served after the shard was killed", crash.seconds, SECONDS, " s");
    report.none("edges that did not serve then", cut.unserved + crash.unserved);
    report.at_most("memory of the shard, at its peak", peak, MEMORY, " MiB");
    report.none("live streams with an echo later than 2 s, or broken", starved);
    report.note("edges", fleet.names.len());
    for (storm, what) in [(&cut, "cut"), (&crash, "killed")] {
        report.note(&format!("processors ({what})"), &storm.used);
        storm.live.tell(&mut report);
    }
    report.field("seconds", seconds);
    report.field("rss_mib", peak);
    report.field("starved_streams", starved);
    Ok(report)
}

/// Stops the edges until the shard has forgotten them, and lets them go on.
async fn cut(fleet: &mut Fleet, stormy: usize, plan: load::Plan) -> anyhow::Result<Storm> {
    let load = fleet.load(plan).await?;
    for edges in &fleet.edges[..stormy] {
        edges.signal(Signal::STOP)?;
    }
    let staying = fleet.edges[stormy..].iter().map(fleet::edges::Edges::connected).sum::<usize>() as u64;
    fleet::until("the shard has forgotten them", FORGET, async || Ok(fleet.tunnels(true).await? <= staying)).await?;
    fleet.note("the edges come back after a cut");
    let (begun, cpu) = (Instant::now(), fleet.cpu());
    for edges in &fleet.edges[..stormy] {
        edges.signal(Signal::CONT)?;
    }
    finish(fleet, load, begun, cpu).await
}

/// Kills the shard and starts it again.
async fn crash(fleet: &mut Fleet, plan: load::Plan) -> anyhow::Result<Storm> {
    fleet.shards[0].kill().await?;
    fleet.note("the edges come back after a crash");
    let (begun, cpu) = (Instant::now(), fleet.cpu());
    fleet.shards[0].restart()?;
    let load = Load::start(&fleet.ways, plan, &fleet.tasks);
    finish(fleet, load, begun, cpu).await
}

/// Waits until the shard has all tunnels, and asks every edge whether it serves.
async fn finish(fleet: &mut Fleet, load: Load, begun: Instant, cpu: fleet::Cpu) -> anyhow::Result<Storm> {
    let all = fleet.names.len() as u64;
    fleet::until("the shard has all edges again", GIVE_UP, async || {
        fleet.edges.iter_mut().try_for_each(fleet::edges::Edges::check)?;
        Ok(fleet.tunnels(true).await? >= all)
    })
    .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let used = fleet.cpu().since(&cpu);
    fleet.note(format_args!("all tunnels are there after {seconds:.1} s"));
    let unserved = unserved(&fleet.ways, &fleet.names, &fleet.tasks).await?;
    sleep(AFTER).await;
    Ok(Storm { seconds, peak_mib: fleet.shards[0].peak_mib()?, unserved, used, live: load.stop().await })
}

/// Asks every edge once; how many did not serve.
async fn unserved(ways: &Ways, edges: &[EdgeId], tasks: &Tasks) -> anyhow::Result<usize> {
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = Vec::with_capacity(edges.len());
    for edge in edges {
        let permit = Arc::clone(&permits).acquire_owned().await?;
        let (ways, edge) = (ways.clone(), edge.clone());
        asking.push(tasks.spawn(async move {
            let outcome = ways.request(&edge, None).await;
            drop(permit);
            outcome
        }));
    }
    let mut unserved = 0;
    for asked in asking {
        match asked.await? {
            Outcome::Served => {}
            failed @ (Outcome::Hung | Outcome::Failed(_)) => {
                unserved += 1;
                tracing::debug!(?failed, "not served");
            }
        }
    }
    Ok(unserved)
}
