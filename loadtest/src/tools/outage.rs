//! Control goes away under load: it is stopped, then killed; its database can only be read; one replica and then the
//! other is cut from the database, and a shard joins meanwhile. Streams and routing must go on, and nobody may be in two
//! minds about who owns what.

use std::{collections::BTreeMap, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Args;
use parking_lot::Mutex;
use rustix::process::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::fleet::{self, Admins, Fleet, Plan, RETIRED, http::Figures, load, report::Report};

/// How long anything may take before the run gives up.
const GIVE_UP: Duration = Duration::from_secs(120);
/// Longest time for which the database can only be read, and a replica is cut from it.
const DATABASE: Duration = Duration::from_secs(60);
/// How often shards are asked what they count.
const LOOK: Duration = Duration::from_millis(500);
/// An edge may have two tunnels while it moves, and for no longer than this.
const MOVING: Duration = Duration::from_secs(10);

/// Which fleet, which load, and for how long.
#[derive(Debug, Args)]
pub(crate) struct OutageArgs {
    /// Shards
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=20))]
    shards: u16,
    /// Edges
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    edges: u32,
    /// Streams that send something every second, and compare what comes back
    #[arg(long, default_value_t = 500)]
    streams: usize,
    /// New short streams per second
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// For how many seconds control is away, half of it stopped and half of it killed
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    seconds: u32,
    /// Keeps configurations and logs
    #[arg(long)]
    keep: bool,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Takes control away from a fleet under load, in every way.
pub(crate) async fn run(args: OutageArgs) -> anyhow::Result<ExitCode> {
    let plan = Plan { controls: 2, ..Plan::of(args.shards, args.edges, args.keep) };
    let json = args.json;
    fleet::run(plan, json, async move |fleet| measure(fleet, &args).await).await
}

/// What was seen of the shards.
#[derive(Debug, Default)]
struct Seen {
    epochs: BTreeMap<String, u64>,
    backwards: Vec<String>,
    /// Since when there are more tunnels that answer than edges.
    double_since: Option<Instant>,
    double: u64,
    unanswered: usize,
    looks: usize,
}

impl Seen {
    fn look(&mut self, figures: &[(String, Option<Figures>)], edges: u64) {
        self.looks += 1;
        let (mut tunnels, mut leaving) = (0, 0);
        for (shard, figures) in figures {
            let Some(figures) = figures else {
                self.unanswered += 1;
                continue;
            };
            // A tunnel that an edge has left for another one answers nobody; it waits for its last streams to end.
            tunnels += figures.count("mesh_shard_tunnels").unwrap_or_default();
            leaving += figures.count("mesh_shard_tunnels_leaving").unwrap_or_default();
            let epoch = figures.count("mesh_shard_ring_epoch").unwrap_or_default();
            let before = self.epochs.insert(shard.clone(), epoch).unwrap_or_default();
            if epoch < before {
                self.backwards.push(format!("{shard}: from {before} to {epoch}"));
            }
        }
        let tunnels = tunnels - leaving.min(tunnels);
        if tunnels <= edges {
            self.double_since = None;
        } else if self.double_since.get_or_insert_with(Instant::now).elapsed() > MOVING {
            self.double = self.double.max(tunnels - edges);
        }
    }
}

async fn measure(fleet: &mut Fleet, args: &OutageArgs) -> anyhow::Result<Report> {
    fleet.settled(fleet.shards.len(), GIVE_UP).await?;
    let plan =
        load::Plan { streams: args.streams, rate: args.rate, life: None, edges: fleet.names.clone(), through: None };
    let load = fleet.load(plan).await?;
    let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), CancellationToken::new());
    let looking = keep_looking(Arc::clone(&fleet.admins), fleet.names.len() as u64, Arc::clone(&seen));
    let looking = fleet.tasks.spawn(stop.clone().run_until_cancelled_owned(looking));
    let begun = Instant::now();
    outages(fleet, Duration::from_secs(args.seconds.into())).await?;
    let ended = Instant::now();
    let rest = fleet.settled(fleet.shards.len(), GIVE_UP).await?;
    fleet.note(format_args!("every edge is at its owner {:.1} s later", rest.as_secs_f64()));
    stop.cancel();
    looking.await?;
    let requests = load.requests(begun..ended);
    let outcomes = load.stop().await;
    let per_edge = fleet.tunnels_per_edge(RETIRED).await?;
    let seen = std::mem::take(&mut *seen.lock());

    let mut report = Report::default();
    report.none("streams that broke", outcomes.broken);
    report.none("requests that failed", outcomes.failed);
    report.none("times that a shard's epoch went back", seen.backwards.len());
    report.none("edges with two owners that answer", usize::try_from(seen.double)?);
    report.one_tunnel(per_edge);
    for backwards in &seen.backwards {
        report.note(backwards, "");
    }
    report.note("looks at all shards", seen.looks);
    report.note("shards that did not answer a look", seen.unanswered);
    report.note("epoch at the end", seen.epochs.values().max().copied().unwrap_or_default());
    report.note("new streams meanwhile", requests);
    outcomes.tell(&mut report);
    report.field("broken_streams", outcomes.broken);
    report.field("failed_requests", outcomes.failed);
    report.field("epoch_went_back", seen.backwards.len());
    report.field("double_owner", seen.double);
    report.field("tunnels_per_edge", per_edge);
    Ok(report)
}

/// Looks at every shard again and again; more of them may come.
async fn keep_looking(shards: Admins, edges: u64, seen: Arc<Mutex<Seen>>) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let now = shards.lock().clone();
        let mut figures = Vec::with_capacity(now.len());
        for (shard, admin) in now {
            figures.push((shard, Figures::of(admin).await.ok()));
        }
        seen.lock().look(&figures, edges);
    }
}

/// One outage after the other, each with an end.
async fn outages(fleet: &mut Fleet, away: Duration) -> anyhow::Result<()> {
    fleet.note("control is stopped");
    for control in &fleet.controls {
        control.signal(Signal::STOP)?;
    }
    sleep(away / 2).await;
    fleet.note("control is killed");
    for control in &mut fleet.controls {
        control.kill().await?;
    }
    sleep(away / 2).await;
    fleet.note("control is back");
    for control in &mut fleet.controls {
        control.restart()?;
    }
    followed(fleet).await?;
    let short = away.min(DATABASE);
    fleet.note("the database can only be read");
    let postgres = fleet.postgres.as_ref().context("there is no PostgreSQL")?;
    postgres.read_only(true).await?;
    sleep(short).await;
    postgres.read_only(false).await?;
    for number in 0..fleet.controls.len() {
        fleet.note(format_args!("control-{} is cut from the database", number + 1));
        let way = fleet.controls[number].database.as_ref().context("it has no way to a database")?;
        way.cut(true);
        sleep(short / 2).await;
        if number + 1 == fleet.controls.len() {
            // The first one, which is asked, is whole: so there is a new ring while the other still has the old one.
            fleet.note("one shard more, meanwhile");
            fleet.add_shard().await?;
        }
        sleep(short / 2).await;
        let way = fleet.controls[number].database.as_ref().context("it has no way to a database")?;
        way.cut(false);
    }
    followed(fleet).await
}

/// Waits until every shard follows control again.
async fn followed(fleet: &Fleet) -> anyhow::Result<()> {
    fleet::until("all shards follow control again", GIVE_UP, async || {
        for shard in &fleet.shards {
            if shard.figures().await?.count("mesh_shard_control_connected") != Some(1) {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await
}
