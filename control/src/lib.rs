//! `mesh-control`: certificate authority, enrolment, policy and the list of shards.
//!
//! [`start`] is the whole process put together, for the binary, for `meshctl dev` and for tests. What arrives by the
//! API goes through [`api`] to [`authority`] and [`store`]; what shards follow is made in [`watch`]. Shards and edges
//! go on when all of this is away.

pub mod api;
pub mod authority;
pub mod ca;
pub mod config;
pub mod kube;
pub mod leader;
pub mod membership;
pub mod metrics;
pub mod own;
pub mod presence;
pub mod retention;
pub mod sight;
pub mod store;
pub mod token;
pub mod watch;

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use parking_lot::Mutex;
use prometheus::Registry;
use proto::{
    api::{TokenCreated, TokenRequest},
    join::{CaHash, JoinLine},
    target::HostPort,
};
use runtime::{
    admin::{self, Ready},
    clock::unix_now,
    shutdown::Tasks,
    tls::{LiveIdentity, TrustBundle},
};
use tokio::{net::TcpListener, sync::Notify};

use crate::{
    api::{App, limit::FailureLimit, server::Server},
    authority::{Authority, Parts, SshParts},
    ca::{Ca, roots::Sources, ssh::SshCa},
    config::ControlConfig,
    leader::{Outlets, StoreBoard},
    metrics::Metrics,
    own::Own,
    presence::Presence,
    store::{Store, open},
    watch::Hub,
};

/// The file with the first administrator's join line.
pub const ADMIN_JOIN: &str = "admin.join";
/// The folder with further roots.
pub const ROOTS: &str = "roots.d";
/// The default database.
const DATABASE: &str = "control.db";

/// A control that runs.
#[derive(Debug)]
pub struct Control {
    /// Where the API listens.
    pub api_addr: SocketAddr,
    /// Where `/livez`, `/readyz` and `/metrics` are.
    pub admin_addr: SocketAddr,
    /// Where kube-apiserver gets the metrics of shards, if it does.
    pub metrics_api: Option<SocketAddr>,
    /// The hash of the CA, as join lines carry it.
    pub ca_hash: CaHash,
    /// Whether control can do its work.
    pub ready: Ready,
    /// What it counts.
    pub metrics: Metrics,
    authority: Authority,
    store: Store,
}

impl Control {
    /// Makes a token, as an administrator could by the API.
    ///
    /// # Errors
    /// If the request makes no sense, or the database cannot be written.
    pub async fn create_token(&self, request: &TokenRequest) -> anyhow::Result<TokenCreated> {
        Ok(self.authority.create_token(request, "control").await?)
    }

    /// Makes a join line for the user `admin` of the group `admin`, good once and for an hour.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn admin_join(&self) -> anyhow::Result<JoinLine> {
        let line = self.authority.admin_token().await?.join.context("a token to enrol with has a join line")?;
        Ok(line.reveal().parse()?)
    }

    /// The roots that are trusted now, PEM.
    #[must_use]
    pub fn bundle_pem(&self) -> String {
        self.authority.bundle_pem()
    }

    /// Closes the database. Call it when the tasks have ended.
    pub async fn close(self) {
        self.store.close().await;
    }
}

/// Starts control. It runs until `tasks` stop; then wait for them, and [`Control::close`].
///
/// # Errors
/// If the CA, the database or an address cannot be used. The error names the cause and what to do.
pub async fn start(config: ControlConfig, tasks: Tasks) -> anyhow::Result<Control> {
    let group = tasks.child();
    let started = assemble(config, group.clone()).await;
    if started.is_err() {
        // What had begun must not go on behind an error.
        group.stop();
    }
    started
}

