//! A link: one long connection between two members of the mesh, with many streams in it.
//!
//! The rest of the mesh sees [`Link`], [`Stream`] and their errors; what carries them stays in here. Today that is QUIC
//! ([`quic`]).
//!
//! An end is never silent: a stream that is dropped without [`SendHalf::finish`] is reset, a link that breaks is an
//! error on every stream in it, and neither can be mistaken for a clean end.

use std::{
    io as std_io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::code::{CloseCode, ResetCode};
use quinn::{VarInt, crypto::rustls::HandshakeData};
use tokio::sync::watch;

use crate::cert::CertFacts;

pub mod congestion;
pub mod end;
pub mod io;
pub mod quic;
mod socket;

pub use end::{EndCause, LinkEnd};
pub use socket::Signs;
use socket::{ConnectedSocket, SignSender};

/// A connection to another member. Clones are the same connection; it is closed by [`Link::close`], or when the last
/// clone and the last stream are dropped.
#[derive(Clone, Debug)]
pub struct Link {
    connection: quinn::Connection,
    peer: Arc<CertFacts>,
    pressure: Arc<Pressure>,
    own: Option<Own>,
}

/// The endpoint of a link that shares it with nobody.
#[derive(Clone, Debug)]
struct Own {
    endpoint: quinn::Endpoint,
    socket: Arc<ConnectedSocket>,
    signs: SignSender,
}

impl Link {
    fn new(connection: quinn::Connection, peer: Arc<CertFacts>, room: usize, own: Option<Own>) -> Self {
        Self { connection, peer, pressure: Arc::new(Pressure { room, stalled: AtomicUsize::new(0) }), own }
    }

    /// What the network says about the other side, now and when it changes. `None` if the link shares its socket with
    /// others, as every link does that was accepted.
    #[must_use]
    pub fn signs(&self) -> Option<watch::Receiver<Signs>> {
        self.own.as_ref().map(|own| own.signs.subscribe())
    }

    /// Goes on from a new UDP socket: a NAT that has forgotten the link makes a new mapping for it, and an address of
    /// this host that has changed is the new one. Streams go on. Returns whether it did: a link that shares its socket
    /// with others stays on it.
    ///
    /// # Errors
    /// If there is no way to the other side; then nothing has changed.
    pub fn rebind(&self) -> std_io::Result<bool> {
        let Some(own) = &self.own else { return Ok(false) };
        own.socket.replace()?;
        Ok(true)
    }

    /// Who is on the other side, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &CertFacts {
        &self.peer
    }

    /// Where the other side is now; changes when it roams. An IPv4 address is never dressed up as IPv6.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        let address = self.connection.remote_address();
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    /// The protocol that both sides agreed on (ALPN). `None` if they agreed on none.
    #[must_use]
    pub fn alpn(&self) -> Option<Vec<u8>> {
        let data = self.connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
        data.protocol
    }

    /// The estimated round trip.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Opens a stream. The peer sees it with the first bytes. Waits while the peer allows no more streams; cancel-safe.
    ///
    /// # Errors
    /// If the link has ended.
    pub async fn open(&self) -> Result<Stream, LinkEnd> {
        let (send, recv) = self.connection.open_bi().await.map_err(|e| LinkEnd::from_connection(&e))?;
        Ok(Stream::new(send, recv, Arc::clone(&self.pressure)))
    }

    /// The next stream that the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// If the link has ended.
    pub async fn accept(&self) -> Result<Stream, LinkEnd> {
        let (send, recv) = self.connection.accept_bi().await.map_err(|e| LinkEnd::from_connection(&e))?;
        Ok(Stream::new(send, recv, Arc::clone(&self.pressure)))
    }

    /// Bytes that a link between shards may hold which nobody has read: it carries the streams of many.
    pub const WIDE_WINDOW: u32 = 64 * 1024 * 1024;

    /// Lets the peer have this many streams open at once, with room for all of them: for links between shards.
    pub fn carry_many(&self, streams: u32) {
        self.connection.set_receive_window(Self::WIDE_WINDOW.into());
        self.connection.set_send_window(Self::WIDE_WINDOW.into());
        self.allow_streams(streams);
    }

    /// Lets the peer have this many streams open at once.
    pub fn allow_streams(&self, count: u32) {
        self.connection.set_max_concurrent_bi_streams(count.into());
    }

    /// Ends the link now; streams in it break. What was sent and not yet acknowledged may be lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.connection.close(code.number().into(), reason.as_bytes());
    }

    /// Waits for the end, and tells why.
    pub async fn ended(&self) -> LinkEnd {
        LinkEnd::from_connection(&self.connection.closed().await)
    }

    /// Why it ended; `None` while it lives.
    #[must_use]
    pub fn end(&self) -> Option<LinkEnd> {
        self.connection.close_reason().map(|e| LinkEnd::from_connection(&e))
    }

    /// What the congestion controller believes of the path; `None` if it has no model.
    #[must_use]
    pub fn path_model(&self) -> Option<congestion::PathModel> {
        congestion::path_model(&self.connection)
    }

    /// What the carrier counted.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        let stats = self.connection.stats();
        LinkStats {
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            sent_packets: stats.path.sent_packets,
            mtu: stats.path.current_mtu,
            window: stats.path.cwnd,
        }
    }
}

