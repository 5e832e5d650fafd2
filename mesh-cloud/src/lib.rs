//! A shard of the mesh: holds the tunnels of edges, opens doors to the world, and brings the two together.
//!
//! The way of a byte: a door ([`doors`]) finds out who is meant, [`route`] decides and finds the tunnel, [`session`]
//! opens a stream in it, and from then on only `runtime::splice` stands between two sockets.
//!
//! A shard never dials a target itself, keeps nothing on disk but its identity, and knows neither Kubernetes nor a
//! database.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use prometheus::Registry as Families;
use proto::{ALPN_MESH, code::CloseCode, id::ShardId, target::HostPort};
use runtime::{
    access::AccessWriter,
    admin::{self, Ready, ReadyPart},
    api::ApiClient,
    identity::IdentityDir,
    link::quic::{self, LinkLimits, Listener},
    shutdown::Tasks,
    tls::{LiveIdentity, MeshVerifier, TrustBundle, server_config},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub mod config;
pub mod doors;
pub mod enrol;
pub mod flow;
pub mod follow;
pub mod listener;
pub mod live;
pub mod metrics;
pub mod registry;
pub mod route;
pub mod session;
pub mod state;

use config::ShardConfig;
use doors::{Door, http::HttpDoor, https::HttpsDoor, proxy::ProxyDoor};
use listener::Reception;
use live::LiveCredentials;
use metrics::Metrics;
use registry::Registry;
use route::{Parts as RouterParts, Router};
use session::RenewalRequest;
use state::MeshState;

/// Renewals that wait for control; more are told to come again.
const RENEWALS: usize = 64;
/// How long what is left at the deadline of a drain may take to say its last word.
const LAST_WORD: Duration = Duration::from_secs(1);

/// What a shard is made of, besides its configuration.
#[derive(Debug)]
pub struct Parts {
    /// Who it is.
    pub shard: ShardId,
    /// What it shows in handshakes.
    pub identity: LiveIdentity,
    /// Whom it trusts.
    pub bundle: TrustBundle,
    /// Accepts tunnels.
    pub listener: Listener,
    /// What control says.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// Credentials in use.
    pub live: LiveCredentials,
    /// Access records.
    pub access: AccessWriter,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Passes renewals to control.
    pub renewals: mpsc::Sender<RenewalRequest>,
    /// Says that the shard accepts.
    pub ready: ReadyPart,
}

/// A shard that runs.
#[derive(Debug)]
pub struct Shard {
    /// Who it is.
    pub id: ShardId,
    /// Where tunnels come in.
    pub mesh: SocketAddr,
    /// The proxy door.
    pub proxy: Option<SocketAddr>,
    /// The HTTP door.
    pub http: Option<SocketAddr>,
    /// The HTTPS door.
    pub https: Option<SocketAddr>,
    /// The TCP doors, by name.
    pub tcp: Vec<(String, SocketAddr)>,
    /// The admin server.
    pub admin: Option<SocketAddr>,
    /// Edges that are here.
    pub registry: Registry,
    /// Opens streams.
    pub router: Router,
}

/// The limits of a shard's links. Windows are what a stream and a tunnel may keep in memory here.
#[must_use]
pub fn link_limits() -> LinkLimits {
    LinkLimits::default()
}

/// The server half of a shard's endpoint.
///
/// # Errors
/// If TLS cannot be set up.
pub fn endpoint_config(
    identity: &LiveIdentity,
    bundle: &TrustBundle,
    limits: &LinkLimits,
) -> anyhow::Result<quinn::ServerConfig> {
    let tls = server_config(identity, MeshVerifier::of_clients(bundle.clone(), true), &[ALPN_MESH])?;
    Ok(quic::server_config(tls, limits)?)
}

/// Starts a shard: loads its identity, follows control, opens its doors. It stops when `tasks` does, after its streams
/// have ended or its drain time is over.
///
/// # Errors
/// If it is not enrolled, or an address cannot be bound.
pub async fn start(config: ShardConfig, tasks: Tasks) -> anyhow::Result<Shard> {
    let dir = IdentityDir::open(&config.data_dir)?;
    let (credentials, bundle) = dir.load()?.with_context(|| {
        format!(
            "no identity in {}: enrol with 'mesh-cloud join' and a line from 'meshctl token create --shard'",
            config.data_dir.display()
        )
    })?;
    let control: HostPort = dir
        .read(enrol::CONTROL_NOTE)?
        .with_context(|| format!("{} does not say where control is; enrol again", config.data_dir.display()))?
        .trim()
        .parse()?;
    let shard = credentials.facts().identity.shard().context("the identity is not that of a shard")?;
    let identity = LiveIdentity::new(&credentials)?;
    let families = Families::new();
    let metrics = Arc::new(Metrics::new(&families)?);
    let ready = Ready::new();
    let limits = link_limits();
    let endpoint = endpoint_config(&identity, &bundle, &limits)?;
    let listener = Listener::bind_again(config.listen, endpoint, &limits, &reset_key(&dir)?)
        .with_context(|| format!("cannot listen on UDP {}", config.listen))?;
    let (state_sender, state) = watch::channel(Arc::new(MeshState::default()));
    let (renewals, renewal_requests) = mpsc::channel(RENEWALS);
    let parts = Parts {
        shard,
        identity: identity.clone(),
        bundle: bundle.clone(),
        listener,
        state,
        live: LiveCredentials::default(),
        access: AccessWriter::start(&config.access, &tasks).context("cannot open the access log")?,
        metrics: Arc::clone(&metrics),
        renewals,
        ready: ready.part("doors"),
    };
    let following = follow::Following {
        state: state_sender,
        live: parts.live.clone(),
        bundle: bundle.clone(),
        metrics: Arc::clone(&metrics),
        ready: ready.part("control"),
    };
    let mut running = start_with(&config, parts, &tasks)?;
    if let Some(address) = config.admin {
        running.admin = Some(admin::serve(address, families, ready, &tasks).await.context("admin server")?);
    }
    let client = ApiClient::new(control, &identity, bundle.clone())?;
    let addresses = advertised(&config, running.mesh);
    let stop = tasks.token();
    let follow = [
        tasks.spawn(ended(stop.clone(), following.run(client.clone()))),
        tasks.spawn(ended(stop.clone(), follow::renew(client.clone(), renewal_requests, metrics))),
        tasks.spawn(ended(
            stop.clone(),
            follow::report(client.clone(), running.id.clone(), addresses, running.registry.clone()),
        )),
        tasks.spawn(ended(stop, follow::renew_own(client, identity, dir, bundle, config.names))),
    ];
    drop(follow);
    Ok(running)
}

/// The key by which links of a shard that was killed know its successor's resets; made at the first start.
fn reset_key(dir: &IdentityDir) -> anyhow::Result<Vec<u8>> {
    const NOTE: &str = "reset.key";
    if let Some(key) = dir.read(NOTE)?.filter(|key| key.len() >= 32) {
        return Ok(key.into_bytes());
    }
    let key = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
    dir.write(NOTE, &key)?;
    Ok(key.into_bytes())
}

async fn ended(stop: CancellationToken, work: impl Future<Output = ()>) {
    // Whether it was cut off or ended by itself is the same at the end of the process.
    let _ = stop.run_until_cancelled(work).await;
}

fn advertised(config: &ShardConfig, mesh: SocketAddr) -> Vec<String> {
    if !config.advertise.is_empty() {
        return config.advertise.clone();
    }
    if !mesh.ip().is_unspecified() {
        return vec![mesh.to_string()];
    }
    tracing::warn!("'advertise' is not set: edges are told to use this host's name");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "localhost".into());
    vec![format!("{}:{}", host.trim(), mesh.port())]
}

