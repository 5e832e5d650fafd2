//! `meshctl shard`.

use clap::{Args, Subcommand};
use proto::api::ShardView;
use runtime::clock::unix_now;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    table::{Cell, Table, Tone},
    text,
};

/// Shows shards.
#[derive(Debug, Args)]
pub(crate) struct ShardArgs {
    #[command(subcommand)]
    command: ShardCommand,
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// Lists the shards.
    Ls,
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: ShardArgs) -> Result<(), Failure> {
    let ShardCommand::Ls = args.command;
    let shards: Vec<ShardView> = context.session().await?.api().get("/v1/shards").await?;
    match context.form {
        Form::Json => out::json(&shards),
        Form::Table => out::table(&table(&shards, unix_now())),
    }
}

fn table(shards: &[ShardView], now: i64) -> Table {
    let mut table = Table::new(&["NAME", "STATE", "EDGES", "ADDRESSES", "VERSION", "SEEN"]);
    for shard in shards {
        table.row(vec![
            shard.name.as_str().into(),
            if shard.alive { Cell::toned("alive", Tone::Good) } else { Cell::toned("silent", Tone::Bad) },
            shard.edges.to_string().into(),
            shard.addresses.join(",").into(),
            shard.version.as_str().into(),
            format!("{} ago", text::age(shard.last_seen, now)).into(),
        ]);
    }
    table
}
