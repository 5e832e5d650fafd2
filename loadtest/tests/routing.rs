//! Streams in the moments in which a shard cannot know yet where an edge is, in a simulated mesh: it waits, asks, or says
//! so, and never blames the edge.

#[path = "support/sim.rs"]
mod sim;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use loadtest::{
    cluster::{Cluster, Layout, traffic::Tally},
    probe::Load,
    simnet::Path,
};
use proto::api::ShardOrder;
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);
const SLOW: Path = Path {
    latency: Duration::from_millis(100),
    jitter: Duration::from_millis(1),
    loss: 0.0,
    rate: None,
    queue: Duration::ZERO,
};

/// Edges whose tunnels end at this shard.
fn held_by(cluster: &Cluster, shard: usize) -> Vec<usize> {
    (0..cluster.edges.len()).filter(|e| cluster.holder(&cluster.edges[*e].name) == Some(shard)).collect()
}

/// A short stream to each of these edges, by way of one shard alone.
async fn ask(cluster: &mut Cluster, shard: usize, edges: &[usize]) -> anyhow::Result<Tally> {
    let way = vec![cluster.shards[shard].address];
    for edge in edges {
        cluster.open_stream_by(way.clone(), 0, *edge, Load::of(*edge as u64, 1_000));
    }
    cluster.streams_ended().await
}

async fn restart(cluster: &mut Cluster, shard: usize) -> anyhow::Result<()> {
    cluster.drain_shard(shard).await?;
    cluster.start_shard(shard)
}

fn has_heard_from_control(cluster: &Cluster, shard: usize) -> bool {
    cluster.shards[shard].running.as_ref().is_some_and(|p| p.state.borrow().revision > 0)
}

#[test]
fn a_stream_waits_for_the_link_to_the_shard_that_knows() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 2, edges: 10, ..Layout::default() };
        play("a_stream_waits_for_the_link", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let (near, far) = (cluster.shards[0].address.ip(), cluster.shards[1].address.ip());
            cluster.net.set_path(near, far, SLOW);
            restart(cluster, 0).await?;
            cluster.wait_for("control is heard", 10 * SECOND, |c| has_heard_from_control(c, 0)).await?;
            let there = held_by(cluster, 1);
            ensure!(there.len() >= 3, "{}", cluster.picture());
            let tally = ask(cluster, 0, &there).await?;
            ensure!(tally.exact == there.len(), "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn a_cut_between_shards_is_no_fault_of_the_edge_and_is_over_when_it_heals() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 2, edges: 10, ..Layout::default() };
        play("a_cut_between_shards", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let there = held_by(cluster, 1);
            let (near, far) = (cluster.shards[0].address.ip(), cluster.shards[1].address.ip());
            cluster.net.cut(near, far);
            let linked = |c: &Cluster| c.shards[0].running.as_ref().is_some_and(|p| p.shard.peers.has(&c.shards[1].id));
            cluster.wait_for("the link is lost", 20 * SECOND, |c| !linked(c)).await?;
            let tally = ask(cluster, 0, &there[..2]).await?;
            ensure!(tally.refused == BTreeMap::from([("not-ready", 2)]), "{tally:?}");
            cluster.net.heal(near, far);
            // A packet of the handshake may have been lost just before, and another try is then worth it, as it says.
            let (mut left, mut tries) = (1, 0);
            while left > 0 {
                let tally = ask(cluster, 0, &there[..1]).await?;
                ensure!(tally.broken() == 0 && tally.refused.keys().all(|code| *code == "not-ready"), "{tally:?}");
                (left, tries) = (left - tally.exact, tries + 1);
                ensure!(tries <= 4, "{tally:?}");
            }
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_has_just_started_waits_for_the_word_of_control() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 2, edges: 10, ..Layout::default() };
        play("a_shard_that_has_just_started", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.drain_shard(0).await?;
            cluster.control.kill(0);
            cluster.start_shard(0)?;
            let begun = cluster.net.elapsed();
            let tally = ask(cluster, 0, &[0, 1]).await?;
            ensure!(tally.refused == BTreeMap::from([("not-ready", 2)]), "{tally:?}");
            ensure!(cluster.net.elapsed() - begun < 4 * SECOND, "that took long");
            cluster.control.start(0);
            // The word comes while they wait.
            let tally = ask(cluster, 0, &[0, 1]).await?;
            ensure!(tally.refused.keys().all(|code| *code == "not-ready"), "{tally:?}");
            cluster.calm().await?;
            let tally = ask(cluster, 0, &[0, 1]).await?;
            ensure!(tally.exact == 2, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn an_owner_that_has_just_become_it_asks_those_whose_word_it_has_not_heard() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 3, edges: 40, ..Layout::default() };
        play("an_owner_that_has_just_become_it", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.order(1, ShardOrder::Cordon);
            cluster.calm().await?;
            cluster.drain_shard(0).await?;
            let (new, cordoned) = (cluster.shards[0].address.ip(), cluster.shards[1].address.ip());
            cluster.net.set_path(new, cordoned, SLOW);
            cluster.start_shard(0)?;
            let me = cluster.shards[0].id.clone();
            let owns = |c: &Cluster, edge: usize| {
                let ring = c.shards[0].ring();
                ring.is_some_and(|ring| ring.owner(&c.edges[edge].name).is_some_and(|o| o.shard == me))
            };
            cluster.wait_for("it owns some", 10 * SECOND, |c| (0..40).any(|e| owns(c, e))).await?;
            let kept: Vec<_> = held_by(cluster, 1).into_iter().filter(|e| owns(cluster, *e)).collect();
            ensure!(kept.len() >= 2, "{}", cluster.picture());
            let directory = cluster.shards[0].running.as_ref().context("it runs")?.shard.directory.clone();
            let epoch = cluster.shards[0].ring().context("it runs")?.epoch();
            ensure!(!directory.has_heard(&cluster.shards[1].id, epoch), "it has heard already");
            let tally = ask(cluster, 0, &kept).await?;
            ensure!(tally.exact == kept.len(), "{tally:?}");
            cluster.order(1, ShardOrder::Serve);
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn an_edge_that_is_offline_is_said_to_be_at_once() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 3, edges: 10, ..Layout::default() };
        play("an_edge_that_is_offline", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.stop_edge(0);
            cluster.pass(10 * SECOND).await?;
            for shard in 0..3 {
                let begun = cluster.net.elapsed();
                let tally = ask(cluster, shard, &[0]).await?;
                ensure!(tally.refused == BTreeMap::from([("edge-offline", 1)]), "{tally:?}");
                ensure!(cluster.net.elapsed() - begun < SECOND / 2, "it took {:?}", cluster.net.elapsed() - begun);
            }
            Ok(())
        });
    }
}

#[test]
fn shards_that_are_restarted_in_turn_have_their_edges_back_within_seconds() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 3, edges: 60, drain_secs: 60, replicas: 2, ..Layout::default() };
        play("shards_that_are_restarted_in_turn", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for shard in 0..3 {
                restart(cluster, shard).await?;
                cluster.wait_for("control is heard", 10 * SECOND, |c| has_heard_from_control(c, shard)).await?;
            }
            let took = cluster.calm().await?;
            eprintln!("all at their owners {took:?} after the last restart");
            ensure!(took < 10 * SECOND, "{took:?}");
            Ok(())
        });
    }
}
