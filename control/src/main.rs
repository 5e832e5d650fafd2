//! The `mesh-control` binary.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use control::config::{ControlConfig, DATABASE_VARIABLE, refuse_passwords};
use runtime::{shutdown, telemetry};

/// How long requests that have begun may take when control stops.
const DRAIN: Duration = Duration::from_secs(10);

/// The control of a mesh: certificate authority, enrolment, policy, list of shards.
///
/// Every setting has a default; see docs/operations.md. The URL of a database with a password goes into the environment
/// variable CAUSEWAY_CONTROL_DATABASE or into a file (database_file), never into an argument.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version, max_term_width = 110)]
struct Args {
    /// The configuration, in TOML
    #[arg(long, value_name = "FILE", env = "CAUSEWAY_CONTROL_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Sets one key over the configuration, such as leaf_ttl_secs.edge=3600; can be given again
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    sets: Vec<String>,
    /// Where the API listens (listen)
    #[arg(long, value_name = "ADDRESS:PORT", env = "CAUSEWAY_CONTROL_LISTEN", global = true)]
    listen: Option<String>,
    /// Where /livez, /readyz and /metrics are served (admin)
    #[arg(long, value_name = "ADDRESS:PORT", env = "CAUSEWAY_CONTROL_ADMIN", global = true)]
    admin: Option<String>,
    /// Where others reach the API, for join lines (public)
    #[arg(long, value_name = "HOST:PORT", env = "CAUSEWAY_CONTROL_PUBLIC", value_delimiter = ',', global = true)]
    public: Vec<String>,
    /// Where CA and database lie (data_dir)
    #[arg(long, value_name = "FOLDER", env = "CAUSEWAY_CONTROL_DATA_DIR", global = true)]
    data_dir: Option<String>,
    /// The name of the mesh, which cannot be changed later (trust_domain)
    #[arg(long, value_name = "NAME", env = "CAUSEWAY_CONTROL_TRUST_DOMAIN", global = true)]
    trust_domain: Option<String>,
    /// What to log, such as info or info,control=debug (log.level)
    #[arg(long, value_name = "LEVEL", env = "CAUSEWAY_CONTROL_LOG", global = true)]
    log: Option<String>,
    /// Checks the configuration and exits
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new join line for an administrator, in admin.join of the data folder; control may run meanwhile
    AdminToken,
    /// Prints the hash of the CA, as join lines carry it
    CaHash,
}

impl Args {
    fn settings(&self) -> anyhow::Result<ControlConfig> {
        refuse_passwords(&self.sets)?;
        let mut sets = Vec::new();
        let flags = [
            ("listen", &self.listen),
            ("admin", &self.admin),
            ("data_dir", &self.data_dir),
            ("trust_domain", &self.trust_domain),
            ("log.level", &self.log),
        ];
        for (key, value) in flags {
            sets.extend(value.as_ref().map(|v| format!("{key}={}", quoted(v))));
        }
        if !self.public.is_empty() {
            let list: Vec<_> = self.public.iter().map(|p| quoted(p)).collect();
            sets.push(format!("public=[{}]", list.join(", ")));
        }
        sets.extend(self.sets.iter().cloned());
        let config: ControlConfig = runtime::config::load(self.config.as_deref(), &sets)?;
        Ok(config.settle(std::env::var(DATABASE_VARIABLE).ok())?)
    }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "what was asked for goes to standard output")]
fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.settings()?;
    if args.check_config {
        println!("the configuration is good");
        return Ok(ExitCode::SUCCESS);
    }
    telemetry::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    match args.command {
        Some(Command::AdminToken) => {
            let path = runtime.block_on(control::renew_admin_join(&config))?;
            println!("{}", path.display());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::CaHash) => {
            println!("{}", control::ca_hash(&config)?);
            Ok(ExitCode::SUCCESS)
        }
        None => runtime.block_on(serve(config)),
    }
}

async fn serve(config: ControlConfig) -> anyhow::Result<ExitCode> {
    let tasks = shutdown::Tasks::new();
    let control = control::start(config, tasks.clone()).await?;
    let signal = shutdown::signal().await.context("cannot listen for signals")?;
    tracing::info!(signal, "stopping");
    let left = tasks.drained(DRAIN).await;
    control.close().await;
    if left > 0 {
        tracing::warn!(left, "stopped with tasks that did not end in time");
    }
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}
