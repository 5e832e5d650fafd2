//! The cluster, as kubectl shows it: every kubeconfig that works for people works here, whatever its way to log in.

use std::{collections::BTreeMap, path::PathBuf, process::Stdio};

use clap::Args;
use proto::book::{AddressKind, NodeAddress};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{process::Command, time::timeout};

use super::PATIENCE;
use crate::text;

/// What kube-apiserver takes if it is not told otherwise.
pub(super) const DEFAULT_TYPES: [AddressKind; 5] = [
    AddressKind::Hostname,
    AddressKind::InternalDNS,
    AddressKind::InternalIP,
    AddressKind::ExternalDNS,
    AddressKind::ExternalIP,
];

/// The label that stands in for a missing address of type Hostname.
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";

/// How to call kubectl.
#[derive(Debug, Args)]
pub(super) struct Kubectl {
    /// The kubeconfig [default: kubectl's own].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context of it [default: its current one].
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

/// A node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    /// All of them, so that the one that names the edge can be chosen later.
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) addresses: Vec<NodeAddress>,
    pub(super) kubelet_port: u16,
    pub(super) hostname: Option<String>,
    /// Why Kubernetes takes it for not ready.
    pub(super) not_ready: Option<String>,
    /// Whether it is one of those asked for.
    pub(super) wanted: bool,
}

/// What the command line of kube-apiserver's pod says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Apiserver {
    pub(super) selector: Option<String>,
    pub(super) address_types: Option<Vec<AddressKind>>,
}

impl Kubectl {
    /// All nodes; and kube-apiserver, if it is a pod that can be seen.
    ///
    /// # Errors
    /// With what kubectl says.
    pub(super) async fn look(&self) -> Result<(Vec<Node>, Option<Apiserver>), String> {
        let nodes: List<RawNode> = self.get(&["nodes"]).await?;
        let pods: Result<List<RawPod>, _> =
            self.get(&["pods", "--namespace=kube-system", "--selector=component=kube-apiserver"]).await;
        let flags = pods.ok().and_then(|pods| pods.items.into_iter().next()).map(|pod| Apiserver::of(&pod));
        Ok((nodes.items.into_iter().map(Node::from).collect(), flags))
    }

    async fn get<T: DeserializeOwned>(&self, what: &[&str]) -> Result<T, String> {
        let mut command = Command::new("kubectl");
        command.stdin(Stdio::null()).kill_on_drop(true);
        if let Some(file) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(file);
        }
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
        command.arg("get").args(what).args(["--output=json", "--request-timeout=15s"]);
        let output = timeout(PATIENCE, command.output())
            .await
            .map_err(|_| format!("kubectl did not end within {}", text::span(PATIENCE)))?
            .map_err(|e| format!("kubectl cannot be started: {e}"))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(words.lines().last().unwrap_or("kubectl failed without a word").to_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|e| format!("kubectl's answer cannot be read: {e}"))
    }
}

/// Reads a type of address.
///
/// # Errors
/// If there is no such type.
pub(super) fn address_kind(text: &str) -> Result<AddressKind, String> {
    let quoted = serde_json::Value::from(text);
    serde_json::from_value(quoted).map_err(|_| {
        format!("{text:?} is no type of address; there are Hostname, InternalDNS, InternalIP, ExternalDNS, ExternalIP")
    })
}

impl Node {
    /// What kube-apiserver dials for this node.
    pub(super) fn dialled(&self, types: &[AddressKind]) -> Option<&str> {
        let of = |kind: &AddressKind| {
            let named = self.addresses.iter().find(|a| a.kind == *kind).map(|a| a.address.as_str());
            named.or_else(|| self.hostname.as_deref().filter(|_| *kind == AddressKind::Hostname))
        };
        types.iter().find_map(of)
    }
}

