//! An edge of a simulated mesh: its place, and the process that may run there.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::ensure;
use mesh_edge::{Edge, EdgeParts, config::EdgeConfig, life::Phase};
use prometheus::Registry;
use proto::id::EdgeId;
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::AccessWriter,
    identity::Credentials,
    link::quic::Dialer,
    shutdown::Tasks,
    tls::{LiveIdentity, TrustBundle},
};
use tokio::sync::mpsc;

use super::{
    Layout,
    authority::{Authority, again},
    hand::{HandEdge, Version},
    host,
};
use crate::simnet::{Net, seed_for};

/// Ports of an edge's processes count up from here, as a NAT would give them.
const PORT: u16 = 20_000;
/// How long an edge that is asked to stop lets its streams go on.
const DRAIN: Duration = Duration::from_secs(5);

/// An edge's place.
#[derive(Debug)]
pub struct EdgeSeat {
    /// Its name.
    pub name: EdgeId,
    /// Its host.
    pub host: IpAddr,
    /// The process, if one runs.
    pub running: Option<EdgeProcess>,
    /// Whether its certificate is revoked.
    pub revoked: bool,
    /// Of the software that is started here.
    pub version: Version,
    hand: Option<(HandEdge, Tasks, SocketAddr)>,
    credentials: Credentials,
    starts: u16,
    past: Vec<mesh_edge::metrics::Metrics>,
}

/// An edge that runs.
#[derive(Debug)]
pub struct EdgeProcess {
    /// The edge.
    pub edge: Edge,
    /// Its tasks.
    pub tasks: Tasks,
    /// From where it dials.
    pub address: SocketAddr,
}

impl EdgeSeat {
    pub(super) fn new(i: usize, authority: &mut Authority) -> anyhow::Result<Self> {
        // As long for every number, so that runs with other numbers of edges compare.
        let name = format!("edge-{i:04}");
        Ok(Self {
            name: name.parse()?,
            host: host(1, i),
            running: None,
            revoked: false,
            version: Version::This,
            hand: None,
            credentials: authority.issue(&format!("edge/{name}")),
            starts: 0,
            past: Vec::new(),
        })
    }

    /// Another machine that was set up from a copy of this one's disk.
    ///
    /// # Errors
    /// Never, for credentials that were good before.
    pub fn copy(&self, host: IpAddr) -> anyhow::Result<Self> {
        Ok(Self {
            name: self.name.clone(),
            host,
            running: None,
            revoked: self.revoked,
            version: self.version,
            hand: None,
            credentials: again(&self.credentials)?,
            starts: 0,
            past: Vec::new(),
        })
    }

    pub(super) fn start(
        &mut self,
        (net, bundle): (&Net, &TrustBundle),
        shards: Vec<String>,
        layout: &Layout,
        seed: u64,
    ) -> anyhow::Result<()> {
        self.starts += 1;
        let address = SocketAddr::new(self.host, PORT + self.starts);
        let credentials = again(&self.credentials)?;
        let identity = LiveIdentity::new(&credentials)?;
        let config = EdgeConfig { shards, drain: DRAIN, ..EdgeConfig::default() };
        let limits = layout.limits(config.link_limits());
        let client = mesh_edge::client_config(&identity, bundle, &limits)?;
        let dialer = Dialer::from_endpoint(net.endpoint(address, None)?, client, &limits);
        if self.version != Version::This {
            let (tasks, chance) = (Tasks::new(), seed_for(seed, (address, "by hand")));
            let bootstrap = config.shards.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
            // Up to an hour ahead or behind.
            let skew = (chance % 7_200_000) as i64 - 3_600_000;
            let edge = HandEdge::start((&self.name, self.version), dialer, bootstrap, (chance, skew), &tasks);
            self.hand = Some((edge, tasks, address));
            return Ok(());
        }
        // Shards write the records of these streams; an edge's own would only be counted twice.
        let (access, _) = mpsc::channel(1);
        let tasks = Tasks::new();
        let parts = EdgeParts {
            config,
            credentials,
            identity,
            bundle: bundle.clone(),
            ways: dialer.into(),
            access: AccessWriter::to_channel(access),
            registry: Registry::new(),
            rng: StdRng::seed_from_u64(seed_for(seed, (address, "dice"))),
            store: None,
        };
        let edge = mesh_edge::start_with(parts, tasks.clone())?;
        self.past.push(edge.metrics().clone());
        self.running = Some(EdgeProcess { edge, tasks, address });
        Ok(())
    }

    /// Asks the process to stop. Returns its tasks, if one ran.
    pub(super) fn stop(&mut self) -> Option<Tasks> {
        let real = self.running.take().map(|process| process.tasks);
        let tasks = real.or_else(|| self.hand.take().map(|(_, tasks, _)| tasks))?;
        tasks.stop();
        Some(tasks)
    }

    /// Whether a process runs.
    #[must_use]
    pub const fn runs(&self) -> bool {
        self.running.is_some() || self.hand.is_some()
    }

    /// From where it dials.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        let real = self.running.as_ref().map(|p| p.address);
        real.or_else(|| self.hand.as_ref().map(|(_, _, address)| *address))
    }

    /// Of its certificate.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.credentials.facts().serial
    }

    /// Where the process stands.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.running.as_ref().map(|p| p.edge.phase().borrow().clone())
    }

    /// Whether a tunnel serves, as the edge sees it.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.phase(), Some(Phase::Connected { .. }))
            || self.hand.as_ref().is_some_and(|(edge, ..)| edge.is_connected())
    }

    /// Whether `/readyz` would say yes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.running.as_ref().is_some_and(|p| p.edge.ready().is_ready())
    }

    /// Attempts to reach a shard, by all processes that ran here.
    #[must_use]
    pub fn dials(&self) -> u64 {
        use prometheus::core::Collector;
        let families: Vec<_> = self.past.iter().flat_map(|m| m.dials.collect()).collect();
        families.iter().flat_map(|f| f.get_metric()).map(|m| m.get_counter().get_value() as u64).sum()
    }

    /// How often a shard has welcomed a process that ran here.
    #[must_use]
    pub fn tunnels(&self) -> u64 {
        self.past.iter().map(|m| m.dials.with_label_values(&["welcome"]).get()).sum()
    }

    pub(super) fn check_left(&self) -> anyhow::Result<()> {
        for metrics in &self.past {
            let gauges = [metrics.connected.get(), metrics.streams_active.get()];
            ensure!(gauges == [0; 2], "{} counts tunnels and streams that are left: {gauges:?}", self.name);
        }
        Ok(())
    }

    pub(super) fn state(&self) -> String {
        match (self.phase(), &self.running) {
            (Some(phase), Some(p)) => format!("{} {phase:?}; ready: {}", p.address, p.edge.ready().is_ready()),
            (None, _) | (_, None) => match &self.hand {
                Some((edge, _, address)) => format!("{address} {:?}; connected: {}", self.version, edge.is_connected()),
                None => "does not run".to_owned(),
            },
        }
    }
}
