//! A stream of a link as an end of a flow.

use std::{collections::VecDeque, future::pending, sync::Arc};

use bytes::{Bytes, BytesMut};
use proto::{code::ResetCode, datagram};

use super::{PacketSink, PacketSource, Side};
use crate::{
    link::{
        RecvHalf, SendHalf, Stream,
        datagrams::{Place, Sent},
    },
    splice::Broken,
};

/// Bytes that are read from a stream at once.
const READ: usize = 64 * 1024;
/// Datagrams that wait for room in a stream, and their bytes. When there are more, the oldest is dropped.
const WAITING: (usize, usize) = (512, 256 * 1024);
/// Datagrams that are written to a stream at once.
const BATCH: usize = 32;
/// Datagrams that are taken in a row before the stream is looked at.
const IN_A_ROW: u32 = 32;

/// Makes an end of a stream. Until [`PacketSink::opened`] its datagrams go in the stream, behind the `Open`.
#[must_use]
pub fn side(stream: Stream) -> Side<StreamSource, StreamSink> {
    let place = stream.place().map(Arc::new);
    let Stream { send, recv } = stream;
    let source = StreamSource { recv, place: place.clone(), buffer: BytesMut::new(), ended: false, row: 0 };
    let sink =
        StreamSink { send, place, opened: false, waiting: VecDeque::new(), bytes: 0, current: Vec::new(), dropped: 0 };
    Side { source, sink }
}

/// The datagrams that come.
#[derive(Debug)]
pub struct StreamSource {
    recv: RecvHalf,
    place: Option<Arc<Place>>,
    buffer: BytesMut,
    ended: bool,
    row: u32,
}

impl StreamSource {
    /// The stream itself, for the frames at its head.
    pub const fn recv(&mut self) -> &mut RecvHalf {
        &mut self.recv
    }

    fn waiting(&self) -> Option<Bytes> {
        self.place.as_ref()?.queue().try_next()
    }
}

impl PacketSource for StreamSource {
    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let broken = |e: proto::frame::FrameError| Broken {
                code: ResetCode::ProtocolError,
                detail: format!("what came is no datagram: {e}"),
            };
            if let Some(payload) = datagram::take(&mut self.buffer).map_err(broken)? {
                return Ok(Some(payload));
            }
            if self.ended || self.row < IN_A_ROW {
                self.row += 1;
                if let Some(payload) = self.waiting() {
                    return Ok(Some(payload));
                }
                if self.ended {
                    return Ok(None);
                }
            }
            self.row = 0;
            let by_itself = async {
                match &self.place {
                    Some(place) => place.queue().next().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                chunk = self.recv.chunk(READ) => match chunk? {
                    Some(chunk) => self.buffer.extend_from_slice(&chunk),
                    None => self.ended = true,
                },
                payload = by_itself => return Ok(payload),
            }
        }
    }

    async fn ended(&mut self) {
        while !self.ended && matches!(self.recv.chunk(READ).await, Ok(Some(_))) {}
        self.ended = true;
    }

    fn stop(&mut self, code: ResetCode) {
        self.recv.stop(code);
    }

    fn dropped(&self) -> u64 {
        self.place.as_ref().map_or(0, |place| place.queue().dropped())
    }
}

/// Where datagrams go.
#[derive(Debug)]
pub struct StreamSink {
    send: SendHalf,
    place: Option<Arc<Place>>,
    opened: bool,
    waiting: VecDeque<Bytes>,
    bytes: usize,
    /// What is being written.
    current: Vec<Bytes>,
    dropped: u64,
}

impl StreamSink {
    fn keep(&mut self, payload: &[u8]) {
        while self.waiting.len() >= WAITING.0 || self.bytes + payload.len() > WAITING.1 {
            let Some(oldest) = self.waiting.pop_front() else { break };
            self.bytes -= oldest.len();
            self.dropped += 1;
        }
        let frame = datagram::framed(payload);
        self.bytes += frame.len();
        self.waiting.push_back(frame);
    }

    /// Writes what waits. Cancel-safe: the carrier leaves in `current` what it has not taken.
    async fn write(&mut self) -> Result<bool, Broken> {
        if self.current.iter().all(Bytes::is_empty) {
            let batch = self.waiting.len().min(BATCH);
            self.current.clear();
            self.current.extend(self.waiting.drain(..batch));
            self.bytes -= self.current.iter().map(Bytes::len).sum::<usize>();
        }
        if self.current.is_empty() {
            return Ok(false);
        }
        self.send.write(&mut self.current).await?;
        self.current.clear();
        Ok(true)
    }
}

impl PacketSink for StreamSink {
    fn put(&mut self, payload: Bytes) {
        let Some(place) = self.place.as_ref().filter(|_| self.opened) else { return self.keep(&payload) };
        match place.send(&payload) {
            Sent::Yes => {}
            Sent::TooLong => self.keep(&payload),
            Sent::Dropped => self.dropped += 1,
        }
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        if !self.write().await? {
            pending::<()>().await;
        }
        Ok(())
    }

    async fn finish(&mut self) {
        while self.write().await.is_ok_and(|more| more) {}
        self.send.finish();
        // Only a link that ended keeps it from arriving.
        let _ = self.send.delivered().await;
    }

    fn abort(&mut self, code: ResetCode) {
        self.send.reset(code);
    }

    async fn answer(&mut self, frame: Bytes) -> Result<(), Broken> {
        // Nothing has been put in here before the answer.
        Ok(self.send.write_one(frame).await?)
    }

    fn opened(&mut self) {
        self.opened = true;
    }

    fn dropped(&self) -> u64 {
        self.dropped
    }
}