/// What the carrier counted over the life of a link.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkStats {
    /// On the wire, with everything.
    pub sent_bytes: u64,
    /// On the wire, with everything.
    pub received_bytes: u64,
    /// Packets taken for lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes of the largest packet that the path takes.
    pub mtu: u16,
    /// Congestion window in bytes.
    pub window: u64,
}

/// One flow inside a link.
#[derive(Debug)]
pub struct Stream {
    /// Towards the peer.
    pub send: SendHalf,
    /// From the peer.
    pub recv: RecvHalf,
}

impl Stream {
    fn new(send: quinn::SendStream, recv: quinn::RecvStream, pressure: Arc<Pressure>) -> Self {
        let recv = RecvHalf { inner: recv, head: Bytes::new(), ended: false, pressure };
        Self { send: SendHalf { inner: send, ended: false }, recv }
    }

    /// Breaks both directions.
    pub fn abort(mut self, code: ResetCode) {
        self.send.reset(code);
        self.recv.stop(code);
    }
}

/// A stream broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The peer reset it, or does not want to read on.
    #[error("the stream was reset: {0}")]
    Reset(ResetCode),
    /// The link ended under it.
    #[error("the link ended: {0}")]
    Link(LinkEnd),
    /// It was ended here before.
    #[error("the stream had been ended")]
    Ended,
}

impl StreamError {
    /// What to tell the next one on the way.
    #[must_use]
    pub const fn reset_code(&self) -> ResetCode {
        match self {
            Self::Reset(code) => *code,
            Self::Link(_) | Self::Ended => ResetCode::LinkLost,
        }
    }

    fn reset(code: VarInt) -> Self {
        let number = u32::try_from(code.into_inner()).unwrap_or(0);
        Self::Reset(ResetCode::from_number(number).unwrap_or(ResetCode::PeerReset))
    }
}

/// The sending half of a stream. Dropping it without [`SendHalf::finish`] resets the stream.
#[derive(Debug)]
pub struct SendHalf {
    inner: quinn::SendStream,
    ended: bool,
}

impl SendHalf {
    /// Sends all chunks without copying; waits while the peer's window or ours is full. Not cancel-safe: what was sent
    /// is gone from `chunks`, the rest is still there.
    ///
    /// # Errors
    /// If the peer no longer reads, or the link ended.
    pub async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        Ok(self.inner.write_all_chunks(chunks).await?)
    }

    /// Sends one chunk.
    ///
    /// # Errors
    /// As [`SendHalf::write`].
    pub async fn write_one(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        Ok(self.inner.write_chunk(chunk).await?)
    }

    /// Sends what is written here before what is written on other streams of the link, however many there are.
    pub fn go_first(&self) {
        // An error means that it has ended.
        let _ = self.inner.set_priority(i32::MAX);
    }

    /// Ends this direction cleanly: the peer reads everything and then the end.
    pub fn finish(&mut self) {
        self.ended = true;
        // An error means that the peer stopped reading or that the link ended: `delivered` tells.
        let _ = self.inner.finish();
    }

    /// Breaks this direction: the peer sees an error.
    pub fn reset(&mut self, code: ResetCode) {
        self.ended = true;
        // An error means that it had ended before.
        let _ = self.inner.reset(code.number().into());
    }

    /// Waits until the peer has acknowledged everything up to the end.
    ///
    /// # Errors
    /// If the peer stopped reading, or the link ended before.
    pub async fn delivered(&self) -> Result<(), StreamError> {
        match self.inner.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(StreamError::reset(code)),
            Err(quinn::StoppedError::ConnectionLost(e)) => Err(StreamError::Link(LinkEnd::from_connection(&e))),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Ended),
        }
    }

    /// Waits until the peer says that it will not read on, and returns its reason; also returns when the link ends.
    /// Never returns while the peer reads. The future holds no borrow of the half.
    pub fn refused(&self) -> impl Future<Output = StreamError> + Send + 'static {
        let stopped = self.inner.stopped();
        async move {
            match stopped.await {
                Ok(Some(code)) => StreamError::reset(code),
                Ok(None) => std::future::pending().await,
                Err(quinn::StoppedError::ConnectionLost(e)) => StreamError::Link(LinkEnd::from_connection(&e)),
                Err(quinn::StoppedError::ZeroRttRejected) => StreamError::Ended,
            }
        }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        // quinn would send a clean end here, which the peer could not tell from a real one.
        if !self.ended {
            self.reset(ResetCode::Cancelled);
        }
    }
}

