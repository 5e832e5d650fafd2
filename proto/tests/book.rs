//! The address book: where names and addresses lead, and that changes one by one end where a fresh book begins.

#![allow(clippy::unwrap_used, reason = "tests stop where it is wrong")]

use std::net::IpAddr;

use proptest::prelude::*;
use proto::book::{
    AddressKind, Book, BookChange, BookKeys, BookSpec, Cidr, Endpoint, Node, NodeAddress, ObjectKey, Pod, Service,
    ServicePort,
};

fn node(name: &str, edge: bool, addresses: &[(AddressKind, &str)], cidr: &str) -> Node {
    Node {
        name: name.into(),
        edge: edge.then(|| name.parse().unwrap()),
        addresses: addresses.iter().map(|(kind, a)| NodeAddress { kind: *kind, address: (*a).into() }).collect(),
        kubelet_port: 10250,
        pod_cidrs: vec![cidr.parse().unwrap()],
    }
}

fn pod(name: &str, node: &str, ip: &str, host_network: bool) -> Pod {
    Pod { key: ObjectKey::new("default", name), ips: vec![ip.parse().unwrap()], node: node.into(), host_network }
}

fn service(key: (&str, &str), cluster_ip: &str, endpoints: &[(&str, u16, Option<&str>)]) -> Service {
    let endpoints = endpoints.iter().map(|(ip, port, node)| Endpoint {
        ip: ip.parse().unwrap(),
        port: *port,
        node: node.map(Into::into),
    });
    Service {
        key: ObjectKey::new(key.0, key.1),
        cluster_ips: vec![cluster_ip.parse().unwrap()],
        ports: vec![ServicePort { name: "https".into(), port: 443, endpoints: endpoints.collect() }],
    }
}

/// Two sites that use the same addresses for their nodes, a node in the cloud, and what runs there.
fn cluster() -> Book {
    use AddressKind::{ExternalIP, Hostname, InternalDNS, InternalIP};
    let a = [(Hostname, "edge-a"), (InternalIP, "192.168.1.5"), (ExternalIP, "203.0.113.1")];
    let b = [(Hostname, "EDGE-B.plant"), (InternalIP, "192.168.1.5"), (InternalIP, "fd00::5")];
    let c = [(InternalIP, "192.168.1.7"), (InternalDNS, "c.internal.")];
    let cloud = [(InternalIP, "10.0.0.1")];
    Book::new(BookSpec {
        nodes: vec![
            node("edge-a", true, &a, "10.244.1.0/24"),
            node("edge-b", true, &b, "10.244.2.0/24"),
            node("edge-c", true, &c, "10.244.0.0/16"),
            node("cloud", false, &cloud, "10.243.0.0/24"),
        ],
        pods: vec![
            pod("web", "edge-a", "10.244.1.37", false),
            // A network that lends addresses from one node to another.
            pod("strayed", "edge-b", "10.244.1.38", false),
            pod("proxy", "edge-c", "192.168.1.7", true),
            pod("twin-1", "edge-a", "10.9.0.1", false),
            pod("twin-2", "edge-b", "10.9.0.1", false),
            pod("lost", "gone", "10.8.0.1", false),
        ],
        services: vec![
            service(
                ("kube-system", "metrics"),
                "10.96.0.10",
                &[("10.244.1.37", 8443, None), ("10.244.2.9", 8443, Some("edge-b"))],
            ),
            service(("default", "hook"), "10.96.0.11", &[("10.0.0.1", 1, None), ("10.244.1.38", 2, None)]),
            service(("other", "hook"), "10.96.0.12", &[]),
            service(("default", "cloudy"), "10.96.0.13", &[("10.243.0.9", 9, None)]),
        ],
    })
}

fn found(book: &Book, host: &str, port: u16, turn: u64) -> String {
    match book.resolve(host, port, turn) {
        Ok(r) => format!("{} {}", r.edge, r.to),
        Err(why) => why.to_string(),
    }
}

