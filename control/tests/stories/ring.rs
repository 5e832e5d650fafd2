//! Stories of the ring: how it follows what shards report and administrators order.

use std::{collections::BTreeMap, time::Duration};

use proto::{
    api::{ApiCode, ShardOrder, ShardReport, ShardState, ShardView, TokenKind, WatchEvent},
    ring::RingSpec,
};
use runtime::api::{ApiClient, Watch};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use super::{
    stories::serving,
    world::{Kind, Member, World, code, event, until},
};

const SECOND: Duration = Duration::from_secs(1);

/// A shard that reports every two seconds, and at once when something changed, to the first control that takes it.
#[derive(Debug)]
pub(crate) struct Reporter {
    report: watch::Sender<ShardReport>,
    _task: JoinSet<()>,
}

impl Reporter {
    pub(crate) fn start(name: &str, controls: Vec<ApiClient>) -> Self {
        let (report, mut reports) = watch::channel(serving(name));
        let mut task = JoinSet::new();
        task.spawn(async move {
            loop {
                let report = reports.borrow_and_update().clone();
                for control in &controls {
                    if let Ok(Ok(())) = timeout(SECOND, control.post::<()>("/v1/shards/report", &report)).await {
                        break;
                    }
                }
                if let Ok(Err(_)) = timeout(2 * SECOND, reports.changed()).await {
                    return;
                }
            }
        });
        Self { report, _task: task }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut ShardReport)) {
        self.report.send_modify(change);
    }
}

pub(crate) fn members(ring: &RingSpec) -> Vec<&str> {
    ring.members.iter().map(|m| m.shard.as_str()).collect()
}

/// The next ring that has these members.
pub(crate) async fn ring_of(watch: &mut Watch, limit: Duration, wanted: &[&str]) -> WatchEvent {
    event(watch, limit, |e| e.ring.as_ref().is_some_and(|r| members(r) == wanted)).await
}

async fn shard(world: &World, name: &str) -> Member {
    world.member(TokenKind::Shard, name).await
}

pub(crate) async fn the_ring_follows_what_shards_report(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let names = ["s1", "s2", "s3"];
    let mut watch = shard(&world, "watcher").await.client.watch().await.unwrap();
    let first = watch.next().await.unwrap();
    assert_eq!((first.ring, first.orders), (Some(RingSpec::default()), Some(BTreeMap::new())));
    let mut reporters = vec![];
    for name in names {
        reporters.push(Reporter::start(name, vec![shard(&world, name).await.client]));
    }
    let all = ring_of(&mut watch, 2 * SECOND, &names).await.ring.unwrap();
    assert_eq!(all.members[0].addresses, ["s1.test:7500"]);
    assert_eq!(admin.client.get::<RingSpec>("/v1/ring").await.unwrap(), all);

    reporters[1].change(|r| (r.weight, r.epoch, r.streams) = (200, all.epoch, 12));
    let heavy = event(&mut watch, SECOND, |e| e.ring.is_some()).await.ring.unwrap();
    assert_eq!((heavy.epoch, heavy.members[1].weight), (all.epoch + 1, 200));
    let views: Vec<ShardView> = admin.client.get("/v1/shards").await.unwrap();
    let view = views.iter().find(|v| v.name.as_str() == "s2").unwrap();
    assert_eq!((view.weight, view.epoch, view.streams, view.order), (200, all.epoch, 12, ShardOrder::Serve));

    // One that stops is out at once, and still there for those who look for its edges.
    reporters[2].change(|r| r.state = ShardState::Draining);
    let left = ring_of(&mut watch, SECOND, &["s1", "s2"]).await;
    assert!(left.shards.is_none_or(|s| s.len() == 3));
    reporters.pop();

    // One that dies is out when its lease has ended.
    reporters.pop();
    let began = tokio::time::Instant::now();
    let rest = ring_of(&mut watch, 10 * SECOND, &["s1"]).await.ring.unwrap();
    assert!(began.elapsed() > 3 * SECOND, "{:?}", began.elapsed());
    assert_eq!(rest.epoch, heavy.epoch + 2, "one epoch for each change");

    // The last one dies: control is blind, or there is nobody to go to anyway.
    reporters.pop();
    let held = &world.control.metrics.ring_held;
    until("the ring to be held", 10 * SECOND, async || held.get() == 1).await;
    assert_eq!(admin.client.get::<RingSpec>("/v1/ring").await.unwrap(), rest);
    let changes = |cause: &str| world.control.metrics.ring_changes.with_label_values(&[cause]).get();
    assert_eq!(["join", "change", "leave", "dead"].map(changes), [3, 1, 1, 1]);
    assert!(world.control.ready.report().contains("this replica leads (control-"), "{}", world.control.ready.report());
    world.end().await;
}

