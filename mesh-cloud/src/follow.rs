//! Following control: the watch comes in, reports of presence and renewals go out. When control is away the last state
//! stays, and the shard says so.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use proto::{
    api::{Enrolled, Presence, RenewFor, ShardReport, ShardState},
    backoff::Backoff,
    code::CloseCode,
    id::{EdgeId, ShardId},
    message::{Refuse, Renew, Renewal},
};
use runtime::{
    admin::ReadyPart,
    api::{ApiClient, ApiClientError},
    clock,
    identity::certificates,
    telemetry,
    tls::TrustBundle,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    live::LiveCredentials,
    metrics::Metrics,
    registry::Registry,
    session::{EdgeHandle, RenewalRequest, renewal_failed},
    state::MeshState,
};

/// How often to report presence; control takes a shard for gone after three missed ones.
const REPORT: Duration = Duration::from_secs(2);
/// How often a report names every edge, whether it changed or not.
const FULL_REPORT: Duration = Duration::from_secs(60);
/// Bounds of the pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What is kept up to date from control.
#[derive(Debug)]
pub struct Following {
    /// Where the newest state goes.
    pub state: watch::Sender<Arc<MeshState>>,
    /// Ended when their credential is revoked.
    pub live: LiveCredentials,
    /// The roots, which may rotate.
    pub bundle: TrustBundle,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Says whether control is there; ready from the first state on.
    pub ready: ReadyPart,
}

impl Following {
    /// Follows for ever; dropped at the end of the process.
    pub async fn run(self, client: ApiClient) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let begun = Instant::now();
            let error = self.follow(&client).await;
            self.metrics.control_connected.set(0);
            let revision = self.state.borrow().revision;
            tracing::warn!(%error, revision, "control is away; this shard goes on with what it knows");
            let text = format!("control is away ({error}); serving on revision {revision}");
            if revision == 0 {
                self.ready.down(text)
            } else {
                self.ready.detail(text)
            }
            backoff.link_lived(begun.elapsed());
            tokio::time::sleep(backoff.next_delay(rand::random())).await;
        }
    }

    async fn follow(&self, client: &ApiClient) -> ApiClientError {
        let mut watch = match client.watch().await {
            Ok(watch) => watch,
            Err(e) => return e,
        };
        loop {
            match watch.next().await {
                Ok(event) => self.take(event),
                Err(e) => return e,
            }
        }
    }

    fn take(&self, event: proto::api::WatchEvent) {
        self.metrics.control_connected.set(1);
        self.ready.up();
        if let Some(pem) = &event.bundle {
            match TrustBundle::from_pem(pem) {
                Ok(bundle) if self.bundle.replace(&bundle) => tracing::info!("the trusted roots have changed"),
                Ok(_) => {}
                Err(e) => tracing::error!(error = %e, "control sent roots that cannot be read; the old ones stay"),
            }
        }
        if !MeshState::is_change(&event) {
            return;
        }
        let next = Arc::new(self.state.borrow().after(event));
        self.metrics.control_revision.set(next.revision.try_into().unwrap_or(i64::MAX));
        self.state.send_replace(Arc::clone(&next));
        let ended = self.live.end_where(|credential| next.is_good(credential));
        if ended > 0 {
            tracing::info!(credentials = ended, "revoked credentials were in use; their links and streams are ended");
        }
    }
}

