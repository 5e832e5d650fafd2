//! A flow as a reader and writer, for HTTP. Bytes that only pass through go by `splice` instead.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use proto::code::ResetCode;
use runtime::{link::io::StreamIo, splice::Broken};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use super::{Opened, Trail};
use crate::live::Lease;

/// Whether a message broke off before its end: its connection then ends in a reset, since a message that is ended by the
/// end of its connection would else look whole. Clones are the same fact.
#[derive(Clone, Debug, Default)]
pub struct BrokenOff(Arc<AtomicBool>);

impl BrokenOff {
    /// It did.
    pub fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it did.
    #[must_use]
    pub fn is_so(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A flow that reads and writes, counts its bytes, and leaves its record when dropped. When its credential is revoked or
/// the shard's time is over, reading and writing fail: an end that is not the flow's own is never a clean one.
pub struct RecordedIo {
    /// Taken once, when the flow is cut or handed on.
    io: Option<StreamIo>,
    /// Taken once, when the record is written or handed on.
    trail: Option<Trail>,
    cut: Pin<Box<dyn Future<Output = ResetCode> + Send>>,
    broken: Option<Broken>,
    shut: bool,
    broken_off: BrokenOff,
}

impl fmt::Debug for RecordedIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedIo").field("io", &self.io).field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl RecordedIo {
    pub(super) fn new(Opened { stream, trail }: Opened) -> Self {
        let revoked = trail.lease.as_ref().map_or_else(CancellationToken::new, |lease| Lease::ended(lease).clone());
        let stopping = trail.stopping.clone();
        let cut = Box::pin(async move {
            tokio::select! {
                biased;
                () = revoked.cancelled() => ResetCode::Revoked,
                () = stopping.cancelled() => ResetCode::Shutdown,
            }
        });
        Self {
            io: Some(StreamIo::new(stream)),
            trail: Some(trail),
            cut,
            broken: None,
            shut: false,
            broken_off: BrokenOff::default(),
        }
    }

    /// Says that what is written breaks off: shutting down then resets.
    #[must_use]
    pub fn broken_off(&self) -> BrokenOff {
        self.broken_off.clone()
    }

    /// The flow again, with bytes in front that were read and not used; `None` if it is broken.
    #[must_use]
    pub fn into_opened(mut self, unread: Bytes) -> Option<Opened> {
        let mut stream = self.io.take()?.into_inner();
        stream.recv.unread(unread);
        Some(Opened { stream, trail: self.trail.take()? })
    }

    /// The stream, unless it broke or has just been cut.
    fn whole(&mut self, cx: &mut Context<'_>) -> io::Result<&mut StreamIo> {
        if self.broken.is_none()
            && let Poll::Ready(code) = self.cut.as_mut().poll(cx)
        {
            self.abort(code);
        }
        match (&self.broken, &mut self.io) {
            (None, Some(io)) => Ok(io),
            (Some(broken), _) => Err(io::Error::other(broken.clone())),
            (None, None) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn abort(&mut self, code: ResetCode) {
        self.broken = Some(Broken { code, detail: code.sentence().to_owned() });
        if let Some(io) = self.io.take() {
            io.into_inner().abort(code);
        }
    }

    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|e| {
            let reset = matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
            let code = if reset { ResetCode::PeerReset } else { ResetCode::LinkLost };
            let broken = Broken { code, detail: e.to_string() };
            self.broken = Some(broken.clone());
            io::Error::other(broken)
        })
    }
}

impl AsyncRead for RecordedIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        let io = self.whole(cx)?;
        let result = ready!(Pin::new(io).poll_read(cx, out));
        let read = out.filled().len() - before;
        if let Some(trail) = &self.trail {
            trail.meter.add_down(read);
        }
        Poll::Ready(self.note(result))
    }
}

impl AsyncWrite for RecordedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let io = self.whole(cx)?;
        let result = ready!(Pin::new(io).poll_write(cx, data));
        if let (Some(trail), Ok(written)) = (&self.trail, &result) {
            trail.meter.add_up(*written);
        }
        Poll::Ready(self.note(result))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken_off.is_so() && self.broken.is_none() {
            self.abort(ResetCode::Cancelled);
        }
        let io = self.whole(cx)?;
        let result = ready!(Pin::new(io).poll_shutdown(cx));
        self.shut |= result.is_ok();
        Poll::Ready(self.note(result))
    }
}

impl Drop for RecordedIo {
    fn drop(&mut self) {
        let Some(trail) = self.trail.take() else { return };
        match self.broken.take() {
            Some(broken) => trail.ended_now(&Err(broken)),
            None if self.shut => trail.ended_now(&Ok(())),
            // Recorded as cancelled.
            None => drop(trail),
        }
    }
}
