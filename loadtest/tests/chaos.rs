//! Anything, in any order: random operations on a simulated mesh, and what must be true afterwards.

#[path = "support/sim.rs"]
mod sim;

use std::time::Duration;

use anyhow::ensure;
use loadtest::{
    cluster::{
        Cluster, Layout,
        control::database::Health,
        hand::Version,
        op::{Op, Size},
    },
    simnet::seed_for,
};
use proto::api::ShardOrder;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sim::{play, seeds};

/// Operations of a story.
const OPERATIONS: usize = 80;

fn layout(seed: u64) -> Layout {
    let mut chance = StdRng::seed_from_u64(seed_for(seed, "layout"));
    Layout {
        shards: chance.random_range(1..=3),
        edges: chance.random_range(1..=10),
        users: chance.random_range(1..=4),
        drain_secs: chance.random_range(1..=20),
        replicas: chance.random_range(1..=3),
        ..Layout::default()
    }
}

/// Everything passes, runs and is wanted again, and the mesh becomes calm (rule 6).
async fn heal(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.run(&[Op::Heal, Op::Loss(0), Op::Database(Health::Good)]).await?;
    for replica in 0..cluster.control.replicas.len() {
        cluster.control.start(replica);
    }
    for shard in 0..cluster.shards.len() {
        cluster.start_shard(shard)?;
        cluster.order(shard, ShardOrder::Serve);
    }
    cluster.calm().await?;
    Ok(())
}

async fn chaos(cluster: &mut Cluster, operations: usize) -> anyhow::Result<()> {
    let size = Size::from(layout(cluster.seed()));
    let mut chance = StdRng::seed_from_u64(seed_for(cluster.seed(), "story"));
    for edge in &mut cluster.edges {
        edge.version = match chance.random_range(0..10) {
            0 => Version::Before,
            1 => Version::After,
            _ => Version::This,
        };
    }
    cluster.start_edges()?;
    for _ in 0..operations {
        cluster.run(&[Op::draw(&mut chance, size)]).await?;
    }
    heal(cluster).await?;
    // Rule 1: every stream was byte-exact or failed visibly.
    let tally = cluster.streams_ended().await?;
    // And the mesh serves as if nothing had been. Users come anew: a link of theirs may still wait for a dead shard.
    cluster.users.iter().for_each(|user| user.leave());
    let alive: Vec<_> = (0..size.edges).filter(|&e| cluster.edges[e].running.is_some()).collect();
    for &edge in &alive {
        cluster.open_streams(0, edge, 1, 20_000);
    }
    let after = cluster.streams_ended().await?;
    ensure!(after.exact == alive.len(), "after all is healed: {after:?}");
    eprintln!(
        "seed {}: {size:?}; {} exact, {} refused, {} broken in {:?}",
        cluster.seed(),
        tally.exact,
        tally.refused.values().sum::<usize>(),
        tally.broken(),
        cluster.net.elapsed()
    );
    Ok(())
}

#[test]
fn whatever_happens_the_rules_hold() {
    for seed in seeds(1..=20) {
        play("whatever_happens_the_rules_hold", seed, layout(seed), async |cluster| chaos(cluster, OPERATIONS).await);
    }
}

/// What people do on purpose: rule 10 says that nobody feels it.
async fn planned(cluster: &mut Cluster, operations: usize) -> anyhow::Result<()> {
    let size = Size::from(planned_layout(cluster.seed()));
    let mut chance = StdRng::seed_from_u64(seed_for(cluster.seed(), "plan"));
    cluster.start_edges()?;
    cluster.calm().await?;
    let mut changes = 0;
    for _ in 0..operations {
        let op = Op::draw_planned(&mut chance, size);
        // People see to it that somebody serves, and that a shard has stopped before they start it again.
        if let Op::StopShard(shard) | Op::Order(shard, ShardOrder::Drain | ShardOrder::Cordon) = op
            && cluster.in_service().iter().all(|s| *s == shard)
        {
            continue;
        }
        if matches!(op, Op::StopShard(_) | Op::StartShard(_) | Op::Order(..)) {
            stopped(cluster).await?;
            cluster.calm().await?;
            changes += 1;
        }
        cluster.run(&[op]).await?;
    }
    stopped(cluster).await?;
    heal(cluster).await?;
    let tally = cluster.streams_ended().await?;
    eprintln!("seed {}: {changes} changes, {} exact", cluster.seed(), tally.exact);
    ensure!(tally.broken() == 0 && tally.refused() == 0, "rule 10: {tally:?}");
    Ok(())
}

/// Waits until whoever was asked to stop has.
async fn stopped(cluster: &Cluster) -> anyhow::Result<()> {
    let limit = Duration::from_secs(60);
    cluster.wait_for("the last one has stopped", limit, |c| c.leaving() == 0).await?;
    Ok(())
}

fn planned_layout(seed: u64) -> Layout {
    let mut chance = StdRng::seed_from_u64(seed_for(seed, "planned layout"));
    Layout {
        shards: chance.random_range(2..=4),
        edges: chance.random_range(1..=12),
        users: chance.random_range(1..=4),
        replicas: chance.random_range(1..=3),
        ..Layout::default()
    }
}

#[test]
fn what_is_done_on_purpose_is_not_felt() {
    for seed in seeds(1..=10) {
        play("what_is_done_on_purpose", seed, planned_layout(seed), async |cluster| planned(cluster, OPERATIONS).await);
    }
}

#[test]
fn one_seed_is_one_story() {
    for seed in seeds([3, 8]) {
        let run =
            || play("one_seed_is_one_story", seed, layout(seed), async |cluster| chaos(cluster, OPERATIONS).await);
        let (first, second) = (run(), run());
        if let Some(difference) = first.difference(&second) {
            panic!("seed {seed}: {difference}");
        }
        assert!(first.len() > 100, "something happened");
        let plan = || {
            play("one_seed_is_one_story", seed, planned_layout(seed), async |cluster| {
                planned(cluster, OPERATIONS).await
            })
        };
        if let Some(difference) = plan().difference(&plan()) {
            panic!("seed {seed}: {difference}");
        }
        let other = play("one_seed_is_one_story", seed + 1, layout(seed), async |cluster| {
            cluster.run(&[Op::StartEdge(0), Op::Calm]).await
        });
        assert_ne!(other.hash(), first.hash());
    }
}

#[test]
fn an_idle_mesh_costs_nothing_but_pings() {
    let layout = Layout { edges: 20, ..Layout::default() };
    for seed in seeds([1]) {
        let log = play("an_idle_mesh_costs_nothing", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = cluster.net.log().len();
            cluster.pass(Duration::from_secs(600)).await?;
            ensure!(cluster.is_calm(), "a tunnel was lost for no reason\n{}", cluster.picture());
            let per_edge_and_minute = (cluster.net.log().len() - before) / 20 / 10;
            eprintln!("{per_edge_and_minute} datagrams of an idle edge in a minute");
            ensure!(per_edge_and_minute <= 170, "{per_edge_and_minute} datagrams of an idle edge in a minute");
            Ok(())
        });
        assert!(!log.is_empty());
    }
}
