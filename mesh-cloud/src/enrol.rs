//! A shard's first certificate.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, ensure};
use proto::{
    api::{EnrolRequest, Enrolled},
    backoff::Backoff,
    id::ShardId,
    join::JoinLine,
    secret::Secret,
    target::HostPort,
};
use runtime::{
    api::ApiClient,
    cert,
    clock::unix_now,
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

/// Enrols as a pod, if `enrol` is configured and there is no identity that is still good: the token of a pod can be used
/// as often as the pod starts. Control's replicas are tried in turn.
///
/// # Errors
/// If a file cannot be read, or as [`join`] for the last replica.
pub async fn as_pod(config: &ShardConfig) -> anyhow::Result<()> {
    let Some(pod) = &config.enrol else { return Ok(()) };
    // An identity that cannot be read is replaced as well: nothing of it is needed.
    let kept = IdentityDir::open(&config.data_dir)?.load().ok().flatten();
    if kept.is_some_and(|(credentials, _)| credentials.facts().not_after > unix_now()) {
        return Ok(());
    }
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {} (enrol)", path.display()));
    let lines = pod_lines(&config.control, &read(&pod.ca)?, &read(&pod.token)?)?;
    let (last, others) = lines.split_last().context("enrol needs control: the addresses of control's replicas")?;
    for line in others {
        match join(config, line).await {
            Ok(()) => return Ok(()),
            Err(error) => tracing::warn!(control = %line.control, error = format!("{error:#}"), "trying the next replica"),
        }
    }
    join(config, last).await
}

/// What a join line would say, for each replica of control.
fn pod_lines(control: &[String], ca: &str, token: &str) -> anyhow::Result<Vec<JoinLine>> {
    let roots = certificates(ca).context("enrol.ca")?;
    let ca = cert::ca_hash(roots.first().context("enrol.ca holds no certificate")?)?;
    let token = token.trim();
    ensure!(!token.is_empty(), "enrol.token is an empty file");
    let line = |control: &String| {
        let control: HostPort = control.parse().with_context(|| format!("control: {control:?}"))?;
        Ok(JoinLine { control, ca, token: Secret::new(token.to_owned()), name: None })
    };
    control.iter().map(line).collect()
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
            let host = fs::read_to_string("/proc/sys/kernel/hostname").context("this host has no name")?;
            let host = host.trim().to_ascii_lowercase();
            host.parse().with_context(|| format!("the host's name {host:?} cannot be a shard's; set name = \"...\""))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIUGWPt/QhqTAyHhOO+VxUN3zcv2XcwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjMxMzI1NDlaGA8yMTI2MTAzMDEzMjU0
OVowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKER
+b3TRUnGEqbIR+Va7+f3uLyzQU5GOrKvLqaEjz7h1Ymdql4tdbsCq9Fe96p7pc9m
F7Y4C17tl49WyOivpeOjUzBRMB0GA1UdDgQWBBSc/+SKw5WVcKq6fy3JvZFFhF3f
ejAfBgNVHSMEGDAWgBSc/+SKw5WVcKq6fy3JvZFFhF3fejAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0cAMEQCIFuqsRYtsBSTxY1A6ddLgpUHBYv5N+o7/DoQ
4mn8aVxMAiBiZS6dOzLcnysDT0hh83ucTJVG34wniCD2pZtS0c0nEg==
-----END CERTIFICATE-----
";

    #[test]
    fn a_pod_has_a_line_for_each_replica() {
        let control = ["a.example:7443".to_owned(), "b.example:7443".to_owned()];
        let lines = pod_lines(&control, ROOT, "eyJh.eyJi.c2ln\n").unwrap();
        let told: Vec<_> = lines.iter().map(|l| (l.control.to_string(), l.token.reveal())).collect();
        let wanted = ["a.example:7443", "b.example:7443"].map(|at| (at.to_owned(), "eyJh.eyJi.c2ln"));
        assert_eq!(told, wanted);
        assert_eq!(lines[0].ca, cert::ca_hash(&certificates(ROOT).unwrap()[0]).unwrap());
        assert!(pod_lines(&control, ROOT, " \n").unwrap_err().to_string().contains("enrol.token"));
        assert!(pod_lines(&control, "", "t").unwrap_err().to_string().contains("enrol.ca"));
        assert!(pod_lines(&["nowhere".to_owned()], ROOT, "t").unwrap_err().to_string().contains("nowhere"));
    }
}
