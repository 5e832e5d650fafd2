//! A stream to an edge's echo whose every byte is known: what comes back is compared, and an end that is not the right
//! one is told apart from one that is.

use std::{fmt, time::Duration};

use bytes::{Bytes, BytesMut};
use proto::{
    code::{RefuseCode, ResetCode},
    frame::MAX_STREAM_HEAD,
    id::EdgeId,
    stream::{Answer, Open},
    target::Target,
};
use runtime::{
    frames::{FrameReader, ReadFrameError},
    link::{Link, RecvHalf, SendHalf, Stream, StreamError},
};
use tokio::time::{sleep, timeout};

/// Bytes that are read at once.
const READ: usize = 64 * 1024;

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Decides the bytes.
    pub seed: u64,
    /// How many.
    pub bytes: u64,
    /// In pieces of this many.
    pub piece: usize,
    /// With a pause between two pieces.
    pub pause: Duration,
    /// How long the reader does nothing at first.
    pub rest: Duration,
    /// A stream that has not ended by then never will.
    pub deadline: Duration,
}

impl Load {
    /// So many bytes, in pieces of 4,000, ten milliseconds apart, with ten minutes to arrive.
    #[must_use]
    pub const fn of(seed: u64, bytes: u64) -> Self {
        Self {
            seed,
            bytes,
            piece: 4000,
            pause: Duration::from_millis(10),
            rest: Duration::ZERO,
            deadline: Duration::from_secs(600),
        }
    }
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// Every byte came back, and then the clean end.
    Exact,
    /// It was not opened, and the shard or the edge said why.
    Refused(RefuseCode),
    /// It broke, visibly.
    Broken(String),
    /// It ended as no stream may: other bytes, too few before a clean end, or no end at all.
    Wrong(String),
}

impl StreamEnd {
    /// Whether no rule was broken.
    #[must_use]
    pub const fn is_honest(&self) -> bool {
        !matches!(self, Self::Wrong(_))
    }
}

impl fmt::Display for StreamEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => f.write_str("exact"),
            Self::Refused(code) => write!(f, "refused: {code}"),
            Self::Broken(why) => write!(f, "broken: {why}"),
            Self::Wrong(why) => write!(f, "WRONG: {why}"),
        }
    }
}

impl From<StreamError> for StreamEnd {
    fn from(error: StreamError) -> Self {
        Self::Broken(error.to_string())
    }
}

/// Opens a stream to an edge's echo and waits for the answer.
///
/// # Errors
/// With how it ended, if it was not opened.
pub async fn open(link: &Link, edge: &EdgeId) -> Result<Stream, StreamEnd> {
    let stream = link.open().await.map_err(|e| StreamEnd::Broken(e.to_string()))?;
    ask(stream, edge).await
}

async fn ask(mut stream: Stream, edge: &EdgeId) -> Result<Stream, StreamEnd> {
    let head = Open::new(Target::Probe { edge: edge.clone() })
        .encode()
        .map_err(|e| StreamEnd::Wrong(format!("the Open cannot be encoded: {e}")))?;
    stream.send.write_one(head).await?;
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let body = match reader.next(&mut stream.recv).await {
        Ok(Some(body)) => body,
        Ok(None) => return Err(StreamEnd::Wrong("a clean end instead of an answer".into())),
        Err(ReadFrameError::Stream(e)) => return Err(e.into()),
        Err(e) => return Err(StreamEnd::Wrong(format!("instead of an answer: {e}"))),
    };
    stream.recv.unread(reader.into_rest());
    match Answer::decode(body) {
        Ok(Answer::Opened { edge: served, .. }) if served == *edge => Ok(stream),
        Ok(Answer::Opened { edge: served, .. }) => Err(StreamEnd::Wrong(format!("asked for {edge}, met {served}"))),
        Ok(Answer::Refused(refusal)) => Err(StreamEnd::Refused(refusal.code)),
        Ok(Answer::Routed(_)) => Err(StreamEnd::Wrong("a user got what is said between shards".into())),
        Err(e) => Err(StreamEnd::Wrong(format!("the answer cannot be read: {e}"))),
    }
}

/// Opens a stream, and waits no longer than this for the answer once the link has room for one more; `None` if there is
/// no answer by then.
pub async fn open_within(link: &Link, edge: &EdgeId, patience: Duration) -> Option<Result<Stream, StreamEnd>> {
    match link.open().await {
        Ok(stream) => timeout(patience, ask(stream, edge)).await.ok(),
        Err(end) => Some(Err(StreamEnd::Broken(end.to_string()))),
    }
}

/// Opens a stream, sends the load, compares the echo.
pub async fn run(link: &Link, edge: &EdgeId, load: &Load) -> StreamEnd {
    match open(link, edge).await {
        Ok(stream) => run_on(stream, load).await,
        Err(end) => end,
    }
}

/// Sends the load on an open stream, and compares the echo.
pub async fn run_on(stream: Stream, load: &Load) -> StreamEnd {
    match timeout(load.deadline, exchange(stream, load)).await {
        Ok(Ok(())) => StreamEnd::Exact,
        Ok(Err(end)) => end,
        Err(_) => StreamEnd::Wrong(format!("no end within {} s", load.deadline.as_secs())),
    }
}

async fn exchange(mut stream: Stream, load: &Load) -> Result<(), StreamEnd> {
    let result = tokio::try_join!(write(&mut stream.send, load), compare(&mut stream.recv, load));
    if result.is_err() {
        stream.abort(ResetCode::Cancelled);
    }
    result.map(|_| ())
}

async fn write(send: &mut SendHalf, load: &Load) -> Result<(), StreamEnd> {
    let mut sent = 0;
    while sent < load.bytes {
        let piece = (load.piece as u64).min(load.bytes - sent);
        send.write_one(pattern(load.seed, sent, piece)).await?;
        sent += piece;
        if !load.pause.is_zero() {
            sleep(load.pause).await;
        }
    }
    send.finish();
    send.delivered().await?;
    Ok(())
}

async fn compare(recv: &mut RecvHalf, load: &Load) -> Result<(), StreamEnd> {
    sleep(load.rest).await;
    let mut seen = 0;
    while let Some(chunk) = recv.chunk(READ).await? {
        let expected = pattern(load.seed, seen, chunk.len() as u64);
        if let Some(at) = chunk.iter().zip(&expected).position(|(a, b)| a != b) {
            return Err(StreamEnd::Wrong(format!("byte {} is another one", seen + at as u64)));
        }
        seen += chunk.len() as u64;
    }
    if seen == load.bytes {
        return Ok(());
    }
    Err(StreamEnd::Wrong(format!("a clean end after {seen} of {} bytes", load.bytes)))
}

/// The bytes of a load from an offset on.
#[must_use]
pub fn pattern(seed: u64, from: u64, len: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(usize::try_from(len).unwrap_or(0));
    bytes.extend((from..from + len).map(|at| {
        let word = mix(seed ^ (at / 8)).to_le_bytes();
        word[(at % 8) as usize]
    }));
    bytes.freeze()
}

/// SplitMix64's output function (<https://prng.di.unimi.it/splitmix64.c>).
const fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_same_in_pieces_and_another_for_another_seed() {
        let whole = pattern(7, 0, 100);
        assert_eq!(whole.slice(13..57), pattern(7, 13, 44));
        assert_ne!(whole, pattern(8, 0, 100));
    }
}
