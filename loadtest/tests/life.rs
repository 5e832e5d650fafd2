//! An edge's life, in a simulated mesh: it comes, serves, loses its link, returns, is replaced, is revoked.

#[path = "support/sim.rs"]
mod sim;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use loadtest::{
    cluster::{Cluster, Layout, edge::EdgeSeat, op::Op},
    probe::{Load, StreamEnd},
    simnet::Path,
};
use mesh_edge::life::Phase;
use sim::{play, seeds};
use tokio::time::{Instant, sleep};

const SECOND: Duration = Duration::from_secs(1);
/// How late the death of a link may be seen: 12 s without an answer, or the idle timeout behind them.
const SILENT_DEATH: Duration = Duration::from_secs(15);
/// How late a shard that fell silent is tried once more.
const AT_ONCE: Duration = Duration::from_millis(200);

fn cut(cluster: &Cluster, edge: usize) {
    cluster.net.cut(cluster.edges[edge].host, cluster.shards[0].address.ip());
}

fn heal(cluster: &Cluster, edge: usize) {
    cluster.net.heal(cluster.edges[edge].host, cluster.shards[0].address.ip());
}

#[test]
fn an_edge_dials_and_serves() {
    for seed in seeds([1]) {
        play("an_edge_dials_and_serves", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            let took = cluster.calm().await?;
            ensure!(took < SECOND, "it took {took:?} to come up");
            cluster.wait_for("ready", SECOND, |c| c.edges[0].is_ready()).await?;
            cluster.open_streams(0, 0, 10, 50_000);
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 10, "{tally:?}");
            Ok(())
        });
    }
}

/// Cuts the edge off for some time. Returns the pauses that it made between its tries, behind those that come at once.
async fn pauses_while_cut(cluster: &mut Cluster, long: Duration) -> anyhow::Result<Vec<Duration>> {
    cut(cluster, 0);
    let mut phase = cluster.edges[0].running.as_ref().context("it runs")?.edge.phase();
    let (end, mut pauses) = (Instant::now() + long, Vec::new());
    while tokio::time::timeout_at(end, phase.changed()).await.is_ok() {
        if let Phase::Waiting { until, .. } = &*phase.borrow_and_update() {
            pauses.push(until.saturating_duration_since(Instant::now()));
        }
    }
    heal(cluster, 0);
    cluster.calm().await?;
    pauses.drain(..pauses.iter().take_while(|pause| **pause <= AT_ONCE).count());
    Ok(pauses)
}

#[test]
fn pauses_grow_while_the_way_is_cut_and_begin_anew_only_after_a_long_link() {
    let (least, most) = (Duration::from_millis(500), Duration::from_secs(30));
    let mut after_short = Vec::new();
    for seed in seeds(1..=6) {
        play("pauses_grow_while_the_way_is_cut", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            sleep(most + SECOND).await;
            let pauses = pauses_while_cut(cluster, Duration::from_secs(300)).await?;
            ensure!(pauses.len() > 6, "too few tries: {pauses:?}");
            ensure!(pauses.iter().all(|p| (least..=most).contains(p)), "out of bounds: {pauses:?}");
            ensure!(pauses[0] <= 3 * least && pauses[1] <= 9 * least, "the first ones are too long: {pauses:?}");
            let later: Duration = pauses[3..].iter().sum();
            ensure!(later / (pauses.len() as u32 - 3) > 5 * SECOND, "they do not grow: {pauses:?}");
            // The link that is back lives only for a moment, so the next pauses are as long as the last.
            after_short.push(pauses_while_cut(cluster, Duration::from_secs(40)).await?[0]);
            sleep(most + SECOND).await;
            let fresh = pauses_while_cut(cluster, Duration::from_secs(40)).await?[0];
            ensure!(fresh <= 3 * least, "a link that lived long did not begin anew: {fresh:?}");
            Ok(())
        });
    }
    assert!(after_short.iter().any(|p| *p > 3 * least), "a short link began anew: {after_short:?}");
}

