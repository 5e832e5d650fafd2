//! `meshctl kube`: why kubectl exec and logs would not work.
//!
//! What is asked comes from three sides: control (edges, shards, policy), the cluster (by kubectl, which knows every way
//! to log in that there is), and the way itself: a stream to each kubelet, and the egress door if one is named.

use std::time::Duration;

use clap::{Args, Subcommand};
use proto::{
    api::{EdgeView, ShardView},
    book::AddressKind,
    code::RefuseCode,
    id::EdgeId,
    policy::{Policy, Rule},
    target::{HostPort, Target},
};
use runtime::{clock::unix_now, link::Link};
use serde::Serialize;
use tokio::{task::JoinSet, time::Instant};

use self::{
    check::{Check, Verdict},
    cluster::{Apiserver, Kubectl, Node},
    door::{Door, DoorArgs},
    judge::{Facts, Judged},
};
use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    reach::{self, OpenError},
    session::Session,
    table::{Cell, Table, Tone},
    text,
};

mod check;
mod cluster;
mod door;
mod judge;

/// Nodes that are tried at once.
const AT_ONCE: usize = 32;

/// Looks after the mesh of a Kubernetes.
#[derive(Debug, Args)]
pub(crate) struct KubeArgs {
    #[command(subcommand)]
    command: KubeCommand,
}

#[derive(Debug, Subcommand)]
enum KubeCommand {
    Check(CheckArgs),
}

/// Finds out why 'kubectl exec' and 'kubectl logs' would not work, and says what to do.
///
/// It needs a login (meshctl login) and kubectl with a working kubeconfig. The whole way is only tried if the egress door
/// is named, since nobody but kube-apiserver may go through it: on a control-plane host its socket, elsewhere its address
/// with the certificate that kube-apiserver shows.
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 nothing is wrong, 1 something is.

Examples:
  meshctl kube check
  meshctl kube check --node shop-17
  meshctl kube check --door /run/causeway/egress.sock
  meshctl kube check --door 10.96.0.131:8131 --door-ca /etc/kubernetes/causeway/ca.crt --door-name causeway-egress \\
    --door-cert /etc/kubernetes/pki/apiserver-kubelet-client.crt --door-key /etc/kubernetes/pki/apiserver-kubelet-client.key
  meshctl kube check -o json | jq '.checks[] | select(.verdict == \"fail\")'")]
struct CheckArgs {
    /// Only this node; can be repeated.
    #[arg(long = "node", value_name = "NODE")]
    nodes: Vec<String>,
    #[command(flatten)]
    kubectl: Kubectl,
    /// The annotation that names a node's edge, as in control's configuration.
    #[arg(long, default_value = "causeway.dev/edge", value_name = "KEY")]
    annotation: String,
    /// kube-apiserver's --kubelet-preferred-address-types; read from its pod if that can be seen.
    #[arg(long, value_delimiter = ',', value_parser = cluster::address_kind, value_name = "TYPES")]
    address_types: Vec<AddressKind>,
    #[command(flatten)]
    door: DoorArgs,
}

/// All that was found, for programs.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether nothing has failed.
    ok: bool,
    checks: Vec<Check>,
}

/// Does what is asked for.
///
/// # Errors
/// If something is wrong, or nobody is logged in.
pub(crate) async fn run(context: &Context, args: KubeArgs) -> Result<(), Failure> {
    let KubeCommand::Check(args) = args.command;
    let door = args.door.open()?;
    let session = context.session().await?;
    let report = Report::new(look(&session, args, door).await);
    match context.form {
        Form::Json => out::json(&report)?,
        Form::Table => out::table(&report.table())?,
    }
    match report.checks.iter().filter(|c| c.verdict == Verdict::Fail).count() as u64 {
        0 => Ok(()),
        failed => Err(Failure::Failed(format!("{} failed", text::counted(failed, "check")))),
    }
}

/// Goes on for as long as something can be found out.
async fn look(session: &Session, args: CheckArgs, door: Option<Door>) -> Vec<Check> {
    let (cluster, control) = tokio::join!(args.kubectl.look(), ask(session));
    let mut checks = Vec::new();
    let facts = match control {
        Ok((edges, shards, policy)) => {
            let says = format!("{} answers", session.api().address());
            checks.push(Check::ok("control", "", says));
            Some((edges, shards, policy))
        }
        Err(failure) => {
            checks.push(Check::fail("control", "", failure.to_string(), "look at mesh-control and the way to it"));
            None
        }
    };
    let (mut nodes, apiserver) = match cluster {
        Ok(cluster) => cluster,
        Err(why) => {
            let remedy = "'kubectl get nodes' must work here; --kubeconfig and --context choose another cluster";
            checks.push(Check::fail("kubernetes", "", why, remedy));
            return checks;
        }
    };
    checks.push(Check::ok("kubernetes", "", format!("{} in the cluster", text::counted(nodes.len() as u64, "node"))));
    let Some((edges, shards, policy)) = facts else { return checks };
    let wanted = |node: &Node| args.nodes.is_empty() || args.nodes.contains(&node.name);
    for name in args.nodes.iter().filter(|name| !nodes.iter().any(|n| n.name == **name)) {
        checks.push(Check::fail("node", name, "the cluster has no such node".into(), "'kubectl get nodes' lists them"));
    }
    for node in &mut nodes {
        node.wanted = wanted(node);
    }
    let types = types(args.address_types, apiserver.as_ref());
    let facts = Facts { edges, shards, policy, nodes, apiserver, types, annotation: args.annotation, now: unix_now() };
    checks.extend(facts.whole());
    let judged = facts.each();
    checks.extend(try_all(session, judged, door).await);
    checks
}

