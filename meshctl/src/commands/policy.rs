//! `meshctl policy`: who may reach what.

use clap::{Args, Subcommand};
use proto::{
    api::EdgeView,
    id::GroupName,
    message::Service,
    policy::{Decision, Object, Place, Policy, Ports, Rule, Subject},
    principal::Principal,
    target::Target,
};
use serde_json::{Value, json};

use self::at_edge::AtEdge;
use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    table::{Cell, Table},
};

/// Shows, changes and tests the rules of who may reach what.
///
/// Nothing is allowed that no rule allows.
#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Lists the rules.
    Ls,
    Allow(AllowArgs),
    /// Removes a rule.
    Rm {
        /// The rule.
        #[arg(value_parser = rule_name)]
        name: String,
    },
    Test(TestArgs),
}

/// Adds a rule, or replaces the one of that name.
#[derive(Debug, Args)]
#[command(after_help = "Who:   user/NAME group/NAME edge/NAME site/NAME door/NAME apiserver
What:  edge/NAME site/NAME service/NAME label/KEY=VALUE
Names may end in '*', which then stands for anything.

Examples:
  meshctl policy allow --from group/ops --to 'edge/shop-*' --ports 22,10250
  meshctl policy allow --from door/http --to service/web
  meshctl policy allow --name berlin --from site/berlin --to site/berlin --ports '*'")]
pub(crate) struct AllowArgs {
    /// Its name; made from the rest if none is given.
    #[arg(long, value_parser = rule_name)]
    name: Option<String>,
    /// Who may; one or more.
    #[arg(long, required = true, num_args = 1.., value_delimiter = ',', value_name = "WHO")]
    from: Vec<Subject>,
    /// What they may reach; one or more.
    #[arg(long, required = true, num_args = 1.., value_delimiter = ',', value_name = "WHAT")]
    to: Vec<Object>,
    /// On which ports: 22, 8000-8100, '*'. Can be left out if everything in --to is a service.
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    ports: Vec<Ports>,
}

/// Says whether somebody may reach a target, and by which rule.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 allowed, 3 refused. Goes by the rules of the mesh, and by what the edge says that it allows by
itself; opens nothing.

Examples:
  meshctl policy test --from user/alice --group ops shop-1:22
  meshctl policy test --from door/http shop-1/web"
)]
pub(crate) struct TestArgs {
    /// Who: user/NAME, edge/NAME, door/NAME or apiserver.
    #[arg(long, value_name = "WHO")]
    from: String,
    /// A group of the user; can be repeated.
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<GroupName>,
    /// EDGE:PORT, EDGE/HOST:PORT, EDGE/SERVICE or */SERVICE.
    target: Target,
}

fn rule_name(text: &str) -> Result<String, String> {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !text.is_empty() && text.len() <= MAX_NAME && text.bytes().all(fits) && !text.starts_with('-') {
        Ok(text.to_owned())
    } else {
        Err(format!("a rule's name has a-z, 0-9 and '-' inside, and at most {MAX_NAME} of them"))
    }
}

mod at_edge;

/// Longest name of a rule in bytes.
const MAX_NAME: usize = 63;

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no; or, as the answer of a test, if nobody allows it.
pub(crate) async fn run(context: &Context, args: PolicyArgs) -> Result<(), Failure> {
    match args.command {
        PolicyCommand::Ls => {
            let rules: Vec<Rule> = context.session().await?.api().get("/v1/policy").await?;
            match context.form {
                Form::Json => out::json(&rules),
                Form::Table => out::table(&table(&rules)),
            }
        }
        PolicyCommand::Allow(args) => allow(context, args).await,
        PolicyCommand::Rm { name } => {
            let session = context.session().await?;
            session.api().delete::<Value>(&format!("/v1/policy/{name}")).await?;
            match context.form {
                Form::Json => out::json(&json!({ "removed": name })),
                Form::Table => out::line(&format!("Rule {name} is removed.")),
            }
        }
        PolicyCommand::Test(args) => test(context, args).await,
    }
}

async fn allow(context: &Context, args: AllowArgs) -> Result<(), Failure> {
    let mut rule =
        Rule { name: args.name.clone().unwrap_or_default(), from: args.from, to: args.to, ports: args.ports };
    rule.check().map_err(|e| Failure::Usage(format!("{e}; add --ports, for example --ports 22 or --ports '*'")))?;
    let session = context.session().await?;
    let rules: Vec<Rule> = session.api().get("/v1/policy").await?;
    if args.name.is_none() {
        rule.name = free_name(&rule, &rules);
    }
    let was = rules.iter().find(|r| r.name == rule.name);
    session.api().put::<Value>(&format!("/v1/policy/{}", rule.name), &rule).await?;
    match (context.form, was) {
        (Form::Json, _) => out::json(&rule),
        (Form::Table, Some(was)) if *was == rule => out::line(&format!("Rule {} was there already.", rule.name)),
        (Form::Table, Some(_)) => out::line(&format!("Rule {} is replaced.", rule.name)),
        (Form::Table, None) => out::line(&format!("Rule {} is added.", rule.name)),
    }
}

