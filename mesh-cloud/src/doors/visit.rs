//! What doors do alike with a fresh connection: wait for its first byte at no cost, see whether it is still there, and
//! end it with a last word.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// How long a visitor may be silent before the first byte.
const FIRST_BYTE: Duration = Duration::from_secs(30);
/// How long a visitor may take to read a last word and to close.
const FAREWELL: Duration = Duration::from_secs(2);
/// Most bytes of a visitor that are thrown away after a last word.
const THROWN_AWAY: usize = 256 * 1024;

/// Waits for the first byte without taking it, and without a buffer: ten thousand silent visitors are ten thousand
/// sockets and nothing more. `None` if it does not come in time or the door closes.
pub(super) async fn first_byte(socket: &TcpStream, stopping: &CancellationToken) -> Option<u8> {
    let peek = async {
        let mut first = [0];
        match socket.peek(&mut first).await {
            Ok(1) => Some(first[0]),
            Ok(_) | Err(_) => None,
        }
    };
    stopping.run_until_cancelled(timeout(FIRST_BYTE, peek)).await?.ok()?
}

/// Works for as long as the client is there, and keeps what it sends meanwhile, up to `most` bytes. `None` if it went.
pub(super) async fn while_there<C, T>(
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
pub(super) async fn farewell(mut socket: TcpStream, word: &[u8]) {
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
