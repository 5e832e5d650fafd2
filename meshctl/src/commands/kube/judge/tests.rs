//! What is said of clusters that are well and of those that are not.

use proto::book::NodeAddress;
use serde_json::json;

use super::{super::Verdict, *};

fn edge(name: &str, shard: Option<&str>) -> EdgeView {
    let presence = shard.map(|shard| {
        json!({"edge": name, "shard": shard, "since": 0, "address": "", "version": "", "services": [], "rtt_us": 0,
               "streams": 0})
    });
    serde_json::from_value(json!({
        "name": name, "site": null, "enrolled": 0, "not_after": 9_000, "revoked": false, "last_seen": 820,
        "presence": presence,
    }))
    .unwrap()
}

fn node(name: &str, ip: &str) -> Node {
    Node {
        name: name.into(),
        annotations: BTreeMap::new(),
        addresses: vec![
            NodeAddress { kind: AddressKind::Hostname, address: name.into() },
            NodeAddress { kind: AddressKind::InternalIP, address: ip.into() },
        ],
        kubelet_port: 10250,
        hostname: None,
        not_ready: None,
        wanted: true,
    }
}

/// Two nodes of two sites with one address, and all is well since they are dialled by name.
fn facts() -> Facts {
    let rule = json!([{"name": "kas", "from": ["apiserver"], "to": ["edge/*"], "ports": ["*"]}]);
    let shard = json!({"name": "shard-0", "addresses": [], "version": "", "edges": 2, "last_seen": 0, "alive": true});
    Facts {
        edges: vec![edge("a", Some("shard-0")), edge("b", Some("shard-0"))],
        shards: vec![serde_json::from_value(shard).unwrap()],
        policy: serde_json::from_value(rule).unwrap(),
        nodes: vec![node("a", "10.0.0.5"), node("b", "10.0.0.5")],
        apiserver: Some(Apiserver { selector: Some("/egress.yaml".into()), address_types: None }),
        types: vec![AddressKind::Hostname, AddressKind::InternalIP],
        annotation: "causeway.dev/edge".into(),
        now: 1000,
    }
}

/// The only thing that is wrong, as `check about: says -> remedy`.
fn wrong(facts: &Facts) -> String {
    let judged = facts.each();
    let all = facts.whole().into_iter().chain(judged.into_iter().flat_map(|j| j.checks));
    let said: Vec<_> = all
        .filter(|c| matches!(c.verdict, Verdict::Fail | Verdict::Warn))
        .map(|c| format!("{} {}: {} -> {}", c.check, c.about, c.says, c.remedy.unwrap_or_default()))
        .collect();
    said.join("\n")
}

fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn a_cluster_that_is_well_can_be_tried() {
    let facts = facts();
    assert_eq!(wrong(&facts), "");
    let ways: Vec<_> = facts.each().into_iter().map(|j| j.way.unwrap().dialled.to_string()).collect();
    assert_eq!(ways, ["a:10250", "b:10250"]);
}

#[test]
fn an_address_that_two_nodes_have_is_told_with_the_flag_that_helps() {
    let mut facts = facts();
    facts.types.reverse();
    let said = wrong(&facts);
    assert_has(&said, &["address a: ambiguous node address 10.0.0.5: a, b", "Hostname"]);
    assert!(facts.each().iter().all(|j| j.way.is_none()), "there is nothing to try");
    facts.nodes[1].wanted = false;
    assert_eq!(facts.each().len(), 1, "a node that nobody asked about still counts");
    assert_has(&wrong(&facts), &["ambiguous"]);
}

#[test]
fn a_node_without_an_edge_is_told_how_to_get_one() {
    let mut facts = facts();
    facts.edges.pop();
    assert_has(&wrong(&facts), &["node b: no edge is called b", "--edge --name b", "causeway.dev/edge=EDGE"]);
    facts.nodes[1].annotations.insert("causeway.dev/edge".into(), "c".into());
    assert_has(&wrong(&facts), &["names edge c, and no such edge is enrolled"]);
    facts.nodes[1].annotations.insert("causeway.dev/edge".into(), "a".into());
    assert_has(&wrong(&facts), &["node a: edge a stands for a and b", "node b: edge a stands for a and b"]);
    facts.nodes[1].annotations.insert("causeway.dev/edge".into(), " ".into());
    assert_has(&wrong(&facts), &["it is no edge", "kubectl annotate node b causeway.dev/edge-"]);
    facts.edges[0].revoked = true;
    assert_has(&wrong(&facts), &["node a: edge a is revoked", "--replace"]);
}

#[test]
fn an_edge_that_is_offline_is_told_since_when() {
    let mut facts = facts();
    facts.edges[0].presence = None;
    assert_has(&wrong(&facts), &["edge a: edge a is offline: a shard saw it 3m ago"]);
    facts.edges[0].last_seen = None;
    assert_has(&wrong(&facts), &["no shard has ever seen it"]);
    assert!(facts.each()[0].way.is_none() && facts.each()[1].way.is_some());
}

#[test]
fn policy_shards_and_the_selector_are_looked_at() {
    let mut facts = facts();
    facts.policy.rules[0].ports = vec!["443".parse().unwrap()];
    assert_has(&wrong(&facts), &["policy a: no rule lets kube-apiserver reach port 10250", "--from apiserver"]);
    facts.shards[0].alive = false;
    assert_has(&wrong(&facts), &["shards : 0 of 1 shard serve"]);
    facts.apiserver = Some(Apiserver::default());
    assert_has(&wrong(&facts), &["without --egress-selector-config-file"]);
    facts.apiserver = None;
    assert!(!wrong(&facts).contains("apiserver :"), "what cannot be seen is no fault");
}

#[test]
fn a_refusal_of_the_users_own_is_not_the_clusters_fault() {
    let a = "a".parse().unwrap();
    let verdict = |code| refused(&a, 10250, code, "because").verdict;
    assert_eq!(verdict(RefuseCode::PolicyDenied), Verdict::Skip);
    assert_eq!(verdict(RefuseCode::TargetRefused), Verdict::Warn);
    assert_eq!(verdict(RefuseCode::EdgeDenied), Verdict::Fail);
    assert_eq!(verdict(RefuseCode::EdgeOffline), Verdict::Fail);
}
