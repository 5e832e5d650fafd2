//! Access records on their way to control: a queue with a bound between the streams that end and the task that sends.
//!
//! No stream ever waits for it. When control is away the queue keeps what it has room for; what comes then is not kept,
//! and counted. Of streams that ended well only a share may be kept; what was refused or broken always is.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use proto::audit::{AccessBatch, AccessRecord};
use tokio::sync::Notify;

/// Records of one process that wait to be sent. Clones are the same queue.
#[derive(Clone, Debug)]
pub struct AuditQueue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// Of so many streams that finished, one is kept.
    one_of: u64,
    room: usize,
    news: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<AccessRecord>,
    /// The number of the first one that waits; records are numbered from 1.
    first: u64,
    lost: u64,
    finished: u64,
}

impl AuditQueue {
    /// A queue with room for so many records, which keeps one of so many that finished well; 0 and 1 keep all.
    #[must_use]
    pub fn new(room: usize, one_of: u64) -> Self {
        let inner = Mutex::new(Inner { first: 1, ..Inner::default() });
        Self(Arc::new(Shared { inner, one_of: one_of.max(1), room, news: Notify::new() }))
    }

    /// Takes a record, if there is room for it. Never waits.
    pub fn put(&self, record: &AccessRecord) {
        let mut inner = self.0.inner.lock();
        if record.outcome == "finished" {
            inner.finished += 1;
            if !inner.finished.is_multiple_of(self.0.one_of) {
                return;
            }
        }
        if inner.waiting.len() >= self.0.room {
            inner.lost += 1;
            return;
        }
        inner.waiting.push_back(record.clone());
        drop(inner);
        self.0.news.notify_one();
    }

    /// Waits until there is something. Cancel-safe; one waiter.
    pub async fn some(&self) {
        loop {
            let news = self.0.news.notified();
            if !self.0.inner.lock().waiting.is_empty() {
                return;
            }
            news.await;
        }
    }

    /// The oldest records, as a batch of the process that started then. They wait on until [`AuditQueue::sent`].
    #[must_use]
    pub fn batch(&self, started: u64, most: usize) -> AccessBatch {
        let inner = self.0.inner.lock();
        let records = inner.waiting.iter().take(most).cloned().collect();
        AccessBatch { started, first: inner.first, records, lost: inner.lost }
    }

    /// A batch has arrived: its records are taken out.
    pub fn sent(&self, batch: &AccessBatch) {
        let mut inner = self.0.inner.lock();
        for _ in 0..batch.records.len() {
            if inner.waiting.pop_front().is_some() {
                inner.first += 1;
            }
        }
        inner.lost = inner.lost.saturating_sub(batch.lost);
    }

    /// Records that wait, and those for which there was no room since the last batch that arrived.
    #[must_use]
    pub fn standing(&self) -> (usize, u64) {
        let inner = self.0.inner.lock();
        (inner.waiting.len(), inner.lost)
    }
}

#[cfg(test)]
mod tests {
    use proto::{code::RefuseCode, principal::Principal};

    use super::*;

    fn record(edge: &str) -> AccessRecord {
        let mut record = AccessRecord::new(&Principal::Apiserver, &"shop-1:22");
        edge.clone_into(&mut record.edge);
        record
    }

    #[test]
    fn a_full_queue_counts_what_it_has_no_room_for_and_goes_on_in_order() {
        let queue = AuditQueue::new(3, 1);
        for edge in ["a", "b", "c", "d", "e"] {
            queue.put(&record(edge));
        }
        assert_eq!(queue.standing(), (3, 2));
        let batch = queue.batch(7, 2);
        assert_eq!((batch.first, batch.lost, batch.records.len()), (1, 2, 2));
        assert_eq!(queue.batch(7, 2), batch, "what did not arrive is sent again, under the same number");
        queue.sent(&batch);
        queue.put(&record("f"));
        let next = queue.batch(7, 9);
        let edges: Vec<_> = next.records.iter().map(|r| r.edge.as_str()).collect();
        assert_eq!((next.first, next.lost, edges), (3, 0, vec!["c", "f"]));
    }

    #[test]
    fn of_many_that_finished_a_share_is_kept_and_of_the_others_all() {
        let queue = AuditQueue::new(1000, 10);
        for _ in 0..100 {
            queue.put(&record("a"));
            queue.put(&record("a").refused(RefuseCode::PolicyDenied, "no"));
        }
        assert_eq!(queue.standing(), (110, 0));
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let queue = AuditQueue::new(10, 1);
        let (waiting, putting) = (queue.clone(), queue.clone());
        tokio::join!(waiting.some(), async { putting.put(&record("a")) });
        queue.some().await;
    }
}
