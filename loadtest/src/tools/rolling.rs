//! Every shard is stopped and started again in turn, under load, as an update does.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::{Instant, sleep};

use crate::fleet::{self, Fleet, Plan, RETIRED, load, report::Report};

/// How long anything may take before the run gives up.
const GIVE_UP: Duration = Duration::from_secs(180);
/// How long a shard may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// Part of the drain time that ticking streams live at most. A shard has sent its last edge away when half of the time
/// is over, so that streams which begin before and live for so long could end in time; hence they must.
const LIFE: f64 = 0.4;

/// Which fleet, and which load.
#[derive(Debug, Args)]
pub(crate) struct RollingArgs {
    /// Shards
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=20))]
    shards: u16,
    /// Edges
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    edges: u32,
    /// Streams that send something every second, and compare what comes back
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// New short streams per second
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Seconds that streams have when a shard stops; those that tick live for less than that
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(3..=600))]
    drain: u32,
    /// How many seconds to measure before the change
    #[arg(long, default_value_t = 15.0)]
    before: f64,
    /// Keeps configurations and logs
    #[arg(long)]
    keep: bool,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Restarts all shards of a fleet under load.
pub(crate) async fn run(args: RollingArgs) -> anyhow::Result<ExitCode> {
    let plan = Plan { drain: Duration::from_secs(args.drain.into()), ..Plan::of(args.shards, args.edges, args.keep) };
    let json = args.json;
    fleet::run(plan, json, async move |fleet| measure(fleet, &args).await).await
}

async fn measure(fleet: &mut Fleet, args: &RollingArgs) -> anyhow::Result<Report> {
    let members = fleet.shards.len();
    fleet.settled(members, GIVE_UP).await?;
    let drain = Duration::from_secs(args.drain.into());
    let longest = drain.mul_f64(LIFE);
    let plan = load::Plan {
        streams: args.streams,
        rate: args.rate,
        life: Some(longest / 4..longest),
        edges: fleet.names.clone(),
        through: None,
    };
    let load = fleet.load(plan).await?;
    let quiet = Instant::now();
    sleep(Duration::from_secs_f64(args.before)).await;
    let (changed, cpu) = (Instant::now(), fleet.cpu());
    for number in 0..members {
        let begun = Instant::now();
        fleet.shards[number].stop().await?;
        let stopped = begun.elapsed();
        fleet.shards[number].restart()?;
        let shard = &fleet.shards[number];
        fleet::until("the shard is ready again", READY, async || Ok(shard.is_ready().await)).await?;
        let (stopped, ready) = (stopped.as_secs_f64(), begun.elapsed().as_secs_f64());
        fleet.note(format_args!("{} stopped in {stopped:.1} s, ready after {ready:.1} s", shard.name));
    }
    fleet.settled(members, GIVE_UP).await?;
    let settled = Instant::now();
    let used = fleet.cpu().since(&cpu);
    let (before, during) = (load.requests(quiet..changed), load.requests(changed..settled));
    let outcomes = load.stop().await;
    let per_edge = fleet.tunnels_per_edge(RETIRED).await?;
    let (ratio, seconds) = (during.p99_over(&before), settled.duration_since(changed).as_secs_f64());

    let mut report = Report::default();
    report.none("streams that broke though they ended in time", outcomes.broken);
    report.none("requests that failed", outcomes.failed);
    report.one_tunnel(per_edge);
    report.note("p99 of new streams, during over before", format_args!("{ratio:.2}"));
    report.note("all restarted, every edge at its owner", format_args!("{seconds:.1} s"));
    report.note("new streams before", before);
    report.note("new streams during", during);
    report.note("processors during", used);
    outcomes.tell(&mut report);
    report.field("broken_streams", outcomes.broken);
    report.field("failed_requests", outcomes.failed);
    report.field("p99_ratio", ratio);
    report.field("seconds", seconds);
    Ok(report)
}
