//! Control in a simulated mesh: shards without edges, replicas that are cut off, a database that is ill. What shards make
//! of their rings is told in `shards.rs`.

#[path = "support/sim.rs"]
mod sim;

use std::time::Duration;

use anyhow::{Context, ensure};
use control::sight::BLIND;
use loadtest::cluster::{
    Cluster, Layout,
    control::database::Health,
    op::{Cut, Op},
};
use proto::api::ShardOrder;
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);
/// From the report that causes it, over a round of control, to the shards that follow it.
const NEWS: Duration = Duration::from_secs(2);
/// A lease, a round, and the way to the shards; with more than one replica a poll of the database too.
const DEATH: Duration = Duration::from_secs(9);

fn layout(shards: usize, replicas: usize) -> Layout {
    Layout { shards, replicas, edges: 0, users: 0, ..Layout::default() }
}

fn epoch(cluster: &Cluster) -> u64 {
    cluster.control.database.ring().epoch
}

fn members(cluster: &Cluster) -> Vec<String> {
    cluster.control.database.ring().members.iter().map(|m| m.shard.to_string()).collect()
}

#[test]
fn shards_that_start_are_in_the_ring_at_once_and_one_that_stops_leaves_it_at_once() {
    for seed in seeds(1..=4) {
        let replicas = 1 + (seed as usize) % 3;
        play("shards_that_start_are_in_the_ring", seed, layout(3, replicas), async |cluster| {
            let took = cluster.calm().await?;
            ensure!(took <= NEWS, "it took {took:?} until all three were in the ring of all three");
            let begun = epoch(cluster);
            cluster.stop_shard(1);
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun + 1 && members(cluster) == ["shard-0", "shard-2"]);
            cluster.start_shard(1)?;
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun + 2, "one change is one epoch\n{}", cluster.picture());
            let added = cluster.add_shard()?;
            cluster.calm_within(NEWS).await?;
            ensure!(members(cluster).len() == 4 && added == 3);
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_dies_is_out_when_its_lease_ends_and_the_others_stay() {
    for seed in seeds(1..=6) {
        let replicas = 1 + (seed as usize) % 3;
        play("a_shard_that_dies_is_out", seed, layout(4, replicas), async |cluster| {
            cluster.calm().await?;
            cluster.pass(Duration::from_millis(seed * 977)).await?;
            let begun = epoch(cluster);
            if seed % 2 == 0 {
                cluster.kill_shard(2);
            } else {
                cluster.pause_shard(2, 3600 * SECOND);
            }
            let gone = |c: &Cluster| c.control.database.ring().members.len() == 3;
            let took = cluster.wait_for("it is out of the ring", DEATH, gone).await?;
            ensure!(took >= 3 * SECOND, "it was given up after {took:?}");
            cluster.pass(60 * SECOND).await?;
            ensure!(epoch(cluster) == begun + 1, "others suffered\n{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_is_back_before_its_lease_ends_changes_nothing() {
    for seed in seeds(1..=4) {
        play("a_shard_that_is_back", seed, layout(3, 2), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            for _ in 0..5 {
                cluster.pause_shard(1, 3 * SECOND);
                cluster.pass(10 * SECOND).await?;
            }
            ensure!(epoch(cluster) == begun, "{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn orders_take_a_shard_out_and_bring_it_back() {
    for seed in seeds(1..=2) {
        play("orders_take_a_shard_out", seed, layout(3, 2), async |cluster| {
            cluster.calm().await?;
            for order in [ShardOrder::Drain, ShardOrder::Cordon] {
                cluster.order(0, order);
                cluster.calm_within(NEWS).await?;
                ensure!(members(cluster) == ["shard-1", "shard-2"], "{order}: {}", cluster.picture());
                cluster.order(0, ShardOrder::Serve);
                cluster.calm_within(NEWS).await?;
            }
            Ok(())
        });
    }
}

#[test]
fn when_the_leader_dies_another_replica_leads() {
    for seed in seeds(1..=4) {
        play("when_the_leader_dies", seed, layout(3, 3), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            let leads = |c: &Cluster| {
                c.control.replicas.iter().position(|r| r.running.as_ref().is_some_and(|r| r.is_leading()))
            };
            let leader = leads(cluster).context("somebody leads")?;
            cluster.control.kill(leader);
            let other = |c: &Cluster| leads(c).is_some_and(|now| now != leader);
            cluster.wait_for("another one leads", 8 * SECOND, other).await?;
            cluster.pass(30 * SECOND).await?;
            ensure!(epoch(cluster) == begun, "the ring changed without a reason\n{}", cluster.picture());
            cluster.kill_shard(0);
            cluster.wait_for("it is out", DEATH, |c| c.control.database.ring().members.len() == 2).await?;
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn a_leader_that_is_cut_from_the_database_does_no_harm() {
    for seed in seeds(1..=6) {
        play("a_leader_that_is_cut", seed, layout(4, 2), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            let leader =
                cluster.control.replicas.iter().position(|r| r.running.as_ref().is_some_and(|r| r.is_leading()));
            cluster.cut(Cut::Replica(leader.context("somebody leads")?));
            cluster.pass(120 * SECOND).await?;
            ensure!(epoch(cluster) == begun, "a shard that reports to either is alive\n{}", cluster.picture());
            cluster.stop_shard(3);
            // Nobody follows the one that is cut off any more.
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun + 1);
            cluster.net.heal_all();
            cluster.pass(30 * SECOND).await?;
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun + 1, "{}", cluster.picture());
            cluster.start_shard(3)?;
            cluster.pass(60 * SECOND).await?;
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun + 2, "{}", cluster.picture());
            Ok(())
        });
    }
}

/// A replica may be cut off at the very moment of a change: then its shards learn of it as soon as they have left it.
#[test]
fn who_follows_a_replica_that_is_cut_off_goes_to_another_one() {
    for seed in seeds(1..=6) {
        let replicas = 2 + (seed as usize) % 2;
        play("who_follows_a_replica_that_is_cut_off", seed, layout(6, replicas), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            cluster.cut(Cut::Replica(0));
            cluster.stop_shard(1);
            let told = cluster.calm_within(DEATH + BLIND + 2 * NEWS).await?;
            ensure!(epoch(cluster) == begun + 1, "{}", cluster.picture());
            ensure!(told >= SECOND, "somebody followed it");
            cluster.start_shard(1)?;
            cluster.calm().await?;
            cluster.stop_shard(2);
            cluster.calm_within(NEWS).await?;
            Ok(())
        });
    }
}

/// A replica without sisters knows best, whatever it sees: shards go on following it.
#[test]
fn who_follows_the_only_replica_stays() {
    play("who_follows_the_only_replica", 1, layout(3, 1), async |cluster| {
        cluster.calm().await?;
        cluster.control.database.set_health(Health::Away);
        cluster.pass(60 * SECOND).await?;
        cluster.kill_shard(2);
        cluster.start_shard(2)?;
        let knows = |c: &Cluster| c.shards[2].running.as_ref().is_some_and(|s| s.state.borrow().ring.epoch() > 0);
        cluster.wait_for("it is told the last ring", NEWS, knows).await?;
        Ok(())
    });
}

#[test]
fn replicas_that_are_cut_off_one_by_one_never_disagree() {
    for seed in seeds(1..=6) {
        play("replicas_that_are_cut_off", seed, layout(4, 3), async |cluster| {
            cluster.calm().await?;
            for round in 0..6 {
                cluster.cut(Cut::Replica(round % 3));
                cluster.cut(Cut::Control { shard: round % 4, replica: (round + 1) % 3 });
                cluster.pass(Duration::from_millis(3_000 + 1_700 * seed)).await?;
                if round % 2 == 1 {
                    cluster.run(&[Op::RestartShard(round % 4)]).await?;
                }
                if round % 3 == 2 {
                    cluster.net.heal_all();
                }
            }
            cluster.net.heal_all();
            cluster.calm_within(30 * SECOND).await?;
            Ok(())
        });
    }
}

#[test]
fn an_ill_database_leaves_the_ring_as_it_is() {
    let ills = [Health::Away, Health::ReadOnly, Health::Slow(8 * SECOND)];
    for (seed, health) in seeds(1..=6).into_iter().zip(ills.into_iter().cycle()) {
        let replicas = 1 + (seed as usize) % 3;
        play("an_ill_database_leaves_the_ring", seed, layout(3, replicas), async |cluster| {
            cluster.calm().await?;
            let begun = cluster.control.database.ring();
            cluster.control.database.set_health(health);
            cluster.pass(600 * SECOND).await?;
            cluster.control.database.set_health(Health::Good);
            cluster.pass(60 * SECOND).await?;
            cluster.calm_within(NEWS).await?;
            let now = cluster.control.database.ring();
            ensure!(now == begun, "{health:?} changed the ring: {begun:?} became {now:?}");
            Ok(())
        });
    }
}

#[test]
fn when_all_of_control_is_gone_shards_keep_what_they_know() {
    for seed in seeds(1..=3) {
        play("when_all_of_control_is_gone", seed, layout(3, 2), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            (0..2).for_each(|i| cluster.control.kill(i));
            cluster.pass(600 * SECOND).await?;
            ensure!(cluster.shards.iter().all(|s| s.ring().is_some_and(|r| r.epoch() == begun && r.len() == 3)));
            (0..2).for_each(|i| cluster.control.start(i));
            cluster.pass(60 * SECOND).await?;
            cluster.calm_within(NEWS).await?;
            ensure!(epoch(cluster) == begun, "control came back and changed the ring\n{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn a_database_that_is_put_back_from_a_backup_does_not_turn_epochs_back() {
    for seed in seeds(1..=3) {
        play("a_database_that_is_put_back", seed, layout(3, 2), async |cluster| {
            cluster.calm().await?;
            let backup = cluster.control.database.ring();
            for _ in 0..3 {
                cluster.drain_shard(2).await?;
                cluster.calm().await?;
                cluster.start_shard(2)?;
                cluster.calm().await?;
            }
            let before = epoch(cluster);
            ensure!(before > backup.epoch);
            cluster.control.database.restore(backup);
            cluster.wait_for("a later ring", 5 * SECOND, |c| epoch(c) > before).await?;
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn wall_clocks_that_jump_change_nothing() {
    for seed in seeds(1..=2) {
        play("wall_clocks_that_jump", seed, layout(3, 2), async |cluster| {
            cluster.calm().await?;
            let begun = epoch(cluster);
            for hours in [1, -3, 48, -1000] {
                cluster.clock.jump(hours * 3_600_000);
                cluster.pass(20 * SECOND).await?;
            }
            ensure!(epoch(cluster) == begun, "{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn one_seed_is_one_story_of_control() {
    for seed in seeds([1, 2]) {
        let run = || {
            play("one_seed_is_one_story_of_control", seed, layout(4, 3), async |cluster| {
                cluster.calm().await?;
                cluster.kill_shard(1);
                cluster.cut(Cut::Replica(0));
                cluster.pass(20 * SECOND).await?;
                cluster.control.database.set_health(Health::Slow(2 * SECOND));
                cluster.start_shard(1)?;
                cluster.pass(20 * SECOND).await
            })
        };
        let (first, second) = (run(), run());
        if let Some(difference) = first.difference(&second) {
            panic!("seed {seed}: {difference}");
        }
        assert!(first.len() > 100, "something happened");
    }
}
