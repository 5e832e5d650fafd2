//! A tunnel: a link to one shard, with the control stream on it.
//!
//! The control stream is the first stream on the link. One task reads it, one writes it and pings; both belong to the
//! [`Tunnel`] and end with it.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use proto::{
    code::CloseCode,
    frame::MAX_SHARD_TO_EDGE,
    id::ShardId,
    message::{Candidate, EdgeToShard, Hello, Refuse, Renewal, Service, ShardToEdge, Welcome},
};
use runtime::{
    frames::{FrameReader, ReadFrameError},
    link::{EndCause, Link, LinkEnd, RecvHalf, SendHalf, Stream, StreamError},
    shutdown::Tasks,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, warn};

use crate::{load::Load, metrics::Metrics};

/// How long a shard may take to answer Hello.
const GREETING: Duration = Duration::from_secs(5);
/// How often to ping if the shard does not say.
const PING: Duration = Duration::from_secs(4);
/// Bounds of what a shard may say about it.
const PING_BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Unanswered pings after which the link is lost.
const MISSED: usize = 3;
/// Silence after which the link is lost.
const SILENCE: Duration = Duration::from_secs(12);
/// Messages that wait to be written. Whoever has one more waits.
const OUTGOING: usize = 16;
/// Orders that wait to be followed. One more is dropped: the shard repeats itself by closing the link.
const ORDERS: usize = 8;

/// What a shard says to Hello.
#[derive(Debug)]
pub enum Greeting {
    /// It serves.
    Welcome(Welcome, Control),
    /// Another one does.
    Redirect {
        /// Which one.
        to: Candidate,
        /// The ring that says so.
        epoch: u64,
    },
    /// It does not.
    Refuse(Refuse),
}

/// A control stream behind its greeting.
#[derive(Debug)]
pub struct Control {
    stream: Stream,
    reader: FrameReader,
}

/// Opens the control stream, says Hello and hears the answer.
///
/// # Errors
/// If the link ends before, or the shard says nothing in time or nothing sensible.
pub async fn greet(link: &Link, hello: Hello) -> Result<Greeting, LinkEnd> {
    let exchange = async {
        let mut stream = link.open().await?;
        // A ping that waits behind a thousand downloads on a slow link would look like a dead link.
        stream.send.go_first();
        let hello = EdgeToShard::Hello(hello).encode().map_err(|e| LinkEnd::new(EndCause::Local, e.to_string()))?;
        stream.send.write_one(hello).await.map_err(|e| stream_end(link, &e))?;
        let mut reader = FrameReader::new(MAX_SHARD_TO_EDGE);
        loop {
            let message = read(&mut reader, &mut stream.recv).await.map_err(|e| control_end(link, &e))?;
            match message {
                Incoming::Message(ShardToEdge::Welcome(welcome)) => {
                    return Ok(Greeting::Welcome(welcome, Control { stream, reader }));
                }
                Incoming::Message(ShardToEdge::Redirect { to, epoch }) => return Ok(Greeting::Redirect { to, epoch }),
                Incoming::Message(ShardToEdge::Refuse(refuse)) => return Ok(Greeting::Refuse(refuse)),
                Incoming::Message(other) => debug!(message = ?other, "skipped before Welcome"),
                Incoming::Unknown => {}
                Incoming::End => return Err(ended_early(link)),
            }
        }
    };
    let silent = || LinkEnd::new(EndCause::TimedOut, format!("no answer to Hello within {} s", GREETING.as_secs()));
    timeout(GREETING, exchange).await.unwrap_or_else(|_| Err(silent()))
}

enum Incoming {
    Message(ShardToEdge),
    /// Of a newer version.
    Unknown,
    End,
}

async fn read(reader: &mut FrameReader, recv: &mut RecvHalf) -> Result<Incoming, ReadFrameError> {
    let Some(body) = reader.next(recv).await? else { return Ok(Incoming::End) };
    Ok(ShardToEdge::decode(body)?.map_or(Incoming::Unknown, Incoming::Message))
}

fn stream_end(link: &Link, error: &StreamError) -> LinkEnd {
    match (link.end(), error) {
        (Some(end), _) => end,
        (None, StreamError::Link(end)) => end.clone(),
        (None, StreamError::Reset(_) | StreamError::Ended) => {
            LinkEnd::new(EndCause::Transport, format!("control stream: {error}"))
        }
    }
}

