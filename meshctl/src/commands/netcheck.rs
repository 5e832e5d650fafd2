//! `meshctl netcheck`: what the network between here and the mesh lets through.

use std::path::PathBuf;

use clap::Args;
use mesh_edge::{
    config::{EdgeConfig, ProxyConfig},
    netcheck::{Netcheck, Report},
};

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::no_tls,
};

/// Tells what the network between this machine and the mesh lets through.
///
/// Names, UDP (a whole QUIC handshake with each shard), TCP on the same port, the HTTP proxy, the largest datagram, and
/// the clocks. It is done as an edge does it, by the same code, with the login of this machine's user.
#[derive(Debug, Default, Args)]
#[command(
    after_help = "Exit status: 0 all is well, 1 a shard can be reached and something is not well, 3 none can for want of trust, 4 none can.

Examples:
  meshctl netcheck                          from this machine to every shard
  meshctl netcheck --shard 192.0.2.1:7400   to one address
  meshctl netcheck --edge /etc/causeway/edge.toml   as the edge of this machine, with its identity and its proxy"
)]
pub(crate) struct NetcheckArgs {
    /// An address of a shard in place of those that control names; can be repeated.
    #[arg(long = "shard", value_name = "HOST:PORT")]
    shards: Vec<String>,
    /// Checks as the edge with this configuration; that needs no login.
    #[arg(long, value_name = "FILE")]
    edge: Option<PathBuf>,
}

/// Checks, and tells.
///
/// # Errors
/// If a shard cannot be reached, or something is not well.
pub(crate) async fn run(context: &Context, args: NetcheckArgs) -> Result<(), Failure> {
    let report = check(context, args).await?;
    match context.form {
        Form::Json => out::json(&report)?,
        Form::Table => out::text(&report.text())?,
    }
    match report.status() {
        0 => Ok(()),
        status => Err(Failure::Told(status)),
    }
}

/// Checks.
///
/// # Errors
/// If nobody is logged in here, or the configuration cannot be read.
pub(crate) async fn check(context: &Context, args: NetcheckArgs) -> Result<Report, Failure> {
    let failed = |e: anyhow::Error| Failure::Failed(format!("{e:#}"));
    let mut netcheck = match &args.edge {
        Some(path) => {
            let config: EdgeConfig =
                runtime::config::load(Some(path), &[]).map_err(|e| Failure::Usage(e.to_string()))?;
            Netcheck::of_edge(&config).await.map_err(failed)?
        }
        None => as_user(context).await?,
    };
    if !args.shards.is_empty() {
        netcheck.shards = args.shards;
    }
    Ok(netcheck.run().await)
}

/// As the user who is logged in.
async fn as_user(context: &Context) -> Result<Netcheck, Failure> {
    let session = context.session().await?;
    let config = EdgeConfig { proxy: ProxyConfig::default(), ..EdgeConfig::default() };
    let ways =
        mesh_edge::ways_of(&config, session.identity(), session.bundle()).map_err(|e| no_tls(&format!("{e:#}")))?;
    // Without control, those that were known last are as good.
    let shards = session.shards().await.unwrap_or_default();
    Ok(Netcheck {
        ways,
        shards: shards.into_iter().flat_map(|shard| shard.addresses).collect(),
        control: Some(session.api().address().clone()),
        bundle: session.bundle().clone(),
        own: session.facts().as_ref().clone(),
        seen_as: None,
    })
}
