//! Congestion control: how much of a link may be in flight.
//!
//! [`model`] is pure: it is told what is sent, acknowledged and lost, and says how large the window is. It follows the
//! ideas of BBR (draft-ietf-ccwg-bbr): how fast the path delivers and how long it is without a queue are measured, and
//! the window is what fills it. Losses alone do not make it smaller; what is lost beyond chance does. `controller`
//! fits it to quinn. CUBIC (RFC 9438) is quinn's own.
//!
//! quinn has no hook for pacing: it sends while less than the window is in flight, and spreads bursts at 1.25 windows in
//! a round trip. So the window alone sets the rate, and nothing is divided by 1.25.
//!
//! What it does on which path, with figures: `docs/benchmarks/congestion.md`. The simulation that they come from is in
//! `runtime/tests/congestion`.

use std::{sync::Arc, time::Duration};

use quinn::congestion::{ControllerFactory, CubicConfig};
use serde::Deserialize;

mod controller;
pub mod model;

use controller::{ModelConfig, ModelController};
use model::Phase;

/// Who decides how much may be in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Congestion {
    /// A model of the path. It fills links that lose packets by chance, and keeps queues short.
    #[default]
    Model,
    /// CUBIC. It takes every loss for a full queue.
    Cubic,
}

impl Congestion {
    /// The name, as in the configuration and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Cubic => "cubic",
        }
    }

    /// What quinn makes the controllers of new paths with.
    pub(super) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Model => Arc::new(ModelConfig),
            Self::Cubic => Arc::new(CubicConfig::default()),
        }
    }
}

/// What a link's controller believes of its path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathModel {
    /// What the flow does: look for the bandwidth, empty the queue, cruise …
    pub phase: Phase,
    /// Bytes per second that the path delivers; 0 before anything was measured.
    pub bandwidth: f64,
    /// Round trip with an empty queue; zero before anything was measured.
    pub min_rtt: Duration,
    /// Share of packets that is lost by chance, from 0 to 1.
    pub chance_loss: f64,
    /// Bytes that may be in flight.
    pub window: u64,
}

/// What the controller of a connection believes; `None` if it has no model. Copies a few kilobytes: not for each packet.
pub(super) fn path_model(connection: &quinn::Connection) -> Option<PathModel> {
    let controller = connection.congestion_state().into_any().downcast::<ModelController>().ok()?;
    let state = controller.state();
    Some(PathModel {
        phase: state.phase,
        bandwidth: state.bandwidth,
        min_rtt: Duration::from_nanos(state.min_rtt),
        chance_loss: state.chance_loss,
        window: state.window,
    })
}
