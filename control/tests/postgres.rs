//! The stories of control on PostgreSQL, and those of several replicas. Run them by
//! `scripts/with-postgres cargo test -p control`.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

#[path = "stories/raw.rs"]
mod raw;
#[path = "stories/stories.rs"]
mod stories;
#[path = "stories/world.rs"]
#[allow(dead_code, reason = "each database needs another part of it")]
mod world;

use std::time::Duration;

use proto::{
    api::{ApiCode, EdgeView, ShardReport, TokenKind, WhoAmI},
    policy::Rule,
};
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
    let report = ShardReport {
        addresses: vec!["s1.test:1".into()],
        version: "1".into(),
        full: true,
        online: vec![],
        offline: vec![],
    };
    shard.client.post::<()>("/v1/shards/report", &report).await.unwrap();
    event(&mut watch, 3 * SECOND, |e| e.shards.as_ref().is_some_and(|s| s.len() == 1)).await;
    event(&mut watch, 12 * SECOND, |e| e.shards.as_ref().is_some_and(Vec::is_empty)).await;
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
        assert!(admin.client.get::<WhoAmI>("/v1/whoami").await.is_ok(), "what needs no database works");
        watch.next().await.expect("the watch goes on");
        database.server_does(&back).await;
        // Connections that were made meanwhile keep the setting that they began with.
        database.server_does(&cut).await;
        until("readiness to come back", 30 * SECOND, async || ready.is_ready()).await;
        let _: Rule = admin.client.put("/v1/policy/ops", &rule()).await.unwrap();
        event(&mut watch, 2 * SECOND, |e| e.policy.is_some()).await;
        admin.client.delete::<()>("/v1/policy/ops").await.unwrap();
    }
    drop(database);
    world.end().await;
}