pub(crate) async fn an_order_takes_a_shard_out_until_it_is_taken_back(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let members = [shard(&world, "s1").await, shard(&world, "s2").await];
    let start = |world: &World| {
        ["s1", "s2"].map(|n| {
            let member = members.iter().find(|m| m.name() == n).unwrap();
            Reporter::start(n, vec![member.at(&world.address())])
        })
    };
    let reporters = start(&world);
    let mut watch = members[0].client.watch().await.unwrap();
    ring_of(&mut watch, 2 * SECOND, &["s1", "s2"]).await;

    let view: ShardView = admin.client.put("/v1/shards/s2/order", &ShardOrder::Drain).await.unwrap();
    assert_eq!((view.order, view.alive, view.state), (ShardOrder::Drain, true, ShardState::Serving));
    let out = ring_of(&mut watch, SECOND, &["s1"]).await.ring.unwrap();
    let views: Vec<ShardView> = admin.client.get("/v1/shards").await.unwrap();
    assert_eq!(views.iter().map(|v| v.order).collect::<Vec<_>>(), [ShardOrder::Serve, ShardOrder::Drain]);

    // Nobody else may, and what makes no sense is refused.
    let refused = members[0].client.put::<ShardView>("/v1/shards/s2/order", &ShardOrder::Serve).await;
    assert_eq!(code(refused), ApiCode::Forbidden);
    let unknown = admin.client.put::<ShardView>("/v1/shards/s9/order", &ShardOrder::Drain).await;
    assert_eq!(code(unknown), ApiCode::NotFound);
    for wrong in [serde_json::json!("stop"), serde_json::json!({"order": "drain"})] {
        let refused = admin.client.put::<ShardView>("/v1/shards/s2/order", &wrong).await;
        assert_eq!(code(refused), ApiCode::BadRequest, "{wrong}");
    }

    // It stands when control starts again, and so does the ring.
    drop(reporters);
    let world = world.restarted(|_| ()).await;
    let client = admin.at(&world.address());
    let _reporters = start(&world);
    let mut watch = members[0].at(&world.address()).watch().await.unwrap();
    let first = watch.next().await.unwrap();
    assert_eq!((first.ring.as_ref(), first.orders.unwrap().len()), (Some(&out), 1));
    let view: ShardView = client.put("/v1/shards/s2/order", &ShardOrder::Cordon).await.unwrap();
    assert_eq!(view.order, ShardOrder::Cordon);
    assert_eq!(client.get::<RingSpec>("/v1/ring").await.unwrap(), out, "out already");
    let _: ShardView = client.put("/v1/shards/s2/order", &ShardOrder::Serve).await.unwrap();
    let back = ring_of(&mut watch, 5 * SECOND, &["s1", "s2"]).await.ring.unwrap();
    assert_eq!(back.epoch, out.epoch + 1);

    // By order, even the last one goes.
    for name in ["s1", "s2"] {
        let _: ShardView = client.put(&format!("/v1/shards/{name}/order"), &ShardOrder::Cordon).await.unwrap();
    }
    ring_of(&mut watch, 2 * SECOND, &[]).await;
    world.end().await;
}

/// A report may be under way for longer than one that was sent after it.
pub(crate) async fn a_late_report_does_not_undo_a_later_one(kind: Kind) {
    let world = World::new(kind).await;
    let (s1, s2) = (shard(&world, "s1").await, shard(&world, "s2").await);
    let _other = Reporter::start("s2", vec![s2.client]);
    let mut watch = s1.client.watch().await.unwrap();
    let tell = async |started, number, state| {
        let report = ShardReport { started, number, state, ..serving("s1") };
        s1.client.post::<()>("/v1/shards/report", &report).await.expect("a report is taken or skipped");
    };
    tell(1000, 1, ShardState::Serving).await;
    let begun = ring_of(&mut watch, 2 * SECOND, &["s1", "s2"]).await.ring.unwrap();
    tell(1000, 3, ShardState::Draining).await;
    let left = ring_of(&mut watch, SECOND, &["s2"]).await.ring.unwrap();
    assert_eq!(left.epoch, begun.epoch + 1);
    tell(1000, 2, ShardState::Serving).await;
    let nothing = event(&mut watch, 60 * SECOND, |e| e.ring.is_some());
    assert!(timeout(3 * SECOND, nothing).await.is_err(), "an old word brings nobody back");
    tell(2000, 1, ShardState::Serving).await;
    let back = ring_of(&mut watch, 2 * SECOND, &["s1", "s2"]).await.ring.unwrap();
    tell(1000, 4, ShardState::Draining).await;
    let nothing = event(&mut watch, 60 * SECOND, |e| e.ring.is_some());
    assert!(timeout(SECOND, nothing).await.is_err(), "nor does it send anybody away");
    assert_eq!(back.epoch, begun.epoch + 2);
    world.end().await;
}
