//! Many edges in one process, to see what tunnels cost a shard.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use mesh_edge::{
    config::EdgeConfig,
    enrol::{self, EnrolError},
    life::Phase,
};
use runtime::{
    access::AccessLog,
    identity::IdentityDir,
    shutdown::{self, Tasks},
};
use tokio::time::Instant;

use crate::say;

/// How many, and where from.
#[derive(Debug, Args)]
pub(crate) struct EdgesArgs {
    /// A file with the join line of a token that is good for all of them; else CAUSEWAY_JOIN, else standard input
    #[arg(long, value_name = "FILE")]
    join: Option<PathBuf>,
    /// How many
    #[arg(long, default_value_t = 500)]
    count: usize,
    /// Where they keep their identities
    #[arg(long, value_name = "FOLDER")]
    dir: PathBuf,
    /// What their names begin with
    #[arg(long, default_value = "many")]
    prefix: String,
    /// Prints one JSON object instead of words
    #[arg(long)]
    json: bool,
}

/// Enrols and runs them; prints `connected=N` when all of them are, and ends with a signal.
pub(crate) async fn run(args: EdgesArgs) -> anyhow::Result<()> {
    let line = enrol::read_line(args.join.as_deref())?;
    let begun = Instant::now();
    let tasks = Tasks::new();
    let mut edges = Vec::with_capacity(args.count);
    for number in 0..args.count {
        let name = format!("{}-{number}", args.prefix);
        let config = EdgeConfig {
            data_dir: args.dir.join(&name),
            admin: SocketAddr::from(([127, 0, 0, 1], 0)),
            access: AccessLog::Off,
            drain: Duration::from_secs(1),
            ..EdgeConfig::default()
        };
        let dir = IdentityDir::open(&config.data_dir)?;
        match enrol::join(&dir, &line, Some(name.parse()?), false).await {
            Ok(_) | Err(EnrolError::Already { .. }) => {}
            Err(e) => return Err(e).context(name),
        }
        edges.push(mesh_edge::start(config, tasks.clone()).await.with_context(|| name.clone())?);
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
    shutdown::signal().await?;
    tasks.drained(Duration::from_secs(5)).await;
    Ok(())
}