#[test]
fn names_and_addresses_lead_to_edges() {
    let book = cluster();
    for (host, port, expected) in [
        ("edge-a", 10250, "edge-a 192.168.1.5:10250"),
        ("Edge-B", 10250, "edge-b 192.168.1.5:10250"),
        ("edge-b.plant", 10250, "edge-b 192.168.1.5:10250"),
        ("c.internal", 10250, "edge-c 192.168.1.7:10250"),
        ("192.168.1.7", 10250, "edge-c 192.168.1.7:10250"),
        ("::ffff:192.168.1.7", 9100, "edge-c 192.168.1.7:9100"),
        ("fd00::5", 10250, "edge-b [fd00::5]:10250"),
        // What is outside is not an address of the machine.
        ("203.0.113.1", 10250, "edge-a 192.168.1.5:10250"),
        ("10.244.1.37", 8080, "edge-a 10.244.1.37:8080"),
        ("10.244.1.38", 8080, "edge-b 10.244.1.38:8080"),
        ("10.244.2.200", 80, "edge-b 10.244.2.200:80"),
        ("10.244.77.1", 80, "edge-c 10.244.77.1:80"),
        ("metrics.kube-system.svc", 443, "edge-a 10.244.1.37:8443"),
        ("metrics.kube-system.svc.cluster.local.", 443, "edge-a 10.244.1.37:8443"),
        ("metrics.kube-system", 443, "edge-a 10.244.1.37:8443"),
        ("metrics", 443, "edge-a 10.244.1.37:8443"),
        ("10.96.0.10", 443, "edge-a 10.244.1.37:8443"),
        // The endpoint that is no edge is passed over.
        ("10.96.0.11", 443, "edge-b 10.244.1.38:2"),
    ] {
        assert_eq!(found(&book, host, port, 0), expected, "{host}:{port}");
    }
    assert_eq!(found(&book, "10.96.0.10", 443, 1), "edge-b 10.244.2.9:8443", "in turn");
    assert_eq!(found(&book, "10.96.0.10", 443, u64::MAX - 1), "edge-a 10.244.1.37:8443");
    assert_eq!(book.resolve("10.96.0.10", 443, 0).unwrap().others, 1);
}

#[test]
fn what_is_two_machines_or_none_is_refused_by_name() {
    let book = cluster();
    for (host, port, expected) in [
        (
            "192.168.1.5",
            10250,
            "ambiguous node address 192.168.1.5: edge-a, edge-b; set --kubelet-preferred-address-types=Hostname",
        ),
        (
            "10.9.0.1",
            80,
            "ambiguous pod address 10.9.0.1: edge-a, edge-b; give the sites pod networks that do not overlap",
        ),
        ("hook", 443, "ambiguous service hook: default/hook, other/hook; name the namespace as well"),
        (
            "10.0.0.1",
            10250,
            "10.0.0.1:10250 is on node cloud, which is no edge of the mesh; nothing is dialled past the mesh",
        ),
        ("10.8.0.1", 80, "10.8.0.1:80 is on node gone, which is no edge of the mesh; nothing is dialled past the mesh"),
        ("10.96.0.10", 444, "service kube-system/metrics has no TCP port 444"),
        ("10.96.0.12", 443, "service other/hook has no ready endpoint for port 443"),
        (
            "cloudy.default.svc",
            443,
            "service default/cloudy has no ready endpoint for port 443: 10.243.0.9:9 is on node cloud, which is no edge of the mesh; nothing is dialled past the mesh",
        ),
        ("8.8.8.8", 53, "8.8.8.8:53 is no node, pod or service of the cluster; nothing is dialled past the mesh"),
        ("a.b.c.d.e", 1, "a.b.c.d.e:1 is no node, pod or service of the cluster; nothing is dialled past the mesh"),
        ("localhost", 1, "localhost:1 is no node, pod or service of the cluster; nothing is dialled past the mesh"),
        ("x y", 1, "\"x y\" is neither a host name nor an IP address (IPv6 is written in brackets)"),
        ("edge-a", 0, "\"0\" is not a port; write a number from 1 to 65535"),
    ] {
        assert_eq!(found(&book, host, port, 0), expected, "{host}:{port}");
    }
}

#[test]
fn an_address_is_no_longer_ambiguous_when_one_of_the_two_is_gone() {
    let mut book = cluster();
    book.remove(&BookKeys { nodes: vec!["edge-b".into()], ..BookKeys::default() });
    assert_eq!(found(&book, "192.168.1.5", 10250, 0), "edge-a 192.168.1.5:10250");
    assert!(found(&book, "10.9.0.1", 80, 0).starts_with("ambiguous"), "its pods are still there");
    book.remove(&BookKeys { pods: vec![ObjectKey::new("default", "twin-2")], ..BookKeys::default() });
    assert_eq!(found(&book, "10.9.0.1", 80, 0), "edge-a 10.9.0.1:80");
}

