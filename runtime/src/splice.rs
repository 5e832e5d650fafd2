//! Bytes both ways between two ends, until both directions have ended.
//!
//! One task, no copy between the two sockets' buffers and QUIC's, nothing in between. Each direction ends by itself:
//! everything is delivered, then the end is passed on, and the other direction goes on. If anything breaks, everything
//! breaks, on both sides, as a reset.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::code::ResetCode;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::link::{RecvHalf, SendHalf, Stalled, Stream, StreamError};

mod socket;
mod tcp;

pub use socket::IoEnd;
pub use tcp::TcpEnd;

/// Pieces that are moved at once. A QUIC packet's payload is one piece, so this is about 45 kB from a link.
const PIECES: usize = 32;
/// How long a reader may take nothing before it counts as stalled.
const PATIENCE: Duration = Duration::from_secs(2);

/// A direction broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Broken {
    /// What to tell both sides.
    pub code: ResetCode,
    /// What happened, for logs.
    pub detail: String,
}

impl Broken {
    fn socket(error: &std::io::Error) -> Self {
        Self { code: ResetCode::PeerReset, detail: error.to_string() }
    }
}

impl From<StreamError> for Broken {
    fn from(error: StreamError) -> Self {
        Self { code: error.reset_code(), detail: error.to_string() }
    }
}

/// Where bytes come from.
pub trait Source: Send {
    /// Waits for bytes and puts them into `out`, as many pieces as there are and fit; 0 at the clean end.
    fn fill(&mut self, out: &mut [Bytes]) -> impl Future<Output = Result<usize, Broken>> + Send;
    /// Wants no more.
    fn stop(&mut self, code: ResetCode);
    /// Notes that what came from here cannot be passed on for now; `None` where that hinders nobody else.
    fn stalled(&self) -> Option<Stalled> {
        None
    }
}

/// Where bytes go to.
pub trait Sink: Send {
    /// Takes all pieces; waits while the way is full. A call that is dropped leaves in `pieces` what was not taken.
    fn drain(&mut self, pieces: &mut [Bytes]) -> impl Future<Output = Result<(), Broken>> + Send;
    /// Passes the clean end on.
    fn finish(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;
    /// Waits until everything up to the end has arrived, as far as this end can know.
    fn delivered(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;
    /// Breaks it.
    fn abort(&mut self, code: ResetCode);
}

/// An end of a splice: both directions of a socket or a stream.
pub trait End {
    /// Its reading half.
    type Source: Source;
    /// Its writing half.
    type Sink: Sink;
    /// Takes it apart.
    fn halves(self) -> (Self::Source, Self::Sink);
}

/// Counts bytes of one flow while it runs.
#[derive(Debug, Default)]
pub struct Meter {
    up: AtomicU64,
    down: AtomicU64,
}

impl Meter {
    /// Bytes from the first end to the second.
    #[must_use]
    pub fn up(&self) -> u64 {
        self.up.load(Ordering::Relaxed)
    }

    /// Bytes from the second end to the first.
    #[must_use]
    pub fn down(&self) -> u64 {
        self.down.load(Ordering::Relaxed)
    }

    /// Counts bytes that went towards the second end by another way than [`splice`].
    pub fn add_up(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes that came from the second end by another way than [`splice`].
    pub fn add_down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Moves bytes between `a` and `b` until both directions have ended and what was sent has arrived.
///
/// # Errors
/// If either end breaks, or `cancel` is cancelled ([`ResetCode::Shutdown`]); both ends have then been reset.
pub async fn splice(a: impl End, b: impl End, meter: &Arc<Meter>, cancel: &CancellationToken) -> Result<(), Broken> {
    let ((mut a_out, mut a_in), (mut b_out, mut b_in)) = (a.halves(), b.halves());
    let both = async {
        tokio::try_join!(pump(&mut a_out, &mut b_in, &meter.up), pump(&mut b_out, &mut a_in, &meter.down))?;
        tokio::try_join!(a_in.delivered(), b_in.delivered())
    };
    let result = tokio::select! {
        biased;
        () = cancel.cancelled() => {
            Err(Broken { code: ResetCode::Shutdown, detail: "the process is shutting down".into() })
        }
        result = both => result.map(|_| ()),
    };
    if let Err(broken) = &result {
        a_out.stop(broken.code);
        b_out.stop(broken.code);
        a_in.abort(broken.code);
        b_in.abort(broken.code);
    }
    result
}

async fn pump(from: &mut impl Source, to: &mut impl Sink, count: &AtomicU64) -> Result<(), Broken> {
    let mut pieces = [const { Bytes::new() }; PIECES];
    loop {
        let filled = from.fill(&mut pieces).await?;
        if filled == 0 {
            return to.finish().await;
        }
        let batch = &mut pieces[..filled];
        let bytes: usize = batch.iter().map(Bytes::len).sum();
        if let Ok(drained) = timeout(PATIENCE, to.drain(batch)).await {
            drained?;
        } else {
            drain_slowly(from, to, batch).await?;
        }
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Goes on with a reader that has taken nothing for a while. It may take as long as it likes, as long as the streams
/// beside it do not suffer.
async fn drain_slowly(from: &impl Source, to: &mut impl Sink, batch: &mut [Bytes]) -> Result<(), Broken> {
    let mut stalled = from.stalled();
    loop {
        if stalled.as_ref().is_some_and(Stalled::others_suffer) {
            return Err(Broken { code: ResetCode::Stalled, detail: ResetCode::Stalled.sentence().into() });
        }
        let left: usize = batch.iter().map(Bytes::len).sum();
        match timeout(PATIENCE, to.drain(batch)).await {
            Ok(drained) => return drained,
            // It reads, if slowly.
            Err(_) if batch.iter().map(Bytes::len).sum::<usize>() < left => stalled = None,
            Err(_) => stalled = stalled.or_else(|| from.stalled()),
        }
    }
}

impl End for Stream {
    type Source = RecvHalf;
    type Sink = SendHalf;

    fn halves(self) -> (RecvHalf, SendHalf) {
        (self.recv, self.send)
    }
}

impl Source for RecvHalf {
    async fn fill(&mut self, out: &mut [Bytes]) -> Result<usize, Broken> {
        Ok(self.chunks(out).await?.unwrap_or(0))
    }

    fn stop(&mut self, code: ResetCode) {
        Self::stop(self, code);
    }

    fn stalled(&self) -> Option<Stalled> {
        Some(Self::stalled(self))
    }
}

impl Sink for SendHalf {
    async fn drain(&mut self, pieces: &mut [Bytes]) -> Result<(), Broken> {
        Ok(self.write(pieces).await?)
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        Self::finish(self);
        Ok(())
    }

    async fn delivered(&mut self) -> Result<(), Broken> {
        Ok(Self::delivered(self).await?)
    }

    fn abort(&mut self, code: ResetCode) {
        self.reset(code);
    }
}
