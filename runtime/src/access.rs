//! The access record: every stream leaves one when it ends, as a line of JSON.

use std::{fs, io, path::PathBuf, time::Duration};

use proto::{code::RefuseCode, principal::Principal};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, BufWriter},
    sync::mpsc,
};

use crate::{audit::AuditQueue, clock, shutdown::Tasks, splice::Broken};

/// Records that wait to be written. A stream that ends while it is full waits for room before its task ends; no live
/// stream does.
const QUEUE: usize = 4096;

/// One stream, after its end.
#[derive(Clone, Debug, Serialize)]
pub struct AccessRecord {
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who asked, as policy writes it: `user/alice`.
    pub who: String,
    /// From where.
    pub from: String,
    /// The door, or `link` for a stream that came through a tunnel.
    pub door: String,
    /// The shard that wrote the record, or at an edge the shard that the stream came from.
    pub shard: String,
    /// The shard that holds the edge's tunnel, if it is another one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub holder: String,
    /// The edge that served.
    pub edge: String,
    /// What carries its tunnel, `quic` or `tcp`, where the tunnel ends here.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub carrier: String,
    /// What was asked for.
    pub target: String,
    /// What the edge dialled.
    pub address: String,
    /// The rule that allowed it.
    pub rule: String,
    /// Bytes towards the target.
    pub up: u64,
    /// Bytes from the target.
    pub down: u64,
    /// How long until the target was connected, in microseconds.
    pub open_us: u64,
    /// How long it lasted, in milliseconds.
    pub duration_ms: u64,
    /// `finished`, `reset`, `refused`, or `cancelled` by an opener that went away first.
    pub outcome: &'static str,
    /// The code of a reset or a refusal.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub code: &'static str,
    /// More on it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// W3C trace id, if there is one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub trace: String,
}

impl AccessRecord {
    /// A record that names the one who asked and what for; the rest is filled in as it becomes known.
    #[must_use]
    pub fn new(who: &Principal, target: &impl ToString) -> Self {
        Self {
            unix_ms: 0,
            who: who.to_string(),
            from: String::new(),
            door: String::new(),
            shard: String::new(),
            holder: String::new(),
            edge: String::new(),
            carrier: String::new(),
            target: target.to_string(),
            address: String::new(),
            rule: String::new(),
            up: 0,
            down: 0,
            open_us: 0,
            duration_ms: 0,
            outcome: "finished",
            code: "",
            detail: String::new(),
            trace: String::new(),
        }
    }

    /// Notes a refusal.
    #[must_use]
    pub fn refused(mut self, code: RefuseCode, reason: &str) -> Self {
        self.outcome = "refused";
        self.code = code.slug();
        reason.clone_into(&mut self.detail);
        self
    }

    /// Notes how a splice ended.
    #[must_use]
    pub fn ended(mut self, result: &Result<(), Broken>, lasted: Duration) -> Self {
        self.duration_ms = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
        if let Err(broken) = result {
            self.outcome = "reset";
            self.code = broken.code.slug();
            self.detail.clone_from(&broken.detail);
        }
        self
    }
}

/// Where access records go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// Standard output.
    #[default]
    Stdout,
    /// Nowhere.
    Off,
    /// A file, appended to.
    File(PathBuf),
}

/// Takes records.
#[derive(Clone, Debug)]
pub struct AccessWriter {
    log: Option<mpsc::Sender<AccessRecord>>,
    audit: Option<AuditQueue>,
}

impl AccessWriter {
    /// Opens the log and writes until every handle is dropped.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn start(log: &AccessLog, tasks: &Tasks) -> io::Result<Self> {
        let out: Box<dyn AsyncWrite + Send + Unpin> = match log {
            AccessLog::Off => return Ok(Self { log: None, audit: None }),
            AccessLog::Stdout => Box::new(tokio::io::stdout()),
            AccessLog::File(path) => {
                Box::new(tokio::fs::File::from_std(fs::OpenOptions::new().create(true).append(true).open(path)?))
            }
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        tasks.spawn(write(receiver, out));
        Ok(Self::to_channel(sender))
    }

    /// Hands records to somebody else, as tests do.
    #[must_use]
    pub const fn to_channel(sender: mpsc::Sender<AccessRecord>) -> Self {
        Self { log: Some(sender), audit: None }
    }

    /// Puts each record into this queue as well.
    #[must_use]
    pub fn and_audit(self, queue: AuditQueue) -> Self {
        Self { audit: Some(queue), ..self }
    }

    fn noted(&self, record: &mut AccessRecord) {
        record.unix_ms = clock::unix_millis();
        if let Some(audit) = &self.audit {
            audit.put(record);
        }
    }

    /// Writes a record, at the time of now.
    pub async fn write(&self, mut record: AccessRecord) {
        self.noted(&mut record);
        if let Some(sender) = &self.log {
            // The writer is gone only when the process ends.
            let _ = sender.send(record).await;
        }
    }
}

impl AccessWriter {
    /// Writes a record from where nobody can wait, such as a drop. Returns whether there was room for it.
    pub fn write_now(&self, mut record: AccessRecord) -> bool {
        self.noted(&mut record);
        self.log.as_ref().is_none_or(|sender| sender.try_send(record).is_ok())
    }
}

async fn write(mut records: mpsc::Receiver<AccessRecord>, out: Box<dyn AsyncWrite + Send + Unpin>) {
    let mut out = BufWriter::new(out);
    let mut broken = false;
    while let Some(record) = records.recv().await {
        let result = append(&mut out, &record).await;
        let flushed = if records.is_empty() { out.flush().await } else { Ok(()) };
        if let (Err(e), false) = (result.and(flushed), broken) {
            broken = true;
            tracing::error!(error = %e, "access records are lost: the log cannot be written");
        }
    }
}

async fn append(out: &mut (impl AsyncWrite + Unpin), record: &AccessRecord) -> io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    out.write_all(&line).await
}
