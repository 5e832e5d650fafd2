//! One stream of a TCP link: what waits to be sent, what waits to be read, and how each direction ended. Pure.

use std::{collections::VecDeque, task::Waker};

use bytes::{Bytes, BytesMut};
use proto::code::ResetCode;

use super::record::{MOST_DATA, Malformed, Record};

/// Bytes of a stream that wait to be sent, at most, and when much waits already.
const QUEUE: (usize, usize) = (64 * 1024, 4 * 1024);
/// Pieces that are shorter are put together: each of its own would cost more than it carries.
const SHORT: usize = 2 * 1024;

/// How a direction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Clean,
    Reset(ResetCode),
}

fn code_of(number: u32) -> ResetCode {
    ResetCode::from_number(number).unwrap_or(ResetCode::PeerReset)
}

/// What came off a direction without being read, or with being read: the peer is to have credit for it again.
pub(super) type Freed = usize;

/// A stream.
#[derive(Debug)]
pub(super) struct Flow {
    /// Opened by this side.
    pub(super) ours: bool,
    /// Goes before the others.
    pub(super) first: bool,
    /// Each half is held by somebody.
    pub(super) held: (bool, bool),
    /// Both directions are settled, and the carrier has forgotten it.
    pub(super) done: bool,
    pub(super) out: Out,
    pub(super) inn: In,
}

impl Flow {
    pub(super) fn new(ours: bool, room: u32, window: u32) -> Self {
        let out = Out { room: room.into(), greet: !ours, ..Out::default() };
        Self { ours, first: false, held: (true, true), done: false, out, inn: In::new(window) }
    }

    /// What to say next; takes data off within `room` of the link.
    pub(super) fn next(&mut self, room: u64) -> Option<(Record, Bytes)> {
        let bare = |record| Some((record, Bytes::new()));
        if std::mem::take(&mut self.out.greet) {
            return bare(Record::Credit(0));
        }
        if let Some(code) = self.inn.stop.filter(|_| !self.inn.stop_told && self.inn.over.is_none()) {
            self.inn.stop_told = true;
            return bare(Record::Stop(code.number()));
        }
        if let Some(credit) = self.inn.credit() {
            return bare(Record::Credit(credit));
        }
        if self.inn.over == Some(Over::Clean) && !self.inn.got_told {
            self.inn.got_told = true;
            return bare(Record::Got);
        }
        self.out.next(room)
    }

    /// Whether [`Flow::next`] has something, with room on the link.
    pub(super) fn wants(&self, room: u64) -> bool {
        let inn = &self.inn;
        self.out.greet
            || (inn.stop.is_some() && !inn.stop_told && inn.over.is_none())
            || inn.credit_due()
            || (inn.over == Some(Over::Clean) && !inn.got_told)
            || self.out.wants(room)
    }

    /// Nothing is left to say or to hear.
    pub(super) fn settled(&self) -> bool {
        let sent = self.out.end_told && (self.out.got || matches!(self.out.end, Some(Over::Reset(_))));
        let read = match self.inn.over {
            Some(Over::Clean) => self.inn.got_told,
            Some(Over::Reset(_)) => true,
            None => false,
        };
        sent && read && !self.out.greet
    }

    /// Nobody will ask for it again.
    pub(super) const fn forgotten(&self) -> bool {
        !self.held.0 && !self.held.1
    }

    /// Takes in a record. Returns what was dropped unread.
    pub(super) fn hear(&mut self, record: Record) -> Result<Freed, Malformed> {
        match record {
            Record::End => self.inn.end(Over::Clean),
            Record::Reset(code) => self.inn.end(Over::Reset(code_of(code))),
            Record::Stop(code) => {
                self.out.stop(code_of(code));
                Ok(0)
            }
            Record::Credit(bytes) => {
                self.out.room = self.out.room.saturating_add(bytes.into());
                self.out.wake();
                Ok(0)
            }
            Record::Got => {
                if !self.out.end_told {
                    return Err(Malformed("it got an end that was not sent"));
                }
                self.out.got = true;
                self.out.wake();
                Ok(0)
            }
            Record::Data(_) => Ok(0),
            Record::Streams(_) | Record::Window(_) | Record::Ping(_) | Record::Pong(_) | Record::Close(_) => {
                Err(Malformed("a record about the link on another stream"))
            }
        }
    }

