//! An upgrade of a simulated mesh: edges and shards of the version before and of one to come live among those of this one.

#[path = "support/sim.rs"]
mod sim;

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use loadtest::{
    cluster::{
        Cluster, Layout,
        hand::{Message, Version, newer},
    },
    probe::{Load, StreamEnd, run_on},
    simnet::Net,
};
use proto::{
    code::CloseCode,
    frame::{HEADER, MAX_EDGE_TO_SHARD, MAX_STREAM_HEAD},
    id::EdgeId,
    message::EdgeToShard,
    stream::{Answer, Open},
    target::Target,
};
use runtime::{
    frames::FrameReader,
    link::{Link, Stream, listen::Listener, quic::Dialer},
};
use sim::{play, seeds};

const SECOND: Duration = Duration::from_secs(1);

/// Edges of all versions, in turn.
fn mix(cluster: &mut Cluster) -> anyhow::Result<()> {
    let versions = [Version::This, Version::Before, Version::After];
    for (edge, version) in cluster.edges.iter_mut().zip(versions.into_iter().cycle()) {
        edge.version = version;
    }
    cluster.start_edges()
}

/// Streams to every edge that go on for so many seconds.
fn tick(cluster: &mut Cluster, seconds: u64) {
    for edge in 0..cluster.edges.len() {
        cluster.open_stream(0, edge, Load { piece: 100, pause: SECOND, ..Load::of(edge as u64, 100 * seconds) });
    }
}

#[test]
fn edges_of_other_versions_are_served_moved_and_drained_like_ours() {
    for seed in seeds(1..=3) {
        let layout = Layout { shards: 3, edges: 24, ..Layout::default() };
        play("edges_of_other_versions", seed, layout, async |cluster| {
            mix(cluster)?;
            cluster.calm().await?;
            let all_are_served = async |cluster: &mut Cluster, what: &str| {
                let tally = cluster.streams_ended().await?;
                let felt = tally.broken() + tally.refused();
                ensure!(felt == 0, "{what}: {tally:?}");
                anyhow::Ok(())
            };
            tick(cluster, 20);
            cluster.add_shard()?;
            cluster.calm().await?;
            all_are_served(cluster, "scale out").await?;
            tick(cluster, 15);
            cluster.drain_shard(1).await?;
            cluster.calm().await?;
            all_are_served(cluster, "drain").await?;
            cluster.kill_shard(2);
            cluster.calm().await?;
            tick(cluster, 3);
            all_are_served(cluster, "after a death").await?;
            Ok(())
        });
    }
}

#[test]
fn a_rolling_upgrade_of_edges_is_not_felt_by_the_others() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 3, edges: 12, users: 2, ..Layout::default() };
        play("a_rolling_upgrade_of_edges", seed, layout, async |cluster| {
            for edge in &mut cluster.edges {
                edge.version = Version::Before;
            }
            cluster.start_edges()?;
            cluster.calm().await?;
            for (upgraded, version) in (0..12).zip([Version::This, Version::After].into_iter().cycle()) {
                for edge in (0..12).filter(|e| *e != upgraded) {
                    cluster.open_streams(edge % 2, edge, 1, 20_000);
                }
                cluster.stop_edge(upgraded);
                cluster.wait_for("it has stopped", 10 * SECOND, |c| c.leaving() == 0).await?;
                cluster.edges[upgraded].version = version;
                cluster.start_edge(upgraded)?;
                cluster.calm().await?;
                let tally = cluster.streams_ended().await?;
                ensure!(tally.exact == 11, "{tally:?}");
            }
            Ok(())
        });
    }
}

/// A Welcome, with what nobody here knows before it, in it and behind it.
fn welcome(shard: &str) -> Bytes {
    let welcome = Message::default()
        .text(1, shard)
        .number(2, 1)
        .number(4, 1)
        .number(5, 3_000)
        .number(6, 1)
        .bytes(50, &Message::default().text(1, "a section of a version to come").0)
        .fixed(51, 9);
    let welcome = Message::default().bytes(1, &welcome.0).number(90, 1).frame();
    [newer(), welcome, newer()].concat().into()
}

