//! Stories of access records: from shards into the database, and from there to administrators.

use control::store::{Store, access::Wanted, open::sqlite_url};
use prometheus::IntCounter;
use proto::{
    api::{ApiCode, TokenKind},
    audit::{AccessBatch, AccessPage, AccessRecord},
};
use runtime::clock::unix_millis;

use super::world::{Kind, World, code};

fn entry(who: &str, edge: &str, outcome: &str, code: &str) -> AccessRecord {
    let [who, edge, outcome, code] = [who, edge, outcome, code].map(str::to_owned);
    AccessRecord {
        unix_ms: unix_millis(),
        who,
        edge,
        outcome: outcome.into(),
        code: code.into(),
        target: "x:22".into(),
        ..AccessRecord::default()
    }
}

fn batch(first: u64, records: Vec<AccessRecord>) -> AccessBatch {
    AccessBatch { started: 1_000, first, records, lost: 0 }
}

pub(crate) async fn records_of_shards_are_kept_once_and_found_again(kind: Kind) {
    let world = World::new(kind).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let user = world.member(TokenKind::User, "bob").await;
    let send = async |batch: &AccessBatch| shard.client.post::<()>("/v1/shards/access", batch).await;
    let first = batch(
        1,
        vec![
            entry("user/alice", "shop-1", "finished", ""),
            entry("user/bob", "shop-1", "refused", "policy-denied"),
            // A shard speaks for itself alone, and a text may have any character.
            AccessRecord {
                shard: "s2".into(),
                detail: "a\u{0}b'".into(),
                ..entry("door/x", "shop-2", "reset", "link-lost")
            },
        ],
    );
    send(&first).await.unwrap();
    // The answer got lost: the same comes again, with one more behind it.
    let mut again = first.clone();
    again.records.push(entry("user/alice", "shop-3", "cancelled", "cancelled"));
    again.lost = 7;
    send(&again).await.unwrap();

    let page = async |query: &str| -> AccessPage { admin.client.get(&format!("/v1/access{query}")).await.unwrap() };
    let all = page("").await;
    let edges: Vec<_> = all.records.iter().map(|kept| kept.entry.edge.as_str()).collect();
    assert_eq!((edges, all.lost, all.before), (vec!["shop-1", "shop-1", "shop-2", "shop-3"], 7, None));
    assert!(all.records.iter().all(|kept| kept.entry.shard == "s1"), "{all:?}");
    assert!(all.records.windows(2).all(|pair| pair[0].number < pair[1].number));
    for (query, count) in [
        ("?who=user/alice", 2),
        ("?edge=shop-1&outcome=refused", 1),
        ("?outcome=policy-denied", 1),
        ("?since_secs=3600", 4),
        ("?who=user/al", 0),
        ("?who=user%2Falice%27%20OR%201=1", 0),
    ] {
        assert_eq!(page(query).await.records.len(), count, "{query}");
    }

    // By pages, backwards; and forwards from where one was.
    let last = page("?limit=2").await;
    assert_eq!(last.records[1].entry.edge, "shop-3");
    let older = page(&format!("?limit=2&before={}", last.before.unwrap())).await;
    assert_eq!((older.records.len(), older.before), (2, None));
    let after = page(&format!("?after={}", older.records[1].number)).await;
    assert_eq!(after.records, last.records);

    for bad in ["?limit=x", "?before=1&after=2", "?nonsense=1"] {
        assert_eq!(
            code(admin.client.get::<AccessPage>(&format!("/v1/access{bad}")).await),
            ApiCode::BadRequest,
            "{bad}"
        );
    }
    assert_eq!(code(user.client.get::<AccessPage>("/v1/access").await), ApiCode::Forbidden);
    assert_eq!(code(user.client.post::<()>("/v1/shards/access", &first).await), ApiCode::Forbidden);
    let flood = batch(1, vec![AccessRecord::default(); 1001]);
    assert_eq!(code(send(&flood).await), ApiCode::BadRequest);
    assert_eq!(world.control.metrics.access_lost.get(), 7);
    world.end().await;
}

pub(crate) async fn old_records_and_too_many_of_them_are_forgotten(kind: Kind) {
    let world = World::new(kind).await;
    let url = match &world.config.database {
        Some(url) => url.clone(),
        None => sqlite_url(&world.config.data_dir.join("control.db")).unwrap(),
    };
    let store = Store::open(&url, IntCounter::new("errors", "errors").unwrap()).await.unwrap();
    let of = |at: u64| AccessRecord { unix_ms: at, ..entry("user/alice", "shop-1", "finished", "") };
    store.keep_access("s1", &batch(1, (0..10).map(of).collect())).await.unwrap();
    let left = async || {
        let wanted = Wanted { limit: 100, after: Some(0), ..Wanted::default() };
        let records = store.access(&wanted).await.unwrap();
        records.iter().map(|kept| kept.entry.unix_ms).collect::<Vec<_>>()
    };
    assert_eq!(store.forget_access(0, 100).await.unwrap(), 0);
    assert_eq!(store.forget_access(3, 100).await.unwrap(), 3, "older than that");
    assert_eq!(left().await, [3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(store.forget_access(0, 4).await.unwrap(), 3, "more than that");
    assert_eq!(left().await, [6, 7, 8, 9]);
    store.close().await;
    world.end().await;
}

pub(crate) async fn a_control_that_keeps_no_records_takes_them_all_the_same(kind: Kind) {
    let world = World::with(kind, |config| config.audit.keep_days = 0).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let one = batch(1, vec![entry("user/alice", "shop-1", "finished", "")]);
    shard.client.post::<()>("/v1/shards/access", &one).await.unwrap();
    let page: AccessPage = admin.client.get("/v1/access").await.unwrap();
    assert_eq!(page.records, []);
    world.end().await;
}
