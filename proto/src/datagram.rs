//! Datagrams of UDP flows on a link: tagged with the flow they belong to where each is a packet of its own (a QUIC
//! DATAGRAM, RFC 9221), or behind their length in the flow's own stream.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::frame::FrameError;

/// Longest payload in bytes: what UDP over IPv6 takes (RFC 768, RFC 8200).
pub const MAX_PAYLOAD: usize = 65_527;
/// Bytes of the length before a payload in a stream.
pub const LENGTH: usize = 2;
/// Most bytes of a tag.
pub const MAX_TAG: usize = 8;
/// Flows are numbered by their streams, and these have 62 bits (RFC 9000, 2.1).
const MAX_FLOW: u64 = (1 << 62) - 1;

/// Bytes that the tag of this flow takes.
#[must_use]
pub const fn tag_len(flow: u64) -> usize {
    match flow {
        0..0x40 => 1,
        0x40..0x4000 => 2,
        0x4000..0x4000_0000 => 4,
        _ => 8,
    }
}

/// A payload behind the number of its flow, as a variable-length integer (RFC 9000, 16). Of a number the lower 62 bits
/// count.
#[must_use]
pub fn tagged(flow: u64, payload: &[u8]) -> Bytes {
    let flow = flow & MAX_FLOW;
    let mut out = BytesMut::with_capacity(tag_len(flow) + payload.len());
    // The two highest bits say how long the number is; the casts lose nothing but zeros.
    #[allow(clippy::cast_possible_truncation, reason = "each arm holds only what fits")]
    match tag_len(flow) {
        1 => out.put_u8(flow as u8),
        2 => out.put_u16(flow as u16 | 1 << 14),
        4 => out.put_u32(flow as u32 | 2 << 30),
        _ => out.put_u64(flow | 3 << 62),
    }
    out.put_slice(payload);
    out.freeze()
}

/// The flow of a datagram, and its payload; `None` if it is too short to have one, or the payload is too long.
#[must_use]
pub fn untag(mut datagram: Bytes) -> Option<(u64, Bytes)> {
    let length = 1usize << (datagram.first()? >> 6);
    if datagram.len() < length || datagram.len() - length > MAX_PAYLOAD {
        return None;
    }
    let flow = match length {
        1 => datagram.get_u8().into(),
        2 => (datagram.get_u16() & 0x3fff).into(),
        4 => (datagram.get_u32() & 0x3fff_ffff).into(),
        _ => datagram.get_u64() & MAX_FLOW,
    };
    Some((flow, datagram))
}

/// A payload as it stands in a stream; one that is longer than [`MAX_PAYLOAD`] is cut.
#[must_use]
pub fn framed(payload: &[u8]) -> Bytes {
    let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
    let mut out = BytesMut::with_capacity(LENGTH + payload.len());
    out.put_u16(u16::try_from(payload.len()).expect("MAX_PAYLOAD fits"));
    out.put_slice(payload);
    out.freeze()
}

/// Takes the next payload off what came in a stream; `None` if it is not whole yet.
///
/// # Errors
/// If it is longer than a datagram can be.
pub fn take(buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(&head) = buffer.first_chunk::<LENGTH>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes(head));
    if length > MAX_PAYLOAD {
        return Err(FrameError::TooLong { len: length, max: MAX_PAYLOAD });
    }
    if buffer.len() < LENGTH + length {
        return Ok(None);
    }
    buffer.advance(LENGTH);
    Ok(Some(buffer.split_to(length).freeze()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_datagram_is_not_taken_for_one() {
        for bytes in [&b""[..], b"\x40", b"\x80\0\0", b"\xc0\0\0\0\0\0\0"] {
            assert_eq!(untag(Bytes::from_static(bytes)), None, "{bytes:?}");
        }
        assert!(take(&mut BytesMut::from(&b"\xff\xf8"[..])).is_err());
        assert!(matches!(take(&mut BytesMut::from(&b"\xff\xf7x"[..])), Ok(None)));
        assert_eq!(framed(&vec![0; 70_000]).len(), LENGTH + MAX_PAYLOAD);
    }

    proptest! {
        #[test]
        fn both_forms_go_round(flow in 0..=MAX_FLOW, payload in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let tagged = tagged(flow, &payload);
            prop_assert_eq!(tagged.len(), tag_len(flow) + payload.len());
            prop_assert_eq!(untag(tagged), Some((flow, Bytes::from(payload.clone()))));
            let mut stream = BytesMut::from(&framed(&payload)[..]);
            stream.extend_from_slice(&framed(b"next"));
            prop_assert_eq!(take(&mut stream).unwrap(), Some(Bytes::from(payload)));
            prop_assert_eq!(take(&mut stream).unwrap(), Some(Bytes::from_static(b"next")));
            prop_assert!(take(&mut stream).unwrap().is_none() && stream.is_empty());
        }
    }
}
