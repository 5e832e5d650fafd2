//! `meshctl shard`.

use std::{collections::BTreeMap, time::Duration};

use clap::{Args, Subcommand};
use proto::{
    api::{ShardOrder, ShardState, ShardView},
    id::ShardId,
    ring::{Ring, RingSpec},
};
use runtime::clock::unix_now;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    table::{Cell, Table, Tone},
    text,
};

/// How often a drain is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How often its progress is told.
const TELL: Duration = Duration::from_secs(1);

/// Shows shards, and takes them out of the ring and back in.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl shard ls
  meshctl shard drain shard-2 --wait     its edges move to other shards; ends when it holds none
  meshctl shard undrain shard-2
  meshctl shard cordon shard-2           no new edges, but it keeps those that it has
  meshctl shard ls -o json | jq -r '.[] | select(.standing == \"dead\") | .name'

An order stands until it is taken back, also when the shard starts again.")]
pub(crate) struct ShardArgs {
    #[command(subcommand)]
    command: ShardCommand,
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// Lists the shards.
    Ls,
    /// Takes a shard out of the ring and sends its edges to the others.
    Drain(DrainArgs),
    /// Takes a drained shard back into the ring.
    Undrain {
        /// The shard.
        name: ShardId,
    },
    /// Takes a shard out of the ring, but lets it keep the edges that it has.
    Cordon {
        /// The shard.
        name: ShardId,
    },
    /// Takes a cordoned shard back into the ring.
    Uncordon {
        /// The shard.
        name: ShardId,
    },
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// The shard.
    name: ShardId,
    /// Waits until it holds no edges, and tells how many are left.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most, such as 90s or 10m.
    #[arg(long, value_name = "SPAN", default_value = "10m", value_parser = text::parse_span, requires = "wait")]
    timeout: Duration,
}

/// A shard and its place in the ring, for programs.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    shard: &'a ShardView,
    standing: Standing,
    /// Its share of the ring, 0 to 1.
    share: f64,
}

/// How a shard stands, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Standing {
    Serving,
    Cordoned,
    Draining,
    Dead,
}

impl Standing {
    pub(super) const fn of(shard: &ShardView) -> Self {
        match (shard.alive, shard.state, shard.order) {
            (false, ..) => Self::Dead,
            (true, ShardState::Draining, _) | (true, _, ShardOrder::Drain) => Self::Draining,
            (true, ShardState::Serving, ShardOrder::Cordon) => Self::Cordoned,
            (true, ShardState::Serving, ShardOrder::Serve) => Self::Serving,
        }
    }

    fn cell(self) -> Cell {
        match self {
            Self::Serving => Cell::toned("serving", Tone::Good),
            Self::Cordoned => "cordoned".into(),
            Self::Draining => "draining".into(),
            Self::Dead => Cell::toned("dead", Tone::Bad),
        }
    }
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: ShardArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    match args.command {
        ShardCommand::Ls => ls(context, &session).await,
        ShardCommand::Drain(args) => drain(context, &session, args).await,
        ShardCommand::Undrain { name } | ShardCommand::Uncordon { name } => {
            let shard = order(&session, &name, ShardOrder::Serve).await?;
            let words = match Standing::of(&shard) {
                Standing::Serving => format!("Shard {name} serves: it is in the ring, and edges move to it."),
                Standing::Dead => format!("Shard {name} may serve again as soon as it reports; now it is dead."),
                Standing::Cordoned | Standing::Draining => {
                    format!("Shard {name} may serve again as soon as it says so; now it is about to stop.")
                }
            };
            tell(context, &shard, &words)
        }
        ShardCommand::Cordon { name } => {
            warn_if_last(&session, &name).await?;
            let shard = order(&session, &name, ShardOrder::Cordon).await?;
            let words = format!(
                "Shard {name} is cordoned: it keeps {}, and gets no new ones. To take it back: \
                 meshctl shard uncordon {name}",
                text::counted(shard.edges, "edge")
            );
            tell(context, &shard, &words)
        }
    }
}