fn control_end(link: &Link, error: &ReadFrameError) -> LinkEnd {
    match error {
        ReadFrameError::Stream(error) => stream_end(link, error),
        ReadFrameError::Frame(_) | ReadFrameError::Truncated => {
            LinkEnd::new(EndCause::Closed(CloseCode::ProtocolError), format!("control stream: {error}"))
        }
    }
}

fn ended_early(link: &Link) -> LinkEnd {
    link.end().unwrap_or_else(|| LinkEnd::new(EndCause::Transport, "the shard ended the control stream"))
}

/// What a shard, or the loss of it, makes an edge do.
#[derive(Clone, Debug)]
pub enum Event {
    /// Go elsewhere, while this tunnel still serves.
    Leave(Leave),
    /// The tunnel is no more.
    Lost(LinkEnd),
    /// The shard serves no longer, and says why.
    Refused(Refuse),
}

/// An order to go elsewhere.
#[derive(Clone, Debug)]
pub struct Leave {
    /// `move` or `drain`.
    pub why: &'static str,
    /// Where to; empty for wherever the edge knows.
    pub to: Vec<Candidate>,
    /// How long to wait before dialing.
    pub wait: Duration,
    /// When to give up.
    pub by: Instant,
    /// When the old link is to be closed even if streams are left; `None` leaves it to the edge.
    pub until: Option<Instant>,
    /// The ring that says so, or 0.
    pub epoch: u64,
}

/// What a tunnel needs of the edge.
#[derive(Clone, Debug)]
pub struct TunnelParts {
    /// What is announced.
    pub services: Vec<Service>,
    /// Who waits for a renewal. One answer at a time; another one is dropped.
    pub renewed: mpsc::Sender<Result<Renewal, Refuse>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// To whom the tasks belong.
    pub tasks: Tasks,
}

/// A link to a shard that serves.
#[derive(Debug)]
pub struct Tunnel {
    /// The shard.
    pub shard: ShardId,
    /// The address that was dialled.
    pub address: String,
    /// The carrier.
    pub link: Link,
    /// Since when.
    pub since: Instant,
    /// Streams that it carries.
    pub load: Load,
    /// Cancelled when the tunnel is dropped.
    pub over: CancellationToken,
    events: mpsc::Receiver<Event>,
    line: mpsc::Sender<EdgeToShard>,
    pulse: Pulse,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

impl Tunnel {
    /// Takes over a control stream behind its Welcome, and announces the services.
    #[must_use]
    pub fn start(link: Link, address: String, welcome: &Welcome, control: Control, parts: TunnelParts) -> Self {
        let (event_sender, events) = mpsc::channel(ORDERS);
        let (line, outgoing) = mpsc::channel(OUTGOING);
        let (pulse, over) = (Pulse::new(), CancellationToken::new());
        let span = tracing::info_span!("tunnel", shard = %welcome.shard, generation = welcome.generation);
        let TunnelParts { services, renewed, metrics, tasks } = parts;
        let Control { stream: Stream { send, recv }, reader } = control;
        let (ear, voice) = (
            Ear {
                link: link.clone(),
                recv,
                reader,
                renewed,
                metrics,
                pulse: pulse.clone(),
                events: event_sender.clone(),
            },
            Voice { link: link.clone(), send, outgoing, pulse: pulse.clone(), events: event_sender, leaving: false },
        );
        let ping = if welcome.ping.is_zero() { PING } else { welcome.ping.clamp(PING_BOUNDS.0, PING_BOUNDS.1) };
        tasks.spawn(over.clone().run_until_cancelled_owned(ear.run()).instrument(span.clone()));
        tasks.spawn(over.clone().run_until_cancelled_owned(voice.run(services, ping)).instrument(span));
        let (shard, since) = (welcome.shard.clone(), Instant::now());
        Self { shard, address, link, since, load: Load::new(), over, events, line, pulse }
    }

    /// The next thing that happens to it. Cancel-safe. After [`Event::Lost`] nothing more does.
    pub async fn event(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => Event::Lost(ended_early(&self.link)),
        }
    }

