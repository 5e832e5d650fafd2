//! Where a stream goes: who asks, may they, which edge, is it here, and if not, which shard has it.
//!
//! The one way from a door to an edge. It never dials anything itself: what is not reached through a tunnel is not
//! reached. An edge that is not here is asked for at the shards where it may be (`search`), and so is one that announces
//! a service (`service`). What cannot be known now is waited for a moment, and then said as it is: an edge is called
//! offline only by those who know.

use std::{sync::Arc, time::Duration};

use proto::{
    audit::AccessRecord,
    code::RefuseCode,
    id::{EdgeId, ShardId, SiteName},
    policy::{Decision, Place},
    principal::Principal,
    stream::{Open, Refusal, Routed, Trace},
    target::Target,
};
use runtime::{access::AccessWriter, clock, link::Stream};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    directory::Directory,
    flow::{Beginning, Pending, Trail, silence::Silence},
    live::{Lease, LiveCredentials},
    metrics::Metrics,
    peer::Peers,
    registry::Registry,
    session::{EdgeHandle, StreamCount},
    state::MeshState,
};

mod search;
mod service;

use search::Search;

/// Most shards that pass a stream on: the one where it entered, and one that knows better.
const MAX_HOPS: u32 = 2;
/// The door of streams that another shard passed on, in metrics.
const PEER: &str = "peer";
/// How long it may take to find an edge: less than anybody waits at a door.
const FIND: Duration = Duration::from_secs(8);
/// The same for a stream that another shard passed on, which waits for three seconds and may then ask another one.
const FIND_PASSED_ON: Duration = Duration::from_millis(2500);
/// How long a shard that has just started waits for the first word of control.
const FIRST_WORD: Duration = Duration::from_secs(3);
/// How long to wait for a link to a shard, or for its word, without which it cannot be told where an edge is.
const NEWS: Duration = Duration::from_secs(1);
/// How long after a shard was lost its edges may be on their way to another one: they ping, are told by the network that
/// nobody listens, and dial.
const ON_THE_WAY: Duration = Duration::from_secs(6);
/// How often it is asked meanwhile whether the edge has come.
const ASK_AGAIN: Duration = Duration::from_millis(150);

/// A stream to an edge, or to the shard that has found it.
type Opened = (Stream, Option<StreamCount>, Routed);

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
    /// Whether it is for a flow of datagrams.
    pub datagrams: bool,
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
            datagrams: false,
        }
    }

    /// The same for a flow of datagrams.
    #[must_use]
    pub fn flow(principal: Principal, from: String, door: &str, target: Target) -> Self {
        Self { datagrams: true, ..Self::new(principal, from, door, target.over_udp()) }
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
        self.first_word(begun + if request.hops == 0 { FIRST_WORD } else { FIND_PASSED_ON }).await?;
        let lease = request.credential.as_deref().map(|credential| self.lease(credential)).transpose()?;
        let until = begun + if request.hops == 0 { FIND } else { FIND_PASSED_ON };
        let (stream, count, routed) = match &request.target {
            Target::Service { edge: None, name } => self.to_service(&request, name, until).await?,
            Target::Tcp { edge, .. }
            | Target::Udp { edge, .. }
            | Target::Probe { edge }
            | Target::Service { edge: Some(edge), .. } => Search::new(self, &request, edge, until).run().await?,
        };
        // kube-apiserver itself waits for any time, and so does whoever has typed `kubectl exec`.
        let tells_cut = count.as_ref().filter(|_| request.principal == Principal::Apiserver);
        let silence = tells_cut.map(|count| Box::new(Silence::new(Arc::clone(count.tunnel()))));
        let trail = self.trail(&request, record, (begun, lease, count), &routed);
        Ok(Pending { stream, trail, routed, silence })
    }

    /// Waits for a moment until it is known who people are.
    ///
    /// # Errors
    /// If control has still not been heard.
    pub async fn knows_people(&self) -> Result<(), Refusal> {
        self.first_word(Instant::now() + FIRST_WORD).await
    }

    /// Waits until control has been heard: before, nobody is known here and nothing is allowed.
    async fn first_word(&self, until: Instant) -> Result<(), Refusal> {
        loop {
            let news = self.0.peers.news();
            if self.0.state.borrow().revision > 0 {
                return Ok(());
            }
            if timeout_at(until, news).await.is_err() {
                let reason = "this shard has just started and has not heard from control yet; another one serves";
                return Err(Refusal::because(RefuseCode::NotReady, reason));
            }
        }
    }

    /// Opens a stream to an edge whose tunnel ends here.
    async fn here(&self, request: &Request, handle: &Arc<EdgeHandle>, rule: String) -> Result<Opened, Refusal> {
        let target = pin(request.target.clone(), &handle.id);
        let (stream, count) = handle.open(&head(request, target)).await?;
        let routed = Routed { shard: self.0.shard.clone(), edge: handle.id.clone(), rule };
        Ok((stream, Some(count), routed))
    }

    /// The head of a stream that is passed on to another shard.
    fn passed_on(&self, request: &Request) -> Open {
        let mut via = request.via.clone();
        via.push(self.0.shard.clone());
        Open { via, ..head(request, request.target.clone()) }
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
        if let Some(count) = &count {
            count.tunnel().link.carrier().slug().clone_into(&mut record.carrier);
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
    pub(crate) fn lease(&self, credential: &str) -> Result<Lease, Refusal> {
        // Leased first: a revocation that comes in between then finds it.
        let lease = self.0.live.lease(credential);
        if self.state().is_good(credential) && !lease.ended().is_cancelled() {
            Ok(lease)
        } else {
            Err(Refusal::because(RefuseCode::Unauthenticated, "this credential is revoked; log in again"))
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
        datagrams: request.datagrams,
    }
}

/// Names the chosen edge in a target that left it open.
fn pin(target: Target, edge: &EdgeId) -> Target {
    match target {
        Target::Service { name, edge: None } => Target::Service { name, edge: Some(edge.clone()) },
        other @ (Target::Service { .. } | Target::Tcp { .. } | Target::Udp { .. } | Target::Probe { .. }) => other,
    }
}

/// Whether a shard that refuses with this code only does not have the edge, or cannot find it.
const fn may_be_elsewhere(code: RefuseCode) -> bool {
    use RefuseCode as C;
    matches!(
        code,
        C::EdgeOffline | C::EdgeUnknown | C::LinkLost | C::Draining | C::LoopDetected | C::ServiceUnknown | C::NotReady
    )
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
