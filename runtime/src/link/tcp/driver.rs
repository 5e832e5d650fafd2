//! The one task of a TCP link: it moves frames between yamux and the streams' queues.
//!
//! It reads every stream as soon as something comes, so that what a peer says about a stream never waits behind data
//! that nobody reads; the windows of [`super::state`] bound what that may keep in memory, and yamux's own never fill. It
//! gives yamux one record at a time, from one stream after the other, and those that go first before the rest.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures::{
    io::{AsyncRead, AsyncWrite},
    task::AtomicWaker,
};
use parking_lot::Mutex;
use proto::code::CloseCode;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use yamux::{Connection, Stream};

use super::{
    half::Shared,
    record::{MOST_DATA, Malformed, Parser, Piece},
    state::LINK,
    wire::Wire,
};
use crate::link::{EndCause, LinkEnd};

/// What yamux may have in its queue before it gets more: whoever goes first waits for no more than this.
const AHEAD: u64 = MOST_DATA as u64;
/// How often the peer is asked for a sign of life, and how often the driver looks whether one has come.
const PING: Duration = Duration::from_secs(6);
const TICK: Duration = Duration::from_secs(2);
/// How long the last word may take.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Bytes that are read from a stream at once.
const READ: usize = 8 * 1024;

/// Streams that the driver is to look at.
#[derive(Debug, Default)]
pub(super) struct Ready {
    keys: Mutex<Vec<u64>>,
    driver: AtomicWaker,
}

impl Ready {
    pub(super) fn nudge(&self, key: u64) {
        self.keys.lock().push(key);
        self.driver.wake();
    }

    /// Makes the driver look whether it is still wanted.
    pub(super) fn wake(&self) {
        self.driver.wake();
    }
}

/// Wakes the driver for one stream.
struct Nudge(u64, Arc<Ready>);

impl Wake for Nudge {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.1.nudge(self.0);
    }
}

/// A yamux stream.
struct Lane {
    stream: Stream,
    waker: Waker,
    parser: Parser,
    /// What yamux has not taken yet.
    rest: Vec<u8>,
    /// It stands in a queue for writing.
    queued: bool,
    /// The peer has closed it.
    ended: bool,
}

/// Why the driver stops.
enum Stop {
    /// The link has ended.
    Ended(LinkEnd),
    /// The peer breaks the rules.
    Malformed(Malformed),
}

impl From<Malformed> for Stop {
    fn from(why: Malformed) -> Self {
        Self::Malformed(why)
    }
}

pub(super) struct Driver {
    yamux: Connection<Wire>,
    shared: Arc<Shared>,
    lanes: HashMap<u64, Lane>,
    /// Streams of this side that have no lane yet.
    opening: VecDeque<u64>,
    urgent: VecDeque<u64>,
    waiting: VecDeque<u64>,
    /// Bytes of records that yamux was given.
    given: u64,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    timer: Pin<Box<Sleep>>,
    pinged: Option<Instant>,
    /// The dialer opens the stream about the link.
    dialer: bool,
}

impl Driver {
    pub(super) fn new(yamux: Connection<Wire>, shared: Arc<Shared>, dialer: bool) -> Self {
        let now = Instant::now();
        Self {
            yamux,
            shared,
            lanes: HashMap::new(),
            opening: if dialer { VecDeque::from([LINK]) } else { VecDeque::new() },
            urgent: VecDeque::new(),
            waiting: VecDeque::new(),
            given: 0,
            buffer: vec![0; READ],
            scratch: Vec::new(),
            timer: Box::pin(sleep_until(now + TICK)),
            pinged: None,
            dialer,
        }
    }

    /// Runs until the link has ended and its last word is said.
    pub(super) async fn run(mut self) {
        let stop = std::future::poll_fn(|cx| match self.poll(cx) {
            Ok(()) => Poll::Pending,
            Err(stop) => Poll::Ready(stop),
        })
        .await;
        let end = match stop {
            Stop::Ended(end) => end,
            Stop::Malformed(Malformed(why)) => {
                self.shared.state.lock().close(CloseCode::ProtocolError.number(), why);
                LinkEnd::new(EndCause::Transport, why)
            }
        };
        let says = self.shared.state.lock().link.closes();
        self.shared.ended(end);
        if says && self.lanes.contains_key(&LINK) {
            let _ = timeout(LAST_WORD, self.say_last_word()).await;
        }
    }

