//! Stories of objects that come and go, and what shards make of them.

use proto::book::{Book, BookChange};
use serde_json::{Value, json};

use super::{
    objects::{EndpointSlice, Node, Pod, Service},
    shelf::{Shelf, Shelved, key_of},
};
use crate::watch::book::{Seen, SharedBook};

/// A shelf, and a shard that follows it.
struct Cluster {
    book: SharedBook,
    shelf: Shelf,
    seen: Seen,
    shard: Book,
}

impl Cluster {
    fn new(edges: &[&str]) -> Self {
        let book = SharedBook::default();
        let mut shelf = Shelf::new(book.clone(), "causeway.dev/edge".into());
        shelf.enrol(std::sync::Arc::new(edges.iter().map(|e| e.parse().unwrap()).collect()));
        Service::listed(&mut shelf);
        EndpointSlice::listed(&mut shelf);
        book.complete();
        Self { book, shelf, seen: Seen::default(), shard: Book::default() }
    }

    fn put<K: Shelved + serde::de::DeserializeOwned>(&mut self, object: Value) {
        serde_json::from_value::<K>(object).unwrap().put(&mut self.shelf);
    }

    fn delete<K: Shelved + serde::de::DeserializeOwned>(&mut self, object: Value) {
        K::remove(&key_of(&serde_json::from_value::<K>(object).unwrap()), &mut self.shelf);
    }

    fn node(&mut self, name: &str, ip: &str, edge: Option<&str>) {
        let annotations = edge.map(|edge| json!({"causeway.dev/edge": edge}));
        self.put::<Node>(json!({
            "metadata": {"name": name, "annotations": annotations}, "spec": {"podCIDRs": [], "taints": []},
            "status": {
                "addresses": [{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}}
            }
        }));
    }

    /// Where a request leads: `edge -> host:port`, or the sentence that refuses it.
    fn asks(&mut self, host: &str, port: u16) -> String {
        while let Some(BookChange { fresh, put, gone, .. }) = self.book.next(&mut self.seen) {
            if fresh {
                self.shard = Book::default();
            }
            self.shard.remove(&gone);
            self.shard.put(put);
        }
        match self.shard.resolve(host, port, 0) {
            Ok(to) => format!("{} -> {}", to.edge, to.to),
            Err(error) => error.to_string(),
        }
    }
}

fn pod(name: &str, node: &str, ip: &str, phase: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "a"}, "spec": {"nodeName": node},
        "status": {"phase": phase, "podIP": ip, "podIPs": [{"ip": ip}]}
    })
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "a"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [
            {"name": "web", "port": 80, "targetPort": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}
        ]}
    })
}

fn slice(name: &str, of: &str, endpoints: &Value) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "a", "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4", "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints
    })
}

#[test]
fn a_node_is_the_edge_of_its_annotation_or_of_its_name() {
    let mut cluster = Cluster::new(&["shop-1"]);
    cluster.node("shop-1", "192.168.1.5", None);
    cluster.node("kiosk", "192.168.1.6", Some("stand-7"));
    cluster.node("shop-2", "192.168.1.7", None);
    assert_eq!(cluster.asks("shop-1", 10250), "shop-1 -> 192.168.1.5:10250");
    assert_eq!(cluster.asks("kiosk", 10250), "stand-7 -> 192.168.1.6:10250");
    assert!(cluster.asks("shop-2", 10250).contains("no edge of the mesh"), "{}", cluster.asks("shop-2", 10250));
    cluster.shelf.enrol(std::sync::Arc::new(["shop-2".parse().unwrap()].into()));
    assert_eq!(cluster.asks("shop-2", 10250), "shop-2 -> 192.168.1.7:10250", "it has enrolled");
    assert!(cluster.asks("shop-1", 10250).contains("no edge of the mesh"), "and this one was revoked");
    cluster.node("shop-2", "192.168.1.7", Some(""));
    assert!(cluster.asks("shop-2", 10250).contains("no edge of the mesh"), "somebody has said that it is none");
    cluster.delete::<Node>(json!({"metadata": {"name": "kiosk"}}));
    assert!(cluster.asks("kiosk", 10250).contains("no node"));
}

