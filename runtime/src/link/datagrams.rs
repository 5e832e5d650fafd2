//! The datagrams of a QUIC link: which flow each belongs to, and how many may be sent.
//!
//! One task per link hands them to the flows that they are for, and it runs only while there are flows. QUIC sends
//! datagrams before the bytes of streams, so that a flood of them would starve every stream: see [`Gate`].

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use parking_lot::Mutex;
use proto::datagram;
use tokio::{sync::Notify, time::Instant};

use crate::{flow::queue::Queue, shutdown::Tasks};

/// Bytes that all flows of a link may have waiting here.
const WAITING: usize = 2 * 1024 * 1024;
/// How often the congestion window is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Bounds of what may wait to be sent, in bytes.
const BACKLOG: (usize, usize) = (16 * 1024, 256 * 1024);
/// How long streams may have to wait behind datagrams at a time, at least.
const LEAST_TURN: Duration = Duration::from_millis(20);
/// Streams then have the link to themselves for this part of that time.
const SHARE: u32 = 3;

/// The datagrams of one link.
pub(crate) struct Datagrams {
    connection: quinn::Connection,
    flows: Mutex<Flows>,
    /// There are no flows any more.
    idle: Notify,
    /// Bytes that wait in queues of flows.
    waiting: Arc<AtomicUsize>,
    gate: Mutex<Gate>,
}

#[derive(Default)]
struct Flows {
    queues: HashMap<u64, Arc<Queue>>,
    running: bool,
}

impl fmt::Debug for Datagrams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Datagrams({} flows)", self.flows.lock().queues.len())
    }
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// It is on its way.
    Yes,
    /// It does not fit into a packet of this link.
    TooLong,
    /// There is no room for it now.
    Dropped,
}

impl Datagrams {
    /// Those of this connection, if both sides have them.
    pub(super) fn of(connection: &quinn::Connection) -> Option<Arc<Self>> {
        connection.max_datagram_size()?;
        Some(Arc::new(Self {
            connection: connection.clone(),
            flows: Mutex::default(),
            idle: Notify::new(),
            waiting: Arc::default(),
            gate: Mutex::new(Gate::default()),
        }))
    }

    /// A place for one flow, until dropped.
    pub(super) fn place(this: &Arc<Self>, flow: u64) -> Place {
        let queue = Arc::new(Queue::of_link(Arc::clone(&this.waiting), WAITING));
        let start = {
            let mut flows = this.flows.lock();
            flows.queues.insert(flow, Arc::clone(&queue));
            !std::mem::replace(&mut flows.running, true)
        };
        if start {
            Tasks::new().spawn(hand_out(Arc::clone(this)));
        }
        Place { datagrams: Arc::clone(this), flow, queue }
    }

    fn send(&self, flow: u64, payload: &[u8]) -> Sent {
        let length = datagram::tag_len(flow) + payload.len();
        match self.connection.max_datagram_size() {
            Some(most) if length <= most => {}
            // Without a size the link has ended, which the stream tells.
            Some(_) | None => return Sent::TooLong,
        }
        let now = Instant::now();
        let mut gate = self.gate.lock();
        if gate.looks(now) {
            let path = self.connection.stats().path;
            gate.path(path.cwnd, path.rtt);
        }
        if !gate.admits(now, self.connection.datagram_send_buffer_space(), length) {
            return Sent::Dropped;
        }
        match self.connection.send_datagram(datagram::tagged(flow, payload)) {
            Ok(()) => Sent::Yes,
            Err(quinn::SendDatagramError::TooLarge) => Sent::TooLong,
            Err(
                quinn::SendDatagramError::UnsupportedByPeer
                | quinn::SendDatagramError::Disabled
                | quinn::SendDatagramError::ConnectionLost(_),
            ) => Sent::Dropped,
        }
    }
}

/// Hands datagrams out until there are no flows, or no link.
async fn hand_out(datagrams: Arc<Datagrams>) {
    loop {
        let read = tokio::select! {
            biased;
            () = datagrams.idle.notified() => {
                let mut flows = datagrams.flows.lock();
                if flows.queues.is_empty() {
                    flows.running = false;
                    return;
                }
                continue;
            }
            read = datagrams.connection.read_datagram() => read,
        };
        let Ok(read) = read else {
            datagrams.flows.lock().running = false;
            return;
        };
        // One without a flow comes late, or early, or from nowhere: as in UDP it is lost.
        let Some((flow, payload)) = datagram::untag(read) else { continue };
        let queue = datagrams.flows.lock().queues.get(&flow).map(Arc::clone);
        if let Some(queue) = queue {
            queue.push(&payload);
        }
    }
}

/// Where the datagrams of one flow go out, and come in.
#[derive(Debug)]
pub(crate) struct Place {
    datagrams: Arc<Datagrams>,
    flow: u64,
    queue: Arc<Queue>,
}

