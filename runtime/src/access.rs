//! The access record: every stream leaves one when it ends, as a line of JSON.

use std::{fs, io, path::PathBuf};

use proto::audit::AccessRecord;
use serde::Deserialize;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, BufWriter},
    sync::mpsc,
};

use crate::{audit::AuditQueue, clock, shutdown::Tasks, splice::Broken};

/// Records that wait to be written. A stream that ends while it is full waits for room before its task ends; no live
/// stream does.
const QUEUE: usize = 4096;

/// Notes in a record how its splice ended.
#[must_use]
pub fn ended(record: AccessRecord, result: &Result<(), Broken>) -> AccessRecord {
    match result {
        Ok(()) => record,
        Err(broken) => record.reset(broken.code, &broken.detail),
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
