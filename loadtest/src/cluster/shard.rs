//! A shard of a simulated mesh: its place, and the process that may run there.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_cloud::{
    Parts, Shard,
    config::{DoorsConfig, ShardConfig},
    live::LiveCredentials,
    metrics::Metrics,
    state::MeshState,
};
use prometheus::Registry;
use proto::{
    connection_id::{Place, ShardTag},
    id::{EdgeId, ShardId},
    ring::{Ring, WEIGHT},
};
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::AccessWriter,
    admin::Ready,
    clock,
    identity::Credentials,
    link::{
        listen::Listener,
        quic::{self, Dialer},
    },
    shutdown::Tasks,
    tls::{LiveIdentity, TrustBundle},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Layout, address,
    authority::{Authority, again},
    control::{Directory, follow::Following},
};
use crate::simnet::{Net, seed_for};

/// Where shards listen.
const PORT: u16 = 7400;

/// A shard's place.
#[derive(Debug)]
pub struct ShardSeat {
    /// Its name.
    pub id: ShardId,
    /// Where it listens.
    pub address: SocketAddr,
    /// The process, if one runs.
    pub running: Option<ShardProcess>,
    /// How much its next process takes, compared with others.
    pub weight: u32,
    /// Processes that ran here.
    pub starts: u32,
    credentials: Credentials,
    /// Ends what is left of the process that ran here last.
    last: Option<CancellationToken>,
}

/// A shard that runs.
#[derive(Debug)]
pub struct ShardProcess {
    /// The shard.
    pub shard: Shard,
    /// Its tasks.
    pub tasks: Tasks,
    /// Its counters.
    pub metrics: Arc<Metrics>,
    /// Credentials that are in use there.
    pub live: LiveCredentials,
    /// What `/readyz` would say.
    pub ready: Ready,
    /// What it was told by control.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// Those of its tasks that speak with control.
    pub following: Tasks,
    pub(super) killed: CancellationToken,
}

impl ShardSeat {
    pub(super) fn new(i: usize, authority: &mut Authority) -> anyhow::Result<Self> {
        let name = format!("shard-{i}");
        Ok(Self {
            id: name.parse()?,
            address: address(0, i, PORT),
            running: None,
            weight: WEIGHT,
            starts: 0,
            last: None,
            credentials: authority.issue(&format!("shard/{name}")),
        })
    }

    pub(super) fn start(
        &mut self,
        (net, bundle, access): (&Net, &TrustBundle, AccessWriter),
        (replicas, directory): (Vec<IpAddr>, Directory),
        layout: &Layout,
    ) -> anyhow::Result<()> {
        self.starts += 1;
        if let Some(last) = self.last.take() {
            // Of two processes with one address, the new one has it: the one that still drains is gone.
            last.cancel();
        }
        let (sender, state) = watch::channel(Arc::<MeshState>::default());
        let identity = LiveIdentity::new(&again(&self.credentials)?)?;
        let limits = layout.limits(mesh_cloud::link_limits());
        // The same for every process at this place, as the key that a shard keeps on its disk.
        let place = Place { shard: ShardTag::of(&self.id), worker: 0 };
        let known = quic::known_endpoint(self.id.as_str().as_bytes(), place);
        let endpoint =
            net.endpoint_with(known, self.address, Some(mesh_cloud::endpoint_config(&identity, bundle, &limits)?))?;
        let metrics = Arc::new(Metrics::new(&Registry::new())?);
        let (tasks, ready, live) = (Tasks::new(), Ready::new(), LiveCredentials::default());
        // Certificates here live for ever: nobody asks for a renewal.
        let (renewals, _) = mpsc::channel(1);
        let doors = DoorsConfig { proxy: None, http: None, https: None, ..DoorsConfig::default() };
        let config = ShardConfig { doors, drain_secs: layout.drain_secs, ..ShardConfig::default() };
        let client = mesh_cloud::peer_config(&identity, bundle, &mesh_cloud::peer_limits())?;
        let parts = Parts {
            shard: self.id.clone(),
            peers: Dialer::from_endpoint(endpoint.clone(), client, &mesh_cloud::peer_limits()),
            identity,
            bundle: bundle.clone(),
            listener: Listener::from_endpoint(endpoint, &limits),
            state: state.clone(),
            live: live.clone(),
            access,
            metrics: Arc::clone(&metrics),
            renewals,
            ready: ready.part("doors"),
        };
        let shard = mesh_cloud::start_with(&config, parts, &tasks)?;
        let (following, killed) = (Tasks::new(), CancellationToken::new());
        let follow = Following {
            net: net.clone(),
            shard: self.id.clone(),
            host: self.address.ip(),
            addresses: vec![self.address.to_string()],
            weight: self.weight,
            replicas,
            directory,
            state: sender,
            live: live.clone(),
            registry: shard.registry.clone(),
            standing: shard.standing.clone(),
            started: clock::unix_millis(),
            reports: Arc::default(),
        };
        let chance = seed_for(net.seed(), ("follow", self.address, self.starts));
        follow.start(&killed, &following, StdRng::seed_from_u64(chance));
        self.last = Some(killed.clone());
        self.running = Some(ShardProcess { shard, tasks, metrics, live, ready, state, following, killed });
        Ok(())
    }

    /// What a process at this place shows in handshakes, for one that is written by hand.
    ///
    /// # Errors
    /// Never, for credentials that were good before.
    pub fn identity(&self) -> anyhow::Result<LiveIdentity> {
        Ok(LiveIdentity::new(&again(&self.credentials)?)?)
    }

    /// Whether the shard runs and has the edge in its registry.
    #[must_use]
    pub fn holds(&self, edge: &EdgeId) -> bool {
        self.running.as_ref().is_some_and(|p| p.shard.registry.find(edge).is_some())
    }

    /// The ring that it goes by, if it runs.
    #[must_use]
    pub fn ring(&self) -> Option<Arc<Ring>> {
        self.running.as_ref().map(|p| Arc::clone(&p.state.borrow().ring))
    }

    /// Links that arrived so far, whatever became of them.
    #[must_use]
    pub fn arrivals(&self) -> u64 {
        use prometheus::core::Collector;
        let Some(process) = &self.running else { return 0 };
        let families = process.metrics.arrivals.collect();
        families.iter().flat_map(|f| f.get_metric()).map(|m| m.get_counter().get_value() as u64).sum()
    }

    pub(super) fn state(&self) -> String {
        self.ring().map_or_else(|| "does not run".to_owned(), |ring| format!("{ring:?}"))
    }
}
