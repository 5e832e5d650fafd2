//! What the holders of a TCP link and its driver share: the streams, and what is to be said about the link itself. Pure
//! but for the wakers.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    flow::{Flow, Freed},
    record::{Malformed, Record},
};
use crate::link::{LinkEnd, quic::LinkLimits};

/// The number of the stream about the link itself.
pub(super) const LINK: u64 = 0;
/// Room on the link that only streams which go first may use.
const RESERVE: u64 = 64 * 1024;
/// Streams beyond what the peer may have open: it sees one end a little earlier than this side.
const SLACK: u32 = 16;
/// Longest reason of a close.
const REASON: usize = 1024;

/// Everything about a link.
#[derive(Debug)]
pub(super) struct State {
    limits: LinkLimits,
    pub(super) flows: HashMap<u64, Flow>,
    next_key: u64,
    /// Streams of the peer that nobody has taken yet.
    accepted: VecDeque<u64>,
    acceptors: Vec<Waker>,
    openers: Vec<Waker>,
    /// Streams of this side and of the peer that are open.
    open: (u32, u32),
    /// Bytes that wait on all streams.
    pub(super) queued: usize,
    /// Bytes that may be sent on the link.
    room: u64,
    /// Streams whose data waits for that.
    held_up: BTreeSet<u64>,
    peer: Terms,
    granted: u64,
    owed: u64,
    pub(super) link: Sayings,
    /// The peer's reason, until its close comes.
    reason: Vec<u8>,
    pub(super) end: Option<LinkEnd>,
    enders: Vec<Waker>,
    pub(super) rtt: Option<Duration>,
    pinged: Option<(u32, Instant)>,
    next_ping: u32,
}

/// What the other side allows.
#[derive(Clone, Copy, Debug, Default)]
struct Terms {
    streams: Option<u32>,
    window: Option<u32>,
    credit: bool,
}

/// What is to be said about the link, each once.
#[derive(Debug, Default)]
pub(super) struct Sayings {
    streams: Option<u32>,
    window: Option<u32>,
    credit: Option<u32>,
    ping: Option<u32>,
    pong: Option<u32>,
    close: Option<(u32, Vec<u8>)>,
}

impl Sayings {
    pub(super) const fn any(&self) -> bool {
        self.streams.is_some()
            || self.window.is_some()
            || self.credit.is_some()
            || self.ping.is_some()
            || self.pong.is_some()
            || self.close.is_some()
    }

    pub(super) const fn closes(&self) -> bool {
        self.close.is_some()
    }

    pub(super) fn put(&mut self, out: &mut Vec<u8>) {
        let all = [
            self.pong.take().map(Record::Pong),
            self.streams.take().map(Record::Streams),
            self.window.take().map(Record::Window),
            self.credit.take().map(Record::Credit),
            self.ping.take().map(Record::Ping),
        ];
        all.into_iter().flatten().for_each(|record| record.put(out));
        if let Some((code, reason)) = self.close.take() {
            Record::Data(u32::try_from(reason.len()).unwrap_or(0)).put(out);
            out.extend_from_slice(&reason);
            Record::Close(code).put(out);
        }
    }
}

impl State {
    pub(super) fn new(limits: &LinkLimits) -> Self {
        let link = Sayings {
            streams: Some(limits.streams),
            window: Some(limits.stream_window),
            credit: Some(limits.link_window),
            ..Sayings::default()
        };
        Self {
            limits: *limits,
            flows: HashMap::new(),
            next_key: LINK + 1,
            accepted: VecDeque::new(),
            acceptors: Vec::new(),
            openers: Vec::new(),
            open: (0, 0),
            queued: 0,
            room: 0,
            held_up: BTreeSet::new(),
            peer: Terms::default(),
            granted: limits.link_window.into(),
            owed: 0,
            link,
            reason: Vec::new(),
            end: None,
            enders: Vec::new(),
            rtt: None,
            pinged: None,
            next_ping: 1,
        }
    }

    /// Whether the peer has said what it allows.
    pub(super) const fn greeted(&self) -> bool {
        self.peer.streams.is_some() && self.peer.window.is_some() && self.peer.credit
    }

    // What the holders do.