#[test]
fn a_black_hole_is_seen_in_time_and_its_streams_fail_as_errors() {
    for seed in seeds(1..=4) {
        play("a_black_hole_is_seen_in_time", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.wait_for("ready", SECOND, |c| c.edges[0].is_ready()).await?;
            sleep(Duration::from_millis(seed * 977)).await;
            let load = Load { pause: Duration::from_millis(100), ..Load::of(seed, 4_000_000) };
            cluster.open_stream(0, 0, load);
            sleep(3 * SECOND).await;
            cut(cluster, 0);
            let seen = cluster.wait_for("not ready", SILENT_DEATH, |c| !c.edges[0].is_ready()).await?;
            let left = SILENT_DEATH.saturating_sub(seen);
            let gone = |c: &Cluster| !c.shards[0].holds(&c.edges[0].name);
            cluster.wait_for("the shard has seen it, too", left, gone).await?;
            let tally = cluster.streams_ended().await?;
            ensure!(tally.broken() == 1, "{tally:?}");
            heal(cluster, 0);
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn one_direction_that_is_cut_is_a_black_hole_too() {
    for seed in seeds(1..=2) {
        play("one_direction_that_is_cut", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let (edge, shard) = (cluster.edges[0].host, cluster.shards[0].address.ip());
            let (from, to) = if seed % 2 == 0 { (edge, shard) } else { (shard, edge) };
            cluster.net.cut_one_way(from, to);
            cluster.wait_for("not connected", SILENT_DEATH, |c| !c.edges[0].is_connected()).await?;
            heal(cluster, 0);
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn streams_survive_loss_jitter_and_a_new_address() {
    let path =
        Path { latency: Duration::from_millis(20), jitter: Duration::from_millis(15), loss: 0.05, ..Path::default() };
    for seed in seeds(1..=3) {
        play("streams_survive_loss", seed, Layout { path, edges: 3, ..Layout::default() }, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for edge in 0..3 {
                cluster.open_streams(0, edge, 4, 200_000);
            }
            sleep(2 * SECOND).await;
            cluster.run(&[Op::Roam(1)]).await?;
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 12, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn a_slow_edge_does_not_slow_another_one() {
    for seed in seeds([1]) {
        play("a_slow_edge_does_not_slow_another", seed, Layout { edges: 2, ..Layout::default() }, async |cluster| {
            let slow = Path { rate: Some(20_000), ..Path::default() };
            cluster.net.set_path(cluster.edges[0].host, cluster.shards[0].address.ip(), slow);
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.open_stream(0, 0, Load { pause: Duration::ZERO, ..Load::of(1, 600_000) });
            sleep(SECOND).await;
            let begun = Instant::now();
            cluster.open_stream(0, 1, Load { pause: Duration::ZERO, ..Load::of(2, 600_000) });
            let fast =
                cluster.users[0].stream(cluster.shards[0].address, &cluster.edges[1].name, &Load::of(3, 1)).await;
            ensure!(fast == StreamEnd::Exact && begun.elapsed() < SECOND, "{fast} {:?}", begun.elapsed());
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 2, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn a_reader_that_rests_gets_every_byte_afterwards() {
    let layout = Layout { windows: Some((16 * 1024, 512 * 1024)), ..Layout::default() };
    for seed in seeds(1..=3) {
        play("a_reader_that_rests", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for rest in [1, 3, 5, 10, 11] {
                let load =
                    Load { pause: Duration::ZERO, rest: rest * SECOND, ..Load::of(seed + u64::from(rest), 200_000) };
                cluster.open_stream(0, 0, load);
            }
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 5, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn readers_that_stop_do_not_stop_others() {
    let layout = Layout { windows: Some((16 * 1024, 512 * 1024)), users: 2, ..Layout::default() };
    for seed in seeds([1, 2]) {
        play("readers_that_stop_do_not_stop_others", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for stream in 0..64 {
                let load = Load { pause: Duration::ZERO, rest: 300 * SECOND, ..Load::of(stream, 200_000) };
                cluster.open_stream(0, 0, load);
            }
            // Time for the shard to find out who does not read.
            sleep(20 * SECOND).await;
            let (shard, edge) = (cluster.shards[0].address, cluster.edges[0].name.clone());
            let load = Load { pause: Duration::ZERO, deadline: 3 * SECOND, ..Load::of(99, 100_000) };
            let other = cluster.users[1].stream(shard, &edge, &load).await;
            ensure!(other == StreamEnd::Exact, "beside 64 streams that nobody reads: {other}");
            let tally = cluster.streams_ended().await?;
            let stalled = tally.broken.get("the stream was reset: stalled").copied().unwrap_or(0);
            ensure!(stalled == tally.broken() && stalled + tally.exact == 64, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn a_link_that_is_full_of_bytes_is_not_taken_for_dead() {
    let layout = Layout { windows: Some((64 * 1024, 4 * 1024 * 1024)), ..Layout::default() };
    for seed in seeds([1]) {
        play("a_link_that_is_full_of_bytes", seed, layout, async |cluster| {
            let slow = Path { rate: Some(20_000), ..Path::default() };
            cluster.net.set_path(cluster.edges[0].host, cluster.shards[0].address.ip(), slow);
            cluster.start_edges()?;
            cluster.calm().await?;
            for stream in 0..200 {
                cluster.open_stream(0, 0, Load { pause: Duration::ZERO, ..Load::of(stream, 20_000) });
            }
            let registry = cluster.shards[0].running.as_ref().context("it runs")?.shard.registry.clone();
            let tunnel = registry.find(&cluster.edges[0].name).context("it is there")?.generation;
            let tally = cluster.streams_ended().await?;
            let now = registry.find(&cluster.edges[0].name).map(|h| h.generation);
            ensure!(now == Some(tunnel), "the tunnel was given up: {tally:?}");
            // An answer that is late on such a link is a refusal in words.
            ensure!(tally.broken() == 0 && tally.exact > 190, "{tally:?}");
            Ok(())
        });
    }
}

#[test]
fn an_edge_behind_a_satellite_is_served() {
    let path =
        Path { latency: Duration::from_millis(350), jitter: Duration::from_millis(50), loss: 0.02, ..Path::default() };
    for seed in seeds(1..=4) {
        play("an_edge_behind_a_satellite", seed, Layout { users: 2, ..Layout::default() }, async |cluster| {
            cluster.net.set_path(cluster.edges[0].host, cluster.shards[0].address.ip(), path);
            cluster.start_edges()?;
            let took = cluster.calm().await?;
            ensure!(took < 20 * SECOND, "it took {took:?} to come up");
            cluster.open_streams(0, 0, 3, 100_000);
            cluster.open_streams(1, 0, 3, 100_000);
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 6, "{tally:?}");
            sleep(120 * SECOND).await;
            ensure!(cluster.is_calm(), "the tunnel was lost\n{}", cluster.picture());
            Ok(())
        });
    }
}

#[test]
fn one_stream_too_many_is_refused_and_harms_nobody() {
    for seed in seeds([1]) {
        play("one_stream_too_many_is_refused", seed, Layout { users: 2, ..Layout::default() }, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for stream in 0..1400 {
                let load = Load { pause: 15 * SECOND, ..Load::of(stream, 8_000) };
                cluster.open_stream(usize::from(stream % 2 == 0), 0, load);
            }
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1024, "{} exact, {:?}, {:?}", tally.exact, tally.refused, tally.broken);
            ensure!(tally.refused.get("limit-reached") == Some(&376), "{:?} {:?}", tally.refused, tally.broken);
            Ok(())
        });
    }
}

#[test]
fn a_revoked_edge_is_cut_at_once_and_stays_out() {
    for seed in seeds([1, 2]) {
        play("a_revoked_edge_is_cut", seed, Layout { edges: 2, ..Layout::default() }, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.open_stream(0, 0, Load { pause: SECOND, ..Load::of(1, 400_000) });
            cluster.open_stream(0, 1, Load { pause: SECOND, ..Load::of(2, 40_000) });
            sleep(SECOND).await;
            cluster.revoke_edge(0);
            let gone = |c: &Cluster| !c.shards[0].holds(&c.edges[0].name) && !c.edges[0].is_ready();
            cluster.wait_for("the revoked edge is cut off", 5 * SECOND, gone).await?;
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1 && tally.broken() == 1, "{tally:?}");
            let dials = cluster.edges[0].dials();
            for _ in 0..600 {
                sleep(SECOND).await;
                ensure!(!cluster.shards[0].holds(&cluster.edges[0].name), "a revoked edge is back");
            }
            let tries = cluster.edges[0].dials() - dials;
            ensure!((1..=12).contains(&tries), "it tried {tries} times in ten minutes");
            ensure!(cluster.shards[0].holds(&cluster.edges[1].name), "another edge suffered");
            Ok(())
        });
    }
}

#[test]
fn an_edge_that_is_revoked_while_it_leaves_is_cut_all_the_same() {
    for seed in seeds([1]) {
        play("an_edge_that_is_revoked_while_it_leaves", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            // Its stream lasts longer than the five seconds that an edge waits for the last ones.
            cluster.open_stream(0, 0, Load { pause: SECOND, ..Load::of(1, 400_000) });
            sleep(SECOND).await;
            let tunnels = |c: &Cluster| c.shards[0].running.as_ref().map_or(0, |p| p.metrics.tunnels.get());
            cluster.stop_edge(0);
            sleep(Duration::from_millis(100)).await;
            ensure!(tunnels(cluster) == 1, "it left before its stream ended");
            cluster.revoke_edge(0);
            cluster.wait_for("the tunnel is cut", 2 * SECOND, |c| tunnels(c) == 0).await?;
            Ok(())
        });
    }
}

#[test]
fn an_opener_that_vanishes_is_no_clean_end() {
    for seed in seeds([1]) {
        play("an_opener_that_vanishes", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.open_stream(0, 0, Load { pause: SECOND, ..Load::of(seed, 400_000) });
            sleep(3 * SECOND).await;
            cluster.forget_streams();
            sleep(SECOND).await;
            let records = cluster.records();
            ensure!(records.get("reset cancelled") == Some(&1) && records.len() == 1, "{records:?}");
            Ok(())
        });
    }
}

#[test]
fn a_revoked_user_loses_the_streams() {
    for seed in seeds([1]) {
        play("a_revoked_user_loses", seed, Layout { users: 2, ..Layout::default() }, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let load = Load { pause: SECOND, ..Load::of(1, 40_000) };
            cluster.open_stream(0, 0, load);
            cluster.open_stream(1, 0, load);
            sleep(SECOND).await;
            cluster.revoke_user(0);
            let begun = Instant::now();
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1 && tally.broken() == 1, "{tally:?}");
            ensure!(begun.elapsed() < 15 * SECOND);
            cluster.open_streams(0, 0, 1, 10);
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 0, "a revoked user is back: {tally:?}");
            Ok(())
        });
    }
}

#[test]
fn a_restarted_edge_replaces_its_old_tunnel_whose_end_removes_nothing() {
    for seed in seeds(1..=3) {
        play("a_restarted_edge_replaces", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            for round in 0..5 {
                let registry = cluster.shards[0].running.as_ref().context("it runs")?.shard.registry.clone();
                let name = cluster.edges[0].name.clone();
                let before = registry.find(&name).context("it is there")?.generation;
                cluster.kill_edge(0);
                sleep(Duration::from_millis(100 * round)).await;
                cluster.start_edge(0)?;
                let newer = |_: &Cluster| registry.find(&name).is_some_and(|h| h.generation > before);
                cluster.wait_for("the newer tunnel is there", 2 * SECOND, newer).await?;
                // The old one's silence is noticed somewhere in here.
                for _ in 0..30 {
                    sleep(SECOND).await;
                    ensure!(newer(cluster), "the old tunnel's end removed the newer one, in round {round}");
                }
                cluster.open_streams(0, 0, 1, 10_000);
                let tally = cluster.streams_ended().await?;
                ensure!(tally.exact == 1, "{tally:?}");
            }
            Ok(())
        });
    }
}

#[test]
fn of_two_machines_with_one_identity_one_stays_and_the_other_is_told() {
    for seed in seeds(1..=3) {
        play("of_two_machines_with_one_identity", seed, Layout { edges: 2, ..Layout::default() }, async |cluster| {
            cluster.start_edge(0)?;
            cluster.calm().await?;
            let copy = cluster.edges[0].copy(IpAddr::V4(Ipv4Addr::new(10, 9, 9, 9)))?;
            let other = std::mem::replace(&mut cluster.edges[1], copy);
            drop(other);
            cluster.start_edge(1)?;
            // Nobody can tell the copy from a restart until the first machine comes back.
            let told = |c: &Cluster| {
                c.edges.iter().any(|e| matches!(e.phase(), Some(Phase::Refused { kind: "duplicate-identity", .. })))
            };
            cluster.wait_for("one of the two is told", Duration::from_secs(180), told).await?;
            let connected = || cluster.edges.iter().filter(|e| e.is_connected()).count();
            ensure!(connected() == 1, "{} of the two are connected", connected());
            let registry = cluster.shards[0].running.as_ref().context("it runs")?.shard.registry.clone();
            let name = cluster.edges[0].name.clone();
            let incumbent = registry.find(&name).context("one is there")?.generation;
            for _ in 0..300 {
                sleep(SECOND).await;
                let now = registry.find(&name).context("the incumbent is gone")?.generation;
                ensure!(now == incumbent, "the two duel: generation {incumbent} became {now}");
            }
            let duplicates = cluster.shards[0].running.as_ref().map_or(0, |p| p.metrics.duplicate_identities.get());
            ensure!((1..10).contains(&duplicates), "{duplicates} alarms");
            Ok(())
        });
    }
}

#[test]
fn two_hundred_edges_return_to_a_restarted_shard_without_hammering_it() {
    let layout = Layout { edges: 200, ..Layout::default() };
    for seed in seeds([1]) {
        for kill in [false, true] {
            play("two_hundred_edges_return", seed, layout, async |cluster| {
                cluster.start_edges()?;
                cluster.calm().await?;
                sleep(40 * SECOND).await;
                if kill {
                    cluster.kill_shard(0);
                } else {
                    cluster.stop_shard(0);
                }
                let dials = |c: &Cluster| c.edges.iter().map(EdgeSeat::dials).sum::<u64>();
                let (mut before, mut worst, mut down) = (dials(cluster), 0, 0);
                while !cluster.is_calm() {
                    if down == 20 {
                        cluster.start_shard(0)?;
                    }
                    ensure!(down < 120, "not back in time\n{}", cluster.picture());
                    sleep(SECOND).await;
                    down += 1;
                    let now = dials(cluster);
                    (worst, before) = (worst.max(now - before), now);
                }
                eprintln!("kill: {kill}; all back {} s after the start; at most {worst} tries in a second", down - 20);
                ensure!(worst <= 200, "{worst} tries in a second");
                ensure!(down <= 20 + 60, "it took {} s until all were back", down - 20);
                Ok(())
            });
        }
    }
}

#[test]
fn a_crashed_shard_that_is_back_is_found_at_the_next_ping() {
    for seed in seeds(1..=3) {
        play("a_crashed_shard_that_is_back", seed, Layout { edges: 5, ..Layout::default() }, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            sleep(40 * SECOND).await;
            cluster.kill_shard(0);
            sleep(SECOND).await;
            cluster.start_shard(0)?;
            // Four seconds between two pings, and the pause of an edge whose link has lived long.
            let took = cluster.calm().await?;
            ensure!(took < 7 * SECOND, "it took {took:?}");
            Ok(())
        });
    }
}

#[test]
fn a_shard_that_stops_lets_streams_end() {
    for seed in seeds(1..=3) {
        play("a_shard_that_stops_lets_streams_end", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.open_stream(0, 0, Load { pause: SECOND, ..Load::of(1, 40_000) });
            cluster.open_stream(0, 0, Load { pause: SECOND, ..Load::of(2, 400_000) });
            sleep(SECOND).await;
            cluster.stop_shard(0);
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1 && tally.broken() == 1, "{tally:?}");
            cluster.start_shard(0)?;
            cluster.calm().await?;
            Ok(())
        });
    }
}

#[test]
fn an_edge_goes_to_another_shard_when_its_own_dies() {
    for seed in seeds(1..=2) {
        play(
            "an_edge_goes_to_another_shard",
            seed,
            Layout { shards: 2, edges: 5, ..Layout::default() },
            async |cluster| {
                cluster.start_edges()?;
                cluster.calm().await?;
                let first = cluster.holder(&cluster.edges[0].name.clone()).context("somebody holds it")?;
                cluster.kill_shard(first);
                let took = cluster.calm().await?;
                ensure!(took < 40 * SECOND, "it took {took:?}");
                cluster.open_streams(0, 0, 2, 10_000);
                let tally = cluster.streams_ended().await?;
                ensure!(tally.exact == 2, "{tally:?}");
                Ok(())
            },
        );
    }
}

#[test]
fn what_comes_from_strangers_does_no_harm() {
    for seed in seeds([1]) {
        play("what_comes_from_strangers", seed, Layout::default(), async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            let stranger = cluster.net.endpoint(SocketAddr::from(([10, 8, 8, 8], 1)), None)?;
            let shouted = stranger.connect(cluster.shards[0].address, "shard");
            ensure!(shouted.is_err(), "an endpoint without a configuration dials nothing");
            drop(stranger);
            cluster.net.shout(SocketAddr::from(([10, 8, 8, 8], 2)), cluster.shards[0].address, 2_000);
            sleep(SECOND).await;
            cluster.open_streams(0, 0, 1, 10_000);
            let tally = cluster.streams_ended().await?;
            ensure!(tally.exact == 1, "{tally:?}");
            Ok(())
        });
    }
}
