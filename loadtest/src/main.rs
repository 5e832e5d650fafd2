//! `mesh-loadtest`: little services to put behind edges, and tools that load, check and annoy a mesh. The demo and the
//! stories in `e2e/` are written with it; every figure it prints is one `name=value` per word, for scripts.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};

mod fleet;
mod tools;

use tools::{
    balance, check, dials, edges, get, hop, hostile, keys, kill, link, load, outage, ports, probes, rolling, scale_out,
    serve, storm,
};

/// Services, load and bad manners, for trying out a mesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-loadtest", version, max_term_width = 110)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs little services until it is told to stop; prints `ready` once all of them listen
    Serve(serve::ServeArgs),
    /// Prints free ports, one a line: free for TCP and UDP, and outside the range that the system gives out by itself
    Ports {
        /// How many
        count: usize,
    },
    /// Gets a page, over TLS if the URL says so, and prints it
    Get(get::GetArgs),
    /// Sends random bytes to an echo, reads them back, and compares hashes
    Echo {
        /// Where
        #[arg(long, value_name = "HOST:PORT")]
        connect: String,
        /// How many bytes
        #[arg(long, default_value_t = 100_000_000)]
        bytes: u64,
        /// Word to say first: `echo` for a `serve --tricks`
        #[arg(long)]
        say: Option<String>,
    },
    /// Checks half-close and reset in both directions against a `serve --tricks`
    Check {
        /// Where
        #[arg(long, value_name = "HOST:PORT")]
        connect: String,
    },
    /// Opens many connections to a `serve --tricks`, keeps all of them open, and has each of them echo
    Streams {
        /// Where
        #[arg(long, value_name = "HOST:PORT")]
        connect: String,
        /// How many
        #[arg(long, default_value_t = 1000)]
        count: usize,
        /// How often each echoes
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Echoes small messages over one connection to a `serve --tricks` and prints how long they took
    Latency {
        /// Where
        #[arg(long, value_name = "HOST:PORT")]
        connect: String,
        /// For how long
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// Pause between two messages, in seconds
        #[arg(long, default_value_t = 0.005)]
        every: f64,
        /// Opens a new connection for each message
        #[arg(long)]
        fresh: bool,
    },
    /// Lets a `serve --tricks` send until it stops, and says how the connection ended: eof, reset or another error
    Pull {
        /// Where
        #[arg(long, value_name = "HOST:PORT")]
        connect: String,
        /// How many bytes to ask for; 0 is without end
        #[arg(long, default_value_t = 0)]
        bytes: u64,
    },
    /// Opens connections, says the same on each, reads nothing, and keeps them until it is told to stop
    Hold(hostile::HoldArgs),
    /// Sends CONNECTs to an egress door's unix socket and prints how they were answered
    Dials(dials::DialsArgs),
    /// Sends garbage to TCP and UDP ports
    Garbage(hostile::GarbageArgs),
    /// Opens many streams to the echo of an edge over QUIC, as a user, keeps them busy, and prints how long echoes took
    Probes(probes::ProbesArgs),
    /// Runs many edges in this one process until it is told to stop
    Edges(edges::EdgesArgs),
    /// Types into a terminal session, and prints how long each keystroke took to come back
    Keys(keys::KeysArgs),
    /// Emulates a link between two network namespaces: delay, loss, rate, queue and more
    #[command(subcommand)]
    Link(link::LinkCommand),
    #[command(flatten)]
    Proof(Proof),
}

/// What a fleet must hold, proven with real processes; each ends with 0 only if all its goals are met.
#[derive(Debug, Subcommand)]
enum Proof {
    /// Computes how evenly the ring spreads edges, and whom a change of it moves
    Balance(balance::BalanceArgs),
    /// Adds a shard to a fleet of real processes under load: nothing may break, nothing may fail
    ScaleOut(scale_out::ScaleOutArgs),
    /// Kills a shard, or silences it: its edges must soon serve again, and nobody else may notice
    Kill(kill::KillArgs),
    /// Restarts every shard in turn under load: nothing may break, nothing may fail
    Rolling(rolling::RollingArgs),
    /// Has very many edges come back to one shard at once
    Storm(storm::StormArgs),
    /// Measures what it costs to enter at another shard than the one that holds the edge
    Hop(hop::HopArgs),
    /// Takes control and its database away under load: streams and routing go on
    Outage(outage::OutageArgs),
}

fn main() -> ExitCode {
    let args = Args::parse();
    runtime::shutdown::raise_descriptor_limit();
    let mut runtime = if matches!(args.command, Command::Proof(_)) {
        // Whoever asks around while the load is on must not hold the load up, so that has a thread of its own.
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = runtime.worker_threads(1).enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(args.command)));
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Proof(proof) => return prove(proof).await,
        Command::Serve(args) => serve::run(args).await?,
        Command::Ports { count } => ports::print(count)?,
        Command::Get(args) => get::run(args).await?,
        Command::Echo { connect, bytes, say } => load::echo(&connect, bytes, say.as_deref()).await?,
        Command::Check { connect } => check::run(&connect).await?,
        Command::Streams { connect, count, rounds } => load::streams(&connect, count, rounds).await?,
        Command::Latency { connect, seconds, every, fresh } => {
            let (span, every) = (Duration::from_secs_f64(seconds), Duration::from_secs_f64(every));
            load::latency(&connect, span, every, fresh).await?;
        }
        Command::Pull { connect, bytes } => load::pull(&connect, bytes).await?,
        Command::Hold(args) => hostile::hold(args).await?,
        Command::Dials(args) => dials::run(args).await?,
        Command::Garbage(args) => hostile::garbage(args).await?,
        Command::Probes(args) => probes::run(args).await?,
        Command::Edges(args) => edges::run(args).await?,
        Command::Keys(args) => keys::run(args).await?,
        Command::Link(command) => link::run(command).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn prove(proof: Proof) -> anyhow::Result<ExitCode> {
    match proof {
        Proof::Balance(args) => balance::run(&args),
        Proof::ScaleOut(args) => scale_out::run(args).await,
        Proof::Kill(args) => kill::run(args).await,
        Proof::Rolling(args) => rolling::run(args).await,
        Proof::Storm(args) => storm::run(args).await,
        Proof::Hop(args) => hop::run(args).await,
        Proof::Outage(args) => outage::run(args).await,
    }
}

/// Writes a line to standard output, at once.
fn say(line: impl std::fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
