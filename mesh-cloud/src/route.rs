//! Where a stream goes: who asks, may they, which edge, is it here.
//!
//! The one way from a door to an edge. It never dials anything itself: what is not reached through a tunnel is not
//! reached.

use std::sync::Arc;

use proto::{
    code::RefuseCode,
    id::{EdgeId, ShardId, SiteName},
    policy::{Decision, Place},
    principal::Principal,
    stream::{Open, Refusal, Trace},
    target::Target,
};
use rand::seq::IndexedRandom;
use runtime::{
    access::{AccessRecord, AccessWriter},
    clock,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    flow::{Pending, Trail},
    live::{Lease, LiveCredentials},
    metrics::Metrics,
    registry::Registry,
    session::EdgeHandle,
    state::MeshState,
};

/// Most shards that a stream may have passed.
const MAX_HOPS: u32 = 2;

/// Opens streams to edges. Clones are the same router.
#[derive(Clone, Debug)]
pub struct Router(Arc<Parts>);

/// What a router is made of.
#[derive(Debug)]
pub struct Parts {
    /// This shard.
    pub shard: ShardId,
    /// Edges that are here.
    pub registry: Registry,
    /// What control said.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// Credentials in use.
    pub live: LiveCredentials,
    /// Access records.
    pub access: AccessWriter,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Cancelled when streams must end, at the deadline of a drain.
    pub ending: CancellationToken,
}

/// What somebody wants.
#[derive(Clone, Debug)]
pub struct Request {
    /// For whom.
    pub principal: Principal,
    /// The credential that they showed (a certificate's serial number, or a token's key), under which the stream ends
    /// when it is revoked; none at an open door.
    pub credential: Option<String>,
    /// From where, for the record.
    pub from: String,
    /// Through which door.
    pub door: String,
    /// Where to.
    pub target: Target,
    /// Trace context, if the opener has one.
    pub trace: Option<Trace>,
    /// Shards passed so far.
    pub hops: u32,
}

impl Request {
    /// A request without trace, straight from a door.
    #[must_use]
    pub fn new(principal: Principal, from: String, door: &str, target: Target) -> Self {
        Self { principal, credential: None, from, door: door.to_owned(), target, trace: None, hops: 0 }
    }
}

