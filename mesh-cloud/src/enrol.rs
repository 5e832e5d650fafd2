//! A shard's first certificate.

use std::time::Duration;

use anyhow::Context;
use proto::{
    api::{EnrolRequest, Enrolled},
    backoff::Backoff,
    id::ShardId,
    join::JoinLine,
    secret::Secret,
};
use runtime::{
    api::ApiClient,
    identity::{Credentials, IdentityDir, NodeKey, certificates},
    tls::TrustBundle,
};

use crate::config::{EnrolConfig, ShardConfig};

/// Where control is, as noted in the identity's folder.
pub const CONTROL_NOTE: &str = "control";

/// Enrols with a join line, and keeps the identity. Control that cannot be reached is tried again for a minute.
///
/// # Errors
/// If control refuses, stays away, or the identity cannot be kept.
pub async fn join(config: &ShardConfig, line: &JoinLine) -> anyhow::Result<()> {
    let name = name(config, line)?;
    join_as(config, line, Some(&name)).await
}

/// Enrols a pod by its service account's token in place of one of ours, and keeps the identity.
///
/// # Errors
/// If the token cannot be read, or as for [`join`].
pub async fn join_pod(config: &ShardConfig, by: &EnrolConfig) -> anyhow::Result<()> {
    let path = by.token_file.display();
    let token =
        std::fs::read_to_string(&by.token_file).with_context(|| format!("cannot read {path} (enrol.token_file)"))?;
    let token = Secret::new(token.trim().to_owned());
    let line = JoinLine { control: by.control.clone(), ca: by.ca, token, name: None };
    // The pod's name, which control reads in the token; the host's may be the node's.
    join_as(config, &line, config.name.as_ref()).await
}

async fn join_as(config: &ShardConfig, line: &JoinLine, name: Option<&ShardId>) -> anyhow::Result<()> {
    let dir = IdentityDir::open(&config.data_dir)?;
    let key = NodeKey::generate()?;
    let request = EnrolRequest {
        token: line.token.clone(),
        name: name.map(|name| name.as_str().parse()).transpose()?,
        csr: key.csr_pem(&config.names)?,
    };
    let enrolled = enrol(line, &request).await?;
    let credentials = Credentials::new(key, certificates(&enrolled.chain)?)?;
    dir.store(&credentials, &TrustBundle::from_pem(&enrolled.bundle)?)?;
    dir.write(CONTROL_NOTE, &line.control.to_string())?;
    tracing::info!(identity = enrolled.identity, "enrolled");
    Ok(())
}

async fn enrol(line: &JoinLine, request: &EnrolRequest) -> anyhow::Result<Enrolled> {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
    loop {
        match ApiClient::enrol(line, request).await {
            Ok(enrolled) => return Ok(enrolled),
            Err(e) if e.is_transient() && backoff.failures() < 10 => {
                tracing::warn!(error = %e, "cannot enrol yet");
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
            }
            Err(e) => return Err(e).context("this shard could not enrol"),
        }
    }
}

fn name(config: &ShardConfig, line: &JoinLine) -> anyhow::Result<ShardId> {
    match (&config.name, &line.name) {
        (Some(name), _) => Ok(name.clone()),
        (None, Some(name)) => Ok(name.as_str().parse()?),
        (None, None) => {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").context("this host has no name")?;
            let host = host.trim().to_ascii_lowercase();
            host.parse().with_context(|| format!("the host's name {host:?} cannot be a shard's; set name = \"...\""))
        }
    }
}