    /// Opens a stream, if the peer allows one more.
    pub(super) fn open(&mut self, waker: &Waker) -> Option<u64> {
        if self.open.0 >= self.peer.streams.unwrap_or(0) {
            wait(&mut self.openers, waker);
            return None;
        }
        self.open.0 += 1;
        Some(self.enter(Flow::new(true, self.peer.window.unwrap_or(0), self.limits.stream_window)))
    }

    /// A stream of the peer.
    pub(super) fn accept(&mut self, waker: &Waker) -> Option<u64> {
        let accepted = self.accepted.pop_front();
        if accepted.is_none() {
            wait(&mut self.acceptors, waker);
        }
        accepted
    }

    /// Lets the peer have so many streams open.
    pub(super) fn allow_streams(&mut self, count: u32) {
        if count != self.limits.streams {
            self.limits.streams = count;
            self.link.streams = Some(count);
        }
    }

    pub(super) fn close(&mut self, code: u32, reason: &str) {
        let end = reason.floor_char_boundary(REASON);
        self.link.close = Some((code, reason.as_bytes()[..end].to_vec()));
    }

    /// Whether much waits already.
    pub(super) fn crowded(&self) -> bool {
        self.queued as u64 > self.limits.send_window / 2
    }

    /// Bytes have been read, or dropped.
    pub(super) fn freed(&mut self, bytes: Freed) {
        self.owed += bytes as u64;
        if self.owed > 0 && self.owed >= u64::from(self.limits.link_window) / 8 {
            self.give_back();
        }
    }

    /// A reader waits. If much of the link's window is held by streams that nobody reads, what it waits for may be
    /// waiting for the little that it has read.
    pub(super) fn reader_waits(&mut self) {
        if self.owed > 0 && self.granted < u64::from(self.limits.link_window) / 2 {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        let credit = std::mem::take(&mut self.owed);
        self.granted += credit;
        let credit = u32::try_from(credit).unwrap_or(u32::MAX);
        self.link.credit = Some(self.link.credit.unwrap_or(0).saturating_add(credit));
    }

    /// Tells whoever waits when the link ends.
    pub(super) fn wait_for_end(&mut self, waker: &Waker) {
        wait(&mut self.enders, waker);
    }

    /// Forgets a stream that is held by nobody and settled.
    pub(super) fn tidy(&mut self, key: u64) {
        let over = self.end.is_some();
        if self.flows.get(&key).is_some_and(|flow| flow.forgotten() && (flow.done || over)) {
            self.flows.remove(&key);
        }
    }

    // What the driver does.

    fn enter(&mut self, flow: Flow) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.flows.insert(key, flow);
        key
    }

    /// A stream of the peer has come.
    pub(super) fn arrived(&mut self) -> Result<u64, Malformed> {
        let most = self.limits.streams.saturating_add(self.limits.streams / 4).saturating_add(SLACK);
        if self.open.1 >= most {
            return Err(Malformed("more streams than it may open"));
        }
        self.open.1 += 1;
        let key = self.enter(Flow::new(false, self.peer.window.unwrap_or(0), self.limits.stream_window));
        self.accepted.push_back(key);
        wake(&mut self.acceptors);
        Ok(key)
    }

