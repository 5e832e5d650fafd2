//! Finding a shard, losing it, moving to another.

use std::time::Duration;

use mesh_edge::life::Phase;
use proto::{
    code::CloseCode,
    message::{EdgeToShard, Refuse, ShardToEdge, Welcome},
};

use crate::fake::{FakeShard, LONG, TestEdge, closed_with, echo, is_edge, mesh, open, soon};

#[tokio::test]
async fn hello_welcome_announce_and_a_pulse_that_makes_ready() {
    let (ca, shards) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let edge = TestEdge::start(&ca, &[&shard], |config| {
        config.services = vec![mesh_edge::config::ServiceConfig {
            name: "web".parse().unwrap(),
            kind: proto::message::ServiceKind::Http,
            address: "127.0.0.1:8080".parse().unwrap(),
            labels: [("tier".to_owned(), "front".to_owned())].into(),
        }];
    });
    let mut visit = shard.visit().await;
    assert_eq!(visit.hello.name.as_str(), "shop-1");
    assert_eq!(visit.hello.epoch, 0);
    assert!(is_edge(&visit.link));
    assert!(!edge.edge.ready().is_ready());
    visit.say(ShardToEdge::Welcome(shard.welcome_message())).await;
    let EdgeToShard::Announce(services) = visit.expect("Announce").await else { panic!("no Announce") };
    assert_eq!((services[0].name.as_str(), services[0].port), ("web", 8080));
    edge.connected(&shard).await;
    let link = visit.keep_alive(&shards);
    soon("ready", async {
        while !edge.edge.ready().is_ready() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(edge.edge.ready().report().contains("tunnel ok: shard s-1 answered"), "{}", edge.edge.ready().report());
    assert!(edge.sample("mesh_edge_rtt_seconds_count").unwrap() >= 1.0);
    assert_eq!(edge.sample("mesh_edge_dials_total{outcome=\"welcome\"}"), Some(1.0));
    edge.end().await;
    assert_eq!(closed_with(&link).await, Some(CloseCode::Shutdown));
    assert_eq!(shards.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_redirect_is_followed_but_not_for_ever() {
    let (ca, _) = mesh();
    let (first, owner) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&first], |_| ());
    first.visit().await.dismiss(ShardToEdge::Redirect { to: owner.candidate(), epoch: 9 }).await;
    let visit = owner.welcome().await;
    assert_eq!(visit.hello.epoch, 9, "the edge tells what it heard");
    edge.connected(&owner).await;
    edge.end().await;

    // Two shards that send an edge to each other: three redirects in a row, then a pause.
    let edge = TestEdge::start(&ca, &[&first], |_| ());
    for (at, to) in [(&first, &owner), (&owner, &first), (&first, &owner), (&owner, &first)] {
        at.visit().await.dismiss(ShardToEdge::Redirect { to: to.candidate(), epoch: 9 }).await;
    }
    let _visit = first.welcome().await;
    edge.connected(&first).await;
    assert_eq!(edge.sample("mesh_edge_dials_total{outcome=\"redirect\"}"), Some(4.0));
    edge.end().await;
}

#[tokio::test]
async fn a_refusal_is_honoured_and_the_next_shard_is_asked() {
    let (ca, _) = mesh();
    let (full, other) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&full, &other], |_| ());
    let refuse =
        Refuse { retry_after: Some(Duration::from_secs(600)), ..Refuse::because(CloseCode::Overloaded, "full") };
    full.visit().await.dismiss(ShardToEdge::Refuse(refuse)).await;
    let _visit = other.welcome().await;
    edge.connected(&other).await;
    edge.end().await;

    // With nobody else to ask, the edge waits as long as it was asked to, and says so.
    let edge = TestEdge::start(&ca, &[&full], |_| ());
    let refuse =
        Refuse { retry_after: Some(Duration::from_secs(600)), ..Refuse::because(CloseCode::Overloaded, "full") };
    full.visit().await.dismiss(ShardToEdge::Refuse(refuse)).await;
    let phase = edge.phase("waiting", |phase| matches!(phase, Phase::Waiting { .. })).await;
    let Phase::Waiting { until, why } = phase else { unreachable!() };
    let left = until - tokio::time::Instant::now();
    assert!((Duration::from_secs(590)..=Duration::from_secs(750)).contains(&left), "{left:?}");
    assert!(why.contains("full"), "{why}");
    edge.end().await;
}

#[tokio::test]
async fn an_edge_that_lost_its_link_returns_by_itself() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let edge = TestEdge::start(&ca, &[&shard], |_| ());
    let first = shard.welcome().await;
    edge.connected(&shard).await;
    let instance = first.hello.instance;
    first.link.close(CloseCode::Shutdown, "restart");
    let second = shard.welcome().await;
    assert_eq!(second.hello.instance, instance, "the same process");
    assert_eq!(second.hello.epoch, 7);
    edge.connected(&shard).await;
    assert_eq!(edge.sample("mesh_edge_link_ends_total{cause=\"shutdown\"}"), Some(1.0));
    second.keep_alive(&tasks);
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_shard_that_falls_silent_is_left() {
    let (ca, _) = mesh();
    let (deaf, other) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&deaf], |_| ());
    let mut visit = deaf.visit().await;
    let welcome =
        Welcome { candidates: vec![other.candidate()], ping: Duration::from_millis(100), ..deaf.welcome_message() };
    visit.say(ShardToEdge::Welcome(welcome)).await;
    // QUIC still acknowledges; only Pong is missing.
    let _visit = other.welcome().await;
    edge.connected(&other).await;
    assert_eq!(edge.sample("mesh_edge_link_ends_total{cause=\"timed-out\"}"), Some(1.0));
    edge.end().await;
}

