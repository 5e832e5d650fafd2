//! What control counts. `docs/metrics.md` explains each.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

/// All metrics of control, registered once.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Enrolments by role and outcome.
    pub enrolments: IntCounterVec,
    /// Renewals by role and outcome.
    pub renewals: IntCounterVec,
    /// Tokens that were refused, by code.
    pub token_refusals: IntCounterVec,
    /// Certificates that were issued, by role.
    pub issued: IntCounterVec,
    /// Revocations by role.
    pub revocations: IntCounterVec,
    /// Watches that are followed now.
    pub watchers: IntGauge,
    /// Calls of the database that failed.
    pub store_errors: IntCounter,
    /// 1 if the database can be read and written.
    pub store_up: IntGauge,
    /// API requests by route and status.
    pub requests: IntCounterVec,
    /// How long they took, in seconds.
    pub request_seconds: HistogramVec,
    /// Connections to the API, by what became of their beginning.
    pub connections: IntCounterVec,
    /// Connections that are open now.
    pub connections_open: IntGauge,
    /// Shards that are alive.
    pub shards: IntGauge,
    /// Edges that are enrolled and not revoked.
    pub edges: IntGauge,
    /// Edges that shards hold, as far as they report here.
    pub edges_online: IntGauge,
    /// When the CA ends, in seconds since 1970.
    pub ca_not_after: IntGauge,
    /// When the API's own certificate ends.
    pub api_not_after: IntGauge,
    /// The epoch of the ring in force.
    pub ring_epoch: IntGauge,
    /// Shards in it.
    pub ring_members: IntGauge,
    /// 1 if this replica decides about the ring.
    pub leading: IntGauge,
    /// 1 while all members are silent and the ring stays as it is for that reason.
    pub ring_held: IntGauge,
    /// What this replica changed about the ring, by cause.
    pub ring_changes: IntCounterVec,
    /// 1 while the database cannot be read and shards are sent to other replicas.
    pub blind: IntGauge,
    /// Looks at the ring that failed.
    pub ring_rounds_failed: IntCounter,
    /// For how long each kind of Kubernetes' objects could not be followed, in seconds.
    pub kube_stale: IntGaugeVec,
    /// Failures to follow Kubernetes, by kind.
    pub kube_errors: IntCounterVec,
    /// What the address book holds.
    pub book_entries: IntGaugeVec,
    /// Access records that were kept.
    pub access_records: IntCounter,
    /// Access records that shards had no room for.
    pub access_lost: IntCounter,
    /// How long a change took from its commit to the watchers, in seconds.
    pub publish_seconds: Histogram,
}

const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// If the registry has one of that name already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(registry, IntCounterVec::new(Opts::new(format!("mesh_control_{name}"), help), labels)?)
        };
        let gauge = |name: &str, help: &str| register(registry, IntGauge::new(format!("mesh_control_{name}"), help)?);
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(registry, IntGaugeVec::new(Opts::new(format!("mesh_control_{name}"), help), labels)?)
        };
        let histogram =
            |name: &str, help: &str| HistogramOpts::new(format!("mesh_control_{name}"), help).buckets(SECONDS.to_vec());
        Ok(Self {
            enrolments: counters("enrolments_total", "Enrolments by role and outcome.", &["role", "outcome"])?,
            renewals: counters("renewals_total", "Renewals by role and outcome.", &["role", "outcome"])?,
            token_refusals: counters("token_refusals_total", "Tokens that were refused, by code.", &["code"])?,
            issued: counters("certificates_issued_total", "Certificates issued, by role.", &["role"])?,
            revocations: counters("revocations_total", "Revocations by role.", &["role"])?,
            watchers: gauge("watchers", "Watches that are followed now.")?,
            store_errors: register(
                registry,
                IntCounter::new("mesh_control_store_errors_total", "Calls of the database that failed.")?,
            )?,
            store_up: gauge("store_up", "1 if the database can be read and written.")?,
            requests: counters("api_requests_total", "API requests by route and status.", &["route", "status"])?,
            request_seconds: register(
                registry,
                HistogramVec::new(histogram("api_request_seconds", "Duration of API requests."), &["route"])?,
            )?,
            connections: counters("connections_total", "Connections to the API, by how they began.", &["outcome"])?,
            connections_open: gauge("connections_open", "Connections to the API that are open now.")?,
            shards: gauge("shards_alive", "Shards that are alive.")?,
            edges: gauge("edges_enrolled", "Edges that are enrolled and not revoked.")?,
            edges_online: gauge("edges_online", "Edges that shards hold, as reported to this control.")?,
            ca_not_after: gauge("ca_not_after_seconds", "When the CA's certificate ends, since 1970.")?,
            api_not_after: gauge("api_certificate_not_after_seconds", "When the API's certificate ends, since 1970.")?,
            ring_epoch: gauge("ring_epoch", "Epoch of the ring in force.")?,
            ring_members: gauge("ring_members", "Shards in the ring.")?,
            leading: gauge("leading", "1 if this replica decides about the ring.")?,
            ring_held: gauge("ring_held", "1 while all members are silent, so that the ring stays as it is.")?,
            ring_changes: counters("ring_changes_total", "Changes of the ring by this replica, by cause.", &["cause"])?,
            blind: gauge("blind", "1 while shards are sent to other replicas, as the database cannot be read.")?,
            ring_rounds_failed: register(
                registry,
                IntCounter::new("mesh_control_ring_rounds_failed_total", "Looks at the ring that failed.")?,
            )?,
            kube_stale: gauges(
                "kube_stale_seconds",
                "Since when objects cannot be followed; 0 if they are.",
                &["kind"],
            )?,
            kube_errors: counters("kube_errors_total", "Failures to follow Kubernetes.", &["kind"])?,
            book_entries: gauges("book_entries", "What the address book of the cluster holds.", &["what"])?,
            access_records: register(
                registry,
                IntCounter::new("mesh_control_access_records_total", "Access records that were kept.")?,
            )?,
            access_lost: register(
                registry,
                IntCounter::new("mesh_control_access_lost_total", "Access records that shards had no room for.")?,
            )?,
            publish_seconds: register(
                registry,
                Histogram::with_opts(histogram("publish_seconds", "From the commit of a change to the watchers."))?,
            )?,
        })
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_name_of_its_own() {
        let registry = Registry::new();
        Metrics::new(&registry).unwrap();
        assert!(Metrics::new(&registry).is_err(), "registered twice");
        assert!(registry.gather().iter().all(|f| f.name().starts_with("mesh_control_")));
    }
}
