//! What stands before every handler: who is it, may they, how long may it take, and the counting of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use proto::{
    api::{ADMIN_GROUP, ApiCode},
    identity::Role,
};
use runtime::{cert::CertFacts, clock::unix_now};
use tokio::time::{Instant, timeout};

use super::{Access, App, Failure};

/// How long a request may take until its answer begins, the reading of its body included.
const REQUEST: Duration = Duration::from_secs(30);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Their address.
    pub address: SocketAddr,
    /// Their certificate, if they showed one.
    pub facts: Option<Arc<CertFacts>>,
}

/// The caller of a route that is not for anybody.
#[derive(Clone, Debug)]
pub struct Caller(pub Arc<CertFacts>);

/// Guards one route.
#[derive(Clone, Debug)]
pub struct Guard {
    /// For revocations and metrics.
    pub app: Arc<App>,
    /// The route's name in metrics.
    pub path: &'static str,
    /// Who may.
    pub access: Access,
}

/// Lets a request through, or answers why not.
pub async fn check(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let response = match authorise(&guard, &request) {
        Ok(caller) => {
            if let Some(facts) = caller {
                request.extensions_mut().insert(Caller(facts));
            }
            match timeout(REQUEST, next.run(request)).await {
                Ok(response) => response,
                Err(_) => {
                    let why = format!("the request was not complete within {} s", REQUEST.as_secs());
                    Failure::new(ApiCode::BadRequest, why)
                        .with_status(axum::http::StatusCode::REQUEST_TIMEOUT)
                        .into_response()
                }
            }
        }
        Err(failure) => failure.into_response(),
    };
    let metrics = &guard.app.metrics;
    metrics.requests.with_label_values(&[guard.path, response.status().as_str()]).inc();
    metrics.request_seconds.with_label_values(&[guard.path]).observe(started.elapsed().as_secs_f64());
    response
}

fn authorise(guard: &Guard, request: &Request) -> Result<Option<Arc<CertFacts>>, Failure> {
    if guard.access == Access::Anybody {
        return Ok(None);
    }
    let facts = request.extensions().get::<Peer>().and_then(|peer| peer.facts.clone());
    let facts = facts.ok_or_else(|| {
        Failure::new(
            ApiCode::Unauthenticated,
            "this needs a client certificate of the mesh; enrol first ('meshctl login' for people)",
        )
    })?;
    alive(guard, &facts)?;
    let identity = &facts.identity;
    let admin = identity.role == Role::User && facts.groups.iter().any(|g| g.as_str() == ADMIN_GROUP);
    let (may, who) = match guard.access {
        Access::Anybody | Access::Member => (true, "members"),
        Access::User => (identity.role == Role::User, "users"),
        Access::Admin => (admin, "users of the group 'admin'"),
        Access::Shard => (identity.role == Role::Shard, "shards"),
    };
    if may {
        return Ok(Some(facts));
    }
    tracing::info!(target: "audit", who = %identity, route = guard.path, "forbidden");
    Err(Failure::new(
        ApiCode::Forbidden,
        format!("{} {} is for {who}; you are {identity}", request.method(), guard.path),
    ))
}

/// A connection may outlive the certificate that opened it.
fn alive(guard: &Guard, facts: &CertFacts) -> Result<(), Failure> {
    if facts.identity.domain != *guard.app.authority.ca().domain() {
        let why = format!("{} is of another mesh than {}", facts.identity, guard.app.authority.ca().domain());
        return Err(Failure::new(ApiCode::Forbidden, why));
    }
    if guard.app.hub.is_revoked(&facts.serial) {
        let why = format!(
            "the certificate of {} is revoked; it can only be enrolled again, with a new token",
            facts.identity
        );
        return Err(Failure::new(ApiCode::Revoked, why));
    }
    if facts.not_after < unix_now() {
        let why = format!("the certificate of {} has ended; connect again with the present one", facts.identity);
        return Err(Failure::new(ApiCode::Unauthenticated, why));
    }
    Ok(())
}
