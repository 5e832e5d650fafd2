//! From the objects of a cluster to entries of the address book. Pure: objects come and go, entries come out.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use kube::ResourceExt;
use proto::{
    book::{self, AddressKind, Cidr, ObjectKey},
    id::EdgeId,
};

use super::objects::{EndpointSlice, Node, Pod, Port, Service};
use crate::watch::book::{Entry, Key, SharedBook};

/// The label that tells whose a slice is.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The usual port of kubelets.
const KUBELET: u16 = 10250;

/// What is kept of objects that more than one entry, or more than themselves, depends on.
#[derive(Debug)]
pub(super) struct Shelf {
    book: SharedBook,
    /// The annotation that tells which edge a node is.
    annotation: String,
    enrolled: Arc<HashSet<EdgeId>>,
    nodes: BTreeMap<String, RawNode>,
    services: BTreeMap<ObjectKey, RawService>,
    slices: BTreeMap<ObjectKey, RawSlice>,
    /// Slices by service.
    by_service: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// Whether services have been listed, and slices. Before both, the last book knows more than the half of them.
    listed: [bool; 2],
}

#[derive(Debug)]
struct RawNode {
    /// What the annotation says; an empty one says that it is no edge.
    annotated: Option<String>,
    node: book::Node,
}

#[derive(Debug)]
struct RawService {
    cluster_ips: Vec<IpAddr>,
    ports: Vec<Port>,
}

#[derive(Debug)]
struct RawSlice {
    service: ObjectKey,
    ports: Vec<Port>,
    /// Those that are ready.
    endpoints: Vec<(IpAddr, Option<String>)>,
}

/// A kind of object that is followed.
pub(super) trait Shelved: ResourceExt<DynamicType = ()> {
    /// Puts one on the shelf.
    fn put(self, shelf: &mut Shelf);
    /// Takes one away.
    fn remove(key: &ObjectKey, shelf: &mut Shelf);
    /// Those that are known.
    fn all(shelf: &Shelf) -> Vec<ObjectKey>;
    /// All that there are have been put.
    fn listed(_: &mut Shelf) {}
}

/// The name of an object; nodes have an empty namespace.
pub(super) fn key_of<K: ResourceExt>(object: &K) -> ObjectKey {
    ObjectKey::new(object.namespace().unwrap_or_default(), object.name_any())
}

impl Shelf {
    /// An empty one.
    pub(super) fn new(book: SharedBook, annotation: String) -> Self {
        Self {
            book,
            annotation,
            enrolled: Arc::default(),
            nodes: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            by_service: BTreeMap::new(),
            listed: [false; 2],
        }
    }

    /// Services or slices have been listed; after both for the first time, all services go into the book.
    fn services_listed(&mut self, which: usize) {
        let before = std::mem::replace(&mut self.listed[which], true);
        if before || self.listed != [true; 2] {
            return;
        }
        for key in self.services.keys().cloned().collect::<BTreeSet<_>>().into_iter().chain(Service::all(self)) {
            self.service(&key);
        }
    }

    /// Other edges are enrolled now.
    pub(super) fn enrol(&mut self, enrolled: Arc<HashSet<EdgeId>>) {
        if self.enrolled == enrolled {
            return;
        }
        self.enrolled = enrolled;
        let entries: Vec<_> = self.nodes.values().map(|raw| Entry::Node(self.node(raw))).collect();
        self.book.put(entries);
    }

    /// The node with the edge that it is: by its annotation, else by its name.
    fn node(&self, raw: &RawNode) -> book::Node {
        let named = || raw.node.name.parse().ok().filter(|name| self.enrolled.contains(name));
        let edge = raw.annotated.as_ref().map_or_else(named, |edge| edge.parse().ok());
        book::Node { edge, ..raw.node.clone() }
    }

