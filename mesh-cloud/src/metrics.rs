//! What a shard counts. Each family is registered once; no edge is ever a label.

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, core::Collector,
    exponential_buckets,
};
use proto::{audit::AccessRecord, ring::Ring};
use runtime::flow::Tally;

/// The metrics of a shard.
#[derive(Debug)]
pub struct Metrics {
    /// Edges that are connected.
    pub tunnels: IntGauge,
    /// Those among them whose edge has its tunnel elsewhere by now: they end with their streams.
    pub tunnels_leaving: IntGauge,
    /// People's links that are open.
    pub user_links: IntGauge,
    /// Edges that are connected, by what carries their tunnel, `carrier`.
    pub carriers: IntGaugeVec,
    /// Links that were let in or not, by outcome.
    pub arrivals: IntCounterVec,
    /// Sessions of edges that ended, by cause.
    pub session_ends: IntCounterVec,
    /// Streams that are open, by door.
    pub streams: IntGaugeVec,
    /// Streams that ended, by door and outcome.
    pub stream_ends: IntCounterVec,
    /// Bytes towards targets.
    pub bytes_up: IntCounter,
    /// Bytes from targets.
    pub bytes_down: IntCounter,
    /// Datagrams of flows that ended, by `direction`: `up`, `down`, or `dropped` here.
    pub datagrams: IntCounterVec,
    /// How long targets took to be connected.
    pub open_seconds: Histogram,
    /// Connections on each door.
    pub door_connections: IntGaugeVec,
    /// Connections that a door turned away, by reason.
    pub door_refusals: IntCounterVec,
    /// Queries that came to the DNS door, `over` `udp` or `tcp`, by outcome.
    pub dns_queries: IntCounterVec,
    /// Keys and certificates that SSH clients showed, by outcome.
    pub ssh_logins: IntCounterVec,
    /// When the SSH host certificate ends, in seconds since 1970; 0 without one.
    pub ssh_host_certificate_not_after: IntGauge,
    /// Times that the egress door's files had changed, by what became of them.
    pub egress_files: IntCounterVec,
    /// Whether control is being followed.
    pub control_connected: IntGauge,
    /// Revision of what control said last.
    pub control_revision: IntGauge,
    /// Two machines with one identity.
    pub duplicate_identities: IntCounter,
    /// Of the ring that this shard goes by.
    pub ring_epoch: IntGauge,
    /// Shards in it.
    pub ring_members: IntGauge,
    /// Tunnels of edges that another shard owns.
    pub tunnels_unowned: IntGauge,
    /// Edges of this shard's arc whose tunnels end elsewhere.
    pub directory: IntGauge,
    /// Edges that are yet to be asked to move.
    pub moves_pending: IntGauge,
    /// Orders to edges to go elsewhere, by kind.
    pub moves: IntCounterVec,
    /// Links to other shards.
    pub peers: IntGauge,
    /// 1 for the `controller` that decides how much is sent at once on links.
    pub congestion: IntGaugeVec,
    /// Bytes of buffer that UDP sockets are granted, by `direction`.
    pub udp_buffers: IntGaugeVec,
    /// Streams that were passed on to another shard, by its answer.
    pub forwarded: IntCounterVec,
    /// Arrivals that wait for their handshake.
    pub arrivals_waiting: IntGauge,
    /// Access records that could not be queued.
    pub records_lost: IntCounter,
    /// Access records for control: `sent`, `refused` by it, or `dropped` for want of room.
    pub audit_records: IntCounterVec,
    /// Access records that wait to be sent.
    pub audit_waiting: IntGauge,
    /// Renewals that were passed to control, by outcome.
    pub renewals: IntCounterVec,
    /// Entries of the address book, by kind; those without room are of the kind `left-out`.
    pub book_entries: IntGaugeVec,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// If one is registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let gauge = IntGauge::new(format!("mesh_shard_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let counter = IntCounter::new(format!("mesh_shard_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let gauges = IntGaugeVec::new(Opts::new(format!("mesh_shard_{name}"), help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let counters = IntCounterVec::new(Opts::new(format!("mesh_shard_{name}"), help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok(counters)
        };
        let open_seconds = Histogram::with_opts(
            HistogramOpts::new("mesh_shard_open_seconds", "Time until a stream's target was connected.")
                .buckets(exponential_buckets(0.000_25, 2.0, 16)?),
        )?;
        registry.register(Box::new(open_seconds.clone()))?;
        Ok(Self {
            tunnels: gauge("tunnels", "Edges that are connected.")?,
            tunnels_leaving: gauge("tunnels_leaving", "Tunnels that only wait for their last streams to end.")?,
            carriers: gauges("carrier_tunnels", "Edges that are connected, by carrier.", &["carrier"])?,
            user_links: gauge("user_links", "Links of people's tools that are open.")?,
            arrivals: counters("arrivals_total", "Links that wanted in, by outcome.", &["outcome"])?,
            session_ends: counters("session_ends_total", "Sessions of edges that ended, by cause.", &["cause"])?,
            streams: gauges("streams", "Streams that are open, by door.", &["door"])?,
            stream_ends: counters("stream_ends_total", "Streams that ended.", &["door", "outcome", "code"])?,
            bytes_up: counter("bytes_up_total", "Bytes moved towards targets.")?,
            bytes_down: counter("bytes_down_total", "Bytes moved from targets.")?,
            datagrams: counters("datagrams_total", "Datagrams of UDP flows that ended.", &["direction"])?,
            open_seconds,
            door_connections: gauges("door_connections", "Connections on each door.", &["door"])?,
            door_refusals: counters("door_refusals_total", "Connections turned away by a door.", &["door", "reason"])?,
            dns_queries: counters("dns_queries_total", "Queries at the DNS door, by outcome.", &["over", "outcome"])?,
            ssh_logins: counters(
                "ssh_logins_total",
                "Keys and certificates that SSH clients showed, by outcome.",
                &["by", "outcome"],
            )?,
            ssh_host_certificate_not_after: gauge(
                "ssh_host_certificate_not_after",
                "When the SSH host certificate ends, in seconds since 1970; 0 without one.",
            )?,
            egress_files: counters("egress_files_total", "Changes of the egress door's files.", &["outcome"])?,
            control_connected: gauge("control_connected", "1 while control is being followed.")?,
            control_revision: gauge("control_revision", "Revision of what control said last.")?,
            duplicate_identities: counter("duplicate_identities_total", "Times that two machines used one identity.")?,
            ring_epoch: gauge("ring_epoch", "Number of the ring that this shard goes by.")?,
            ring_members: gauge("ring_members", "Shards in that ring.")?,
            tunnels_unowned: gauge("tunnels_unowned", "Tunnels of edges that another shard owns.")?,
            directory: gauge("directory", "Edges of this shard's arc whose tunnels end at another shard.")?,
            moves_pending: gauge("moves_pending", "Edges that are yet to be asked to move to their owner.")?,
            moves: counters("moves_total", "Orders to edges to go to another shard, by kind.", &["kind"])?,
            peers: gauge("peers", "Links to other shards that are up.")?,
            congestion: gauges("congestion", "Who decides how much is sent at once on links.", &["controller"])?,
            udp_buffers: gauges("udp_buffer_bytes", "Buffers that UDP sockets are granted.", &["direction"])?,
            forwarded: counters("forwarded_total", "Streams passed on to other shards, by answer.", &["answer"])?,
            arrivals_waiting: gauge("arrivals_waiting", "Links that wait for their handshake.")?,
            records_lost: counter(
                "access_records_lost_total",
                "Records of cancelled streams that found the queue full.",
            )?,
            audit_records: counters("audit_records_total", "Access records for control, by outcome.", &["outcome"])?,
            audit_waiting: gauge("audit_waiting", "Access records that wait to be sent to control.")?,
            renewals: counters("renewals_total", "Renewals passed to control, by outcome.", &["outcome"])?,
            book_entries: gauges("book_entries", "Entries of the cluster's address book, by kind.", &["kind"])?,
        })
    }

    /// Notes the ring that the shard goes by.
    pub fn goes_by(&self, ring: &Ring) {
        self.ring_epoch.set(i64::try_from(ring.epoch()).unwrap_or(i64::MAX));
        self.ring_members.set(i64::try_from(ring.len()).unwrap_or(i64::MAX));
    }

    /// Notes the size of the address book, if there is one.
    pub fn book(&self, size: Option<([usize; 3], u64)>) {
        let Some(([nodes, pods, services], left_out)) = size else { return };
        let left_out = usize::try_from(left_out).unwrap_or(usize::MAX);
        for (kind, entries) in [("nodes", nodes), ("pods", pods), ("services", services), ("left-out", left_out)] {
            self.book_entries.with_label_values(&[kind]).set(i64::try_from(entries).unwrap_or(i64::MAX));
        }
    }

    /// Streams that are open now, through whichever door they came.
    #[must_use]
    pub fn open_streams(&self) -> u64 {
        let families = self.streams.collect();
        let open = families.iter().flat_map(|f| f.get_metric()).map(|m| m.get_gauge().get_value());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of streams")]
        let open = open.sum::<f64>().max(0.0) as u64;
        open
    }

    /// Bytes moved so far, both ways.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes_up.get().saturating_add(self.bytes_down.get())
    }

    /// Links that wanted in so far, whatever became of them.
    #[must_use]
    pub fn wanted_in(&self) -> u64 {
        let families = self.arrivals.collect();
        let count = families.iter().flat_map(|f| f.get_metric()).map(|m| m.get_counter().get_value());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of links")]
        let count = count.sum::<f64>().max(0.0) as u64;
        count
    }

    /// Counts datagrams of a flow.
    pub fn flow_carried(&self, tally: &Tally) {
        for (direction, count) in [("up", tally.up), ("down", tally.down), ("dropped", tally.dropped)] {
            self.datagrams.with_label_values(&[direction]).inc_by(count);
        }
    }

    /// Counts a stream that has left its record.
    pub fn stream_ended(&self, record: &AccessRecord) {
        self.streams.with_label_values(&[&record.door]).dec();
        self.stream_ends.with_label_values(&[record.door.as_str(), &record.outcome, &record.code]).inc();
        self.bytes_up.inc_by(record.up);
        self.bytes_down.inc_by(record.down);
    }
}