#[test]
fn the_words_of_the_watch() {
    let text = r#"{"fresh":true,"put":{
        "nodes":[{"name":"n","edge":"n","addresses":[{"type":"InternalIP","address":"10.0.0.5"}],"pod_cidrs":["10.244.1.7/24"]}],
        "pods":[{"namespace":"d","name":"p","ips":["10.244.1.9"],"node":"n","host_network":true}],
        "services":[{"namespace":"d","name":"s","cluster_ips":["10.96.0.1"],
            "ports":[{"port":443,"endpoints":[{"ip":"10.244.1.9","port":8443,"node":"n"}]}]}]}}"#;
    let change: BookChange = serde_json::from_str(text).unwrap();
    assert_eq!(change.put.nodes[0].kubelet_port, 10250);
    assert_eq!(change.put.nodes[0].pod_cidrs[0].to_string(), "10.244.1.0/24");
    let again: BookChange = serde_json::from_str(&serde_json::to_string(&change).unwrap()).unwrap();
    assert_eq!(again, change);
    assert_eq!(found(&Book::new(change.put), "s.d.svc", 443, 7), "n 10.244.1.9:8443");
    for bad in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/+8", "fd00::/129", "/8", "x/8"] {
        assert!(bad.parse::<Cidr>().is_err(), "{bad}");
    }
}

const IPS: [&str; 6] = ["10.0.0.1", "10.0.0.2", "10.244.1.1", "10.244.2.1", "fd00::1", "10.96.0.1"];
const NODES: [&str; 4] = ["a", "b", "c", "10.0.0.2"];
const NETS: [&str; 5] = ["10.244.1.0/24", "10.244.0.0/16", "0.0.0.0/0", "fd00::/64", "10.0.0.1/32"];

fn any_ip() -> impl Strategy<Value = IpAddr> {
    proptest::sample::select(&IPS[..]).prop_map(|ip| ip.parse().unwrap())
}

fn any_node_name() -> impl Strategy<Value = String> {
    proptest::sample::select(&NODES[..]).prop_map(str::to_owned)
}

fn any_node() -> impl Strategy<Value = Node> {
    use AddressKind::{ExternalIP, Hostname, InternalIP};
    let address =
        (proptest::sample::select(&[Hostname, InternalIP, ExternalIP][..]), proptest::sample::select(&IPS[..]));
    let addresses = proptest::collection::vec(address, 0..3);
    (any_node_name(), any::<bool>(), addresses, proptest::sample::select(&NETS[..]))
        .prop_map(|(name, edge, addresses, net)| node(&name, edge, &addresses, net))
}

fn any_pod() -> impl Strategy<Value = Pod> {
    (proptest::sample::select(&["p", "q", "r"][..]), any_node_name(), proptest::collection::vec(any_ip(), 0..3))
        .prop_map(|(name, node, ips)| Pod { key: ObjectKey::new("d", name), ips, node, host_network: false })
}

fn any_service() -> impl Strategy<Value = Service> {
    let endpoint =
        (any_ip(), proptest::option::of(any_node_name())).prop_map(|(ip, node)| Endpoint { ip, port: 1, node });
    let ports = proptest::collection::vec(endpoint, 0..3)
        .prop_map(|endpoints| vec![ServicePort { name: String::new(), port: 443, endpoints }]);
    let names = (proptest::sample::select(&["d", "e"][..]), proptest::sample::select(&["s", "a"][..]));
    (names, proptest::collection::vec(any_ip(), 0..2), ports).prop_map(|((namespace, name), cluster_ips, ports)| {
        Service { key: ObjectKey::new(namespace, name), cluster_ips, ports }
    })
}

#[derive(Clone, Debug)]
enum Step {
    Node(Node),
    Pod(Pod),
    Service(Service),
    NoNode(String),
    NoPod(String),
    NoService(String, String),
}

fn any_step() -> impl Strategy<Value = Step> {
    let word = |words: &'static [&'static str]| proptest::sample::select(words).prop_map(str::to_owned);
    prop_oneof![
        3 => any_node().prop_map(Step::Node),
        3 => any_pod().prop_map(Step::Pod),
        3 => any_service().prop_map(Step::Service),
        1 => any_node_name().prop_map(Step::NoNode),
        1 => word(&["p", "q", "r"]).prop_map(Step::NoPod),
        1 => (word(&["d", "e"]), word(&["s", "a"])).prop_map(|(ns, name)| Step::NoService(ns, name)),
    ]
}