    /// The peer has taken the stream away without saying how it ended. Returns what was dropped unread.
    pub(super) fn cut(&mut self) -> Freed {
        self.out.stop(ResetCode::PeerReset);
        (self.out.end_told, self.out.greet) = (true, false);
        if self.inn.over.is_some() { 0 } else { self.inn.end(Over::Reset(ResetCode::PeerReset)).unwrap_or(0) }
    }

    /// Wakes whoever waits.
    pub(super) fn wake(&mut self) {
        self.out.wake();
        self.inn.wake();
    }
}

/// The direction towards the peer.
#[derive(Debug, Default)]
pub(super) struct Out {
    queue: VecDeque<Bytes>,
    pub(super) queued: usize,
    /// How it is to end, and whether that has been said.
    pub(super) end: Option<Over>,
    end_told: bool,
    /// The peer has everything.
    pub(super) got: bool,
    /// The peer does not read on.
    pub(super) stopped: Option<ResetCode>,
    room: u64,
    /// Says something at once: yamux wants to hear of each stream that came.
    greet: bool,
    waiting: Vec<Waker>,
}

impl Out {
    /// Takes as much as there is room for; `crowded` says that much waits on other streams. Returns how much.
    pub(super) fn push(&mut self, chunk: &mut Bytes, crowded: bool) -> usize {
        let most = if crowded { QUEUE.1 } else { QUEUE.0 };
        let taken = chunk.split_to(most.saturating_sub(self.queued).min(chunk.len()));
        let bytes = taken.len();
        if bytes > 0 {
            self.queue.push_back(taken);
            self.queued += bytes;
        }
        bytes
    }

    fn next(&mut self, room: u64) -> Option<(Record, Bytes)> {
        if self.end_told {
            return None;
        }
        if let Some(Over::Reset(code)) = self.end {
            self.end_told = true;
            return Some((Record::Reset(code.number()), Bytes::new()));
        }
        let Some(first) = self.queue.front_mut() else {
            self.end?;
            self.end_told = true;
            return Some((Record::End, Bytes::new()));
        };
        let most = usize::try_from(self.room.min(room)).unwrap_or(usize::MAX).min(MOST_DATA);
        if most == 0 {
            return None;
        }
        let part = first.split_to(most.min(first.len()));
        if first.is_empty() {
            self.queue.pop_front();
        }
        self.queued -= part.len();
        self.room -= part.len() as u64;
        self.wake();
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        Some((Record::Data(length), part))
    }

    fn wants(&self, room: u64) -> bool {
        if self.end_told {
            return false;
        }
        match self.end {
            Some(Over::Reset(_)) => true,
            Some(Over::Clean) if self.queue.is_empty() => true,
            Some(Over::Clean) | None => !self.queue.is_empty() && self.room > 0 && room > 0,
        }
    }

    /// What waits only for room on the link.
    pub(super) fn held_up(&self) -> bool {
        !self.end_told && !self.queue.is_empty() && self.room > 0
    }

    /// Ends it, if it has not ended. Returns how much was dropped that had not been sent.
    pub(super) fn finish(&mut self, end: Over) -> usize {
        // A clean end that has not been said can still be broken off.
        let may = match (self.end, end) {
            (None, _) => true,
            (Some(Over::Clean), Over::Reset(_)) => !self.end_told,
            (Some(_), _) => false,
        };
        if !may {
            return 0;
        }
        self.end = Some(end);
        if end == Over::Clean { 0 } else { self.clear() }
    }

