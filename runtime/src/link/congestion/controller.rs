//! The model as quinn's controller: it turns quinn's instants into times since the beginning, and nothing else.
//!
//! quinn calls `on_ack` for each packet of an acknowledgement, `on_end_acks` once behind them, and then, if something is
//! lost, `on_congestion_event` once with the sum of the bytes. The time of sending that `on_ack` gets is the very instant
//! that `on_sent` got, so that packet numbers are not needed.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::model::{Loss, Model, Nanos, State};

/// The seed of every path's cycles. They go apart by what each one measures.
const SEED: u64 = 0x1f0a_37c4_55d2_9be1;

/// Makes controllers with a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct ModelConfig;

impl ControllerFactory for ModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(ModelController { began: now, model: Model::new(current_mtu, SEED) })
    }
}

/// A path's controller.
#[derive(Clone, Debug)]
pub(super) struct ModelController {
    began: Instant,
    model: Model,
}

impl ModelController {
    pub(super) fn state(&self) -> State {
        self.model.state()
    }

    fn at(&self, instant: Instant) -> Nanos {
        let since: Duration = instant.saturating_duration_since(self.began);
        // 584 years.
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Controller for ModelController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _: u64) {
        self.model.sent(self.at(now), bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: &RttEstimator) {
        self.model.acked(self.at(now), self.at(sent), bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.model.acks_end(self.at(now), in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        let loss = Loss { sent: self.at(sent), bytes: lost_bytes, persistent: is_persistent_congestion };
        self.model.lost(self.at(now), &loss);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.model.set_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.model.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.model.window();
        metrics.pacing_rate = Some((self.model.pacing_rate() * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.model.first_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
