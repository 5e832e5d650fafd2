//! `custom.metrics.k8s.io`: how loaded each shard is, for a HorizontalPodAutoscaler. A shard is the pod of its name.
//!
//! Pure answers; who may ask is decided in [`super::front`]. Both versions of the API say the same with other field names.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::presence::Load;

/// The group.
pub(super) const GROUP: &str = "custom.metrics.k8s.io";
/// Its versions, preferred first.
pub(super) const VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];
/// What rates are the mean of, in seconds, at least.
const WINDOW: u64 = 10;

/// A metric that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    /// Edges that are connected, also under the names that SuperEdge's autoscaler goes by.
    Tunnels,
    /// Streams that are open.
    Streams,
    /// Bytes per second, both ways.
    Bytes,
    /// Links that want in, per second.
    Arrivals,
}

/// All names. They are those of the shards' own metrics, as a Prometheus adapter would call them.
pub(super) const METRICS: [(&str, Metric); 6] = [
    ("mesh_shard_tunnels", Metric::Tunnels),
    ("mesh_shard_streams", Metric::Streams),
    ("mesh_shard_bytes_per_second", Metric::Bytes),
    ("mesh_shard_arrivals_per_second", Metric::Arrivals),
    ("tunnel_cloud_nodes", Metric::Tunnels),
    ("nodes_per_pod", Metric::Tunnels),
];

/// The metric of a name.
pub(super) fn metric(name: &str) -> Option<Metric> {
    METRICS.iter().find(|(known, _)| *known == name).map(|(_, metric)| *metric)
}

impl Metric {
    /// A shard's value as Kubernetes writes quantities.
    fn of(self, load: &Load) -> String {
        match self {
            Self::Tunnels => load.tunnels.to_string(),
            Self::Streams => load.streams.to_string(),
            Self::Bytes => milli(load.bytes_per_second),
            Self::Arrivals => milli(load.arrivals_per_second),
        }
    }

    const fn is_rate(self) -> bool {
        match self {
            Self::Tunnels | Self::Streams => false,
            Self::Bytes | Self::Arrivals => true,
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is not negative and fits by far")]
fn milli(rate: f64) -> String {
    format!("{}m", (rate.max(0.0) * 1000.0).round() as u64)
}

/// The group, for discovery.
pub(super) fn group() -> Value {
    let version = |version: &&str| json!({"groupVersion": format!("{GROUP}/{version}"), "version": version});
    let versions: Vec<_> = VERSIONS.iter().map(version).collect();
    json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": GROUP, "preferredVersion": versions[0], "versions": versions
    })
}

/// All groups that are served here.
pub(super) fn groups() -> Value {
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]})
}

/// What a version of the group has.
pub(super) fn resources(version: &str) -> Value {
    let resource = |(name, _): &(&str, Metric)| {
        json!({
            "name": format!("pods/{name}"), "singularName": "", "namespaced": true,
            "kind": "MetricValueList", "verbs": ["get"]
        })
    };
    let resources: Vec<_> = METRICS.iter().map(resource).collect();
    json!({
        "kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": format!("{GROUP}/{version}"), "resources": resources
    })
}

/// The values of a metric for some pods. A pod that is no shard, or has not reported, has none.
pub(super) fn values(
    version: &str,
    (namespace, pods): (&str, &[String]),
    (name, metric): (&str, Metric),
    loads: &BTreeMap<String, Load>,
    now: i64,
) -> Value {
    let item = |(pod, load): (&String, &Load)| {
        let described = json!({"kind": "Pod", "namespace": namespace, "name": pod, "apiVersion": "/v1"});
        let time = Timestamp::from_second(now - load.age).unwrap_or_default().to_string();
        let mut item = json!({"describedObject": described, "timestamp": time, "value": metric.of(load)});
        let window = metric.is_rate().then_some(WINDOW);
        if version == VERSIONS[0] {
            item["metric"] = json!({"name": name});
            item["windowSeconds"] = json!(window);
        } else {
            item["metricName"] = json!(name);
            item["window"] = json!(window);
        }
        if window.is_none()
            && let Some(map) = item.as_object_mut()
        {
            map.retain(|_, value| !value.is_null());
        }
        item
    };
    let items: Vec<_> = pods.iter().filter_map(|pod| Some((pod, loads.get(pod)?))).map(item).collect();
    json!({"kind": "MetricValueList", "apiVersion": format!("{GROUP}/{version}"), "metadata": {}, "items": items})
}

/// An error as Kubernetes tells it.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": message
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads() -> BTreeMap<String, Load> {
        let load = Load { tunnels: 250, streams: 7, bytes_per_second: 1536.5, arrivals_per_second: 0.1, age: 2 };
        BTreeMap::from([("shard-a".into(), load), ("shard-b".into(), Load { tunnels: 50, ..load })])
    }

    fn ask(version: &str, pods: &[&str], name: &str) -> Value {
        let pods: Vec<_> = pods.iter().map(ToString::to_string).collect();
        values(version, ("mesh", &pods), (name, metric(name).unwrap()), &loads(), 1_000_000_000)
    }

    #[test]
    fn a_list_has_a_value_for_each_pod_that_is_a_shard() {
        let list = ask("v1beta2", &["shard-a", "other", "shard-b"], "mesh_shard_tunnels");
        assert_eq!(
            (&list["kind"], &list["apiVersion"]),
            (&json!("MetricValueList"), &json!("custom.metrics.k8s.io/v1beta2"))
        );
        assert_eq!(list["items"].as_array().unwrap().len(), 2);
        assert_eq!(
            list["items"][0],
            json!({
                "describedObject": {"kind": "Pod", "namespace": "mesh", "name": "shard-a", "apiVersion": "/v1"},
                "metric": {"name": "mesh_shard_tunnels"}, "timestamp": "2001-09-09T01:46:38Z", "value": "250"
            })
        );
        for name in ["tunnel_cloud_nodes", "nodes_per_pod"] {
            assert_eq!(ask("v1beta1", &["shard-b"], name)["items"][0]["value"], "50");
        }
    }

    #[test]
    fn rates_are_quantities_with_their_window() {
        let item = &ask("v1beta1", &["shard-a"], "mesh_shard_bytes_per_second")["items"][0];
        assert_eq!(
            (&item["metricName"], &item["value"], &item["window"]),
            (&json!("mesh_shard_bytes_per_second"), &json!("1536500m"), &json!(10))
        );
        let item = &ask("v1beta2", &["shard-a"], "mesh_shard_arrivals_per_second")["items"][0];
        assert_eq!((&item["value"], &item["windowSeconds"]), (&json!("100m"), &json!(10)));
        assert_eq!(metric("mesh_shard_nonsense"), None);
    }

    #[test]
    fn discovery_names_what_is_served() {
        assert_eq!(group()["preferredVersion"]["version"], "v1beta2");
        assert_eq!(groups()["groups"][0]["versions"].as_array().unwrap().len(), 2);
        let list = resources("v1beta1");
        assert_eq!(list["groupVersion"], "custom.metrics.k8s.io/v1beta1");
        assert_eq!(list["resources"][0]["name"], "pods/mesh_shard_tunnels");
        assert_eq!(list["resources"].as_array().unwrap().len(), METRICS.len());
    }
}
