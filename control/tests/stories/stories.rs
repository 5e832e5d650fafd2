//! The stories of control, told on each database.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use proto::{
    api::{
        ApiCode, EdgeView, Enrolled, Presence, RenewFor, RenewRequest, ShardReport, ShardState, ShardView,
        TokenCreated, TokenKind, TokenRequest, TokenView, WatchEvent, WhoAmI,
    },
    join::{CaHash, JoinLine},
    message::Renew,
    policy::Rule,
    secret::Secret,
};
use runtime::{
    api::{ApiClient, ApiClientError},
    cert::CertFacts,
    clock::unix_now,
    identity::NodeKey,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    raw::{self, Tls},
    world::{Kind, Member, World, code, event, until},
};

const SECOND: Duration = Duration::from_secs(1);

fn renew_for(proof: &Renew) -> RenewFor {
    RenewFor {
        csr: BASE64_STANDARD.encode(&proof.csr),
        certificate: BASE64_STANDARD.encode(&proof.certificate),
        signature: BASE64_STANDARD.encode(&proof.signature),
    }
}

fn rule(name: &str) -> Rule {
    serde_json::from_value(serde_json::json!({
        "name": name, "from": ["group/ops"], "to": ["edge/shop-*"], "ports": ["22"]
    }))
    .unwrap()
}

/// The report of a shard without edges.
pub(crate) fn serving(shard: &str) -> ShardReport {
    ShardReport {
        started: 0,
        number: 0,
        bytes: 0,
        handshakes: 0,
        addresses: vec![format!("{shard}.test:7500")],
        version: "1".into(),
        state: ShardState::Serving,
        weight: proto::ring::WEIGHT,
        epoch: 0,
        streams: 0,
        full: false,
        online: vec![],
        offline: vec![],
        partings: vec![],
    }
}

fn report(shard: &str, edges: &[&str], full: bool) -> ShardReport {
    let online = edges.iter().map(|edge| Presence {
        edge: edge.parse().unwrap(),
        shard: shard.parse().unwrap(),
        since: unix_now(),
        address: "192.0.2.7:4001".into(),
        version: "1".into(),
        services: vec![],
        rtt_us: 900,
        streams: 2,
        carrier: String::new(),
        standing: None,
        standing_at: None,
    });
    let online = online.collect();
    ShardReport { full, online, ..serving(shard) }
}