async fn assemble(config: ControlConfig, tasks: Tasks) -> anyhow::Result<Control> {
    config.check()?;
    let Ground { ca, ssh, sources, store, metrics, registry, fresh } = ground(&config).await?;
    let ca_hash = ca.hash();
    let bundle = sources.bundle(ca.certificate())?;
    let ready = Ready::new();
    let cluster = match config.kubernetes.enabled {
        true => Some(kube::client(&config.kubernetes).await?),
        false => None,
    };
    let presence = Arc::new(Presence::default());
    let (store_ready, api_ready) = (ready.part("store"), ready.part("api"));
    let hub = Hub::start(store.clone(), Arc::clone(&presence), &bundle, metrics.clone(), (store_ready, &tasks)).await?;
    let sight = hub.sight().clone();
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
    let api_addr = listener.local_addr()?;
    let own = Own::new(&config, api_addr)?;
    let identity = LiveIdentity::new(&own.issue(&ca, unix_now())?)?;
    let authority = Authority::new(Parts {
        ca,
        bundle: bundle.clone(),
        store: store.clone(),
        hub: hub.clone(),
        metrics: metrics.clone(),
        ttl: config.leaf_ttl_secs,
        reserved: config.certified_names()?,
        public: public_address(&config, api_addr)?,
        reviewer: cluster.as_ref().and_then(|client| kube::reviewer(&config.kubernetes, client)),
        ssh: SshParts { ca: ssh, user_ttl: Duration::from_secs(config.ssh_certificate_secs) },
    });
    hub.set_ssh_authorities(authority.ssh_authorities().user);
    let stir = Arc::new(Notify::new());
    let app = Arc::new(App {
        authority: authority.clone(),
        store: store.clone(),
        hub: hub.clone(),
        presence: Arc::clone(&presence),
        stir: Arc::clone(&stir),
        metrics: metrics.clone(),
        failures: FailureLimit::default(),
        tasks: tasks.clone(),
        keeps_access: config.audit.keep_days > 0 && config.audit.keep_records > 0,
        kept: Mutex::default(),
    });
    let server = Server::new(listener, &identity, bundle.clone(), api::router(&app), metrics.clone())?;
    if fresh {
        write_admin_join(&authority, &config.data_dir).await?;
    }
    tasks.spawn(own::renew(own, authority.clone(), identity.clone(), metrics.clone(), tasks.clone()));
    tasks.spawn(own::follow_roots(sources, authority.clone(), bundle, hub.clone(), tasks.clone()));
    tasks.spawn(hub.clone().keep_house(tasks.clone()));
    tasks.spawn(retention::run(store.clone(), config.audit, tasks.clone()));
    let mut metrics_api = None;
    if let Some(client) = cluster {
        let of = (&presence, &identity);
        metrics_api = kube::serve_metrics(&config.kubernetes, &client, of, &ready, &tasks).await?;
        kube::start(&config.kubernetes, client, (&hub, &store), (&metrics, &ready), &tasks).await?;
    }
    // Replicas may be configured alike, and one that starts again is another one.
    let me = format!("{}-{:08x}", config.name, rand::random::<u32>());
    let outlets = Outlets { hub, metrics: metrics.clone(), ready: ready.part("ring") };
    tasks.spawn(leader::keep_sight(sight.clone(), metrics.clone(), ready.part("watch"), tasks.clone()));
    tasks.spawn(leader::run(me, StoreBoard::new(store.for_followers(), presence, sight), outlets, stir, tasks.clone()));
    let admin_addr = admin::serve(config.admin, registry, ready.clone(), &tasks)
        .await
        .with_context(|| format!("cannot listen on {} (admin)", config.admin))?;
    api_ready.up();
    let group = tasks.clone();
    tasks.spawn(async move {
        server.run(group).await;
        api_ready.down("stopping");
    });
    tracing::info!(%api_addr, %admin_addr, ca = %ca_hash, mesh = %config.trust_domain, "control is up");
    Ok(Control { api_addr, admin_addr, metrics_api, ca_hash, ready, metrics, authority, store })
}

/// What stands before anything listens.
struct Ground {
    ca: Ca,
    ssh: Option<SshCa>,
    sources: Sources,
    store: Store,
    metrics: Metrics,
    registry: Registry,
    /// Whether the database was nobody's before.
    fresh: bool,
}

async fn ground(config: &ControlConfig) -> anyhow::Result<Ground> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.data_dir)
        .with_context(|| format!("cannot make the folder {} (data_dir)", config.data_dir.display()))?;
    let (ca, ssh) = open_ca(config)?;
    let sources = Sources { folder: config.data_dir.join(ROOTS), files: config.ca.extra_roots.clone() };
    let roots = sources.read(ca.certificate())?;
    let hashes = roots.iter().map(|r| runtime::cert::ca_hash(r)).collect::<Result<Vec<_>, _>>()?;
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    metrics.ca_not_after.set(ca.not_after());
    let store = open_store(config, &metrics).await?;
    let fresh = store.claim(&config.trust_domain, ca.hash(), &hashes).await?;
    Ok(Ground { ca, ssh, sources, store, metrics, registry, fresh })
}

