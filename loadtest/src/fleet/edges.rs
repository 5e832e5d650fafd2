//! A process with many edges: this very program, as `mesh-loadtest edges`.

use std::path::Path;

use proto::{id::EdgeId, join::JoinLine};
use runtime::shutdown::Tasks;
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{ChildStdin, Command},
    sync::{mpsc, watch},
};

use super::process::Process;

/// A process that runs.
#[derive(Debug)]
pub(crate) struct Edges {
    process: Process,
    /// It ends when this does.
    _input: ChildStdin,
    connected: watch::Receiver<usize>,
}

impl Edges {
    /// Starts it with these edges. Later on, an edge that has a new tunnel goes into `up`, as long
    /// as there is room.
    pub(crate) fn start(
        name: &str,
        edges: &[EdgeId],
        line: &JoinLine,
        up: mpsc::Sender<EdgeId>,
        (folder, tasks): (&Path, &Tasks),
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let names = folder.join(format!("{name}.names"));
        std::fs::write(&names, edges.iter().map(|edge| format!("{edge}\n")).collect::<String>())?;
        command.args(["edges", "--follow", "--names"]).arg(names);
        command.env("CAUSEWAY_JOIN", line.reveal());
        // Each socket has 3 MiB of room for what arrives at once, hardly any of which is ever touched; glibc would soon
        // give it memory that was used before, and clear it. With this it stays address space.
        command.env("MALLOC_MMAP_THRESHOLD_", "131072");
        let mut process = Process::start_talking(name, command, folder)?;
        let (input, output) = process.talk()?;
        let (sender, connected) = watch::channel(0);
        tasks.spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(Ok(edge)) = line.strip_prefix("up=").map(str::parse) {
                    // Without room nobody listens.
                    let _ = up.try_send(edge);
                }
                let count = line.strip_prefix("connected=").and_then(|rest| rest.split(' ').next()?.parse().ok());
                if let Some(count) = count {
                    sender.send_replace(count);
                }
            }
            sender.send_replace(0);
        });
        Ok(Self { process, _input: input, connected })
    }

    /// How many say that they are connected.
    pub(crate) fn connected(&self) -> usize {
        *self.connected.borrow()
    }

    /// An error if it has ended by itself.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.process.check()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Processor time in seconds.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        self.process.cpu_seconds()
    }

    /// Ends it.
    pub(crate) async fn end(&mut self) {
        self.process.end().await;
    }
}
