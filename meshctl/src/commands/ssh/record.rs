//! What a person sees of an SSH session, written down as it comes: asciicast, version 2, which asciinema and others play.
//!
//! It is done here and nowhere else, since between here and the edge's sshd nobody can read along. ssh keeps the terminal
//! for what is typed, and its output comes through a pipe. What is typed is not written down, and neither are passwords
//! that ssh asks for: it asks at the terminal itself.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Stdio,
    time::Duration,
};

use runtime::clock::unix_now;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    signal::unix::{SignalKind, signal},
    time::Instant,
};

use crate::failure::Failure;

/// Size of a read in bytes.
const READ: usize = 16 * 1024;
/// A terminal's columns and rows where there is none.
const USUAL: (u16, u16) = (80, 24);

/// A recording that is being written. Each event goes to the file at once, so that little is missing after a crash.
struct Recording<W> {
    file: W,
    begun: Instant,
    /// The beginning of a character whose end has not come.
    half: Vec<u8>,
}

impl<W: Write> Recording<W> {
    fn begin(mut file: W, command: &str, size: (u16, u16)) -> io::Result<Self> {
        let term = std::env::var("TERM").unwrap_or_default();
        let header = json!({
            "version": 2,
            "width": size.0,
            "height": size.1,
            "timestamp": unix_now(),
            "command": command,
            "env": { "TERM": term },
        });
        writeln!(file, "{header}")?;
        Ok(Self { file, begun: Instant::now(), half: Vec::new() })
    }

    fn output(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.half.extend_from_slice(bytes);
        let whole = whole_characters(&self.half);
        let text = String::from_utf8_lossy(&self.half[..whole]).into_owned();
        self.half.drain(..whole);
        if text.is_empty() { Ok(()) } else { self.event("o", &text) }
    }

    fn resized(&mut self, (columns, rows): (u16, u16)) -> io::Result<()> {
        self.event("r", &format!("{columns}x{rows}"))
    }

    fn event(&mut self, kind: &str, data: &str) -> io::Result<()> {
        let at = micros(self.begun.elapsed());
        writeln!(self.file, "[{at}, {}, {}]", json!(kind), json!(data))
    }

    fn end(mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.half);
        if !rest.is_empty() {
            self.event("o", &String::from_utf8_lossy(&rest))?;
        }
        self.file.flush()
    }
}

/// Seconds, with six digits behind the point.
fn micros(span: Duration) -> String {
    format!("{}.{:06}", span.as_secs(), span.subsec_micros())
}

/// How many bytes there are before a last character that is cut off.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Ok(_) => bytes.len(),
        // No length: it may become a character yet.
        Err(e) if e.error_len().is_none() => e.valid_up_to(),
        // Something that is none; whatever is cut off behind it comes at most three bytes before the end.
        Err(_) => {
            let tail = bytes.len().saturating_sub(3);
            let cut = (tail..bytes.len()).find(|&i| {
                bytes[i] >= 0xc0 && std::str::from_utf8(&bytes[i..]).is_err_and(|e| e.error_len().is_none())
            });
            cut.unwrap_or(bytes.len())
        }
    }
}

fn terminal_size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(io::stdin());
    size.ok().filter(|s| s.ws_col > 0 && s.ws_row > 0).map_or(USUAL, |s| (s.ws_col, s.ws_row))
}

/// Runs ssh and records what it shows. Returns its exit status.
///
/// # Errors
/// If the file is there already or cannot be written, or ssh cannot be started.
pub(super) async fn run(mut ssh: Command, path: &Path, what: &str) -> Result<u8, Failure> {
    let failed = |e: &io::Error| Failure::Failed(format!("cannot write the recording {}: {e}", path.display()));
    let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(|e| failed(&e))?;
    let mut recording = Recording::begin(file, what, terminal_size()).map_err(|e| failed(&e))?;
    let mut child = ssh.stdout(Stdio::piped()).kill_on_drop(true).spawn().map_err(|e| super::not_started(&e))?;
    let mut shown = child.stdout.take().ok_or_else(|| Failure::Failed("ssh has no output".into()))?;
    let mut resizes = signal(SignalKind::window_change())?;
    let mut stdout = tokio::io::stdout();
    let mut buffer = vec![0; READ];
    loop {
        tokio::select! {
            biased;
            Some(()) = resizes.recv() => recording.resized(terminal_size()).map_err(|e| failed(&e))?,
            read = shown.read(&mut buffer) => match read? {
                0 => break,
                read => {
                    recording.output(&buffer[..read]).map_err(|e| failed(&e))?;
                    stdout.write_all(&buffer[..read]).await?;
                    stdout.flush().await?;
                }
            }
        }
    }
    let status = child.wait().await?;
    recording.end().map_err(|e| failed(&e))?;
    // As a shell has it, where a signal ended ssh.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_recording_has_a_header_and_an_event_for_each_output() {
        let mut file = Vec::new();
        let mut recording = Recording::begin(&mut file, "ssh shop-1", (100, 30)).unwrap();
        recording.output(b"a\x1b[1m\"").unwrap();
        tokio::time::advance(Duration::from_millis(1500)).await;
        // A character that comes in two pieces, and something that is none.
        recording.output(b"\xc3").unwrap();
        recording.output(b"\xbc\xff").unwrap();
        recording.resized((80, 24)).unwrap();
        recording.end().unwrap();
        let text = String::from_utf8(file).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&lines[0]["version"], &lines[0]["width"], &lines[0]["height"]),
            (&json!(2), &json!(100), &json!(30))
        );
        assert_eq!(lines[1], json!([0.0, "o", "a\u{1b}[1m\""]));
        assert_eq!(lines[2], json!([1.5, "o", "ü\u{fffd}"]));
        assert_eq!(lines[3], json!([1.5, "r", "80x24"]));
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn what_is_cut_off_waits_for_its_end() {
        for (bytes, whole) in [
            (&b"abc"[..], 3),
            (b"ab\xc3", 2),
            (b"\xe2\x82", 0),
            (b"\xf0\x9f\x98", 0),
            (b"\xff\xc3", 1),
            (b"\xff\xff", 2),
            (b"\xffa\xf0\x9f\x98", 2),
        ] {
            assert_eq!(whole_characters(bytes), whole, "{bytes:x?}");
        }
    }
}
