//! A shard's first certificate.

use std::time::Duration;

use anyhow::Context;
use proto::{
    api::{EnrolRequest, Enrolled},
    backoff::Backoff,
    id::ShardId,
    join::JoinLine,
};
use runtime::{
    api::ApiClient,
    identity::{Credentials, IdentityDir, NodeKey, certificates},
    tls::TrustBundle,
};

use crate::config::ShardConfig;

/// Where control is, as noted in the identity's folder.
pub const CONTROL_NOTE: &str = "control";

/// Enrols with a join line, and keeps the identity. Control that cannot be reached is tried again for a minute.
///
/// # Errors
/// If control refuses, stays away, or the identity cannot be kept.
pub async fn join(config: &ShardConfig, line: &JoinLine) -> anyhow::Result<()> {
    let dir = IdentityDir::open(&config.data_dir)?;
    let key = NodeKey::generate()?;
    let name = name(config, line)?;
    let request = EnrolRequest {
        token: line.token.clone(),
        name: Some(name.as_str().parse()?),
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
