//! Many edges in one process, to see what tunnels cost a shard, and to be the edges of a fleet.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Args;
use mesh_edge::{
    Edge, EdgeParts,
    config::EdgeConfig,
    enrol::{self, EnrolError},
    life::Phase,
};
use prometheus::Registry;
use proto::{
    api::{EnrolRequest, Enrolled},
    id::EdgeId,
    join::JoinLine,
};
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::{AccessLog, AccessWriter},
    api::ApiClient,
    identity::{Credentials, IdentityDir, NodeKey, certificates},
    link::quic::Dialer,
    shutdown::{self, Tasks},
    telemetry::{self, LogConfig},
    tls::{LiveIdentity, TrustBundle},
};
use tokio::{
    io::AsyncReadExt,
    sync::{Semaphore, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::say;

/// How often it is looked whether edges came or went.
const LOOK: Duration = Duration::from_millis(100);

/// How many, and where from.
#[derive(Debug, Args)]
pub(crate) struct EdgesArgs {
    /// A file with the join line of a token that is good for all of them; else CAUSEWAY_JOIN, else standard input
    #[arg(long, value_name = "FILE")]
    join: Option<PathBuf>,
    /// How many
    #[arg(long, default_value_t = 500)]
    count: usize,
    /// Number of the first one
    #[arg(long, default_value_t = 0)]
    first: usize,
    /// A file with the names of those to run, a line each, instead of a prefix and numbers
    #[arg(long, value_name = "FILE", conflicts_with_all = ["count", "first", "prefix"])]
    names: Option<PathBuf>,
    /// Where they keep their identities; in memory if it is not given
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// What their names begin with
    #[arg(long, default_value = "many")]
    prefix: String,
    /// How many enrol at once
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1000))]
    at_once: u16,
    /// Goes on to print `up=NAME` when an edge has a new tunnel, and `connected=N` when edges came or went; ends with
    /// standard input too
    #[arg(long)]
    follow: bool,
    /// What to log, to standard error
    #[arg(long, value_name = "LEVEL", env = "CAUSEWAY_EDGES_LOG", default_value = "warn")]
    log: String,
    /// Prints one JSON object instead of words
    #[arg(long)]
    json: bool,
}

impl EdgesArgs {
    fn names(&self) -> anyhow::Result<Vec<EdgeId>> {
        let Some(file) = &self.names else {
            let numbers = self.first..self.first + self.count;
            return Ok(numbers.map(|number| format!("{}-{number}", self.prefix).parse()).collect::<Result<_, _>>()?);
        };
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
    }
}

/// Enrols and runs them; prints `connected=N` when all of them are, and ends with a signal.
pub(crate) async fn run(args: EdgesArgs) -> anyhow::Result<()> {
    telemetry::init(&LogConfig { level: args.log.clone(), ..LogConfig::default() })?;
    let line = Arc::new(enrol::read_line(args.join.as_deref())?);
    let begun = Instant::now();
    let tasks = Tasks::new();
    let names = args.names()?;
    let (permits, mut starting) = (Arc::new(Semaphore::new(args.at_once.into())), Vec::with_capacity(names.len()));
    for name in names {
        let dir = args.dir.as_ref().map(|dir| dir.join(name.as_str()));
        let (permits, line, inner) = (Arc::clone(&permits), Arc::clone(&line), tasks.clone());
        starting.push(tasks.spawn(async move {
            let _permit = permits.acquire().await?;
            let started = match dir {
                Some(dir) => on_disk(&line, name.clone(), dir, inner).await,
                None => in_memory(&line, name.clone(), inner).await,
            };
            started.with_context(|| name.to_string())
        }));
    }
    let mut edges = Vec::with_capacity(args.count);
    for edge in starting {
        edges.push(edge.await??);
    }
    for edge in &edges {
        let mut phase = edge.phase();
        phase.wait_for(|phase| matches!(phase, Phase::Connected { .. })).await.context("an edge ended")?;
    }
    let (connected, seconds) = (edges.len(), begun.elapsed().as_secs_f64());
    if args.json {
        say(serde_json::json!({"connected": connected, "seconds": seconds}))?;
    } else {
        say(format_args!("connected={connected} seconds={seconds:.1}"))?;
    }
    if args.follow {
        tokio::select! {
            biased;
            signal = shutdown::signal() => drop(signal?),
            followed = follow(&edges) => followed?,
        }
    } else {
        shutdown::signal().await?;
    }
    tasks.drained(Duration::from_secs(5)).await;
    Ok(())
}

