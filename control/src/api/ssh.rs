//! The routes for SSH.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Path, State},
    http::StatusCode,
};
use proto::ssh::{Authorities, Certificate, HostCertificateRequest, Key, KeyRequest, UserCertificateRequest};

use super::{
    App, Failure,
    guard::Caller,
    handlers::{Answer, Json, edge_name},
};

pub(super) async fn authorities(State(app): State<Arc<App>>) -> axum::Json<Authorities> {
    axum::Json(app.authority.ssh_authorities())
}

pub(super) async fn user_certificate(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(request): Json<UserCertificateRequest>,
) -> Answer<Certificate> {
    Ok(axum::Json(app.authority.sign_ssh_user(&facts, &request).await?))
}

pub(super) async fn host_certificate(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Json(request): Json<HostCertificateRequest>,
) -> Answer<Certificate> {
    Ok(axum::Json(app.authority.sign_ssh_host(&facts, &request)?))
}

pub(super) async fn keys(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer<Vec<Key>> {
    Ok(axum::Json(app.authority.ssh_keys(&facts, &edge_name(&name)?).await?))
}

pub(super) async fn add_key(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path(name): Path<String>,
    Json(request): Json<KeyRequest>,
) -> Result<(StatusCode, axum::Json<Key>), Failure> {
    let key = app.authority.add_ssh_key(&facts, &edge_name(&name)?, &request).await?;
    Ok((StatusCode::CREATED, axum::Json(key)))
}

pub(super) async fn remove_key(
    State(app): State<Arc<App>>,
    Extension(Caller(facts)): Extension<Caller>,
    Path((name, id)): Path<(String, String)>,
) -> Result<StatusCode, Failure> {
    app.authority.remove_ssh_key(&facts, &edge_name(&name)?, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}
