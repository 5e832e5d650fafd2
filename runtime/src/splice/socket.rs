//! Any other reader and writer as an end of a splice: TLS connections, unix sockets, standard input and output.

use bytes::{Bytes, BytesMut};
use proto::code::ResetCode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Broken, End, Sink, Source};

/// Size of a read in bytes.
const READ: usize = 16 * 1024;
/// A buffer with less room than this is replaced.
const LEAST_ROOM: usize = 1024;

/// A reader and a writer that belong together.
#[derive(Debug)]
pub struct IoEnd<R, W> {
    reader: R,
    writer: W,
    head: Bytes,
}

impl<R, W> IoEnd<R, W> {
    /// Puts both together, with bytes that were already read.
    #[must_use]
    pub const fn new(reader: R, writer: W, head: Bytes) -> Self {
        Self { reader, writer, head }
    }
}

impl<R, W> End for IoEnd<R, W>
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin,
{
    type Source = IoSource<R>;
    type Sink = IoSink<W>;

    fn halves(self) -> (IoSource<R>, IoSink<W>) {
        (IoSource { reader: self.reader, head: self.head, buffer: BytesMut::new() }, IoSink { writer: self.writer })
    }
}

/// The reading half.
#[derive(Debug)]
pub struct IoSource<R> {
    reader: R,
    head: Bytes,
    buffer: BytesMut,
}

impl<R: AsyncRead + Send + Unpin> Source for IoSource<R> {
    async fn fill(&mut self, out: &mut [Bytes]) -> Result<usize, Broken> {
        if !self.head.is_empty() {
            out[0] = std::mem::take(&mut self.head);
            return Ok(1);
        }
        if self.buffer.capacity() < LEAST_ROOM {
            self.buffer = BytesMut::with_capacity(READ);
        }
        let read = self.reader.read_buf(&mut self.buffer).await.map_err(|e| Broken::socket(&e))?;
        out[0] = self.buffer.split().freeze();
        Ok(usize::from(read > 0))
    }

    fn stop(&mut self, _: ResetCode) {}
}

/// The writing half. Dropping it without an end is the most that a plain writer can do to show a break: over TLS the
/// peer misses the close_notify.
#[derive(Debug)]
pub struct IoSink<W> {
    writer: W,
}

impl<W: AsyncWrite + Send + Unpin> Sink for IoSink<W> {
    async fn drain(&mut self, pieces: &mut [Bytes]) -> Result<(), Broken> {
        for piece in pieces {
            self.writer.write_all_buf(piece).await.map_err(|e| Broken::socket(&e))?;
        }
        self.writer.flush().await.map_err(|e| Broken::socket(&e))
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match self.writer.shutdown().await {
            // The peer has closed already and needs no end from us.
            Err(e) if e.kind() == std::io::ErrorKind::NotConnected => Ok(()),
            other => other.map_err(|e| Broken::socket(&e)),
        }
    }

    async fn delivered(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    fn abort(&mut self, _: ResetCode) {}
}
