//! Changing the carrier of a tunnel that serves: to TCP when nothing comes over QUIC any more, and back to QUIC when that
//! comes through again. Both are make-before-break: the next tunnel is welcomed before the old one is retired, and
//! streams of the old one go on for as long as it carries them.

use std::time::Duration;

use proto::message::Candidate;
use runtime::link::{Carrier, Link, LinkEnd};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, info, warn};

use super::Life;
use crate::{course::Outcome, link::Tunnel};

/// Pauses before QUIC is tried again, the first and the longest: whoever lets UDP through again sees it used within a
/// minute.
const AGAIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(40));
/// How much of a pause is left to chance, so that the edges of a site do not try together.
const SPREAD: f64 = 0.1;
/// A tunnel over QUIC that lived shorter than this is no reason to try again soon.
const SHORT: Duration = Duration::from_secs(60);
/// How long nothing must come over QUIC, after the first ping that should have been answered, before TCP is taken.
const DOUBT: Duration = Duration::from_millis(1500);

/// What is needed of a tunnel to find another carrier for it.
pub(super) struct Present {
    link: Link,
    address: String,
    doubts: watch::Receiver<Option<Instant>>,
}

/// Waits until something comes again.
async fn cleared(doubts: &mut watch::Receiver<Option<Instant>>) {
    if doubts.wait_for(Option::is_none).await.is_err() {
        // The tunnel is about to end, and says so itself.
        std::future::pending().await
    }
}

impl Life {
    pub(super) fn present(tunnel: &Tunnel) -> Present {
        Present { link: tunnel.link.clone(), address: tunnel.address.clone(), doubts: tunnel.doubts() }
    }

    /// A tunnel over the other carrier, once that is the better one.
    pub(super) async fn other_carrier(&self, present: Present) -> (Tunnel, Vec<Candidate>) {
        if !self.parts.ways.lock().has_tcp() {
            return std::future::pending().await;
        }
        match present.link.carrier() {
            Carrier::Quic => self.stand_in(present).await,
            Carrier::Tcp => self.back(&present.address).await,
        }
    }

    /// Over TCP, while nothing comes over QUIC.
    async fn stand_in(&self, Present { link, address, mut doubts }: Present) -> (Tunnel, Vec<Candidate>) {
        loop {
            let since = doubts.wait_for(Option::is_some).await.map(|since| *since);
            let Ok(Some(since)) = since else { return std::future::pending().await };
            debug!(address, "nothing comes over QUIC: TCP is dialled to stand in");
            let mut watching = doubts.clone();
            let stands_in = async {
                let next = self.dial_by(Carrier::Tcp, &address).await?;
                sleep_until(since + DOUBT).await;
                self.hello(next, &address).await
            };
            let outcome = tokio::select! {
                biased;
                () = cleared(&mut watching) => {
                    debug!(address, "QUIC answers again");
                    continue;
                }
                outcome = stands_in => outcome,
            };
            match outcome {
                Ok(tunnel) => {
                    let silent_s = since.elapsed().as_secs_f32();
                    warn!(address, silent_s, rtt = ?link.rtt(), "nothing comes over QUIC, and TCP comes through");
                    return tunnel;
                }
                Err(outcome) => {
                    debug!(address, ?outcome, "TCP does not come through either");
                    tokio::select! {
                        biased;
                        () = cleared(&mut watching) => {}
                        () = sleep(DOUBT) => {}
                    }
                }
            }
        }
    }

    /// Over QUIC, once it comes through again.
    async fn back(&self, address: &str) -> (Tunnel, Vec<Candidate>) {
        let mut pause = if self.quic_was_short { AGAIN.1 } else { AGAIN.0 };
        loop {
            sleep(pause.mul_f64(1.0 - SPREAD + 2.0 * SPREAD * self.parts.dice.fraction())).await;
            pause = (pause * 2).min(AGAIN.1);
            let outcome = match self.dial_by(Carrier::Quic, address).await {
                Ok(link) => self.hello(link, address).await,
                Err(end) => Err(Outcome::Failed(end)),
            };
            match outcome {
                Ok(tunnel) => {
                    info!(address, "QUIC comes through again");
                    return tunnel;
                }
                Err(outcome) => debug!(address, ?outcome, "QUIC does not come through yet"),
            }
        }
    }

    async fn dial_by(&self, carrier: Carrier, address: &str) -> Result<Link, LinkEnd> {
        let ways = self.parts.ways.lock().clone();
        ways.dial_by(carrier, address, &self.parts.tunnel.metrics).await
    }

    async fn hello(&self, link: Link, address: &str) -> Result<(Tunnel, Vec<Candidate>), Outcome> {
        self.greeted(link, address, self.course.avoided(Instant::now())).await
    }

    /// Notes what carries the tunnel that serves now; `None` if there is none.
    pub(super) fn carried_by(&mut self, carrier: Option<Carrier>) {
        let metrics = &self.parts.tunnel.metrics;
        for each in Carrier::ALL {
            metrics.carrier.with_label_values(&[each.slug()]).set(i64::from(carrier == Some(each)));
        }
        let Some(carrier) = carrier else { return };
        let before = self.carrier.replace(carrier);
        if before == Some(carrier) || (before.is_none() && carrier == Carrier::Quic) {
            return;
        }
        metrics.carrier_changes.with_label_values(&[carrier.slug()]).inc();
        match carrier {
            Carrier::Tcp => warn!("the tunnel is over TCP: UDP does not come through; QUIC is tried again meanwhile"),
            Carrier::Quic => info!("the tunnel is over QUIC again"),
        }
    }

    /// Notes the end of a tunnel, as far as it tells how much QUIC can be relied on here.
    pub(super) fn carried(&mut self, tunnel: &Tunnel) {
        if tunnel.link.carrier() == Carrier::Quic {
            self.quic_was_short = tunnel.since.elapsed() < SHORT;
        }
    }
}

impl From<LinkEnd> for Outcome {
    fn from(end: LinkEnd) -> Self {
        Self::Failed(end)
    }
}