    fn stop(&mut self, code: ResetCode) {
        if self.got || self.stopped.is_some() {
            return;
        }
        self.stopped = Some(code);
        self.finish(Over::Reset(code));
        self.wake();
    }

    fn clear(&mut self) -> usize {
        self.queue.clear();
        std::mem::take(&mut self.queued)
    }

    /// Wakes the waker when something has changed.
    pub(super) fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|other| other.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }
}

/// The direction from the peer.
#[derive(Debug)]
pub(super) struct In {
    queue: VecDeque<Bytes>,
    /// The last bytes, while they are few.
    tail: BytesMut,
    unread: usize,
    pub(super) over: Option<Over>,
    got_told: bool,
    /// What the peer may still send, and what it is to have again once that is worth a record.
    granted: u32,
    owed: u32,
    window: u32,
    /// Nobody reads on.
    pub(super) stop: Option<ResetCode>,
    stop_told: bool,
    waiting: Option<Waker>,
}

impl In {
    fn new(window: u32) -> Self {
        Self {
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            unread: 0,
            over: None,
            got_told: false,
            granted: window,
            owed: 0,
            window,
            stop: None,
            stop_told: false,
            waiting: None,
        }
    }

    /// Takes in data. Returns how much of it nobody will read.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<Freed, Malformed> {
        if self.over.is_some() {
            return Err(Malformed("data behind the end of a stream"));
        }
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.granted = self.granted.checked_sub(length).ok_or(Malformed("more on a stream than it may carry"))?;
        if self.stop.is_some() {
            return Ok(data.len());
        }
        self.unread += data.len();
        if data.len() < SHORT {
            self.tail.extend_from_slice(data);
        }
        if self.tail.len() >= SHORT || data.len() >= SHORT {
            self.cut_tail();
        }
        if data.len() >= SHORT {
            self.queue.push_back(Bytes::copy_from_slice(data));
        }
        self.wake();
        Ok(0)
    }

    fn cut_tail(&mut self) {
        if !self.tail.is_empty() {
            // Without the room behind it, which would be held as long as the bytes are.
            self.queue.push_back(Bytes::copy_from_slice(&self.tail));
            self.tail.clear();
        }
    }

    /// The next bytes, at most `max`.
    pub(super) fn take(&mut self, max: usize) -> Option<Bytes> {
        if self.queue.is_empty() {
            self.cut_tail();
        }
        let first = self.queue.front_mut()?;
        let part = first.split_to(max.min(first.len()));
        if first.is_empty() {
            self.queue.pop_front();
        }
        self.unread -= part.len();
        self.owed = self.owed.saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
        Some(part)
    }

    fn end(&mut self, over: Over) -> Result<Freed, Malformed> {
        if self.over.is_some() {
            return Err(Malformed("a second end of a stream"));
        }
        self.over = Some(over);
        self.wake();
        Ok(if over == Over::Clean { 0 } else { self.clear() })
    }

    /// Nobody reads on. Returns what was dropped unread.
    pub(super) fn stop(&mut self, code: ResetCode) -> Freed {
        if self.stop.is_some() {
            return 0;
        }
        self.stop = Some(code);
        self.clear()
    }

    fn clear(&mut self) -> Freed {
        self.queue.clear();
        self.tail = BytesMut::new();
        std::mem::take(&mut self.unread)
    }

    /// Whether so much has been read that the peer is to know.
    pub(super) const fn credit_due(&self) -> bool {
        self.over.is_none() && self.stop.is_none() && self.owed > 0 && self.owed >= self.window / 4
    }

    fn credit(&mut self) -> Option<u32> {
        if !self.credit_due() {
            return None;
        }
        let credit = std::mem::take(&mut self.owed);
        self.granted = self.granted.saturating_add(credit);
        Some(credit)
    }

    /// Wakes the waker when something has come.
    pub(super) fn wait(&mut self, waker: &Waker) {
        self.waiting = Some(waker.clone());
    }

    fn wake(&mut self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }
}