    /// Says that the edge leaves by its own will: no new streams are wanted, those that are open go on.
    pub fn say_bye(&self, reason: &str) {
        // A full line means that the shard does not read; the close that follows says the same.
        let _ = self.line.try_send(EdgeToShard::Bye { reason: reason.to_owned() });
    }

    /// Where messages to the shard go in.
    #[must_use]
    pub fn line(&self) -> mpsc::Sender<EdgeToShard> {
        self.line.clone()
    }

    /// When the shard last answered a ping.
    #[must_use]
    pub fn pulse(&self) -> watch::Receiver<Option<Instant>> {
        self.pulse.last.subscribe()
    }
}

/// Pings and their answers.
#[derive(Clone, Debug)]
struct Pulse {
    last: watch::Sender<Option<Instant>>,
    unanswered: Arc<Mutex<Unanswered>>,
}

#[derive(Debug)]
struct Unanswered {
    next_token: u64,
    sent: VecDeque<(u64, Instant)>,
    heard: Instant,
}

impl Pulse {
    fn new() -> Self {
        let unanswered = Unanswered { next_token: 1, sent: VecDeque::new(), heard: Instant::now() };
        Self { last: watch::Sender::new(None), unanswered: Arc::new(Mutex::new(unanswered)) }
    }

    /// The token of the next ping, or how long the silence has lasted if it has lasted too long.
    fn beat(&self, leaving: bool) -> Result<u64, Duration> {
        let mut state = self.unanswered.lock();
        let silence = state.heard.elapsed();
        if !leaving && (state.sent.len() >= MISSED || silence >= SILENCE) {
            return Err(silence);
        }
        // Whoever leaves pings to keep the path open, and no longer listens for the answer.
        if state.sent.len() >= MISSED {
            state.sent.pop_front();
        }
        let token = state.next_token;
        state.next_token += 1;
        state.sent.push_back((token, Instant::now()));
        Ok(token)
    }