/// Starts a shard from its parts, without control: tests and simulations bring their own.
///
/// # Errors
/// If an address cannot be bound.
pub fn start_with(config: &ShardConfig, parts: Parts, tasks: &Tasks) -> anyhow::Result<Shard> {
    let (accepting, streams, sessions) = (tasks.child(), Tasks::new(), Tasks::new());
    let ending = CancellationToken::new();
    let registry = Registry::default();
    let router = Router::new(RouterParts {
        shard: parts.shard.clone(),
        registry: registry.clone(),
        state: parts.state,
        live: parts.live.clone(),
        access: parts.access,
        metrics: Arc::clone(&parts.metrics),
        ending: ending.clone(),
    });
    let mesh = parts.listener.local_addr()?;
    let reception = Reception {
        shard: parts.shard.clone(),
        registry: registry.clone(),
        router: router.clone(),
        live: parts.live,
        renewals: parts.renewals,
        limits: config.limits,
    };
    let mut shard = Shard {
        id: parts.shard,
        mesh,
        proxy: None,
        http: None,
        https: None,
        tcp: Vec::new(),
        admin: None,
        registry: registry.clone(),
        router: router.clone(),
    };
    let doors = Doors { config, router: &router, accepting: &accepting, streams: &streams, metrics: &parts.metrics };
    doors.open(&mut shard, &parts.identity, &parts.bundle)?;
    tasks.spawn(reception.run(parts.listener.clone(), accepting.clone(), sessions.clone(), streams.clone()));
    parts.ready.up();
    let drain = Drain {
        listener: parts.listener,
        registry,
        streams,
        sessions,
        ending,
        ready: parts.ready,
        time: Duration::from_secs(config.drain_secs),
    };
    let stop = tasks.token();
    tasks.spawn(async move {
        stop.cancelled().await;
        drain.run().await;
    });
    Ok(shard)
}