#[tokio::test]
async fn a_move_breaks_no_stream() {
    let (ca, tasks) = mesh();
    let (old, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&old], |_| ());
    let mut visit = old.welcome().await;
    edge.connected(&old).await;
    let link = visit.link.clone();
    let (mut stream, _) = open(&link, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"before").await;

    visit.say(ShardToEdge::Move { to: next.candidate(), epoch: 8, within: LONG }).await;
    let mut arriving = next.visit().await;
    echo(&mut stream, b"while the next one thinks").await;
    assert!(matches!(&*edge.edge.phase().borrow(), Phase::Connected { shard, .. } if shard.as_str() == "s-1"));
    assert_eq!(arriving.hello.epoch, 8);
    arriving.say(ShardToEdge::Welcome(next.welcome_message())).await;
    edge.connected(&next).await;
    assert!(matches!(visit.expect("Announce").await, EdgeToShard::Announce(_)));
    assert!(matches!(visit.expect("Bye").await, EdgeToShard::Bye { .. }));
    visit.keep_alive(&tasks);

    echo(&mut stream, b"after").await;
    let (mut late, _) = open(&link, "shop-1/(probe)").await.expect("a stream that was on its way is served");
    echo(&mut late, b"late").await;
    let (mut new, _) = open(&arriving.link, "shop-1/(probe)").await.unwrap();
    echo(&mut new, b"new").await;
    for mut done in [stream, late, new] {
        done.send.finish();
        assert_eq!(soon("the end", done.recv.chunk(1)).await.unwrap(), None);
    }
    assert_eq!(closed_with(&link).await, Some(CloseCode::Moved), "the old link is retired when it is empty");
    arriving.keep_alive(&tasks);
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_move_to_nowhere_leaves_the_edge_where_it_is() {
    let (ca, tasks) = mesh();
    let (shard, gone) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let nowhere = gone.candidate();
    drop(gone);
    let edge = TestEdge::start(&ca, &[&shard], |_| ());
    let mut visit = shard.welcome().await;
    edge.connected(&shard).await;
    visit.say(ShardToEdge::Move { to: nowhere, epoch: 8, within: Duration::from_millis(300) }).await;
    // A newer order is followed although the older one led nowhere.
    let next = FakeShard::start(&ca, "s-3");
    visit.say(ShardToEdge::Move { to: next.candidate(), epoch: 9, within: LONG }).await;
    let link = visit.keep_alive(&tasks);
    let arrived = next.welcome().await;
    edge.connected(&next).await;
    assert_eq!(closed_with(&link).await, Some(CloseCode::Moved));
    arrived.keep_alive(&tasks);
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_drain_sends_the_edge_to_a_candidate_and_loses_no_stream() {
    let (ca, tasks) = mesh();
    let (old, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&old], |_| ());
    let mut visit = old.welcome().await;
    edge.connected(&old).await;
    let (mut stream, _) = open(&visit.link, "shop-1/(probe)").await.unwrap();
    let drain = ShardToEdge::Drain {
        reconnect_in: Duration::from_millis(50),
        deadline: LONG,
        candidates: vec![next.candidate()],
    };
    visit.say(drain).await;
    let arrived = next.welcome().await;
    edge.connected(&next).await;
    let link = visit.keep_alive(&tasks);
    echo(&mut stream, b"still here").await;
    stream.send.finish();
    assert_eq!(soon("the end", stream.recv.chunk(1)).await.unwrap(), None);
    assert_eq!(closed_with(&link).await, Some(CloseCode::Moved));
    arrived.keep_alive(&tasks);
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn the_deadline_of_a_drain_ends_a_stream_that_does_not() {
    let (ca, tasks) = mesh();
    let (old, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&old], |_| ());
    let mut visit = old.welcome().await;
    edge.connected(&old).await;
    let (mut stream, _) = open(&visit.link, "shop-1/(probe)").await.unwrap();
    let deadline = Duration::from_millis(700);
    visit.say(ShardToEdge::Drain { reconnect_in: Duration::ZERO, deadline, candidates: vec![next.candidate()] }).await;
    let arrived = next.welcome().await;
    let link = visit.keep_alive(&tasks);
    assert_eq!(closed_with(&link).await, Some(CloseCode::Moved));
    assert!(soon("a break", stream.recv.chunk(1)).await.is_err(), "it breaks, and does not end");
    arrived.keep_alive(&tasks);
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn an_edge_that_stops_says_bye_and_lets_its_streams_end() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let edge = TestEdge::start(&ca, &[&shard], |_| ());
    let mut visit = shard.welcome().await;
    edge.connected(&shard).await;
    let link = visit.link.clone();
    let (mut stream, _) = open(&link, "shop-1/(probe)").await.unwrap();
    assert!(matches!(visit.expect("Announce").await, EdgeToShard::Announce(_)));
    edge.tasks.stop();
    assert!(matches!(visit.expect("Bye").await, EdgeToShard::Bye { .. }));
    visit.keep_alive(&tasks);
    let refusal = open(&link, "shop-1/(probe)").await.unwrap_err();
    assert!(refusal.reason.contains("shutting down"), "{refusal}");
    echo(&mut stream, b"last words").await;
    stream.send.finish();
    assert_eq!(soon("the end", stream.recv.chunk(1)).await.unwrap(), None);
    assert_eq!(closed_with(&link).await, Some(CloseCode::Shutdown));
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}
