//! Checks that the ends of a stream arrive as what they are: a half-close as a half-close, a reset as a reset.

use std::{io, time::Duration};

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::figures::hex;
use crate::say;

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Sent in each direction.
const BYTES: usize = 1_000_000;

/// Runs all checks and prints a line for each.
pub(crate) async fn run(connect: &str) -> anyhow::Result<()> {
    ours_first(connect).await.context("half-close by the client")?;
    say("half-close by the client: the service read to the end, and its answer came behind it")?;
    theirs_first(connect).await.context("half-close by the service")?;
    say("half-close by the service: the client went on sending, and all of it arrived")?;
    let got = their_reset(connect).await.context("reset by the service")?;
    say(format_args!("reset by the service: the client saw a reset after {got} bytes"))?;
    let note = our_reset(connect).await.context("reset by the client")?;
    say(format_args!("reset by the client: the service saw {note:?}"))?;
    Ok(())
}

/// Connects, and says the first line.
pub(crate) async fn begin(connect: &str, line: &str) -> anyhow::Result<TcpStream> {
    let mut socket = timeout(PATIENCE, TcpStream::connect(connect)).await?.with_context(|| connect.to_owned())?;
    socket.set_nodelay(true)?;
    socket.write_all(format!("{line}\n").as_bytes()).await?;
    Ok(socket)
}

async fn ours_first(connect: &str) -> anyhow::Result<()> {
    let mut socket = begin(connect, "late").await?;
    let bytes: Vec<u8> = (0..BYTES).map(|_| rand::random()).collect();
    socket.write_all(&bytes).await?;
    socket.shutdown().await?;
    let mut answer = String::new();
    timeout(PATIENCE, socket.read_to_string(&mut answer)).await??;
    let expected = format!("{BYTES} {}", hex(&Sha256::digest(&bytes)));
    ensure!(answer.trim() == expected, "the service answered {answer:?} instead of {expected:?}");
    Ok(())
}

async fn theirs_first(connect: &str) -> anyhow::Result<()> {
    let key = key();
    let mut socket = begin(connect, &format!("first {key}")).await?;
    let mut answer = String::new();
    timeout(PATIENCE, socket.read_to_string(&mut answer)).await??;
    ensure!(answer == "done\n", "the service said {answer:?}");
    socket.write_all(&vec![b'y'; BYTES]).await?;
    socket.shutdown().await?;
    let note = ask(connect, &key).await?;
    ensure!(note == format!("{BYTES} eof"), "the service noted {note:?}");
    Ok(())
}

async fn their_reset(connect: &str) -> anyhow::Result<usize> {
    let mut socket = begin(connect, "reset 1000").await?;
    let (mut got, mut buffer) = (0, vec![0; 4096]);
    loop {
        match timeout(PATIENCE, socket.read(&mut buffer)).await? {
            Ok(0) => anyhow::bail!("a clean end after {got} bytes"),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(got),
            Err(e) => anyhow::bail!("{e} after {got} bytes"),
        }
    }
}

async fn our_reset(connect: &str) -> anyhow::Result<String> {
    let key = key();
    let mut socket = begin(connect, &format!("sink {key}")).await?;
    socket.write_all(&[b'z'; 1000]).await?;
    // A reset may overtake bytes, so the first ones must be there before it goes.
    timeout(PATIENCE, socket.read_exact(&mut [0; 4])).await??;
    socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
    drop(socket);
    let note = ask(connect, &key).await?;
    ensure!(note.contains("error"), "the service noted {note:?}, as if the stream had ended well");
    Ok(note)
}

async fn ask(connect: &str, key: &str) -> anyhow::Result<String> {
    let mut socket = begin(connect, &format!("ask {key}")).await?;
    let mut answer = String::new();
    timeout(PATIENCE, socket.read_to_string(&mut answer)).await??;
    Ok(answer.trim().to_owned())
}

fn key() -> String {
    format!("{:016x}", rand::random::<u64>())
}
