//! Child processes: started with a log of their own, ended by their id, whatever becomes of us.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

/// How long a process may take to end after it was asked to, before it is ended without asking.
const PATIENCE: Duration = Duration::from_secs(3);

/// A child. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts it. What it says goes to `NAME.log` in the folder; it hears nothing.
    pub(crate) fn start(name: &str, mut command: Command, folder: &Path) -> anyhow::Result<Self> {
        let log = log(name, folder)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Self::spawn(name, command)
    }

    /// Starts one that is talked with over its standard input and output.
    pub(crate) fn start_talking(name: &str, mut command: Command, folder: &Path) -> anyhow::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log(name, folder)?);
        Self::spawn(name, command)
    }

    fn spawn(name: &str, mut command: Command) -> anyhow::Result<Self> {
        let program = command.as_std().get_program().to_owned();
        let child =
            command.kill_on_drop(true).spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { name: name.to_owned(), child })
    }

    /// What the child hears and says; once.
    pub(crate) fn talk(&mut self) -> anyhow::Result<(ChildStdin, ChildStdout)> {
        let ends = self.child.stdin.take().zip(self.child.stdout.take());
        ends.with_context(|| format!("nobody talks with {}", self.name))
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let id = id.with_context(|| format!("{} has ended already", self.name))?;
        kill_process(id, signal).with_context(|| format!("cannot send a signal to {}", self.name))
    }

    /// An error if it has ended by itself.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself: {status}", self.name),
        }
    }

    /// Ends it without asking, as a machine does that loses power.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }

    /// Asks it to end, and waits until it has; an error if it takes longer than the deadline.
    pub(crate) async fn stop(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        match timeout(deadline, self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => bail!("{} did not end within {} s of SIGTERM", self.name, deadline.as_secs()),
        }
    }

    /// Sees to it that it ends, and waits for that.
    pub(crate) async fn end(&mut self) {
        // Who was stopped hears nothing else.
        let _ = self.signal(Signal::CONT);
        if self.stop(PATIENCE).await.is_err() {
            // It has ended, or does now.
            let _ = self.child.kill().await;
        }
    }

    /// The most memory that was ever resident, in MiB.
    pub(crate) fn peak_mib(&self) -> anyhow::Result<f64> {
        let id = self.child.id().with_context(|| format!("{} has ended", self.name))?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("the system does not tell VmHWM")?;
        let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib / 1024.0)
    }

    /// Processor time that it has used, in seconds.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds(self.child.id()?)
    }
}

/// Processor time that a process has used, in seconds.
pub(crate) fn cpu_seconds(id: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // After the name, which is in parentheses: user and system time are the 12th and 13th word, in 1/100 s.
    let mut words = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((user + system) / 100.0)
}

fn log(name: &str, folder: &Path) -> anyhow::Result<File> {
    let path = folder.join(format!("{name}.log"));
    File::options().create(true).append(true).open(&path).with_context(|| format!("cannot write {}", path.display()))
}

/// One of our programs, with an environment that holds nothing of ours.
pub(crate) fn program(name: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(find(name)?);
    command.env_clear();
    for kept in ["PATH", "HOME", "TMPDIR", "LANG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    Ok(command)
}

/// Beside this program, or where cargo builds.
fn find(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program does not know where it is")?;
    let beside = own.parent().map(|folder| folder.join(name));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let places: Vec<_> =
        beside.into_iter().chain(["release", "debug"].map(|profile| target.join(profile).join(name))).collect();
    places.iter().find(|path| path.is_file()).cloned().with_context(|| {
        let looked: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        format!(
            "there is no {name} (looked for {}); build it with 'cargo build -p control -p mesh-cloud -p loadtest'",
            looked.join(", ")
        )
    })
}
