//! The objects of Kubernetes that control reads, cut down to the fields that count. What else an apiserver sends is
//! skipped while it is read, so that a pod with pages of specification costs no more than its address.

use std::borrow::Cow;

use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde::Deserialize;

/// Says which resource a type is.
macro_rules! resource {
    ($type:ident, $scope:ty, $group:literal, $version:literal, $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(_: &()) -> Cow<'_, str> {
                stringify!($type).into()
            }

            fn group(_: &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version(_: &()) -> Cow<'_, str> {
                $version.into()
            }

            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(Node, ClusterResourceScope, "", "v1", "nodes");
resource!(Pod, NamespaceResourceScope, "", "v1", "pods");
resource!(Service, NamespaceResourceScope, "", "v1", "services");
resource!(EndpointSlice, NamespaceResourceScope, "discovery.k8s.io", "v1", "endpointslices");

/// A node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Node {
    /// Name and annotations.
    pub(super) metadata: ObjectMeta,
    /// Its pod networks.
    pub(super) spec: NodeSpec,
    /// Its addresses.
    pub(super) status: NodeStatus,
}

/// `spec` of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NodeSpec {
    /// The pod network of older clusters.
    #[serde(rename = "podCIDR")]
    pub(super) pod_cidr: Option<String>,
    /// The pod networks.
    #[serde(rename = "podCIDRs")]
    pub(super) pod_cidrs: Vec<String>,
}

/// `status` of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NodeStatus {
    /// Its addresses.
    pub(super) addresses: Vec<Address>,
    /// Where its kubelet listens.
    pub(super) daemon_endpoints: DaemonEndpoints,
}

/// An address of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Address {
    /// Its type, such as `InternalIP`.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// The address.
    pub(super) address: String,
}

/// Ports of a node's daemons.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DaemonEndpoints {
    /// The kubelet.
    pub(super) kubelet_endpoint: DaemonEndpoint,
}

/// A port of a daemon.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DaemonEndpoint {
    /// The port; 0 if it is not set.
    #[serde(rename = "Port")]
    pub(super) port: u16,
}

/// A pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Pod {
    /// Namespace and name.
    pub(super) metadata: ObjectMeta,
    /// Where it runs.
    pub(super) spec: PodSpec,
    /// Its addresses.
    pub(super) status: PodStatus,
}

/// `spec` of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    /// The node that it runs on.
    pub(super) node_name: Option<String>,
    /// Whether its addresses are the node's.
    pub(super) host_network: bool,
}

/// `status` of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodStatus {
    /// `Running`, `Succeeded` and so on.
    pub(super) phase: Option<String>,
    /// Its first address.
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    /// All of its addresses.
    #[serde(rename = "podIPs")]
    pub(super) pod_ips: Vec<PodIp>,
}

/// An address of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodIp {
    /// The address.
    pub(super) ip: String,
}

/// A service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Service {
    /// Namespace and name.
    pub(super) metadata: ObjectMeta,
    /// Addresses and ports.
    pub(super) spec: ServiceSpec,
}

/// `spec` of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServiceSpec {
    /// The first address; `None` as a word for one without.
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<String>,
    /// All of its addresses.
    #[serde(rename = "clusterIPs")]
    pub(super) cluster_ips: Vec<String>,
    /// Its ports.
    pub(super) ports: Vec<Port>,
}

/// A port of a service or of an endpoint slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Port {
    /// Its name.
    pub(super) name: Option<String>,
    /// Its number.
    pub(super) port: Option<u16>,
    /// `TCP` if it is not set.
    pub(super) protocol: Option<String>,
}

impl Port {
    /// Whether it is one of TCP.
    #[must_use]
    pub(super) fn is_tcp(&self) -> bool {
        self.protocol.as_deref().is_none_or(|p| p == "TCP")
    }

    /// Its name, empty if it has none.
    #[must_use]
    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
}

/// An endpoint slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct EndpointSlice {
    /// Namespace, name, and the service as a label.
    pub(super) metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub(super) address_type: String,
    /// Who answers.
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) endpoints: Vec<Endpoint>,
    /// On which ports.
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) ports: Vec<Port>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Endpoint {
    /// Its addresses, which are exchangeable.
    pub(super) addresses: Vec<String>,
    /// Whether it can answer.
    pub(super) conditions: Conditions,
    /// The node that it runs on.
    pub(super) node_name: Option<String>,
}

/// How an endpoint is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    /// Unknown counts as ready.
    pub(super) ready: Option<bool>,
}

/// Go writes an empty list as `null`.
fn null_is_empty<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Option::<Vec<T>>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_count_is_skipped_and_what_is_not_there_is_empty() {
        let text = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web","namespace":"a"},
            "spec":{"nodeName":"n1","containers":[{"name":"c","image":"i"}]},
            "status":{"phase":"Running","podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"}],"qosClass":"Burstable"}}"#;
        let pod: Pod = serde_json::from_str(text).unwrap();
        assert_eq!((pod.spec.node_name.as_deref(), pod.spec.host_network), (Some("n1"), false));
        let text = r#"{"metadata":{"name":"s","namespace":"a"},"addressType":"IPv4","endpoints":null,"ports":null}"#;
        let slice: EndpointSlice = serde_json::from_str(text).unwrap();
        assert!(slice.endpoints.is_empty() && slice.ports.is_empty());
        assert_eq!(EndpointSlice::url_path(&(), None), "/apis/discovery.k8s.io/v1/endpointslices");
        assert_eq!(Node::url_path(&(), None), "/api/v1/nodes");
        assert_eq!(Service::url_path(&(), Some("a")), "/api/v1/namespaces/a/services");
    }
}