pub(crate) async fn the_first_start_makes_a_ca_and_a_way_in(kind: Kind) {
    let world = World::new(kind).await;
    let data = &world.config.data_dir;
    let mode = |file: &str| fs::metadata(data.join(file)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("."), 0o700);
    for file in ["ca.key", "admin.join"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
    if kind == Kind::Sqlite {
        assert_eq!(mode("control.db"), 0o600);
    }
    assert_eq!(control::ca_hash(&world.config).unwrap(), world.control.ca_hash);
    let join: JoinLine = fs::read_to_string(data.join("admin.join")).unwrap().parse().unwrap();
    assert_eq!(join.ca, world.control.ca_hash);
    let admin = world.enrol(&join, None, &[]).await.unwrap();
    let me: WhoAmI = admin.client.get("/v1/whoami").await.unwrap();
    assert_eq!(me.identity, "spiffe://mesh.test/user/admin");
    assert_eq!(me.groups[0].as_str(), "admin");
    assert_eq!(me.ca, world.control.ca_hash.to_string());
    assert_eq!(code(world.enrol(&join, None, &[]).await), ApiCode::TokenUsed);

    // The second start finds everything and leaves the file alone.
    fs::remove_file(data.join("admin.join")).unwrap();
    let hash = world.control.ca_hash;
    let world = world.restarted(|_| ()).await;
    assert_eq!(world.control.ca_hash, hash);
    assert!(!world.config.data_dir.join("admin.join").exists());
    let client = admin.at(&world.address());
    assert!(client.get::<WhoAmI>("/v1/whoami").await.is_ok());
    // Lost the way in: another one is made beside the control that runs.
    let mut config = world.config.clone();
    config.public = vec![world.address().to_string()];
    let path = control::renew_admin_join(&config).await.unwrap();
    let join: JoinLine = fs::read_to_string(path).unwrap().parse().unwrap();
    assert_eq!(world.enrol(&join, None, &[]).await.unwrap().name(), "admin");
    world.end().await;
}

pub(crate) async fn an_edge_enrols_where_it_finds_the_ca_that_it_was_told_of(kind: Kind) {
    let world = World::new(kind).await;
    let join = world.join(TokenKind::Edge, |r| r.site = Some("berlin".parse().unwrap())).await;
    let wrong = JoinLine { ca: CaHash([7; 32]), ..join.clone() };
    assert!(matches!(world.enrol(&wrong, Some("shop-1"), &[]).await, Err(ApiClientError::WrongCa { .. })));
    assert_eq!(code(world.enrol(&join, None, &[]).await), ApiCode::BadRequest, "a name is missing");

    let edge = world.enrol(&join, Some("shop-1"), &["evil.example.org"]).await.unwrap();
    let facts = edge.credentials.facts();
    assert_eq!(facts.identity.to_string(), "spiffe://mesh.test/edge/shop-1");
    assert_eq!(facts.site.as_ref().unwrap().as_str(), "berlin");
    assert!((3590..=3600).contains(&(facts.not_after - unix_now())), "its role's time to live");
    let leaf = edge.credentials.chain()[0].to_vec();
    assert!(!leaf.windows(16).any(|w| w == b"evil.example.org"), "an edge gets no host names");
    let metrics = &world.control.metrics;
    assert_eq!(metrics.enrolments.with_label_values(&["edge", "ok"]).get(), 1);
    assert_eq!(metrics.issued.with_label_values(&["edge"]).get(), 1);

    let admin = world.admin().await;
    let edges: Vec<EdgeView> = admin.client.get("/v1/edges").await.unwrap();
    assert_eq!(edges.len(), 1);
    assert_eq!(edges[0].name.as_str(), "shop-1");
    assert!(!edges[0].revoked && edges[0].presence.is_none());
    world.end().await;
}

pub(crate) async fn every_token_that_is_refused_says_why(kind: Kind) {
    let world = World::new(kind).await;
    let used = world.join(TokenKind::Edge, |_| ()).await;
    world.enrol(&used, Some("a"), &[]).await.unwrap();
    assert_eq!(code(world.enrol(&used, Some("b"), &[]).await), ApiCode::TokenUsed);

    let short = world.token(TokenKind::Edge, |r| r.ttl_secs = 1).await;
    let join: JoinLine = short.join.unwrap().reveal().parse().unwrap();
    until("the token's end", 4 * SECOND, async || unix_now() > short.view.expires).await;
    assert_eq!(code(world.enrol(&join, Some("b"), &[]).await), ApiCode::TokenExpired);

    let fixed = world.join(TokenKind::Edge, |r| r.name = Some("c".parse().unwrap())).await;
    assert_eq!(code(world.enrol(&fixed, Some("d"), &[]).await), ApiCode::TokenMismatch);
    let access = world.token(TokenKind::Access, |r| r.name = Some("alice".parse().unwrap())).await;
    assert!(access.join.is_none());
    let as_join = JoinLine { token: access.token, ..fixed.clone() };
    assert_eq!(code(world.enrol(&as_join, None, &[]).await), ApiCode::TokenMismatch);

    for text in ["x", "cw_aaaaaaaa.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
        let unknown = JoinLine { token: Secret::new(text.into()), ..fixed.clone() };
        assert_eq!(code(world.enrol(&unknown, Some("d"), &[]).await), ApiCode::TokenUnknown);
    }
    let guess = Secret::new(format!("{}a", fixed.token.reveal()));
    let guessed = JoinLine { token: guess, ..fixed.clone() };
    assert_eq!(code(world.enrol(&guessed, Some("c"), &[]).await), ApiCode::TokenUnknown);

    let admin = world.admin().await;
    let id = control::token::id_of(&fixed.token).unwrap();
    admin.client.delete::<()>(&format!("/v1/tokens/{id}")).await.unwrap();
    assert_eq!(code(world.enrol(&fixed, None, &[]).await), ApiCode::TokenUnknown);
    assert_eq!(code(admin.client.delete::<()>(&format!("/v1/tokens/{id}")).await), ApiCode::NotFound);

    let refused = |c: &str| world.control.metrics.token_refusals.with_label_values(&[c]).get();
    assert_eq!(refused("token-used"), 1);
    assert_eq!(refused("token-expired"), 1);
    assert_eq!(refused("token-mismatch"), 2);
    assert_eq!(refused("token-unknown"), 4);
    world.end().await;
}

pub(crate) async fn who_guesses_tokens_is_slowed_down(kind: Kind) {
    let world = World::new(kind).await;
    let good = world.join(TokenKind::Edge, |_| ()).await;
    let bad = JoinLine { token: Secret::new("guess".into()), ..good.clone() };
    let mut codes = vec![];
    for _ in 0..25 {
        codes.push(code(world.enrol(&bad, Some("a"), &[]).await));
    }
    assert_eq!(codes[0], ApiCode::TokenUnknown);
    assert_eq!(codes.last(), Some(&ApiCode::Busy));
    assert_eq!(code(world.enrol(&good, Some("a"), &[]).await), ApiCode::Busy);
    world.end().await;
}

pub(crate) async fn a_token_for_one_lets_one_of_twenty_in(kind: Kind) {
    let world = World::new(kind).await;
    let join = world.join(TokenKind::Edge, |_| ()).await;
    let tries: Vec<_> = (0..20)
        .map(|i| {
            let (join, address) = (join.clone(), world.address());
            async move {
                let key = NodeKey::generate().unwrap();
                let request = proto::api::EnrolRequest {
                    token: join.token.clone(),
                    name: Some(format!("edge-{i}").parse().unwrap()),
                    csr: key.csr_pem(&[]).unwrap(),
                };
                let enrolled = ApiClient::enrol(&join, &request).await?;
                Ok(Member::new(&address, key, &enrolled))
            }
        })
        .collect();
    let mut running = tokio::task::JoinSet::new();
    for one in tries {
        running.spawn(one);
    }
    let mut lucky = 0;
    while let Some(result) = running.join_next().await {
        match result.unwrap() {
            Ok(_) => lucky += 1,
            refused => assert_eq!(code::<Member>(refused), ApiCode::TokenUsed),
        }
    }
    assert_eq!(lucky, 1);
    let edges: Vec<EdgeView> = world.admin().await.client.get("/v1/edges").await.unwrap();
    assert_eq!(edges.len(), 1);
    world.end().await;
}

pub(crate) async fn a_name_is_taken_until_it_is_replaced_or_revoked(kind: Kind) {
    let world = World::new(kind).await;
    let first = world.member(TokenKind::Edge, "shop-1").await;
    let plain = world.join(TokenKind::Edge, |_| ()).await;
    assert_eq!(code(world.enrol(&plain, Some("shop-1"), &[]).await), ApiCode::NameTaken);
    let replacing = world.join(TokenKind::Edge, |r| r.replace = true).await;
    let second = world.enrol(&replacing, Some("shop-1"), &[]).await.unwrap();
    assert_eq!(code(first.client.get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);
    assert!(second.client.get::<WhoAmI>("/v1/whoami").await.is_ok());

    let admin = world.admin().await;
    let view: EdgeView = admin.client.post("/v1/edges/shop-1/revoke", &()).await.unwrap();
    assert!(view.revoked);
    let again: EdgeView = admin.client.post("/v1/edges/shop-1/revoke", &()).await.unwrap();
    assert!(again.revoked, "revoking twice is no error");
    let third = world.enrol(&plain, Some("shop-1"), &[]).await.expect("the refused use did not use the token up");
    assert!(third.client.get::<WhoAmI>("/v1/whoami").await.is_ok());
    assert_eq!(code(second.client.get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);
    assert_eq!(code(admin.client.post::<EdgeView>("/v1/edges/none/revoke", &()).await), ApiCode::NotFound);
    assert_eq!(code(admin.client.get::<EdgeView>("/v1/edges/none").await), ApiCode::NotFound);
    world.end().await;
}

pub(crate) async fn members_renew_themselves(kind: Kind) {
    let world = World::new(kind).await;
    let join = world
        .join(TokenKind::User, |r| {
            r.name = Some("alice".parse().unwrap());
            r.groups = vec!["ops".parse().unwrap(), "dev".parse().unwrap()];
        })
        .await;
    let alice = world.enrol(&join, None, &[]).await.unwrap();
    let key = NodeKey::generate().unwrap();
    let request = RenewRequest { csr: key.csr_pem(&[]).unwrap() };
    let enrolled: Enrolled = alice.client.post("/v1/renew", &request).await.unwrap();
    let renewed = Member::new(&world.address(), key, &enrolled);
    assert_eq!(renewed.credentials.facts().groups, alice.credentials.facts().groups);
    assert_eq!(renewed.credentials.facts().groups.len(), 2);
    assert_ne!(renewed.serial(), alice.serial());
    let bad = RenewRequest { csr: "not a request".into() };
    assert_eq!(code(renewed.client.post::<Enrolled>("/v1/renew", &bad).await), ApiCode::BadRequest);
    let ok = world.control.metrics.renewals.with_label_values(&["user", "ok"]).get();
    assert_eq!(ok, 1);
    world.end().await;
}

pub(crate) async fn a_shard_renews_for_an_edge_that_proves_itself(kind: Kind) {
    let world = World::new(kind).await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let edge = world.member(TokenKind::Edge, "shop-1").await;
    let send = async |proof: &Renew| shard.client.post::<Enrolled>("/v1/renew-for", &renew_for(proof)).await;

    let (key, proof) = edge.proof();
    let enrolled = send(&proof).await.unwrap();
    let renewed = Member::new(&world.address(), key, &enrolled);
    assert_eq!(renewed.name(), "shop-1");
    assert!(renewed.client.get::<WhoAmI>("/v1/whoami").await.is_ok());

    let (_, other) = edge.proof();
    let forged = Renew { signature: other.signature.clone(), ..proof.clone() };
    assert_eq!(code(send(&forged).await), ApiCode::BadProof);
    let swapped = Renew { csr: other.csr.clone(), ..proof.clone() };
    assert_eq!(code(send(&swapped).await), ApiCode::BadProof);
    let stranger = runtime::tls::testing::TestCa::new().issue("edge/shop-1").renewal(&[]).unwrap().1;
    assert_eq!(code(send(&stranger).await), ApiCode::BadProof);
    let user = world.member(TokenKind::User, "alice").await.proof().1;
    assert_eq!(code(send(&user).await), ApiCode::BadProof);
    let garbage = RenewFor { csr: "%".into(), ..renew_for(&proof) };
    assert_eq!(code(shard.client.post::<Enrolled>("/v1/renew-for", &garbage).await), ApiCode::BadRequest);

    let admin = world.admin().await;
    let _: EdgeView = admin.client.post("/v1/edges/shop-1/revoke", &()).await.unwrap();
    assert_eq!(code(send(&renewed.proof().1).await), ApiCode::Revoked);
    let refused = |c: &str| world.control.metrics.renewals.with_label_values(&["edge", c]).get();
    assert_eq!((refused("ok"), refused("bad-proof"), refused("revoked")), (1, 4, 1));
    world.end().await;
}

pub(crate) async fn a_certificate_that_just_ended_can_be_renewed_through_a_shard(kind: Kind) {
    let world = World::with(kind, |c| c.leaf_ttl_secs.edge = 1).await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let edge = world.member(TokenKind::Edge, "shop-1").await;
    let ends = edge.credentials.facts().not_after;
    until("the certificate's end", 4 * SECOND, async || unix_now() > ends).await;
    let renewed = shard.client.post::<Enrolled>("/v1/renew-for", &renew_for(&edge.proof().1)).await.unwrap();
    assert!(renewed.not_after > ends);
    world.end().await;
}

pub(crate) async fn a_revocation_reaches_watchers_within_a_second(kind: Kind) {
    let world = World::new(kind).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let edge = world.member(TokenKind::Edge, "shop-1").await;
    let mut watch = shard.client.watch().await.unwrap();
    let first = watch.next().await.unwrap();
    assert!(first.edges.unwrap().contains_key("shop-1".parse::<proto::id::EdgeId>().as_ref().unwrap()));
    let began = tokio::time::Instant::now();
    let _: EdgeView = admin.client.post("/v1/edges/shop-1/revoke", &()).await.unwrap();
    let seen = event(&mut watch, SECOND, |e| e.revoked.is_some()).await;
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    assert_eq!(seen.revoked.unwrap()[0].serial, edge.serial());
    assert_eq!(code(edge.client.get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);
    let key = NodeKey::generate().unwrap();
    let request = RenewRequest { csr: key.csr_pem(&[]).unwrap() };
    assert_eq!(code(edge.client.post::<Enrolled>("/v1/renew", &request).await), ApiCode::Revoked);
    // It holds after a restart too.
    let world = world.restarted(|_| ()).await;
    assert_eq!(code(edge.at(&world.address()).get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);
    world.end().await;
}

pub(crate) async fn a_watch_tells_all_and_then_what_changes(kind: Kind) {
    let world = World::new(kind).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    let mut watch = shard.client.watch().await.unwrap();
    let first = watch.next().await.unwrap();
    let WatchEvent { policy, revoked, access_tokens, edges, shards, bundle, .. } = &first;
    assert_eq!(policy.as_deref(), Some(&[][..]));
    assert!(revoked.is_some() && access_tokens.is_some() && edges.is_some() && shards.is_some());
    assert_eq!(bundle.as_deref(), Some(world.control.bundle_pem().as_str()));
    assert_eq!(world.control.metrics.watchers.get(), 1);

    let put: Rule = admin.client.put("/v1/policy/ops", &rule("ops")).await.unwrap();
    assert_eq!(put, rule("ops"));
    let seen = event(&mut watch, SECOND, |e| e.policy.is_some()).await;
    assert!(seen.revision > first.revision);
    assert_eq!(seen.policy, Some(vec![rule("ops")]));
    assert!(seen.edges.is_none() && seen.bundle.is_none() && seen.revoked.is_none(), "only what changed");

    let access = world.token(TokenKind::Access, |r| {
        r.name = Some("alice".parse().unwrap());
        r.groups = vec!["ops".parse().unwrap()];
    });
    let access = access.await;
    let seen = event(&mut watch, SECOND, |e| e.access_tokens.is_some()).await.access_tokens.unwrap();
    assert_eq!(seen[0].sha256, control::token::sha256_hex(&access.token));
    assert_eq!((seen[0].user.as_str(), seen[0].groups.len()), ("alice", 1));
    admin.client.delete::<()>(&format!("/v1/tokens/{}", access.view.id)).await.unwrap();
    assert!(event(&mut watch, SECOND, |e| e.access_tokens.is_some()).await.access_tokens.unwrap().is_empty());

    admin.client.delete::<()>("/v1/policy/ops").await.unwrap();
    assert_eq!(event(&mut watch, SECOND, |e| e.policy.is_some()).await.policy, Some(vec![]));
    let quiet = event(&mut watch, 3 * SECOND, |e| e.policy.is_none()).await;
    assert_eq!(quiet, WatchEvent { revision: quiet.revision, ..WatchEvent::default() }, "a sign of life");
    drop(watch);
    let watchers = world.control.metrics.watchers.clone();
    until("the watcher's end", 5 * SECOND, async || watchers.get() == 0).await;
    world.end().await;
}

pub(crate) async fn shards_come_report_and_go(kind: Kind) {
    let world = World::new(kind).await;
    let (admin, shard) = (world.admin().await, world.member(TokenKind::Shard, "s1").await);
    world.member(TokenKind::Edge, "shop-1").await;
    let mut watch = shard.client.watch().await.unwrap();
    assert_eq!(watch.next().await.unwrap().shards, Some(vec![]));
    shard.client.post::<()>("/v1/shards/report", &report("s1", &["shop-1"], true)).await.unwrap();
    let reported = tokio::time::Instant::now();
    let alive = event(&mut watch, SECOND, |e| e.shards.is_some()).await.shards.unwrap();
    assert_eq!((alive[0].shard.as_str(), alive[0].addresses[0].as_str()), ("s1", "s1.test:7500"));
    let edge: EdgeView = admin.client.get("/v1/edges/shop-1").await.unwrap();
    assert_eq!(edge.presence.unwrap().shard.as_str(), "s1");
    let shards: Vec<ShardView> = admin.client.get("/v1/shards").await.unwrap();
    assert_eq!((shards[0].edges, shards[0].alive), (1, true));
    let lying = shard.client.post::<()>("/v1/shards/report", &report("s2", &["shop-1"], true)).await;
    assert_eq!(code(lying), ApiCode::Forbidden);

    // A restart of control does not take the shard away, although it has not reported yet.
    let world = world.restarted(|_| ()).await;
    let (client, shard_client) = (admin.at(&world.address()), shard.at(&world.address()));
    let mut watch = shard_client.watch().await.unwrap();
    assert_eq!(watch.next().await.unwrap().shards.unwrap().len(), 1);
    let left = event(&mut watch, 10 * SECOND, |e| e.shards.as_ref().is_some_and(Vec::is_empty)).await;
    assert!(left.edges.is_none());
    assert!(reported.elapsed() >= 6 * SECOND, "a lease is kept for six seconds");
    let edge: EdgeView = client.get("/v1/edges/shop-1").await.unwrap();
    assert!(edge.presence.is_none() && edge.last_seen.is_some(), "{edge:?}");
    let shards: Vec<ShardView> = client.get("/v1/shards").await.unwrap();
    assert!(!shards[0].alive);
    world.end().await;
}

pub(crate) async fn everybody_may_do_what_is_theirs(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let user = world.member(TokenKind::User, "alice").await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let edge = world.member(TokenKind::Edge, "shop-1").await;
    let token = TokenRequest {
        kind: TokenKind::Edge,
        name: None,
        uses: 1,
        ttl_secs: 60,
        groups: vec![],
        site: None,
        replace: false,
    };
    assert!(admin.client.post::<TokenCreated>("/v1/tokens", &token).await.is_ok());
    for member in [&user, &shard, &edge] {
        let client = &member.client;
        assert!(client.get::<WhoAmI>("/v1/whoami").await.is_ok());
        assert_eq!(code(client.post::<TokenCreated>("/v1/tokens", &token).await), ApiCode::Forbidden);
        assert_eq!(code(client.get::<Vec<TokenView>>("/v1/tokens").await), ApiCode::Forbidden);
        assert_eq!(code(client.put::<Rule>("/v1/policy/ops", &rule("ops")).await), ApiCode::Forbidden);
        assert_eq!(code(client.post::<EdgeView>("/v1/edges/shop-1/revoke", &()).await), ApiCode::Forbidden);
        assert_eq!(code(client.post::<()>("/v1/users/admin/revoke", &()).await), ApiCode::Forbidden);
    }
    assert!(user.client.get::<Vec<EdgeView>>("/v1/edges").await.is_ok());
    for member in [&shard, &edge] {
        assert_eq!(code(member.client.get::<Vec<EdgeView>>("/v1/edges").await), ApiCode::Forbidden);
        assert_eq!(code(member.client.get::<Vec<Rule>>("/v1/policy").await), ApiCode::Forbidden);
    }
    for member in [&user, &edge, &admin] {
        assert_eq!(code(member.client.watch().await), ApiCode::Forbidden);
        let report = report("s1", &[], true);
        assert_eq!(code(member.client.post::<()>("/v1/shards/report", &report).await), ApiCode::Forbidden);
        let proof = renew_for(&edge.proof().1);
        assert_eq!(code(member.client.post::<Enrolled>("/v1/renew-for", &proof).await), ApiCode::Forbidden);
    }
    let mut stranger = Tls::anonymous(&world).await;
    let answer = stranger.get("/v1/edges").await;
    assert_eq!((answer.status, answer.error().code), (401, ApiCode::Unauthenticated));
    assert_eq!(stranger.get("/v1/openapi.json").await.status, 200);
    assert_eq!(stranger.get("/v1/nothing").await.error().code, ApiCode::NotFound);
    assert_eq!(stranger.get("/v1/enrol").await.status, 405);
    world.end().await;
}

pub(crate) async fn tokens_and_rules_that_make_no_sense_are_refused(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let good = serde_json::json!({"kind": "edge", "ttl_secs": 60});
    let mut asks: Vec<serde_json::Value> = vec![];
    for (key, value) in [
        ("uses", serde_json::json!(0)),
        ("ttl_secs", serde_json::json!(0)),
        ("groups", serde_json::json!(["ops"])),
        ("kind", serde_json::json!("user")),
        ("name", serde_json::json!("Not A Name")),
        ("unknown", serde_json::json!(1)),
    ] {
        let mut ask = good.clone();
        ask[key] = value;
        asks.push(ask);
    }
    asks.push(serde_json::json!({"kind": "shard", "ttl_secs": 60, "replace": true}));
    for ask in asks {
        let refused = admin.client.post::<TokenCreated>("/v1/tokens", &ask).await;
        assert_eq!(code(refused), ApiCode::BadRequest, "{ask}");
    }
    let mut wrong = rule("ops");
    assert_eq!(code(admin.client.put::<Rule>("/v1/policy/other", &wrong).await), ApiCode::BadRequest);
    wrong.ports.clear();
    assert_eq!(code(admin.client.put::<Rule>("/v1/policy/ops", &wrong).await), ApiCode::BadRequest);
    assert_eq!(code(admin.client.put::<Rule>("/v1/policy/A%20b", &rule("A b")).await), ApiCode::BadRequest);
    assert_eq!(code(admin.client.delete::<()>("/v1/policy/none").await), ApiCode::NotFound);
    let tokens: Vec<TokenView> = admin.client.get("/v1/tokens").await.unwrap();
    assert!(tokens.iter().all(|t| t.name.as_ref().is_some_and(|n| n.as_str() == "admin")), "nothing was made");
    world.end().await;
}

pub(crate) async fn a_user_who_is_revoked_has_nothing_left(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let alice = world.member(TokenKind::User, "alice").await;
    let name = |r: &mut TokenRequest| r.name = Some("alice".parse().unwrap());
    let unused = world.join(TokenKind::User, name).await;
    world.token(TokenKind::Access, name).await;
    admin.client.post::<()>("/v1/users/alice/revoke", &()).await.unwrap();
    assert_eq!(code(alice.client.get::<WhoAmI>("/v1/whoami").await), ApiCode::Revoked);
    assert_eq!(code(world.enrol(&unused, None, &[]).await), ApiCode::TokenUnknown);
    let left: Vec<TokenView> = admin.client.get("/v1/tokens").await.unwrap();
    assert!(left.iter().all(|t| t.name.as_ref().is_none_or(|n| n.as_str() != "alice")));
    assert_eq!(code(admin.client.post::<()>("/v1/users/bob/revoke", &()).await), ApiCode::NotFound);
    world.end().await;
}

pub(crate) async fn a_shard_gets_its_names_and_none_of_controls(kind: Kind) {
    let world = World::with(kind, |c| c.names = vec!["control.mesh.test".into()]).await;
    let join = world.join(TokenKind::Shard, |r| r.uses = 5).await;
    assert_eq!(join.control.host, "control.mesh.test", "join lines take a name that is set");
    let join = JoinLine { control: world.address(), ..join };
    let shard = world.enrol(&join, Some("s1"), &["s1.mesh.test", "127.0.0.1"]).await.unwrap();
    let leaf = shard.credentials.chain()[0].to_vec();
    assert!(leaf.windows(12).any(|w| w == b"s1.mesh.test"));
    let greedy = world.enrol(&join, Some("s2"), &["control.mesh.test"]).await;
    assert_eq!(code(greedy), ApiCode::BadRequest);
    let wild = world.enrol(&join, Some("s2"), &["*.mesh.test"]).await;
    assert_eq!(code(wild), ApiCode::BadRequest);
    world.end().await;
}

pub(crate) async fn one_ca_takes_over_from_another(kind: Kind) {
    let world = World::new(kind).await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let old_hash = world.control.ca_hash;
    let mut watch = shard.client.watch().await.unwrap();
    watch.next().await.unwrap();

    // The next CA is made known before it issues anything: no restart is needed for that.
    let data = world.config.data_dir.clone();
    let domain = "mesh.test".parse().unwrap();
    let (next_cert, next_key) = control::ca::Ca::make(&domain, unix_now()).unwrap();
    fs::create_dir(data.join("roots.d")).unwrap();
    fs::write(data.join("roots.d/next.pem"), &next_cert).unwrap();
    let both = event(&mut watch, 5 * SECOND, |e| e.bundle.is_some()).await.bundle.unwrap();
    assert_eq!(both.matches("BEGIN CERTIFICATE").count(), 2);
    shard.bundle.replace(&runtime::tls::TrustBundle::from_pem(&both).unwrap());
    drop(watch);

    // Then it takes over, and the old one stays a root as long as its certificates live.
    let old = data.join("old");
    fs::create_dir(&old).unwrap();
    fs::rename(data.join("ca.pem"), data.join("roots.d/old.pem")).unwrap();
    fs::rename(data.join("ca.key"), old.join("ca.key")).unwrap();
    fs::remove_file(data.join("roots.d/next.pem")).unwrap();
    fs::write(data.join("ca.pem"), &next_cert).unwrap();
    fs::write(data.join("ca.key"), &next_key).unwrap();
    let world = world.restarted(|_| ()).await;
    assert_ne!(world.control.ca_hash, old_hash);
    let client = shard.at(&world.address());
    let key = NodeKey::generate().unwrap();
    let request = RenewRequest { csr: key.csr_pem(&[]).unwrap() };
    let enrolled: Enrolled = client.post("/v1/renew", &request).await.expect("the old certificate is still good");
    let renewed = Member::new(&world.address(), key, &enrolled);
    assert!(renewed.client.get::<WhoAmI>("/v1/whoami").await.is_ok());
    let edge = world.member(TokenKind::Edge, "shop-1").await;
    let proof = renew_for(&edge.proof().1);
    assert!(renewed.client.post::<Enrolled>("/v1/renew-for", &proof).await.is_ok());

    // When the old root goes, so does what it signed.
    fs::remove_file(data.join("roots.d/old.pem")).unwrap();
    until("the old root's end", 10 * SECOND, async || client.get::<WhoAmI>("/v1/whoami").await.is_err()).await;
    assert!(renewed.client.get::<WhoAmI>("/v1/whoami").await.is_ok());
    world.end().await;
}

pub(crate) async fn the_apis_certificate_is_renewed_under_open_connections(kind: Kind) {
    let world = World::with(kind, |c| c.leaf_ttl_secs.control = 3).await;
    let admin = world.admin().await;
    let mut open = Tls::member(&world, &admin).await;
    let first = open.server_serial();
    let changed = async || Tls::member(&world, &admin).await.server_serial() != first;
    until("the next certificate", 6 * SECOND, changed).await;
    assert_eq!(open.get("/v1/whoami").await.status, 200, "the open connection goes on");
    world.end().await;
}

pub(crate) async fn bad_input_is_answered_or_cut_off_and_never_hurts(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let mut tls = Tls::member(&world, &admin).await;
    let big = "x".repeat(80 * 1024);
    let answer = tls.post("/v1/enrol", &big).await;
    assert_eq!((answer.status, answer.error().code), (413, ApiCode::BadRequest));
    let mut tls = Tls::member(&world, &admin).await;
    for body in ["", "{", "null", "[]", "{\"token\": 1}", "\u{0}\u{1}"] {
        let answer = tls.post("/v1/enrol", body).await;
        assert_eq!((answer.status, answer.error().code), (400, ApiCode::BadRequest), "{body:?}");
    }
    let csr = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
    let body = serde_json::json!({"token": "x", "csr": csr}).to_string();
    assert_eq!(tls.post("/v1/enrol", &body).await.error().code, ApiCode::BadRequest);
    assert_eq!(tls.get("/v1/edges/No%00Name").await.error().code, ApiCode::BadRequest);
    assert_eq!(tls.get("/v1/edges/%FF").await.status, 400);

    let plain = raw::plain(&world, b"GET /v1/whoami HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(plain.starts_with("HTTP/1.1 400") && plain.contains("HTTPS only"), "{plain}");
    let garbage = raw::plain(&world, &[0x16, 3, 1, 0xff, 0xff, 0, 0, 0, 1, 2, 3]).await;
    assert!(!garbage.contains("HTTP"));
    let mut tls = Tls::member(&world, &admin).await;
    tls.send(b"\x00\x01\x02 not http\r\n\r\n").await;
    assert!(tls.read_to_end().await.starts_with("HTTP/1.1 400"));
    assert!(admin.client.get::<WhoAmI>("/v1/whoami").await.is_ok(), "control is well");
    world.end().await;
}

pub(crate) async fn slow_clients_are_cut_off(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let began = tokio::time::Instant::now();
    let mut mute = TcpStream::connect(world.control.api_addr).await.unwrap();
    let mut slow = Tls::member(&world, &admin).await;
    slow.send(b"GET /v1/whoami HTTP/1.1\r\nhost: x\r\nx-slow: ").await;
    let mut byte = [0];
    let ended = tokio::time::timeout(15 * SECOND, mute.read(&mut byte)).await.expect("the handshake's deadline");
    assert!(matches!(ended, Ok(0) | Err(_)));
    assert!(began.elapsed() >= 9 * SECOND);
    tokio::time::timeout(15 * SECOND, slow.read_to_end()).await.expect("the deadline of a request's head");
    let timeouts = world.control.metrics.connections.with_label_values(&["handshake-timeout"]).get();
    assert_eq!(timeouts, 1);
    world.end().await;
}

pub(crate) async fn readiness_and_metrics_are_told(kind: Kind) {
    let world = World::new(kind).await;
    let url = world.control.admin_addr;
    let get = async |path: &str| {
        let mut socket = TcpStream::connect(url).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).await.unwrap();
        text
    };
    until("readiness", 5 * SECOND, async || get("/readyz").await.starts_with("HTTP/1.1 200")).await;
    let admin = world.admin().await;
    admin.client.get::<WhoAmI>("/v1/whoami").await.unwrap();
    let metrics = get("/metrics").await;
    for line in [
        "mesh_control_enrolments_total{outcome=\"ok\",role=\"user\"} 1",
        "mesh_control_api_requests_total{route=\"/v1/whoami\",status=\"200\"} 1",
        "mesh_control_certificates_issued_total{role=\"user\"} 1",
        "mesh_control_store_up 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    world.end().await;
}

pub(crate) async fn a_database_stays_with_its_mesh_and_its_ca(kind: Kind) {
    let world = World::new(kind).await;
    let mut config = world.config.clone();
    let refused = async |config: &control::config::ControlConfig| {
        let error = control::start(config.clone(), runtime::shutdown::Tasks::new()).await.unwrap_err();
        format!("{error:#}")
    };
    config.trust_domain = "other.test".parse().unwrap();
    assert!(refused(&config).await.contains("belongs to the mesh mesh.test"));
    config.trust_domain = "mesh.test".parse().unwrap();
    let database = world
        .config
        .database
        .clone()
        .unwrap_or_else(|| control::store::open::sqlite_url(&world.config.data_dir.join("control.db")).unwrap());
    config.database = Some(database);
    config.data_dir = world.dir.path().join("elsewhere");
    let why = refused(&config).await;
    assert!(why.contains("belongs to the CA sha256:") && why.contains("copy ca.pem and ca.key"), "{why}");
    world.end().await;
}

/// What a certificate in DER says.
pub(crate) fn facts(der: &[u8]) -> CertFacts {
    CertFacts::from_der(der).unwrap()
}

/// Tells every story on a database.
#[macro_export]
macro_rules! on_each {
    ($kind:expr, $module:ident; $($story:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $story() {
            $crate::$module::$story($kind).await;
        })*
    };
}

/// The list of stories, for a macro.
#[macro_export]
macro_rules! all_stories {
    ($kind:expr) => {
        $crate::on_each! { $kind, stories;
            the_first_start_makes_a_ca_and_a_way_in
            an_edge_enrols_where_it_finds_the_ca_that_it_was_told_of
            every_token_that_is_refused_says_why
            who_guesses_tokens_is_slowed_down
            a_token_for_one_lets_one_of_twenty_in
            a_name_is_taken_until_it_is_replaced_or_revoked
            members_renew_themselves
            a_shard_renews_for_an_edge_that_proves_itself
            a_certificate_that_just_ended_can_be_renewed_through_a_shard
            a_revocation_reaches_watchers_within_a_second
            a_watch_tells_all_and_then_what_changes
            shards_come_report_and_go
            everybody_may_do_what_is_theirs
            tokens_and_rules_that_make_no_sense_are_refused
            a_user_who_is_revoked_has_nothing_left
            a_shard_gets_its_names_and_none_of_controls
            one_ca_takes_over_from_another
            the_apis_certificate_is_renewed_under_open_connections
            bad_input_is_answered_or_cut_off_and_never_hurts
            slow_clients_are_cut_off
            readiness_and_metrics_are_told
            a_database_stays_with_its_mesh_and_its_ca
        }
        $crate::on_each! { $kind, ring;
            the_ring_follows_what_shards_report
            an_order_takes_a_shard_out_until_it_is_taken_back
            a_late_report_does_not_undo_a_later_one
        }
        $crate::on_each! { $kind, audit;
            records_of_shards_are_kept_once_and_found_again
            old_records_and_too_many_of_them_are_forgotten
            a_control_that_keeps_no_records_takes_them_all_the_same
        }
        $crate::on_each! { $kind, ssh;
            a_user_gets_a_certificate_and_loses_it
            a_shard_gets_a_host_certificate
            keys_are_registered_and_removed
            the_authorities_lie_beside_the_ca
        }
    };
}
