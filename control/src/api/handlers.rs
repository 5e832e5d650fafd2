//! What each route does.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Extension,
    body::Body,
    extract::{FromRequest, Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use hyper::body::Frame;
use proto::{
    api::{
        ApiCode, ApiError, EdgeView, EnrolRequest, Enrolled, Presence, RenewFor, RenewRequest, TokenCreated,
        TokenRequest, TokenView, WhoAmI,
    },
    id::EdgeId,
    policy::Rule,
};
use runtime::{cert::CertFacts, clock::unix_now, shutdown::Tasks};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{
    App, Failure, OPENAPI,
    guard::{Caller, Peer},
};
use crate::{
    authority::{store_error, view},
    sight::BLIND,
    store::edges::StoredEdge,
    watch::Follower,
};

/// Longest name of a rule, in bytes.
const MAX_RULE_NAME: usize = 63;
/// Most rules of a policy.
const MAX_RULES: usize = 10_000;

pub(super) type Answer<T> = Result<axum::Json<T>, Failure>;

/// A body of JSON; what is wrong with it is told with line and column.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &Arc<App>) -> Result<Self, Failure> {
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            let failure = Failure::new(ApiCode::BadRequest, format!("the body cannot be read: {rejection}"));
            failure.with_status(rejection.status())
        })?;
        let read = serde_json::from_slice(&body).map(Self);
        read.map_err(|e| Failure::new(ApiCode::BadRequest, format!("the body is not what it should be: {e}")))
    }
}

pub(super) fn edge_name(text: &str) -> Result<EdgeId, Failure> {
    text.parse().map_err(|e: proto::id::InvalidName| Failure::new(ApiCode::BadRequest, e.to_string()))
}

pub(super) fn not_found(what: &str, name: &str) -> Failure {
    Failure::new(ApiCode::NotFound, format!("there is no {what} {name:?}"))
}

pub(super) async fn enrol(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Json(request): Json<EnrolRequest>,
) -> Answer<Enrolled> {
    let source = peer.address.ip();
    if let Some(wait) = app.failures.wait(source, Instant::now()) {
        let seconds = wait.as_secs() + 1;
        let why = format!("too many unknown tokens came from {source}; try again in {seconds} s with the right one");
        return Err(Failure::new(ApiCode::Busy, why));
    }
    let enrolled = app.authority.enrol(&request, &peer.address.to_string()).await;
    if let Err(ApiError { code: ApiCode::TokenUnknown, .. }) = &enrolled {
        app.failures.failed(source, Instant::now());
    }
    Ok(axum::Json(enrolled?))
}

pub(super) async fn renew(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(request): Json<RenewRequest>,
) -> Answer<Enrolled> {
    Ok(axum::Json(app.authority.renew(&facts, &request.csr).await?))
}

pub(super) async fn renew_for(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(request): Json<RenewFor>,
) -> Answer<Enrolled> {
    Ok(axum::Json(app.authority.renew_for(&facts.identity, &request).await?))
}

/// The next line, and whoever makes the one after it; `None` at the end.
type NextLine = Pin<Box<dyn Future<Output = Option<(Bytes, Follower)>> + Send>>;

/// Lines without end. The next one is made only when the last one is gone, so nothing queues up here.
struct Lines {
    next: NextLine,
    facts: Arc<CertFacts>,
    tasks: Tasks,
}

impl Lines {
    fn of(mut follower: Follower, facts: Arc<CertFacts>, tasks: Tasks) -> Self {
        let (whose, end) = (Arc::clone(&facts), tasks.clone());
        let left = u64::try_from(facts.not_after - unix_now()).unwrap_or(0);
        let next = Box::pin(async move {
            // A watch ends with the certificate that opened it; the shard comes back with its next one.
            let line = tokio::time::timeout(Duration::from_secs(left), follower.next(&whose.serial, &end)).await;
            Some((line.ok().flatten()?, follower))
        });
        Self { next, facts, tasks }
    }
}

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.next.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some((line, follower))) => {
                *self = Self::of(follower, Arc::clone(&self.facts), self.tasks.clone());
                Poll::Ready(Some(Ok(Frame::data(line))))
            }
        }
    }
}

pub(super) async fn watch(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
) -> Result<Response, Failure> {
    let follower = app.hub.follow().ok_or_else(|| {
        let secs = BLIND.as_secs();
        let why =
            format!("this control could not read its database for {secs} s; another replica may know more, ask it");
        Failure::new(ApiCode::StoreUnavailable, why)
    })?;
    tracing::debug!(who = %facts.identity, "watch begins");
    let lines = Lines::of(follower, facts, app.tasks.clone());
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::new(lines)).into_response())
}

pub(super) async fn tokens(State(app): State<Arc<App>>) -> Answer<Vec<TokenView>> {
    let tokens = app.store.tokens().await.map_err(|e| store_error(&e))?;
    Ok(axum::Json(tokens.into_iter().map(view).collect()))
}

pub(super) async fn create_token(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(request): Json<TokenRequest>,
) -> Result<(StatusCode, axum::Json<TokenCreated>), Failure> {
    let created = app.authority.create_token(&request, &who(&facts)).await?;
    Ok((StatusCode::CREATED, axum::Json(created)))
}

