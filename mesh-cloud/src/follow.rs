//! Following control: the watch comes in, reports of presence and renewals go out. When control is away the last state
//! stays, and the shard says so.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

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
    shutdown::Tasks,
    telemetry,
    tls::TrustBundle,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    live::LiveCredentials,
    metrics::Metrics,
    partings::Partings,
    registry::Registry,
    route::Router,
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
    pub async fn run(self, clients: Clients) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let begun = Instant::now();
            let error = self.follow(&clients.present()).await;
            clients.try_next();
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

    fn take(&self, mut event: proto::api::WatchEvent) {
        self.metrics.control_connected.set(1);
        self.ready.up();
        if let Some(pem) = &event.bundle {
            match TrustBundle::from_pem(pem) {
                Ok(bundle) if self.bundle.replace(&bundle) => tracing::info!("the trusted roots have changed"),
                Ok(_) => {}
                Err(e) => tracing::error!(error = %e, "control sent roots that cannot be read; the old ones stay"),
            }
        }
        if let Some(change) = event.book.take() {
            let book = self.state.borrow().book.clone();
            book.change(change);
            self.metrics.book(book.size());
        }
        if !MeshState::is_change(&event) {
            return;
        }
        let next = Arc::new(self.state.borrow().after(event));
        self.metrics.control_revision.set(next.revision.try_into().unwrap_or(i64::MAX));
        self.metrics.goes_by(&next.ring);
        if next.ring.epoch() != self.state.borrow().ring.epoch() {
            tracing::info!(epoch = next.ring.epoch(), members = next.ring.len(), "a new ring");
        }
        self.state.send_replace(Arc::clone(&next));
        let ended = self.live.end_where(|credential| next.is_good(credential));
        if ended > 0 {
            tracing::info!(credentials = ended, "revoked credentials were in use; their links and streams are ended");
        }
    }
}

/// The replicas of control. Clones go from one to the next together.
#[derive(Clone, Debug)]
pub struct Clients(Arc<(Vec<ApiClient>, AtomicUsize)>);

impl Clients {
    /// At least one, best first.
    #[must_use]
    pub fn new(replicas: Vec<ApiClient>) -> Self {
        Self(Arc::new((replicas, AtomicUsize::new(0))))
    }

    fn present(&self) -> ApiClient {
        let (replicas, at) = &*self.0;
        replicas[at.load(Ordering::Relaxed) % replicas.len()].clone()
    }

    fn try_next(&self) {
        self.0.1.fetch_add(1, Ordering::Relaxed);
    }

    /// `POST` to the present one; to the others as well if it cannot be used now.
    pub(crate) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ApiClientError> {
        let mut left = self.0.0.len();
        loop {
            left -= 1;
            match self.present().post(path, body).await {
                Err(error) if error.is_transient() && left > 0 => {
                    tracing::debug!(%error, "asking another replica of control");
                    self.try_next();
                }
                answer => return answer,
            }
        }
    }
}

/// Reports the shard and its edges to every replica of control, until the drain is over.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// This shard.
    pub shard: ShardId,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// Its weight in the ring.
    pub weight: u32,
    /// Its edges.
    pub registry: Registry,
    /// Knows the ring that is gone by, and counts streams.
    pub router: Router,
    /// Why edges are here no longer.
    pub partings: Partings,
    /// Whether it is about to stop; closed when it has.
    pub standing: watch::Receiver<ShardState>,
    /// When the process started, in milliseconds since 1970.
    pub started: u64,
    /// How many reports it has made, to whichever replica.
    pub reports: Arc<AtomicU64>,
}

impl Reporter {
    /// Starts to report.
    pub fn start(self, clients: &Clients, tasks: &Tasks) {
        for client in &clients.0.0 {
            tasks.spawn(self.clone().run(client.clone()));
        }
    }

