//! What the routes about access records do.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use proto::{
    api::ApiCode,
    audit::{AccessBatch, AccessPage, MAX_BATCH, MAX_PAGE},
};
use runtime::clock::unix_millis;
use serde::Deserialize;

use super::{
    App, Failure,
    guard::Caller,
    handlers::{Answer, Json},
};
use crate::{authority::store_error, store::access::Wanted};

/// How many records a page has if nothing is said.
const PAGE: u32 = 100;
/// Longest text that is compared, in bytes.
const MAX_TEXT: usize = 512;

/// What is asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Asked {
    who: String,
    edge: String,
    outcome: String,
    /// Seconds before now.
    since_secs: Option<u32>,
    after: Option<i64>,
    before: Option<i64>,
    limit: Option<u32>,
}

pub(super) async fn take(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(mut batch): Json<AccessBatch>,
) -> Result<StatusCode, Failure> {
    let shard = facts.identity.shard().ok_or_else(|| Failure::new(ApiCode::Forbidden, "only shards send records"))?;
    if batch.records.len() > MAX_BATCH {
        let why = format!("{} records in one batch, where {MAX_BATCH} are allowed", batch.records.len());
        return Err(Failure::new(ApiCode::BadRequest, why));
    }
    // Whose records they are says the certificate.
    for entry in &mut batch.records {
        shard.as_str().clone_into(&mut entry.shard);
    }
    app.metrics.access_lost.inc_by(batch.lost);
    if app.keeps_access {
        let kept = app.store.keep_access(shard.as_str(), &batch).await.map_err(|e| store_error(&e))?;
        app.metrics.access_records.inc_by(kept);
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Answer<AccessPage> {
    let bad = |why: String| Failure::new(ApiCode::BadRequest, why);
    let Query(asked) = asked.map_err(|e| bad(e.body_text()))?;
    if [&asked.who, &asked.edge, &asked.outcome].iter().any(|text| text.len() > MAX_TEXT || text.contains('\0')) {
        return Err(bad("who, edge and outcome are names".into()));
    }
    if asked.after.is_some() && asked.before.is_some() {
        return Err(bad("after and before do not go together".into()));
    }
    let limit = asked.limit.unwrap_or(PAGE).clamp(1, MAX_PAGE);
    let since = asked.since_secs.map_or(0, |secs| unix_millis().saturating_sub(u64::from(secs) * 1000));
    let follows = asked.after.is_some();
    let wanted = Wanted {
        who: asked.who,
        edge: asked.edge,
        outcome: asked.outcome,
        since_ms: i64::try_from(since).unwrap_or(i64::MAX),
        after: asked.after,
        before: asked.before,
        // One more tells whether there are more.
        limit: i64::from(limit) + 1,
    };
    let mut records = app.store.access(&wanted).await.map_err(|e| store_error(&e))?;
    let more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let mut before = None;
    if !follows {
        records.reverse();
        before = records.first().filter(|_| more).map(|first| first.number);
    }
    let lost = app.store.access_lost().await.map_err(|e| store_error(&e))?;
    Ok(axum::Json(AccessPage { records, before, lost }))
}