/// A name that says what the rule does; the one that the same rule already has, if it is there.
fn free_name(rule: &Rule, rules: &[Rule]) -> String {
    let words = |text: String| {
        let plain: String = text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        plain.split('-').filter(|w| !w.is_empty()).collect::<Vec<_>>().join("-").to_ascii_lowercase()
    };
    let first =
        |text: Option<String>| words(text.unwrap_or_default().split('/').next_back().unwrap_or_default().into());
    let (who, what) =
        (first(rule.from.first().map(ToString::to_string)), first(rule.to.first().map(ToString::to_string)));
    let [who, what] = [who, what].map(|w| if w.is_empty() { "any".to_owned() } else { w });
    let base: String = format!("{who}-to-{what}").chars().take(MAX_NAME - 5).collect();
    let base = base.trim_end_matches('-');
    let same = |name: &str| {
        rules.iter().find(|r| r.name == name).is_none_or(|r| Rule { name: name.into(), ..rule.clone() } == *r)
    };
    let names = (1_u32..).map(|n| if n == 1 { base.to_owned() } else { format!("{base}-{n}") });
    // There are fewer rules than numbers.
    names.into_iter().find(|name| same(name)).unwrap_or_default()
}

async fn test(context: &Context, args: TestArgs) -> Result<(), Failure> {
    let who = principal(&args.from, args.groups)?;
    let session = context.session().await?;
    let policy = Policy { rules: session.api().get("/v1/policy").await? };
    let edges = edges_for(&session, &args.target).await?;
    let who = with_site(&session, who).await?;
    let decision = decide(&policy, &who, &args.target, &edges)?;
    let at_edge = match &decision {
        Decision::Allow { .. } => at_edge::decide(&who, &args.target, &edges),
        Decision::Deny { .. } => AtEdge::Unknown("nothing gets that far".into()),
    };
    let (allowed, why) = match (&decision, &at_edge) {
        (Decision::Deny { missing }, _) => (false, missing.clone()),
        (Decision::Allow { rule }, AtEdge::Allowed(by)) => {
            (true, format!("allowed by rule {rule} at the shard, and by the edge itself: {by}"))
        }
        (Decision::Allow { rule }, AtEdge::Denied(why)) => {
            (false, format!("rule {rule} allows it at the shard, and the edge itself does not: {why}"))
        }
        (Decision::Allow { rule }, AtEdge::Unknown(why)) => {
            (true, format!("allowed by rule {rule} at the shard; what the edge says is not known: {why}"))
        }
    };
    match context.form {
        Form::Json => {
            let rule = if let Decision::Allow { rule } = &decision { Some(rule) } else { None };
            out::json(&json!({ "allowed": allowed, "rule": rule, "edge": at_edge, "reason": why }))?;
        }
        Form::Table if allowed => out::line(&format!("{who} may reach {}: {why}", args.target))?,
        Form::Table => {}
    }
    if allowed { Ok(()) } else { Err(Failure::Refused(why)) }
}

fn principal(text: &str, groups: Vec<GroupName>) -> Result<Principal, Failure> {
    let wrong = |why: String| Failure::Usage(format!("--from {text}: {why}"));
    let named = |e: proto::id::InvalidName| wrong(e.to_string());
    let principal = match text.split_once('/') {
        Some(("user", name)) => return Ok(Principal::User { name: name.parse().map_err(named)?, groups }),
        Some(("edge", name)) => Principal::Edge { name: name.parse().map_err(named)?, site: None },
        Some(("door", name)) if !name.is_empty() => Principal::Door { name: name.to_owned() },
        None if text == "apiserver" => Principal::Apiserver,
        Some(_) | None => {
            return Err(wrong("write user/NAME, edge/NAME, door/NAME or apiserver; groups go with --group".into()));
        }
    };
    if groups.is_empty() { Ok(principal) } else { Err(wrong("only users have groups".into())) }
}

/// The edges that could serve the target.
async fn edges_for(session: &Session, target: &Target) -> Result<Vec<EdgeView>, Failure> {
    match target.edge() {
        Some(edge) => Ok(vec![session.api().get(&format!("/v1/edges/{edge}")).await?]),
        None => Ok(session.api().get("/v1/edges").await?),
    }
}

async fn with_site(session: &Session, who: Principal) -> Result<Principal, Failure> {
    let Principal::Edge { name, .. } = who else { return Ok(who) };
    let edge: EdgeView = session.api().get(&format!("/v1/edges/{name}")).await?;
    Ok(Principal::Edge { name, site: edge.site })
}