    /// Puts a service into the book anew, from what is on the shelf about it.
    fn service(&mut self, key: &ObjectKey) {
        if self.listed != [true; 2] {
            return;
        }
        let Some(raw) = self.services.get(key) else {
            return self.book.remove([&Key::Service(key.clone())]);
        };
        let slices: Vec<_> =
            self.by_service.get(key).into_iter().flatten().filter_map(|slice| self.slices.get(slice)).collect();
        let ports = raw.ports.iter().filter_map(|port| {
            let name = port.name().to_owned();
            let mut endpoints: Vec<_> = slices.iter().flat_map(|slice| slice.on(&name)).collect();
            endpoints.sort_by_key(|endpoint| (endpoint.ip, endpoint.port));
            endpoints.dedup();
            Some(book::ServicePort { port: port.port?, name, endpoints })
        });
        let service = book::Service { key: key.clone(), cluster_ips: raw.cluster_ips.clone(), ports: ports.collect() };
        self.book.put([Entry::Service(service)]);
    }

    fn unlink(&mut self, slice: &ObjectKey) -> Option<ObjectKey> {
        let raw = self.slices.remove(slice)?;
        if let Some(slices) = self.by_service.get_mut(&raw.service) {
            slices.remove(slice);
            if slices.is_empty() {
                self.by_service.remove(&raw.service);
            }
        }
        Some(raw.service)
    }
}

impl RawSlice {
    /// Who answers on the port of this name.
    fn on(&self, name: &str) -> impl Iterator<Item = book::Endpoint> {
        let ports = self.ports.iter().filter(move |p| p.is_tcp() && p.name() == name).filter_map(|p| p.port);
        ports.flat_map(|port| {
            self.endpoints.iter().map(move |(ip, node)| book::Endpoint { ip: *ip, port, node: node.clone() })
        })
    }
}

impl Shelved for Node {
    fn put(self, shelf: &mut Shelf) {
        let name = self.name_any();
        let kind = |kind: &str| match kind {
            "Hostname" => Some(AddressKind::Hostname),
            "InternalDNS" => Some(AddressKind::InternalDNS),
            "InternalIP" => Some(AddressKind::InternalIP),
            "ExternalDNS" => Some(AddressKind::ExternalDNS),
            "ExternalIP" => Some(AddressKind::ExternalIP),
            _ => None,
        };
        let addresses = self.status.addresses.iter();
        let address =
            |a: &super::objects::Address| Some(book::NodeAddress { kind: kind(&a.kind)?, address: a.address.clone() });
        let mut cidrs: Vec<Cidr> =
            self.spec.pod_cidrs.iter().chain(&self.spec.pod_cidr).filter_map(|c| c.parse().ok()).collect();
        cidrs.sort();
        cidrs.dedup();
        let port = self.status.daemon_endpoints.kubelet_endpoint.port;
        let node = book::Node {
            name: name.clone(),
            edge: None,
            addresses: addresses.filter_map(address).collect(),
            kubelet_port: if port == 0 { KUBELET } else { port },
            pod_cidrs: cidrs,
        };
        let annotated = self.annotations().get(&shelf.annotation).map(|edge| edge.trim().to_owned());
        if let Some(edge) = annotated.as_ref().filter(|edge| !edge.is_empty() && edge.parse::<EdgeId>().is_err()) {
            tracing::warn!(
                node = name,
                edge,
                annotation = shelf.annotation,
                "a node's annotation names no possible edge"
            );
        }
        let raw = RawNode { annotated, node };
        let entry = Entry::Node(shelf.node(&raw));
        shelf.nodes.insert(name, raw);
        shelf.book.put([entry]);
    }

    fn remove(key: &ObjectKey, shelf: &mut Shelf) {
        shelf.nodes.remove(&key.name);
        shelf.book.remove([&Key::Node(key.name.clone())]);
    }

    fn all(shelf: &Shelf) -> Vec<ObjectKey> {
        let nodes = shelf.book.keys(|key| matches!(key, Key::Node(_)));
        let name = |key| match key {
            Key::Node(name) => Some(ObjectKey::new("", name)),
            Key::Pod(_) | Key::Service(_) => None,
        };
        nodes.into_iter().filter_map(name).collect()
    }
}

