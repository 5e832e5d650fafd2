//! The first words of a connection at a door: hear until something is understood, answer, see whether the other side is
//! still there, and end with a last word.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long a visitor may take to read a last word and to close.
const FAREWELL: Duration = Duration::from_secs(2);
/// Most bytes of a visitor that are thrown away after a last word.
const THROWN_AWAY: usize = 256 * 1024;

/// A connection, and what has come from it that was not yet understood.
#[derive(Debug)]
pub struct Speaker<S> {
    /// The connection.
    pub socket: S,
    /// What came behind the last word that was understood.
    pub early: BytesMut,
}

/// Why nothing was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard<E> {
    /// The other side is gone.
    Gone,
    /// What it says makes no sense.
    Bad(E),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Speaker<S> {
    /// A connection that has said nothing yet.
    #[must_use]
    pub fn new(socket: S) -> Self {
        Self { socket, early: BytesMut::new() }
    }

    /// Reads until something is understood; `read` bounds what may come until then.
    ///
    /// # Errors
    /// If the other side is gone, or `read` says that it makes no sense.
    pub async fn hear<T, E>(&mut self, read: impl Fn(&[u8]) -> Result<Option<(T, usize)>, E>) -> Result<T, Unheard<E>> {
        loop {
            if let Some((what, length)) = read(&self.early).map_err(Unheard::Bad)? {
                drop(self.early.split_to(length));
                return Ok(what);
            }
            match self.socket.read_buf(&mut self.early).await {
                Ok(0) | Err(_) => return Err(Unheard::Gone),
                Ok(_) => {}
            }
        }
    }

    /// Says something.
    ///
    /// # Errors
    /// If the other side is gone.
    pub async fn say(&mut self, word: &[u8]) -> io::Result<()> {
        self.socket.write_all(word).await
    }

    /// Waits until the other side has ended, whatever it says until then.
    pub async fn gone(&mut self) {
        loop {
            self.early.clear();
            self.early.reserve(1024);
            match self.socket.read_buf(&mut self.early).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}

/// Works for as long as the client is there, and keeps what it sends meanwhile, up to `most` bytes. `None` if it went.
pub async fn while_there<C, T>(
    client: &mut C,
    early: &mut BytesMut,
    most: usize,
    work: impl Future<Output = T>,
) -> Option<T>
where
    C: AsyncRead + Unpin,
{
    tokio::pin!(work);
    while early.len() < most {
        tokio::select! {
            biased;
            done = &mut work => return Some(done),
            read = client.read_buf(early) => match read {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }
    Some(work.await)
}

/// Says a last word and closes so that it arrives: a socket that is closed over unread bytes sends a reset, which may
/// overtake the word.
pub async fn farewell(mut socket: TcpStream, word: &[u8]) {
    let closing = async {
        socket.write_all(word).await?;
        socket.shutdown().await?;
        let (mut thrown, mut buffer) = (0, [0; 1024]);
        while thrown < THROWN_AWAY {
            socket.readable().await?;
            match socket.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => thrown += read,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok::<_, io::Error>(())
    };
    // A visitor that is gone, or stays, misses nothing that it wanted.
    let _ = timeout(FAREWELL, closing).await;
}
