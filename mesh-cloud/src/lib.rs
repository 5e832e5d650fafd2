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
use proto::{
    api::ShardState,
    connection_id::{Place, ShardTag},
    id::ShardId,
    target::HostPort,
};
use runtime::{
    access::AccessWriter,
    admin::{self, Ready, ReadyPart},
    api::ApiClient,
    audit::AuditQueue,
    clock,
    flow::port::UdpPort,
    identity::IdentityDir,
    link::{
        buffers::UdpBuffers,
        listen::Listener,
        quic::{Dialer, LinkLimits},
    },
    shutdown::Tasks,
    tls::{LiveIdentity, MeshVerifier, TrustBundle, server_config},
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub mod admit;
pub mod audit;
pub mod config;
pub mod directory;
pub mod doors;
pub mod drain;
pub mod enrol;
pub mod fair;
pub mod flow;
pub mod follow;
mod links;
pub mod listener;
pub mod live;
pub mod metrics;
mod opener;
pub mod partings;
pub mod peer;
pub mod rebalance;
pub mod registry;
pub mod route;
pub mod session;
pub mod state;

use config::ShardConfig;
use directory::Directory;
use doors::{
    Door,
    dns::DnsDoor,
    egress::{EgressDoor, Opening},
    http::HttpDoor,
    https::HttpsDoor,
    proxy::ProxyDoor,
    ssh::{
        STRANGERS, SshDoor,
        host::{self, Host},
    },
};
use drain::Drain;
use fair::{Shares, UserShares};
use follow::Clients;
pub use links::{endpoint_config, link_limits, peer_config, peer_limits, tcp_door};
use links::{listen, reset_key};
use listener::Reception;
use live::LiveCredentials;
use metrics::Metrics;
use partings::Partings;
use peer::Peers;
use rebalance::Rebalance;
use registry::Registry;
use route::{Parts as RouterParts, Router};
use session::RenewalRequest;
use state::MeshState;

/// Renewals that wait for control; more are told to come again.
const RENEWALS: usize = 64;
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
    /// Dials other shards; made with [`peer_config`].
    pub peers: Dialer,
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
    /// The SSH door.
    pub ssh: Option<SocketAddr>,
    /// Who the shard is there.
    pub ssh_host: Option<Arc<Host>>,
    /// The DNS door, over UDP and TCP.
    pub dns: Option<SocketAddr>,
    /// The TCP doors, by name.
    pub tcp: Vec<(String, SocketAddr)>,
    /// The UDP doors, by name.
    pub udp: Vec<(String, SocketAddr)>,
    /// The egress door over TCP.
    pub egress: Option<SocketAddr>,
    /// The admin server.
    pub admin: Option<SocketAddr>,
    /// Edges that are here.
    pub registry: Registry,
    /// Opens streams.
    pub router: Router,
    /// What other shards say.
    pub directory: Directory,
    /// Links to other shards.
    pub peers: Peers,
    /// Why edges are here no longer.
    pub partings: Partings,
    /// Whether it is about to stop.
    pub standing: watch::Receiver<ShardState>,
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
    let control = control_addresses(&config, &dir)?;
    let shard = credentials.facts().identity.shard().context("the identity is not that of a shard")?;
    let identity = LiveIdentity::new(&credentials)?;
    let families = Families::new();
    let metrics = Arc::new(Metrics::new(&families)?);
    let ready = Ready::new();
    let congestion = config.limits.congestion;
    metrics.congestion.with_label_values(&[congestion.name()]).set(1);
    note_buffers(&metrics)?;
    let limits = LinkLimits { congestion, ..link_limits() };
    let peer_limits = LinkLimits { congestion, ..peer_limits() };
    let place = Place { shard: ShardTag::of(&shard), worker: 0 };
    let listener = listen(&config, (&identity, &bundle), &limits, (&reset_key(&dir)?, place))?;
    let (state_sender, state) = watch::channel(Arc::new(MeshState::default()));
    let (renewals, renewal_requests) = mpsc::channel(RENEWALS);
    let access = AccessWriter::start(&config.access, &tasks).context("cannot open the access log")?;
    let queue = config.audit.enabled.then(|| AuditQueue::new(config.audit.queue, config.audit.one_of));
    let access = match &queue {
        Some(queue) => access.and_audit(queue.clone()),
        None => access,
    };
    let parts = Parts {
        shard,
        identity: identity.clone(),
        bundle: bundle.clone(),
        listener,
        state,
        live: LiveCredentials::default(),
        access,
        metrics: Arc::clone(&metrics),
        renewals,
        ready: ready.part("doors"),
        peers: Dialer::new(peer_config(&identity, &bundle, &peer_limits)?, &peer_limits),
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
    let clients = control.into_iter().map(|address| ApiClient::new(address, &identity, bundle.clone()));
    let clients = Clients::new(clients.collect::<Result<_, _>>()?);
    let reporter = follow::Reporter {
        addresses: advertised(&config, running.mesh),
        weight: config.weight,
        shard: running.id.clone(),
        registry: running.registry.clone(),
        router: running.router.clone(),
        partings: running.partings.clone(),
        standing: running.standing.clone(),
        started: clock::unix_millis(),
        reports: Arc::default(),
    };
    let standing = running.standing.clone();
    if let Some(queue) = queue {
        let auditor = audit::Auditor { queue, started: reporter.started, metrics: Arc::clone(&metrics) };
        tasks.spawn(auditor.run(clients.clone(), standing.clone()));
    }
    reporter.start(&clients, &tasks);
    tasks.spawn(until_drained(standing.clone(), following.run(clients.clone())));
    tasks.spawn(until_drained(standing.clone(), follow::renew(clients.clone(), renewal_requests, metrics)));
    if let Some(host) = &running.ssh_host {
        tasks.spawn(until_drained(standing.clone(), Arc::clone(host).keep(clients.clone())));
    }
    tasks.spawn(until_drained(standing, follow::renew_own(clients, identity, dir, bundle, config.names)));
    Ok(running)
}

/// Notes how large the buffers of UDP sockets are, and says what to do if they are small.
fn note_buffers(metrics: &Metrics) -> anyhow::Result<()> {
    let buffers = UdpBuffers::granted()?;
    for (direction, size) in [("receive", buffers.receive), ("send", buffers.send)] {
        metrics.udp_buffers.with_label_values(&[direction]).set(i64::try_from(size).unwrap_or(i64::MAX));
    }
    if let Some(advice) = buffers.advice() {
        tracing::warn!("{advice}");
    }
    Ok(())
}

/// Where control is: as configured, else as noted at enrolment.
fn control_addresses(config: &ShardConfig, dir: &IdentityDir) -> anyhow::Result<Vec<HostPort>> {
    let given: Vec<String> = if config.control.is_empty() {
        let noted = dir.read(enrol::CONTROL_NOTE)?.with_context(|| {
            format!(
                "{} does not say where control is; enrol again, or set control = [\"host:7443\"]",
                config.data_dir.display()
            )
        })?;
        vec![noted.trim().to_owned()]
    } else {
        config.control.clone()
    };
    given.iter().map(|address| address.parse().with_context(|| format!("control: {address:?}"))).collect()
}

/// Works until the drain is over: what a shard hears from control while it leaves decides where its edges go.
async fn until_drained(mut standing: watch::Receiver<ShardState>, work: impl Future<Output = ()>) {
    let drained = async { while standing.changed().await.is_ok() {} };
    tokio::select! {
        biased;
        () = drained => {}
        () = work => {}
    }
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
    // They outlive the request to stop: a drain ends them, one after the other.
    let (accepting, streams, sessions) = (Tasks::new(), Tasks::new(), Tasks::new());
    let (closing, ending) = (CancellationToken::new(), CancellationToken::new());
    let (registry, directory, partings) = (Registry::default(), Directory::default(), Partings::default());
    let (standing_sender, standing) = watch::channel(ShardState::Serving);
    let peers = Peers::new(parts.shard.clone(), parts.peers, Arc::clone(&parts.metrics));
    parts.metrics.goes_by(&parts.state.borrow().ring);
    let router = Router::new(RouterParts {
        shard: parts.shard.clone(),
        registry: registry.clone(),
        state: parts.state.clone(),
        live: parts.live.clone(),
        access: parts.access,
        metrics: Arc::clone(&parts.metrics),
        peers: peers.clone(),
        directory: directory.clone(),
        closing: closing.clone(),
        ending: ending.clone(),
    });
    let mesh = parts.listener.local_addr()?;
    let limits = &config.limits;
    let shares = (UserShares::new(limits.links_per_user), UserShares::new(limits.streams_per_user));
    let reception = Reception {
        shard: parts.shard.clone(),
        registry: registry.clone(),
        router: router.clone(),
        directory: directory.clone(),
        standing: standing.clone(),
        live: parts.live,
        partings: partings.clone(),
        renewals: parts.renewals,
        arrivals: Arc::default(),
        user_links: shares.0.clone(),
        user_streams: shares.1.clone(),
        limits: config.limits,
    };
    let rebalance = Rebalance {
        me: parts.shard.clone(),
        registry: registry.clone(),
        directory: directory.clone(),
        state: parts.state.clone(),
        metrics: Arc::clone(&parts.metrics),
        rate: config.moves_per_sec.max(0.1),
    };
    let mut shard = Shard {
        id: parts.shard.clone(),
        mesh,
        proxy: None,
        http: None,
        https: None,
        ssh: None,
        ssh_host: None,
        dns: None,
        tcp: Vec::new(),
        udp: Vec::new(),
        egress: None,
        admin: None,
        registry: registry.clone(),
        router: router.clone(),
        directory,
        peers: peers.clone(),
        partings,
        standing,
    };
    let metrics = &parts.metrics;
    let doors = Doors { config, router: &router, accepting: &accepting, streams: &streams, metrics, shares };
    doors.open(&mut shard, &parts.identity, &parts.bundle)?;
    sessions.spawn(reception.run(parts.listener.clone(), sessions.clone(), streams.clone()));
    sessions.spawn(peers.run(parts.state.clone(), registry.clone(), sessions.clone()));
    tasks.spawn(tasks.token().run_until_cancelled_owned(rebalance.run()));
    parts.ready.up();
    let drain = Drain {
        me: parts.shard,
        listener: parts.listener,
        registry,
        state: parts.state,
        standing: standing_sender,
        accepting,
        streams,
        sessions,
        closing,
        ending,
        ready: parts.ready,
        metrics: parts.metrics,
        time: Duration::from_secs(config.drain_secs),
        linger: Duration::from_secs(config.linger_secs),
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
    /// Links and streams of users, over all doors that know users.
    shares: (UserShares, UserShares),
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
        if let Some(address) = doors.ssh {
            self.open_ssh(address, shard)?;
        }
        shard.dns = DnsDoor::open(self.config, self.router, self.accepting)?;
        for tcp in &doors.tcp {
            let (router, door) = (self.router.clone(), tcp.clone());
            let visit = move |v| doors::tcp::visit(v, router.clone(), door.clone());
            shard.tcp.push((tcp.name.clone(), self.run(&tcp.name, tcp.listen, visit)?));
        }
        for udp in &doors.udp {
            let port = UdpPort::bind(udp.listen)
                .with_context(|| format!("cannot open the {} door on UDP {}", udp.name, udp.listen))?;
            shard.udp.push((udp.name.clone(), port.local_addr()?));
            let (router, door) = (self.router.clone(), Arc::new(udp.clone()));
            let visit = move |visitor| doors::udp::visit(visitor, router.clone(), Arc::clone(&door));
            let serving = port.run(self.accepting.clone(), self.streams.clone(), udp.flows.max(1), visit);
            self.accepting.spawn(serving);
        }
        let opening = Opening {
            router: self.router,
            identity,
            accepting: self.accepting,
            streams: self.streams,
            metrics: self.metrics,
            connections: self.config.limits.door_connections,
        };
        shard.egress = EgressDoor::open(&doors.egress, &opening)?;
        Ok(())
    }

    fn open_ssh(&self, address: SocketAddr, shard: &mut Shard) -> anyhow::Result<()> {
        let names = host::names(&shard.id, &self.config.names, &self.config.advertise);
        let dir = IdentityDir::open(&self.config.data_dir)?;
        let host = Arc::new(Host::open(dir, names, Arc::clone(self.metrics)).context("the SSH host key")?);
        let door = Arc::new(SshDoor {
            router: self.router.clone(),
            domain: self.config.domain.clone(),
            stopping: self.accepting.token(),
            tasks: self.streams.clone(),
            host: Arc::clone(&host),
            strangers: Arc::new(Semaphore::new(self.config.limits.handshakes)),
            strangers_from: Shares::new(STRANGERS),
            user_links: self.shares.0.clone(),
            user_streams: self.shares.1.clone(),
        });
        shard.ssh = Some(self.run("ssh", address, move |v| Arc::clone(&door).visit(v))?);
        shard.ssh_host = Some(host);
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