/// Reports presence for ever.
pub async fn report(client: ApiClient, shard: ShardId, addresses: Vec<String>, registry: Registry) {
    let mut ticks = interval(REPORT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missed = BTreeSet::new();
    let mut last_full: Option<Instant> = None;
    loop {
        ticks.tick().await;
        let full = last_full.is_none_or(|when| when.elapsed() >= FULL_REPORT);
        let mut changed = registry.take_changed();
        changed.append(&mut missed);
        let report = presence(&shard, &addresses, &registry, full, &changed);
        match client.post::<Option<()>>("/v1/shards/report", &report).await {
            Ok(_) if full => last_full = Some(Instant::now()),
            Ok(_) => {}
            Err(e) => {
                tracing::debug!(error = %e, "presence could not be reported");
                (missed, last_full) = (changed, None);
            }
        }
    }
}

fn presence(
    shard: &ShardId,
    addresses: &[String],
    registry: &Registry,
    full: bool,
    changed: &BTreeSet<EdgeId>,
) -> ShardReport {
    let of = |handle: &EdgeHandle| Presence {
        edge: handle.id.clone(),
        shard: shard.clone(),
        since: handle.since,
        address: handle.address().to_string(),
        version: handle.version.clone(),
        services: handle.services().to_vec(),
        rtt_us: u64::try_from(handle.link.rtt().as_micros()).unwrap_or(u64::MAX),
        streams: handle.streams() as u64,
    };
    let (online, offline) = if full {
        (registry.all().iter().map(|h| of(h)).collect(), Vec::new())
    } else {
        let (here, gone): (Vec<_>, Vec<_>) =
            changed.iter().map(|id| (id, registry.find(id))).partition(|(_, h)| h.is_some());
        (
            here.iter().filter_map(|(_, h)| h.as_deref()).map(of).collect(),
            gone.into_iter().map(|(id, _)| id.clone()).collect(),
        )
    };
    ShardReport {
        addresses: addresses.to_vec(),
        version: telemetry::version().to_owned(),
        state: ShardState::Serving,
        weight: proto::ring::WEIGHT,
        epoch: 0,
        streams: 0,
        full,
        online,
        offline,
    }
}

/// Passes renewals to control, one at a time each in its own task's stead: a queue in front, answers behind.
pub async fn renew(client: ApiClient, mut requests: mpsc::Receiver<RenewalRequest>, metrics: Arc<Metrics>) {
    while let Some(RenewalRequest { renew, answer }) = requests.recv().await {
        let result = ask(&client, &renew).await;
        let outcome = if result.is_ok() { "ok" } else { "refused" };
        metrics.renewals.with_label_values(&[outcome]).inc();
        // The session may have ended meanwhile; the edge asks again.
        let _ = answer.send(result);
    }
}

async fn ask(client: &ApiClient, renew: &Renew) -> Result<Renewal, Refuse> {
    let text = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    let body =
        RenewFor { csr: text(&renew.csr), certificate: text(&renew.certificate), signature: text(&renew.signature) };
    let enrolled: Enrolled = client.post("/v1/renew-for", &body).await.map_err(|e| match e {
        ApiClientError::Refused(e) if !e.code.is_transient() => Refuse::because(CloseCode::Revoked, e.message),
        ApiClientError::Unreachable { .. }
        | ApiClientError::WrongCa { .. }
        | ApiClientError::Tls { .. }
        | ApiClientError::Refused(_)
        | ApiClientError::Nonsense { .. } => renewal_failed(&e.to_string()),
    })?;
    let der = |pem: &str| {
        let all = certificates(pem).map_err(|e| renewal_failed(&format!("control's answer cannot be read: {e}")))?;
        Ok(all.iter().map(|c| bytes::Bytes::copy_from_slice(c)).collect::<Vec<_>>())
    };
    Ok(Renewal { chain: der(&enrolled.chain)?, roots: der(&enrolled.bundle)? })
}

/// Keeps the shard's own certificate fresh, over the API.
pub async fn renew_own(
    client: ApiClient,
    identity: runtime::tls::LiveIdentity,
    dir: runtime::identity::IdentityDir,
    bundle: TrustBundle,
    names: Vec<String>,
) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
    loop {
        let wait = identity.facts().renew_at().saturating_sub(clock::unix_now()).max(0).unsigned_abs();
        // In small steps, since the wall clock may jump while this waits.
        tokio::time::sleep(Duration::from_secs(wait.min(60))).await;
        if wait > 60 {
            continue;
        }
        match renew_once(&client, &identity, &dir, &bundle, &names).await {
            Ok(()) => {
                tracing::info!(not_after = identity.facts().not_after, "the shard's certificate is renewed");
                backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
            }
            Err(e) => {
                tracing::warn!(error = %e, "the shard's certificate could not be renewed");
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
            }
        }
    }
}

async fn renew_once(
    client: &ApiClient,
    identity: &runtime::tls::LiveIdentity,
    dir: &runtime::identity::IdentityDir,
    bundle: &TrustBundle,
    names: &[String],
) -> anyhow::Result<()> {
    let key = runtime::identity::NodeKey::generate()?;
    let request = proto::api::RenewRequest { csr: key.csr_pem(names)? };
    let enrolled: Enrolled = client.post("/v1/renew", &request).await?;
    let credentials = runtime::identity::Credentials::new(key, certificates(&enrolled.chain)?)?;
    bundle.replace(&TrustBundle::from_pem(&enrolled.bundle)?);
    dir.store(&credentials, bundle)?;
    identity.replace(&credentials)?;
    Ok(())
}
