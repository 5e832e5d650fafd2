//! The shard tier, in a simulated mesh: shards come and go, on purpose and not, under edges and streams.

#[path = "support/sim.rs"]
mod sim;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use loadtest::{
    cluster::{Cluster, Layout, op::Op, traffic::Tally},
    probe::Load,
};
use proto::api::ShardOrder;
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);

/// Where each edge is.
fn places(cluster: &Cluster) -> BTreeMap<usize, usize> {
    (0..cluster.edges.len()).filter_map(|e| Some((e, cluster.holder(&cluster.edges[e].name)?))).collect()
}

/// A stream to every edge that goes on for so many seconds.
fn tick(cluster: &mut Cluster, seconds: u64) {
    for edge in 0..cluster.edges.len() {
        let load = Load { piece: 100, pause: SECOND, ..Load::of(edge as u64, 100 * seconds) };
        cluster.open_stream(edge % cluster.users.len(), edge, load);
    }
}

/// Short streams to edges in turn, one every so often, while something goes on for so many seconds.
async fn ask(cluster: &mut Cluster, seconds: u64) -> anyhow::Result<()> {
    for turn in 0..seconds * 5 {
        let edge = turn as usize % cluster.edges.len();
        cluster.open_streams(turn as usize % cluster.users.len(), edge, 1, 1_000);
        cluster.pass(SECOND / 5).await?;
    }
    Ok(())
}

/// Rule 10: no stream broke, and no request was refused.
fn nothing_was_felt(tally: &Tally) -> anyhow::Result<()> {
    ensure!(tally.broken() == 0 && tally.refused() == 0, "{tally:?}");
    Ok(())
}

#[test]
fn a_shard_more_takes_its_share_and_nobody_notices() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 3, edges: 60, users: 4, ..Layout::default() };
        play("a_shard_more_takes_its_share", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = places(cluster);
            let welcomed = cluster.edges.iter().map(|e| e.tunnels()).collect::<Vec<_>>();
            tick(cluster, 60);
            cluster.add_shard()?;
            ask(cluster, 20).await?;
            let took = cluster.calm().await?;
            let after = places(cluster);
            let moved: Vec<_> = (0..60).filter(|e| before[e] != after[e]).collect();
            ensure!(moved.iter().all(|e| after[e] == 3), "an edge moved to somebody else than the new shard");
            ensure!((5..=25).contains(&moved.len()), "{} of 60 moved", moved.len());
            for (edge, before) in welcomed.into_iter().enumerate() {
                let times = cluster.edges[edge].tunnels() - before;
                let due = u64::from(moved.contains(&edge));
                ensure!(times == due, "edge {edge} has been welcomed {times} times more, {due} were due");
            }
            let tally = cluster.streams_ended().await?;
            nothing_was_felt(&tally)?;
            eprintln!("{} edges moved, {} streams; calm {took:?} after 20 s", moved.len(), tally.exact);
            Ok(())
        });
    }
}

#[test]
fn a_shard_less_gives_its_edges_to_the_next_of_each_and_nobody_notices() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 4, edges: 60, users: 4, drain_secs: 90, ..Layout::default() };
        play("a_shard_less_gives_its_edges", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let before = places(cluster);
            tick(cluster, 60);
            cluster.stop_shard(2);
            ask(cluster, 20).await?;
            cluster.calm().await?;
            let after = places(cluster);
            ensure!((0..60).all(|e| (before[&e] == 2) == (before[&e] != after[&e])), "others moved");
            nothing_was_felt(&cluster.streams_ended().await?)?;
            Ok(())
        });
    }
}

#[test]
fn when_an_owner_is_killed_the_next_in_preference_serves() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 4, edges: 40, users: 2, ..Layout::default() };
        play("when_an_owner_is_killed", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let (before, ring) = (places(cluster), cluster.shards[0].ring().context("it runs")?);
            let dead = cluster.shards[1].id.clone();
            let lost: Vec<_> = before.iter().filter(|(_, at)| **at == 1).map(|(e, _)| *e).collect();
            cluster.kill_shard(1);
            let back =
                |c: &Cluster| lost.iter().all(|e| c.holder(&c.edges[*e].name).is_some() && c.edges[*e].is_connected());
            let took = cluster.wait_for("its edges are served again", 30 * SECOND, back).await?;
            cluster.calm().await?;
            for (edge, at) in places(cluster) {
                let mut order = ring.preference(&cluster.edges[edge].name).filter(|m| m.shard != dead);
                let next = order.next().context("somebody is left")?;
                ensure!(next.shard == cluster.shards[at].id, "edge {edge} is at {at} and not at {}", next.shard);
            }
            eprintln!("{} edges are back after {took:?} of silence", lost.len());
            for edge in 0..40 {
                cluster.open_streams(0, edge, 1, 1_000);
            }
            nothing_was_felt(&cluster.streams_ended().await?)?;
            Ok(())
        });
    }
}

