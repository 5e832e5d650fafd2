//! A whole mesh in this process: the real control, shards and edges, with identities by real enrolment.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use control::{Control, config::ControlConfig};
use mesh_cloud::{
    Shard,
    config::{DoorsConfig, ShardConfig},
};
use mesh_edge::config::{EdgeConfig, ServiceConfig};
use proto::{
    api::{ADMIN_GROUP, EdgeView, TokenKind, TokenRequest},
    id::EdgeId,
    join::JoinLine,
    message::ServiceKind,
    policy::Rule,
    ring::RingSpec,
    secret::Secret,
    target::HostPort,
};
use runtime::{access::AccessLog, identity::IdentityDir, shutdown::Tasks};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::service;
use crate::{
    session::{self, Session},
    text,
};

/// How long each step of the start may take.
const STEP: Duration = Duration::from_secs(20);
/// How often to look whether a step is done.
const LOOK: Duration = Duration::from_millis(20);
/// How long streams may go on after Ctrl-C, in seconds.
const DRAIN: u64 = 2;
/// How long tokens are good, in seconds.
const TOKEN_LIFE: u32 = 3600;
/// How long the access token of the proxy door is good, in seconds.
const ACCESS_LIFE: u32 = 7 * 24 * 3600;

/// What to start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) shards: u16,
    pub(super) edges: u16,
    /// Any free port everywhere, instead of the usual ones where they are free.
    pub(super) free_ports: bool,
}

/// Where everything is.
#[derive(Debug, Serialize)]
pub(super) struct Addresses {
    /// The home of a meshctl that is logged in as administrator.
    pub(super) home: PathBuf,
    pub(super) control: SocketAddr,
    pub(super) control_admin: SocketAddr,
    pub(super) shards: Vec<ShardAddresses>,
    pub(super) edges: Vec<EdgeAddresses>,
    /// Configuration for `curl -K`, with proxy and password.
    pub(super) curl: PathBuf,
    /// Access records of all shards.
    pub(super) access_log: PathBuf,
    /// The domain of the HTTP doors.
    pub(super) domain: String,
}

/// Where a shard is.
#[derive(Debug, Serialize)]
pub(super) struct ShardAddresses {
    pub(super) name: String,
    pub(super) mesh: SocketAddr,
    pub(super) proxy: Option<SocketAddr>,
    pub(super) http: Option<SocketAddr>,
    pub(super) https: Option<SocketAddr>,
    pub(super) admin: Option<SocketAddr>,
}

/// Where an edge and its services are.
#[derive(Debug, Serialize)]
pub(super) struct EdgeAddresses {
    pub(super) name: EdgeId,
    pub(super) web: SocketAddr,
    pub(super) echo: SocketAddr,
    pub(super) admin: Option<SocketAddr>,
}

/// A mesh that runs until its tasks stop.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) addresses: Addresses,
    control: Control,
}

impl Mesh {
    /// Starts everything below a folder, and returns when everything can be reached.
    ///
    /// # Errors
    /// If a part does not start, or is not reached in time.
    pub(super) async fn start(plan: Plan, folder: &Path, tasks: &Tasks, say: &impl Fn(&str)) -> anyhow::Result<Self> {
        let control = start_control(plan, folder, tasks).await?;
        say(&format!("control at {}", control.api_addr));
        let access_log = folder.join("access.log");
        let mut shards = Vec::new();
        for number in 1..=plan.shards {
            shards.push(start_shard(plan, number, &control, folder, tasks).await?);
        }
        let home = folder.join("home");
        session::enrol(&home, &control.admin_join().await?).await?;
        let session = Session::open(&home).await?;
        until("the shards share the ring", async || ring_is_known(&session, &shards).await).await?;
        say(&format!("{} in the ring", text::counted(plan.shards.into(), "shard")));
        for rule in rules()? {
            session.api().put::<serde_json::Value>(&format!("/v1/policy/{}", rule.name), &rule).await?;
        }
        let mut edges = Vec::new();
        for number in 1..=plan.edges {
            edges.push(start_edge(number, &control, folder, tasks).await?);
        }
        until("the edges connect", async || edges.iter().all(|edge| serves(&shards, &edge.name))).await?;
        say(&format!("{} connected", text::counted(plan.edges.into(), "edge")));
        until("control hears of the edges", async || all_online(&session).await).await?;
        let curl = folder.join("proxy.curl");
        if let Some(proxy) = shards.first().and_then(|s| s.proxy) {
            write_curl(&control, &curl, proxy).await?;
        }
        let addresses = Addresses {
            home,
            control: control.api_addr,
            control_admin: control.admin_addr,
            domain: ShardConfig::default().domain,
            shards: shards.iter().map(shard_addresses).collect(),
            edges,
            curl,
            access_log,
        };
        Ok(Self { addresses, control })
    }

