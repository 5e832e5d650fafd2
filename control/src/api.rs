//! The API: one table of routes, which says of each who may call it. The router is made of the table alone, and a test
//! compares the table with `openapi.json`, so there is no route that is not documented and none that is not guarded.

mod audit;
pub mod guard;
mod handlers;
pub mod limit;
pub mod server;
mod shards;
mod ssh;

use std::{collections::HashMap, sync::Arc};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{HeaderValue, Method, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{self, MethodRouter},
};
use parking_lot::Mutex;
use proto::{
    api::{ApiCode, ApiError},
    id::ShardId,
};
use runtime::shutdown::Tasks;
use tokio::sync::Notify;

use self::{guard::Guard, limit::FailureLimit};
use crate::{
    authority::{Authority, code_name},
    metrics::Metrics,
    presence::{Heard, Presence},
    store::{Dialect, Store, StoreError, shards::StoredLease},
    watch::Hub,
};

/// Longest body of a request, in bytes; 413 beyond.
const MAX_BODY: usize = 64 * 1024;
/// Longest report of a shard, in bytes: room for some ten thousand edges with their services.
const MAX_REPORT: usize = 32 * 1024 * 1024;
/// When to try again what may work later, in seconds.
const RETRY_AFTER: &str = "5";
/// Longest batch of access records, in bytes: their texts have bounds of their own.
const MAX_ACCESS: usize = 8 * 1024 * 1024;
/// How often the lease of a shard that does not change is written down, in seconds; an hour without means that it is gone.
const LEASE_WRITTEN: i64 = 600;

/// The document that describes the API.
pub const OPENAPI: &str = include_str!("../openapi.json");

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody; enrolment checks a token by itself.
    Anybody,
    /// Whoever shows a certificate of the mesh.
    Member,
    /// Users.
    User,
    /// Users of the group `admin`.
    Admin,
    /// Shards.
    Shard,
}

impl Access {
    /// The word in the document.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Anybody => "anybody",
            Self::Member => "member",
            Self::User => "user",
            Self::Admin => "admin",
            Self::Shard => "shard",
        }
    }
}

/// One route.
#[derive(Debug)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path, with `{name}` for what varies.
    pub path: &'static str,
    /// Who may.
    pub access: Access,
    handler: MethodRouter<Arc<App>>,
}

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    /// Certificates and tokens.
    pub authority: Authority,
    /// The database.
    pub store: Store,
    /// What is in force.
    pub hub: Hub,
    /// What the shards say.
    pub presence: Arc<Presence>,
    /// Wakes whoever looks after the ring.
    pub stir: Arc<Notify>,
    /// What is counted.
    pub metrics: Metrics,
    /// Failed enrolments by source.
    pub failures: FailureLimit,
    /// The end of the process.
    pub tasks: Tasks,
    /// Whether access records are kept at all.
    pub keeps_access: bool,
    /// Leases of shards as they were written down last.
    pub kept: Mutex<HashMap<ShardId, StoredLease>>,
}

/// An error on its way out.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    error: ApiError,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, error }
    }
}

impl Failure {
    fn new(code: ApiCode, message: impl Into<String>) -> Self {
        ApiError::new(code, message).into()
    }

