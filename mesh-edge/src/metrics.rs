//! What is counted. No metric has the edge's name as a label: whoever scrapes knows whom it scrapes.

use std::time::Duration;

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, core::Collector,
};
use runtime::{
    flow::Tally,
    link::{
        Link,
        buffers::UdpBuffers,
        congestion::{Congestion, model::Phase},
    },
};

/// The metrics of an edge, `mesh_edge_*`.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// 1 while a tunnel serves.
    pub connected: IntGauge,
    /// 1 for the `carrier` of the tunnel that serves.
    pub carrier: IntGaugeVec,
    /// Times that the next tunnel had another carrier than the one before, by what it went `to`.
    pub carrier_changes: IntCounterVec,
    /// Handshakes, by `carrier` and `outcome`: `ok`, `late` when the other carrier was taken, or the slug of the end.
    pub handshakes: IntCounterVec,
    /// Attempts to reach a shard, by `outcome`: `welcome`, `redirect`, or the slug of the refusal or of the end.
    pub dials: IntCounterVec,
    /// Tunnels that ended, by the slug of the `cause`.
    pub link_ends: IntCounterVec,
    /// Times that the network said, of a tunnel that served, that nobody listens there.
    pub refusals: IntCounter,
    /// Times that a tunnel went on from a new socket because nothing came on the old one.
    pub rebinds: IntCounter,
    /// From Ping to Pong, in seconds.
    pub rtt: Histogram,
    /// The shard's clock minus this one, in seconds.
    pub clock_skew: Gauge,
    /// When the certificate ends, in seconds since 1970.
    pub cert_expiry: IntGauge,
    /// Renewals, by `outcome`: `ok`, `refused`, `unusable`, `no-answer`, `not-stored`.
    pub renewals: IntCounterVec,
    /// Streams that are open.
    pub streams_active: IntGauge,
    /// Streams that ended, by `outcome`: `finished`, or the slug of the refusal or of the reset.
    pub streams: IntCounterVec,
    /// UDP flows that are open.
    pub flows_active: IntGauge,
    /// Datagrams of flows that ended, by `direction`: `up`, `down`, or `dropped` here.
    pub datagrams: IntCounterVec,
    /// Connections on this edge's own doors.
    pub door_connections: IntGauge,
    /// Streams that its doors opened, by `outcome`: `opened`, or the slug of the refusal.
    pub door_streams: IntCounterVec,
    /// Bytes towards targets.
    pub bytes_up: IntCounter,
    /// Bytes from targets.
    pub bytes_down: IntCounter,
    /// 1 for the `controller` that decides how much is sent at once.
    pub congestion: IntGaugeVec,
    /// Bytes of buffer that UDP sockets are granted, by direction.
    pub udp_buffers: IntGaugeVec,
    /// What that controller believes of the tunnel's path, if it has a model.
    pub path: PathMetrics,
    /// Problems with who this edge, or its peer, is, by `kind`.
    pub identity_errors: IntCounterVec,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// If a name is taken in the registry.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let vec = |name: &str, help: &str, label: &str| {
            register(registry, IntCounterVec::new(Opts::new(format!("mesh_edge_{name}"), help), &[label])?)
        };
        let gauge = |name: &str, help: &str| register(registry, IntGauge::new(format!("mesh_edge_{name}"), help)?);
        let counter = |name: &str, help: &str| register(registry, IntCounter::new(format!("mesh_edge_{name}"), help)?);
        let rtt = HistogramOpts::new("mesh_edge_rtt_seconds", "From Ping to Pong on the control stream.")
            .buckets(vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
        let bytes = vec("bytes_total", "Bytes of streams that ended.", "direction")?;
        Ok(Self {
            connected: gauge("connected", "1 while a tunnel to a shard serves.")?,
            carrier: register(
                registry,
                IntGaugeVec::new(Opts::new("mesh_edge_carrier", "1 for the carrier of the tunnel."), &["carrier"])?,
            )?,
            carrier_changes: vec("carrier_changes_total", "Changes from one carrier to the other.", "to")?,
            handshakes: register(
                registry,
                IntCounterVec::new(
                    Opts::new("mesh_edge_handshakes_total", "Handshakes with shards."),
                    &["carrier", "outcome"],
                )?,
            )?,
            dials: vec("dials_total", "Attempts to reach a shard.", "outcome")?,
            link_ends: vec("link_ends_total", "Tunnels that ended.", "cause")?,
            refusals: counter("icmp_refusals_total", "ICMP port unreachable about the shard of a tunnel.")?,
            rebinds: counter("rebinds_total", "Tunnels that went on from a new UDP socket.")?,
            rtt: register(registry, Histogram::with_opts(rtt)?)?,
            clock_skew: register(
                registry,
                Gauge::new("mesh_edge_clock_skew_seconds", "The shard's clock minus this machine's.")?,
            )?,
            cert_expiry: gauge("cert_expiry_timestamp_seconds", "When this edge's certificate ends.")?,
            renewals: vec("renewals_total", "Attempts to renew the certificate.", "outcome")?,
            streams_active: gauge("streams_active", "Streams that are open.")?,
            streams: vec("streams_total", "Streams that ended.", "outcome")?,
            flows_active: gauge("udp_flows_active", "UDP flows that are open.")?,
            datagrams: vec("datagrams_total", "Datagrams of UDP flows that ended.", "direction")?,
            door_connections: gauge("door_connections", "Connections on the doors of this edge.")?,
            door_streams: vec("door_streams_total", "Streams that the doors of this edge opened.", "outcome")?,
            bytes_up: bytes.with_label_values(&["up"]),
            bytes_down: bytes.with_label_values(&["down"]),
            congestion: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("mesh_edge_congestion", "Who decides how much is sent at once."),
                    &["controller"],
                )?,
            )?,
            udp_buffers: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("mesh_edge_udp_buffer_bytes", "Buffers that UDP sockets are granted."),
                    &["direction"],
                )?,
            )?,
            path: PathMetrics::new(registry)?,
            identity_errors: vec("identity_errors_total", "Problems with certificates and identities.", "kind")?,
        })
    }

    /// Counts datagrams of a flow.
    pub fn flow_carried(&self, tally: &Tally) {
        for (direction, count) in [("up", tally.up), ("down", tally.down), ("dropped", tally.dropped)] {
            self.datagrams.with_label_values(&[direction]).inc_by(count);
        }
    }

    /// Notes who decides how much is sent at once.
    pub fn congestion_is(&self, congestion: Congestion) {
        self.congestion.with_label_values(&[congestion.name()]).set(1);
    }

    /// Notes how large the buffers of UDP sockets are.
    pub fn udp_buffers_are(&self, buffers: UdpBuffers) {
        for (direction, size) in [("receive", buffers.receive), ("send", buffers.send)] {
            self.udp_buffers.with_label_values(&[direction]).set(i64::try_from(size).unwrap_or(i64::MAX));
        }
    }

    /// Notes a round trip.
    pub fn observe_rtt(&self, rtt: Duration) {
        self.rtt.observe(rtt.as_secs_f64());
    }
}

