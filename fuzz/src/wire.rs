//! Frames and messages.

use std::fmt::Debug;

use bytes::{Bytes, BytesMut};
use proto::{
    connection_id::{LEN, NONCE, Place},
    frame::{self, FrameError, HEADER, MAX_EDGE_TO_SHARD, MAX_SHARD_TO_EDGE, MAX_SHARD_TO_SHARD, MAX_STREAM_HEAD},
    message::{EdgeToShard, MAX_AVOIDED, MAX_SERVICES, ShardToEdge},
    peer::{MAX_ANNOUNCED, MAX_HELD, ShardToShard},
    principal::Principal,
    standing::{MAX_ALLOWS, MAX_TEXT, MAX_TROUBLES},
    stream::{Answer, MAX_VIA, Open},
};

/// A message that was accepted prints as a frame of one body which says the same.
///
/// That frame is longer than what came only where a value was left out and is filled in, so that it can be beyond the
/// cap only if what came was near it.
fn comes_back<T: PartialEq + Debug>(
    came: &Bytes,
    max: usize,
    message: T,
    printed: Result<Bytes, FrameError>,
    decode: impl Fn(Bytes) -> Result<T, FrameError>,
) {
    match printed {
        Ok(frame) => {
            let mut buffer = BytesMut::from(frame);
            let body = frame::take(&mut buffer, max);
            assert!(buffer.is_empty(), "bytes behind the frame of {message:?}");
            let Ok(Some(body)) = body else { panic!("{message:?} is no frame: {body:?}") };
            assert_eq!(decode(body), Ok(message), "it says something else than what came");
        }
        Err(error) => assert!(came.len() > max / 2, "{error}: {message:?}"),
    }
}

/// Bodies of frames from edge to shard.
pub fn edge_to_shard(data: &[u8]) {
    let came = Bytes::copy_from_slice(&data[..data.len().min(MAX_EDGE_TO_SHARD)]);
    let Ok(Some(message)) = EdgeToShard::decode(came.clone()) else { return };
    if let EdgeToShard::Announce(services) = &message {
        assert!(services.len() <= MAX_SERVICES && services.iter().all(|s| s.port != 0));
    }
    if let EdgeToShard::Hello(hello) = &message {
        assert!(hello.avoid.len() <= MAX_AVOIDED, "{} shards to avoid", hello.avoid.len());
    }
    if let EdgeToShard::Standing(standing) = &message {
        assert!(standing.troubles.len() <= MAX_TROUBLES && standing.allows.len() <= MAX_ALLOWS);
        assert!(standing.troubles.iter().all(|trouble| trouble.detail.chars().count() <= MAX_TEXT));
    }
    let printed = message.clone().encode();
    comes_back(&came, MAX_EDGE_TO_SHARD, Some(message), printed, EdgeToShard::decode);
}

/// Bodies of frames from shard to edge.
pub fn shard_to_edge(data: &[u8]) {
    let came = Bytes::copy_from_slice(&data[..data.len().min(MAX_SHARD_TO_EDGE)]);
    let Ok(Some(message)) = ShardToEdge::decode(came.clone()) else { return };
    let printed = message.clone().encode();
    comes_back(&came, MAX_SHARD_TO_EDGE, Some(message), printed, ShardToEdge::decode);
}

/// Bodies of frames from shard to shard.
pub fn shard_to_shard(data: &[u8]) {
    let came = Bytes::copy_from_slice(&data[..data.len().min(MAX_SHARD_TO_SHARD)]);
    let Ok(Some(message)) = ShardToShard::decode(came.clone()) else { return };
    let (len, max) = match &message {
        ShardToShard::Greeting { version, .. } => (version.chars().count(), 64),
        ShardToShard::Held { edges, .. } => (edges.len(), MAX_HELD),
        ShardToShard::Released(edges) => (edges.len(), MAX_HELD),
        ShardToShard::Announced(services) => (services.len(), MAX_ANNOUNCED),
    };
    assert!(len <= max, "{len}, where {max} are allowed: {message:?}");
    let printed = message.clone().encode();
    comes_back(&came, MAX_SHARD_TO_SHARD, Some(message), printed, ShardToShard::decode);
}

