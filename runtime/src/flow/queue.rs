//! Datagrams that wait for one flow. There is a bound by number and by size; when it is reached, the oldest is dropped,
//! since a late datagram is worth less than a fresh one.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Most datagrams that wait.
const DATAGRAMS: usize = 512;
/// Most bytes.
const BYTES: usize = 512 * 1024;
/// What a datagram costs besides its payload.
const OVERHEAD: usize = 64;

/// A bounded queue of datagrams. One task takes from it.
#[derive(Debug)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    more: Notify,
    dropped: AtomicU64,
    /// Bytes that wait in all queues of a kind, and how many may.
    together: Option<(Arc<AtomicUsize>, usize)>,
}

#[derive(Debug, Default)]
struct Waiting {
    datagrams: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
}

impl Default for Queue {
    fn default() -> Self {
        Self { waiting: Mutex::default(), more: Notify::new(), dropped: AtomicU64::new(0), together: None }
    }
}

impl Queue {
    /// A queue that shares a bound in bytes with others; beyond it, what comes is dropped.
    pub(crate) fn of_link(together: Arc<AtomicUsize>, most: usize) -> Self {
        Self { together: Some((together, most)), ..Self::default() }
    }

    /// Puts a copy of a datagram in: what came from a socket or a link would keep the whole batch in memory that it
    /// came with.
    pub fn push(&self, payload: &[u8]) {
        let cost = payload.len() + OVERHEAD;
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return;
        }
        let mut dropped = 0;
        while waiting.datagrams.len() >= DATAGRAMS || waiting.bytes + cost > BYTES {
            let Some(oldest) = waiting.datagrams.pop_front() else { break };
            self.leaves(&mut waiting, &oldest);
            dropped += 1;
        }
        let full = |(all, most): &(Arc<AtomicUsize>, usize)| all.load(Ordering::Relaxed) + cost > *most;
        if self.together.as_ref().is_some_and(full) {
            dropped += 1;
        } else {
            waiting.datagrams.push_back(Bytes::copy_from_slice(payload));
            waiting.bytes += cost;
            if let Some((all, _)) = &self.together {
                all.fetch_add(cost, Ordering::Relaxed);
            }
        }
        drop(waiting);
        if dropped > 0 {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        self.more.notify_one();
    }

    fn leaves(&self, waiting: &mut Waiting, payload: &Bytes) {
        let cost = payload.len() + OVERHEAD;
        waiting.bytes -= cost;
        if let Some((all, _)) = &self.together {
            all.fetch_sub(cost, Ordering::Relaxed);
        }
    }

    /// The next datagram, if one is there.
    pub fn try_next(&self) -> Option<Bytes> {
        let mut waiting = self.waiting.lock();
        let next = waiting.datagrams.pop_front()?;
        self.leaves(&mut waiting, &next);
        Some(next)
    }

    /// The next datagram; `None` when the queue is closed. Cancel-safe.
    pub async fn next(&self) -> Option<Bytes> {
        loop {
            if let Some(next) = self.try_next() {
                return Some(next);
            }
            if self.waiting.lock().closed {
                return None;
            }
            self.more.notified().await;
        }
    }

    /// Takes no more; what waits can still be taken.
    pub fn close(&self) {
        self.waiting.lock().closed = true;
        self.more.notify_one();
    }

    /// Throws away what waits.
    pub(crate) fn clear(&self) {
        while self.try_next().is_some() {}
    }

    /// How many were dropped because nobody took them in time.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_make_room_and_are_counted() {
        let queue = Queue::default();
        for i in 0..u16::try_from(DATAGRAMS + 3).unwrap() {
            queue.push(&i.to_be_bytes());
        }
        assert_eq!((queue.dropped(), queue.next().await), (3, Some(Bytes::from_static(&[0, 3]))));
        queue.clear();
        for _ in 0..20 {
            queue.push(&[0; 60_000]);
        }
        assert_eq!(queue.dropped(), 3 + 20 - 8);
        queue.close();
        queue.push(b"late");
        let mut left = 0;
        while queue.next().await.is_some() {
            left += 1;
        }
        assert_eq!(left, 8);
    }

    #[tokio::test(start_paused = true)]
    async fn queues_of_one_link_share_a_bound() {
        let all = Arc::new(AtomicUsize::new(0));
        let [a, b] = [(); 2].map(|()| Queue::of_link(Arc::clone(&all), 1000));
        a.push(&[0; 800]);
        b.push(&[0; 800]);
        assert_eq!((a.dropped(), b.dropped(), b.try_next()), (0, 1, None));
        assert_eq!(a.next().await.unwrap().len(), 800);
        b.push(&[0; 800]);
        assert_eq!((b.dropped(), b.next().await.unwrap().len(), all.load(Ordering::Relaxed)), (1, 800, 0));
    }
}