/// What the congestion controller of the present tunnel believes.
#[derive(Clone, Debug)]
pub struct PathMetrics {
    /// Bytes per second that the path takes.
    pub bandwidth: Gauge,
    /// Round trip with an empty queue, in seconds.
    pub min_rtt: Gauge,
    /// Share of packets that is lost by chance.
    pub chance_loss: Gauge,
    /// Bytes that may be in flight.
    pub window: IntGauge,
    /// Bytes of UDP payload that the path takes in one packet.
    pub mtu: IntGauge,
    /// 1 for the `phase` that it is in.
    pub phase: IntGaugeVec,
}

impl PathMetrics {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| register(registry, Gauge::new(format!("mesh_edge_path_{name}"), help)?);
        Ok(Self {
            bandwidth: gauge("bandwidth_bytes_per_second", "What the path takes, as measured.")?,
            min_rtt: gauge("min_rtt_seconds", "Round trip with an empty queue.")?,
            chance_loss: gauge("chance_loss_ratio", "Share of packets that is lost by chance.")?,
            window: register(registry, IntGauge::new("mesh_edge_path_window_bytes", "Bytes that may be in flight.")?)?,
            mtu: register(
                registry,
                IntGauge::new("mesh_edge_path_mtu_bytes", "UDP payload that one packet may have.")?,
            )?,
            phase: register(
                registry,
                IntGaugeVec::new(Opts::new("mesh_edge_path_phase", "What the controller does."), &["phase"])?,
            )?,
        })
    }

    /// Notes what is believed of a tunnel now. Only the size of packets if its controller has no model.
    pub fn observe(&self, link: &Link) {
        self.mtu.set(link.stats().mtu.into());
        let Some(model) = link.path_model() else { return };
        self.bandwidth.set(model.bandwidth);
        self.min_rtt.set(model.min_rtt.as_secs_f64());
        self.chance_loss.set(model.chance_loss);
        self.window.set(i64::try_from(model.window).unwrap_or(i64::MAX));
        for phase in Phase::ALL {
            self.phase.with_label_values(&[phase.name()]).set(i64::from(phase == model.phase));
        }
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
