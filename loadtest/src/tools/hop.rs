//! What it costs to enter the mesh at another shard than the one that holds the edge.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::Args;
use proto::{api::EdgeView, id::EdgeId};
use tokio::time::Instant;

use super::figures::Times;
use crate::fleet::{self, Fleet, Plan, report::Report, user::Outcome};

/// How long the fleet may take to come to rest before.
const SETTLE: Duration = Duration::from_secs(120);
/// What a hop may cost at the median, in microseconds.
const GOAL: f64 = 1000.0;
/// Pairs of requests before any is counted.
const WARM: usize = 100;

/// Which fleet, and how often.
#[derive(Debug, Args)]
pub(crate) struct HopArgs {
    /// Shards
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=20))]
    shards: u16,
    /// Edges
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    edges: u32,
    /// Pairs of requests, one after the other
    #[arg(long, default_value_t = 3000)]
    count: usize,
    /// Keeps configurations and logs
    #[arg(long)]
    keep: bool,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Measures both ways in turn.
pub(crate) async fn run(args: HopArgs) -> anyhow::Result<ExitCode> {
    let plan = Plan { users: 1, ..Plan::of(args.shards, args.edges, args.keep) };
    let (json, count) = (args.json, args.count);
    fleet::run(plan, json, async move |fleet| measure(fleet, count).await).await
}

async fn measure(fleet: &mut Fleet, count: usize) -> anyhow::Result<Report> {
    let shards = fleet.shards.len();
    fleet.settled(shards, SETTLE).await?;
    let edges: Vec<EdgeView> = fleet.api()?.get("/v1/edges").await?;
    let holder = |edge: EdgeView| {
        let at = edge.presence?.shard;
        Some((edge.name, fleet.shards.iter().position(|shard| shard.name == at.as_str())?))
    };
    let held: Vec<(EdgeId, usize)> = edges.into_iter().filter_map(holder).collect();
    let (mut straight, mut across) = (Times::default(), Times::default());
    for number in 0..WARM + count {
        let (edge, holder) = held.get(rand::random_range(0..held.len().max(1))).context("there is no edge")?;
        let other = (holder + rand::random_range(1..shards)) % shards;
        let mut both = [(*holder, &mut straight), (other, &mut across)];
        // Who comes second finds the edge awake.
        if number % 2 == 1 {
            both.reverse();
        }
        for (through, times) in both {
            let begun = Instant::now();
            match fleet.ways.request(edge, Some(&[through])).await {
                Outcome::Served if number >= WARM => times.add(begun.elapsed()),
                Outcome::Served => {}
                Outcome::Hung => bail!("no answer from {edge} through {}", fleet.shards[through].name),
                Outcome::Failed(end) => bail!("{edge} through {}: {end}", fleet.shards[through].name),
            }
        }
    }
    let mut forwarded = 0;
    for shard in &fleet.shards {
        forwarded += shard.figures().await?.count("mesh_shard_forwarded_total").unwrap_or_default();
    }
    let p50 = |times: &Times| times.per_mille_ms(500).unwrap_or(f64::NAN) * 1000.0;
    let extra = p50(&across) - p50(&straight);
    let mut report = Report::default();
    report.at_most("an extra hop, p50", extra, GOAL, " us");
    report.at_least("streams that took one", forwarded as f64, count as f64, "");
    report.note("through the holding shard", straight);
    report.note("through another one", across);
    report.field("p50_extra_us", extra);
    Ok(report)
}