/// Bodies of `Open` frames.
pub fn open(data: &[u8]) {
    let came = Bytes::copy_from_slice(&data[..data.len().min(MAX_STREAM_HEAD)]);
    let Ok(open) = Open::decode(came.clone()) else { return };
    assert!(open.door.len() <= 1024, "a door of {} bytes", open.door.len());
    assert!(open.via.len() <= MAX_VIA, "{} shards passed", open.via.len());
    if let Some(Principal::User { groups, .. }) = &open.principal {
        assert!(groups.len() <= 64, "{} groups", groups.len());
    }
    let printed = open.encode();
    comes_back(&came, MAX_STREAM_HEAD, open, printed, Open::decode);
}

/// Bodies of `Answer` frames. Texts that are longer than one of ours are cut when they are passed on.
pub fn answer(data: &[u8]) {
    let came = Bytes::copy_from_slice(&data[..data.len().min(MAX_STREAM_HEAD)]);
    let Ok(answer) = Answer::decode(came) else { return };
    let once = answer.encode();
    assert!(once.len() <= HEADER + MAX_STREAM_HEAD, "{} bytes, beyond the cap", once.len());
    let again = Answer::decode(once.slice(HEADER..)).map(|a| a.encode());
    assert_eq!(again.as_ref(), Ok(&once), "a cut answer is cut again: {answer:?}");
}

/// A stream of frames that arrives in pieces. The first byte sets the cap, the second the size of the pieces.
pub fn frames(data: &[u8]) {
    let [cap, piece, stream @ ..] = data else { return };
    let (max, piece) = (usize::from(*cap) * 4, usize::from(*piece) + 1);
    let whole = take_all(stream, max, stream.len().max(1));
    assert_eq!(take_all(stream, max, piece), whole, "frames depend on how they were cut");

    let (bodies, rest, _) = whole;
    let mut again = Vec::new();
    for body in &bodies {
        assert!(body.len() <= max, "a body of {} bytes, where {max} are allowed", body.len());
        again.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
        again.extend_from_slice(body);
    }
    again.extend_from_slice(&rest);
    assert!(stream.starts_with(&again), "bytes were lost, invented or swapped");
}

type Taken = (Vec<Bytes>, Bytes, Option<FrameError>);

/// All frames, what is left of the buffer behind them, and the error that ended them.
fn take_all(stream: &[u8], max: usize, piece: usize) -> Taken {
    let (mut buffer, mut bodies) = (BytesMut::new(), Vec::new());
    for chunk in stream.chunks(piece) {
        buffer.extend_from_slice(chunk);
        loop {
            match frame::take(&mut buffer, max) {
                Ok(Some(body)) => bodies.push(body),
                Ok(None) => break,
                Err(error) => return (bodies, buffer.split_to(HEADER).freeze(), Some(error)),
            }
        }
        assert!(buffer.len() < HEADER + max.max(1), "{} bytes wait for a frame of at most {max}", buffer.len());
    }
    (bodies, buffer.freeze(), None)
}

/// UDP datagrams, by the connection id that they begin with.
pub fn connection_id(data: &[u8]) {
    let Some(place) = Place::of_datagram(data) else { return };
    assert!(data.len() > LEN);
    let id = place.id([7; NONCE]);
    assert_eq!(Place::of_id(&id), Some(place), "it is given out as it is read");
    assert_eq!(Place::of_datagram(&[&[0x40], &id[..]].concat()), Some(place));
}

/// Datagrams of a flow, as one that is tagged and as a stream of them.
pub fn datagrams(data: &[u8]) {
    use bytes::{Bytes, BytesMut};
    use proto::datagram::{LENGTH, MAX_PAYLOAD, framed, tagged, take, untag};
    if let Some((flow, payload)) = untag(Bytes::copy_from_slice(data)) {
        assert_eq!(untag(tagged(flow, &payload)), Some((flow, payload)), "it does not go round");
    }
    let (mut stream, mut read) = (BytesMut::from(data), 0);
    while let Ok(Some(payload)) = take(&mut stream) {
        assert!(payload.len() <= MAX_PAYLOAD);
        assert_eq!(framed(&payload), data[read..read + LENGTH + payload.len()], "it is not what was there");
        read += LENGTH + payload.len();
    }
    assert_eq!(stream, data[read..], "bytes are lost");
}
