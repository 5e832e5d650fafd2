//! The address book of a cluster: which edge is behind an address or a name that kube-apiserver dials, and where there.
//!
//! A request names what it wants as kube-apiserver knows it. In this order it is taken for
//!
//! 1. a node, by its name or by one of its host names;
//! 2. a node, by one of its addresses;
//! 3. a pod, by its address, or by the pod network of a node;
//! 4. a service, by its cluster IP or its name, and then one of its ready endpoints, which are taken in turn.
//!
//! Whatever is none of these is refused: nothing is ever dialled by another way. Whatever is more than one of them, as
//! when two sites use the same addresses, is refused as well and by name, since a guess would end at the wrong machine.
//!
//! Pure, and made for changes one by one: each costs what it changes, and a lookup does not depend on the size.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use crate::{
    id::EdgeId,
    target::{HostPort, InvalidTarget},
};

mod index;
mod spec;

use index::{Hit, Index, Nets};
pub use spec::{
    AddressKind, BookChange, BookKeys, BookSpec, Cidr, Endpoint, InvalidCidr, Node, NodeAddress, ObjectKey, Pod,
    Service, ServicePort,
};

/// Most nodes that a book holds; more are counted and left out.
pub const MAX_NODES: usize = 250_000;
/// Most pods.
pub const MAX_PODS: usize = 2_000_000;
/// Most services.
pub const MAX_SERVICES: usize = 100_000;
/// Names that a sentence about an ambiguity lists.
const LISTED: usize = 4;
/// The domain of a cluster if its names carry one.
const DOMAIN: &str = "cluster.local";

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The edge.
    pub edge: EdgeId,
    /// Whom the edge dials.
    pub to: HostPort,
    /// How many would do as well: a service's other endpoints, which the next turns lead to.
    pub others: usize,
}

/// Why a request goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// More than one machine has it.
    #[error("ambiguous {what} {asked}: {who}; {remedy}")]
    Ambiguous {
        /// What it is.
        what: &'static str,
        /// What was asked for.
        asked: String,
        /// Those that have it.
        who: String,
        /// What to do.
        remedy: &'static str,
    },
    /// It is on a machine that is not in the mesh.
    #[error("{asked} is on node {node}, which is no edge of the mesh; nothing is dialled past the mesh")]
    NoEdge {
        /// What was asked for.
        asked: String,
        /// Where it is.
        node: String,
    },
    /// The service has no such port.
    #[error("service {service} has no TCP port {port}")]
    NoPort {
        /// The service.
        service: String,
        /// The port that was asked for.
        port: u16,
    },
    /// Nobody answers for the service.
    #[error("service {service} has no ready endpoint for port {port}{why}")]
    NoEndpoint {
        /// The service.
        service: String,
        /// The port that was asked for.
        port: u16,
        /// What is known of those that it has.
        why: String,
    },
    /// Nobody has it.
    #[error("{asked} is no node, pod or service of the cluster; nothing is dialled past the mesh")]
    Unknown {
        /// What was asked for.
        asked: String,
    },
    /// It cannot be an address or a name.
    #[error(transparent)]
    Invalid(#[from] InvalidTarget),
}

/// An address book.
#[derive(Clone, Debug, Default)]
pub struct Book {
    nodes: HashMap<Arc<str>, Node>,
    /// Host names of nodes, lower case.
    hosts: Index<String>,
    /// Addresses of nodes.
    addresses: Index<IpAddr>,
    pods: HashMap<ObjectKey, Placed>,
    /// Addresses of pods, leading to their nodes.
    pod_addresses: Index<IpAddr>,
    pod_nets: Nets,
    services: HashMap<Arc<str>, Service>,
    /// Services by cluster IP.
    cluster_ips: Index<IpAddr>,
    /// Services by the name alone.
    bare_names: Index<String>,
    left_out: u64,
}

/// What of a pod is needed to forget it.
#[derive(Clone, Debug)]
struct Placed {
    node: Arc<str>,
    ips: Box<[IpAddr]>,
}

impl Book {
    /// The book of a cluster.
    #[must_use]
    pub fn new(spec: BookSpec) -> Self {
        let mut book = Self::default();
        book.put(spec);
        book
    }

    /// Nodes, pods and services that are in it.
    #[must_use]
    pub fn size(&self) -> [usize; 3] {
        [self.nodes.len(), self.pods.len(), self.services.len()]
    }

    /// Entries that found no room.
    #[must_use]
    pub const fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Adds entries, in place of those with the same names.
    pub fn put(&mut self, spec: BookSpec) {
        for node in spec.nodes {
            self.put_node(node);
        }
        for pod in spec.pods {
            self.put_pod(pod);
        }
        for service in spec.services {
            self.put_service(service);
        }
    }

    /// Takes entries out.
    pub fn remove(&mut self, keys: &BookKeys) {
        for name in &keys.nodes {
            self.remove_node(name);
        }
        for key in &keys.pods {
            self.remove_pod(key);
        }
        for key in &keys.services {
            self.remove_service(key);
        }
    }

