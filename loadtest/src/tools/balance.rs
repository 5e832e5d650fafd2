//! How evenly the ring spreads edges, whom a shard that comes or goes moves, and what asking for an owner costs.

use std::{collections::HashMap, hint::black_box, process::ExitCode};

use clap::Args;
use proto::{
    id::{EdgeId, ShardId},
    ring::{Member, Ring, RingSpec, WEIGHT},
};
use tokio::time::Instant;

use crate::fleet::report::Report;

/// Times that all edges are looked up.
const ROUNDS: usize = 101;

/// How many.
#[derive(Debug, Args)]
pub(crate) struct BalanceArgs {
    /// Equal shards
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(2..=1000))]
    shards: u16,
    /// Edges
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    edges: u32,
    /// Prints one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// Computes it all; no process is started.
pub(crate) fn run(args: &BalanceArgs) -> anyhow::Result<ExitCode> {
    let shards = usize::from(args.shards);
    let edges: Vec<EdgeId> = (0..args.edges).map(|i| format!("edge-{i}").parse()).collect::<Result<_, _>>()?;
    let (fewer, ring, more) = (ring_of(shards - 1)?, ring_of(shards)?, ring_of(shards + 1)?);
    let mut load: HashMap<&ShardId, f64> = HashMap::new();
    for owner in edges.iter().filter_map(|edge| ring.owner(edge)) {
        *load.entry(&owner.shard).or_default() += 1.0;
    }
    let mean = f64::from(args.edges) / f64::from(args.shards);
    let max_over_mean = load.values().fold(0.0_f64, |max, n| max.max(*n)) / mean;
    let newcomer: ShardId = name_of(shards + 1).parse()?;
    let (on_add, not_to_it) = moved(&edges, &ring, &more, |_, to| *to == newcomer);
    let leaver: ShardId = name_of(shards).parse()?;
    let (on_remove, not_from_it) = moved(&edges, &ring, &fewer, |from, _| *from == leaver);
    let (fair_on_add, fair_on_remove) = (1.0 / f64::from(args.shards + 1), 1.0 / f64::from(args.shards));
    let lookup_ns = lookup(&ring, &edges);

    let mut report = Report::default();
    report.at_most("fullest shard over the mean", max_over_mean, 1.10, "");
    report.at_most("moved when one is added, of a fair share", on_add / fair_on_add, 1.1, "");
    report.at_most("moved when one is taken away, of a fair share", on_remove / fair_on_remove, 1.1, "");
    report.none("moved otherwise than to or from that one", not_to_it + not_from_it);
    report.at_most("asking for an owner, median", lookup_ns, 1000.0, " ns");
    report.note("shards, edges", format_args!("{}, {}", args.shards, args.edges));
    report.field("max_over_mean", max_over_mean);
    report.field("moved_on_add", on_add);
    report.field("fair_on_add", fair_on_add);
    report.field("moved_elsewhere", not_to_it + not_from_it);
    report.field("lookup_ns", lookup_ns);
    report.print(args.json)
}

fn name_of(number: usize) -> String {
    format!("shard-{number}")
}

fn ring_of(shards: usize) -> anyhow::Result<Ring> {
    let member = |number| {
        let addresses = vec![format!("shard-{number}.mesh:7400")];
        anyhow::Ok(Member { shard: name_of(number).parse()?, addresses, weight: WEIGHT })
    };
    Ok(Ring::new(RingSpec { epoch: 1, members: (1..=shards).map(member).collect::<Result<_, _>>()? }))
}

/// The fraction of edges that have another owner, and how many of those moved as they should not.
fn moved(edges: &[EdgeId], from: &Ring, to: &Ring, right: impl Fn(&ShardId, &ShardId) -> bool) -> (f64, usize) {
    let owners = edges.iter().filter_map(|edge| Some((&from.owner(edge)?.shard, &to.owner(edge)?.shard)));
    let moves: Vec<_> = owners.filter(|(before, after)| before != after).collect();
    let wrong = moves.iter().filter(|(before, after)| !right(before, after)).count();
    #[allow(clippy::cast_precision_loss, reason = "a million at most")]
    let fraction = moves.len() as f64 / edges.len() as f64;
    (fraction, wrong)
}

/// Nanoseconds for one owner: the median of rounds over all edges.
fn lookup(ring: &Ring, edges: &[EdgeId]) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            for edge in edges {
                black_box(ring.owner(black_box(edge)));
            }
            #[allow(clippy::cast_precision_loss, reason = "a million at most")]
            let each = begun.elapsed().as_secs_f64() * 1e9 / edges.len() as f64;
            each
        })
        .collect();
    rounds.sort_unstable_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}
