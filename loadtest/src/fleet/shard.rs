//! A `mesh-cloud`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::join::JoinLine;
use rustix::process::Signal;
use tokio::process::Command;

use super::{
    http::{self, Figures},
    process::{Process, program},
};
use crate::tools::ports;

/// A shard that runs, or ran.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Its name.
    pub(crate) name: String,
    /// Where edges and users dial it.
    pub(crate) mesh: SocketAddr,
    /// Where its metrics are.
    pub(crate) admin: SocketAddr,
    drain: Duration,
    folder: PathBuf,
    process: Process,
}

impl Shard {
    /// Starts it; it enrols first.
    pub(crate) fn start(
        name: &str,
        line: &JoinLine,
        controls: &[SocketAddr],
        (folder, drain): (&Path, Duration),
    ) -> anyhow::Result<Self> {
        let ports = ports::free(5)?;
        let at = |i: usize| SocketAddr::from(([127, 0, 0, 1], ports[i]));
        let (mesh, admin) = (at(0), at(1));
        let controls: Vec<_> = controls.iter().map(|address| format!("'{address}'")).collect();
        let config = format!(
            "data_dir = '{}'\nname = '{name}'\nlisten = '{mesh}'\nadvertise = ['{mesh}']\nadmin = '{admin}'\n\
             access = 'off'\ndrain_secs = {}\ncontrol = [{}]\n[doors]\nproxy = '{}'\nhttp = '{}'\nhttps = '{}'\n",
            folder.join(name).display(),
            drain.as_secs(),
            controls.join(", "),
            at(2),
            at(3),
            at(4),
        );
        std::fs::write(folder.join(format!("{name}.toml")), config)?;
        let mut command = command(name, folder)?;
        command.env("CAUSEWAY_JOIN", line.reveal());
        let process = Process::start(name, command, folder)?;
        Ok(Self { name: name.to_owned(), mesh, admin, drain, folder: folder.to_owned(), process })
    }

    /// What it counts.
    pub(crate) async fn figures(&self) -> anyhow::Result<Figures> {
        Figures::of(self.admin).await
    }

    /// Whether it says that it is ready.
    pub(crate) async fn is_ready(&self) -> bool {
        http::page(self.admin, "/readyz").await.is_ok()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Ends it without asking.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().await
    }

    /// Asks it to end, and waits until it has drained; an error if that takes clearly longer than it may.
    pub(crate) async fn stop(&mut self) -> anyhow::Result<()> {
        let status = self.process.stop(self.drain + Duration::from_secs(15)).await?;
        anyhow::ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// Starts it again after it has ended.
    pub(crate) fn restart(&mut self) -> anyhow::Result<()> {
        self.process = Process::start(&self.name, command(&self.name, &self.folder)?, &self.folder)?;
        Ok(())
    }

    /// The most memory that it ever had, in MiB.
    pub(crate) fn peak_mib(&self) -> anyhow::Result<f64> {
        self.process.peak_mib()
    }

    /// Processor time in seconds.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        self.process.cpu_seconds()
    }
}

fn command(name: &str, folder: &Path) -> anyhow::Result<Command> {
    let mut command = program("mesh-cloud")?;
    command.arg("--config").arg(folder.join(format!("{name}.toml")));
    Ok(command)
}
