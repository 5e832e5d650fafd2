//! Control is gone, or ill, or of two minds, in a simulated mesh whose edges and streams are not to notice.

#[path = "support/sim.rs"]
mod sim;

use std::time::Duration;

use anyhow::ensure;
use loadtest::{
    cluster::{
        Cluster, Layout,
        control::database::Health,
        op::{Cut, Op},
    },
    probe::Load,
};
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);
/// How long it lasts.
const TEN_MINUTES: u64 = 600;

fn layout(replicas: usize) -> Layout {
    Layout { shards: 3, edges: 20, users: 3, replicas, ..Layout::default() }
}

/// Streams that tick all the time, and short ones to every edge in turn, for ten minutes.
async fn use_it(cluster: &mut Cluster) -> anyhow::Result<usize> {
    for edge in 0..20 {
        let load = Load {
            piece: 100,
            pause: SECOND,
            deadline: 2 * TEN_MINUTES as u32 * SECOND,
            ..Load::of(edge as u64, 100 * TEN_MINUTES)
        };
        cluster.open_stream(edge % 3, edge, load);
    }
    for turn in 0..TEN_MINUTES as usize {
        cluster.open_streams(turn % 3, turn % 20, 1, 1_000);
        cluster.pass(SECOND).await?;
        ensure!(turn < 30 || cluster.shards.iter().any(|s| s.running.is_some()));
    }
    let tally = cluster.streams_ended().await?;
    ensure!(tally.broken() == 0 && tally.refused() == 0, "{tally:?}");
    Ok(tally.exact)
}

fn epochs(cluster: &Cluster) -> Vec<u64> {
    cluster.shards.iter().filter_map(|s| s.ring()).map(|ring| ring.epoch()).collect()
}

#[test]
fn ten_minutes_without_control_are_not_noticed() {
    for seed in seeds([1, 2]) {
        play("ten_minutes_without_control", seed, layout(2), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = epochs(cluster);
            cluster.run(&[Op::KillReplica(0), Op::KillReplica(1)]).await?;
            use_it(cluster).await?;
            ensure!(cluster.is_calm(), "{}", cluster.picture());
            cluster.run(&[Op::StartReplica(0), Op::StartReplica(1)]).await?;
            cluster.pass(60 * SECOND).await?;
            cluster.calm_within(5 * SECOND).await?;
            ensure!(epochs(cluster) == before, "its return was noticed: {before:?}, {:?}", epochs(cluster));
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_dies_while_control_is_gone_loses_its_edges_to_the_others() {
    for seed in seeds([1, 2]) {
        play("a_shard_that_dies_while_control_is_gone", seed, layout(1), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.run(&[Op::KillReplica(0), Op::KillShard(1)]).await?;
            let served = |c: &Cluster| c.edges.iter().all(|e| e.is_connected() && c.holder(&e.name).is_some());
            cluster.pass(12 * SECOND).await?;
            let took = cluster.wait_for("all are served", 60 * SECOND, served).await?;
            eprintln!("all are served {took:?} after 12 s");
            for edge in 0..20 {
                cluster.open_streams(edge % 3, edge, 1, 1_000);
            }
            let tally = cluster.streams_ended().await?;
            ensure!(tally.broken() == 0 && tally.refused() == 0, "{tally:?}");
            cluster.run(&[Op::StartShard(1), Op::StartReplica(0)]).await?;
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn ten_minutes_of_a_database_that_is_read_only_are_not_noticed() {
    for seed in seeds(1..=3) {
        play("ten_minutes_of_a_database", seed, layout(seed as usize % 3 + 1), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = epochs(cluster);
            cluster.run(&[Op::Database(Health::ReadOnly)]).await?;
            use_it(cluster).await?;
            ensure!(cluster.is_calm(), "{}", cluster.picture());
            cluster.run(&[Op::Database(Health::Good)]).await?;
            cluster.pass(60 * SECOND).await?;
            ensure!(epochs(cluster) == before, "it was noticed: {before:?}, {:?}", epochs(cluster));
            Ok(())
        });
    }
}

#[test]
fn replicas_of_two_minds_are_not_noticed() {
    for seed in seeds(1..=3) {
        play("replicas_of_two_minds", seed, layout(2), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = epochs(cluster);
            cluster.run(&[Op::Cut(Cut::Replica(seed as usize % 2))]).await?;
            use_it(cluster).await?;
            ensure!(epochs(cluster) == before, "it was noticed: {before:?}, {:?}", epochs(cluster));
            cluster.run(&[Op::Heal]).await?;
            cluster.pass(60 * SECOND).await?;
            ensure!(epochs(cluster) == before && cluster.is_calm(), "{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn while_one_replica_is_cut_off_a_rolling_restart_is_not_felt() {
    for seed in seeds(1..=2) {
        play("while_one_replica_is_cut_off", seed, layout(2), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.run(&[Op::Cut(Cut::Replica(seed as usize % 2))]).await?;
            cluster.pass(15 * SECOND).await?;
            for shard in 0..3 {
                cluster.stop_shard(shard);
                for turn in 0..60 {
                    cluster.open_streams(turn % 3, turn % 20, 1, 1_000);
                    cluster.pass(SECOND / 2).await?;
                }
                cluster.wait_for("it has stopped", 30 * SECOND, |c| c.leaving() == 0).await?;
                cluster.start_shard(shard)?;
                for turn in 0..60 {
                    cluster.open_streams(turn % 3, turn % 20, 1, 1_000);
                    cluster.pass(SECOND / 2).await?;
                }
            }
            let tally = cluster.streams_ended().await?;
            eprintln!("{} exact, refused {:?}, broken {:?}", tally.exact, tally.refused, tally.broken);
            ensure!(tally.broken() == 0 && tally.refused() == 0, "{tally:?}");
            cluster.run(&[Op::Heal, Op::Calm]).await
        });
    }
}
