//! `meshctl why`: what is wrong with an edge, and what to do. It asks control, tries the edge through a shard, and puts
//! the two together.

use std::{net::SocketAddr, str::FromStr, time::Duration};

use clap::Args;
use mesh_edge::status::Status;
use proto::{
    api::{ApiCode, EdgeView, ShardView},
    id::EdgeId,
    target::Target,
};
use runtime::{api::ApiClientError, clock::unix_now};
use tokio::time::timeout;

use self::judge::{Known, Verdict};
use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    reach,
    session::Session,
    table::Table,
};

mod judge;

/// How long control may take. What it does not say in that time, it does not say.
const ASK: Duration = Duration::from_secs(5);

/// Tells in a sentence what is wrong with an edge, or with the way to something on it, and what to do.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 it is there, 1 there is no such edge, 3 refused by policy or for want of trust, 4 it cannot be reached.

Examples:
  meshctl why shop-1             is the edge there, and if not, why?
  meshctl why shop-1:5432        the same, and whether its port 5432 answers
  meshctl why shop-1/web         the same for its service web
  meshctl why edge/shop-1 -o json
  meshctl why --here             on the edge's own machine: why does it reach nobody?"
)]
pub(crate) struct WhyArgs {
    /// EDGE or edge/EDGE, EDGE:PORT, EDGE/HOST:PORT or EDGE/SERVICE.
    #[arg(required_unless_present = "here")]
    what: Option<Subject>,
    /// Asks the edge of this machine, which knows why it reaches nobody; that needs no login.
    #[arg(long, conflicts_with = "what")]
    here: bool,
    /// Where that edge's admin server is.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7494", requires = "here")]
    admin: SocketAddr,
}

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Subject {
    edge: EdgeId,
    target: Target,
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix("edge/").unwrap_or(text);
        if let Ok(edge) = rest.parse::<EdgeId>() {
            return Ok(Self { target: Target::Probe { edge: edge.clone() }, edge });
        }
        let target: Target = rest.parse().map_err(|e| format!("{text:?}: {e}"))?;
        let edge = match &target {
            Target::Tcp { edge, .. }
            | Target::Udp { edge, .. }
            | Target::Probe { edge }
            | Target::Service { edge: Some(edge), .. } => edge.clone(),
            Target::Service { edge: None, .. } => {
                return Err(format!("{text:?} is any edge with that service; name one: EDGE/SERVICE"));
            }
        };
        Ok(Self { edge, target })
    }
}

/// Asks everybody, and tells.
///
/// # Errors
/// If the edge is not there, with a status that says which way.
pub(crate) async fn run(context: &Context, args: &WhyArgs) -> Result<(), Failure> {
    let Some(Subject { edge, target }) = &args.what else { return here(context, args.admin).await };
    let verdict = conclude(context, edge, target).await?;
    match context.form {
        Form::Json => out::json(&verdict)?,
        Form::Table => show(&verdict)?,
    }
    verdict.status()
}

/// What is wrong with an edge, as a document.
///
/// # Errors
/// If nobody is logged in.
pub(crate) async fn verdict(context: &Context, edge: &EdgeId) -> Result<serde_json::Value, Failure> {
    let verdict = conclude(context, edge, &Target::Probe { edge: edge.clone() }).await?;
    serde_json::to_value(&verdict).map_err(|e| Failure::Failed(e.to_string()))
}

async fn conclude(context: &Context, edge: &EdgeId, target: &Target) -> Result<Verdict, Failure> {
    let session = context.session().await?;
    let (asked, tried) = tokio::join!(timeout(ASK, ask(&session, edge)), attempt(&session, target));
    let (control, known) = match asked {
        Ok(Ok((view, shards))) => (Ok(()), Some((view, shards))),
        Ok(Err(why)) => (Err(why.to_string()), None),
        Err(_) => (Err(format!("{} does not answer", session.api().address())), None),
    };
    let known = Known { edge: edge.clone(), control, known, tried, now: unix_now() };
    Ok(known.judge())
}

/// What the edge of this machine says of itself.
async fn here(context: &Context, admin: SocketAddr) -> Result<(), Failure> {
    let status = Status::ask(admin).await.map_err(|e| Failure::Unreachable(e.to_string()))?;
    match context.form {
        Form::Json => out::json(&status)?,
        Form::Table => out::text(&status.text())?,
    }
    if status.told().connected { Ok(()) } else { Err(Failure::Told(4)) }
}

fn show(verdict: &Verdict) -> Result<(), Failure> {
    out::line(&verdict.sentence)?;
    if let Some(remedy) = &verdict.remedy {
        out::line(remedy)?;
    }
    let mut facts = Table::of_facts();
    for (name, fact) in &verdict.facts {
        facts.fact(name, fact.as_str());
    }
    out::line("")?;
    out::table(&facts)
}

/// What control knows: the edge, if there is one of that name, and the shards.
async fn ask(session: &Session, edge: &EdgeId) -> Result<(Option<EdgeView>, Vec<ShardView>), Failure> {
    let view = match session.api().get(&format!("/v1/edges/{edge}")).await {
        Ok(view) => Some(view),
        Err(ApiClientError::Refused(error)) if error.code == ApiCode::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    Ok((view, session.api().get("/v1/shards").await?))
}

/// Opens a stream as anybody would. Returns through which shard it came, and what the edge says it is connected with.
async fn attempt(session: &Session, target: &Target) -> Result<judge::Reached, Failure> {
    let (link, opened) = session.connect(target).await?;
    let reached = judge::Reached {
        through: link.peer().identity.name.to_string(),
        address: match target {
            Target::Probe { .. } => None,
            Target::Tcp { .. } | Target::Udp { .. } | Target::Service { .. } => Some(opened.address),
        },
    };
    drop(opened.stream);
    reach::goodbye(&link).await;
    Ok(reached)
}

#[cfg(test)]
mod tests {
    use proto::target::HostPort;

    use super::*;

    #[test]
    fn an_edge_is_asked_about_by_name_and_a_target_as_everywhere() {
        let of = |text: &str| text.parse::<Subject>().map(|s| (s.edge.to_string(), s.target));
        let edge: EdgeId = "shop-1".parse().unwrap();
        let probe = Target::Probe { edge: edge.clone() };
        assert_eq!(of("shop-1").unwrap(), ("shop-1".into(), probe.clone()));
        assert_eq!(of("edge/shop-1").unwrap(), ("shop-1".into(), probe));
        let tcp = |host: &str, port| Target::Tcp { edge: edge.clone(), to: HostPort::new(host, port).unwrap() };
        assert_eq!(of("shop-1:22").unwrap().1, tcp("localhost", 22));
        assert_eq!(of("edge/shop-1/10.0.0.5:80").unwrap().1, tcp("10.0.0.5", 80));
        assert_eq!(of("shop-1/web").unwrap().0, "shop-1");
        assert!(of("*/web").unwrap_err().contains("EDGE/SERVICE"));
        assert!(of("-x").is_err());
    }
}