/// Decides as the shard would, at the first edge where it is allowed.
fn decide(policy: &Policy, who: &Principal, target: &Target, edges: &[EdgeView]) -> Result<Decision, Failure> {
    let mut denied = None;
    for edge in edges {
        let announced = announced(edge, target);
        let (service, port) = match target {
            Target::Tcp { to, .. } | Target::Udp { to, .. } => (None, Some(to.port)),
            Target::Service { name, edge } => match announced {
                Some(service) => (Some(name), Some(service.port)),
                // Where any edge may serve, one that does not announce it never will.
                None if edge.is_none() => continue,
                None => (Some(name), None),
            },
            Target::Probe { .. } => (None, None),
        };
        let place =
            Place { edge: &edge.name, site: edge.site.as_ref(), service, port, labels: announced.map(|s| &s.labels) };
        match policy.decide(who, target, &place) {
            allowed @ Decision::Allow { .. } => return Ok(allowed),
            deny @ Decision::Deny { .. } => denied = denied.or(Some(deny)),
        }
    }
    denied
        .ok_or_else(|| Failure::Failed(format!("no connected edge announces {target}, so there is nothing to decide")))
}

fn announced<'a>(edge: &'a EdgeView, target: &Target) -> Option<&'a Service> {
    let Target::Service { name, .. } = target else { return None };
    edge.presence.iter().flat_map(|p| &p.services).find(|s| s.name == *name)
}

fn table(rules: &[Rule]) -> Table {
    let mut table = Table::new(&["NAME", "FROM", "TO", "PORTS"]);
    for rule in rules {
        let list = |items: Vec<String>| items.join(",");
        let ports = list(rule.ports.iter().map(ToString::to_string).collect());
        table.row(vec![
            rule.name.as_str().into(),
            list(rule.from.iter().map(ToString::to_string).collect()).into(),
            list(rule.to.iter().map(ToString::to_string).collect()).into(),
            Cell::or_dash((!ports.is_empty()).then_some(ports)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, from: &str, to: &str, ports: &[&str]) -> Rule {
        Rule {
            name: name.into(),
            from: vec![from.parse().unwrap()],
            to: vec![to.parse().unwrap()],
            ports: ports.iter().map(|p| p.parse().unwrap()).collect(),
        }
    }

    fn edge(name: &str, service: Option<u16>) -> EdgeView {
        let services = service.map(|port| json!({ "name": "web", "kind": "http", "port": port }));
        serde_json::from_value(json!({
            "name": name, "site": "berlin", "enrolled": 0, "not_after": 0, "revoked": false, "last_seen": 0,
            "presence": {"edge": name, "shard": "s", "since": 0, "address": "", "version": "", "rtt_us": 0,
                         "streams": 0, "services": services.into_iter().collect::<Vec<_>>()},
        }))
        .unwrap()
    }

    #[test]
    fn a_name_is_made_from_the_rule_and_never_taken_from_another() {
        let new = rule("", "user/alice", "edge/shop-*", &["22"]);
        assert_eq!(free_name(&new, &[]), "alice-to-shop");
        let other = rule("alice-to-shop", "user/alice", "edge/shop-*", &["80"]);
        assert_eq!(free_name(&new, std::slice::from_ref(&other)), "alice-to-shop-2");
        let same = rule("alice-to-shop-2", "user/alice", "edge/shop-*", &["22"]);
        assert_eq!(free_name(&new, &[other, same]), "alice-to-shop-2");
        assert_eq!(free_name(&rule("", "user/*", "label/tier=front", &[]), &[]), "any-to-tier-front");
        assert!(rule_name(&free_name(&rule("", "apiserver", &format!("edge/{}", "a".repeat(200)), &[]), &[])).is_ok());
    }

    #[test]
    fn a_test_decides_as_the_shard_would() {
        let policy = Policy {
            rules: vec![rule("ops", "group/ops", "edge/shop-*", &["22"]), rule("web", "door/http", "service/web", &[])],
        };
        let alice = principal("user/alice", vec!["ops".parse().unwrap()]).unwrap();
        let door = principal("door/http", vec![]).unwrap();
        let edges = [edge("kiosk-1", None), edge("shop-1", Some(8080))];
        let check = |who, target: &str, edges: &[EdgeView]| decide(&policy, who, &target.parse().unwrap(), edges);
        assert_eq!(check(&alice, "shop-1:22", &edges[1..]).unwrap(), Decision::Allow { rule: "ops".into() });
        assert!(
            matches!(check(&alice, "shop-1:23", &edges[1..]).unwrap(), Decision::Deny { missing } if missing.contains("--ports 23"))
        );
        assert_eq!(check(&door, "*/web", &edges).unwrap(), Decision::Allow { rule: "web".into() });
        assert!(check(&door, "*/nothing", &edges).unwrap_err().to_string().contains("no connected edge announces"));
    }

    #[test]
    fn who_is_read_and_mistakes_are_named() {
        assert_eq!(principal("apiserver", vec![]).unwrap(), Principal::Apiserver);
        assert!(principal("edge/shop-1", vec!["ops".parse().unwrap()]).unwrap_err().to_string().contains("only users"));
        assert!(principal("alice", vec![]).unwrap_err().to_string().contains("write user/NAME"));
    }
}
