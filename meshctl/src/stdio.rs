//! Standard input and output as the two directions of one connection.

use std::{
    fs::File,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncWrite, BufWriter, Stdout};

/// Bytes that are collected before they are written. Each write of standard output is a trip to another thread, and what
/// comes through the mesh comes in packets.
const BUFFER: usize = 64 * 1024;

/// Standard output that can be ended: whoever reads it then sees the end, while standard input goes on. A `ProxyCommand`
/// needs that, since it is how ssh learns that the other side closed.
#[derive(Debug)]
pub(crate) struct EndingStdout(BufWriter<Stdout>);

impl EndingStdout {
    /// Takes standard output over; nobody else may write there from now on.
    pub(crate) fn new() -> Self {
        Self(BufWriter::with_capacity(BUFFER, tokio::io::stdout()))
    }
}

impl AsyncWrite for EndingStdout {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.0).poll_flush(cx))?;
        // The number must stay taken, or the next file that is opened would be standard output.
        let nothing = File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(nothing)?;
        Poll::Ready(Ok(()))
    }
}