/// Tells how many are connected, until nobody listens any more.
async fn follow(edges: &[Edge]) -> anyhow::Result<()> {
    let phases: Vec<_> = edges.iter().map(Edge::phase).collect();
    let since = |phase: &watch::Receiver<Phase>| match &*phase.borrow() {
        Phase::Connected { since, .. } => Some(*since),
        Phase::Starting | Phase::Dialing { .. } | Phase::Waiting { .. } | Phase::Refused { .. } | Phase::Stopped => {
            None
        }
    };
    let mut known: Vec<_> = phases.iter().map(since).collect();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut input, mut byte, mut before) = (tokio::io::stdin(), [0], phases.len());
    loop {
        tokio::select! {
            biased;
            read = input.read(&mut byte) => if read? == 0 { return Ok(()) },
            _ = look.tick() => {
                let mut now = 0;
                for ((edge, phase), known) in edges.iter().zip(&phases).zip(&mut known) {
                    let since = since(phase);
                    now += usize::from(since.is_some());
                    if since.is_some() && since != *known {
                        say(format_args!("up={}", edge.name()))?;
                    }
                    *known = since;
                }
                if now != before {
                    say(format_args!("connected={now}"))?;
                    before = now;
                }
            }
        }
    }
}

/// An edge as it is on a machine of its own.
async fn on_disk(line: &JoinLine, name: EdgeId, data_dir: PathBuf, tasks: Tasks) -> anyhow::Result<Edge> {
    let config = EdgeConfig {
        data_dir,
        admin: SocketAddr::from(([127, 0, 0, 1], 0)),
        access: AccessLog::Off,
        drain: Duration::from_secs(1),
        ..EdgeConfig::default()
    };
    let dir = IdentityDir::open(&config.data_dir)?;
    match enrol::join(&dir, line, Some(name), false).await {
        Ok(_) | Err(EnrolError::Already { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    mesh_edge::start(config, tasks).await
}

/// An edge that forgets all when the process ends, and has no admin page.
async fn in_memory(line: &JoinLine, name: EdgeId, tasks: Tasks) -> anyhow::Result<Edge> {
    let key = NodeKey::generate()?;
    let request = EnrolRequest { token: line.token.clone(), name: Some(name), csr: key.csr_pem(&[])? };
    let enrolled: Enrolled = ApiClient::enrol(line, &request).await?;
    let credentials = Credentials::new(key, certificates(&enrolled.chain)?)?;
    let bundle = TrustBundle::from_pem(&enrolled.bundle)?;
    let identity = LiveIdentity::new(&credentials)?;
    let config = EdgeConfig {
        shards: enrolled.shards.into_iter().flat_map(|shard| shard.addresses).collect(),
        access: AccessLog::Off,
        drain: Duration::from_secs(1),
        ..EdgeConfig::default()
    };
    let limits = config.link_limits();
    let dialer = Dialer::new(mesh_edge::client_config(&identity, &bundle, &limits)?, &limits);
    let access = AccessWriter::start(&config.access, &tasks)?;
    let (registry, rng) = (Registry::new(), StdRng::from_rng(&mut rand::rng()));
    let parts =
        EdgeParts { config, credentials, identity, bundle, ways: dialer.into(), access, registry, rng, store: None };
    mesh_edge::start_with(parts, tasks)
}