/// A Drain towards another shard, of a version to come.
fn drain(shard: &str, address: &str) -> Bytes {
    let candidate = Message::default().text(1, shard).text(2, address).text(9, "zone");
    let drain = Message::default().number(1, 100).number(2, 20_000).bytes(3, &candidate.0).text(30, "because");
    Message::default().bytes(4, &drain.0).frame()
}

/// A shard of a version to come, as far as one edge is concerned: welcomes it, answers its pings for ten seconds with
/// messages of its own in between, opens a stream to it, and sends it elsewhere. Returns how many pings there were.
async fn serve_one(listener: Listener, edge: EdgeId, elsewhere: (String, String)) -> anyhow::Result<u32> {
    let link = listener.accept().await.context("nobody comes")?.accept().await?;
    let mut control = link.accept().await?;
    let mut reader = FrameReader::new(MAX_EDGE_TO_SHARD);
    let hello = reader.next(&mut control.recv).await?.context("an end instead of Hello")?;
    ensure!(matches!(EdgeToShard::decode(hello)?, Some(EdgeToShard::Hello(_))), "it does not say Hello");
    control.send.write_one(welcome("shard-1")).await?;
    let mut open = Message(Open::new(Target::Probe { edge: edge.clone() }).encode()?.slice(HEADER..).to_vec());
    open = open.text(40, "a field of a version to come");
    let stream = opened(&link, open.frame(), &edge, false).await?;
    let end = run_on(stream, &Load::of(1, 10_000)).await;
    ensure!(end == StreamEnd::Exact, "{end}");
    let mut pings = 0;
    while let Some(body) = reader.next(&mut control.recv).await? {
        match EdgeToShard::decode(body)? {
            Some(EdgeToShard::Ping(token)) => {
                pings += 1;
                let pong = Message::default().bytes(7, &Message::default().fixed(1, token).number(2, 2).0).frame();
                control.send.write_one([newer(), pong].concat().into()).await?;
                if pings == 3 {
                    control.send.write_one(drain(&elsewhere.0, &elsewhere.1)).await?;
                }
            }
            Some(EdgeToShard::Bye { .. }) => break,
            Some(
                EdgeToShard::Hello(_) | EdgeToShard::Announce(_) | EdgeToShard::Renew(_) | EdgeToShard::Standing(_),
            )
            | None => {}
        }
    }
    link.ended().await;
    Ok(pings)
}

/// Opens a stream with this head; `routed` if a Routed answer must come before the edge's own.
async fn opened(link: &Link, head: Bytes, edge: &EdgeId, routed: bool) -> anyhow::Result<Stream> {
    let mut stream = link.open().await?;
    stream.send.write_one(head).await?;
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    if routed {
        let body = reader.next(&mut stream.recv).await?.context("an end instead of Routed")?;
        ensure!(matches!(Answer::decode(body)?, Answer::Routed(routed) if routed.edge == *edge), "not routed");
    }
    let body = reader.next(&mut stream.recv).await?.context("an end instead of an answer")?;
    ensure!(matches!(Answer::decode(body)?, Answer::Opened { edge: served, .. } if served == *edge), "not opened");
    stream.recv.unread(reader.into_rest());
    Ok(stream)
}