/// Opens the doors that the configuration names.
struct Doors<'a> {
    config: &'a ShardConfig,
    router: &'a Router,
    accepting: &'a Tasks,
    streams: &'a Tasks,
    metrics: &'a Arc<Metrics>,
}

impl Doors<'_> {
    fn open(&self, shard: &mut Shard, identity: &LiveIdentity, bundle: &TrustBundle) -> anyhow::Result<()> {
        let doors = &self.config.doors;
        let domain = self.config.domain.clone();
        if let Some(address) = doors.proxy {
            let verifier = MeshVerifier::of_clients(bundle.clone(), false);
            let door = Arc::new(ProxyDoor {
                router: self.router.clone(),
                tls: Arc::new(server_config(identity, verifier, &[b"http/1.1"])?),
                plain_tokens: doors.proxy_plain,
                domain: domain.clone(),
                stopping: self.accepting.token(),
                tasks: self.streams.clone(),
            });
            shard.proxy = Some(self.run("proxy", address, move |v| Arc::clone(&door).visit(v))?);
        }
        if let Some(address) = doors.http {
            let door = Arc::new(HttpDoor {
                router: self.router.clone(),
                domain: domain.clone(),
                stopping: self.accepting.token(),
                tasks: self.streams.clone(),
            });
            shard.http = Some(self.run("http", address, move |v| Arc::clone(&door).visit(v))?);
        }
        if let Some(address) = doors.https {
            let door = Arc::new(HttpsDoor { router: self.router.clone(), domain, stopping: self.accepting.token() });
            shard.https = Some(self.run("https", address, move |v| Arc::clone(&door).visit(v))?);
        }
        for tcp in &doors.tcp {
            let (router, name, target) = (self.router.clone(), tcp.name.clone(), tcp.target.clone());
            let visit = move |v| doors::tcp::visit(v, router.clone(), name.clone(), target.clone());
            shard.tcp.push((tcp.name.clone(), self.run(&tcp.name, tcp.listen, visit)?));
        }
        Ok(())
    }

    fn run<F>(
        &self,
        name: &str,
        address: SocketAddr,
        visit: impl Fn(doors::Visitor) -> F + Send + 'static,
    ) -> anyhow::Result<SocketAddr>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let connections = self.config.limits.door_connections;
        let door = Door::open(name, address, connections, Arc::clone(self.metrics))
            .with_context(|| format!("cannot open the {name} door on {address}"))?;
        let address = door.local_addr()?;
        self.accepting.spawn(door.run(self.accepting.clone(), self.streams.clone(), visit));
        Ok(address)
    }
}

/// The end of a shard: nobody new, then time for what runs, then the rest is cut.
struct Drain {
    listener: Listener,
    registry: Registry,
    streams: Tasks,
    sessions: Tasks,
    ending: CancellationToken,
    ready: ReadyPart,
    time: Duration,
}

impl Drain {
    async fn run(self) {
        self.ready.down("draining");
        self.listener.refuse_new();
        tracing::info!(streams = self.streams.running(), edges = self.registry.len(), "draining");
        let left = self.streams.finished(self.time).await;
        if left > 0 {
            tracing::warn!(streams = left, "the drain time is over; what is left is cut");
        }
        self.ending.cancel();
        self.streams.finished(LAST_WORD).await;
        for edge in self.registry.all() {
            edge.link.close(CloseCode::Shutdown, CloseCode::Shutdown.sentence());
        }
        self.listener.close(CloseCode::Shutdown);
        self.sessions.drained(LAST_WORD).await;
        // Peers that are gone do not answer; waiting for them is a courtesy.
        let _ = tokio::time::timeout(LAST_WORD, self.listener.idle()).await;
        tracing::info!("drained");
    }
}
