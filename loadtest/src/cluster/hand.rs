//! An edge of another version, written by hand: it speaks the wire as bytes and has nothing of `mesh_edge`, so that what
//! it says can be older or newer than what this build says.
//!
//! It does what every edge did from the first version on: dial, say Hello, follow redirects, ping, echo, and dial the next
//! shard before it leaves the one that sends it away.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::{
    code::{CloseCode, ResetCode},
    frame::{HEADER, MAX_SHARD_TO_EDGE, MAX_STREAM_HEAD},
    id::EdgeId,
    message::{Candidate, ShardToEdge},
    stream::{Answer, Open},
};
use runtime::{
    clock,
    frames::FrameReader,
    link::{Link, Stream, quic::Dialer},
    shutdown::Tasks,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

/// How long anything may take that a shard is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Silence after which a tunnel is given up.
const SILENCE: Duration = Duration::from_secs(12);
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(2);
/// How often a redirect is followed.
const REDIRECTS: usize = 3;
/// How long streams have when the edge stops.
const DRAIN: Duration = Duration::from_secs(5);

/// Of the software of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// That of this build: the real thing.
    This,
    /// The one before: its Hello does not say which shards it avoids.
    Before,
    /// One to come: with fields, messages and kinds that nobody here knows.
    After,
}

/// Such an edge, while it runs.
#[derive(Clone, Debug)]
pub struct HandEdge(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: EdgeId,
    version: Version,
    instance: u64,
    /// How far its clock is from that of the others, in milliseconds.
    skew: i64,
    dialer: Dialer,
    tunnels: AtomicUsize,
    epoch: AtomicU64,
    tasks: Tasks,
}

/// A tunnel that serves.
#[derive(Debug)]
struct Tunnel {
    link: Link,
    control: Stream,
    reader: FrameReader,
    ping: Duration,
    streams: Arc<AtomicUsize>,
}

/// Why a tunnel needs its edge.
enum News {
    /// To go somewhere else.
    Leave(Vec<SocketAddr>),
    /// It has ended.
    Over,
}

impl HandEdge {
    /// Starts one.
    pub(super) fn start(
        (name, version): (&EdgeId, Version),
        dialer: Dialer,
        shards: Vec<SocketAddr>,
        (instance, skew): (u64, i64),
        tasks: &Tasks,
    ) -> Self {
        let edge = Self(Arc::new(Inner {
            name: name.clone(),
            version,
            instance,
            skew,
            dialer,
            tunnels: AtomicUsize::new(0),
            epoch: AtomicU64::new(0),
            tasks: tasks.clone(),
        }));
        tasks.spawn(edge.clone().live(shards));
        edge
    }