fn tell(context: &Context, shard: &ShardView, words: &str) -> Result<(), Failure> {
    match context.form {
        Form::Json => out::json(shard),
        Form::Table => out::line(words),
    }
}

async fn order(session: &Session, name: &ShardId, order: ShardOrder) -> Result<ShardView, Failure> {
    Ok(session.api().put(&format!("/v1/shards/{name}/order"), &order).await?)
}

pub(super) async fn shards(session: &Session) -> Result<Vec<ShardView>, Failure> {
    Ok(session.api().get("/v1/shards").await?)
}

pub(super) async fn ring(session: &Session) -> Result<Ring, Failure> {
    Ok(Ring::new(session.api().get::<RingSpec>("/v1/ring").await?))
}

async fn ls(context: &Context, session: &Session) -> Result<(), Failure> {
    let shards = shards(session).await?;
    let shares = ring(session).await?.shares();
    match context.form {
        Form::Json => {
            let row = |shard| Row { shard, standing: Standing::of(shard), share: share(&shares, &shard.name) };
            out::json(&shards.iter().map(row).collect::<Vec<_>>())
        }
        Form::Table => out::table(&table(&shards, &shares, unix_now())),
    }
}

fn share(shares: &BTreeMap<ShardId, f64>, shard: &ShardId) -> f64 {
    shares.get(shard).copied().unwrap_or(0.0)
}

fn table(shards: &[ShardView], shares: &BTreeMap<ShardId, f64>, now: i64) -> Table {
    let mut table =
        Table::new(&["NAME", "STATE", "EDGES", "SHARE", "STREAMS", "WEIGHT", "EPOCH", "VERSION", "SEEN", "ADDRESSES"]);
    for shard in shards {
        table.row(vec![
            shard.name.as_str().into(),
            Standing::of(shard).cell(),
            shard.edges.to_string().into(),
            Cell::or_dash(shares.get(&shard.name).map(|share| text::percent(*share))),
            shard.streams.to_string().into(),
            shard.weight.to_string().into(),
            Cell::or_dash((shard.epoch > 0).then_some(shard.epoch)),
            Cell::or_dash(Some(&shard.version).filter(|v| !v.is_empty())),
            // One that is known by an order or as a member only has not been seen by this control.
            Cell::or_dash((shard.last_seen > 0).then(|| format!("{} ago", text::age(shard.last_seen, now)))),
            Cell::or_dash(Some(shard.addresses.join(",")).filter(|a| !a.is_empty())),
        ]);
    }
    table
}

/// Whether a shard is the only one in the ring.
async fn is_last(session: &Session, name: &ShardId) -> Result<bool, Failure> {
    let ring = ring(session).await?;
    Ok(ring.len() == 1 && ring.member(name).is_some())
}

async fn warn_if_last(session: &Session, name: &ShardId) -> Result<(), Failure> {
    if is_last(session, name).await? {
        out::note(&format!(
            "Warning: {name} is the only shard in the ring. Nobody is left to take edges over; they stay where they are."
        ));
    }
    Ok(())
}

async fn drain(context: &Context, session: &Session, args: DrainArgs) -> Result<(), Failure> {
    let DrainArgs { name, wait, timeout: limit } = args;
    if wait && is_last(session, &name).await? {
        return Err(Failure::Failed(format!(
            "{name} is the only shard in the ring, so its edges have nowhere to go and this would never end: start \
             another shard first, or drain it without --wait"
        )));
    }
    warn_if_last(session, &name).await?;
    let mut shard = order(session, &name, ShardOrder::Drain).await?;
    let back = format!("To take it back: meshctl shard undrain {name}");
    if !wait {
        let edges = text::counted(shard.edges, "edge");
        return tell(context, &shard, &format!("Shard {name} is draining: it has {edges} to send elsewhere. {back}"));
    }
    let begun = Instant::now();
    let mut left = shard.edges;
    let emptied = timeout(limit, emptied(session, &mut shard, &mut left)).await.unwrap_or_else(|_| {
        Err(Failure::Failed(format!(
            "{name} still holds {} after {}; it goes on draining. 'meshctl ring explain EDGE' may say why one stays",
            text::counted(left, "edge"),
            text::span(limit)
        )))
    });
    emptied?;
    let took = begun.elapsed().as_secs_f64();
    tell(context, &shard, &format!("Shard {name} holds no edges any more, after {took:.1} s. {back}"))
}