    fn put_node(&mut self, node: Node) {
        self.remove_node(&node.name);
        if self.nodes.len() >= MAX_NODES {
            self.left_out += 1;
            return;
        }
        let name: Arc<str> = node.name.as_str().into();
        for host in host_names(&node) {
            self.hosts.add(host, &name);
        }
        for ip in node_ips(&node) {
            self.addresses.add(ip, &name);
        }
        for net in &node.pod_cidrs {
            self.pod_nets.add(*net, &name);
        }
        self.nodes.insert(name, node);
    }

    fn remove_node(&mut self, name: &str) {
        let Some((name, node)) = self.nodes.remove_entry(name) else { return };
        for host in host_names(&node) {
            self.hosts.remove(&host, &name);
        }
        for ip in node_ips(&node) {
            self.addresses.remove(&ip, &name);
        }
        for net in &node.pod_cidrs {
            self.pod_nets.remove(*net, &name);
        }
    }

    fn put_pod(&mut self, pod: Pod) {
        self.remove_pod(&pod.key);
        if self.pods.len() >= MAX_PODS {
            self.left_out += 1;
            return;
        }
        // One text for all pods of a node, as far as the node is known by now.
        let node = self.nodes.get_key_value(pod.node.as_str()).map_or_else(|| pod.node.into(), |(n, _)| Arc::clone(n));
        let ips: Box<[IpAddr]> = pod.ips.iter().map(IpAddr::to_canonical).collect();
        for ip in &ips {
            self.pod_addresses.add(*ip, &node);
        }
        self.pods.insert(pod.key, Placed { node, ips });
    }

    fn remove_pod(&mut self, key: &ObjectKey) {
        let Some(pod) = self.pods.remove(key) else { return };
        for ip in &pod.ips {
            self.pod_addresses.remove(ip, &pod.node);
        }
    }

    fn put_service(&mut self, service: Service) {
        self.remove_service(&service.key);
        if self.services.len() >= MAX_SERVICES {
            self.left_out += 1;
            return;
        }
        let key: Arc<str> = service.key.to_string().into();
        for ip in &service.cluster_ips {
            self.cluster_ips.add(ip.to_canonical(), &key);
        }
        self.bare_names.add(service.key.name.clone(), &key);
        self.services.insert(key, service);
    }

    fn remove_service(&mut self, key: &ObjectKey) {
        let Some((key, service)) = self.services.remove_entry(key.to_string().as_str()) else { return };
        for ip in &service.cluster_ips {
            self.cluster_ips.remove(&ip.to_canonical(), &key);
        }
        self.bare_names.remove(&service.key.name, &key);
    }

    /// Finds out where a request goes. `turn` chooses among the endpoints of a service: callers count it up.
    ///
    /// # Errors
    /// With the reason, if it goes nowhere.
    pub fn resolve(&self, host: &str, port: u16, turn: u64) -> Result<Resolved, Unresolved> {
        let asked = HostPort::new(host.strip_suffix('.').unwrap_or(host), port)?;
        // By name first, since a node may be named like an address.
        if let Some(node) = self.nodes.get(asked.host.as_str()) {
            return at_node(node, None, &asked);
        }
        match asked.host.parse::<IpAddr>() {
            Ok(ip) => self.by_address(ip.to_canonical(), &asked, turn),
            Err(_) => self.by_name(&asked, turn),
        }
    }

    fn by_name(&self, asked: &HostPort, turn: u64) -> Result<Resolved, Unresolved> {
        if let Some(name) =
            one(self.hosts.get(&asked.host), "host name", &asked.host, "give each node a name of its own")?
            && let Some(node) = self.nodes.get(name)
        {
            return at_node(node, None, asked);
        }
        match self.service_named(&asked.host)? {
            Some(service) => self.at_service(service, asked.port, turn),
            None => Err(Unresolved::Unknown { asked: asked.to_string() }),
        }
    }

    fn by_address(&self, ip: IpAddr, asked: &HostPort, turn: u64) -> Result<Resolved, Unresolved> {
        if let Some(found) = self.node_or_pod(ip, asked)? {
            return Ok(found);
        }
        let remedy = "two services have one cluster IP; delete one of them";
        match one(self.cluster_ips.get(&ip), "cluster IP", &asked.host, remedy)?.and_then(|key| self.services.get(key))
        {
            Some(service) => self.at_service(service, asked.port, turn),
            None => Err(Unresolved::Unknown { asked: asked.to_string() }),
        }
    }

    fn node_or_pod(&self, ip: IpAddr, asked: &HostPort) -> Result<Option<Resolved>, Unresolved> {
        const HOSTNAME: &str = "set --kubelet-preferred-address-types=Hostname";
        const OVERLAP: &str = "give the sites pod networks that do not overlap";
        if let Some(name) = one(self.addresses.get(&ip), "node address", &asked.host, HOSTNAME)?
            && let Some(node) = self.nodes.get(name)
        {
            return at_node(node, Some(ip), asked).map(Some);
        }
        let by_net = || one(self.pod_nets.get(ip), "pod network of", &asked.host, OVERLAP);
        let Some(name) = one(self.pod_addresses.get(&ip), "pod address", &asked.host, OVERLAP)?
            .map_or_else(by_net, |n| Ok(Some(n)))?
        else {
            return Ok(None);
        };
        let edge = self.edge_of(name, asked)?;
        Ok(Some(Resolved { edge, to: asked.clone(), others: 0 }))
    }

