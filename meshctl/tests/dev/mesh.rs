//! A mesh to test against, and ways to run `meshctl` in it.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::OnceLock,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::{Instant, timeout},
};

/// How long anything may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A running `meshctl dev`. It ends with this process, since its standard input does.
pub(crate) struct Mesh {
    pub(crate) process: std::process::Child,
    pub(crate) addresses: Value,
}

/// What a finished command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: Option<i32>,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Checks the status and what must stand on standard error.
    #[track_caller]
    pub(crate) fn failed(&self, status: i32, with: &str) {
        assert!(self.status == Some(status) && self.err.contains(with), "wanted {status} and {with:?}: {self:?}");
    }

    #[track_caller]
    pub(crate) fn done(self) -> Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }
}

impl Mesh {
    /// Starts one.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// Starts one with further arguments.
    pub(crate) fn with(further: &[&str]) -> Self {
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_meshctl"))
            .args(["dev", "--json", "--free-ports", "--until-eof"])
            .args(further)
            .env_remove("CAUSEWAY_HOME")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let addresses = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        Self { process, addresses }
    }

    /// The one that most tests share.
    pub(crate) fn shared() -> &'static Self {
        static MESH: OnceLock<Mesh> = OnceLock::new();
        MESH.get_or_init(Self::start)
    }

    /// The administrator's home.
    pub(crate) fn home(&self) -> PathBuf {
        self.addresses["home"].as_str().unwrap().into()
    }

    pub(crate) fn address(&self, pointer: &str) -> SocketAddr {
        self.addresses.pointer(pointer).unwrap().as_str().unwrap().parse().unwrap()
    }

    /// Runs a command as administrator.
    pub(crate) async fn run(&self, line: &str) -> Said {
        run(&self.home(), line, b"").await
    }

    /// Lets somebody log in. Returns their home.
    pub(crate) async fn login(&self, name: &str) -> TempDir {
        let join = self.run(&format!("token create --user {name}")).await.done();
        let home = tempfile::tempdir().unwrap();
        run(home.path(), "login", &join.out).await.done();
        home
    }
}

/// A `meshctl` that is about to start, with a home and words separated by spaces.
pub(crate) fn command(home: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshctl"));
    command
        .args(line.split_whitespace())
        .env("CAUSEWAY_HOME", home)
        .env_remove("CAUSEWAY_JOIN")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs a command to its end.
pub(crate) async fn run(home: &Path, line: &str, input: &[u8]) -> Said {
    finish(command(home, line).spawn().unwrap(), input).await
}

/// Gives a process its input, ends that, and waits for the process.
pub(crate) async fn finish(mut child: Child, input: &[u8]) -> Said {
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A process that has ended wants no input.
            let _ = stdin.write_all(input).await;
        }
    };
    let whole = async { tokio::join!(feed, child.wait_with_output()).1.unwrap() };
    let output = timeout(DEADLINE, whole).await.expect("the command did not end in time");
    Said { status: output.status.code(), out: output.stdout, err: String::from_utf8(output.stderr).unwrap() }
}

/// Reads from a pipe until what came has the text.
pub(crate) async fn read_until(pipe: &mut (impl AsyncReadExt + Unpin), text: &str) -> String {
    let mut all = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&all).contains(text) {
            assert_ne!(pipe.read_buf(&mut all).await.unwrap(), 0, "ended with {:?}", String::from_utf8_lossy(&all));
        }
    };
    timeout(DEADLINE, read).await.expect("the text did not come in time");
    String::from_utf8(all).unwrap()
}

/// Runs a command again until it says what it should.
pub(crate) async fn eventually(home: &Path, line: &str, wanted: impl Fn(&Said) -> bool) -> Said {
    let begun = Instant::now();
    loop {
        let said = run(home, line, b"").await;
        if wanted(&said) {
            return said;
        }
        assert!(begun.elapsed() < DEADLINE, "{line}: still {said:?}");
    }
}

/// Sends a signal.
pub(crate) fn signal(process: u32, name: impl AsRef<OsStr>) {
    let status = std::process::Command::new("kill").arg("-s").arg(name).arg(process.to_string()).status().unwrap();
    assert!(status.success());
}
