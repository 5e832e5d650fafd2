//! Whole frames from a stream, and onto it.

use bytes::{Bytes, BytesMut};
use proto::frame::{self, FrameError};

use crate::link::{RecvHalf, StreamError};

/// A frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The peer sent what is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream ended inside a frame.
    #[error("the stream ended in the middle of a frame")]
    Truncated,
}

/// Reads frames from the receiving half of a stream.
#[derive(Debug)]
pub struct FrameReader {
    buffer: BytesMut,
    max: usize,
}

impl FrameReader {
    /// A reader of frames of at most `max` bytes.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { buffer: BytesMut::new(), max }
    }

    /// The next frame's body; `None` at a clean end between two frames. Cancel-safe: what was read stays
    /// in the buffer.
    ///
    /// # Errors
    /// If the stream breaks, or its bytes are no frame.
    pub async fn next(&mut self, recv: &mut RecvHalf) -> Result<Option<Bytes>, ReadFrameError> {
        loop {
            if let Some(body) = frame::take(&mut self.buffer, self.max)? {
                return Ok(Some(body));
            }
            match recv.chunk(frame::HEADER + self.max).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ReadFrameError::Truncated),
            }
        }
    }

    /// What was read beyond the last frame; the bytes of a data stream begin there.
    #[must_use]
    pub fn into_rest(self) -> Bytes {
        self.buffer.freeze()
    }
}
