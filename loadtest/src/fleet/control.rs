//! A replica of `mesh-control`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Context;
use proto::join::JoinLine;
use rustix::process::Signal;

use super::{
    process::{Process, program},
    way::Way,
};
use crate::tools::ports;

/// A replica that runs, or ran.
#[derive(Debug)]
pub(crate) struct Control {
    /// Where its API is.
    pub(crate) api: SocketAddr,
    /// Where its metrics are.
    pub(crate) admin: SocketAddr,
    /// Its way to the database, if that is PostgreSQL.
    pub(crate) database: Option<Way>,
    name: String,
    folder: PathBuf,
    process: Process,
}

impl Control {
    /// Starts replica `number`, with SQLite or a way to PostgreSQL. All replicas have the CA of the first.
    pub(crate) fn start(number: usize, database: Option<Way>, folder: &Path) -> anyhow::Result<Self> {
        let name = format!("control-{}", number + 1);
        let ports = ports::free(2)?;
        let [api, admin] = [ports[0], ports[1]].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let mut config = format!(
            "name = '{name}'\nlisten = '{api}'\nadmin = '{admin}'\npublic = ['{api}']\ndata_dir = '{}'\ntrust_domain = 'fleet.test'\n",
            folder.join(&name).display(),
        );
        if let Some(way) = &database {
            config += &format!("database = 'postgres://postgres@127.0.0.1:{}/postgres'\n", way.port);
        }
        if number > 0 {
            let first = folder.join("control-1");
            let [cert, key] = ["ca.pem", "ca.key"].map(|file| first.join(file));
            config += &format!("[ca]\ncert = '{}'\nkey = '{}'\n", cert.display(), key.display());
        }
        std::fs::write(folder.join(format!("{name}.toml")), config)?;
        let process = launch(&name, folder)?;
        Ok(Self { api, admin, database, name, folder: folder.to_owned(), process })
    }

    /// The first administrator's join line, good once.
    pub(crate) fn admin_line(&self) -> anyhow::Result<JoinLine> {
        let path = self.folder.join(&self.name).join("admin.join");
        Ok(std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?.parse()?)
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Ends it without asking.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().await
    }

    /// Starts it again after it has ended.
    pub(crate) fn restart(&mut self) -> anyhow::Result<()> {
        self.process = launch(&self.name, &self.folder)?;
        Ok(())
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

fn launch(name: &str, folder: &Path) -> anyhow::Result<Process> {
    let mut command = program("mesh-control")?;
    command.arg("--config").arg(folder.join(format!("{name}.toml")));
    Process::start(name, command, folder)
}
