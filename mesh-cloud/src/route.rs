//! Where a stream goes: who asks, may they, which edge, is it here, and if not, which shard has it.
//!
//! The one way from a door to an edge. It never dials anything itself: what is not reached through a tunnel is not
//! reached. An edge that is not here is asked for at the shards where it may be, best guess first (`Router::guesses`);
//! each of them either has it, or knows who does, or says no.

use std::sync::Arc;

use proto::{
    code::RefuseCode,
    id::{EdgeId, ServiceName, ShardId, SiteName},
    policy::{Decision, Place},
    principal::Principal,
    stream::{Open, Refusal, Routed, Trace},
    target::Target,
};
use rand::{RngExt, seq::IndexedRandom};
use runtime::{
    access::{AccessRecord, AccessWriter},
    clock,
    link::Stream,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    directory::Directory,
    flow::{Beginning, Pending, Trail},
    live::{Lease, LiveCredentials},
    metrics::Metrics,
    peer::Peers,
    registry::Registry,
    session::{EdgeHandle, StreamCount},
    state::MeshState,
};

/// Most shards that pass a stream on: the one where it entered, and one that knows better.
const MAX_HOPS: u32 = 2;
/// The door of streams that another shard passed on, in metrics.
const PEER: &str = "peer";

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
    /// Links to other shards.
    pub peers: Peers,
    /// What other shards said.
    pub directory: Directory,
    /// Cancelled when no new streams are taken from doors and people, late in a drain.
    pub closing: CancellationToken,
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
    /// Shards that passed it on so far, as far as can be told.
    pub hops: u32,
    /// Which ones.
    pub via: Vec<ShardId>,
    /// Whether another shard passed it on, which keeps the record of it.
    pub relayed: bool,
}

/// An edge's tunnel that a request may use, or where to ask for it.
enum Way {
    /// It is here.
    Here(Arc<EdgeHandle>, String),
    /// It is not; these may have it.
    Elsewhere(Elsewhere),
}

/// Where to ask, and what to do if nobody there has the edge.
struct Elsewhere {
    places: Vec<ShardId>,
    /// An edge that is here, and that would do as well.
    or: Option<(Arc<EdgeHandle>, String)>,
    nobody: Refusal,
}

impl Request {
    /// A request without trace, straight from a door.
    #[must_use]
    pub fn new(principal: Principal, from: String, door: &str, target: Target) -> Self {
        let via = Vec::new();
        Self {
            principal,
            credential: None,
            from,
            door: door.to_owned(),
            target,
            trace: None,
            hops: 0,
            via,
            relayed: false,
        }
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
        let mut record = self.record(&request);
        self.0.metrics.streams.with_label_values(&[&record.door]).inc();
        let mut beginning = Beginning {
            record: Some(record.clone()),
            quiet: request.relayed,
            begun,
            access: &self.0.access,
            metrics: &self.0.metrics,
        };
        match self.begin(request, &mut record, begun).await {
            Ok(pending) => {
                beginning.record = None;
                Ok(pending)
            }
            Err(refusal) => {
                beginning.refused(&refusal).await;
                Err(refusal)
            }
        }
    }

    async fn begin(&self, request: Request, record: &mut AccessRecord, begun: Instant) -> Result<Pending, Refusal> {
        let parts = &self.0;
        // Other shards may pass streams on until the end: their edges may not have left yet.
        if parts.ending.is_cancelled() || (parts.closing.is_cancelled() && !request.relayed) {
            return Err(Refusal::new(RefuseCode::Draining));
        }
        if request.hops > MAX_HOPS || request.via.contains(&parts.shard) {
            return Err(Refusal::new(RefuseCode::LoopDetected));
        }
        let lease = request.credential.as_deref().map(|credential| self.lease(credential)).transpose()?;
        let state = self.state();
        let (stream, count, routed) = match self.find(&state, &request)? {
            Way::Here(handle, rule) => match self.here(&request, &handle, rule).await {
                // Its tunnel broke just now. It may have another one by now.
                Err(nobody) if nobody.code == RefuseCode::LinkLost => {
                    let places = self.guesses(&state, &handle.id, &request);
                    self.elsewhere(&request, Elsewhere { places, or: None, nobody }).await?
                }
                opened => opened?,
            },
            Way::Elsewhere(elsewhere) => self.elsewhere(&request, elsewhere).await?,
        };
        let trail = self.trail(&request, record, (begun, lease, count), &routed);
        Ok(Pending { stream, trail, routed })
    }

