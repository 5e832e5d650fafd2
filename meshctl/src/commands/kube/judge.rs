//! What can be said without trying anything: from what control and Kubernetes know. Pure.

use std::collections::BTreeMap;

use proto::{
    api::{EdgeView, ShardView},
    book::{AddressKind, Book, BookSpec},
    code::RefuseCode,
    id::EdgeId,
    policy::{Decision, Place, Policy},
    principal::Principal,
    target::{HostPort, Target},
};

use super::{
    check::Check,
    cluster::{Apiserver, Node},
    is_mine,
};
use crate::{commands::shard::Standing, text};

/// All that is known.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) edges: Vec<EdgeView>,
    pub(super) shards: Vec<ShardView>,
    pub(super) policy: Policy,
    pub(super) nodes: Vec<Node>,
    pub(super) apiserver: Option<Apiserver>,
    /// In the order in which kube-apiserver takes them.
    pub(super) types: Vec<AddressKind>,
    /// The annotation that names a node's edge.
    pub(super) annotation: String,
    /// In seconds since 1970.
    pub(super) now: i64,
}

/// A node, and what there is to say of it.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) name: String,
    pub(super) checks: Vec<Check>,
    /// How to get there, if nothing speaks against trying.
    pub(super) way: Option<Way>,
}

/// The way to a kubelet.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) edge: EdgeId,
    pub(super) shard: String,
    /// What kube-apiserver asks the door for.
    pub(super) dialled: HostPort,
}

impl Facts {
    /// What concerns the whole cluster.
    pub(super) fn whole(&self) -> Vec<Check> {
        let mut checks = vec![self.shards_serve()];
        checks.extend(self.selector());
        checks
    }

    fn shards_serve(&self) -> Check {
        let serving = self.shards.iter().filter(|s| Standing::of(s) == Standing::Serving).count();
        let says = format!("{serving} of {} serve", text::counted(self.shards.len() as u64, "shard"));
        if serving > 0 {
            return Check::ok("shards", "", says);
        }
        Check::fail("shards", "", says, "start a shard; 'meshctl shard ls' shows those that were there")
    }

    fn selector(&self) -> Option<Check> {
        let types = self.types.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(",");
        Some(match &self.apiserver {
            None => Check::skip(
                "apiserver",
                "",
                format!("its command line cannot be seen; taking nodes by their addresses in the order {types}"),
            ),
            Some(Apiserver { selector: Some(file), .. }) => {
                Check::ok("apiserver", "", format!("it goes by {file}, and takes nodes by {types}"))
            }
            Some(Apiserver { selector: None, .. }) => Check::fail(
                "apiserver",
                "",
                "it runs without --egress-selector-config-file, and so dials nodes directly".into(),
                "give it one of deploy/egress (docs/kubernetes.md)",
            ),
        })
    }

    /// What concerns each node that was asked for.
    pub(super) fn each(&self) -> Vec<Judged> {
        let edges: BTreeMap<&str, &EdgeView> = self.edges.iter().map(|e| (e.name.as_str(), e)).collect();
        let named: Vec<_> = self.nodes.iter().map(|node| self.edge_of(node, &edges)).collect();
        let nodes = self.nodes.iter().zip(&named);
        let book = Book::new(BookSpec {
            nodes: nodes
                .map(|(node, edge)| proto::book::Node {
                    name: node.name.clone(),
                    edge: edge.as_ref().ok().map(|e| e.name.clone()),
                    addresses: node.addresses.clone(),
                    kubelet_port: node.kubelet_port,
                    pod_cidrs: Vec::new(),
                })
                .collect(),
            ..BookSpec::default()
        });
        let mut used: BTreeMap<&EdgeId, Vec<&str>> = BTreeMap::new();
        for (node, edge) in self.nodes.iter().zip(&named) {
            if let Ok(edge) = edge {
                used.entry(&edge.name).or_default().push(&node.name);
            }
        }
        let wanted = self.nodes.iter().zip(&named).filter(|(node, _)| node.wanted);
        wanted
            .map(|(node, edge)| match edge {
                Ok(edge) => self.judge(node, edge, &book, used.get(&edge.name).map_or(&[][..], Vec::as_slice)),
                Err(check) => Judged { name: node.name.clone(), checks: vec![(**check).clone()], way: None },
            })
            .collect()
    }

