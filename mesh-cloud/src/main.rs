//! `mesh-cloud`: one shard.

use std::{io::Read, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use mesh_cloud::{config::ShardConfig, enrol};
use proto::join::JoinLine;
use runtime::{config, shutdown, shutdown::Tasks, telemetry};

/// A shard of the mesh: accepts the tunnels of edges and opens doors to them.
#[derive(Debug, Parser)]
#[command(name = "mesh-cloud", version, after_help = EXAMPLES)]
struct Args {
    /// Configuration file (TOML); every key is optional.
    #[arg(long, short, env = "CAUSEWAY_SHARD_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Sets one key over the file, such as `--set doors.http=127.0.0.1:8080`. Can be given again.
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    sets: Vec<String>,
    /// Reads the configuration, says whether it is right, and ends.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  mesh-cloud join < line.txt          enrol this shard with a line from 'meshctl token create --shard'
  mesh-cloud --config shard.toml      run it
  mesh-cloud --check-config --config shard.toml";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the shard. If it is not enrolled and CAUSEWAY_JOIN holds a join line, or the configuration has [enrol], it
    /// enrols first.
    Run,
    /// Enrol this shard. The join line is a secret, so it is read from a file, CAUSEWAY_JOIN or standard input.
    Join {
        /// File that holds the join line.
        #[arg(long)]
        file: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match command() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-cloud: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> anyhow::Result<()> {
    let args = Args::parse();
    let config: ShardConfig = config::load(args.config.as_deref(), &args.sets)?;
    if args.check_config {
        eprintln!("the configuration is right");
        return Ok(());
    }
    telemetry::init(&config.log)?;
    shutdown::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match args.command.unwrap_or(Command::Run) {
            Command::Join { file } => enrol::join(&config, &join_line(file)?).await,
            Command::Run => run(config).await,
        }
    })
}

async fn run(config: ShardConfig) -> anyhow::Result<()> {
    if !config.data_dir.join("identity.pem").exists() {
        if let Ok(line) = std::env::var("CAUSEWAY_JOIN") {
            enrol::join(&config, &line.parse()?).await?;
        } else if let Some(by) = &config.enrol {
            enrol::join_pod(&config, by).await?;
        }
    }
    let patience = Duration::from_secs(config.drain_secs) + Duration::from_secs(10);
    let tasks = Tasks::new();
    let shard = mesh_cloud::start(config, tasks.clone()).await?;
    tracing::info!(shard = %shard.id, mesh = %shard.mesh, "serving");
    let signal = shutdown::signal().await?;
    tracing::info!(signal, "shutting down");
    // It holds the router, and with it the way to the access log, whose writer ends with the last who could write.
    drop(shard);
    match tasks.drained(patience).await {
        0 => Ok(()),
        left => anyhow::bail!("{left} tasks did not end in time"),
    }
}

fn join_line(file: Option<PathBuf>) -> anyhow::Result<JoinLine> {
    let text = match (file, std::env::var("CAUSEWAY_JOIN")) {
        (Some(file), _) => std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?,
        (None, Ok(line)) => line,
        (None, Err(_)) => {
            let mut text = String::new();
            std::io::stdin().take(4096).read_to_string(&mut text)?;
            text
        }
    };
    Ok(text.parse()?)
}