#[test]
fn a_shard_of_a_version_to_come_is_understood_by_our_edges() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 2, ..Layout::default() };
        play("a_shard_of_a_version_to_come", seed, layout, async |cluster| {
            cluster.calm().await?;
            // Another one has the place of the second shard, and the first is out of reach until later.
            cluster.kill_shard(1);
            cluster.net.cut(cluster.edges[0].host, cluster.shards[0].address.ip());
            let (seat, limits) = (&cluster.shards[1], mesh_cloud::link_limits());
            let server = mesh_cloud::endpoint_config(&seat.identity()?, cluster.bundle(), &limits)?;
            let endpoint = cluster.net.endpoint(seat.address, Some(server))?;
            let listener = Listener::from_endpoint(endpoint, &limits);
            let elsewhere = (cluster.shards[0].id.to_string(), cluster.shards[0].address.to_string());
            let served = serve_one(listener, cluster.edges[0].name.clone(), elsewhere);
            cluster.start_edge(0)?;
            let heal = async {
                cluster.wait_for("connected", 30 * SECOND, |c| c.edges[0].is_connected()).await?;
                cluster.net.heal_all();
                let there = |c: &Cluster| c.holder(&c.edges[0].name) == Some(0) && c.edges[0].is_connected();
                cluster.wait_for("it is at the first shard", 60 * SECOND, there).await
            };
            let (pings, there) = tokio::join!(served, heal);
            there?;
            ensure!(pings? >= 3, "the edge did not understand its Pongs");
            cluster.open_streams(0, 0, 1, 1_000);
            ensure!(cluster.streams_ended().await?.exact == 1);
            Ok(())
        });
    }
}

fn peer(cluster: &Cluster, net: &Net) -> anyhow::Result<Dialer> {
    let (seat, limits) = (&cluster.shards[1], mesh_cloud::peer_limits());
    let client = mesh_cloud::peer_config(&seat.identity()?, cluster.bundle(), &limits)?;
    Ok(Dialer::from_endpoint(net.endpoint(seat.address, None)?, client, &limits))
}

#[test]
fn a_peer_of_a_version_to_come_is_understood_by_our_shards() {
    for seed in seeds(1..=2) {
        let layout = Layout { shards: 2, edges: 2, ..Layout::default() };
        play("a_peer_of_a_version_to_come", seed, layout, async |cluster| {
            cluster.start_edges()?;
            cluster.calm().await?;
            cluster.kill_shard(1);
            cluster.calm().await?;
            let net = cluster.net.clone();
            let dialer = peer(cluster, &net)?;
            let (edge, absent) = (cluster.edges[0].name.clone(), "far-away".parse::<EdgeId>()?);
            let link = dialer.dial(cluster.shards[0].address, "shard-0").await?;
            let mut control = link.open().await?;
            let greeting = Message::default().number(1, 1).text(2, "9.9.9").text(9, "news");
            let held = Message::default().text(1, absent.as_str()).number(2, 7).number(3, 1);
            let held = Message::default().number(1, 1).bytes(2, &held.0).text(8, "why");
            let said = [
                Message::default().bytes(1, &greeting.0).number(70, 1).frame(),
                newer(),
                Message::default().bytes(2, &held.0).frame(),
                newer(),
            ];
            control.send.write_one(said.concat().into()).await?;
            let directory = cluster.shards[0].running.as_ref().context("it runs")?.shard.directory.clone();
            let told = |_: &Cluster| directory.holder(&absent).is_some_and(|(holder, _)| holder.as_str() == "shard-1");
            cluster.wait_for("the directory knows", SECOND, told).await?;
            let user = Message::default().number(1, 1).text(2, "user-0").text(20, "news");
            let target = Message::default().text(1, edge.as_str()).bytes(4, &[]);
            let open = Message::default()
                .bytes(1, &target.0)
                .bytes(2, &user.0)
                .text(3, "link")
                .number(5, 1)
                .text(6, "shard-1")
                .text(30, "a field of a version to come");
            let stream = opened(&link, open.frame(), &edge, true).await?;
            let end = run_on(stream, &Load::of(3, 20_000)).await;
            ensure!(end == StreamEnd::Exact, "{end}");
            link.close(CloseCode::Done, "");
            drop((control, link, dialer));
            cluster.wait_for("its word is over", SECOND, |_| directory.is_empty()).await?;
            Ok(())
        });
    }
}
