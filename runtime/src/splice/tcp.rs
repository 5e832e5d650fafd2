//! A TCP socket as an end of a splice.

use std::{io, net::Shutdown, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use proto::code::ResetCode;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{Broken, End, Sink, Source};

/// Sizes of a read in bytes: the first, and the largest that it grows to while reads fill it.
const FIRST_READ: usize = 4 * 1024;
const LARGEST_READ: usize = 128 * 1024;
/// A buffer with less room than this is replaced.
const LEAST_ROOM: usize = 1024;

/// A TCP socket whose abnormal end is a reset: whoever drops it, for whatever reason, before both directions have ended
/// cleanly, makes the peer see a reset and not an end.
#[derive(Debug)]
pub struct TcpEnd {
    socket: Arc<TcpStream>,
    head: Bytes,
}

impl TcpEnd {
    /// Takes a socket over, with bytes that were already read from it. Turns Nagle's algorithm off, since the mesh
    /// never holds small writes back, and keep-alive on, so that a peer that vanished is noticed.
    ///
    /// # Errors
    /// If the socket is already broken.
    pub fn new(socket: TcpStream, head: Bytes) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let handle = SockRef::from(&socket);
        handle.set_linger(Some(Duration::ZERO))?;
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(60))
            .with_interval(Duration::from_secs(15))
            .with_retries(4);
        handle.set_tcp_keepalive(&keepalive)?;
        Ok(Self { socket: Arc::new(socket), head })
    }
}

impl End for TcpEnd {
    type Source = TcpSource;
    type Sink = TcpSink;

    fn halves(self) -> (TcpSource, TcpSink) {
        let sink = TcpSink { socket: Arc::clone(&self.socket) };
        (TcpSource { socket: self.socket, head: self.head, buffer: BytesMut::new(), size: FIRST_READ }, sink)
    }
}

/// The reading half.
#[derive(Debug)]
pub struct TcpSource {
    socket: Arc<TcpStream>,
    head: Bytes,
    buffer: BytesMut,
    size: usize,
}

impl Source for TcpSource {
    async fn fill(&mut self, out: &mut [Bytes]) -> Result<usize, Broken> {
        if !self.head.is_empty() {
            out[0] = std::mem::take(&mut self.head);
            return Ok(1);
        }
        loop {
            if self.buffer.capacity() < LEAST_ROOM {
                self.buffer = BytesMut::with_capacity(self.size);
            }
            let room = self.buffer.capacity();
            match self.socket.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(0),
                Ok(read) => {
                    if read == room {
                        self.size = (self.size * 2).min(LARGEST_READ);
                    } else if read < self.size / 8 {
                        self.size = (self.size / 2).max(FIRST_READ);
                    }
                    out[0] = self.buffer.split().freeze();
                    return Ok(1);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // An idle stream holds no buffer.
                    self.buffer = BytesMut::new();
                    self.socket.readable().await.map_err(|e| Broken::socket(&e))?;
                }
                Err(e) => return Err(Broken::socket(&e)),
            }
        }
    }

    fn stop(&mut self, _: ResetCode) {}
}

/// The writing half.
#[derive(Debug)]
pub struct TcpSink {
    socket: Arc<TcpStream>,
}

impl Sink for TcpSink {
    async fn drain(&mut self, pieces: &mut [Bytes]) -> Result<(), Broken> {
        let mut first = 0;
        while first < pieces.len() {
            let mut slices = [io::IoSlice::new(&[]); super::PIECES];
            let count = pieces.len() - first;
            for (slice, piece) in slices.iter_mut().zip(&pieces[first..]) {
                *slice = io::IoSlice::new(piece);
            }
            match self.socket.try_write_vectored(&slices[..count]) {
                Ok(written) => first += consume(&mut pieces[first..], written),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.writable().await.map_err(|e| Broken::socket(&e))?;
                }
                Err(e) => return Err(Broken::socket(&e)),
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match SockRef::from(&*self.socket).shutdown(Shutdown::Write) {
            // The peer has closed already and needs no end from us.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other.map_err(|e| Broken::socket(&e)),
        }
    }

    /// Both directions have ended: from here on the kernel may close the socket the ordinary way.
    async fn delivered(&mut self) -> Result<(), Broken> {
        SockRef::from(&*self.socket).set_linger(None).map_err(|e| Broken::socket(&e))
    }

    fn abort(&mut self, _: ResetCode) {
        // Dropping the socket resets it; an error means that it is gone already.
        let _ = SockRef::from(&*self.socket).set_linger(Some(Duration::ZERO));
    }
}

/// Takes `written` bytes off the front. Returns how many pieces are used up.
fn consume(pieces: &mut [Bytes], mut written: usize) -> usize {
    let mut whole = 0;
    for piece in pieces {
        if written < piece.len() {
            drop(piece.split_to(written));
            break;
        }
        written -= piece.len();
        *piece = Bytes::new();
        whole += 1;
    }
    whole
}
