//! Somebody who types at a steady pace into a session that echoes what is typed, as `ssh -tt host 'echo ready; exec cat'`
//! does, and looks when each character appears.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Instant, sleep_until, timeout},
};

use super::figures::Times;
use crate::say;

/// How long the session may take to say `ready`, and, at the end, the last character to appear.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is typed. A terminal shows it as it is.
const KEY: u8 = b'x';

/// How to type.
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    /// For how long
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// From one keystroke to the next, in seconds
    #[arg(long, default_value_t = 0.2)]
    every: f64,
    /// What opens the session: it says `ready` first, and echoes from then on
    #[arg(required = true, last = true)]
    session: Vec<String>,
}

/// Types, and prints the times.
///
/// # Errors
/// If the session cannot be opened, ends, or shows something else.
pub(crate) async fn run(args: KeysArgs) -> anyhow::Result<()> {
    let [program, arguments @ ..] = args.session.as_slice() else { bail!("no command") };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let (input, output) = pipes(&mut child)?;
    let mut output = BufReader::new(output);
    timeout(PATIENCE, ready(&mut output)).await.context("the session did not say ready in time")??;
    let (began, every) = (Instant::now(), Duration::from_secs_f64(args.every.max(0.001)));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few thousand keys")]
    let count = (args.seconds.max(0.0) / every.as_secs_f64()) as u32;
    ensure!(count > 0, "not a single keystroke fits into the time");
    // A key is due when it is due, however long the one before takes: nobody waits for echoes with typing.
    let seen = timeout(every * count + PATIENCE, async {
        tokio::try_join!(types(input, began, every, count), sees(&mut output, began, every, count))
    });
    let (_input, times) = seen.await.context("the last character did not appear in time")??;
    say(times)?;
    Ok(child.kill().await?)
}

fn pipes(child: &mut Child) -> anyhow::Result<(ChildStdin, ChildStdout)> {
    child.stdin.take().zip(child.stdout.take()).context("the session has no pipes")
}

async fn ready(output: &mut BufReader<ChildStdout>) -> anyhow::Result<()> {
    let mut line = String::new();
    while !line.trim_end().ends_with("ready") {
        line.clear();
        ensure!(output.read_line(&mut line).await? > 0, "the session ended before it said ready");
    }
    Ok(())
}

async fn types(mut input: ChildStdin, began: Instant, every: Duration, count: u32) -> anyhow::Result<ChildStdin> {
    for number in 0..count {
        sleep_until(began + every * number).await;
        input.write_all(&[KEY]).await?;
    }
    // Closing it would end the session before the last character is back.
    Ok(input)
}

async fn sees(
    output: &mut BufReader<ChildStdout>,
    began: Instant,
    every: Duration,
    count: u32,
) -> anyhow::Result<Times> {
    let (mut times, mut seen, mut room) = (Times::default(), 0, [0; 256]);
    while seen < count {
        let size = output.read(&mut room).await?;
        ensure!(size > 0, "the session ended after {seen} characters");
        for character in &room[..size] {
            ensure!(*character == KEY, "the session shows {:?}", char::from(*character));
            times.add(Instant::now() - (began + every * seen));
            seen += 1;
        }
    }
    Ok(times)
}
