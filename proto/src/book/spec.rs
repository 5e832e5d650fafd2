//! What a cluster is made of, as far as the way to its nodes, pods and services goes: the values that control sends and
//! a book is made from.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::id::EdgeId;

/// Entries of a book, in no particular order. A later one with the same name replaces an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BookSpec {
    /// Nodes, those that are no edges included: their addresses may be the same as an edge's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<Node>,
    /// Pods that have an address and have not ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<Pod>,
    /// Services with their ready endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// The edge that it is; `None` for a node that is not reached through the mesh.
    pub edge: Option<EdgeId>,
    /// `status.addresses`.
    #[serde(default)]
    pub addresses: Vec<NodeAddress>,
    /// `status.daemonEndpoints.kubeletEndpoint.Port`.
    #[serde(default = "kubelet_port")]
    pub kubelet_port: u16,
    /// `spec.podCIDRs`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<Cidr>,
}

const fn kubelet_port() -> u16 {
    10250
}

/// One address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: AddressKind,
    /// A name or an IP address.
    pub address: String,
}

/// Types of node addresses, as Kubernetes writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AddressKind {
    /// What the node calls itself.
    Hostname,
    /// A name inside the cluster's network.
    InternalDNS,
    /// An address of the machine.
    InternalIP,
    /// A name outside.
    ExternalDNS,
    /// An address outside, which the machine itself need not have.
    ExternalIP,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Which one.
    #[serde(flatten)]
    pub key: ObjectKey,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// `spec.nodeName`.
    pub node: String,
    /// `spec.hostNetwork`: its addresses are the node's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Which one.
    #[serde(flatten)]
    pub key: ObjectKey,
    /// `spec.clusterIPs`, without `None`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cluster_ips: Vec<IpAddr>,
    /// Its TCP ports.
    #[serde(default)]
    pub ports: Vec<ServicePort>,
}

/// A TCP port of a service, with those that are ready to answer it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `spec.ports[].name`, empty if it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// `spec.ports[].port`.
    pub port: u16,
    /// From the endpoint slices: those that are ready, with the number that the target port has there.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
}

/// Where a port of a service is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Of the pod, as a rule.
    pub ip: IpAddr,
    /// There.
    pub port: u16,
    /// The node that it runs on, if the slice says so; else it is found by the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// The name of an object that lives in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl ObjectKey {
    /// Puts a key together.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A change of a book.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BookChange {
    /// Whether this begins a book anew: whatever is not in it is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    /// Whether parts of the same change follow; nothing of it counts before the last part has come.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Entries that are new or replace the ones with the same name.
    #[serde(default)]
    pub put: BookSpec,
    /// Entries that are gone.
    #[serde(default)]
    pub gone: BookKeys,
}

/// Names of entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BookKeys {
    /// Nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    /// Pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<ObjectKey>,
    /// Services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ObjectKey>,
}

impl BookChange {
    /// A whole book as changes of at most `entries` entries each, so that no message becomes too large. Always at least
    /// one: an empty book is known, too.
    #[must_use]
    pub fn snapshot(spec: BookSpec, entries: usize) -> Vec<Self> {
        let mut puts = vec![BookSpec::default()];
        puts.extend(pieces(spec.nodes, entries).map(|nodes| BookSpec { nodes, ..BookSpec::default() }));
        puts.extend(pieces(spec.pods, entries).map(|pods| BookSpec { pods, ..BookSpec::default() }));
        puts.extend(pieces(spec.services, entries).map(|services| BookSpec { services, ..BookSpec::default() }));
        let last = puts.len() - 1;
        let part = |(i, put)| Self { fresh: i == 0, more: i < last, put, gone: BookKeys::default() };
        puts.into_iter().enumerate().map(part).collect()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.fresh && self.put == BookSpec::default() && self.gone == BookKeys::default()
    }
}

fn pieces<T>(mut all: Vec<T>, size: usize) -> impl Iterator<Item = Vec<T>> {
    std::iter::from_fn(move || {
        let rest = all.split_off(all.len().min(size.max(1)));
        Some(std::mem::replace(&mut all, rest)).filter(|piece| !piece.is_empty())
    })
}

/// A network: all addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// Its first address.
    ip: IpAddr,
    bits: u8,
}

/// A text was no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network; write 10.244.1.0/24 or fd00:1::/64")]
pub struct InvalidCidr(String);

impl Cidr {
    /// The network of the first `bits` bits of an address; `None` if it has fewer.
    #[must_use]
    pub fn new(ip: IpAddr, bits: u8) -> Option<Self> {
        let ip = match ip {
            IpAddr::V4(v4) if bits <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask))
            }
            IpAddr::V6(v6) if bits <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
            }
            IpAddr::V4(_) | IpAddr::V6(_) => return None,
        };
        Some(Self { ip, bits })
    }

    /// How many bits are the same.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// Whether an address is in it; an IPv4 address in IPv6's clothes is one of IPv4.
    #[must_use]
    pub fn contains(self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_ipv4() == self.ip.is_ipv4() && Self::new(ip, self.bits) == Some(self)
    }
}

impl FromStr for Cidr {
    type Err = InvalidCidr;

    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let no = || InvalidCidr(text.chars().take(80).collect());
        let (ip, bits) = text.split_once('/').ok_or_else(no)?;
        let digits = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit());
        let bits = bits.parse().ok().filter(|_| digits).ok_or_else(no)?;
        Self::new(ip.parse().map_err(|_| no())?, bits).ok_or_else(no)
    }
}

impl TryFrom<String> for Cidr {
    type Error = InvalidCidr;

    fn try_from(text: String) -> Result<Self, InvalidCidr> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.bits)
    }
}
