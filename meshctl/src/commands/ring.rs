//! `meshctl ring`: which shard owns which edge, and why an edge is not there.

use clap::{Args, Subcommand};
use proto::{
    api::{EdgeView, ShardView},
    id::{EdgeId, ShardId},
    ring::Ring,
};
use runtime::{api::ApiClientError, clock::unix_now};
use serde::Serialize;

use super::{
    Context,
    shard::{self, Standing},
};
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    table::{Cell, Table},
    text,
};

/// Shows the ring, by which shards share the edges.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl ring                     its epoch, its members and their shares
  meshctl ring explain shop-17     who owns shop-17, who comes next, and is it there now?")]
pub(crate) struct RingArgs {
    #[command(subcommand)]
    command: Option<RingCommand>,
}

#[derive(Debug, Subcommand)]
enum RingCommand {
    /// Says which shard owns an edge and why it may be elsewhere.
    #[command(after_help = "Examples:
  meshctl ring explain shop-17
  meshctl ring explain shop-17 -o json | jq -r .owner

The owner follows from the name alone, so this works for edges that are not enrolled yet.")]
    Explain {
        /// The edge.
        edge: EdgeId,
    },
}

/// The ring, for programs.
#[derive(Debug, Serialize)]
struct Whole {
    epoch: u64,
    members: Vec<Share>,
}

#[derive(Debug, Serialize)]
struct Share {
    shard: ShardId,
    addresses: Vec<String>,
    weight: u32,
    /// 0 to 1.
    share: f64,
}

/// An edge's place, for programs.
#[derive(Debug, Serialize)]
struct Explained {
    edge: EdgeId,
    /// On the circle of 64-bit numbers, hexadecimal.
    position: String,
    epoch: u64,
    /// `None` if the ring is empty.
    owner: Option<ShardId>,
    /// Who owns it if the owner is lost, and so on.
    next: Vec<ShardId>,
    /// The shard that holds it now.
    at: Option<ShardId>,
    /// Whether that is its owner.
    home: bool,
    /// What is to say about that.
    why: String,
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: RingArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let ring = shard::ring(&session).await?;
    match args.command {
        None => show(context, &ring),
        Some(RingCommand::Explain { edge }) => {
            let (view, shards) = (view(&session, &edge).await?, shard::shards(&session).await?);
            let explained = explain(&ring, edge, view.as_ref(), &shards);
            match context.form {
                Form::Json => out::json(&explained),
                Form::Table => {
                    out::table(&facts(&explained))?;
                    out::line(&format!("\n{}", explained.why))
                }
            }
        }
    }
}

fn show(context: &Context, ring: &Ring) -> Result<(), Failure> {
    let shares = ring.shares();
    let member = |m: &proto::ring::Member| Share {
        shard: m.shard.clone(),
        addresses: m.addresses.clone(),
        weight: m.weight,
        share: shares.get(&m.shard).copied().unwrap_or(0.0),
    };
    let whole = Whole { epoch: ring.epoch(), members: ring.members().map(member).collect() };
    if context.form == Form::Json {
        return out::json(&whole);
    }
    out::line(&format!("epoch {}, {}", whole.epoch, text::counted(whole.members.len() as u64, "shard")))?;
    if whole.members.is_empty() {
        return out::line("No shard serves; 'meshctl shard ls' shows those that are there.");
    }
    let mut table = Table::new(&["SHARD", "SHARE", "WEIGHT", "ADDRESSES"]);
    for m in &whole.members {
        table.row(vec![
            m.shard.as_str().into(),
            text::percent(m.share).into(),
            m.weight.to_string().into(),
            m.addresses.join(",").into(),
        ]);
    }
    out::table(&table)
}