    /// Waits for the end of everything.
    pub(super) async fn stop(self, tasks: &Tasks) -> usize {
        let left = tasks.drained(Duration::from_secs(DRAIN + 5)).await;
        self.control.close().await;
        left
    }
}

async fn until(what: &str, done: impl AsyncFn() -> bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    let wait = async {
        while !done().await {
            sleep(LOOK).await;
        }
    };
    timeout(STEP, wait).await.with_context(|| format!("{what}: not within {} s", STEP.as_secs()))?;
    tracing::info!(took = ?begun.elapsed(), "{what}");
    Ok(())
}

/// Whether all shards are in the ring, and all know it, so that every edge goes home at once.
async fn ring_is_known(session: &Session, shards: &[Shard]) -> bool {
    let ring: Result<RingSpec, _> = session.api().get("/v1/ring").await;
    ring.is_ok_and(|ring| {
        let known = |shard: &Shard| shard.router.state().ring.epoch() == ring.epoch;
        ring.members.len() == shards.len() && shards.iter().all(known)
    })
}

/// Whether an edge is there with its services, and the shard that has it knows the rules.
fn serves(shards: &[Shard], edge: &EdgeId) -> bool {
    shards.iter().any(|shard| {
        let here = shard.registry.find(edge).is_some_and(|handle| !handle.services().is_empty());
        here && !shard.router.state().policy.rules.is_empty()
    })
}

