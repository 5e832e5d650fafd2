//! A service that does on a TCP connection what its first line asks for, and remembers how connections ended:
//!
//! | first line | what it does |
//! |---|---|
//! | `echo` | sends back what comes |
//! | `late` | reads until the end, and only then answers `BYTES HASH` |
//! | `first KEY` | says `done`, ends its own half, reads until the end, and notes that under KEY |
//! | `sink KEY` | says `got` when the first bytes are there, reads until the end, and notes under KEY how it ended |
//! | `ask KEY` | answers the note: `BYTES eof` or `BYTES error: ...` |
//! | `source N` | sends N bytes, or without end if N is 0 |
//! | `reset N` | sends N bytes, and resets |
//! | `hush` | reads nothing and says nothing until the other side goes |

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::figures::hex;

/// Longest first line in bytes.
const LINE: u64 = 200;
/// How long a note is waited for.
const NOTE: Duration = Duration::from_secs(10);

/// How connections ended, by key.
pub(crate) type Notes = Arc<Mutex<HashMap<String, String>>>;

/// Serves one connection.
pub(crate) async fn serve(mut socket: TcpStream, notes: Notes) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (read, mut write) = socket.split();
    let mut read = BufReader::with_capacity(64 * 1024, read);
    let mut line = String::new();
    (&mut read).take(LINE).read_line(&mut line).await?;
    let (word, argument) = line.trim().split_once(' ').unwrap_or_else(|| (line.trim(), ""));
    match word {
        "echo" => {
            tokio::io::copy_buf(&mut read, &mut write).await?;
            write.shutdown().await
        }
        "late" => {
            let (bytes, hash) = drain(&mut read).await?;
            write.write_all(format!("{bytes} {}\n", hex(&hash)).as_bytes()).await?;
            write.shutdown().await
        }
        "first" => {
            write.write_all(b"done\n").await?;
            write.shutdown().await?;
            note(&notes, argument, &mut read).await;
            Ok(())
        }
        "sink" => {
            read.fill_buf().await?;
            write.write_all(b"got\n").await?;
            note(&notes, argument, &mut read).await;
            Ok(())
        }
        "ask" => {
            write.write_all(answer(&notes, argument).await.as_bytes()).await?;
            write.shutdown().await
        }
        "source" => {
            send(&mut write, argument.parse().unwrap_or(0)).await?;
            write.shutdown().await
        }
        "reset" => {
            let bytes = argument.parse().unwrap_or(1);
            send(&mut write, bytes).await?;
            write.flush().await?;
            // Lingering for no time at all is how a program resets a connection.
            socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO))
        }
        "hush" => {
            // A socket that is never read says when it is reset, and otherwise stays.
            socket.ready(tokio::io::Interest::ERROR).await?;
            Ok(())
        }
        _ => write.write_all(b"no such trick\n").await,
    }
}

async fn drain(read: &mut (impl AsyncRead + Unpin)) -> io::Result<(u64, Vec<u8>)> {
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 64 * 1024]);
    loop {
        match read.read(&mut buffer).await? {
            0 => return Ok((bytes, hash.finalize().to_vec())),
            n => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

async fn note(notes: &Notes, key: &str, read: &mut (impl AsyncRead + Unpin)) {
    let (mut bytes, mut buffer) = (0, vec![0; 64 * 1024]);
    let end = loop {
        match read.read(&mut buffer).await {
            Ok(0) => break "eof".to_owned(),
            Ok(n) => bytes += n,
            Err(e) => break format!("error: {e}"),
        }
    };
    notes.lock().insert(key.to_owned(), format!("{bytes} {end}\n"));
}

async fn answer(notes: &Notes, key: &str) -> String {
    let wait = async {
        loop {
            if let Some(note) = notes.lock().get(key).cloned() {
                return note;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(NOTE, wait).await.unwrap_or_else(|_| "nothing\n".into())
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), bytes: u64) -> io::Result<()> {
    let block = vec![b'x'; 64 * 1024];
    let mut left = if bytes == 0 { u64::MAX } else { bytes };
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
        write.write_all(&block[..n]).await?;
        left -= n as u64;
    }
    Ok(())
}