    /// Whether a tunnel serves, as the edge sees it.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.0.tunnels.load(Ordering::Relaxed) > 0
    }

    async fn live(self, shards: Vec<SocketAddr>) {
        let stop = self.0.tasks.token();
        for first in shards.iter().cycle() {
            let tunnel = stop.run_until_cancelled(self.reach(*first)).await;
            match tunnel {
                Some(Some(tunnel)) => self.serve(tunnel).await,
                Some(None) => {}
                None => return,
            }
            if stop.run_until_cancelled(sleep(PAUSE)).await.is_none() {
                return;
            }
        }
    }

    /// Dials, and follows whoever redirects.
    async fn reach(&self, first: SocketAddr) -> Option<Tunnel> {
        let mut to = vec![first];
        for _ in 0..=REDIRECTS {
            let mut reached = None;
            for address in std::mem::take(&mut to) {
                if let Ok(link) = self.0.dialer.dial(address, "shard").await {
                    reached = Some(link);
                    break;
                }
            }
            let link = reached?;
            match timeout(PATIENCE, self.greet(&link)).await.ok().flatten()? {
                Ok(tunnel) => return Some(tunnel),
                Err(other) => to = other,
            }
            link.close(CloseCode::Redirected, "");
        }
        None
    }

    /// Says Hello. Returns the tunnel, or where to go instead.
    async fn greet(&self, link: &Link) -> Option<Result<Tunnel, Vec<SocketAddr>>> {
        let mut control = link.open().await.ok()?;
        control.send.write_one(self.hello()).await.ok()?;
        let mut reader = FrameReader::new(MAX_SHARD_TO_EDGE);
        loop {
            let body = reader.next(&mut control.recv).await.ok()??;
            match ShardToEdge::decode(body).ok()? {
                Some(ShardToEdge::Welcome(welcome)) => {
                    self.0.epoch.fetch_max(welcome.epoch, Ordering::Relaxed);
                    control.send.write_one(self.announce()).await.ok()?;
                    let (link, streams) = (link.clone(), Arc::default());
                    let ping = welcome.ping;
                    self.0.tasks.spawn(self.clone().echo_all(link.clone(), Arc::clone(&streams)));
                    return Some(Ok(Tunnel { link, control, reader, ping, streams }));
                }
                Some(ShardToEdge::Redirect { to, epoch }) => {
                    self.0.epoch.fetch_max(epoch, Ordering::Relaxed);
                    return Some(Err(addresses(&[to])));
                }
                Some(
                    ShardToEdge::Move { .. }
                    | ShardToEdge::Drain { .. }
                    | ShardToEdge::Renewed(_)
                    | ShardToEdge::Refuse(_)
                    | ShardToEdge::Pong(_),
                ) => return None,
                None => {}
            }
        }
    }

    /// Serves until there is no tunnel any more, or the edge is to stop.
    async fn serve(&self, mut tunnel: Tunnel) {
        self.0.tunnels.fetch_add(1, Ordering::Relaxed);
        let stop = self.0.tasks.token();
        loop {
            match stop.run_until_cancelled(tunnel.talk(self)).await {
                Some(News::Leave(to)) => {
                    let found = tokio::select! {
                        biased;
                        () = stop.cancelled() => None,
                        found = self.reach_any(to) => found,
                        () = tunnel.keep(self) => None,
                    };
                    if let Some(next) = found {
                        let old = std::mem::replace(&mut tunnel, next);
                        self.0.tasks.spawn(old.leave(Duration::from_secs(60)));
                    }
                }
                Some(News::Over) => break,
                None => {
                    tunnel.leave(DRAIN).await;
                    self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
        tunnel.link.close(CloseCode::Done, "");
    }

    async fn reach_any(&self, to: Vec<SocketAddr>) -> Option<Tunnel> {
        for address in to {
            if let Some(tunnel) = self.reach(address).await {
                return Some(tunnel);
            }
        }
        None
    }

    async fn echo_all(self, link: Link, streams: Arc<AtomicUsize>) {
        while let Ok(stream) = link.accept().await {
            let (edge, streams) = (self.clone(), Arc::clone(&streams));
            streams.fetch_add(1, Ordering::Relaxed);
            self.0.tasks.spawn(async move {
                edge.echo(stream).await;
                streams.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    /// Answers an Open and sends back what comes.
    async fn echo(&self, mut stream: Stream) -> Option<()> {
        let mut reader = FrameReader::new(MAX_STREAM_HEAD);
        let body = reader.next(&mut stream.recv).await.ok()??;
        if Open::decode(body).is_err() {
            stream.abort(ResetCode::ProtocolError);
            return None;
        }
        stream.recv.unread(reader.into_rest());
        let opened = Answer::Opened { edge: self.0.name.clone(), address: "echo".into() }.encode();
        let mut body = Message(opened.slice(HEADER..).to_vec());
        if self.0.version == Version::After {
            body = body.text(50, "a field of a version to come");
        }
        stream.send.write_one(body.frame()).await.ok()?;
        while let Some(chunk) = stream.recv.chunk(16 * 1024).await.ok()? {
            stream.send.write_one(chunk).await.ok()?;
        }
        stream.send.finish();
        // Until it has arrived, or the link has ended.
        let _ = stream.send.delivered().await;
        Some(())
    }

    fn hello(&self) -> Bytes {
        let unix_ms = clock::unix_millis().saturating_add_signed(self.0.skew);
        let mut hello = Message::default()
            .text(1, self.0.name.as_str())
            .fixed(2, self.0.instance)
            .text(3, "by hand")
            .number(4, unix_ms)
            .number(5, self.0.epoch.load(Ordering::Relaxed));
        if self.0.version == Version::After {
            hello = hello.text(6, "shard-that-is-not").text(60, "news").number(61, 7).fixed(62, 1);
        }
        let message = Message::default().bytes(1, &hello.0);
        match self.0.version {
            Version::This | Version::Before => message.frame(),
            // A message of a version to come follows at once.
            Version::After => [message.frame(), newer()].concat().into(),
        }
    }

    fn announce(&self) -> Bytes {
        let service = Message::default().text(1, "by-hand").number(3, 9000);
        let (service, more) = match self.0.version {
            Version::This | Version::Before => (service.number(2, 1), Bytes::new()),
            // Of a kind that is not known here.
            Version::After => (service.number(2, 99).text(20, "a field of a version to come"), newer()),
        };
        let announce = Message::default().bytes(1, &service.0);
        [Message::default().bytes(2, &announce.0).frame(), more].concat().into()
    }
}

impl Tunnel {
    /// Pings until there are news.
    async fn talk(&mut self, edge: &HandEdge) -> News {
        let mut ticks = interval(self.ping.max(Duration::from_millis(100)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut token) = (Instant::now(), 0);
        loop {
            let body = tokio::select! {
                biased;
                body = self.reader.next(&mut self.control.recv) => body,
                () = sleep_until(heard + SILENCE) => return News::Over,
                _ = ticks.tick() => {
                    token += 1;
                    if self.ping(edge, token).await.is_none() {
                        return News::Over;
                    }
                    continue;
                }
            };
            heard = Instant::now();
            let Ok(Some(body)) = body else { return News::Over };
            match ShardToEdge::decode(body) {
                Ok(Some(ShardToEdge::Move { to, .. })) => return News::Leave(addresses(&[to])),
                Ok(Some(ShardToEdge::Drain { candidates, .. })) => return News::Leave(addresses(&candidates)),
                Ok(Some(ShardToEdge::Pong(_) | ShardToEdge::Renewed(_)) | None) => {}
                Ok(Some(ShardToEdge::Welcome(_) | ShardToEdge::Redirect { .. } | ShardToEdge::Refuse(_))) | Err(_) => {
                    return News::Over;
                }
            }
        }
    }

    /// Pings, whatever the shard says, until the tunnel ends.
    async fn keep(&mut self, edge: &HandEdge) {
        while matches!(self.talk(edge).await, News::Leave(_)) {}
    }

    async fn ping(&mut self, edge: &HandEdge, token: u64) -> Option<()> {
        let ping = Message::default().bytes(3, &Message::default().fixed(1, token).0).frame();
        let more = if edge.0.version == Version::After { newer() } else { Bytes::new() };
        let sent = self.control.send.write_one([ping, more].concat().into());
        timeout(PATIENCE, sent).await.ok()?.ok()
    }

    /// Says Bye, lets streams end, and closes the link.
    async fn leave(mut self, time: Duration) {
        let bye = Message::default().bytes(5, &Message::default().text(1, "moved").0).frame();
        let said = timeout(PATIENCE, self.control.send.write_one(bye)).await;
        let until = Instant::now() + time;
        while said.is_ok()
            && self.streams.load(Ordering::Relaxed) > 0
            && self.link.end().is_none()
            && Instant::now() < until
        {
            sleep(Duration::from_millis(50)).await;
        }
        self.link.close(CloseCode::Done, "");
    }
}

fn addresses(candidates: &[Candidate]) -> Vec<SocketAddr> {
    candidates.iter().flat_map(|c| &c.addresses).filter_map(|a| a.parse().ok()).collect()
}

/// A message of a version to come, as a frame.
#[must_use]
pub fn newer() -> Bytes {
    Message::default().bytes(77, &Message::default().text(1, "what nobody here knows").number(2, 3).0).frame()
}

/// A protobuf message, field by field (<https://protobuf.dev/programming-guides/encoding/>).
#[derive(Clone, Debug, Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    fn varint(mut self, mut value: u64) -> Self {
        loop {
            let low = (value & 0x7f) as u8;
            value >>= 7;
            if value == 0 {
                self.0.push(low);
                return self;
            }
            self.0.push(low | 0x80);
        }
    }

    /// A whole number.
    #[must_use]
    pub fn number(self, field: u64, value: u64) -> Self {
        self.varint(field << 3).varint(value)
    }

    /// A whole number in eight bytes.
    #[must_use]
    pub fn fixed(self, field: u64, value: u64) -> Self {
        let mut message = self.varint(field << 3 | 1);
        message.0.extend(value.to_le_bytes());
        message
    }

    /// Bytes, or another message.
    #[must_use]
    pub fn bytes(self, field: u64, value: &[u8]) -> Self {
        let mut message = self.varint(field << 3 | 2).varint(value.len() as u64);
        message.0.extend(value);
        message
    }

    /// A text.
    #[must_use]
    pub fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    /// With its length in front.
    #[must_use]
    pub fn frame(&self) -> Bytes {
        let mut frame = (self.0.len() as u32).to_be_bytes().to_vec();
        frame.extend(&self.0);
        frame.into()
    }
}

#[cfg(test)]
mod tests {
    use proto::message::EdgeToShard;

    use super::*;

    #[test]
    fn what_is_written_by_hand_is_read() {
        let ping = Message::default().bytes(3, &Message::default().fixed(1, 300).0);
        assert_eq!(EdgeToShard::decode(ping.0.into()), Ok(Some(EdgeToShard::Ping(300))));
        assert_eq!(EdgeToShard::decode(newer().slice(HEADER..)), Ok(None));
        assert_eq!(Message::default().number(1, 300).0, [8, 0xac, 2]);
    }
}
