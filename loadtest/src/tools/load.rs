//! Load on a mesh, through one of its doors, with what came of it.

use std::{io, time::Duration};

use anyhow::{Context, ensure};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{
    check::begin,
    figures::{Times, hex, rate},
};
use crate::say;

/// Longest time that one small echo may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of one message of [`latency`] and [`streams`].
const MESSAGE: usize = 100;
/// Read and written at once.
const BLOCK: usize = 64 * 1024;

/// Sends random bytes, half-closes, reads until the end, and compares hashes.
pub(crate) async fn echo(connect: &str, bytes: u64, word: Option<&str>) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut socket = match word {
        Some(word) => begin(connect, word).await?,
        None => TcpStream::connect(connect).await.with_context(|| format!("cannot connect to {connect}"))?,
    };
    let (mut read, mut write) = socket.split();
    let sending = async {
        let (mut random, mut hash) = (SmallRng::from_rng(&mut rand::rng()), Sha256::new());
        let (mut block, mut left) = (vec![0; BLOCK], bytes);
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
            random.fill_bytes(&mut block[..n]);
            hash.update(&block[..n]);
            write.write_all(&block[..n]).await?;
            left -= n as u64;
        }
        write.shutdown().await?;
        io::Result::Ok(hash.finalize())
    };
    let receiving = async {
        let (mut hash, mut buffer, mut count) = (Sha256::new(), vec![0; BLOCK], 0u64);
        let (mut last, mut pause) = (Instant::now(), Duration::ZERO);
        loop {
            match read.read(&mut buffer).await? {
                0 => return io::Result::Ok((hash.finalize(), count, pause)),
                n => {
                    if count > 0 {
                        pause = pause.max(last.elapsed());
                    }
                    last = Instant::now();
                    hash.update(&buffer[..n]);
                    count += n as u64;
                }
            }
        }
    };
    let (sent, (received, count, pause)) = tokio::try_join!(sending, receiving)?;
    let took = began.elapsed();
    ensure!(count == bytes, "sent {bytes} bytes and got {count} back");
    ensure!(sent == received, "the bytes that came back are others: {} and {}", hex(&sent), hex(&received));
    let (seconds, rate) = (took.as_secs_f64(), rate(bytes, took));
    Ok(say(format_args!(
        "bytes={bytes} seconds={seconds:.2} mb_s={rate:.2} pause_ms={} sha256={}",
        pause.as_millis(),
        hex(&sent)
    ))?)
}

/// Opens `count` connections, and when all of them are open, has each echo `rounds` messages at once with the others.
pub(crate) async fn streams(connect: &str, count: usize, rounds: usize) -> anyhow::Result<()> {
    let (mut opening, mut opened) = (Times::default(), Vec::with_capacity(count));
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let connect = connect.to_owned();
        tasks.spawn(async move {
            let began = Instant::now();
            let mut socket = begin(&connect, "echo").await?;
            echo_once(&mut socket).await?;
            anyhow::Ok((socket, began.elapsed()))
        });
    }
    while let Some(done) = tasks.join_next().await {
        let (socket, took) = done??;
        opening.add(took);
        opened.push(socket);
    }
    let all_open = began.elapsed();
    let (mut times, mut tasks) = (Times::default(), JoinSet::new());
    for mut socket in opened {
        tasks.spawn(async move {
            let mut times = Times::default();
            for _ in 0..rounds {
                times.add(echo_once(&mut socket).await?);
            }
            anyhow::Ok((socket, times))
        });
    }
    let mut still_open = Vec::with_capacity(count);
    while let Some(done) = tasks.join_next().await {
        let (socket, some) = done??;
        times.merge(some);
        still_open.push(socket);
    }
    say(format_args!("open={} all_open_s={:.2} opening: {opening}", still_open.len(), all_open.as_secs_f64()))?;
    Ok(say(format_args!("echo: {times}"))?)
}

/// Echoes one message after the other and prints the times.
pub(crate) async fn latency(connect: &str, span: Duration, every: Duration, fresh: bool) -> anyhow::Result<()> {
    let mut times = Times::default();
    let until = Instant::now() + span;
    let mut kept = None;
    while Instant::now() < until {
        let began = Instant::now();
        let mut socket = match kept.take() {
            Some(socket) => socket,
            None => begin(connect, "echo").await?,
        };
        echo_once(&mut socket).await?;
        times.add(began.elapsed());
        if !fresh {
            kept = Some(socket);
        }
        tokio::time::sleep(every).await;
    }
    Ok(say(times)?)
}

/// Reads what a `source` sends until that ends, and says how, and for how long at most nothing came.
pub(crate) async fn pull(connect: &str, bytes: u64) -> anyhow::Result<()> {
    let mut socket = begin(connect, &format!("source {bytes}")).await?;
    let (mut buffer, mut got, began) = (vec![0; BLOCK], 0u64, Instant::now());
    let (mut last, mut pause) = (None::<Instant>, Duration::ZERO);
    let end = loop {
        match socket.read(&mut buffer).await {
            Ok(0) => break "eof".to_owned(),
            Ok(n) => {
                if got == 0 {
                    say("flowing")?;
                }
                got += n as u64;
                let now = Instant::now();
                pause = pause.max(last.replace(now).map_or(Duration::ZERO, |last| now - last));
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break "reset".to_owned(),
            Err(e) => break format!("{:?}", e.kind()),
        }
    };
    let took = began.elapsed();
    let pause = pause.as_millis();
    Ok(say(format_args!("bytes={got} mb_s={:.0} pause_ms={pause} end={end}", rate(got, took)))?)
}

async fn echo_once(socket: &mut TcpStream) -> anyhow::Result<Duration> {
    let (message, mut answer) = ([rand::random(); MESSAGE], [0; MESSAGE]);
    let began = Instant::now();
    socket.write_all(&message).await?;
    timeout(PATIENCE, socket.read_exact(&mut answer)).await.context("no echo")??;
    ensure!(answer == message, "another message came back");
    Ok(began.elapsed())
}
