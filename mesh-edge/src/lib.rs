//! The edge put together: one tunnel to the mesh, and the streams that come through it.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use prometheus::Registry;
use proto::{id::EdgeId, identity::Role};
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::AccessWriter,
    admin::{self, Ready},
    identity::{Credentials, IdentityDir},
    link::{
        LinkEnd,
        buffers::UdpBuffers,
        quic::{self, Dialer, LinkLimits},
        tcp::TcpDialer,
        whereabouts,
    },
    shutdown::Tasks,
    tls::{self, LiveIdentity, MeshVerifier, TrustBundle},
};
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::{
    config::EdgeConfig,
    course::Course,
    dice::Dice,
    doors::{DoorAddresses, Doors},
    life::{Life, LifeParts, Line, Phase},
    link::TunnelParts,
    metrics::Metrics,
    proxy::Proxies,
    renew::Renewer,
    serve::{Bounds, Server, ServerParts},
    status::{Reporter, Status},
    ways::Ways,
};

pub mod allow;
pub mod class;
pub mod config;
pub mod course;
pub mod dial;
pub mod dice;
pub mod doors;
pub mod enrol;
pub mod journal;
pub mod life;
pub mod link;
pub mod load;
pub mod machine;
pub mod metrics;
pub mod netcheck;
pub mod proxy;
mod pulse;
pub mod ready;
pub mod renew;
pub mod serve;
pub mod status;
pub mod ways;

/// A running edge. It stops with its tasks.
#[derive(Debug)]
pub struct Edge {
    name: EdgeId,
    phase: watch::Receiver<Phase>,
    ready: Ready,
    metrics: Arc<Metrics>,
    identity: LiveIdentity,
    reporter: Reporter,
    admin: Option<SocketAddr>,
    doors: DoorAddresses,
    line: watch::Receiver<Line>,
}

impl Edge {
    /// Who it is.
    #[must_use]
    pub const fn name(&self) -> &EdgeId {
        &self.name
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }

    /// What `/readyz` says.
    #[must_use]
    pub const fn ready(&self) -> &Ready {
        &self.ready
    }

    /// What it counts.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How it stands, as `/status` says it.
    #[must_use]
    pub fn status(&self) -> Status {
        self.reporter.status()
    }

    /// The identity that it shows.
    #[must_use]
    pub const fn identity(&self) -> &LiveIdentity {
        &self.identity
    }

    /// Where its doors are; none in simulations.
    #[must_use]
    pub const fn doors(&self) -> &DoorAddresses {
        &self.doors
    }

    /// Opens the doors that the configuration names.
    ///
    /// # Errors
    /// If an address is taken.
    pub async fn open_doors(&mut self, config: &EdgeConfig, tasks: &Tasks) -> anyhow::Result<()> {
        let shared = (Arc::clone(&self.metrics), tasks.clone());
        let doors = Doors::new(&config.doors, self.line.clone(), config.udp_idle, shared);
        self.doors = doors.open(&config.doors).await?;
        Ok(())
    }

    /// Where the admin server listens; `None` in simulations.
    #[must_use]
    pub const fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }
}

/// What an edge is made of. A simulation puts in what it steers: a dialer from an endpoint of its own, a seed.
#[derive(Debug)]
pub struct EdgeParts {
    /// The configuration; its `shards` are where to begin.
    pub config: EdgeConfig,
    /// Who it is.
    pub credentials: Credentials,
    /// The same, as it is shown; the dialer must show this one.
    pub identity: LiveIdentity,
    /// Whom it trusts; the dialer must trust this one.
    pub bundle: TrustBundle,
    /// Dials shards; one that is made of a [`Dialer`] alone has no TCP.
    pub ways: Ways,
    /// Takes access records.
    pub access: AccessWriter,
    /// Takes metrics.
    pub registry: Registry,
    /// Chance.
    pub rng: StdRng,
    /// Where renewed identities are kept; `None` keeps them in memory.
    pub store: Option<IdentityDir>,
}

/// The client half of an edge's endpoint, with an empty session cache.
///
/// # Errors
/// If TLS cannot be set up.
pub fn client_config(
    identity: &LiveIdentity,
    bundle: &TrustBundle,
    limits: &LinkLimits,
) -> Result<quinn::ClientConfig, LinkEnd> {
    quic::client_config(client_tls(identity, bundle)?, limits)
}

/// What an edge shows in handshakes, and whom it trusts, over either carrier.
///
/// # Errors
/// If TLS cannot be set up.
pub fn client_tls(identity: &LiveIdentity, bundle: &TrustBundle) -> Result<rustls::ClientConfig, LinkEnd> {
    // The beginning of our own certificate is a time that has passed, even if the clock does not know it.
    let shards = MeshVerifier::of_servers(bundle.clone(), Role::Shard).knowing_that(identity.facts().not_before);
    tls::client_config(Some(identity), Arc::new(shards), &[proto::ALPN_MESH])
        .map_err(|e| LinkEnd::new(runtime::link::EndCause::Transport, e.to_string()))
}