/// The receiving half of a stream. Dropping it before its end tells the peer to stop.
#[derive(Debug)]
pub struct RecvHalf {
    inner: quinn::RecvStream,
    head: Bytes,
    ended: bool,
    pressure: Arc<Pressure>,
}

/// How many streams of a link are read by nobody. Each of them may hold a whole stream window of the link's, and once
/// they hold most of it, the streams that are read wait for room as well.
#[derive(Debug)]
pub struct Pressure {
    /// Stalled streams that leave enough room for the others.
    room: usize,
    stalled: AtomicUsize,
}

/// Counts a stream as stalled, until dropped.
#[derive(Debug)]
pub struct Stalled(Arc<Pressure>);

impl Stalled {
    /// Whether so many streams are stalled that the others suffer.
    #[must_use]
    pub fn others_suffer(&self) -> bool {
        self.0.stalled.load(Ordering::Relaxed) > self.0.room
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        self.0.stalled.fetch_sub(1, Ordering::Relaxed);
    }
}

impl RecvHalf {
    /// Notes that what came in cannot be passed on for now.
    #[must_use]
    pub fn stalled(&self) -> Stalled {
        self.pressure.stalled.fetch_add(1, Ordering::Relaxed);
        Stalled(Arc::clone(&self.pressure))
    }

    /// The next bytes, at most `max`; `None` at the clean end. Cancel-safe.
    ///
    /// # Errors
    /// If the peer reset the stream, or the link ended.
    pub async fn chunk(&mut self, max: usize) -> Result<Option<Bytes>, StreamError> {
        if !self.head.is_empty() {
            return Ok(Some(self.head.split_to(max.min(self.head.len()))));
        }
        match self.inner.read_chunk(max, true).await {
            Ok(Some(chunk)) => Ok(Some(chunk.bytes)),
            Ok(None) => {
                self.ended = true;
                Ok(None)
            }
            Err(e) => Err(self.broke(e)),
        }
    }

    /// The next bytes in as many pieces as there are and fit, without copying; `None` at the clean end. Cancel-safe.
    ///
    /// # Errors
    /// If the peer reset the stream, or the link ended.
    pub async fn chunks(&mut self, out: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        if let (false, Some(first)) = (self.head.is_empty(), out.first_mut()) {
            *first = std::mem::take(&mut self.head);
            return Ok(Some(1));
        }
        match self.inner.read_chunks(out).await {
            Ok(Some(count)) => Ok(Some(count)),
            Ok(None) => {
                self.ended = true;
                Ok(None)
            }
            Err(e) => Err(self.broke(e)),
        }
    }

    /// Puts bytes back in front, as a frame reader does with what it read too much.
    pub fn unread(&mut self, bytes: Bytes) {
        self.head = if self.head.is_empty() { bytes } else { Bytes::from([&bytes[..], &self.head[..]].concat()) };
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: ResetCode) {
        if !self.ended {
            self.ended = true;
            // An error means that it had ended before.
            let _ = self.inner.stop(code.number().into());
        }
    }

    fn broke(&mut self, error: quinn::ReadError) -> StreamError {
        self.ended = true;
        match error {
            quinn::ReadError::Reset(code) => StreamError::reset(code),
            quinn::ReadError::ConnectionLost(e) => StreamError::Link(LinkEnd::from_connection(&e)),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => StreamError::Ended,
        }
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        self.stop(ResetCode::Cancelled);
    }
}

impl From<quinn::WriteError> for StreamError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::reset(code),
            quinn::WriteError::ConnectionLost(e) => Self::Link(LinkEnd::from_connection(&e)),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => Self::Ended,
        }
    }
}
