//! One flow inside a link, and how it breaks.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use proto::code::ResetCode;
use quinn::VarInt;
use tokio::io::ReadBuf;

use super::{
    LinkEnd,
    datagrams::{Datagrams, Place},
    priority::{QuicSender, Room},
    tcp::{Receiver, Sender},
};

/// One flow inside a link.
#[derive(Debug)]
pub struct Stream {
    /// Towards the peer.
    pub send: SendHalf,
    /// From the peer.
    pub recv: RecvHalf,
}

impl Stream {
    pub(super) fn over_quic(
        (send, recv): (quinn::SendStream, quinn::RecvStream),
        room: &Arc<Room>,
        state: Arc<LinkState>,
    ) -> Self {
        Self::new(SendWay::Quic(QuicSender::new(send, Arc::clone(room))), RecvWay::Quic(recv), state)
    }

    pub(super) fn over_tcp((send, recv): (Sender, Receiver), state: Arc<LinkState>) -> Self {
        Self::new(SendWay::Tcp(send), RecvWay::Tcp(recv), state)
    }

    const fn new(send: SendWay, recv: RecvWay, state: Arc<LinkState>) -> Self {
        let recv = RecvHalf { way: recv, head: Bytes::new(), ended: false, state };
        Self { send: SendHalf { way: send, ended: false }, recv }
    }

    /// Where datagrams of the flow go that this stream stands for, besides the stream itself; `None` if they all go in it.
    pub(crate) fn place(&self) -> Option<Place> {
        let SendWay::Quic(send) = &self.send.way else { return None };
        let datagrams = self.recv.state.datagrams.as_ref()?;
        Some(Datagrams::place(datagrams, send.stream.id().into()))
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
    way: SendWay,
    ended: bool,
}

#[derive(Debug)]
enum SendWay {
    Quic(QuicSender),
    Tcp(Sender),
}

impl SendHalf {
    /// Sends all chunks without copying; waits while the peer's window or ours is full. Not cancel-safe: what was sent
    /// is gone from `chunks`, the rest is still there.
    ///
    /// # Errors
    /// If the peer no longer reads, or the link ended.
    pub async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        match &mut self.way {
            SendWay::Quic(send) => Ok(send.write(chunks).await?),
            SendWay::Tcp(send) => send.write(chunks).await,
        }
    }

    /// Sends one chunk.
    ///
    /// # Errors
    /// As [`SendHalf::write`].
    pub async fn write_one(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        match &mut self.way {
            SendWay::Quic(send) => Ok(send.write(&mut [chunk]).await?),
            SendWay::Tcp(send) => send.write(&mut [chunk]).await,
        }
    }

    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, StreamError>> {
        match &mut self.way {
            SendWay::Quic(send) => {
                let sent = Pin::new(&mut send.stream).poll_write(cx, data).map_err(StreamError::from);
                if let Poll::Ready(Ok(bytes)) = sent {
                    send.weigh(bytes);
                }
                sent
            }
            SendWay::Tcp(send) => send.poll_write(cx, &mut Bytes::copy_from_slice(data)),
        }
    }

    /// Sends what is written here before what is written on other streams of the link, however many there are. Streams
    /// that say little go ahead of those that move much by themselves, and behind this.
    pub fn go_first(&mut self) {
        match &mut self.way {
            SendWay::Quic(send) => send.go_first(),
            SendWay::Tcp(send) => send.go_first(),
        }
    }

    /// Ends this direction cleanly: the peer reads everything and then the end.
    pub fn finish(&mut self) {
        self.ended = true;
        match &mut self.way {
            // An error means that the peer stopped reading or that the link ended: `delivered` tells.
            SendWay::Quic(send) => drop(send.stream.finish()),
            SendWay::Tcp(send) => send.finish(),
        }
    }

    pub(super) const fn has_ended(&self) -> bool {
        self.ended
    }

    /// Breaks this direction: the peer sees an error.
    pub fn reset(&mut self, code: ResetCode) {
        self.ended = true;
        match &mut self.way {
            // An error means that it had ended before.
            SendWay::Quic(send) => drop(send.stream.reset(code.number().into())),
            SendWay::Tcp(send) => send.reset(code),
        }
    }

