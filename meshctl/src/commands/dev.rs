//! `meshctl dev`: a whole mesh on this machine, to try things.

use std::{path::Path, time::Duration};

use clap::Args;
use runtime::shutdown::{self, Tasks};
use tokio::time::Instant;

use self::mesh::{Addresses, Mesh, Plan};
use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    table::Table,
    text,
};

mod mesh;
mod service;

/// How long a start that is given up may take to end.
const GIVE_UP: Duration = Duration::from_secs(3);

/// Runs a whole mesh on this machine, to try things.
///
/// Control, shards and edges are the real ones, in one process, on loopback, with identities by real enrolment.
/// Everything lives in a temporary folder, which is removed at the end. Ctrl-C ends it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl dev
  meshctl dev --edges 10
  meshctl dev --shards 3       they share the edges, and each reaches all of them
  meshctl dev --json --free-ports --until-eof
                               for scripts: one line of JSON with all addresses, then it stays up")]
pub(crate) struct DevArgs {
    /// How many edges.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    edges: u16,
    /// How many shards.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=10))]
    shards: u16,
    /// Takes free ports everywhere, instead of the usual ones where they are free.
    #[arg(long)]
    free_ports: bool,
    /// Prints the addresses as one line of JSON.
    #[arg(long)]
    json: bool,
    /// Ends with standard input too, so that no script leaves it behind.
    #[arg(long)]
    until_eof: bool,
}

/// Runs the mesh until a signal comes.
///
/// # Errors
/// If it does not start.
pub(crate) async fn run(context: &Context, args: &DevArgs) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("causeway-dev-")
        .tempdir()
        .map_err(|e| Failure::Failed(format!("cannot make a temporary folder: {e}")))?;
    let (tasks, begun) = (Tasks::new(), Instant::now());
    let json = args.json || context.form == Form::Json;
    let say = |what: &str| out::note(&format!("{:5.2} s  {what}", begun.elapsed().as_secs_f64()));
    let plan = Plan { shards: args.shards, edges: args.edges, free_ports: args.free_ports };
    let run = async {
        let mesh = tokio::select! {
            biased;
            stopped = stopped(args.until_eof) => {
                stopped?;
                tasks.drained(GIVE_UP).await;
                return Err(Failure::Quiet);
            }
            started = Mesh::start(plan, folder.path(), &tasks, &say) => {
                started.map_err(|e| Failure::Failed(format!("the mesh did not start: {e:#}")))?
            }
        };
        tell(&mesh.addresses, json)?;
        say("ready");
        let why = stopped(args.until_eof).await?;
        say(&format!("{why}: stopping"));
        match mesh.stop(&tasks).await {
            0 => Ok(()),
            left => Err(Failure::Failed(format!("{} did not end in time", text::counted(left as u64, "task")))),
        }
    };
    let done = run.await;
    let path = folder.path().to_owned();
    folder.close().map_err(|e| Failure::Failed(format!("cannot remove {}: {e}", path.display())))?;
    done
}

async fn stopped(until_eof: bool) -> std::io::Result<&'static str> {
    let end_of_input = async {
        match until_eof {
            true => tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await.map(|_| "end of input"),
            false => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        name = shutdown::signal() => name,
        end = end_of_input => end,
    }
}

fn tell(addresses: &Addresses, json: bool) -> Result<(), Failure> {
    if json {
        return out::json_line(addresses);
    }
    out::line("")?;
    out::table(&table(addresses))?;
    out::line(&commands(addresses))
}

fn table(addresses: &Addresses) -> Table {
    let mut table = Table::new(&["PROCESS", "WHAT", "ADDRESS"]);
    let mut row = |process: &str, what: &str, address: String| {
        table.row(vec![process.into(), what.into(), address.into()]);
    };
    row("control", "API", format!("https://{}", addresses.control));
    row("control", "admin", format!("http://{}/metrics", addresses.control_admin));
    for shard in &addresses.shards {
        row(&shard.name, "mesh (QUIC)", format!("udp {}", shard.mesh));
        for (what, address) in [("proxy door", shard.proxy), ("http door", shard.http), ("https door", shard.https)] {
            if let Some(address) = address {
                row(&shard.name, what, address.to_string());
            }
        }
        if let Some(admin) = shard.admin {
            row(&shard.name, "admin", format!("http://{admin}/metrics"));
        }
    }
    for edge in &addresses.edges {
        row(edge.name.as_str(), "service web", edge.web.to_string());
        row(edge.name.as_str(), "service echo", edge.echo.to_string());
        if let Some(admin) = edge.admin {
            row(edge.name.as_str(), "admin", format!("http://{admin}/metrics"));
        }
    }
    table
}

/// Commands to try, to be copied as they are.
fn commands(addresses: &Addresses) -> String {
    let program = std::env::current_exe().map_or_else(|_| "meshctl".into(), |path| path.display().to_string());
    let program = if on_path(&program) { "meshctl".to_owned() } else { program };
    let edge = addresses.edges.first().map_or("edge-1", |e| e.name.as_str());
    let web = addresses.edges.first().map_or(80, |e| e.web.port());
    let home = addresses.home.display();
    let mut lines = vec![
        String::new(),
        "Try, in another terminal:".to_owned(),
        format!("  export CAUSEWAY_HOME={home}"),
        format!("  {program} edge ls"),
        format!("  {program} ping {edge}"),
        format!("  {program} forward {edge}/web 8080            # then: curl http://localhost:8080/"),
        format!("  echo hello | {program} proxy {edge}/echo"),
        format!("  {program} policy test --from door/http {edge}/web"),
        format!("  {program} ssh {edge}                         # if sshd runs on this machine"),
    ];
    if let [.., last] = &addresses.shards[..]
        && addresses.shards.len() > 1
    {
        lines.push(format!("  {program} shard ls"));
        lines.push(format!("  {program} ring explain {edge}"));
        lines.push(format!(
            "  {program} shard drain {} --wait         # its edges move, and no stream breaks",
            last.name
        ));
    }
    if let Some(http) = addresses.shards.first().and_then(|s| s.http) {
        lines.push(format!("  curl -H 'Host: web.{edge}.{}' http://{http}/", addresses.domain));
    }
    if addresses.shards.iter().any(|s| s.proxy.is_some()) {
        lines.push(format!("  curl -K {} http://{edge}:{web}/", addresses.curl.display()));
    }
    lines.push(format!("  tail -f {}", addresses.access_log.display()));
    lines.push("Ctrl-C ends it and removes everything.".to_owned());
    lines.join("\n")
}

/// Whether the shell would find this very program by its name.
fn on_path(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join("meshctl") == Path::new(program))
}
