//! One shard more, under load: edges move to it while they serve, and nobody notices.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::{Instant, sleep};

use crate::fleet::{
    self, Fleet, Plan, RETIRED,
    load::{self, Load},
    report::Report,
};

/// What the move may take, and how much slower new streams may be meanwhile.
const GOALS: (f64, f64) = (30.0, 2.0);
/// How long a move may take before the run gives up.
const GIVE_UP: Duration = Duration::from_secs(180);
/// Load after the move, to see what comes late.
const AFTER: Duration = Duration::from_secs(3);

/// Which fleet, and which load.
#[derive(Debug, Args)]
pub(crate) struct ScaleOutArgs {
    /// Shards before
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=20))]
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

/// Adds a shard to a fleet under load.
pub(crate) async fn run(args: ScaleOutArgs) -> anyhow::Result<ExitCode> {
    let (plan, json) = (Plan::of(args.shards, args.edges, args.keep), args.json);
    fleet::run(plan, json, async move |fleet| measure(fleet, &args).await).await
}

async fn measure(fleet: &mut Fleet, args: &ScaleOutArgs) -> anyhow::Result<Report> {
    let members = usize::from(args.shards);
    fleet.settled(members, GIVE_UP).await?;
    let plan =
        load::Plan { streams: args.streams, rate: args.rate, life: None, edges: fleet.names.clone(), through: None };
    let load = fleet.load(plan).await?;
    let quiet = Instant::now();
    sleep(Duration::from_secs_f64(args.before)).await;
    fleet.note("one shard more");
    let (changed, cpu) = (Instant::now(), fleet.cpu());
    fleet.add_shard().await?;
    fleet.settled(members + 1, GIVE_UP).await?;
    let settled = Instant::now();
    fleet.note("every edge is at its owner");
    let used = fleet.cpu().since(&cpu);
    sleep(AFTER).await;
    let (before, during) = (load.requests(quiet..changed), load.requests(changed..settled));
    let outcomes = load.stop().await;
    let per_edge = fleet.tunnels_per_edge(RETIRED).await?;
    let (ratio, seconds) = (during.p99_over(&before), settled.duration_since(changed).as_secs_f64());

    let mut report = Report::default();
    report.none("streams that broke", outcomes.broken);
    report.none("requests that failed", outcomes.failed);
    report.one_tunnel(per_edge);
    report.at_most("p99 of new streams, during over before", ratio, GOALS.1, "");
    report.at_most("every edge at its owner after", seconds, GOALS.0, " s");
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

impl Fleet {
    /// Starts a load, and waits until all its streams tick and the beginning is forgotten.
    pub(crate) async fn load(&self, plan: load::Plan) -> anyhow::Result<Load> {
        let streams = plan.streams;
        let load = Load::start(&self.ways, plan, &self.tasks);
        let enough = streams - streams / 100;
        fleet::until("all streams tick", GIVE_UP, async || Ok(load.open() >= enough)).await?;
        sleep(AFTER).await;
        self.note(format_args!("{} streams tick", load.open()));
        Ok(load)
    }
}