    /// Where HTTP has a status that is more exact than the code's.
    fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self { status, error } = self;
        tracing::debug!(code = code_name(error.code), %error, "answered with an error");
        let transient = error.code.is_transient();
        let mut response = (status, axum::Json(error)).into_response();
        if transient {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}

/// Every route.
#[must_use]
pub fn routes() -> Vec<Route> {
    use handlers as h;
    let route = |method: Method, path, access, handler| Route { method, path, access, handler };
    let (get, post, put, delete) = (Method::GET, Method::POST, Method::PUT, Method::DELETE);
    vec![
        route(post.clone(), "/v1/enrol", Access::Anybody, routing::post(h::enrol)),
        route(post.clone(), "/v1/renew", Access::Member, routing::post(h::renew)),
        route(post.clone(), "/v1/renew-for", Access::Shard, routing::post(h::renew_for)),
        route(get.clone(), "/v1/watch", Access::Shard, routing::get(h::watch)),
        route(
            post.clone(),
            "/v1/shards/report",
            Access::Shard,
            routing::post(shards::report).layer(DefaultBodyLimit::max(MAX_REPORT)),
        ),
        route(
            post.clone(),
            "/v1/shards/access",
            Access::Shard,
            routing::post(audit::take).layer(DefaultBodyLimit::max(MAX_ACCESS)),
        ),
        route(get.clone(), "/v1/access", Access::Admin, routing::get(audit::list)),
        route(get.clone(), "/v1/shards", Access::User, routing::get(shards::list)),
        route(put.clone(), "/v1/shards/{name}/order", Access::Admin, routing::put(shards::order)),
        route(get.clone(), "/v1/ring", Access::User, routing::get(shards::ring)),
        route(get.clone(), "/v1/tokens", Access::Admin, routing::get(h::tokens)),
        route(post.clone(), "/v1/tokens", Access::Admin, routing::post(h::create_token)),
        route(delete.clone(), "/v1/tokens/{id}", Access::Admin, routing::delete(h::delete_token)),
        route(get.clone(), "/v1/edges", Access::User, routing::get(h::edges)),
        route(get.clone(), "/v1/edges/{name}", Access::User, routing::get(h::edge)),
        route(post.clone(), "/v1/edges/{name}/revoke", Access::Admin, routing::post(h::revoke_edge)),
        route(post.clone(), "/v1/users/{name}/revoke", Access::Admin, routing::post(h::revoke_user)),
        route(get.clone(), "/v1/users/{name}/keys", Access::User, routing::get(ssh::keys)),
        route(post.clone(), "/v1/users/{name}/keys", Access::User, routing::post(ssh::add_key)),
        route(delete.clone(), "/v1/users/{name}/keys/{id}", Access::User, routing::delete(ssh::remove_key)),
        route(get.clone(), "/v1/ssh/authorities", Access::Member, routing::get(ssh::authorities)),
        route(post.clone(), "/v1/ssh/user-certificates", Access::User, routing::post(ssh::user_certificate)),
        route(post, "/v1/ssh/host-certificates", Access::Shard, routing::post(ssh::host_certificate)),
        route(get.clone(), "/v1/policy", Access::User, routing::get(h::policy)),
        route(put, "/v1/policy/{rule}", Access::Admin, routing::put(h::put_rule)),
        route(delete, "/v1/policy/{rule}", Access::Admin, routing::delete(h::delete_rule)),
        route(get.clone(), "/v1/whoami", Access::Member, routing::get(h::whoami)),
        route(get, "/v1/openapi.json", Access::Anybody, routing::get(h::openapi)),
    ]
}

/// The router, made of [`routes`].
pub fn router(app: &Arc<App>) -> Router {
    let mut router = Router::new();
    for Route { path, access, handler, .. } in routes() {
        let guard = Guard { app: Arc::clone(app), path, access };
        let guarded = handler.route_layer(middleware::from_fn_with_state(guard, guard::check));
        router = router.route(path, guarded);
    }
    router
        .fallback(|| async {
            Failure::new(ApiCode::NotFound, "there is no such path here; GET /v1/openapi.json lists what there is")
        })
        .method_not_allowed_fallback(|| async {
            Failure::new(ApiCode::BadRequest, "this path does not take that method; see GET /v1/openapi.json")
                .with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::clone(app))
}

impl App {
    /// Writes a lease down: each time if other replicas need to see it, else only when it is new or has changed, for
    /// the next start of this process.
    ///
    /// A lease that other replicas cannot see is none: the shard is told.
    async fn keep_lease(&self, heard: Heard) -> Result<(), StoreError> {
        let Heard { lease, silent, .. } = heard;
        let replicas = self.store.dialect() == Dialect::Postgres;
        let fresh = |kept: &StoredLease| {
            kept.tells_of_ring() == lease.tells_of_ring()
                && lease.last_seen.saturating_sub(kept.last_seen) < LEASE_WRITTEN
        };
        let known = self.kept.lock().get(&lease.name).is_some_and(fresh);
        if known && !replicas {
            return Ok(());
        }
        match self.store.beat(&lease, silent).await {
            Ok(_) => _ = self.kept.lock().insert(lease.name.clone(), lease),
            Err(error) if replicas => return Err(error),
            Err(error) => tracing::debug!(%error, shard = %lease.name, "the lease could not be written down"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn the_document_and_the_router_have_the_same_routes() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
        let mut documented = BTreeSet::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap().iter().filter(|(m, _)| *m != "parameters") {
                let access = operation["x-access"].as_str().expect("x-access");
                documented.insert(format!("{} {path} {access}", method.to_uppercase()));
                let failures = operation["responses"]["default"]["$ref"].as_str();
                assert_eq!(failures, Some("#/components/responses/Failure"), "{method} {path}");
            }
        }
        let served: BTreeSet<_> =
            routes().iter().map(|r| format!("{} {} {}", r.method, r.path, r.access.as_str())).collect();
        assert_eq!(documented, served);
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        fn references<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
            match value {
                Value::Object(map) => {
                    into.extend(map.get("$ref").and_then(Value::as_str));
                    map.values().for_each(|v| references(v, into));
                }
                Value::Array(list) => list.iter().for_each(|v| references(v, into)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut found = vec![];
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
        }
    }

    #[test]
    fn the_document_lists_every_code() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let listed = &document["components"]["schemas"]["ApiError"]["properties"]["code"]["enum"];
        let all = [
            ApiCode::BadRequest,
            ApiCode::Unauthenticated,
            ApiCode::Forbidden,
            ApiCode::NotFound,
            ApiCode::NameTaken,
            ApiCode::TokenUnknown,
            ApiCode::TokenExpired,
            ApiCode::TokenUsed,
            ApiCode::TokenMismatch,
            ApiCode::Revoked,
            ApiCode::BadProof,
            ApiCode::Busy,
            ApiCode::StoreUnavailable,
            ApiCode::Internal,
        ];
        let names: Vec<Value> = all.iter().map(|c| serde_json::to_value(c).unwrap()).collect();
        assert_eq!(listed.as_array().unwrap(), &names);
        for code in all {
            assert_eq!(serde_json::to_value(code).unwrap(), code_name(code));
        }
    }
}