/// Whether control has heard from the shards of every edge.
async fn all_online(session: &Session) -> bool {
    let edges: Result<Vec<EdgeView>, _> = session.api().get("/v1/edges").await;
    edges.is_ok_and(|edges| edges.iter().all(|e| e.presence.as_ref().is_some_and(|p| !p.services.is_empty())))
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

impl Plan {
    /// The usual port if it is free and wanted, else any.
    fn tcp(self, usual: u16) -> SocketAddr {
        let free = !self.free_ports && TcpListener::bind(loopback(usual)).is_ok();
        loopback(if free { usual } else { 0 })
    }

    fn udp(self, usual: u16) -> SocketAddr {
        let free = !self.free_ports && UdpSocket::bind(loopback(usual)).is_ok();
        loopback(if free { usual } else { 0 })
    }
}

async fn start_control(plan: Plan, folder: &Path, tasks: &Tasks) -> anyhow::Result<Control> {
    let config = ControlConfig {
        listen: plan.tcp(7443),
        admin: plan.tcp(7444),
        data_dir: folder.join("control"),
        ..ControlConfig::default()
    };
    control::start(config, tasks.child()).await.context("control did not start")
}

async fn token(
    control: &Control,
    kind: TokenKind,
    name: &str,
    ttl_secs: u32,
) -> anyhow::Result<(Secret, Option<Secret>)> {
    let groups = if kind == TokenKind::Access { vec![ADMIN_GROUP.parse()?] } else { vec![] };
    let name = Some(name.parse()?);
    let request = TokenRequest { kind, name, uses: 1, ttl_secs, groups, site: None, replace: false };
    let created = control.create_token(&request).await?;
    Ok((created.token, created.join))
}

async fn join_line(control: &Control, kind: TokenKind, name: &str) -> anyhow::Result<JoinLine> {
    let (_, join) = token(control, kind, name, TOKEN_LIFE).await?;
    Ok(join.context("a token to enrol with has a join line")?.reveal().parse()?)
}

async fn start_shard(
    plan: Plan,
    number: u16,
    control: &Control,
    folder: &Path,
    tasks: &Tasks,
) -> anyhow::Result<Shard> {
    let name = format!("shard-{number}");
    // The first shard has the usual ports.
    let plan = Plan { free_ports: plan.free_ports || number > 1, ..plan };
    let config = ShardConfig {
        data_dir: folder.join(&name),
        name: Some(name.parse()?),
        listen: plan.udp(7400),
        doors: DoorsConfig {
            proxy: Some(plan.tcp(7480)),
            http: Some(plan.tcp(7481)),
            https: Some(plan.tcp(7482)),
            ..DoorsConfig::default()
        },
        admin: Some(plan.tcp(7484)),
        access: AccessLog::File(folder.join("access.log")),
        drain_secs: DRAIN,
        ..ShardConfig::default()
    };
    let join = join_line(control, TokenKind::Shard, &name).await?;
    mesh_cloud::enrol::join(&config, &join).await?;
    mesh_cloud::start(config, tasks.child()).await.with_context(|| format!("{name} did not start"))
}

fn shard_addresses(shard: &Shard) -> ShardAddresses {
    ShardAddresses {
        name: shard.id.to_string(),
        mesh: shard.mesh,
        proxy: shard.proxy,
        http: shard.http,
        https: shard.https,
        admin: shard.admin,
    }
}

async fn start_edge(number: u16, control: &Control, folder: &Path, tasks: &Tasks) -> anyhow::Result<EdgeAddresses> {
    let name: EdgeId = format!("edge-{number}").parse()?;
    let web = service::web(name.clone(), tasks).await?;
    let echo = service::echo(tasks).await?;
    let service = |name: &str, kind, address: SocketAddr| -> anyhow::Result<ServiceConfig> {
        let address = HostPort::new(&address.ip().to_string(), address.port())?;
        Ok(ServiceConfig { name: name.parse()?, kind, address, labels: Default::default() })
    };
    let config = EdgeConfig {
        data_dir: folder.join(name.as_str()),
        admin: loopback(0),
        access: AccessLog::Off,
        services: vec![service("web", ServiceKind::Http, web)?, service("echo", ServiceKind::Tcp, echo)?],
        // The edge is this machine, and its user is the one who tries things.
        allow: vec!["127.0.0.1:*".parse()?, "[::1]:*".parse()?],
        drain: Duration::from_secs(DRAIN),
        ..EdgeConfig::default()
    };
    let join = join_line(control, TokenKind::Edge, name.as_str()).await?;
    mesh_edge::enrol::join(&IdentityDir::open(&config.data_dir)?, &join, None, false).await?;
    let edge = mesh_edge::start(config, tasks.child()).await.with_context(|| format!("{name} did not start"))?;
    Ok(EdgeAddresses { name, web, echo, admin: edge.admin() })
}

/// Administrators reach everything, and everybody the announced services through the HTTP and HTTPS doors.
fn rules() -> anyhow::Result<Vec<Rule>> {
    Ok(vec![
        Rule {
            name: "admins".into(),
            from: vec![format!("group/{ADMIN_GROUP}").parse()?],
            to: vec!["edge/*".parse()?],
            ports: vec!["*".parse()?],
        },
        Rule {
            name: "doors".into(),
            from: vec!["door/http".parse()?, "door/https".parse()?],
            to: vec!["service/*".parse()?],
            ports: vec![],
        },
    ])
}

/// A password must not stand in curl's arguments, where everybody on the machine sees it.
async fn write_curl(control: &Control, path: &Path, proxy: SocketAddr) -> anyhow::Result<()> {
    let (secret, _) = token(control, TokenKind::Access, "admin", ACCESS_LIFE).await?;
    let config = format!("proxy = \"http://{proxy}\"\nproxy-user = \"admin:{}\"\n", secret.reveal());
    runtime::identity::write_atomically(path, config.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}