    /// The carrier has forgotten a stream.
    pub(super) fn settled(&mut self, key: u64) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        if !std::mem::replace(&mut flow.done, true) {
            if flow.ours {
                self.open.0 -= 1;
                wake(&mut self.openers);
            } else {
                self.open.1 -= 1;
            }
        }
        self.tidy(key);
    }

    /// Data on a stream.
    pub(super) fn data(&mut self, key: u64, bytes: &[u8]) -> Result<(), Malformed> {
        if key == LINK {
            if self.reason.len() + bytes.len() > REASON {
                return Err(Malformed("too long a reason"));
            }
            self.reason.extend_from_slice(bytes);
            return Ok(());
        }
        let length = bytes.len() as u64;
        self.granted = self.granted.checked_sub(length).ok_or(Malformed("more on the link than it may carry"))?;
        let freed = match self.flows.get_mut(&key) {
            Some(flow) => flow.inn.push(bytes)?,
            None => bytes.len(),
        };
        self.freed(freed);
        Ok(())
    }

    /// A record. Returns how the link ended, if it says so.
    pub(super) fn hear(&mut self, key: u64, record: Record) -> Result<Option<LinkEnd>, Malformed> {
        if key == LINK {
            return self.hear_of_link(record);
        }
        let Some(flow) = self.flows.get_mut(&key) else { return Ok(None) };
        let queued = flow.out.queued;
        let freed = flow.hear(record)?;
        self.queued -= queued - flow.out.queued;
        self.freed(freed);
        Ok(None)
    }

    fn hear_of_link(&mut self, record: Record) -> Result<Option<LinkEnd>, Malformed> {
        match record {
            Record::Streams(count) => {
                self.peer.streams = Some(count);
                wake(&mut self.openers);
            }
            Record::Window(bytes) => self.peer.window = Some(bytes),
            Record::Credit(bytes) => {
                self.room = self.room.saturating_add(bytes.into());
                self.peer.credit = true;
            }
            Record::Ping(token) => self.link.pong = Some(token),
            Record::Pong(token) => {
                if let Some((_, sent)) = self.pinged.take_if(|(expected, _)| *expected == token) {
                    self.rtt = Some(sent.elapsed());
                }
            }
            Record::Close(code) => return Ok(Some(LinkEnd::closed(code, &self.reason))),
            Record::Data(_) => {}
            Record::End | Record::Reset(_) | Record::Stop(_) | Record::Got => {
                return Err(Malformed("the stream about the link cannot end"));
            }
        }
        // Nobody waits for the greeting but the one who waits for the end as well.
        wake(&mut self.enders);
        Ok(None)
    }

    /// The peer has taken a stream away.
    pub(super) fn cut(&mut self, key: u64) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let queued = flow.out.queued;
        let freed = flow.cut();
        self.queued -= queued - flow.out.queued;
        self.freed(freed);
    }

    fn room_for(&self, first: bool) -> u64 {
        if first { self.room } else { self.room.saturating_sub(RESERVE) }
    }

    /// Whether a stream has something to say. If it only waits for room on the link, it is remembered.
    pub(super) fn wants(&mut self, key: u64) -> bool {
        let Some(flow) = self.flows.get(&key) else { return key == LINK && self.link.any() };
        let wants = flow.wants(self.room_for(flow.first));
        if !wants && flow.out.held_up() {
            self.held_up.insert(key);
        }
        wants
    }

    /// Whether a stream goes before others.
    pub(super) fn first(&self, key: u64) -> bool {
        key == LINK || self.flows.get(&key).is_some_and(|flow| flow.first)
    }

    /// Writes what a stream says next, about one record's worth of it.
    pub(super) fn put(&mut self, key: u64, most: usize, out: &mut Vec<u8>) {
        if key == LINK {
            return self.link.put(out);
        }
        let Some(flow) = self.flows.get_mut(&key) else { return };
        while out.len() < most {
            let room = if flow.first { self.room } else { self.room.saturating_sub(RESERVE) };
            let Some((record, data)) = flow.next(room) else { break };
            record.put(out);
            out.extend_from_slice(&data);
            self.room -= data.len() as u64;
            self.queued -= data.len();
        }
    }

    /// Streams that waited for room on the link, if there is some.
    pub(super) fn released(&mut self) -> BTreeSet<u64> {
        if self.room > RESERVE { std::mem::take(&mut self.held_up) } else { BTreeSet::new() }
    }

    /// Asks for a sign of life.
    pub(super) fn ping(&mut self, now: Instant) {
        if self.pinged.is_none() {
            self.pinged = Some((self.next_ping, now));
            self.link.ping = Some(self.next_ping);
            self.next_ping = self.next_ping.wrapping_add(1);
        }
    }

    /// The link is no more. The first reason counts.
    pub(super) fn ended(&mut self, end: LinkEnd) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(end);
        for flow in self.flows.values_mut() {
            flow.wake();
        }
        self.flows.retain(|_, flow| !flow.forgotten());
        wake(&mut self.acceptors);
        wake(&mut self.openers);
        wake(&mut self.enders);
    }
}

fn wait(waiting: &mut Vec<Waker>, waker: &Waker) {
    if !waiting.iter().any(|other| other.will_wake(waker)) {
        waiting.push(waker.clone());
    }
}

fn wake(waiting: &mut Vec<Waker>) {
    waiting.drain(..).for_each(Waker::wake);
}

#[cfg(test)]
mod tests;
