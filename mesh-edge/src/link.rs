//! A tunnel: a link to one shard, with the control stream on it.
//!
//! The control stream is the first stream on the link. One task reads it, one writes it and pings; both belong to the
//! [`Tunnel`] and end with it.

use std::{sync::Arc, time::Duration};

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
    link::{EndCause, Link, LinkEnd, RecvHalf, SendHalf, Stream, StreamError, whereabouts::Whereabouts},
    shutdown::Tasks,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, warn};

use crate::{
    dice::Dice,
    journal::Journal,
    load::Load,
    metrics::Metrics,
    pulse::{Beat, Mood, Pulse, Seen},
};

mod losses;
mod outside;
mod story;

use outside::Outside;
use story::Story;

/// How long a shard may take to answer Hello.
const GREETING: Duration = Duration::from_secs(5);
/// How often to ping if the shard does not say.
const PING: Duration = Duration::from_secs(4);
/// Bounds of what a shard may say about it.
const PING_BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// How long a link may take nothing before it is lost.
const WRITE: Duration = Duration::from_secs(24);
/// Messages that wait to be written. Whoever has one more waits.
const OUTGOING: usize = 16;
/// Orders that wait to be followed. One more is dropped: the shard repeats itself by closing the link.
const ORDERS: usize = 8;

/// What a shard says to Hello.
#[derive(Debug)]
pub enum Greeting {
    /// It serves.
    Welcome(Welcome, Box<Control>),
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
                    return Ok(Greeting::Welcome(welcome, Box::new(Control { stream, reader })));
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
    /// When this host's addresses change, if anybody watches.
    pub whereabouts: Option<Whereabouts>,
    /// Draws when the first ping is due, so that edges which come together do not ping together.
    pub dice: Dice,
    /// What the edge went through, to be told.
    pub journal: Journal,
    /// What it allows by itself, to be told.
    pub allows: Arc<[String]>,
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
    last: watch::Sender<Option<Instant>>,
    doubts: watch::Sender<Option<Instant>>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

impl Tunnel {
    /// Takes over a control stream behind its Welcome, and announces the services.
    #[must_use]
    pub fn start(
        link: Link,
        (address, proxy): (String, String),
        welcome: &Welcome,
        control: Control,
        parts: TunnelParts,
    ) -> Self {
        let (event_sender, events) = mpsc::channel(ORDERS);
        let (line, outgoing) = mpsc::channel(OUTGOING);
        let over = CancellationToken::new();
        let span = tracing::info_span!("tunnel", shard = %welcome.shard, generation = welcome.generation);
        let TunnelParts { services, renewed, metrics, tasks, whereabouts, dice, journal, allows } = parts;
        let Control { stream: Stream { send, recv }, reader } = control;
        let ping = if welcome.ping.is_zero() { PING } else { welcome.ping.clamp(PING_BOUNDS.0, PING_BOUNDS.1) };
        let pulse = Pulse::new(ping, dice.fraction(), Instant::now());
        let (pulse, last) = (Arc::new(Mutex::new(pulse)), watch::Sender::new(None));
        let (load, doubts) = (Load::new(), watch::Sender::new(None));
        let outside = Outside::of(&link, whereabouts);
        let (known, doubted) = (last.clone(), doubts.clone());
        let heart = Heart { link: link.clone(), load: load.clone(), pulse, last: known, doubts: doubted, metrics };
        let (ear_heart, ear_events) = (heart.clone(), event_sender.clone());
        let ear = Ear { link: link.clone(), recv, reader, renewed, heart: ear_heart, events: ear_events };
        let story = Story::new(journal, proxy, allows);
        let voice = Voice { send, outgoing, heart, outside, events: event_sender, mood: Mood::Serving, story };
        tasks.spawn(over.clone().run_until_cancelled_owned(ear.run()).instrument(span.clone()));
        tasks.spawn(over.clone().run_until_cancelled_owned(voice.run(services)).instrument(span));
        let (shard, since) = (welcome.shard.clone(), Instant::now());
        Self { shard, address, link, since, load, over, events, line, last, doubts }
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

    /// Since when nothing at all has come although it was asked for; `None` while something does.
    #[must_use]
    pub fn doubts(&self) -> watch::Receiver<Option<Instant>> {
        self.doubts.subscribe()
    }

    /// When the shard last answered a ping.
    #[must_use]
    pub fn pulse(&self) -> watch::Receiver<Option<Instant>> {
        self.last.subscribe()
    }
}

/// The pulse of a tunnel, with what it is felt by, and whom it concerns.
#[derive(Clone, Debug)]
struct Heart {
    link: Link,
    load: Load,
    pulse: Arc<Mutex<Pulse>>,
    last: watch::Sender<Option<Instant>>,
    doubts: watch::Sender<Option<Instant>>,
    metrics: Arc<Metrics>,
}

impl Heart {
    /// What to do now; a new socket is taken in here.
    fn beat(&self, mood: Mood) -> Beat {
        loop {
            let stats = self.link.stats();
            let seen = Seen {
                now: Instant::now(),
                received: stats.received_bytes,
                lost: stats.lost_packets,
                in_use: self.load.count() > 0,
                rtt: self.link.rtt(),
                signs: self.link.signs().map(|signs| *signs.borrow()).unwrap_or_default(),
            };
            let (refusals, beat, doubt) = {
                let mut pulse = self.pulse.lock();
                (pulse.refusals(&seen), pulse.beat(&seen, mood), pulse.doubt(&seen))
            };
            self.doubt(doubt);
            self.metrics.refusals.inc_by(refusals);
            let why = match beat {
                Beat::Rebind(why) => why,
                Beat::Ping(_) | Beat::Wait(_) | Beat::Dead(_) => return beat,
            };
            let outcome = self.link.rebind();
            self.pulse.lock().rebound(seen.now, outcome.is_ok());
            match outcome {
                Ok(true) => {
                    self.metrics.rebinds.inc();
                    warn!(why = why.words(), "going on from a new socket");
                }
                Ok(false) => debug!(why = why.words(), "there is no other socket for this link"),
                Err(error) => warn!(%error, why = why.words(), "there is no way to the shard"),
            }
        }
    }

