//! Which streams go first. A stream that says little goes ahead of those that move much, on the wire and into the room for
//! what is not acknowledged yet: a keystroke waits neither behind a download nor for twenty of them. Nobody has to say what
//! a stream is for; it is what it does.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

/// What a stream may say at once and still go ahead, and in a second, in bytes: terminals, requests, the first of every
/// stream. Both together are little beside what a link moves, so that those behind are not starved.
const LIGHT: (u64, u64) = (64 * 1024, 32 * 1024);
/// Room that is kept for those that go ahead, in bytes.
const HEADROOM: u64 = 512 * 1024;

/// quinn's priorities: larger goes first.
const FIRST: i32 = i32::MAX;
const AHEAD: i32 = 1;
const USUAL: i32 = 0;

/// Tells by what a stream sends whether it goes ahead. Pure.
#[derive(Debug)]
struct Measure {
    budget: u64,
    at: Instant,
}

impl Measure {
    const fn new(now: Instant) -> Self {
        Self { budget: LIGHT.0, at: now }
    }

    /// Takes note of bytes that are about to be sent. Returns whether they go ahead.
    fn sends(&mut self, bytes: usize, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).min(Duration::from_secs(60));
        let earned = u64::try_from(earned.as_micros()).unwrap_or(u64::MAX).saturating_mul(LIGHT.1) / 1_000_000;
        if earned > 0 {
            self.at = now;
        }
        self.budget = (self.budget + earned).min(LIGHT.0);
        let light = self.budget >= bytes as u64;
        self.budget = self.budget.saturating_sub(bytes as u64);
        light
    }
}

/// The room of a link for what is sent and not yet acknowledged, shared by its streams.
#[derive(Debug)]
pub(super) struct Room {
    connection: quinn::Connection,
    shares: Mutex<Shares>,
}

#[derive(Debug)]
struct Shares {
    window: u64,
    /// Writes of those that go ahead which are under way.
    ahead: usize,
}

impl Shares {
    /// What there is now: all of it while one that goes ahead writes.
    const fn open(&self) -> u64 {
        if self.ahead > 0 { self.window } else { self.window.saturating_sub(HEADROOM) }
    }
}

impl Room {
    /// `window` bytes altogether, a part of them for those that go ahead.
    pub(super) fn new(connection: quinn::Connection, window: u64) -> Self {
        let shares = Shares { window, ahead: 0 };
        connection.set_send_window(shares.open());
        Self { connection, shares: Mutex::new(shares) }
    }

    /// Changes it.
    pub(super) fn set(&self, window: u64) {
        self.change(|shares| shares.window = window);
    }

    fn change(&self, change: impl FnOnce(&mut Shares)) {
        let mut shares = self.shares.lock();
        let before = shares.open();
        change(&mut shares);
        if shares.open() != before {
            self.connection.set_send_window(shares.open());
        }
    }
}

/// All of the room, until dropped.
struct Raised<'a>(&'a Room);

impl<'a> Raised<'a> {
    fn of(room: &'a Room) -> Self {
        room.change(|shares| shares.ahead += 1);
        Self(room)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.change(|shares| shares.ahead -= 1);
    }
}

/// The sending half of a QUIC stream, with its place in the order.
#[derive(Debug)]
pub(super) struct QuicSender {
    pub(super) stream: quinn::SendStream,
    room: Arc<Room>,
    measure: Measure,
    /// What quinn has been told.
    priority: i32,
}

impl QuicSender {
    pub(super) fn new(stream: quinn::SendStream, room: Arc<Room>) -> Self {
        Self { stream, room, measure: Measure::new(Instant::now()), priority: USUAL }
    }

    /// Goes before all others from now on, whatever it sends.
    pub(super) fn go_first(&mut self) {
        self.rank(FIRST);
    }

    pub(super) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), quinn::WriteError> {
        let ahead = self.weigh(chunks.iter().map(Bytes::len).sum());
        let write = self.stream.write_all_chunks(chunks);
        tokio::pin!(write);
        // Mostly there is room.
        if let Poll::Ready(written) = poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
            return written;
        }
        let _raised = ahead.then(|| Raised::of(&self.room));
        write.await
    }

    /// Settles where bytes that are about to be sent stand. Returns whether they go ahead of others.
    pub(super) fn weigh(&mut self, bytes: usize) -> bool {
        if self.priority == FIRST {
            return true;
        }
        let ahead = self.measure.sends(bytes, Instant::now());
        self.rank(if ahead { AHEAD } else { USUAL });
        ahead
    }

    fn rank(&mut self, priority: i32) {
        if self.priority != priority {
            self.priority = priority;
            // An error means that it has ended.
            let _ = self.stream.set_priority(priority);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_the_room_is_open_while_anybody_who_goes_ahead_writes() {
        let mut shares = Shares { window: 6 * HEADROOM, ahead: 0 };
        assert_eq!(shares.open(), 5 * HEADROOM);
        shares.ahead = 2;
        assert_eq!(shares.open(), 6 * HEADROOM);
        assert_eq!(Shares { window: 1, ahead: 0 }.open(), 0);
    }

    #[test]
    fn who_says_little_goes_ahead_and_who_moves_much_does_not() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut typist = Measure::new(began);
        assert!((0..10_000).all(|key| typist.sends(100, at(key * 50))), "2 kB/s for ever");

        let mut download = Measure::new(began);
        let ahead = (0..1000).filter(|ms| download.sends(8192, at(*ms))).count();
        assert_eq!(ahead, 8, "the first 64 KiB");
        assert!(!download.sends(100, at(1000)));
        assert!(download.sends(8192, at(1400)), "it has paused, and is an answer again");

        let mut steady = Measure::new(began);
        let ahead = (0..10_000).filter(|ms| steady.sends(64, at(*ms))).count();
        assert!((1500..3000).contains(&ahead), "64 kB/s is too much to go ahead for long: {ahead}");
    }
}
