//! gRPC's framing of messages in the body of an HTTP/2 stream: a flag, a length, and that many bytes. Pure.

use bytes::{BufMut, Bytes, BytesMut};
use proto::egress::Packet;

/// Largest message in bytes, as gRPC has it by default. kube-apiserver sends 32 KiB at most.
pub(crate) const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// The flag and the length.
const HEADER: usize = 5;

/// A body that is no series of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadMessage {
    /// Compression was never agreed on.
    #[error("a message is compressed")]
    Compressed,
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message has {0} bytes; at most {MAX_MESSAGE} are taken")]
    TooLong(usize),
    /// Not a packet.
    #[error("a message is no packet")]
    NoPacket,
}

/// Takes a body apart.
#[derive(Debug, Default)]
pub(crate) struct Messages(BytesMut);

impl Messages {
    /// Adds what has arrived.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next packet; `None` if more is needed.
    pub(crate) fn next(&mut self) -> Result<Option<Packet>, BadMessage> {
        let Some((header, _)) = self.0.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [flag, a, b, c, d] = *header;
        if flag != 0 {
            return Err(BadMessage::Compressed);
        }
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > MAX_MESSAGE {
            return Err(BadMessage::TooLong(length));
        }
        if self.0.len() < HEADER + length {
            return Ok(None);
        }
        let mut message = self.0.split_to(HEADER + length).freeze();
        let body = message.split_off(HEADER);
        prost::Message::decode(body).map(Some).map_err(|_| BadMessage::NoPacket)
    }
}

/// A packet as it is sent.
pub(crate) fn encode(packet: &Packet) -> Bytes {
    let length = prost::Message::encoded_len(packet);
    let mut out = BytesMut::with_capacity(HEADER + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    out.put_slice(&prost::Message::encode_to_vec(packet));
    out.freeze()
}