    /// The edge that a node is, as control decides it: by the annotation, else by the name.
    fn edge_of<'a>(&self, node: &Node, edges: &BTreeMap<&str, &'a EdgeView>) -> Result<&'a EdgeView, Box<Check>> {
        let wrong = |says: String, remedy: String| Err(Box::new(Check::fail("node", &node.name, says, remedy)));
        let key = &self.annotation;
        let annotated = node.annotations.get(key).map(|edge| edge.trim());
        if annotated == Some("") {
            let says = format!("{key} is empty, so that it is no edge, and kube-apiserver does not reach it");
            let remedy = format!("kubectl annotate node {} {key}-", node.name);
            return Err(Box::new(Check::warn("node", &node.name, says, remedy)));
        }
        let name = annotated.unwrap_or(&node.name);
        match edges.get(name) {
            Some(edge) if edge.revoked => wrong(
                format!("edge {name} is revoked"),
                format!("meshctl token create --edge --name {name} --replace, and let the node join with that line"),
            ),
            Some(edge) => Ok(edge),
            None if annotated.is_some() => wrong(
                format!("{key} names edge {name}, and no such edge is enrolled"),
                format!("meshctl token create --edge --name {name}, and let the node join with that line"),
            ),
            None => wrong(
                format!("no edge is called {name}, and the annotation {key} names no other"),
                format!(
                    "let it join under its own name (meshctl token create --edge --name {name}), or kubectl annotate node \
                     {name} {key}=EDGE"
                ),
            ),
        }
    }

    fn judge(&self, node: &Node, edge: &EdgeView, book: &Book, sharers: &[&str]) -> Judged {
        let mut checks = Vec::new();
        if let [_, _, ..] = sharers {
            let says = format!("edge {} stands for {}", edge.name, sharers.join(" and "));
            let remedy = format!("a machine is one node: take {} off all but one", self.annotation);
            checks.push(Check::fail("node", &node.name, says, remedy));
        }
        checks.extend(self.offline(node, edge));
        let dialled = self.dialled(node, edge, book).map_err(|check| checks.push(*check)).ok();
        checks.extend(self.denied(node, edge));
        if let Some(why) = &node.not_ready {
            let says = format!("Kubernetes takes it for not ready: {why}");
            checks.push(Check::warn("node", &node.name, says, "look at kubelet on the machine"));
        }
        let shard = edge.presence.as_ref().map(|p| p.shard.to_string());
        let well = checks.iter().all(|c| c.verdict != super::Verdict::Fail);
        let way = shard.zip(dialled).filter(|_| well);
        let way = way.map(|(shard, dialled)| Way { edge: edge.name.clone(), shard, dialled });
        Judged { name: node.name.clone(), checks, way }
    }

    fn offline(&self, node: &Node, edge: &EdgeView) -> Option<Check> {
        if edge.presence.is_some() {
            return None;
        }
        let seen = match edge.last_seen {
            Some(seen) => format!("a shard saw it {} ago", text::age(seen, self.now)),
            None => "no shard has ever seen it".to_owned(),
        };
        let says = format!("edge {} is offline: {seen}", edge.name);
        Some(Check::fail("edge", &node.name, says, "look at mesh-edge on the machine: its log says why"))
    }

    /// What kube-apiserver asks the door for, if that leads to this node and to no other.
    fn dialled(&self, node: &Node, edge: &EdgeView, book: &Book) -> Result<HostPort, Box<Check>> {
        let wrong = |says: String, remedy: &str| Box::new(Check::fail("address", &node.name, says, remedy));
        let Some(host) = node.dialled(&self.types) else {
            return Err(wrong(
                "it has no address of any type that kube-apiserver takes".into(),
                "give kubelet --node-ip",
            ));
        };
        let to = HostPort::new(host, node.kubelet_port)
            .map_err(|e| wrong(e.to_string(), "kubelet's --hostname-override or --node-ip is wrong"))?;
        match book.resolve(host, node.kubelet_port, 0) {
            Ok(found) if found.edge == edge.name => Ok(to),
            Ok(found) => {
                let says = format!("{host} leads to edge {} and not to {}", found.edge, edge.name);
                Err(wrong(says, "give each node a name and an address of its own"))
            }
            Err(why) => Err(wrong(why.to_string(), "names are unique where addresses are not; see above")),
        }
    }

    fn denied(&self, node: &Node, edge: &EdgeView) -> Option<Check> {
        let port = node.kubelet_port;
        let to = HostPort { host: "localhost".into(), port };
        let target = Target::Tcp { edge: edge.name.clone(), to };
        let place = Place { edge: &edge.name, site: edge.site.as_ref(), service: None, port: Some(port), labels: None };
        match self.policy.decide(&Principal::Apiserver, &target, &place) {
            Decision::Allow { .. } => None,
            Decision::Deny { .. } => Some(Check::fail(
                "policy",
                &node.name,
                format!("no rule lets kube-apiserver reach port {port} of edge {}", edge.name),
                "meshctl policy allow --from apiserver --to 'edge/*' --ports '*'",
            )),
        }
    }
}

/// What it means that a stream of the user's own to kubelet was refused.
pub(super) fn refused(edge: &EdgeId, port: u16, code: RefuseCode, reason: &str) -> Check {
    if is_mine(code) {
        let says = format!("you yourself may not reach port {port} of edge {edge}, so that kubelet was not tried");
        return Check::skip("way", "", says);
    }
    let reason = reason.trim_end_matches('.').to_owned();
    match code {
        RefuseCode::TargetRefused => Check::warn(
            "way",
            "",
            format!("nothing listens at localhost:{port} of edge {edge}"),
            "if kubelet runs there and listens on the node's address alone, that is no fault: only --door tells",
        ),
        RefuseCode::EdgeDenied => Check::fail(
            "way",
            "",
            format!("edge {edge} itself shuts port {port} out: {reason}"),
            "kubelet = true in the edge's configuration, or allow = [\"127.0.0.1:PORT\"] for another port than 10250",
        ),
        RefuseCode::EdgeOffline
        | RefuseCode::LinkLost
        | RefuseCode::NotReady
        | RefuseCode::EdgeUnknown
        | RefuseCode::ServiceUnknown
        | RefuseCode::PolicyDenied
        | RefuseCode::Unauthenticated
        | RefuseCode::BadRequest
        | RefuseCode::TargetTimeout
        | RefuseCode::TargetUnreachable
        | RefuseCode::TargetNameUnknown
        | RefuseCode::LimitReached
        | RefuseCode::Draining
        | RefuseCode::MeshTimeout
        | RefuseCode::Internal
        | RefuseCode::Unsupported
        | RefuseCode::LoopDetected => {
            Check::fail("way", "", format!("{reason} [{code}]"), "'meshctl ping EDGE' shows whether that lasts")
        }
    }
}

#[cfg(test)]
mod tests;