    /// Says why it closes, and lets yamux close the connection behind that.
    async fn say_last_word(mut self) {
        std::future::poll_fn(|cx| {
            loop {
                let read = self.yamux.poll_next_inbound(cx);
                let _ = self.write_one(LINK);
                match read {
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(None | Some(Err(_))) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            let rest = self.lanes.get(&LINK).is_some_and(|lane| !lane.rest.is_empty());
            if rest || self.shared.state.lock().link.any() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        let _ = std::future::poll_fn(|cx| self.yamux.poll_close(cx)).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Result<(), Stop> {
        self.shared.ready.driver.register(cx.waker());
        loop {
            if let Some(end) = self.shared.closed_here() {
                return Err(Stop::Ended(end));
            }
            let frames = self.frames(cx);
            let mut busy = matches!(frames, Ok(true));
            let keys = mem::take(&mut *self.shared.ready.keys.lock());
            busy |= !keys.is_empty();
            for key in keys {
                self.look(key)?;
            }
            // What came before the end counts more than the end: it may be the peer's reason.
            frames?;
            self.open(cx)?;
            busy |= self.write();
            busy |= self.time(cx)?;
            if !busy {
                if self.waiting.is_empty() {
                    self.scratch = Vec::new();
                }
                return Ok(());
            }
        }
    }

    /// Has yamux read and write what it can. Returns whether a stream has come.
    fn frames(&mut self, cx: &mut Context<'_>) -> Result<bool, Stop> {
        match self.yamux.poll_next_inbound(cx) {
            Poll::Pending => Ok(false),
            Poll::Ready(Some(Ok(stream))) => {
                let about_link = !self.dialer && !self.lanes.contains_key(&LINK);
                let key = if about_link { LINK } else { self.shared.state.lock().arrived()? };
                self.enter(key, stream);
                self.look(key)?;
                Ok(true)
            }
            Poll::Ready(Some(Err(error))) => Err(Stop::Ended(self.lost(&error.to_string()))),
            Poll::Ready(None) => Err(Stop::Ended(self.lost("the connection was closed without a word"))),
        }
    }

    fn lost(&self, why: &str) -> LinkEnd {
        let broke = self.shared.counts.broke();
        broke.unwrap_or_else(|| LinkEnd::new(EndCause::PeerRestarted, why))
    }

    fn enter(&mut self, key: u64, stream: Stream) {
        let waker = Waker::from(Arc::new(Nudge(key, Arc::clone(&self.shared.ready))));
        let lane = Lane { stream, waker, parser: Parser::default(), rest: Vec::new(), queued: false, ended: false };
        self.lanes.insert(key, lane);
    }

    /// Gives streams of this side their lanes.
    fn open(&mut self, cx: &mut Context<'_>) -> Result<(), Stop> {
        while let Some(&key) = self.opening.front() {
            match self.yamux.poll_new_outbound(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(stream)) => {
                    self.opening.pop_front();
                    self.enter(key, stream);
                    self.look(key)?;
                }
                Poll::Ready(Err(error)) => return Err(Stop::Ended(self.lost(&error.to_string()))),
            }
        }
        Ok(())
    }

    /// Reads a stream, and queues it if it has something to say.
    fn look(&mut self, key: u64) -> Result<(), Stop> {
        if !self.lanes.contains_key(&key) {
            let state = self.shared.state.lock();
            let new = state.flows.get(&key).is_some_and(|flow| flow.ours && !flow.done && flow.wants(1));
            if new && !self.opening.contains(&key) {
                self.opening.push_back(key);
            }
            return Ok(());
        }
        self.read(key)?;
        for key in self.shared.state.lock().released() {
            self.shared.ready.nudge(key);
        }
        self.queue(key);
        self.settle(key);
        Ok(())
    }

    fn read(&mut self, key: u64) -> Result<(), Stop> {
        let Some(lane) = self.lanes.get_mut(&key).filter(|lane| !lane.ended) else { return Ok(()) };
        let mut cx = Context::from_waker(&lane.waker);
        loop {
            let bytes = match Pin::new(&mut lane.stream).poll_read(&mut cx, &mut self.buffer) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(bytes)) => bytes,
                Poll::Ready(Err(_)) => 0,
            };
            let mut state = self.shared.state.lock();
            if bytes == 0 && key == LINK {
                drop(state);
                return Err(Stop::Ended(self.lost("the peer ended the stream about the link")));
            }
            if bytes == 0 {
                lane.ended = true;
                state.cut(key);
                return Ok(());
            }
            let mut input = &self.buffer[..bytes];
            while let Some(piece) = lane.parser.next(&mut input)? {
                match piece {
                    Piece::Bytes(data) => state.data(key, data)?,
                    Piece::Record(record) => {
                        if let Some(end) = state.hear(key, record)? {
                            return Err(Stop::Ended(end));
                        }
                    }
                }
            }
            // What is owed to the peer by now is said on the stream about the link.
            if state.link.any() {
                self.shared.ready.nudge(LINK);
            }
        }
    }

    fn queue(&mut self, key: u64) {
        let Some(lane) = self.lanes.get_mut(&key).filter(|lane| !lane.queued) else { return };
        let mut state = self.shared.state.lock();
        if lane.rest.is_empty() && !state.wants(key) {
            return;
        }
        lane.queued = true;
        if state.first(key) { self.urgent.push_back(key) } else { self.waiting.push_back(key) }
    }

    /// Gives yamux what it may have now. Returns whether there was something.
    fn write(&mut self) -> bool {
        if self.given - self.shared.counts.carried.load(Ordering::Relaxed) >= AHEAD {
            return false;
        }
        let Some(key) = self.urgent.pop_front().or_else(|| self.waiting.pop_front()) else { return false };
        if let Some(lane) = self.lanes.get_mut(&key) {
            lane.queued = false;
        }
        if self.write_one(key) {
            self.queue(key);
        }
        self.settle(key);
        true
    }

    /// Writes what a stream says next. Returns whether yamux took all of it; if not, the stream's waker comes.
    fn write_one(&mut self, key: u64) -> bool {
        let Some(lane) = self.lanes.get_mut(&key) else { return false };
        self.scratch.clear();
        self.scratch.append(&mut lane.rest);
        if self.scratch.is_empty() {
            self.shared.state.lock().put(key, MOST_DATA, &mut self.scratch);
        }
        let mut cx = Context::from_waker(&lane.waker);
        let mut written = 0;
        while written < self.scratch.len() {
            match Pin::new(&mut lane.stream).poll_write(&mut cx, &self.scratch[written..]) {
                Poll::Ready(Ok(bytes)) => {
                    written += bytes;
                    self.given += bytes as u64;
                }
                Poll::Pending => break,
                // The reading side hears of it.
                Poll::Ready(Err(_)) => written = self.scratch.len(),
            }
        }
        lane.rest.extend_from_slice(&self.scratch[written..]);
        lane.rest.is_empty()
    }

    /// Closes the lane of a stream about which everything is said.
    fn settle(&mut self, key: u64) {
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let mut state = self.shared.state.lock();
        let settled = state.flows.get(&key).is_some_and(|flow| flow.settled());
        if key == LINK || !settled || !lane.rest.is_empty() {
            return;
        }
        let mut cx = Context::from_waker(&lane.waker);
        if Pin::new(&mut lane.stream).poll_close(&mut cx).is_ready() {
            self.lanes.remove(&key);
            state.settled(key);
        }
    }

    /// Asks for signs of life and waits for them. Returns whether the time for that has come.
    fn time(&mut self, cx: &mut Context<'_>) -> Result<bool, Stop> {
        let now = Instant::now();
        if self.pinged.is_some() && self.timer.as_mut().poll(cx).is_pending() {
            return Ok(false);
        }
        self.timer.as_mut().reset(now + TICK);
        let silence = now - self.shared.counts.heard();
        if silence >= self.shared.idle {
            let why = format!("nothing has come for {:.1} s", silence.as_secs_f32());
            return Err(Stop::Ended(LinkEnd::new(EndCause::TimedOut, why)));
        }
        if self.pinged.is_none_or(|last| now >= last + PING) {
            self.pinged = Some(now);
            self.shared.state.lock().ping(now);
            self.shared.ready.nudge(LINK);
        }
        // Once more, so that the timer is heard.
        Ok(true)
    }
}