#[test]
fn requests_to_the_edges_of_a_dead_shard_are_answered_or_refused_in_words() {
    for seed in seeds(1..=4) {
        let layout = Layout { shards: 4, edges: 40, users: 4, ..Layout::default() };
        play("requests_to_the_edges_of_a_dead_shard", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            if seed % 2 == 0 {
                cluster.kill_shard(1);
            } else {
                cluster.pause_shard(1, 60 * SECOND);
            }
            let dead = cluster.shards[1].address;
            let ways: Vec<_> = cluster.shards.iter().map(|s| s.address).filter(|a| *a != dead).collect();
            for turn in 0..200 {
                let mut ways = ways.clone();
                ways.rotate_left(turn % 3);
                cluster.open_stream_by(ways, turn % 4, turn % 40, Load::of(turn as u64, 1_000));
                cluster.pass(SECOND / 10).await?;
            }
            let tally = cluster.streams_ended().await?;
            ensure!(tally.broken() == 0, "{tally:?}");
            ensure!(tally.exact >= 100, "others suffered: {tally:?}");
            eprintln!("{} exact, {:?}", tally.exact, tally.refused);
            Ok(())
        });
    }
}

#[test]
fn an_edge_that_cannot_reach_its_owner_stays_and_is_found_through_any_shard() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 4, edges: 10, users: 2, ..Layout::default() };
        play("an_edge_that_cannot_reach_its_owner", seed, layout, async |cluster| {
            cluster.calm().await?;
            let ring = cluster.shards[0].ring().context("it runs")?;
            let owner = ring.owner(&cluster.edges[0].name).context("somebody owns it")?.shard.clone();
            let wall = cluster.shards.iter().position(|s| s.id == owner).context("it is one of ours")?;
            cluster.net.cut(cluster.edges[0].host, cluster.shards[wall].address.ip());
            cluster.start_edges()?;
            cluster.calm().await?;
            // For longer than it remembers that it cannot reach its owner, so that it is asked to move in vain.
            for _ in 0..10 {
                for shard in 0..4 {
                    let way = vec![cluster.shards[shard].address];
                    cluster.open_stream_by(way, shard % 2, 0, Load::of(shard as u64, 1_000));
                }
                cluster.pass(30 * SECOND).await?;
                ensure!(cluster.edges[0].is_connected(), "{}", cluster.picture());
            }
            nothing_was_felt(&cluster.streams_ended().await?)?;
            cluster.net.heal_all();
            // It is asked again from time to time.
            cluster.calm_within(1200 * SECOND).await?;
            Ok(())
        });
    }
}

#[test]
fn a_rolling_restart_of_all_loses_nothing() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 3, edges: 30, users: 3, replicas: 2, ..Layout::default() };
        play("a_rolling_restart_of_all", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let mut streams = 0;
            for shard in 0..3 {
                // Shorter than the drain time, so that they may end.
                tick(cluster, 15);
                ask(cluster, 2).await?;
                cluster.stop_shard(shard);
                ask(cluster, 25).await?;
                cluster.wait_for("it has drained", 20 * SECOND, |c| c.leaving() == 0).await?;
                cluster.start_shard(shard)?;
                ask(cluster, 10).await?;
                cluster.calm().await?;
                let tally = cluster.streams_ended().await?;
                nothing_was_felt(&tally)?;
                streams += tally.exact;
            }
            eprintln!("{streams} streams");
            Ok(())
        });
    }
}

#[test]
fn an_order_to_drain_empties_a_shard_and_an_order_to_serve_fills_it() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 3, edges: 30, users: 2, ..Layout::default() };
        play("an_order_to_drain_empties_a_shard", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            tick(cluster, 30);
            cluster.order(1, ShardOrder::Drain);
            ask(cluster, 20).await?;
            cluster.calm().await?;
            ensure!(places(cluster).values().all(|at| *at != 1), "{}", cluster.picture());
            cluster.order(1, ShardOrder::Serve);
            ask(cluster, 10).await?;
            cluster.calm().await?;
            ensure!(places(cluster).values().any(|at| *at == 1), "{}", cluster.picture());
            nothing_was_felt(&cluster.streams_ended().await?)?;
            Ok(())
        });
    }
}

#[test]
fn a_cordoned_shard_keeps_its_edges_and_takes_no_new_one() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 3, edges: 30, users: 2, ..Layout::default() };
        play("a_cordoned_shard_keeps_its_edges", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let there = places(cluster);
            cluster.order(1, ShardOrder::Cordon);
            ask(cluster, 60).await?;
            ensure!(places(cluster) == there, "a cordon moved edges\n{}", cluster.picture());
            let one = *there.iter().find(|(_, at)| **at == 1).context("it holds some")?.0;
            cluster.run(&[Op::RestartEdge(one)]).await?;
            cluster.pass(20 * SECOND).await?;
            ensure!(places(cluster).get(&one).is_some_and(|at| *at != 1), "a cordoned shard took an edge");
            cluster.order(1, ShardOrder::Serve);
            cluster.calm().await?;
            nothing_was_felt(&cluster.streams_ended().await?)?;
            Ok(())
        });
    }
}
