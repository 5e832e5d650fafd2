//! Sends access records to control, for `meshctl audit`. The queue in front never makes a stream wait; when control is
//! away it keeps what it has room for.

use std::{sync::Arc, time::Duration};

use proto::{api::ShardState, audit::MAX_BATCH, backoff::Backoff};
use runtime::audit::AuditQueue;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{follow::Clients, metrics::Metrics};

/// How long to gather before sending, so that a record costs no call of its own.
const GATHER: Duration = Duration::from_millis(500);
/// Records of one call.
const BATCH: usize = if MAX_BATCH < 500 { MAX_BATCH } else { 500 };
/// Bounds of the pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How long the last records may take when the shard stops.
const LAST: Duration = Duration::from_secs(2);

/// Sends what is in a queue.
#[derive(Debug)]
pub struct Auditor {
    /// The queue.
    pub queue: AuditQueue,
    /// When the process started, in milliseconds since 1970: its records are numbered from then on.
    pub started: u64,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl Auditor {
    /// Sends until the drain is over, and then what is left, if that is quick.
    pub async fn run(self, clients: Clients, mut standing: watch::Receiver<ShardState>) {
        let drained = async { while standing.changed().await.is_ok() {} };
        tokio::select! {
            biased;
            () = drained => {}
            () = self.forward(&clients) => {}
        }
        let rest = async { while self.queue.standing().0 > 0 && self.send(&clients).await {} };
        let _ = timeout(LAST, rest).await;
        let (left, lost) = self.queue.standing();
        if left > 0 || lost > 0 {
            tracing::warn!(left, lost, "access records did not reach control; the access log has them");
        }
    }

    async fn forward(&self, clients: &Clients) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            self.queue.some().await;
            if self.queue.standing().0 < BATCH {
                sleep(GATHER).await;
            }
            if self.send(clients).await {
                backoff = Backoff::new(RETRY.0, RETRY.1);
            } else {
                sleep(backoff.next_delay(rand::random())).await;
            }
        }
    }

    /// Sends a batch. Returns whether it is out of the queue.
    async fn send(&self, clients: &Clients) -> bool {
        let batch = self.queue.batch(self.started, BATCH);
        let result = clients.post::<Option<()>>("/v1/shards/access", &batch).await;
        let outcome = match &result {
            Ok(_) => "sent",
            Err(error) if error.is_transient() => {
                tracing::debug!(%error, "access records wait for control");
                self.note();
                return false;
            }
            // One that will never take them must not hold up those that follow.
            Err(error) => {
                tracing::warn!(%error, records = batch.records.len(), "control does not take access records");
                "refused"
            }
        };
        let count = u64::try_from(batch.records.len()).unwrap_or(u64::MAX);
        self.metrics.audit_records.with_label_values(&[outcome]).inc_by(count);
        self.metrics.audit_records.with_label_values(&["dropped"]).inc_by(batch.lost);
        self.queue.sent(&batch);
        self.note();
        true
    }

    fn note(&self) {
        let (waiting, _) = self.queue.standing();
        self.metrics.audit_waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }
}