impl Place {
    /// Sends one, or not: it never waits.
    pub(crate) fn send(&self, payload: &[u8]) -> Sent {
        self.datagrams.send(self.flow, payload)
    }

    /// What has come.
    pub(crate) const fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut flows = self.datagrams.flows.lock();
        flows.queues.remove(&self.flow);
        if flows.queues.is_empty() {
            self.datagrams.idle.notify_one();
        }
        drop(flows);
        self.queue.clear();
    }
}

/// Sees to it that streams get their share. While no more datagrams come than the link takes, all go through. When more
/// come, what waits is sent, and then streams have the link to themselves for a third of the time that this took.
#[derive(Debug)]
struct Gate {
    turn: Turn,
    /// What has been there when nothing waited: the room of the carrier.
    room: usize,
    /// Bytes that may wait.
    backlog: usize,
    /// How long they may do so.
    patience: Duration,
    looked: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing waits.
    Free,
    /// Something has been waiting since then.
    Busy(Instant),
    /// Enough has: nothing more is taken until it is sent.
    Full(Instant),
    /// It is the streams' turn until then.
    Streams(Instant),
}

impl Default for Gate {
    fn default() -> Self {
        Self { turn: Turn::Free, room: 0, backlog: BACKLOG.0, patience: LEAST_TURN, looked: None }
    }
}

impl Gate {
    /// Whether it is time to look at the path again.
    fn looks(&mut self, now: Instant) -> bool {
        let due = self.looked.is_none_or(|at| now.duration_since(at) >= LOOK);
        if due {
            self.looked = Some(now);
        }
        due
    }

    /// Takes note of what the path takes at once, and of its round trip: about one window may wait.
    fn path(&mut self, window: u64, rtt: Duration) {
        let window = usize::try_from(window).unwrap_or(usize::MAX);
        self.backlog = window.clamp(BACKLOG.0, BACKLOG.1);
        self.patience = (rtt * 2).max(LEAST_TURN);
    }

    /// Whether one more may be sent, with so much room left in the carrier's buffer.
    fn admits(&mut self, now: Instant, space: usize, length: usize) -> bool {
        // Nobody else fills the buffer, so the most room that was ever there is all of it.
        self.room = self.room.max(space);
        let waits = self.room - space;
        let empty = waits == 0;
        self.turn = match self.turn {
            Turn::Free | Turn::Busy(_) if empty => Turn::Free,
            Turn::Free => Turn::Busy(now),
            Turn::Busy(since) if now.duration_since(since) > self.patience => Turn::Full(since),
            Turn::Full(since) if empty => Turn::Streams(now + now.duration_since(since) / SHARE),
            Turn::Streams(until) if now >= until => Turn::Free,
            turn @ (Turn::Busy(_) | Turn::Full(_) | Turn::Streams(_)) => turn,
        };
        match self.turn {
            Turn::Full(_) | Turn::Streams(_) => return false,
            Turn::Free | Turn::Busy(_) => {}
        }
        if waits + length > self.backlog || length > space {
            let since = match self.turn {
                Turn::Busy(since) => since,
                Turn::Free | Turn::Full(_) | Turn::Streams(_) => now,
            };
            self.turn = Turn::Full(since);
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1 << 20;
    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn streams_get_a_share_of_a_link_that_is_flooded() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        assert!(gate.admits(start, ROOM, 1200), "nothing waits");
        // The link takes one kilobyte in a millisecond, and ten are offered.
        let (mut waiting, mut sent, mut streams) = (1200, 0, 0);
        for ms in 0..10_000 {
            for _ in 0..10 {
                if gate.admits(start + ms * MS, ROOM - waiting, 1000) {
                    waiting += 1000;
                }
            }
            if waiting == 0 {
                streams += 1;
            } else {
                waiting -= waiting.min(1000);
                sent += 1;
            }
        }
        assert!(streams * 5 > sent, "{streams} ms for streams, {sent} for datagrams");
        assert!(sent > streams * 2, "{streams} ms for streams, {sent} for datagrams");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_that_the_link_can_take() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        for ms in 0..1000 {
            // It is sent before the next one comes, but for a hiccup of 10 ms now and then.
            let waiting = if ms % 100 < 10 { (ms % 100 + 1) as usize * 1000 } else { 0 };
            assert!(gate.admits(start + ms * MS, ROOM - waiting, 1000), "at {ms} ms");
        }
    }

    #[test]
    fn about_a_window_may_wait() {
        let mut gate = Gate::default();
        for (window, backlog) in [(0, BACKLOG.0), (100_000, 100_000), (u64::MAX, BACKLOG.1)] {
            gate.path(window, Duration::ZERO);
            assert_eq!((gate.backlog, gate.patience), (backlog, LEAST_TURN));
        }
    }
}
