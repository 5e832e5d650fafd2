//! A PostgreSQL of our own, below a folder, without a wish to survive.

use std::{
    os::unix::fs::chown,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use runtime::shutdown::Tasks;
use rustix::process::Signal;
use tokio::{process::Command, time::sleep};

use super::{process::Process, way::Way};
use crate::tools::ports;

/// A server that runs.
#[derive(Debug)]
pub(crate) struct Postgres {
    port: u16,
    bin: PathBuf,
    folder: PathBuf,
    owner: Option<(u32, u32)>,
    process: Process,
}

impl Postgres {
    /// Makes a database in the folder and starts the server; PostgreSQL refuses to be root, so root makes it be
    /// `postgres`.
    pub(crate) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let bin = server_programs()?;
        let data = folder.join("postgres");
        std::fs::create_dir(&data)?;
        let owner = if rustix::process::geteuid().is_root() { Some(account("postgres")?) } else { None };
        if let Some((user, group)) = owner {
            chown(&data, Some(user), Some(group))?;
        }
        let mut initdb = as_owner(Command::new(bin.join("initdb")), owner, &data);
        initdb.arg("-D").arg(data.join("data"));
        initdb.args(["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
        let made = initdb.output().await?;
        ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = ports::free(1)?[0];
        let mut server = as_owner(Command::new(bin.join("postgres")), owner, &data);
        server.arg("-D").arg(data.join("data")).arg("-k").arg(&data).args(["-p", &port.to_string()]);
        for set in ["listen_addresses=127.0.0.1", "fsync=off", "full_page_writes=off", "synchronous_commit=off"] {
            server.args(["-c", set]);
        }
        let process = Process::start("postgres", server, folder)?;
        let mut this = Self { port, bin, folder: data, owner, process };
        for _ in 0..200 {
            this.process.check()?;
            if this.sql("select 1").await.is_ok() {
                return Ok(this);
            }
            sleep(Duration::from_millis(50)).await;
        }
        bail!("PostgreSQL did not start within 10 s")
    }

    /// A way to it that can be cut.
    pub(crate) async fn way(&self, tasks: &Tasks) -> anyhow::Result<Way> {
        Way::to(self.port, tasks).await
    }

    /// Has it do something.
    pub(crate) async fn sql(&self, statement: &str) -> anyhow::Result<()> {
        let mut psql = as_owner(Command::new(self.bin.join("psql")), self.owner, &self.folder);
        psql.arg("-h").arg(&self.folder).args(["-p", &self.port.to_string(), "-U", "postgres", "-X", "-q", "-c"]);
        let done = psql.arg(statement).output().await?;
        ensure!(done.status.success(), "psql: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// Lets it be written, or not, in sessions that are open as well.
    pub(crate) async fn read_only(&self, on: bool) -> anyhow::Result<()> {
        let on = if on { "on" } else { "off" };
        self.sql(&format!("alter system set default_transaction_read_only = {on}")).await?;
        self.sql("select pg_reload_conf()").await
    }

    /// Ends it.
    pub(crate) async fn end(&mut self) {
        // At once, without waiting for its clients.
        let _ = self.process.signal(Signal::QUIT);
        self.process.end().await;
    }
}

fn as_owner(mut command: Command, owner: Option<(u32, u32)>, folder: &Path) -> Command {
    command.current_dir(folder).env("LC_ALL", "C").kill_on_drop(true);
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
    command
}

/// The folder of the newest server's programs, as Debian has them, or where the path leads.
fn server_programs() -> anyhow::Result<PathBuf> {
    let mut found: Vec<PathBuf> = match std::fs::read_dir("/usr/lib/postgresql") {
        Ok(versions) => versions.filter_map(|v| Some(v.ok()?.path().join("bin"))).collect(),
        Err(_) => Vec::new(),
    };
    found.sort_by_key(|bin| bin.parent().and_then(|v| v.file_name()?.to_str()?.parse::<u32>().ok()));
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    found
        .into_iter()
        .rev()
        .find(|bin| bin.join("initdb").is_file() && bin.join("psql").is_file())
        .context("there is no PostgreSQL server here; on Debian: apt-get install postgresql")
}

/// Numbers of a user and its group.
fn account(name: &str) -> anyhow::Result<(u32, u32)> {
    let accounts = std::fs::read_to_string("/etc/passwd")?;
    let line = accounts.lines().find(|line| line.split(':').next() == Some(name));
    let mut fields = line.with_context(|| format!("there is no user {name}"))?.split(':').skip(2);
    let (user, group) = fields.next().zip(fields.next()).with_context(|| format!("user {name} has no number"))?;
    Ok((user.parse()?, group.parse()?))
}