    async fn run(mut self, client: ApiClient) {
        let mut ticks = interval(REPORT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let changes = self.registry.changes();
        let mut missed = BTreeSet::new();
        let mut last_full: Option<Instant> = None;
        let mut told = 0;
        loop {
            tokio::select! {
                biased;
                changed = self.standing.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {}
            }
            let full = last_full.is_none_or(|when| when.elapsed() >= FULL_REPORT);
            let mut changed = changes.take();
            changed.append(&mut missed);
            let (online, offline) = presence(&self.shard, &self.registry, full, &changed);
            let (partings, count) = self.partings.after(told);
            let report = ShardReport {
                started: self.started,
                number: self.reports.fetch_add(1, Ordering::Relaxed) + 1,
                bytes: self.router.metrics().bytes(),
                handshakes: self.router.metrics().wanted_in(),
                addresses: self.addresses.clone(),
                version: telemetry::version().to_owned(),
                state: *self.standing.borrow(),
                weight: self.weight,
                epoch: self.router.state().ring.epoch(),
                streams: self.router.metrics().open_streams(),
                full,
                online,
                offline,
                partings,
            };
            match client.post::<Option<()>>("/v1/shards/report", &report).await {
                Ok(_) => {
                    told = count;
                    if full {
                        last_full = Some(Instant::now());
                    }
                }
                Err(e) => {
                    tracing::debug!(error = %e, "presence could not be reported");
                    (missed, last_full) = (changed, None);
                }
            }
        }
    }
}

/// Edges that came or changed, and edges that went; or all of them and none.
fn presence(
    shard: &ShardId,
    registry: &Registry,
    full: bool,
    changed: &BTreeSet<EdgeId>,
) -> (Vec<Presence>, Vec<EdgeId>) {
    let of = |handle: &EdgeHandle| Presence {
        edge: handle.id.clone(),
        shard: shard.clone(),
        since: handle.since,
        address: handle.address().to_string(),
        version: handle.version.clone(),
        services: handle.services().to_vec(),
        rtt_us: u64::try_from(handle.link.rtt().as_micros()).unwrap_or(u64::MAX),
        streams: handle.streams() as u64,
        carrier: handle.link.carrier().slug().to_owned(),
        standing: handle.standing().map(|(standing, _)| standing.as_ref().clone()),
        standing_at: handle.standing().map(|(_, at)| at),
    };
    if full {
        return (registry.all().iter().map(|h| of(h)).collect(), Vec::new());
    }
    let (here, gone): (Vec<_>, Vec<_>) =
        changed.iter().map(|id| (id, registry.find(id))).partition(|(_, h)| h.is_some());
    (
        here.iter().filter_map(|(_, h)| h.as_deref()).map(of).collect(),
        gone.into_iter().map(|(id, _)| id.clone()).collect(),
    )
}

/// Passes renewals to control, one at a time each in its own task's stead: a queue in front, answers behind.
pub async fn renew(clients: Clients, mut requests: mpsc::Receiver<RenewalRequest>, metrics: Arc<Metrics>) {
    while let Some(RenewalRequest { renew, answer }) = requests.recv().await {
        let result = ask(&clients, &renew).await;
        let outcome = if result.is_ok() { "ok" } else { "refused" };
        metrics.renewals.with_label_values(&[outcome]).inc();
        // The session may have ended meanwhile; the edge asks again.
        let _ = answer.send(result);
    }
}

async fn ask(clients: &Clients, renew: &Renew) -> Result<Renewal, Refuse> {
    let text = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    let body =
        RenewFor { csr: text(&renew.csr), certificate: text(&renew.certificate), signature: text(&renew.signature) };
    let enrolled: Enrolled = clients.post("/v1/renew-for", &body).await.map_err(|e| match e {
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
    clients: Clients,
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
        match renew_once(&clients, &identity, &dir, &bundle, &names).await {
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
    clients: &Clients,
    identity: &runtime::tls::LiveIdentity,
    dir: &runtime::identity::IdentityDir,
    bundle: &TrustBundle,
    names: &[String],
) -> anyhow::Result<()> {
    let key = runtime::identity::NodeKey::generate()?;
    let request = proto::api::RenewRequest { csr: key.csr_pem(names)? };
    let enrolled: Enrolled = clients.post("/v1/renew", &request).await?;
    let credentials = runtime::identity::Credentials::new(key, certificates(&enrolled.chain)?)?;
    bundle.replace(&TrustBundle::from_pem(&enrolled.bundle)?);
    dir.store(&credentials, bundle)?;
    identity.replace(&credentials)?;
    Ok(())
}
