//! Opening a stream over a link that is there: the `Open`, and the answer to it.

use std::time::Duration;

use proto::{
    frame::MAX_STREAM_HEAD,
    id::EdgeId,
    stream::{Answer, Open, Refusal},
};
use tokio::time::timeout;

use crate::{
    frames::{FrameReader, ReadFrameError},
    link::{Link, LinkEnd, Stream, StreamError},
};

/// How long the mesh may take. It has a deadline of its own, and then says which part was slow.
pub const OPEN: Duration = Duration::from_secs(30);

/// A stream that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The stream; its next bytes are the target's.
    pub stream: Stream,
    /// The edge that serves it.
    pub edge: EdgeId,
    /// What the edge dialled.
    pub address: String,
}

/// A stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The mesh said no.
    #[error(transparent)]
    Refused(Refusal),
    /// The link ended.
    #[error("the link ended: {0}")]
    Link(LinkEnd),
    /// The stream broke, or what came was no answer.
    #[error("the other side did not answer as it should: {0}")]
    Nonsense(String),
    /// Nothing came.
    #[error("no answer within {} s", OPEN.as_secs())]
    TimedOut,
}

impl From<StreamError> for OpenError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Link(end) => Self::Link(end),
            StreamError::Reset(_) | StreamError::Ended => Self::Nonsense(error.to_string()),
        }
    }
}

/// Opens a stream, and waits for the answer of the edge.
///
/// # Errors
/// If it is refused, or the link ends.
pub async fn open(link: &Link, head: Open) -> Result<Opened, OpenError> {
    timeout(OPEN, exchange(link, head)).await.unwrap_or(Err(OpenError::TimedOut))
}

async fn exchange(link: &Link, head: Open) -> Result<Opened, OpenError> {
    let frame = head.encode().map_err(|e| OpenError::Nonsense(e.to_string()))?;
    let mut stream = link.open().await.map_err(OpenError::Link)?;
    // Whoever refuses may stop reading at once; the answer, which says why, is behind that.
    let written = stream.send.write_one(frame).await;
    let mut frames = FrameReader::new(MAX_STREAM_HEAD);
    let body = match (frames.next(&mut stream.recv).await, written) {
        (Ok(Some(body)), _) => body,
        (Ok(None), _) => return Err(OpenError::Nonsense("the stream ended without an answer".into())),
        (Err(ReadFrameError::Stream(e)), _) => return Err(e.into()),
        (Err(e), _) => return Err(OpenError::Nonsense(e.to_string())),
    };
    match Answer::decode(body).map_err(|e| OpenError::Nonsense(e.to_string()))? {
        Answer::Opened { edge, address } => {
            stream.recv.unread(frames.into_rest());
            Ok(Opened { stream, edge, address })
        }
        Answer::Refused(refusal) => Err(OpenError::Refused(refusal)),
        Answer::Routed(_) => Err(OpenError::Nonsense("it said what shards say to each other".into())),
    }
}
