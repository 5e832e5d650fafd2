//! Frames: a 32-bit big-endian length, then that many bytes of protobuf.
//!
//! A length beyond the cap is refused when its four bytes are read; nothing is ever allocated by a peer's word.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Cap of a frame from edge to shard on the control stream, in bytes.
pub const MAX_EDGE_TO_SHARD: usize = 64 * 1024;
/// Cap of a frame from shard to edge on the control stream, in bytes.
pub const MAX_SHARD_TO_EDGE: usize = 256 * 1024;
/// Cap of a frame on the control stream between shards, in bytes.
pub const MAX_SHARD_TO_SHARD: usize = 256 * 1024;
/// Cap of the frames at the head of a data stream, in bytes.
pub const MAX_STREAM_HEAD: usize = 4 * 1024;

/// Bytes of the length.
pub const HEADER: usize = 4;

/// A frame was not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than the cap of its stream.
    #[error("a frame of {len} bytes, where at most {max} are allowed")]
    TooLong {
        /// Its length.
        len: usize,
        /// The cap.
        max: usize,
    },
    /// Not protobuf of the expected message.
    #[error("a frame that is no message: {0}")]
    Malformed(String),
    /// The message lacks something or has an impossible value.
    #[error("a message with a bad {field}: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl From<prost::DecodeError> for FrameError {
    fn from(error: prost::DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// Puts a message into a frame.
///
/// # Errors
/// If it would be longer than `max`; the peer would refuse it.
pub fn encode(message: &impl Message, max: usize) -> Result<Bytes, FrameError> {
    let len = message.encoded_len();
    if len > max {
        return Err(FrameError::TooLong { len, max });
    }
    let mut frame = BytesMut::with_capacity(HEADER + len);
    frame.put_u32(u32::try_from(len).map_err(|_| FrameError::TooLong { len, max })?);
    message.encode(&mut frame).map_err(|e| FrameError::Malformed(e.to_string()))?;
    Ok(frame.freeze())
}

/// Takes the body of the first frame out of `buffer`; `None` while it is not yet whole.
///
/// # Errors
/// If the frame says that it is longer than `max`.
pub fn take(buffer: &mut BytesMut, max: usize) -> Result<Option<Bytes>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let len = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
    if len > max {
        return Err(FrameError::TooLong { len, max });
    }
    if buffer.len() < HEADER + len {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some(buffer.split_to(len).freeze()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_length_beyond_the_cap_is_refused_before_its_body_comes() {
        let mut buffer = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(take(&mut buffer, 100), Err(FrameError::TooLong { len: 0xffff_ffff, max: 100 }));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..10),
            cut in 1_usize..20,
        ) {
            let mut wire = Vec::new();
            for body in &bodies {
                wire.extend_from_slice(&(body.len() as u32).to_be_bytes());
                wire.extend_from_slice(body);
            }
            let mut buffer = BytesMut::new();
            let mut out = Vec::new();
            for piece in wire.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(body) = take(&mut buffer, 64).unwrap() {
                    out.push(body.to_vec());
                }
            }
            prop_assert_eq!(out, bodies);
            prop_assert!(buffer.is_empty());
        }
    }
}