    /// Opens a stream to an edge whose tunnel ends here.
    async fn here(
        &self,
        request: &Request,
        handle: &Arc<EdgeHandle>,
        rule: String,
    ) -> Result<(Stream, Option<StreamCount>, Routed), Refusal> {
        let target = pin(request.target.clone(), &handle.id);
        let (stream, count) = handle.open(&head(request, target)).await?;
        let routed = Routed { shard: self.0.shard.clone(), edge: handle.id.clone(), rule };
        Ok((stream, Some(count), routed))
    }

    /// Asks other shards, one after the other, until one has found the edge.
    async fn elsewhere(
        &self,
        request: &Request,
        Elsewhere { places, or, nobody }: Elsewhere,
    ) -> Result<(Stream, Option<StreamCount>, Routed), Refusal> {
        let mut via = request.via.clone();
        via.push(self.0.shard.clone());
        let open = Open { via, ..head(request, request.target.clone()) };
        let mut last = None;
        for shard in places {
            match self.0.peers.open(&shard, &open).await {
                Ok((stream, routed)) => return Ok((stream, None, routed)),
                Err(refusal) if may_be_elsewhere(refusal.code) => {
                    tracing::debug!(%shard, code = %refusal.code, "the edge is not there");
                    last.get_or_insert(refusal);
                }
                Err(refusal) => return Err(refusal),
            }
        }
        if let Some((handle, rule)) = or {
            return self.here(request, &handle, rule).await;
        }
        // The first one that was asked was the best guess, and so its answer is the best one; a shard that was not
        // reached says nothing of the edge.
        Err(last.filter(|refusal| refusal.code == RefuseCode::EdgeOffline).unwrap_or(nobody))
    }