impl Shelved for Pod {
    fn put(self, shelf: &mut Shelf) {
        let key = key_of(&self);
        let over = matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let ips = self.status.pod_ips.iter().map(|p| &p.ip).chain(&self.status.pod_ip);
        let mut ips: Vec<IpAddr> = ips.filter_map(|ip| ip.parse().ok()).collect();
        ips.sort();
        ips.dedup();
        match self.spec.node_name.filter(|_| !over && !ips.is_empty()) {
            Some(node) => {
                let pod = book::Pod { key, ips, node, host_network: self.spec.host_network };
                shelf.book.put([Entry::Pod(pod)]);
            }
            None => shelf.book.remove([&Key::Pod(key)]),
        }
    }

    fn remove(key: &ObjectKey, shelf: &mut Shelf) {
        shelf.book.remove([&Key::Pod(key.clone())]);
    }

    fn all(shelf: &Shelf) -> Vec<ObjectKey> {
        let pods = shelf.book.keys(|key| matches!(key, Key::Pod(_)));
        let name = |key| match key {
            Key::Pod(key) => Some(key),
            Key::Node(_) | Key::Service(_) => None,
        };
        pods.into_iter().filter_map(name).collect()
    }
}

impl Shelved for Service {
    fn put(self, shelf: &mut Shelf) {
        let key = key_of(&self);
        let ips = self.spec.cluster_ips.iter().chain(&self.spec.cluster_ip);
        let mut cluster_ips: Vec<IpAddr> = ips.filter_map(|ip| ip.parse().ok()).collect();
        cluster_ips.sort();
        cluster_ips.dedup();
        let ports = self.spec.ports.into_iter().filter(Port::is_tcp).collect();
        shelf.services.insert(key.clone(), RawService { cluster_ips, ports });
        shelf.service(&key);
    }

    fn remove(key: &ObjectKey, shelf: &mut Shelf) {
        shelf.services.remove(key);
        shelf.service(key);
    }

    fn all(shelf: &Shelf) -> Vec<ObjectKey> {
        let services = shelf.book.keys(|key| matches!(key, Key::Service(_)));
        let name = |key| match key {
            Key::Service(key) => Some(key),
            Key::Node(_) | Key::Pod(_) => None,
        };
        services.into_iter().filter_map(name).collect()
    }

    fn listed(shelf: &mut Shelf) {
        shelf.services_listed(0);
    }
}

impl Shelved for EndpointSlice {
    fn put(self, shelf: &mut Shelf) {
        let key = key_of(&self);
        let before = shelf.unlink(&key);
        let service = self.labels().get(SERVICE_NAME).map(|name| ObjectKey::new(key.namespace.clone(), name.clone()));
        if let Some(service) = service.clone().filter(|_| self.address_type != "FQDN") {
            let ready = self.endpoints.into_iter().filter(|e| e.conditions.ready != Some(false));
            let endpoints = ready.filter_map(|e| Some((e.addresses.first()?.parse().ok()?, e.node_name))).collect();
            shelf.by_service.entry(service.clone()).or_default().insert(key.clone());
            shelf.slices.insert(key, RawSlice { service, ports: self.ports, endpoints });
        }
        if before.is_some() && before != service {
            before.iter().for_each(|before| shelf.service(before));
        }
        service.iter().for_each(|service| shelf.service(service));
    }

    fn remove(key: &ObjectKey, shelf: &mut Shelf) {
        if let Some(service) = shelf.unlink(key) {
            shelf.service(&service);
        }
    }

    fn all(shelf: &Shelf) -> Vec<ObjectKey> {
        shelf.slices.keys().cloned().collect()
    }

    fn listed(shelf: &mut Shelf) {
        shelf.services_listed(1);
    }
}