impl Apiserver {
    fn of(pod: &RawPod) -> Self {
        let words: Vec<_> = pod.spec.containers.iter().flat_map(|c| c.command.iter().chain(&c.args)).collect();
        let flag = |name: &str| {
            let joined = format!("--{name}=");
            let apart = |pair: &[&String]| (pair[0].as_str() == &joined[..joined.len() - 1]).then(|| pair[1].clone());
            let one = words.iter().find_map(|w| w.strip_prefix(joined.as_str()).map(str::to_owned));
            one.or_else(|| words.windows(2).find_map(apart))
        };
        let types = flag("kubelet-preferred-address-types")
            .map(|list| list.split(',').filter_map(|kind| address_kind(kind.trim()).ok()).collect());
        Self { selector: flag("egress-selector-config-file"), address_types: types }
    }
}

#[derive(Debug, Deserialize)]
struct List<T> {
    items: Vec<T>,
}

#[derive(Debug, Deserialize)]
struct RawNode {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    addresses: Vec<serde_json::Value>,
    daemon_endpoints: DaemonEndpoints,
    conditions: Vec<Condition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DaemonEndpoints {
    kubelet_endpoint: KubeletEndpoint,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct KubeletEndpoint {
    #[serde(rename = "Port")]
    port: u16,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
struct RawPod {
    spec: PodSpec,
}

#[derive(Debug, Deserialize)]
struct PodSpec {
    containers: Vec<Container>,
}

#[derive(Debug, Deserialize)]
struct Container {
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
}

impl From<RawNode> for Node {
    fn from(raw: RawNode) -> Self {
        let mut labels = raw.metadata.labels;
        let ready = raw.status.conditions.iter().find(|c| c.kind == "Ready");
        let not_ready = match ready {
            Some(ready) if ready.status == "True" => None,
            Some(ready) => Some(ready.reason.clone()),
            None => Some("it has never reported".to_owned()),
        };
        let port = raw.status.daemon_endpoints.kubelet_endpoint.port;
        Self {
            name: raw.metadata.name,
            annotations: raw.metadata.annotations,
            // Types that are not known are none that kube-apiserver dials.
            addresses: raw.status.addresses.into_iter().filter_map(|a| serde_json::from_value(a).ok()).collect(),
            kubelet_port: if port == 0 { 10250 } else { port },
            hostname: labels.remove(HOSTNAME_LABEL),
            not_ready,
            wanted: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_is_dialled_as_kube_apiserver_would() {
        let raw: RawNode = serde_json::from_value(json!({
            "metadata": {"name": "node-1", "labels": {"kubernetes.io/hostname": "n1"}},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Moon", "address": "x"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10350}},
                "conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}],
            },
        }))
        .unwrap();
        let node = Node::from(raw);
        assert_eq!(node.dialled(&DEFAULT_TYPES), Some("n1"), "the label stands in for the address");
        assert_eq!(node.dialled(&[AddressKind::ExternalIP, AddressKind::InternalIP]), Some("10.0.0.1"));
        assert_eq!(node.dialled(&[AddressKind::ExternalDNS]), None);
        assert_eq!((node.kubelet_port, node.not_ready.as_deref()), (10350, Some("NodeStatusUnknown")));
        let bare: RawNode = serde_json::from_value(json!({"metadata": {"name": "n"}})).unwrap();
        assert_eq!(Node::from(bare).kubelet_port, 10250);
    }

    #[test]
    fn flags_are_found_however_they_are_written() {
        let pod = |command: serde_json::Value| -> RawPod {
            serde_json::from_value(json!({"spec": {"containers": [{"command": command}]}})).unwrap()
        };
        let joined = Apiserver::of(&pod(json!([
            "kube-apiserver",
            "--egress-selector-config-file=/e.yaml",
            "--kubelet-preferred-address-types=InternalIP,Hostname"
        ])));
        assert_eq!(joined.selector.as_deref(), Some("/e.yaml"));
        assert_eq!(joined.address_types, Some(vec![AddressKind::InternalIP, AddressKind::Hostname]));
        let apart = Apiserver::of(&pod(json!(["kube-apiserver", "--egress-selector-config-file", "/e.yaml"])));
        assert_eq!(apart, Apiserver { selector: Some("/e.yaml".into()), address_types: None });
        assert!(address_kind("Moon").unwrap_err().contains("InternalIP"));
    }
}