    fn doubt(&self, since: Option<Instant>) {
        self.doubts.send_if_modified(|doubt| std::mem::replace(doubt, since) != since);
    }

    /// Takes note of an answer.
    fn answered(&self, token: u64) {
        let now = Instant::now();
        match self.pulse.lock().answered(token, now) {
            Some(rtt) => {
                self.metrics.observe_rtt(rtt);
                self.metrics.path.observe(&self.link);
            }
            None => return debug!(token, "a Pong that nobody waited for"),
        }
        self.last.send_replace(Some(now));
        self.doubt(None);
    }
}

/// Reads the control stream.
struct Ear {
    link: Link,
    recv: RecvHalf,
    reader: FrameReader,
    renewed: mpsc::Sender<Result<Renewal, Refuse>>,
    heart: Heart,
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
            ShardToEdge::Pong(token) => self.heart.answered(token),
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

/// Writes the control stream, and feels the pulse.
struct Voice {
    send: SendHalf,
    outgoing: mpsc::Receiver<EdgeToShard>,
    heart: Heart,
    outside: Outside,
    events: mpsc::Sender<Event>,
    mood: Mood,
    story: Story,
}

impl Voice {
    async fn run(mut self, services: Vec<Service>) {
        let mut next = Some(EdgeToShard::Announce(services));
        loop {
            let message = match next.take() {
                Some(message) => message,
                None => match self.heart.beat(self.mood) {
                    Beat::Ping(token) => match self.story.news(&self.heart.link) {
                        Some(news) => {
                            next = Some(EdgeToShard::Ping(token));
                            news
                        }
                        None => EdgeToShard::Ping(token),
                    },
                    Beat::Dead(end) => return self.lost(end).await,
                    Beat::Wait(until) => tokio::select! {
                        biased;
                        () = self.outside.wait(until) => continue,
                        message = self.outgoing.recv() => match message {
                            Some(message) => message,
                            None => return,
                        },
                    },
                    Beat::Rebind(_) => continue,
                },
            };
            if matches!(message, EdgeToShard::Bye { .. }) {
                self.mood = Mood::Leaving;
            }
            match message.encode() {
                Ok(frame) => match self.write(frame).await {
                    Ok(()) => {}
                    Err(Some(end)) => return self.lost(end).await,
                    // Why is told by the reading half.
                    Err(None) => return,
                },
                Err(error) => warn!(%error, "a message that is too long was not sent"),
            }
        }
    }

    /// Writes one frame. The pulse is felt while the link takes nothing, as it does with a shard that died under load.
    async fn write(&mut self, frame: Bytes) -> Result<(), Option<LinkEnd>> {
        let Self { send, heart, outside, mood, .. } = self;
        let mood = if *mood == Mood::Leaving { Mood::Leaving } else { Mood::Blocked };
        let deadline = Instant::now() + WRITE;
        tokio::select! {
            biased;
            result = send.write_one(frame) => result.map_err(|_| None),
            () = sleep_until(deadline) => {
                let why = format!("the link has taken nothing for {} s", WRITE.as_secs());
                Err(Some(LinkEnd::new(EndCause::TimedOut, why)))
            }
            end = felt(heart, outside, mood) => Err(Some(end)),
        }
    }

    async fn lost(&self, end: LinkEnd) {
        let _ = self.events.send(Event::Lost(end.clone())).await;
        self.heart.link.close(CloseCode::Done, &end.detail);
    }
}

/// Feels the pulse until there is none. Cancel-safe.
async fn felt(heart: &Heart, outside: &mut Outside, mood: Mood) -> LinkEnd {
    loop {
        match heart.beat(mood) {
            Beat::Dead(end) => return end,
            Beat::Wait(until) => outside.wait(until).await,
            Beat::Ping(_) | Beat::Rebind(_) => {}
        }
    }
}