/// Waits until a shard holds no edges, and says from time to time how many are left.
async fn emptied(session: &Session, shard: &mut ShardView, left: &mut u64) -> Result<(), Failure> {
    let name = shard.name.clone();
    let mut told: Option<(Instant, u64)> = None;
    loop {
        match Standing::of(shard) {
            Standing::Draining => {}
            Standing::Dead => {
                out::note(&format!("{name} does not report any more; its edges find another shard by themselves"));
                return Ok(());
            }
            Standing::Serving | Standing::Cordoned => {
                return Err(Failure::Failed(format!("somebody has ordered {name} to {} meanwhile", shard.order)));
            }
        }
        *left = shard.edges;
        if *left == 0 {
            return Ok(());
        }
        if told.is_none_or(|(at, edges)| edges != *left && at.elapsed() >= TELL) {
            out::note(&format!("{name} holds {}", text::counted(*left, "edge")));
            told = Some((Instant::now(), *left));
        }
        sleep(LOOK).await;
        // Control may be away for a moment; the drain goes on.
        match shards(session).await {
            Ok(all) => {
                *shard = all.into_iter().find(|s| s.name == name).ok_or_else(|| {
                    Failure::Failed(format!("control does not know shard {name} any more; it may have forgotten it"))
                })?;
            }
            Err(error @ Failure::Unreachable(_)) => tracing::warn!(%error, "asking again"),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_told_apart_at_a_glance() {
        let shards: Vec<ShardView> = serde_json::from_str(
            r#"[
            {"name": "a", "addresses": ["192.0.2.1:7400"], "version": "1.0.0", "edges": 700, "last_seen": 999,
             "alive": true, "state": "serving", "order": "serve", "weight": 200, "epoch": 7, "streams": 12},
            {"name": "b", "addresses": ["192.0.2.2:7400"], "version": "1.0.0", "edges": 3, "last_seen": 999,
             "alive": true, "state": "serving", "order": "drain", "weight": 100, "epoch": 7, "streams": 0},
            {"name": "c", "addresses": [], "version": "", "edges": 0, "last_seen": 0, "alive": false,
             "order": "cordon"}
        ]"#,
        )
        .unwrap();
        let shares = BTreeMap::from([("a".parse().unwrap(), 0.6667)]);
        let text = table(&shards, &shares, 1000).render(false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME  STATE     EDGES  SHARE   STREAMS  WEIGHT  EPOCH  VERSION  SEEN    ADDRESSES");
        assert_eq!(lines[1], "a     serving   700    66.7 %  12       200     7      1.0.0    1s ago  192.0.2.1:7400");
        assert_eq!(lines[2], "b     draining  3      -       0        100     7      1.0.0    1s ago  192.0.2.2:7400");
        assert_eq!(lines[3], "c     dead      0      -       0        100     -      -        -       -");
    }

    #[test]
    fn the_state_is_what_the_shard_says_and_what_it_is_ordered() {
        let mut shard: ShardView = serde_json::from_str(
            r#"{"name": "a", "addresses": [], "version": "1", "edges": 0, "last_seen": 1, "alive": true}"#,
        )
        .unwrap();
        let mut standing = |state, order| {
            (shard.state, shard.order) = (state, order);
            Standing::of(&shard)
        };
        assert_eq!(standing(ShardState::Serving, ShardOrder::Serve), Standing::Serving);
        assert_eq!(standing(ShardState::Serving, ShardOrder::Cordon), Standing::Cordoned);
        assert_eq!(standing(ShardState::Draining, ShardOrder::Cordon), Standing::Draining);
        assert_eq!(standing(ShardState::Draining, ShardOrder::Serve), Standing::Draining);
    }
}
