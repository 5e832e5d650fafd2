//! The stories of control on SQLite, and those that only SQLite has.

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

use control::store::open::sqlite_url;
use proto::{
    api::{ApiCode, EdgeView, ShardReport, ShardState, TokenKind, WhoAmI},
    policy::Rule,
    secret::Secret,
};
use ring::{Reporter, ring_of};
use sqlx::Connection;
use stories::serving;
use world::{Kind, World, code, event, until};

all_stories!(Kind::Sqlite);

fn rule() -> Rule {
    serde_json::from_value(serde_json::json!({"name": "ops", "from": ["user/*"], "to": ["service/web"]})).unwrap()
}

/// Another process holds the database: changes are refused with the reason, watches go on, and it heals by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_locked_is_told_and_waited_for() {
    let world = World::new(Kind::Sqlite).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let mut watch = shard.client.watch().await.unwrap();
    watch.next().await.unwrap();
    let url = sqlite_url(&world.config.data_dir.join("control.db")).unwrap();
    let mut other = sqlx::AnyConnection::connect(url.reveal()).await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();

    let join = world.control.admin_join().await;
    assert!(join.unwrap_err().to_string().contains("database cannot be used"));
    let refused = admin.client.put::<Rule>("/v1/policy/ops", &rule()).await;
    assert_eq!(code(refused), ApiCode::StoreUnavailable);
    let ready = world.control.ready.clone();
    until("readiness to go", Duration::from_secs(20), async || !ready.is_ready()).await;
    assert!(ready.report().contains("watches go on"), "{}", ready.report());
    assert!(admin.client.get::<WhoAmI>("/v1/whoami").await.is_ok(), "what needs no change works");
    watch.next().await.expect("the watch goes on");

    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    until("readiness to come back", Duration::from_secs(20), async || ready.is_ready()).await;
    let _: Rule = admin.client.put("/v1/policy/ops", &rule()).await.unwrap();
    event(&mut watch, Duration::from_secs(1), |e| e.policy.is_some()).await;
    other.close().await.unwrap();
    world.end().await;
}

/// A control may even start on a database that it cannot write, and then serves what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_read_only_serves_readers() {
    let world = World::new(Kind::Sqlite).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    world.member(TokenKind::Edge, "shop-1").await;
    let path = world.config.data_dir.join("control.db");
    let url = Secret::new(format!("sqlite://{}?mode=ro", path.display()));
    let world = world.restarted(|c| c.database = Some(url)).await;
    let client = admin.at(&world.address());
    let ready = world.control.ready.clone();
    until("a report that is not ready", Duration::from_secs(5), async || {
        ready.report().contains("store not ready") && !ready.report().contains("starting")
    })
    .await;
    assert!(ready.report().contains("readonly"), "{}", ready.report());
    assert_eq!(client.get::<Vec<EdgeView>>("/v1/edges").await.unwrap().len(), 1);
    assert_eq!(code(client.put::<Rule>("/v1/policy/ops", &rule()).await), ApiCode::StoreUnavailable);
    assert_eq!(code(client.post::<EdgeView>("/v1/edges/shop-1/revoke", &()).await), ApiCode::StoreUnavailable);
    let mut watch = shard.at(&world.address()).watch().await.unwrap();
    assert_eq!(watch.next().await.unwrap().edges.unwrap().len(), 1);
    assert!(world.control.metrics.store_errors.get() > 0);
    let world = world.restarted(|c| c.database = None).await;
    let _: Rule = admin.at(&world.address()).put("/v1/policy/ops", &rule()).await.unwrap();
    world.end().await;
}

/// While nothing can be written, shards are heard and the ring stays; what became of them counts afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_read_only_keeps_the_ring() {
    const SECOND: Duration = Duration::from_secs(1);
    let world = World::new(Kind::Sqlite).await;
    let (s1, s2) = (world.member(TokenKind::Shard, "s1").await, world.member(TokenKind::Shard, "s2").await);
    let mut watch = s1.client.watch().await.unwrap();
    for shard in [&s1, &s2] {
        shard.client.post::<()>("/v1/shards/report", &serving(&shard.name())).await.unwrap();
    }
    let ring = ring_of(&mut watch, 2 * SECOND, &["s1", "s2"]).await.ring.unwrap();
    let url = Secret::new(format!("sqlite://{}?mode=ro", world.config.data_dir.join("control.db").display()));
    let world = world.restarted(|c| c.database = Some(url)).await;
    let mut watch = s1.at(&world.address()).watch().await.unwrap();
    assert_eq!(watch.next().await.unwrap().ring.unwrap(), ring);
    let leaving = ShardReport { state: ShardState::Draining, ..serving("s2") };
    s2.at(&world.address()).post::<()>("/v1/shards/report", &leaving).await.expect("a report is taken");
    let failed = world.control.metrics.ring_rounds_failed.clone();
    until("rounds to fail", 5 * SECOND, async || failed.get() > 2).await;
    assert!(world.control.ready.report().contains("stays in force"), "{}", world.control.ready.report());
    let late = s1.at(&world.address()).watch().await.unwrap().next().await.unwrap();
    assert_eq!(late.ring.unwrap(), ring);

    let world = world.restarted(|c| c.database = None).await;
    let _s1 = Reporter::start("s1", vec![s1.at(&world.address())]);
    let client = s2.at(&world.address());
    client.post::<()>("/v1/shards/report", &leaving).await.unwrap();
    let mut watch = client.watch().await.unwrap();
    let after = ring_of(&mut watch, 5 * SECOND, &["s1"]).await.ring.unwrap();
    assert_eq!(after.epoch, ring.epoch + 1);
    world.end().await;
}
