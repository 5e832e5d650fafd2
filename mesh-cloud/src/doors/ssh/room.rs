//! How much of a connection may wait for its targets.
//!
//! SSH has a window for each channel, but russh refills it for whatever has come. So the bounds are kept by not reading
//! the connection's socket while a channel has too much waiting: then TCP slows the client down. Two things follow, and
//! are dealt with here:
//!
//! - What is not read may hold the window for answers, without which the target may not read either. When nothing goes
//!   on in either direction, the socket is read all the same until something does.
//! - Other channels wait as well. While there are some, a channel may have more waiting, and is broken off when its
//!   target takes nothing at all for a while. A request for another channel may itself be in what is not read: so a
//!   channel alone gets more room in steps, up to the same bound, each more than a client can have under way.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use proto::code::ResetCode;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::{connection::Connection, lane::Lane};

/// Bytes of one channel that may wait: what an SSH session inside has under way, and more.
pub(super) const LANE: usize = 4 * 1024 * 1024;
/// The same while there are other channels, and what all may have waiting together before it is [`LANE`] again.
const LONG_LANE: usize = 16 * 1024 * 1024;
const LANES: usize = 32 * 1024 * 1024;
/// Bytes of one channel behind which no window for answers can be: a client that has sent so much reads nothing.
const ENDLESS: usize = 64 * 1024 * 1024;
/// How long nothing may go on before it is looked for such a window.
const STUCK: Duration = Duration::from_millis(50);
/// How long a target may take nothing while other channels wait for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same while no other channel is known, until the next step; and the step in bytes, twice a channel's window.
const PROBE: Duration = Duration::from_secs(3);
const STEP: usize = 4 * 1024 * 1024;

/// Whether a socket is read.
#[derive(Debug, Default)]
pub(super) struct Gate {
    inner: Mutex<Inner>,
    closed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    closed: bool,
    /// Open whatever waits, until something goes on.
    forced: bool,
    /// Bytes beyond [`LANE`] that a channel alone may have waiting by now.
    beyond: usize,
    reader: Option<Waker>,
}

impl Gate {
    /// Ready while it is open.
    pub(super) fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.inner.lock();
        if !inner.closed {
            return Poll::Ready(());
        }
        inner.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    fn close(&self) {
        let mut inner = self.inner.lock();
        if !inner.forced && !inner.closed {
            inner.closed = true;
            self.closed.notify_one();
        }
    }

    fn open(&self, forced: bool) {
        let mut inner = self.inner.lock();
        (inner.closed, inner.forced) = (false, forced);
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
    }

    /// Gives a channel that is alone a step more room, or takes all steps back.
    fn room(&self, more: bool) {
        let mut inner = self.inner.lock();
        inner.beyond = if more { (inner.beyond + STEP).min(LONG_LANE - LANE) } else { 0 };
    }

    fn alone(&self) -> usize {
        LANE + self.inner.lock().beyond
    }
}

impl Connection {
    /// Notes that so much waits in a channel.
    pub(super) fn has_waiting(&self, lane: &Lane, waiting: usize) {
        if waiting > ENDLESS {
            let why = "the client sends without end and does not take what the target answers";
            lane.break_off(ResetCode::Stalled, why);
        } else if waiting > LANE && self.fullest().is_some() {
            self.gate.close();
        }
    }

    /// The channel that has most waiting, if that is too much; and whether there are others.
    fn fullest(&self) -> Option<(Arc<Lane>, bool)> {
        let lanes = self.lanes.lock();
        let others = lanes.len() > 1;
        let (waiting, lane) = lanes.values().map(|lane| (lane.waiting(), lane)).max_by_key(|(waiting, _)| *waiting)?;
        let all: usize = lanes.values().map(|lane| lane.waiting()).sum();
        let most = match others {
            true if all <= LANES => LONG_LANE,
            true => LANE,
            false => self.gate.alone(),
        };
        (waiting > most).then(|| (Arc::clone(lane), others))
    }

    /// Whether an answer waits for the client, and how many did not have to any more.
    fn replies(&self) -> (bool, u64) {
        let lanes = self.lanes.lock();
        lanes
            .values()
            .map(|lane| lane.replies())
            .fold((false, 0), |(waits, count), (one, of_one)| (waits | one, count.wrapping_add(of_one)))
    }

    /// Opens the gate again whenever it may be.
    pub(super) async fn keep_room(&self) -> Infallible {
        loop {
            self.gate.closed.notified().await;
            let mut since = Instant::now();
            while let Some((lane, others)) = self.fullest() {
                let (taken, replies) = (lane.taken(), self.replies());
                tokio::select! {
                    biased;
                    () = lane.progress() => {}
                    () = sleep(STUCK) => {}
                }
                let now = self.replies();
                if lane.taken() != taken {
                    since = Instant::now();
                    self.gate.room(false);
                } else if replies.0 && now.0 && now.1 == replies.1 {
                    self.look_for_window(now.1).await;
                } else if others && since.elapsed() >= PATIENCE {
                    let why = "the target takes nothing, and other channels of the connection wait for it";
                    lane.break_off(ResetCode::Stalled, why);
                } else if !others && since.elapsed() >= PROBE {
                    since = Instant::now();
                    self.gate.room(true);
                }
            }
            self.gate.open(false);
        }
    }

    /// Reads whatever comes, until an answer gets through.
    async fn look_for_window(&self, replies: u64) {
        self.gate.open(true);
        loop {
            sleep(STUCK / 10).await;
            let (waits, count) = self.replies();
            if !waits || count != replies || self.over.is_cancelled() {
                break;
            }
        }
        self.gate.inner.lock().forced = false;
        if self.fullest().is_some() {
            self.gate.close();
        }
    }
}