impl Router {
    /// Puts a router together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// What the shard knows of the mesh now.
    #[must_use]
    pub fn state(&self) -> Arc<MeshState> {
        Arc::clone(&self.0.state.borrow())
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// Cancelled when streams must end, at the deadline of a drain.
    #[must_use]
    pub fn ending(&self) -> &CancellationToken {
        &self.0.ending
    }

    /// Decides on a request and, if it is allowed and the edge is here, sends the Open. Every refusal leaves an access
    /// record, as every stream does.
    ///
    /// # Errors
    /// With the reason, if there is no way.
    pub async fn open(&self, request: Request) -> Result<Pending, Refusal> {
        let begun = Instant::now();
        self.0.metrics.streams.with_label_values(&[&request.door]).inc();
        let mut record = self.record(&request);
        match self.begin(request, &mut record, begun).await {
            Ok(pending) => Ok(pending),
            Err(refusal) => {
                let mut record = record.refused(refusal.code, &refusal.reason);
                record.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.0.metrics.stream_ended(&record);
                self.0.access.write(record).await;
                Err(refusal)
            }
        }
    }

    async fn begin(&self, request: Request, record: &mut AccessRecord, begun: Instant) -> Result<Pending, Refusal> {
        let parts = &self.0;
        if parts.ending.is_cancelled() {
            return Err(Refusal::new(RefuseCode::Draining));
        }
        if request.hops > MAX_HOPS {
            return Err(Refusal::new(RefuseCode::LoopDetected));
        }
        let lease = request.credential.as_deref().map(|credential| self.lease(credential)).transpose()?;
        let state = self.state();
        let (handle, rule) = self.find(&state, &request.principal, &request.target)?;
        record.rule = rule;
        record.edge = handle.id.to_string();
        let open = Open {
            target: pin(request.target, &handle.id),
            principal: Some(request.principal),
            door: request.door,
            trace: request.trace,
            hops: request.hops + 1,
            via: Vec::new(),
        };
        let (stream, count) = handle.open(&open).await?;
        let trail = Trail {
            edge: handle.id.clone(),
            record: Some(record.clone()),
            begun,
            access: parts.access.clone(),
            metrics: Arc::clone(&parts.metrics),
            stopping: parts.ending.clone(),
            lease,
            meter: Arc::default(),
            answer_bytes: 0,
            _count: count,
        };
        Ok(Pending { stream, trail })
    }

    /// Notes the use of a credential, if it is still good.
    fn lease(&self, credential: &str) -> Result<Lease, Refusal> {
        // Leased first: a revocation that comes in between then finds it.
        let lease = self.0.live.lease(credential);
        if self.state().is_good(credential) && !lease.ended().is_cancelled() {
            Ok(lease)
        } else {
            Err(Refusal::because(RefuseCode::Unauthenticated, "this credential is revoked; log in again"))
        }
    }

    fn find(&self, state: &MeshState, who: &Principal, target: &Target) -> Result<(Arc<EdgeHandle>, String), Refusal> {
        match target {
            Target::Udp { .. } => Err(Refusal::new(RefuseCode::Unsupported)),
            Target::Service { edge: None, name } => {
                let found = self.0.registry.announcing(name);
                let (mut allowed, mut missing) = (Vec::new(), None);
                for handle in found {
                    match decide(state, who, target, &handle.id, Some(&handle)) {
                        Ok(rule) => allowed.push((handle, rule)),
                        Err(refusal) => missing = Some(refusal),
                    }
                }
                let chosen = allowed.choose(&mut rand::rng()).cloned();
                chosen.ok_or_else(|| missing.unwrap_or_else(|| unknown_service(target)))
            }
            Target::Tcp { edge, .. } | Target::Probe { edge } | Target::Service { edge: Some(edge), .. } => {
                let handle = self.0.registry.find(edge);
                let rule = decide(state, who, target, edge, handle.as_deref())?;
                let handle = handle.ok_or_else(|| self.absent(state, edge))?;
                if let Target::Service { name, .. } = target
                    && !handle.services().iter().any(|s| s.name == *name)
                {
                    return Err(unknown_service(target));
                }
                Ok((handle, rule))
            }
        }
    }

    fn absent(&self, state: &MeshState, edge: &EdgeId) -> Refusal {
        if state.revision > 0 && !state.edges.contains_key(edge) {
            let reason = format!("no edge {edge} is enrolled; 'meshctl edge ls' shows those that are");
            return Refusal::because(RefuseCode::EdgeUnknown, reason);
        }
        let reason = match self.0.registry.last_seen(edge) {
            Some(seen) => {
                format!("edge/{edge} is not connected; last seen {} s ago", clock::unix_now().saturating_sub(seen))
            }
            None => format!("edge/{edge} is not connected, and was not since this shard started"),
        };
        Refusal::because(RefuseCode::EdgeOffline, reason)
    }

    fn record(&self, request: &Request) -> AccessRecord {
        let mut record = AccessRecord::new(&request.principal, &request.target);
        record.from.clone_from(&request.from);
        record.door.clone_from(&request.door);
        record.shard = self.0.shard.to_string();
        if let Some(edge) = request.target.edge() {
            record.edge = edge.to_string();
        }
        if let Some(trace) = &request.trace {
            record.trace = trace.trace_id.iter().map(|b| format!("{b:02x}")).collect();
        }
        record
    }
}

/// Names the chosen edge in a target that left it open.
fn pin(target: Target, edge: &EdgeId) -> Target {
    match target {
        Target::Service { name, edge: None } => Target::Service { name, edge: Some(edge.clone()) },
        other @ (Target::Service { .. } | Target::Tcp { .. } | Target::Udp { .. } | Target::Probe { .. }) => other,
    }
}

fn unknown_service(target: &Target) -> Refusal {
    let reason = format!("nobody announces {target}; 'meshctl edge show' lists what an edge announces");
    Refusal::because(RefuseCode::ServiceUnknown, reason)
}

fn decide(
    state: &MeshState,
    who: &Principal,
    target: &Target,
    edge: &EdgeId,
    handle: Option<&EdgeHandle>,
) -> Result<String, Refusal> {
    let services = handle.map(EdgeHandle::services);
    let announced = match target {
        Target::Service { name, .. } => services.as_ref().and_then(|all| all.iter().find(|s| s.name == *name)),
        Target::Tcp { .. } | Target::Udp { .. } | Target::Probe { .. } => None,
    };
    let site: Option<&SiteName> =
        handle.map_or_else(|| state.edges.get(edge).and_then(Option::as_ref), |handle| handle.site.as_ref());
    let (service, port) = match target {
        Target::Service { name, .. } => (Some(name), announced.map(|s| s.port)),
        Target::Tcp { to, .. } | Target::Udp { to, .. } => (None, Some(to.port)),
        Target::Probe { .. } => (None, None),
    };
    let place = Place { edge, site, service, port, labels: announced.map(|s| &s.labels) };
    match state.policy.decide(who, target, &place) {
        Decision::Allow { rule } => Ok(rule),
        Decision::Deny { missing } => Err(Refusal::because(RefuseCode::PolicyDenied, missing)),
    }
}
