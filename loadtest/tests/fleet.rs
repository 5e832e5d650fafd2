//! Many edges, in a simulated mesh.

#[path = "support/sim.rs"]
mod sim;

use std::time::Duration;

use anyhow::ensure;
use loadtest::cluster::{Cluster, Layout, edge::EdgeSeat};
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);

fn tunnels(cluster: &Cluster) -> u64 {
    cluster.edges.iter().map(EdgeSeat::tunnels).sum()
}

#[test]
fn a_shard_that_drains_sends_its_edges_away_in_waves() {
    let layout = Layout { shards: 2, edges: 400, ..Layout::default() };
    for seed in seeds([1]) {
        play("a_shard_that_drains_sends_its_edges", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let there = cluster.shards[0].running.as_ref().map_or(0, |p| p.shard.registry.len());
            ensure!((150..250).contains(&there), "{there} of 400 edges");
            cluster.stop_shard(0);
            let (mut before, mut waves) = (tunnels(cluster), Vec::new());
            while cluster.leaving() > 0 {
                cluster.pass(SECOND / 2).await?;
                let now = tunnels(cluster);
                waves.push(now - before);
                before = now;
            }
            let (moved, most) = (waves.iter().sum::<u64>(), waves.iter().max().copied().unwrap_or(0));
            eprintln!("{there} edges left in waves of {waves:?}");
            ensure!(moved == there as u64, "{moved} of {there} edges moved before the end");
            // A hundred in a second, and what falls together at the edges of half a second.
            ensure!(most <= 70, "{most} at once");
            cluster.calm_within(5 * SECOND).await?;
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_comes_is_not_run_over() {
    let layout = Layout { shards: 3, edges: 600, ..Layout::default() };
    for seed in seeds([1]) {
        play("a_shard_that_comes_is_not_run_over", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.add_shard()?;
            let (mut before, mut waves) = (tunnels(cluster), Vec::new());
            while !cluster.is_calm() {
                ensure!(waves.len() < 120, "not done in time\n{}", cluster.picture());
                cluster.pass(SECOND).await?;
                let now = tunnels(cluster);
                waves.push(now - before);
                before = now;
            }
            eprintln!("edges came in waves of {waves:?}");
            ensure!(waves.iter().all(|w| *w <= 75), "{waves:?}");
            ensure!((100..200).contains(&waves.iter().sum::<u64>()), "not each once: {waves:?}");
            Ok(())
        });
    }
}

#[test]
fn a_thousand_edges_for_ten_minutes() {
    let layout = Layout { shards: 4, edges: 1000, users: 2, ..Layout::default() };
    for seed in seeds([1]) {
        play("a_thousand_edges_for_ten_minutes", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = (tunnels(cluster), cluster.net.log().len());
            for turn in 0..60 {
                for edge in 0..20 {
                    cluster.open_streams(turn % 2, (turn * 20 + edge) % 1000, 1, 1_000);
                }
                cluster.pass(10 * SECOND).await?;
            }
            ensure!(cluster.is_calm() && tunnels(cluster) == before.0, "tunnels were lost for no reason");
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1200, "{tally:?}");
            eprintln!("{} datagrams of an edge in a minute", (cluster.net.log().len() - before.1) / 10_000);
            Ok(())
        });
    }
}