    /// Waits until the silence has lasted too long: the next beat may be almost a whole period after that. Cancel-safe.
    async fn silence(&self) {
        loop {
            let until = self.unanswered.lock().heard + SILENCE;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Takes note of an answer. Returns the round trip if it was one.
    fn answered(&self, token: u64) -> Option<Duration> {
        let now = Instant::now();
        let rtt = {
            let mut state = self.unanswered.lock();
            let at = state.sent.iter().position(|(t, _)| *t == token)?;
            let (_, sent) = state.sent.drain(..=at).next_back()?;
            state.heard = now;
            now - sent
        };
        self.last.send_replace(Some(now));
        Some(rtt)
    }
}

/// Reads the control stream.
struct Ear {
    link: Link,
    recv: RecvHalf,
    reader: FrameReader,
    renewed: mpsc::Sender<Result<Renewal, Refuse>>,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    events: mpsc::Sender<Event>,
}

impl Ear {
    async fn run(mut self) {
        let last = loop {
            match read(&mut self.reader, &mut self.recv).await {
                Ok(Incoming::Message(ShardToEdge::Refuse(refuse))) => break Event::Refused(refuse),
                Ok(Incoming::Message(message)) => self.hear(message),
                Ok(Incoming::Unknown) => debug!("a message of a newer version was skipped"),
                Ok(Incoming::End) => break Event::Lost(ended_early(&self.link)),
                Err(error) => {
                    if matches!(error, ReadFrameError::Frame(_) | ReadFrameError::Truncated) {
                        self.link.close(CloseCode::ProtocolError, &error.to_string());
                    }
                    break Event::Lost(control_end(&self.link, &error));
                }
            }
        };
        // Nobody listens any more while a tunnel is being retired.
        let _ = self.events.send(last).await;
    }

    fn hear(&self, message: ShardToEdge) {
        let now = Instant::now();
        match message {
            ShardToEdge::Pong(token) => match self.pulse.answered(token) {
                Some(rtt) => self.metrics.observe_rtt(rtt),
                None => debug!(token, "a Pong that nobody waited for"),
            },
            ShardToEdge::Move { to, epoch, within } => {
                let leave =
                    Leave { why: "move", to: vec![to], wait: Duration::ZERO, by: now + within, until: None, epoch };
                self.order(leave);
            }
            ShardToEdge::Drain { reconnect_in, deadline, candidates } => {
                let end = now + deadline;
                let leave =
                    Leave { why: "drain", to: candidates, wait: reconnect_in, by: end, until: Some(end), epoch: 0 };
                self.order(leave);
            }
            ShardToEdge::Renewed(answer) => {
                if self.renewed.try_send(answer).is_err() {
                    debug!("a renewal that nobody waited for");
                }
            }
            ShardToEdge::Welcome(_) | ShardToEdge::Redirect { .. } | ShardToEdge::Refuse(_) => {
                debug!("a message that belongs to the greeting was skipped");
            }
        }
    }

    fn order(&self, leave: Leave) {
        if self.events.try_send(Event::Leave(leave)).is_err() {
            warn!("the shard gives more orders than can be followed; one was dropped");
        }
    }
}

/// Writes the control stream.
struct Voice {
    link: Link,
    send: SendHalf,
    outgoing: mpsc::Receiver<EdgeToShard>,
    pulse: Pulse,
    events: mpsc::Sender<Event>,
    leaving: bool,
}

impl Voice {
    async fn run(mut self, services: Vec<Service>, ping: Duration) {
        let mut ticks = interval(ping);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next = Some(EdgeToShard::Announce(services));
        loop {
            let message = match next.take() {
                Some(message) => message,
                None => tokio::select! {
                    biased;
                    _ = ticks.tick() => match self.pulse.beat(self.leaving) {
                        Ok(token) => EdgeToShard::Ping(token),
                        Err(silence) => return self.lost(silence).await,
                    },
                    () = self.pulse.silence(), if !self.leaving => return self.lost(SILENCE).await,
                    message = self.outgoing.recv() => match message {
                        Some(message) => message,
                        None => return,
                    },
                },
            };
            self.leaving |= matches!(message, EdgeToShard::Bye { .. });
            match message.encode() {
                Ok(frame) => {
                    if self.write(frame).await.is_err() {
                        // Why is told by the reading half.
                        return;
                    }
                }
                Err(error) => warn!(%error, "a message that is too long was not sent"),
            }
        }
    }

    async fn write(&mut self, frame: Bytes) -> Result<(), ()> {
        match timeout(SILENCE, self.send.write_one(frame)).await {
            Ok(result) => result.map_err(drop),
            Err(_) => {
                self.lost(SILENCE).await;
                Err(())
            }
        }
    }

    async fn lost(&self, silence: Duration) {
        let detail = format!("the shard has not answered for {:.1} s", silence.as_secs_f32());
        let _ = self.events.send(Event::Lost(LinkEnd::new(EndCause::TimedOut, detail.clone()))).await;
        self.link.close(CloseCode::Done, &detail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn three_pings_without_an_answer_are_the_end() {
        let pulse = Pulse::new();
        for expected in 1..=3 {
            assert_eq!(pulse.beat(false), Ok(expected));
            tokio::time::advance(PING).await;
        }
        assert_eq!(pulse.beat(false), Err(SILENCE));
        assert_eq!(pulse.beat(true), Ok(4), "whoever leaves goes on pinging");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_over_at_its_time_and_not_at_the_next_beat() {
        let pulse = Pulse::new();
        let began = Instant::now();
        let token = pulse.beat(false).unwrap();
        tokio::time::advance(PING + PING / 2).await;
        pulse.answered(token);
        pulse.silence().await;
        assert_eq!(began.elapsed(), PING + PING / 2 + SILENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_counts_for_the_pings_before_it_and_only_once() {
        let pulse = Pulse::new();
        let (first, second) = (pulse.beat(false).unwrap(), pulse.beat(false).unwrap());
        tokio::time::advance(Duration::from_millis(30)).await;
        assert_eq!(pulse.answered(77), None, "a token that was never sent");
        assert_eq!(*pulse.last.borrow(), None);
        assert_eq!(pulse.answered(second), Some(Duration::from_millis(30)));
        assert_eq!(pulse.answered(first), None);
        assert!(pulse.last.borrow().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_the_end_even_with_few_pings() {
        let pulse = Pulse::new();
        assert!(pulse.beat(false).is_ok());
        tokio::time::advance(SILENCE).await;
        assert!(pulse.beat(false).is_err());
    }
}