/// What control knows of an edge; `None` if no edge of that name is enrolled.
async fn view(session: &Session, edge: &EdgeId) -> Result<Option<EdgeView>, Failure> {
    match session.api().get(&format!("/v1/edges/{edge}")).await {
        Ok(view) => Ok(Some(view)),
        Err(ApiClientError::Refused(error)) if error.code == proto::api::ApiCode::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn explain(ring: &Ring, edge: EdgeId, view: Option<&EdgeView>, shards: &[ShardView]) -> Explained {
    let mut order = ring.preference(&edge).map(|m| m.shard.clone());
    let owner = order.next();
    let next = order.collect();
    let at = view.and_then(|v| v.presence.as_ref()).map(|p| p.shard.clone());
    let why = match (view, &owner, &at) {
        (None, ..) => format!("No edge {edge} is enrolled; this is where it would go."),
        (Some(view), _, None) => absent(view, unix_now()),
        (Some(_), None, Some(at)) => {
            format!(
                "The ring is empty, so that the edge stays where it is: at {at}. 'meshctl shard ls' shows why nobody serves."
            )
        }
        (Some(_), Some(owner), Some(at)) if owner == at => format!("It is at {at}, where it belongs."),
        (Some(_), Some(owner), Some(at)) => elsewhere(ring, owner, at, shards),
    };
    Explained {
        position: format!("{:016x}", Ring::position(&edge)),
        epoch: ring.epoch(),
        home: owner.is_some() && owner == at,
        edge,
        owner,
        next,
        at,
        why,
    }
}

fn absent(edge: &EdgeView, now: i64) -> String {
    if edge.revoked {
        return format!(
            "It is nowhere, because it is revoked. To let it come back: meshctl token create --edge --name {} --replace",
            edge.name
        );
    }
    let seen = match edge.last_seen {
        Some(seen) => format!("a shard saw it {} ago", text::age(seen, now)),
        None => "no shard has seen it so far".to_owned(),
    };
    format!("It is not connected to any shard: {seen}. Its own log says why.")
}

/// Why an edge may be at another shard than its owner, from what is known of both.
fn elsewhere(ring: &Ring, owner: &ShardId, at: &ShardId, shards: &[ShardView]) -> String {
    let find = |name: &ShardId| shards.iter().find(|s| s.name == *name);
    let begin = format!("It is at {at} and belongs to {owner}");
    let holder = find(at);
    if find(owner).is_none_or(|s| Standing::of(s) == Standing::Dead) {
        return format!(
            "{begin}, which is silent: {owner} leaves the ring when its lease of 6 s ends, unless it is the last."
        );
    }
    match holder.map(|s| (s, Standing::of(s))) {
        Some((_, Standing::Cordoned)) => {
            return format!(
                "{begin}: {at} is cordoned, and keeps the edges that it has. To send them home: meshctl shard drain {at}"
            );
        }
        Some((_, Standing::Draining)) => {
            return format!("{begin}: {at} is draining, and will send it there within a minute or so.");
        }
        Some((shard, Standing::Serving)) if shard.epoch != ring.epoch() => {
            return format!(
                "{begin}: {at} goes by epoch {} and does not know yet of epoch {}. If that lasts, it has lost touch with \
                 control; its /readyz says more.",
                shard.epoch,
                ring.epoch()
            );
        }
        Some((_, Standing::Serving | Standing::Dead)) | None => {}
    }
    format!(
        "{begin}. Moves take their time after a change of the ring, some 50 edges per second. If it stays, {owner} was full, \
         or the edge does not reach {owner} at {}: its log says so. Streams find it through {owner} all the same.",
        ring.member(owner).map(|m| m.addresses.join(", ")).unwrap_or_default()
    )
}

fn facts(explained: &Explained) -> Table {
    let mut facts = Table::of_facts();
    facts.fact("edge", explained.edge.as_str());
    facts.fact("position", format!("0x{} on the circle, {}", explained.position, place(&explained.position)));
    facts.fact("epoch", explained.epoch.to_string());
    facts.fact("owner", Cell::or_dash(explained.owner.as_ref()));
    let next: Vec<_> = explained.next.iter().map(ShardId::as_str).collect();
    facts.fact("then", Cell::or_dash((!next.is_empty()).then(|| next.join(", "))));
    facts.fact("now at", Cell::or_dash(explained.at.as_ref()));
    facts
}

/// A position as a part of the whole way round.
fn place(position: &str) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits for people")]
    let part = u64::from_str_radix(position, 16).unwrap_or(0) as f64 / 2.0_f64.powi(64);
    text::percent(part)
}

#[cfg(test)]
mod tests {
    use proto::ring::{Member, RingSpec};
    use serde_json::json;

    use super::*;

    fn ring(shards: &[&str]) -> Ring {
        let member = |name: &&str| Member {
            shard: name.parse().unwrap(),
            addresses: vec![format!("{name}.test:7400")],
            weight: 100,
        };
        Ring::new(RingSpec { epoch: 9, members: shards.iter().map(member).collect() })
    }

    fn edge(at: Option<&str>) -> EdgeView {
        let presence = at.map(|shard| {
            json!({"edge": "shop-1", "shard": shard, "since": 1, "address": "192.0.2.7:1", "version": "1",
                   "services": [], "rtt_us": 1, "streams": 0})
        });
        serde_json::from_value(json!({"name": "shop-1", "site": null, "enrolled": 0, "not_after": 1, "revoked": false,
                                      "presence": presence, "last_seen": 5}))
        .unwrap()
    }

    fn shard(name: &str, change: serde_json::Value) -> ShardView {
        let mut view = json!({"name": name, "addresses": [], "version": "1", "edges": 1, "last_seen": 1, "alive": true,
                              "epoch": 9});
        view.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        serde_json::from_value(view).unwrap()
    }

    /// With five shards, shop-1 belongs to shard-3 (the table of proto's ring says so).
    #[test]
    fn an_edge_that_is_not_at_home_is_explained() {
        let names = ["shard-1", "shard-2", "shard-3", "shard-4", "shard-5"];
        let ring = ring(&names);
        let why = |at: Option<&str>, shards: &[ShardView]| {
            explain(&ring, "shop-1".parse().unwrap(), Some(&edge(at)), shards).why
        };
        let all = || names.map(|name| shard(name, json!({})));
        let with = |name: &str, change: serde_json::Value| {
            all().map(|s| if s.name.as_str() == name { shard(name, change.clone()) } else { s })
        };
        assert_eq!(why(Some("shard-3"), &all()), "It is at shard-3, where it belongs.");
        assert!(why(Some("shard-1"), &all()).contains("does not reach shard-3 at shard-3.test:7400"));
        assert!(why(Some("shard-1"), &with("shard-1", json!({"order": "cordon"}))).contains("shard-1 is cordoned"));
        assert!(why(Some("shard-1"), &with("shard-1", json!({"state": "draining"}))).contains("is draining"));
        assert!(why(Some("shard-1"), &with("shard-1", json!({"epoch": 8}))).contains("goes by epoch 8"));
        assert!(why(Some("shard-1"), &with("shard-3", json!({"alive": false}))).contains("which is silent"));
        assert!(why(None, &all()).contains("not connected to any shard: a shard saw it"));
    }

    #[test]
    fn an_edge_has_a_place_before_it_is_there() {
        let ring = ring(&["shard-1", "shard-2", "shard-3", "shard-4", "shard-5"]);
        let explained = explain(&ring, "shop-1".parse().unwrap(), None, &[]);
        assert_eq!(explained.owner.as_ref().unwrap().as_str(), "shard-3");
        assert_eq!((explained.next.len(), explained.home), (4, false));
        assert!(explained.why.contains("No edge shop-1 is enrolled"));
        let text = facts(&explained).render(false);
        assert!(text.contains("position  0xf78aa142b2814207 on the circle, 96.7 %\n"), "{text}");
        let nobody = explain(&Ring::default(), "shop-1".parse().unwrap(), Some(&edge(Some("shard-1"))), &[]);
        assert!(nobody.owner.is_none() && !nobody.home && nobody.why.contains("The ring is empty"));
    }
}