pub(super) async fn delete_token(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let revision = app.store.delete_token(&id).await.map_err(|e| store_error(&e))?;
    let revision = revision.ok_or_else(|| not_found("token", &id))?;
    tracing::info!(target: "audit", who = who(&facts), token = id, "token deleted");
    app.hub.in_force(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn edges(State(app): State<Arc<App>>) -> Answer<Vec<EdgeView>> {
    let edges = app.store.edges().await.map_err(|e| store_error(&e))?;
    let mut present = app.presence.all(Instant::now());
    let views = edges.into_iter().map(|edge| {
        let (presence, seen) = present.remove(&edge.name).map_or((None, None), |(p, seen)| (p, Some(seen)));
        edge_view(edge, presence, seen)
    });
    Ok(axum::Json(views.collect()))
}

pub(super) async fn edge(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<EdgeView> {
    let name = edge_name(&name)?;
    Ok(axum::Json(app.edge(&name).await?))
}

pub(super) async fn revoke_edge(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer<EdgeView> {
    let name = edge_name(&name)?;
    let revision = app.store.revoke_edge(&name, unix_now()).await.map_err(|e| store_error(&e))?;
    let revision = revision.ok_or_else(|| not_found("edge", name.as_str()))?;
    tracing::info!(target: "audit", who = who(&facts), edge = %name, "edge revoked");
    app.metrics.revocations.with_label_values(&["edge"]).inc();
    app.hub.in_force(revision).await;
    Ok(axum::Json(app.edge(&name).await?))
}

pub(super) async fn revoke_user(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, Failure> {
    let name = edge_name(&name)?;
    let revision = app.store.revoke_user(&name, unix_now()).await.map_err(|e| store_error(&e))?;
    let revision = revision.ok_or_else(|| not_found("user", name.as_str()))?;
    tracing::info!(target: "audit", who = who(&facts), user = %name, "user revoked");
    app.metrics.revocations.with_label_values(&["user"]).inc();
    app.hub.in_force(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn policy(State(app): State<Arc<App>>) -> Answer<Vec<Rule>> {
    Ok(axum::Json(app.store.rules().await.map_err(|e| store_error(&e))?))
}

pub(super) async fn put_rule(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
    Json(rule): Json<Rule>,
) -> Answer<Rule> {
    let bad = |why: String| Failure::new(ApiCode::BadRequest, why);
    if rule.name != name {
        return Err(bad(format!("the path names the rule {name:?} and the body {:?}", rule.name)));
    }
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if name.is_empty() || name.len() > MAX_RULE_NAME || !name.bytes().all(fits) {
        return Err(bad(format!(
            "a rule's name has 1 to {MAX_RULE_NAME} characters out of a-z, 0-9, '-', '.' and '_'; {name:?} does not fit"
        )));
    }
    rule.check().map_err(|e| bad(e.to_string()))?;
    let rules = app.store.rules().await.map_err(|e| store_error(&e))?;
    if rules.len() >= MAX_RULES && !rules.iter().any(|r| r.name == name) {
        return Err(bad(format!(
            "there are {MAX_RULES} rules already, which is the most; patterns can stand for many"
        )));
    }
    let revision = app.store.put_rule(&rule).await.map_err(|e| store_error(&e))?;
    let text = serde_json::to_string(&rule).unwrap_or_default();
    tracing::info!(target: "audit", who = who(&facts), rule = text, "rule set");
    app.hub.in_force(revision).await;
    Ok(axum::Json(rule))
}

pub(super) async fn delete_rule(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, Failure> {
    let revision = app.store.delete_rule(&name).await.map_err(|e| store_error(&e))?;
    let revision = revision.ok_or_else(|| not_found("rule", &name))?;
    tracing::info!(target: "audit", who = who(&facts), rule = name, "rule deleted");
    app.hub.in_force(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn whoami(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
) -> axum::Json<WhoAmI> {
    let ca = app.authority.ca();
    axum::Json(WhoAmI {
        identity: facts.identity.to_string(),
        groups: facts.groups.clone(),
        not_after: facts.not_after,
        trust_domain: ca.domain().clone(),
        ca: ca.hash().to_string(),
        shards: app.hub.state().shards(),
    })
}

pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

pub(super) fn who(facts: &CertFacts) -> String {
    format!("{}/{}", facts.identity.role, facts.identity.name)
}

fn edge_view(edge: StoredEdge, presence: Option<Presence>, seen: Option<i64>) -> EdgeView {
    let StoredEdge { name, site, enrolled, not_after, revoked, last_seen } = edge;
    EdgeView { name, site, enrolled, not_after, revoked, presence, last_seen: seen.max(last_seen), parting: None }
}

impl App {
    async fn edge(&self, name: &EdgeId) -> Result<EdgeView, Failure> {
        let edge = self.store.edge(name).await.map_err(|e| store_error(&e))?;
        let edge = edge.ok_or_else(|| not_found("edge", name.as_str()))?;
        let (presence, seen) = self.presence.of(name, Instant::now());
        Ok(EdgeView { parting: self.presence.parting(name), ..edge_view(edge, presence, seen) })
    }
}
