//! What each route about shards and the ring does.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Path, State},
    http::StatusCode,
};
use proto::{
    api::{ApiCode, ShardOrder, ShardReport, ShardState, ShardView},
    id::ShardId,
    ring::{RingSpec, WEIGHT},
};
use runtime::clock::unix_now;
use tokio::time::Instant;

use super::{
    App, Failure,
    guard::Caller,
    handlers::{Answer, Json, not_found, who},
};
use crate::authority::store_error;

pub(super) async fn report(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(report): Json<ShardReport>,
) -> Result<StatusCode, Failure> {
    let shard = facts.identity.shard().ok_or_else(|| Failure::new(ApiCode::Forbidden, "only shards report"))?;
    let heard = app
        .presence
        .report(&shard, report, Instant::now(), unix_now())
        .map_err(|e| Failure::new(ApiCode::Forbidden, e.to_string()))?;
    let Some(heard) = heard else {
        tracing::debug!(%shard, "an old report came late");
        return Ok(StatusCode::NO_CONTENT);
    };
    // Where the edges are is taken in any case.
    let stirs = heard.stirs;
    app.keep_lease(heard).await.map_err(|e| store_error(&e))?;
    if stirs {
        app.stir.notify_one();
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn list(State(app): State<Arc<App>>) -> axum::Json<Vec<ShardView>> {
    axum::Json(app.shards())
}

pub(super) async fn ring(State(app): State<Arc<App>>) -> axum::Json<RingSpec> {
    axum::Json(app.hub.state().ring().as_ref().clone())
}

pub(super) async fn order(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
    Json(order): Json<ShardOrder>,
) -> Answer<ShardView> {
    let shard: ShardId =
        name.parse().map_err(|e: proto::id::InvalidName| Failure::new(ApiCode::BadRequest, e.to_string()))?;
    let find = || app.shards().into_iter().find(|view| view.name == shard);
    if find().is_none() {
        return Err(not_found("shard", shard.as_str()));
    }
    let by = who(&facts);
    app.store.order(&shard, order, &by, unix_now()).await.map_err(|e| store_error(&e))?;
    tracing::info!(target: "audit", who = by, %shard, %order, "shard ordered");
    app.stir.notify_one();
    app.hub.ordered(&shard, order).await;
    find().map(axum::Json).ok_or_else(|| not_found("shard", shard.as_str()))
}

impl App {
    /// All shards that are known: by their reports, as members of the ring, or by an order, which is kept for as long
    /// as it stands.
    fn shards(&self) -> Vec<ShardView> {
        let state = self.hub.state();
        let (ring, orders) = (state.ring(), state.orders());
        let mut views = self.presence.shards(Instant::now());
        let silent = |name: &ShardId| {
            let member = ring.members.iter().find(|m| m.shard == *name);
            ShardView {
                name: name.clone(),
                addresses: member.map(|m| m.addresses.clone()).unwrap_or_default(),
                version: String::new(),
                edges: 0,
                last_seen: 0,
                alive: false,
                state: ShardState::Serving,
                order: ShardOrder::Serve,
                weight: member.map_or(WEIGHT, |m| m.weight),
                epoch: 0,
                streams: 0,
            }
        };
        for name in ring.members.iter().map(|m| &m.shard).chain(orders.keys()) {
            if !views.iter().any(|view| view.name == *name) {
                views.push(silent(name));
            }
        }
        for view in &mut views {
            view.order = orders.get(&view.name).copied().unwrap_or_default();
        }
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }
}