    fn trail(
        &self,
        request: &Request,
        record: &mut AccessRecord,
        held: (Instant, Option<Lease>, Option<StreamCount>),
        routed: &Routed,
    ) -> Trail {
        let (begun, lease, count) = held;
        record.rule.clone_from(&routed.rule);
        record.edge = routed.edge.to_string();
        if routed.shard != self.0.shard {
            record.holder = routed.shard.to_string();
        }
        Trail {
            edge: routed.edge.clone(),
            record: Some(record.clone()),
            quiet: request.relayed,
            begun,
            access: self.0.access.clone(),
            metrics: Arc::clone(&self.0.metrics),
            stopping: self.0.ending.clone(),
            lease,
            meter: Arc::default(),
            answer_bytes: 0,
            _count: count,
        }
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

    fn find(&self, state: &MeshState, request: &Request) -> Result<Way, Refusal> {
        match &request.target {
            Target::Udp { .. } => Err(Refusal::new(RefuseCode::Unsupported)),
            Target::Service { edge: None, name } => self.find_service(state, request, name),
            Target::Tcp { edge, .. } | Target::Probe { edge } | Target::Service { edge: Some(edge), .. } => {
                self.find_edge(state, request, edge)
            }
        }
    }

    fn find_edge(&self, state: &MeshState, request: &Request, edge: &EdgeId) -> Result<Way, Refusal> {
        let (who, target) = (&request.principal, &request.target);
        // Whoever died without a word may have come back elsewhere, while its old tunnel still looks alive.
        let newer_elsewhere =
            |handle: &EdgeHandle| self.0.directory.holder(edge).is_some_and(|(_, unix_ms)| unix_ms > handle.unix_ms);
        let handle = self.0.registry.find(edge);
        if let Some(handle) = handle.filter(|h| h.link.end().is_none() && !newer_elsewhere(h)) {
            let rule = decide(state, who, target, edge, Some(&handle))?;
            if let Target::Service { name, .. } = target
                && !handle.services().iter().any(|s| s.name == *name)
            {
                return Err(unknown_service(target));
            }
            return Ok(Way::Here(handle, rule));
        }
        let places = self.guesses(state, edge, request);
        // What a service announces is known where the edge is, and so rules on it are for its holder. What is denied
        // here is denied there; asking would only take longer.
        if places.is_empty() || !matches!(target, Target::Service { .. }) {
            decide(state, who, target, edge, None)?;
        }
        Ok(Way::Elsewhere(Elsewhere { places, or: None, nobody: self.absent(state, edge) }))
    }

    fn find_service(&self, state: &MeshState, request: &Request, name: &ServiceName) -> Result<Way, Refusal> {
        let (mut allowed, mut missing) = (Vec::new(), None);
        for handle in self.0.registry.announcing(name) {
            match decide(state, &request.principal, &request.target, &handle.id, Some(&handle)) {
                Ok(rule) => allowed.push((handle, rule)),
                Err(refusal) => missing = Some(refusal),
            }
        }
        // A shard that was asked by another one answers for its own edges.
        let others = if request.hops == 0 { self.0.directory.providers(name) } else { Vec::new() };
        let mut others: Vec<_> = others.into_iter().filter(|(shard, _)| self.0.peers.has(shard)).collect();
        let here = u32::try_from(allowed.len()).unwrap_or(u32::MAX);
        let everywhere = others.iter().fold(here, |sum, (_, count)| sum.saturating_add(*count));
        let mut rng = rand::rng();
        let or = allowed.choose(&mut rng).cloned();
        if let Some((handle, rule)) = &or
            && rng.random_range(0..everywhere.max(1)) < here
        {
            return Ok(Way::Here(Arc::clone(handle), rule.clone()));
        }
        let nobody = missing.unwrap_or_else(|| unknown_service(&request.target));
        // The first by chance and weight, the rest as they come: they are asked only if it fails.
        let first = others.choose_weighted(&mut rng, |(_, count)| *count).map(|(shard, _)| shard.clone()).ok();
        others.sort_by_key(|(shard, _)| Some(shard) != first.as_ref());
        if others.is_empty() {
            return Err(nobody);
        }
        let places = others.into_iter().map(|(shard, _)| shard).collect();
        Ok(Way::Elsewhere(Elsewhere { places, or, nobody }))
    }

    /// Shards that may hold an edge which is not here, best guess first: whoever said so, where it was sent, its owner,
    /// its owner before the last change, and the one that it goes to if its owner is lost.
    fn guesses(&self, state: &MeshState, edge: &EdgeId, request: &Request) -> Vec<ShardId> {
        let parts = &self.0;
        if request.hops >= MAX_HOPS {
            return Vec::new();
        }
        let told = parts.directory.holder(edge).map(|(shard, _)| shard);
        let sent = parts.directory.trace(edge);
        let owners = state.ring.preference(edge).take(2).map(|m| m.shard.clone());
        let before = state.previous.owner(edge).map(|m| m.shard.clone());
        let mut owners: Vec<_> = owners.collect();
        let next = owners.split_off(owners.len().min(1));
        let mut guesses: Vec<ShardId> = Vec::new();
        for shard in told.into_iter().chain(sent).chain(owners).chain(before).chain(next) {
            let known = shard == parts.shard || request.via.contains(&shard) || guesses.contains(&shard);
            if !known && parts.peers.has(&shard) {
                guesses.push(shard);
            }
        }
        guesses
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
        record.door = if request.relayed { PEER.to_owned() } else { request.door.clone() };
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

/// The head of the stream towards the edge, or towards the next shard.
fn head(request: &Request, target: Target) -> Open {
    Open {
        target,
        principal: Some(request.principal.clone()),
        door: request.door.clone(),
        trace: request.trace,
        hops: request.hops + 1,
        via: Vec::new(),
    }
}

/// Names the chosen edge in a target that left it open.
fn pin(target: Target, edge: &EdgeId) -> Target {
    match target {
        Target::Service { name, edge: None } => Target::Service { name, edge: Some(edge.clone()) },
        other @ (Target::Service { .. } | Target::Tcp { .. } | Target::Udp { .. } | Target::Probe { .. }) => other,
    }
}

/// Whether a shard that refuses with this code may only not have the edge, or not be able to reach it.
const fn may_be_elsewhere(code: RefuseCode) -> bool {
    use RefuseCode as C;
    matches!(code, C::EdgeOffline | C::EdgeUnknown | C::LinkLost | C::Draining | C::LoopDetected | C::ServiceUnknown)
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