async fn ask(session: &Session) -> Result<(Vec<EdgeView>, Vec<ShardView>, Policy), Failure> {
    let api = session.api();
    let rules: Vec<Rule> = api.get("/v1/policy").await?;
    Ok((api.get("/v1/edges").await?, api.get("/v1/shards").await?, Policy { rules }))
}

fn types(given: Vec<AddressKind>, apiserver: Option<&Apiserver>) -> Vec<AddressKind> {
    match apiserver.and_then(|a| a.address_types.clone()) {
        Some(types) if given.is_empty() => types,
        _ if given.is_empty() => cluster::DEFAULT_TYPES.to_vec(),
        _ => given,
    }
}

/// Tries the way to each node that is well so far, some at a time.
async fn try_all(session: &Session, judged: Vec<Judged>, door: Option<Door>) -> Vec<Check> {
    let link = match session.dial().await {
        Ok(link) => Some(link),
        Err(failure) => {
            let mut checks: Vec<_> = judged.into_iter().flat_map(|j| j.checks).collect();
            let remedy = "people's tools and edges come by the same UDP port: look at firewalls and 'meshctl shard ls'";
            checks.push(Check::fail("way", "", failure.to_string(), remedy));
            return checks;
        }
    };
    let mut checks = Vec::new();
    let mut rest = judged.into_iter();
    loop {
        let mut tasks = JoinSet::new();
        for (number, node) in rest.by_ref().take(AT_ONCE).enumerate() {
            let (link, door) = (link.clone(), door.clone());
            tasks.spawn(async move { (number, try_one(link.as_ref(), node, door.as_ref()).await) });
        }
        if tasks.is_empty() {
            break;
        }
        let mut done = tasks.join_all().await;
        done.sort_by_key(|(number, _)| *number);
        checks.extend(done.into_iter().flat_map(|(_, found)| found));
    }
    if let Some(link) = &link {
        reach::goodbye(link).await;
    }
    checks
}

async fn try_one(link: Option<&Link>, mut node: Judged, door: Option<&Door>) -> Vec<Check> {
    let Some(way) = node.way.take() else { return node.checks };
    let mut tried = Vec::new();
    let mut well = format!("is {} at {}", way.edge, way.shard);
    let through = match door {
        Some(door) => Some(door.dial(&way.dialled).await),
        None => None,
    };
    match through {
        Some(Ok(took)) => well.push_str(&format!("; {} through the door in {}", way.dialled, text::millis(took))),
        Some(Err(why)) => tried.push(door::explain(&node.name, &way.dialled, &why)),
        None => match probe(link, &way.edge, way.dialled.port).await {
            Ok(says) => well.push_str(&says),
            Err(check) => tried.push(Check { about: node.name.clone(), ..check }),
        },
    }
    node.checks.append(&mut tried);
    if node.checks.iter().all(|c| c.verdict == Verdict::Ok) {
        node.checks.push(Check::ok("node", &node.name, well));
    }
    node.checks
}

/// A stream to kubelet as the user who asks; what only kube-apiserver may do is not tried.
async fn probe(link: Option<&Link>, edge: &EdgeId, port: u16) -> Result<String, Check> {
    let Some(link) = link else { return Ok(String::new()) };
    let target = Target::Tcp { edge: edge.clone(), to: HostPort { host: "localhost".into(), port } };
    let begun = Instant::now();
    let Err(error) = reach::open(link, &target).await else {
        return Ok(format!("; kubelet answers through the mesh in {}", text::millis(begun.elapsed())));
    };
    let OpenError::Refused(refusal) = &error else {
        return Err(Check::fail("way", "", error.to_string(), "try again; 'meshctl ping EDGE' shows whether it lasts"));
    };
    Err(judge::refused(edge, port, refusal.code, &refusal.reason))
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        Self { ok: checks.iter().all(|c| c.verdict != Verdict::Fail), checks }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["CHECK", "OF", "VERDICT", "FINDING"]);
        for check in &self.checks {
            let tone = match check.verdict {
                Verdict::Ok => Tone::Good,
                Verdict::Warn => Tone::Plain,
                Verdict::Fail => Tone::Bad,
                Verdict::Skip => Tone::Dim,
            };
            let about = (!check.about.is_empty()).then_some(&check.about);
            let finding = match &check.remedy {
                Some(remedy) => format!("{}. Remedy: {remedy}", check.says.trim_end_matches('.')),
                None => check.says.clone(),
            };
            table.row(vec![
                check.check.into(),
                Cell::or_dash(about),
                Cell::toned(check.verdict.as_str(), tone),
                finding.into(),
            ]);
        }
        table
    }
}

/// How long kubectl and the door may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a refusal is about the one who asks and not about the way.
const fn is_mine(code: RefuseCode) -> bool {
    matches!(code, RefuseCode::PolicyDenied | RefuseCode::Unauthenticated)
}