    /// Waits until the peer has got everything up to the end.
    ///
    /// # Errors
    /// If the peer stopped reading, or the link ended before.
    pub async fn delivered(&self) -> Result<(), StreamError> {
        let send = match &self.way {
            SendWay::Quic(send) => &send.stream,
            SendWay::Tcp(send) => return send.delivered().await,
        };
        match send.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(StreamError::reset(code)),
            Err(quinn::StoppedError::ConnectionLost(e)) => Err(StreamError::Link(LinkEnd::from_connection(&e))),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Ended),
        }
    }

    /// Waits until the peer says that it will not read on, and returns its reason; also returns when the link ends.
    /// Never returns while the peer reads. The future holds no borrow of the half.
    pub fn refused(&self) -> impl Future<Output = StreamError> + Send + 'static + use<> {
        let (quic, tcp) = match &self.way {
            SendWay::Quic(send) => (Some(send.stream.stopped()), None),
            SendWay::Tcp(send) => (None, Some(send.refused())),
        };
        async move {
            if let Some(refused) = tcp {
                return refused.await;
            }
            let Some(stopped) = quic else { return std::future::pending().await };
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
    way: RecvWay,
    head: Bytes,
    ended: bool,
    state: Arc<LinkState>,
}

#[derive(Debug)]
enum RecvWay {
    Quic(quinn::RecvStream),
    Tcp(Receiver),
}

/// What the streams of a link share.
#[derive(Debug)]
pub(super) struct LinkState {
    /// Stalled streams that leave enough room for the others. Each may hold a whole stream window of the link's, and
    /// once they hold most of it, the streams that are read wait for room as well.
    room: usize,
    /// Streams that are read by nobody.
    stalled: AtomicUsize,
    /// Where datagrams go that do not travel in streams; `None` if the carrier or the peer has no such thing.
    datagrams: Option<Arc<Datagrams>>,
}

impl LinkState {
    pub(super) const fn new(room: usize, datagrams: Option<Arc<Datagrams>>) -> Self {
        Self { room, stalled: AtomicUsize::new(0), datagrams }
    }

    pub(super) const fn has_datagrams(&self) -> bool {
        self.datagrams.is_some()
    }
}

/// Counts a stream as stalled, until dropped.
#[derive(Debug)]
pub struct Stalled(Arc<LinkState>);

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
        self.state.stalled.fetch_add(1, Ordering::Relaxed);
        Stalled(Arc::clone(&self.state))
    }

    /// The next bytes, at most `max`; `None` at the clean end. Cancel-safe.
    ///
    /// # Errors
    /// If the peer reset the stream, or the link ended.
    pub async fn chunk(&mut self, max: usize) -> Result<Option<Bytes>, StreamError> {
        if !self.head.is_empty() {
            return Ok(Some(self.head.split_to(max.min(self.head.len()))));
        }
        let result = match &mut self.way {
            RecvWay::Quic(recv) => {
                let read = recv.read_chunk(max, true).await;
                read.map(|chunk| chunk.map(|chunk| chunk.bytes)).map_err(StreamError::from)
            }
            RecvWay::Tcp(recv) => recv.chunk(max).await,
        };
        self.note(result)
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
        let result = match &mut self.way {
            RecvWay::Quic(recv) => recv.read_chunks(out).await.map_err(StreamError::from),
            RecvWay::Tcp(recv) => recv.chunks(out).await,
        };
        self.note(result)
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<Result<(), StreamError>> {
        if !self.head.is_empty() || out.remaining() == 0 {
            let length = out.remaining().min(self.head.len());
            out.put_slice(&self.head.split_to(length));
            return Poll::Ready(Ok(()));
        }
        let before = out.filled().len();
        let result = match &mut self.way {
            RecvWay::Quic(recv) => ready!(recv.poll_read_buf(cx, out)).map_err(StreamError::from),
            RecvWay::Tcp(recv) => ready!(recv.poll_take(cx, out.remaining())).map(|bytes| {
                out.put_slice(&bytes.unwrap_or_default());
            }),
        };
        self.ended |= result.is_err() || out.filled().len() == before;
        Poll::Ready(result)
    }

    fn note<T>(&mut self, result: Result<Option<T>, StreamError>) -> Result<Option<T>, StreamError> {
        self.ended |= !matches!(result, Ok(Some(_)));
        result
    }

    /// Puts bytes back in front, as a frame reader does with what it read too much.
    pub fn unread(&mut self, bytes: Bytes) {
        self.head = if self.head.is_empty() { bytes } else { Bytes::from([&bytes[..], &self.head[..]].concat()) };
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: ResetCode) {
        if !self.ended {
            self.ended = true;
            match &mut self.way {
                // An error means that it had ended before.
                RecvWay::Quic(recv) => drop(recv.stop(code.number().into())),
                RecvWay::Tcp(recv) => recv.stop(code),
            }
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

impl From<quinn::ReadError> for StreamError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::reset(code),
            quinn::ReadError::ConnectionLost(e) => Self::Link(LinkEnd::from_connection(&e)),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => Self::Ended,
        }
    }
}
