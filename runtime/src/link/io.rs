//! A stream as tokio's `AsyncRead` and `AsyncWrite`, for hyper and for standard input and output. The byte path between
//! sockets does without ([`crate::splice`]).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Stream, StreamError};

/// A stream that reads and writes. Shutting it down ends the sending direction cleanly; dropping it before that resets.
#[derive(Debug)]
pub struct StreamIo(Stream);

impl StreamIo {
    /// Wraps a stream.
    #[must_use]
    pub const fn new(stream: Stream) -> Self {
        Self(stream)
    }

    /// The stream again.
    #[must_use]
    pub fn into_inner(self) -> Stream {
        self.0
    }
}

fn broken(error: StreamError) -> io::Error {
    let kind = match &error {
        StreamError::Reset(_) => io::ErrorKind::ConnectionReset,
        StreamError::Link(_) => io::ErrorKind::NotConnected,
        StreamError::Ended => io::ErrorKind::BrokenPipe,
    };
    io::Error::new(kind, error)
}

impl AsyncRead for StreamIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.recv.poll_read(cx, out).map_err(broken)
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.0.send.poll_write(cx, data).map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.0.send.has_ended() {
            self.0.send.finish();
        }
        Poll::Ready(Ok(()))
    }
}