    fn edge_of(&self, node: &str, asked: &HostPort) -> Result<EdgeId, Unresolved> {
        let edge = self.nodes.get(node).and_then(|node| node.edge.clone());
        edge.ok_or_else(|| Unresolved::NoEdge { asked: asked.to_string(), node: node.to_owned() })
    }

    /// `svc`, `svc.namespace`, `svc.namespace.svc`, `svc.namespace.svc.cluster.local`.
    fn service_named(&self, host: &str) -> Result<Option<&Service>, Unresolved> {
        let inside = host.strip_suffix(DOMAIN).and_then(|h| h.strip_suffix('.')).filter(|h| h.ends_with(".svc"));
        let mut parts = inside.unwrap_or(host).splitn(4, '.');
        let key = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(name), None, None, None) => {
                let remedy = "name the namespace as well";
                return Ok(
                    one(self.bare_names.get(name), "service", host, remedy)?.and_then(|key| self.services.get(key))
                );
            }
            (Some(name), Some(namespace), None | Some("svc"), None) => format!("{namespace}/{name}"),
            (Some(_), _, _, _) | (None, _, _, _) => return Ok(None),
        };
        Ok(self.services.get(key.as_str()))
    }

    fn at_service(&self, service: &Service, port: u16, turn: u64) -> Result<Resolved, Unresolved> {
        let name = || service.key.to_string();
        let Some(found) = service.ports.iter().find(|p| p.port == port) else {
            return Err(Unresolved::NoPort { service: name(), port });
        };
        let count = found.endpoints.len();
        let first = usize::try_from(turn % (count.max(1) as u64)).unwrap_or(0);
        let (before, from) = found.endpoints.split_at(first);
        let mut why = None;
        for endpoint in from.iter().chain(before) {
            match self.at_endpoint(endpoint) {
                Ok(resolved) => return Ok(Resolved { others: count - 1, ..resolved }),
                Err(unresolved) => why = why.or(Some(unresolved)),
            }
        }
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        Err(Unresolved::NoEndpoint { service: name(), port, why })
    }

    fn at_endpoint(&self, endpoint: &Endpoint) -> Result<Resolved, Unresolved> {
        let to = HostPort::new(&endpoint.ip.to_canonical().to_string(), endpoint.port)?;
        match &endpoint.node {
            Some(node) => Ok(Resolved { edge: self.edge_of(node, &to)?, to, others: 0 }),
            None => {
                let found = self.node_or_pod(endpoint.ip.to_canonical(), &to)?;
                found.ok_or_else(|| Unresolved::Unknown { asked: to.to_string() })
            }
        }
    }
}

/// Whoever is found, unless there are more.
fn one<'a>(
    hit: Hit<'a>,
    what: &'static str,
    asked: &str,
    remedy: &'static str,
) -> Result<Option<&'a Arc<str>>, Unresolved> {
    match hit {
        Hit::None => Ok(None),
        Hit::One(name) => Ok(Some(name)),
        Hit::Many(names) => {
            let mut who = names.iter().take(LISTED).map(|n| &***n).collect::<Vec<_>>().join(", ");
            if names.len() > LISTED {
                who.push_str(&format!(" and {} more", names.len() - LISTED));
            }
            Err(Unresolved::Ambiguous { what, asked: asked.to_owned(), who, remedy })
        }
    }
}

/// A place on a node: at the address that was asked for if the machine has it, else at one that it has. The edge falls
/// back on loopback by itself where kubelet listens only there.
fn at_node(node: &Node, asked_ip: Option<IpAddr>, asked: &HostPort) -> Result<Resolved, Unresolved> {
    let Some(edge) = node.edge.clone() else {
        return Err(Unresolved::NoEdge { asked: asked.to_string(), node: node.name.clone() });
    };
    let internal = || {
        let all = node.addresses.iter().filter(|a| a.kind == AddressKind::InternalIP);
        all.filter_map(|a| a.address.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
    };
    let same = asked_ip.and_then(|asked| internal().find(|ip| *ip == asked));
    let family = || internal().find(|ip| asked_ip.is_none_or(|asked| asked.is_ipv4() == ip.is_ipv4()));
    let host =
        same.or_else(family).or_else(|| internal().next()).map_or_else(|| "localhost".into(), |ip| ip.to_string());
    Ok(Resolved { edge, to: HostPort::new(&host, asked.port)?, others: 0 })
}

/// What a node is called besides its name, each once.
fn host_names(node: &Node) -> impl Iterator<Item = String> {
    let names = node.addresses.iter().filter(|a| a.address.parse::<IpAddr>().is_err());
    names.map(|a| a.address.strip_suffix('.').unwrap_or(&a.address).to_ascii_lowercase())
}

/// The addresses of a node, whichever type they are given as.
fn node_ips(node: &Node) -> impl Iterator<Item = IpAddr> {
    node.addresses.iter().filter_map(|a| a.address.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
}
