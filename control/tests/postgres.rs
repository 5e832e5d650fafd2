//! The stories of control on PostgreSQL, and those of several replicas. Run them by
//! `scripts/with-postgres cargo test -p control`.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

#[path = "stories/audit.rs"]
mod audit;
#[path = "stories/raw.rs"]
mod raw;
#[path = "stories/ring.rs"]
mod ring;
#[path = "stories/ssh.rs"]
mod ssh;
#[path = "stories/stories.rs"]
mod stories;
#[path = "stories/world.rs"]
#[allow(dead_code, reason = "each database needs another part of it")]
mod world;

use std::time::Duration;

use proto::{
    api::{ApiCode, EdgeView, ShardReport, ShardState, TokenKind, WhoAmI},
    policy::Rule,
    ring::RingSpec,
};
use ring::{Reporter, ring_of};
use tokio::time::{Instant, timeout, timeout_at};
use world::{Kind, World, code, event, until};

all_stories!(Kind::Postgres);

const SECOND: Duration = Duration::from_secs(1);

fn rule() -> Rule {
    serde_json::from_value(serde_json::json!({"name": "ops", "from": ["user/*"], "to": ["service/web"]})).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_replica_changes_the_other_one_tells() {
    let one = World::new(Kind::Postgres).await;
    let two = one.replica().await;
    assert_eq!(one.control.ca_hash, two.control.ca_hash);
    let (admin, shard) = (one.admin().await, one.member(TokenKind::Shard, "s1").await);
    let edge = one.member(TokenKind::Edge, "shop-1").await;
    let mut watch = shard.at(&two.address()).watch().await.unwrap();
    watch.next().await.unwrap();
    let _: Rule = admin.client.put("/v1/policy/ops", &rule()).await.unwrap();
    event(&mut watch, 3 * SECOND, |e| e.policy.as_ref().is_some_and(|p| p.len() == 1)).await;
    let _: EdgeView = admin.client.post("/v1/edges/shop-1/revoke", &()).await.unwrap();
    event(&mut watch, 3 * SECOND, |e| e.revoked.as_ref().is_some_and(|r| r[0].serial == edge.serial())).await;
    assert_eq!(code(edge.at(&two.address()).get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);

    // A shard that reports to one lives at both, for as long as it reports.
    let report = stories::serving("s1");
    shard.client.post::<()>("/v1/shards/report", &report).await.unwrap();
    event(&mut watch, 3 * SECOND, |e| e.shards.as_ref().is_some_and(|s| s.len() == 1)).await;
    event(&mut watch, 12 * SECOND, |e| e.shards.as_ref().is_some_and(Vec::is_empty)).await;
    two.end().await;
    one.end().await;
}

/// Two replicas, of which the leader is killed: the other one takes over, and no shard notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_is_killed_the_other_replica_leads() {
    let first = World::new(Kind::Postgres).await;
    let doomed = first.doomed().await;
    // The one that started first leads until it stops; then it is the other one's turn.
    until("a leader", 5 * SECOND, async || first.control.metrics.leading.get() == 1).await;
    let led = &doomed.control.metrics.leading;
    let stopped = first.stopped().await;
    until("the next leader", SECOND, async || led.get() == 1).await;
    let world = stopped.started(|_| ()).await;
    assert_eq!(world.control.metrics.leading.get(), 0);

    let (here, there) = (world.address(), doomed.address());
    let mut reporters = vec![];
    for (name, controls) in [("s1", [&there, &here]), ("s2", [&there, &here]), ("s3", [&here, &there])] {
        let shard = world.member(TokenKind::Shard, name).await;
        reporters.push(Reporter::start(name, controls.map(|c| shard.at(c)).to_vec()));
    }
    let admin = world.admin().await;
    let follower = world.member(TokenKind::Shard, "follower").await;
    let mut watch = follower.client.watch().await.unwrap();
    let ring = ring_of(&mut watch, 3 * SECOND, &["s1", "s2", "s3"]).await.ring.unwrap();
    until("both to say the same", SECOND, async || admin.at(&there).get::<RingSpec>("/v1/ring").await.unwrap() == ring)
        .await;

    let began = Instant::now();
    doomed.kill();
    until("the other one to lead", 8 * SECOND, async || world.control.metrics.leading.get() == 1).await;
    let took = began.elapsed();
    assert!(took > 5 * SECOND, "not before the leader's lease has ended: {took:?}");
    let another = event(&mut watch, 60 * SECOND, |e| e.ring.is_some());
    assert!(timeout_at(began + 14 * SECOND, another).await.is_err(), "nobody is taken for dead");

    // And it does all that the first one did.
    reporters[0].change(|r| r.state = ShardState::Draining);
    let left = ring_of(&mut watch, SECOND, &["s2", "s3"]).await.ring.unwrap();
    assert_eq!(left.epoch, ring.epoch + 1);
    reporters.truncate(2);
    let died = ring_of(&mut watch, 10 * SECOND, &["s2"]).await.ring.unwrap();
    assert_eq!(died.epoch, ring.epoch + 2);
    world.end().await;
}

/// An old word of a shard reaches the row through another replica than the later one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_report_through_another_replica_does_not_undo_a_later_one() {
    let one = World::new(Kind::Postgres).await;
    let two = one.replica().await;
    let (s1, s2) = (one.member(TokenKind::Shard, "s1").await, one.member(TokenKind::Shard, "s2").await);
    let (here, there) = (s1.at(&one.address()), s1.at(&two.address()));
    let _other = Reporter::start("s2", vec![s2.client.clone()]);
    let mut watch = here.watch().await.unwrap();
    let report = |number, state| ShardReport { started: 1000, number, state, ..stories::serving("s1") };
    here.post::<()>("/v1/shards/report", &report(1, ShardState::Serving)).await.unwrap();
    let begun = ring_of(&mut watch, 2 * SECOND, &["s1", "s2"]).await.ring.unwrap();
    here.post::<()>("/v1/shards/report", &report(3, ShardState::Draining)).await.unwrap();
    // Whether the other one has read the row by now or not.
    there.post::<()>("/v1/shards/report", &report(2, ShardState::Serving)).await.unwrap();
    let left = ring_of(&mut watch, 2 * SECOND, &["s2"]).await.ring.unwrap();
    assert_eq!(left.epoch, begun.epoch + 1);
    let nothing = event(&mut watch, 60 * SECOND, |e| e.ring.is_some());
    assert!(timeout(3 * SECOND, nothing).await.is_err(), "an old word brings nobody back");
    two.end().await;
    one.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_for_one_lets_one_in_at_two_replicas() {
    let one = World::new(Kind::Postgres).await;
    let two = one.replica().await;
    for round in 0..10 {
        let here = one.join(TokenKind::Edge, |_| ()).await;
        let there = proto::join::JoinLine { control: two.address(), ..here.clone() };
        let (a, b) = (format!("a-{round}"), format!("b-{round}"));
        let (first, second) = tokio::join!(one.enrol(&here, Some(&a), &[]), two.enrol(&there, Some(&b), &[]));
        assert!(first.is_ok() != second.is_ok(), "one of them, and not both");
        let refused = if first.is_ok() { second } else { first };
        assert_eq!(code(refused), ApiCode::TokenUsed);
    }
    two.end().await;
    one.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_goes_is_told_and_waited_for() {
    let world = World::new(Kind::Postgres).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let mut watch = shard.client.watch().await.unwrap();
    watch.next().await.unwrap();
    shard.client.post::<()>("/v1/shards/report", &stories::serving("s1")).await.unwrap();
    let ring = ring_of(&mut watch, 2 * SECOND, &["s1"]).await.ring.unwrap();
    let database = world.database.clone().unwrap();
    let ready = world.control.ready.clone();
    let name = database.name().to_owned();
    let cut = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    let gone_and_back = [
        (
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"),
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"),
        ),
        (
            format!("ALTER DATABASE {name} SET default_transaction_read_only = on"),
            format!("ALTER DATABASE {name} SET default_transaction_read_only = off"),
        ),
    ];
    for (go, back) in gone_and_back {
        database.server_does(&go).await;
        database.server_does(&cut).await;
        until("readiness to go", 30 * SECOND, async || !ready.is_ready()).await;
        let refused = admin.client.put::<Rule>("/v1/policy/ops", &rule()).await;
        assert_eq!(code(refused), ApiCode::StoreUnavailable, "{go}");
        let unheard = shard.client.post::<()>("/v1/shards/report", &stories::serving("s1")).await;
        assert_eq!(code(unheard), ApiCode::StoreUnavailable, "another replica may be able to tell: {go}");
        assert!(admin.client.get::<WhoAmI>("/v1/whoami").await.is_ok(), "what needs no database works");
        if go.contains("ALLOW_CONNECTIONS") {
            // Another replica may see what this one does not.
            let ended = async { while watch.next().await.is_ok() {} };
            timeout(10 * SECOND, ended).await.expect("the watch ends");
            assert_eq!(code(shard.client.watch().await), ApiCode::StoreUnavailable);
            assert!(ready.report().contains("watch not ready"), "{}", ready.report());
        } else {
            watch.next().await.expect("what can be read is told");
        }
        database.server_does(&back).await;
        // Connections that were made meanwhile keep the setting that they began with.
        database.server_does(&cut).await;
        until("readiness to come back", 30 * SECOND, async || ready.is_ready()).await;
        if go.contains("ALLOW_CONNECTIONS") {
            watch = shard.client.watch().await.unwrap();
        }
        let _: Rule = admin.client.put("/v1/policy/ops", &rule()).await.unwrap();
        event(&mut watch, 2 * SECOND, |e| e.policy.is_some()).await;
        admin.client.delete::<()>("/v1/policy/ops").await.unwrap();
        shard.client.post::<()>("/v1/shards/report", &stories::serving("s1")).await.unwrap();
        assert_eq!(admin.client.get::<RingSpec>("/v1/ring").await.unwrap(), ring, "{go}");
    }
    drop(database);
    world.end().await;
}
