//! A stream as tokio's `AsyncRead` and `AsyncWrite`, for hyper and for standard input and output. The byte path between
//! sockets does without ([`crate::splice`]).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Stream;

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

impl AsyncRead for StreamIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let recv = &mut self.0.recv;
        if !recv.head.is_empty() {
            let len = out.remaining().min(recv.head.len());
            out.put_slice(&recv.head.split_to(len));
            return Poll::Ready(Ok(()));
        }
        let (before, room) = (out.filled().len(), out.remaining());
        let result = ready!(Pin::new(&mut recv.inner).poll_read(cx, out));
        recv.ended |= result.is_err() || (room > 0 && out.filled().len() == before);
        Poll::Ready(result)
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0.send.inner).poll_write(cx, data).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.0.send.ended {
            self.0.send.finish();
        }
        Poll::Ready(Ok(()))
    }
}
