//! A shard that is lost without a word: how soon the edge knows, where it goes, and what it takes for dead that is not.

use std::time::Duration;

use mesh_edge::life::Phase;
use proto::{
    code::CloseCode,
    message::{Refuse, ShardToEdge, Welcome},
};
use tokio::time::Instant;

use crate::{
    fake::{FakeShard, LONG, TestEdge, Visit, closed_with, echo, mesh, open, soon},
    relay::Relay,
};

/// An edge that a shard serves through a relay, and where it goes if that shard is lost.
async fn served(edge: &TestEdge, shard: &FakeShard, next: &FakeShard) -> Visit {
    let mut visit = shard.visit().await;
    let welcome = Welcome { candidates: vec![next.candidate()], ..shard.welcome_message() };
    visit.say(ShardToEdge::Welcome(welcome)).await;
    edge.connected(shard).await;
    visit
}

fn avoided(visit: &Visit) -> Vec<&str> {
    visit.hello.avoid.iter().map(|shard| shard.as_str()).collect()
}

#[tokio::test]
async fn a_shard_whose_port_closes_is_left_for_the_next_owner_at_once() {
    let (ca, tasks) = mesh();
    let (shard, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let mut relay = Relay::start(&shard);
    let edge = TestEdge::start_at(&ca, vec![relay.address.to_string()]);
    let first = served(&edge, &shard, &next).await.keep_alive(&tasks);
    relay.close().await;
    let began = Instant::now();
    let second = next.welcome().await;
    // Half a second is the period, and then it may take one and a half.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(avoided(&second), ["s-1"], "so that it is not sent back to the dead one");
    edge.connected(&next).await;
    assert_eq!(edge.sample("mesh_edge_link_ends_total{cause=\"nobody-listens\"}"), Some(1.0));
    second.keep_alive(&tasks);
    edge.end().await;
    first.close(CloseCode::Done, "");
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_port_that_closes_for_a_moment_kills_no_tunnel() {
    let (ca, tasks) = mesh();
    let (shard, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let mut relay = Relay::start(&shard);
    let edge = TestEdge::start_at(&ca, vec![relay.address.to_string()]);
    let link = served(&edge, &shard, &next).await.keep_alive(&tasks);
    let (mut stream, _) = open(&link, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"before").await;
    let since = edge.phase("served", |phase| matches!(phase, Phase::Connected { .. })).await;
    // The network says it of each ping that meets the closed port; every time it is contradicted.
    for _ in 0..3 {
        let refusals = || edge.sample("mesh_edge_icmp_refusals_total").unwrap();
        let before = refusals();
        relay.close().await;
        soon("the network says so", async {
            while refusals() == before {
                tokio::task::yield_now().await;
            }
        })
        .await;
        relay.open().await;
        echo(&mut stream, b"kept").await;
    }
    assert_eq!(*edge.edge.phase().borrow(), since, "the same tunnel");
    assert!(link.end().is_none());
    stream.send.finish();
    edge.end().await;
    assert_eq!(closed_with(&link).await, Some(CloseCode::Shutdown));
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_shard_that_nothing_comes_from_is_left_in_twelve_seconds() {
    let (ca, tasks) = mesh();
    let (shard, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let relay = Relay::start(&shard);
    let edge = TestEdge::start_at(&ca, vec![relay.address.to_string()]);
    let first = served(&edge, &shard, &next).await.keep_alive(&tasks);
    relay.swallow();
    let began = Instant::now();
    let second = next.welcome().await;
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    assert!(began.elapsed() > Duration::from_secs(7), "nor is it left too soon: {:?}", began.elapsed());
    assert_eq!(avoided(&second), ["s-1"]);
    edge.connected(&next).await;
    assert_eq!(edge.sample("mesh_edge_rebinds_total"), Some(1.0), "a new socket was tried before");
    assert_eq!(edge.sample("mesh_edge_link_ends_total{cause=\"timed-out\"}"), Some(1.0));
    second.keep_alive(&tasks);
    edge.end().await;
    first.close(CloseCode::Done, "");
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_tunnel_outlives_the_nat_that_forgot_it() {
    let (ca, tasks) = mesh();
    let (shard, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let relay = Relay::start(&shard);
    let edge = TestEdge::start_at(&ca, vec![relay.address.to_string()]);
    let link = served(&edge, &shard, &next).await.keep_alive(&tasks);
    let (mut stream, _) = open(&link, "shop-1/(probe)").await.unwrap();
    echo(&mut stream, b"before").await;
    let (since, address) = (edge.edge.phase().borrow().clone(), link.remote_address());
    relay.forget().await;
    echo(&mut stream, b"through a new mapping").await;
    assert_eq!(edge.sample("mesh_edge_rebinds_total"), Some(1.0));
    assert_eq!(*edge.edge.phase().borrow(), since, "the same tunnel");
    assert_ne!(link.remote_address(), address);
    stream.send.finish();
    edge.end().await;
    assert_eq!(closed_with(&link).await, Some(CloseCode::Shutdown));
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn an_owner_that_is_dead_or_full_makes_the_edge_stay_where_it_asks_next() {
    let (ca, tasks) = mesh();
    let (asked, owner) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let mut dead = Relay::start(&owner);
    dead.close().await;
    for full in [false, true] {
        let edge = TestEdge::start(&ca, &[&asked], |_| ());
        let to = if full { owner.candidate() } else { dead.candidate() };
        let visit = asked.visit().await;
        assert!(avoided(&visit).is_empty());
        visit.dismiss(ShardToEdge::Redirect { to, epoch: 7 }).await;
        if full {
            let wait = Some(Duration::from_secs(600));
            let refuse = Refuse { retry_after: wait, ..Refuse::because(CloseCode::Overloaded, "full") };
            owner.visit().await.dismiss(ShardToEdge::Refuse(refuse)).await;
        }
        let visit = asked.welcome().await;
        assert_eq!(avoided(&visit), ["s-2"]);
        edge.connected(&asked).await;
        visit.keep_alive(&tasks);
        edge.end().await;
    }
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_shard_that_drains_is_named_to_the_next_one() {
    let (ca, tasks) = mesh();
    let (old, next) = (FakeShard::start(&ca, "s-1"), FakeShard::start(&ca, "s-2"));
    let edge = TestEdge::start(&ca, &[&old], |_| ());
    let mut visit = old.welcome().await;
    edge.connected(&old).await;
    let candidates = vec![next.candidate()];
    visit.say(ShardToEdge::Drain { reconnect_in: Duration::ZERO, deadline: LONG, candidates }).await;
    let arrived = next.welcome().await;
    assert_eq!(avoided(&arrived), ["s-1"]);
    edge.connected(&next).await;
    let link = visit.keep_alive(&tasks);
    assert_eq!(closed_with(&link).await, Some(CloseCode::Moved));
    arrived.keep_alive(&tasks);
    soon("the end", edge.end()).await;
    assert_eq!(tasks.drained(LONG).await, 0);
}
