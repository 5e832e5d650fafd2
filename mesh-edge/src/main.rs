//! `mesh-edge`: the process on a machine outside the cloud.

use std::{io::Write, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use mesh_edge::{config::EdgeConfig, dice::Dice, enrol, netcheck::Netcheck, status::Status};
use proto::id::EdgeId;
use rand::SeedableRng;
use runtime::{identity::IdentityDir, shutdown::Tasks, telemetry};

/// The status of a process that found somebody away.
const AWAY: u8 = 4;

/// Connects this machine to the mesh: dials out once, and serves what comes through.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the edge (the default). With a join line in CAUSEWAY_JOIN and no identity yet, it enrols first.
    Run(Common),
    /// Enrols this machine. The join line is read from --file, CAUSEWAY_JOIN or standard input.
    Join(Join),
    /// Tells what the network between this machine and the mesh lets through: names, UDP, TCP, the proxy, sizes, clocks.
    ///
    /// Exit status: 0 all is well, 1 a shard can be reached and something is not well, 3 none can for want of trust, 4
    /// none can.
    Netcheck(Look),
    /// Tells in a sentence how the edge on this machine stands, and what to do if it reaches nobody.
    ///
    /// Exit status: 0 it is connected, 4 it is not, or does not run.
    Status(Look),
}

#[derive(Debug, Args)]
struct Common {
    /// The configuration, in TOML; without it every key has its default.
    #[arg(long, env = "CAUSEWAY_EDGE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides a key of the configuration, such as --set log.level=debug. Can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The name to enrol under; the join line's, or this machine's host name, by default.
    #[arg(long, env = enrol::NAME_VARIABLE)]
    name: Option<EdgeId>,
    /// Reads and checks the configuration, and does nothing else.
    #[arg(long)]
    check_config: bool,
}

#[derive(Debug, Args)]
struct Join {
    #[command(flatten)]
    common: Common,
    /// A file with the join line.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Replaces the identity that this machine has.
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
struct Look {
    #[command(flatten)]
    common: Common,
    /// One JSON document for programs.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match command() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("mesh-edge: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> anyhow::Result<ExitCode> {
    // Before the arguments are parsed, which would repeat the secret in an error.
    if std::env::args_os().any(|arg| arg.to_string_lossy().contains("causeway://")) {
        bail!(
            "a join line is a secret, and every user of this machine can read the arguments of a process: give it on \
             standard input, with --file, or in CAUSEWAY_JOIN. This one may have been seen: delete it with 'meshctl token rm'"
        );
    }
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match cli.command {
        Some(Command::Join(join)) => runtime.block_on(self::join(join))?,
        Some(Command::Run(common)) => runtime.block_on(run(common))?,
        Some(Command::Netcheck(look)) => return runtime.block_on(netcheck(look)),
        Some(Command::Status(look)) => return runtime.block_on(status(look)),
        None => runtime.block_on(run(cli.run))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes to standard output; nobody who reads no further needs to be told.
fn say(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

async fn netcheck(look: Look) -> anyhow::Result<ExitCode> {
    let config = settle(&look.common)?;
    let report = Netcheck::of_edge(&config).await?.run().await;
    if look.json {
        say(&format!("{}\n", serde_json::to_string_pretty(&report)?));
    } else {
        say(&report.text());
    }
    Ok(report.status().into())
}

async fn status(look: Look) -> anyhow::Result<ExitCode> {
    let config = settle(&look.common)?;
    let status = Status::ask(config.admin).await;
    let code = if status.as_ref().is_ok_and(|status| status.told().connected) { 0 } else { AWAY };
    match (status, look.json) {
        (Ok(status), true) => say(&format!("{}\n", serde_json::to_string_pretty(&status)?)),
        (Ok(status), false) => say(&status.text()),
        (Err(error), _) => eprintln!("mesh-edge: {error}"),
    }
    Ok(code.into())
}

fn settle(common: &Common) -> anyhow::Result<EdgeConfig> {
    let config: EdgeConfig = runtime::config::load(common.config.as_deref(), &common.set)?;
    config.check()?;
    Ok(config)
}

fn load(common: &Common) -> anyhow::Result<EdgeConfig> {
    let config = settle(common)?;
    telemetry::init(&config.log)?;
    Ok(config)
}

async fn join(join: Join) -> anyhow::Result<()> {
    let config = load(&join.common)?;
    let dir = IdentityDir::open(&config.data_dir)?;
    let line = enrol::read_line(join.file.as_deref())?;
    enrol::join(&dir, &line, join.common.name, join.replace).await?;
    Ok(())
}

async fn run(common: Common) -> anyhow::Result<()> {
    let config = load(&common)?;
    if common.check_config {
        return Ok(());
    }
    runtime::shutdown::raise_descriptor_limit();
    let (tasks, drain) = (Tasks::new(), config.drain);
    let whole = async {
        let dir = IdentityDir::open(&config.data_dir)?;
        if let (None, Some(line)) = (dir.load()?, enrol::line_from_environment()?) {
            let dice = Dice::new(rand::rngs::StdRng::from_rng(&mut rand::rng()));
            enrol::until_joined(&dir, &line, common.name.clone(), &dice)
                .await
                .inspect_err(|error| tracing::error!(kind = error.kind(), "cannot enrol"))?;
        }
        let edge = mesh_edge::start(config, tasks.clone()).await?;
        tracing::info!(edge = %edge.name(), version = telemetry::version(), "started");
        std::future::pending().await
    };
    let signal = tokio::select! {
        biased;
        signal = runtime::shutdown::signal() => signal.context("cannot install signal handlers")?,
        ended = whole => return ended,
    };
    tracing::info!(signal, "stopping");
    match tasks.drained(drain + Duration::from_secs(2)).await {
        0 => Ok(()),
        left => bail!("{left} tasks did not end in time"),
    }
}