/// Starts an edge from its parts. Opens no socket by itself.
///
/// # Errors
/// If the configuration makes no sense, or no shard is known.
pub fn start_with(parts: EdgeParts, tasks: Tasks) -> anyhow::Result<Edge> {
    let EdgeParts { config, credentials, identity, bundle, ways, access, registry, rng, store } = parts;
    config.check()?;
    let Some(name) = credentials.facts().identity.edge() else {
        bail!("{} is no edge; enrol this machine with a join line for an edge", credentials.facts().identity);
    };
    let course = Course::new(config.shards.clone()).context(
        "no shard is known: neither does `shards` in the configuration name one, nor did enrolment, nor does control now; start one, or write shards = [\"HOST:7400\"]",
    )?;
    let metrics = Arc::new(Metrics::new(&registry)?);
    metrics.congestion_is(config.limits.congestion);
    let (whereabouts, journal) = (ways.whereabouts(), ways.journal().clone());
    let (dice, ways) = (Dice::new(rng), Arc::new(Mutex::new(ways)));
    let (renewed, answers) = mpsc::channel(1);
    let (phase_sender, phase) = watch::channel(Phase::Starting);
    let (line_sender, line) = watch::channel(Line::default());
    let server_parts = ServerParts { edge: name.clone(), access, metrics: Arc::clone(&metrics), tasks: tasks.clone() };
    let bounds = Bounds {
        dial: config.dial_timeout,
        streams: config.limits.streams,
        flows: config.limits.udp_flows,
        idle: config.udp_idle,
    };
    let server = Server::new(config.allowed(name.clone()), bounds, server_parts);
    let life = LifeParts {
        name: name.clone(),
        ways: Arc::clone(&ways),
        server: Arc::new(server),
        tunnel: TunnelParts {
            services: config.announced(),
            renewed,
            metrics: Arc::clone(&metrics),
            tasks: tasks.clone(),
            whereabouts,
            dice: dice.clone(),
            journal: journal.clone(),
            allows: config.told_allows().into(),
        },
        dice: dice.clone(),
        drain: config.drain,
        phase: phase_sender,
        line: line_sender,
        identity: identity.clone(),
    };
    let reporter = Reporter {
        edge: name.clone(),
        shards: config.shards.clone(),
        phase: phase.clone(),
        line: line.clone(),
        journal,
        identity: identity.clone(),
        ways: Arc::clone(&ways),
    };
    let renewer = Renewer {
        credentials: Arc::new(credentials),
        identity: identity.clone(),
        bundle,
        ways,
        limits: config.link_limits(),
        store,
        line: line.clone(),
        answers,
        metrics: Arc::clone(&metrics),
        dice,
    };
    let ready = Ready::new();
    let part = ready.part("tunnel");
    tasks.spawn(Life::new(life, course).run());
    tasks.spawn(tasks.token().run_until_cancelled_owned(renewer.run()));
    let (stopping, follow) = (tasks.token(), ready::keep(part.clone(), phase.clone(), line.clone()));
    tasks.spawn(async move {
        stopping.run_until_cancelled(follow).await;
        part.down("the edge is shutting down");
    });
    Ok(Edge { name, phase, ready, metrics, identity, reporter, admin: None, doors: DoorAddresses::default(), line })
}

/// What dials shards over real sockets, as the configuration says.
///
/// # Errors
/// If TLS cannot be set up, or the proxy cannot be understood.
pub fn ways_of(config: &EdgeConfig, identity: &LiveIdentity, bundle: &TrustBundle) -> anyhow::Result<Ways> {
    let limits = config.link_limits();
    let ways = Ways::from(Dialer::new(client_config(identity, bundle, &limits)?, &limits));
    if !config.carriers.tcp {
        return Ok(ways);
    }
    let tcp = TcpDialer::new(client_tls(identity, bundle)?, &limits);
    Ok(ways.with_tcp(tcp, Proxies::new(&config.proxy)?, config.carriers.head_start))
}

/// Starts an edge: identity from `data_dir`, real sockets, the admin server. Returns once sockets are bound; whether a
/// shard is reached is told by [`Edge::phase`].
///
/// # Errors
/// If there is no identity, the configuration makes no sense, or an address is taken.
pub async fn start(mut config: EdgeConfig, tasks: Tasks) -> anyhow::Result<Edge> {
    config.check()?;
    let dir = IdentityDir::open(&config.data_dir)?;
    let Some((credentials, bundle)) = dir.load()? else {
        bail!(
            "{} holds no identity; enrol with 'mesh-edge join', or put a join line into {}",
            config.data_dir.display(),
            enrol::JOIN_VARIABLE
        );
    };
    let identity = LiveIdentity::new(&credentials).context("the private key cannot be used")?;
    if config.shards.is_empty() {
        config.shards = enrol::noted_shards(&dir)?;
    }
    if config.shards.is_empty() {
        config.shards = enrol::ask_for_shards(&dir, &identity, &bundle).await?;
    }
    let ways = ways_of(&config, &identity, &bundle)?.with_whereabouts(whereabouts::watch(&tasks));
    let access = AccessWriter::start(&config.access, &tasks).context("cannot open the access log")?;
    let (registry, address, doors) = (Registry::new(), config.admin, config.clone());
    let parts = EdgeParts {
        config,
        credentials,
        identity,
        bundle,
        ways,
        access,
        registry: registry.clone(),
        rng: StdRng::from_rng(&mut rand::rng()),
        store: Some(dir),
    };
    let mut edge = start_with(parts, tasks.clone())?;
    let buffers = UdpBuffers::granted()?;
    edge.metrics.udp_buffers_are(buffers);
    if let Some(advice) = buffers.advice() {
        warn!("{advice}");
    }
    let pages = vec![edge.reporter.clone().page()];
    let bound = admin::serve_with(address, (registry, edge.ready.clone()), pages, &tasks)
        .await
        .with_context(|| format!("cannot serve admin on {address}; set `admin` to a free address"))?;
    edge.admin = Some(bound);
    edge.open_doors(&doors, &tasks).await?;
    Ok(edge)
}