fn all_answers(book: &Book) -> Vec<String> {
    let names = ["a", "b", "c", "s", "s.d", "s.d.svc", "a.e.svc.cluster.local", "10.244.9.9", "10.245.0.1", "fd00::9"];
    let hosts = IPS.iter().chain(&names);
    hosts.flat_map(|host| [0, 1].map(|turn| found(book, host, 443, turn))).collect()
}

proptest! {
    #[test]
    fn changes_end_where_a_fresh_book_begins(steps in proptest::collection::vec(any_step(), 0..40)) {
        let mut book = Book::default();
        let mut now = BookSpec::default();
        for step in steps {
            let (mut put, mut gone) = (BookSpec::default(), BookKeys::default());
            match step {
                Step::Node(node) => {
                    now.nodes.retain(|n| n.name != node.name);
                    now.nodes.push(node.clone());
                    put.nodes.push(node);
                }
                Step::Pod(pod) => {
                    now.pods.retain(|p| p.key != pod.key);
                    now.pods.push(pod.clone());
                    put.pods.push(pod);
                }
                Step::Service(service) => {
                    now.services.retain(|s| s.key != service.key);
                    now.services.push(service.clone());
                    put.services.push(service);
                }
                Step::NoNode(name) => {
                    now.nodes.retain(|n| n.name != name);
                    gone.nodes.push(name);
                }
                Step::NoPod(name) => {
                    let key = ObjectKey::new("d", name);
                    now.pods.retain(|p| p.key != key);
                    gone.pods.push(key);
                }
                Step::NoService(namespace, name) => {
                    let key = ObjectKey::new(namespace, name);
                    now.services.retain(|s| s.key != key);
                    gone.services.push(key);
                }
            }
            book.remove(&gone);
            book.put(put);
        }
        let fresh = Book::new(now.clone());
        prop_assert_eq!(all_answers(&book), all_answers(&fresh));
        prop_assert_eq!(book.size(), fresh.size());
        book.remove(&BookKeys {
            nodes: now.nodes.into_iter().map(|n| n.name).collect(),
            pods: now.pods.into_iter().map(|p| p.key).collect(),
            services: now.services.into_iter().map(|s| s.key).collect(),
        });
        prop_assert_eq!(format!("{book:?}"), format!("{:?}", Book::default()), "nothing is left behind");
    }

    #[test]
    fn an_address_leads_to_a_machine_that_has_it_or_nowhere(
        nodes in proptest::collection::vec(any_node(), 0..4),
        pods in proptest::collection::vec(any_pod(), 0..4),
        ip in any_ip(),
    ) {
        let spec = BookSpec { nodes, pods, services: vec![] };
        if let Ok(found) = Book::new(spec.clone()).resolve(&ip.to_string(), 1, 0) {
            let on = |name: &str| name == found.edge.as_str();
            let by_node = spec.nodes.iter().any(|n| {
                let itself = n.addresses.iter().any(|a| a.address.parse() == Ok(ip)) || n.name.parse() == Ok(ip);
                n.edge.as_ref() == Some(&found.edge) && (itself || n.pod_cidrs.iter().any(|net| net.contains(ip)))
            });
            prop_assert!(by_node || spec.pods.iter().any(|p| on(&p.node) && p.ips.contains(&ip)), "{found:?}");
        }
    }

    #[test]
    fn no_name_upsets_it(host in "\\PC{0,60}", port in any::<u16>(), turn in any::<u64>()) {
        if let Err(why) = cluster().resolve(&host, port, turn) {
            prop_assert!(why.to_string().len() < 2000);
        }
    }

    #[test]
    fn a_snapshot_in_parts_has_everything_once(pods in 0_usize..40, size in 0_usize..7) {
        let pods: Vec<_> = (0..pods).map(|i| pod(&format!("p{i}"), "a", "10.0.0.1", false)).collect();
        let spec = BookSpec { nodes: vec![node("a", true, &[], "10.0.0.0/8")], pods: pods.clone(), services: vec![] };
        let parts = BookChange::snapshot(spec, size);
        prop_assert!(parts[0].fresh && !parts.last().unwrap().more);
        prop_assert!(parts[1..].iter().all(|p| !p.fresh && p.put.pods.len() <= size.max(1)));
        let again: Vec<_> = parts.into_iter().flat_map(|p| p.put.pods).collect();
        prop_assert_eq!(again, pods);
    }
}