#[test]
fn pods_are_there_while_they_have_an_address() {
    let mut cluster = Cluster::new(&["shop-1", "shop-2"]);
    cluster.node("shop-1", "192.168.1.5", None);
    cluster.node("shop-2", "192.168.1.6", None);
    cluster
        .put::<Pod>(json!({"metadata": {"name": "p", "namespace": "a"}, "spec": {}, "status": {"phase": "Pending"}}));
    cluster.put::<Pod>(pod("p", "shop-1", "10.1.0.5", "Running"));
    assert_eq!(cluster.asks("10.1.0.5", 80), "shop-1 -> 10.1.0.5:80");
    cluster.put::<Pod>(pod("p", "shop-1", "10.1.0.5", "Succeeded"));
    assert!(cluster.asks("10.1.0.5", 80).contains("no node, pod"), "what has ended keeps no address");
    cluster.put::<Pod>(pod("q", "shop-2", "10.1.0.5", "Running"));
    assert_eq!(cluster.asks("10.1.0.5", 80), "shop-2 -> 10.1.0.5:80", "the next one has it");
    cluster.delete::<Pod>(pod("q", "shop-2", "10.1.0.5", "Running"));
    assert!(cluster.asks("10.1.0.5", 80).contains("no node, pod"));
}

#[test]
fn a_service_is_its_ready_endpoints_from_all_slices() {
    let mut cluster = Cluster::new(&["shop-1"]);
    cluster.node("shop-1", "192.168.1.5", None);
    cluster.put::<EndpointSlice>(slice(
        "web-x",
        "web",
        &json!([
            {"addresses": ["10.1.0.9"], "conditions": {"ready": false}, "nodeName": "shop-1"}
        ]),
    ));
    cluster.put::<Service>(service("web", "10.96.0.9"));
    assert!(cluster.asks("10.96.0.9", 80).contains("no ready endpoint"), "{}", cluster.asks("10.96.0.9", 80));
    cluster.put::<EndpointSlice>(slice("web-y", "web", &json!([
        {"addresses": ["10.1.0.8"], "conditions": {"ready": true}, "nodeName": "shop-1"}, {"addresses": ["10.1.0.7"]}
    ])));
    cluster.put::<Pod>(pod("p", "shop-1", "10.1.0.7", "Running"));
    for host in ["10.96.0.9", "web", "web.a.svc"] {
        assert_eq!(cluster.asks(host, 80), "shop-1 -> 10.1.0.7:8080", "{host}");
    }
    assert!(cluster.asks("web", 53).contains("no TCP port"), "UDP is not for here");
    cluster.delete::<EndpointSlice>(slice("web-y", "web", &json!([])));
    assert!(cluster.asks("web", 80).contains("no ready endpoint"));
    cluster.put::<EndpointSlice>(slice("web-x", "other", &json!([{"addresses": ["10.1.0.7"]}])));
    cluster.put::<Service>(service("other", "10.96.0.10"));
    assert_eq!(cluster.asks("other", 80), "shop-1 -> 10.1.0.7:8080", "a slice may change hands");
    cluster.delete::<Service>(service("web", "10.96.0.9"));
    assert!(cluster.asks("web", 80).contains("no node, pod or service"));
}

#[test]
fn until_services_and_slices_are_both_read_the_last_book_holds() {
    let book = SharedBook::default();
    let mut first = Cluster::new(&["shop-1"]);
    first.node("shop-1", "192.168.1.5", None);
    first.put::<EndpointSlice>(slice("web-x", "web", &json!([{"addresses": ["10.1.0.7"], "nodeName": "shop-1"}])));
    first.put::<Service>(service("web", "10.96.0.9"));
    first.put::<Service>(service("old", "10.96.0.8"));
    let mut all = first.book.next(&mut Seen::default()).unwrap();
    assert!(all.fresh && !all.more);
    book.put(all.put.services.drain(..).map(crate::watch::book::Entry::Service));
    book.complete();
    let mut shelf = Shelf::new(book.clone(), String::new());
    let services = |book: &SharedBook| book.next(&mut Seen::default()).unwrap().put.services;
    serde_json::from_value::<Service>(service("web", "10.96.0.9")).unwrap().put(&mut shelf);
    Service::listed(&mut shelf);
    assert_eq!(services(&book).len(), 2);
    assert!(services(&book).iter().any(|s| s.ports.iter().any(|p| !p.endpoints.is_empty())));
    EndpointSlice::listed(&mut shelf);
    let now = services(&book);
    assert_eq!((now.len(), now[0].key.name.as_str()), (1, "web"));
    assert!(now[0].ports[0].endpoints.is_empty(), "there are no slices any more");
}