fn open_ca(config: &ControlConfig) -> anyhow::Result<(Ca, Option<SshCa>)> {
    let (cert, key, make) = config.ca_files();
    let (ca, made) = ca::files::open(&cert, &key, make, &config.trust_domain, unix_now())?;
    if made {
        tracing::info!(path = %cert.display(), hash = %ca.hash(), "made a new CA; back up its key, the whole mesh hangs on it");
    }
    let ssh = SshCa::open(key.parent().unwrap_or_else(|| Path::new(".")), make)?;
    Ok((ca, ssh))
}

async fn open_store(config: &ControlConfig, metrics: &Metrics) -> anyhow::Result<Store> {
    let url = match &config.database {
        Some(url) => url.clone(),
        None => {
            let path = config.data_dir.join(DATABASE);
            open::sqlite_url(&path).with_context(|| format!("cannot make the database {}", path.display()))?
        }
    };
    Store::open(&url, metrics.store_errors.clone()).await.context("cannot open the database")
}

/// Where join lines lead.
fn public_address(config: &ControlConfig, api: SocketAddr) -> anyhow::Result<HostPort> {
    if let Some(public) = config.public_addresses()?.into_iter().next() {
        return Ok(public);
    }
    let host = match config.names.first() {
        Some(name) => name.clone(),
        None if !api.ip().is_unspecified() => api.ip().to_string(),
        None => {
            tracing::warn!(
                "neither public nor names is set, so join lines lead to localhost; set public = [\"host:port\"]"
            );
            "localhost".to_owned()
        }
    };
    HostPort::new(&host, api.port())
        .context("join lines need an address that others reach, such as public = [\"control.example.org:7443\"]")
}

async fn write_admin_join(authority: &Authority, data_dir: &Path) -> anyhow::Result<PathBuf> {
    let created = authority.admin_token().await?;
    let line = created.join.context("a token to enrol with has a join line")?;
    let path = data_dir.join(ADMIN_JOIN);
    runtime::identity::write_atomically(&path, format!("{}\n", line.reveal()).as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))?;
    tracing::info!(
        path = %path.display(),
        "the join line of the first administrator lies here; it is good once and for an hour: meshctl login --join-file"
    );
    Ok(path)
}

/// Makes a new join line for an administrator, in the file where the first start left one. A control that runs on the
/// same database need not be stopped. Returns the file.
///
/// # Errors
/// If the CA or the database cannot be used.
pub async fn renew_admin_join(config: &ControlConfig) -> anyhow::Result<PathBuf> {
    let Ground { ca, sources, store, metrics, .. } = ground(config).await?;
    let tasks = Tasks::new();
    let bundle: TrustBundle = sources.bundle(ca.certificate())?;
    let ready = Ready::new();
    let presence = Arc::new(Presence::default());
    let part = ready.part("store");
    let hub = Hub::start(store.clone(), presence, &bundle, metrics.clone(), (part, &tasks)).await?;
    let authority = Authority::new(Parts {
        ca,
        bundle,
        store: store.clone(),
        hub,
        metrics,
        ttl: config.leaf_ttl_secs,
        reserved: vec![],
        public: public_address(config, config.listen)?,
        reviewer: None,
        ssh: SshParts { ca: None, user_ttl: Duration::ZERO },
    });
    let path = write_admin_join(&authority, &config.data_dir).await;
    tasks.drained(store::DEADLINE).await;
    store.close().await;
    path
}

/// The hash of the CA that the first start made, or that was given.
///
/// # Errors
/// If the CA cannot be used.
pub fn ca_hash(config: &ControlConfig) -> anyhow::Result<CaHash> {
    let (cert, ..) = config.ca_files();
    let pem = fs::read_to_string(&cert)
        .with_context(|| format!("cannot read the CA {}; the first start of mesh-control makes it", cert.display()))?;
    let root = runtime::identity::certificates(&pem)?.swap_remove(0);
    Ok(runtime::cert::ca_hash(&root)?)
}
