//! What the edge itself would say: the second of the two who decide. It tells the mesh what it allows, and the very code
//! that decides there decides here.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use mesh_edge::allow::{Allow, Cluster, Local, Over, Plan, Rule};
use proto::{
    api::EdgeView,
    message::Service,
    principal::Principal,
    standing::Standing,
    target::{HostPort, Target},
};
use serde::Serialize;

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AtEdge {
    /// It allows it, by this.
    Allowed(String),
    /// It does not, and why.
    Denied(String),
    /// It cannot be told, and why.
    Unknown(String),
}

/// Decides as the first of these edges would that could serve the target.
pub(super) fn decide(who: &Principal, target: &Target, edges: &[EdgeView]) -> AtEdge {
    let serves = |edge: &&EdgeView| match target {
        Target::Service { name, .. } => {
            edge.presence.iter().flat_map(|at| &at.services).any(|service| service.name == *name)
        }
        Target::Tcp { .. } | Target::Udp { .. } | Target::Probe { .. } => true,
    };
    let Some(edge) = edges.iter().find(serves).or_else(|| edges.first()) else {
        return AtEdge::Unknown("there is no such edge".into());
    };
    let Some(at) = &edge.presence else {
        return AtEdge::Unknown(format!("edge/{} is not connected", edge.name));
    };
    let Some(standing) = &at.standing else {
        return AtEdge::Unknown(format!("edge/{} has not said what it allows; it may be older", edge.name));
    };
    match allow(edge, standing, &at.services) {
        Ok(allow) => plan(&allow, who, target, standing),
        Err(rule) => AtEdge::Unknown(format!("edge/{} allows {rule:?}, which is not understood here", edge.name)),
    }
}

/// The edge's own list, as it told it.
fn allow(edge: &EdgeView, standing: &Standing, services: &[Service]) -> Result<Allow, String> {
    let has = |word: &str| standing.allows.iter().any(|line| line == word);
    let words = ["kubelet", "sshd", "kubernetes"];
    let rules = standing.allows.iter().filter(|line| !words.contains(&line.as_str()));
    let rules: Vec<Rule> = rules.map(|line| line.parse().map_err(|_| line.clone())).collect::<Result<_, _>>()?;
    // Where a service listens is the edge's secret; that it may be reached is not.
    let of = |service: &Service| {
        Some((service.name.clone(), (service.kind, HostPort::new("localhost", service.port).ok()?)))
    };
    let services: BTreeMap<_, _> = services.iter().filter_map(of).collect();
    let local = Local { kubelet: has("kubelet"), sshd: has("sshd") };
    let cluster = Cluster { open: has("kubernetes"), pod_networks: Vec::new() };
    Ok(Allow::new(edge.name.clone(), local, services, rules).with_cluster(cluster))
}

/// What the target is reached over.
const fn over(target: &Target) -> Over {
    match target {
        Target::Udp { .. } => Over::Udp,
        Target::Tcp { .. } | Target::Service { .. } | Target::Probe { .. } => Over::Tcp,
    }
}

fn plan(allow: &Allow, who: &Principal, target: &Target, standing: &Standing) -> AtEdge {
    let cluster = standing.allows.iter().any(|line| line == "kubernetes");
    match allow.plan(target) {
        Ok(Plan::Echo) => AtEdge::Allowed("it echoes to whoever the mesh lets in".into()),
        Ok(Plan::Dial { to, by_address: true, .. } | Plan::Flow { to, by_address: true, .. }) => {
            let over = over(target);
            let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
            match loopback.iter().filter(|_| to.is_loopback()).find_map(|ip| allow.address(*ip, to.port, over)) {
                Some(rule) => AtEdge::Allowed(rule.to_string()),
                None if to.is_loopback() => AtEdge::Denied(allow.denied(&to, over).reason),
                None => AtEdge::Unknown(format!("it depends on what {} resolves to there", to.host)),
            }
        }
        Ok(Plan::Dial { rule, .. } | Plan::Flow { rule, .. }) => AtEdge::Allowed(rule),
        Err(_) if *who == Principal::Apiserver && cluster => AtEdge::Unknown(
            "kube-apiserver may reach the addresses of that machine and of its pods, which it alone knows".into(),
        ),
        Err(_) if standing.allows_more => {
            AtEdge::Unknown("it allows more than it tells, so only trying shows: meshctl why EDGE:PORT".into())
        }
        Err(refusal) => AtEdge::Denied(refusal.reason),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn edge(standing: &serde_json::Value) -> EdgeView {
        serde_json::from_value(json!({
            "name": "shop-1", "site": null, "enrolled": 0, "not_after": 0, "revoked": false, "last_seen": 0,
            "presence": {"edge": "shop-1", "shard": "s", "since": 0, "address": "", "version": "", "rtt_us": 0,
                         "streams": 0, "services": [{"name": "web", "kind": "http", "port": 8080}],
                         "standing": standing},
        }))
        .unwrap()
    }

    #[test]
    fn the_edge_is_asked_by_what_it_told() {
        let alice = Principal::User { name: "alice".parse().unwrap(), groups: vec![] };
        let says = |target: &str, standing: &serde_json::Value| {
            decide(&alice, &target.parse().unwrap(), std::slice::from_ref(&edge(standing)))
        };
        let told = json!({"carrier": "quic", "allows": ["sshd", "10.0.0.0/24:80"]});
        assert!(matches!(says("shop-1:22", &told), AtEdge::Allowed(_)), "{:?}", says("shop-1:22", &told));
        assert!(matches!(says("shop-1/web", &told), AtEdge::Allowed(_)));
        assert!(matches!(says("shop-1:5432", &told), AtEdge::Denied(_)));
        let local = json!({"carrier": "quic", "allows": ["127.0.0.1:5432", "10.0.0.0/8:80"]});
        assert_eq!(says("shop-1:5432", &local), AtEdge::Allowed("127.0.0.1:5432".into()));
        assert!(matches!(says("shop-1:80", &local), AtEdge::Denied(_)));
        assert!(matches!(says("shop-1/printer.lan:80", &local), AtEdge::Unknown(_)));
        assert!(matches!(says("shop-1/10.0.0.7:80", &told), AtEdge::Allowed(by) if by.contains("10.0.0.0/24:80")));
        let more = json!({"carrier": "quic", "allows": ["sshd"], "allows_more": true});
        assert!(matches!(says("shop-1:5432", &more), AtEdge::Unknown(_)));
        let nothing = json!(null);
        assert!(matches!(says("shop-1:22", &nothing), AtEdge::Unknown(why) if why.contains("older")));
    }
}
