//! What control keeps: tokens, edges, certificates, keys, rules, the ring, the leases and orders of shards. One SQL text for SQLite and PostgreSQL.
//!
//! Every transaction that changes what members may do begins in one place, `Store::begin`: it locks the one row of `meta`, counts its revision up,
//! and is told which sections of the watch it changes. So writers come one after the other, revisions are committed in
//! their order, and whoever polls the revision misses nothing. Every call has a deadline; an error never holds the
//! database's URL, because that may hold a password.

pub mod access;
pub mod book;
pub mod certificates;
pub mod edges;
pub mod hear;
pub mod open;
pub mod ring;
pub mod rules;
pub mod shards;
pub mod ssh;
pub mod tokens;

use std::{future::Future, str::FromStr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prometheus::IntCounter;
use proto::secret::Secret;
use sqlx::{Any, AnyPool, Row, any::AnyRow};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, timeout},
};

/// Longest time that one call may take, waiting for its turn included.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// A write that worked no longer ago than this proves that the database can be written.
const WRITE_PROOF: Duration = Duration::from_secs(10);

/// The database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It refused, or is not there.
    #[error("the database failed: {0}")]
    Database(#[from] sqlx::Error),
    /// It did not answer in time.
    #[error("the database did not answer within {} s", DEADLINE.as_secs())]
    Deadline,
    /// Others write, and the turn did not come in time.
    #[error("too many changes at once: the turn to write did not come within {} s", DEADLINE.as_secs())]
    Busy,
    /// Something in it is not what control writes.
    #[error("the database holds {what} that cannot be read: {why}")]
    Damaged {
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The URL is none of a database that is supported. It is not repeated here.
    #[error("{0}")]
    Url(&'static str),
    /// The schema could not be brought up to date.
    #[error("the database's schema cannot be brought up to date: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The database belongs to another mesh or another CA.
    #[error("{0}")]
    Foreign(String),
}

/// A part of the watch that the database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Rules.
    Policy,
    /// Revoked certificates.
    Revoked,
    /// Access tokens.
    Access,
    /// Edges that are enrolled.
    Edges,
    /// Keys for the SSH door.
    Ssh,
}

/// The revision, and at which one each section changed last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Revisions {
    /// Grows with each change.
    pub revision: i64,
    /// [`Section::Policy`].
    pub policy: i64,
    /// [`Section::Revoked`].
    pub revoked: i64,
    /// [`Section::Access`].
    pub access: i64,
    /// [`Section::Edges`].
    pub edges: i64,
    /// [`Section::Ssh`].
    pub ssh: i64,
}

/// The dialect, where one text is not enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// One process, one file.
    Sqlite,
    /// Any number of replicas.
    Postgres,
}

/// The database. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    pool: AnyPool,
    /// A few connections for those who follow: however many calls of the API queue for the others, what is in force and
    /// who leads is known in time.
    followers: AnyPool,
    /// The server, to hear of the commits of other replicas.
    url: Option<Secret>,
    dialect: Dialect,
    /// Writers of this process queue here, in their order. SQLite's own waiting is a lottery, and PostgreSQL's would
    /// hold a connection for each.
    turn: Arc<Semaphore>,
    committed: watch::Sender<i64>,
    written: Arc<Mutex<Written>>,
    errors: IntCounter,
}

#[derive(Clone, Copy, Debug, Default)]
struct Written {
    at: Option<Instant>,
    failed: bool,
}

/// A transaction that writes.
#[derive(Debug)]
pub struct Change {
    tx: sqlx::Transaction<'static, Any>,
    revision: i64,
    store: Store,
    _turn: OwnedSemaphorePermit,
}

impl Store {
    /// The dialect.
    #[must_use]
    pub const fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// The revision that this process committed last; other processes are seen by polling [`Store::revisions`].
    #[must_use]
    pub fn commits(&self) -> watch::Receiver<i64> {
        self.committed.subscribe()
    }

    /// The same database for those who follow it, with connections of their own.
    #[must_use]
    pub fn for_followers(&self) -> Self {
        Self { pool: self.followers.clone(), ..self.clone() }
    }

    /// Closes all connections, so that an SQLite file is left without a log beside it.
    pub async fn close(&self) {
        let closed = async { tokio::join!(self.pool.close(), self.followers.close()) };
        if timeout(DEADLINE, closed).await.is_err() {
            tracing::warn!("the database's connections did not close in time");
        }
    }

    /// The present revisions.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn revisions(&self) -> Result<Revisions, StoreError> {
        self.read(async {
            const SQL: &str =
                "SELECT revision, policy_at, revoked_at, access_at, edges_at, ssh_at FROM meta WHERE id = 1";
            let row = sqlx::query(SQL).fetch_one(&self.pool).await?;
            Ok(Revisions {
                revision: row.try_get(0)?,
                policy: row.try_get(1)?,
                revoked: row.try_get(2)?,
                access: row.try_get(3)?,
                edges: row.try_get(4)?,
                ssh: row.try_get(5)?,
            })
        })
        .await
    }

    /// Finds out whether the database can be written, by a write that changes nothing unless one worked just now.
    ///
    /// # Errors
    /// If it cannot.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let Written { at, failed } = *self.written.lock();
        if !failed && at.is_some_and(|at| at.elapsed() < WRITE_PROOF) {
            return Ok(());
        }
        let written = self
            .read(async {
                sqlx::query("UPDATE meta SET revision = revision WHERE id = 1").execute(&self.pool).await?;
                Ok(())
            })
            .await;
        self.wrote(written.is_ok());
        written
    }

    /// Begins a transaction that writes, once it is its turn.
    async fn begin(&self) -> Result<Change, StoreError> {
        let Ok(Ok(turn)) = timeout(DEADLINE, Arc::clone(&self.turn).acquire_owned()).await else {
            return Err(self.failed(StoreError::Busy));
        };
        let begun = self
            .read(async {
                let mut tx = match self.dialect {
                    // A transaction that reads first and then writes would fail at once when another process wrote in
                    // between, without waiting.
                    Dialect::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await?,
                    Dialect::Postgres => self.pool.begin().await?,
                };
                let row = sqlx::query("UPDATE meta SET revision = revision + 1 WHERE id = 1 RETURNING revision")
                    .fetch_one(&mut *tx)
                    .await?;
                Ok((tx, row.try_get(0)?))
            })
            .await;
        self.wrote(begun.is_ok());
        let (tx, revision) = begun?;
        Ok(Change { tx, revision, store: self.clone(), _turn: turn })
    }

    /// Runs a call with its deadline, and counts it if it fails.
    async fn read<T>(&self, call: impl Future<Output = Result<T, StoreError>> + Send) -> Result<T, StoreError> {
        match timeout(DEADLINE, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed(error)),
            Err(_) => Err(self.failed(StoreError::Deadline)),
        }
    }

    fn failed(&self, error: StoreError) -> StoreError {
        self.errors.inc();
        tracing::debug!(%error, "store call failed");
        error
    }

    fn wrote(&self, worked: bool) {
        let mut written = self.written.lock();
        written.failed = !worked;
        if worked {
            written.at = Some(Instant::now());
        }
    }
}

impl Change {
    /// Says that a section of the watch changes.
    async fn touch(&mut self, section: Section) -> Result<(), sqlx::Error> {
        let sql = match section {
            Section::Policy => "UPDATE meta SET policy_at = revision WHERE id = 1",
            Section::Revoked => "UPDATE meta SET revoked_at = revision WHERE id = 1",
            Section::Access => "UPDATE meta SET access_at = revision WHERE id = 1",
            Section::Edges => "UPDATE meta SET edges_at = revision WHERE id = 1",
            Section::Ssh => "UPDATE meta SET ssh_at = revision WHERE id = 1",
        };
        sqlx::query(sql).execute(&mut *self.tx).await?;
        Ok(())
    }

    /// Commits, and returns the revision that is now in force.
    async fn commit(self) -> Result<i64, StoreError> {
        let Self { mut tx, revision, store, _turn } = self;
        let announced = store.dialect == Dialect::Postgres;
        let committed = store
            .read(async {
                if announced {
                    sqlx::query(hear::ANNOUNCE).execute(&mut *tx).await?;
                }
                Ok(tx.commit().await?)
            })
            .await;
        store.wrote(committed.is_ok());
        committed?;
        store.committed.send_if_modified(|last| {
            let newer = *last < revision;
            *last = revision.max(*last);
            newer
        });
        Ok(revision)
    }
}

/// A column of text as the name that it must be.
fn parsed<T>(row: &AnyRow, column: &str, what: &'static str) -> Result<T, StoreError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    let text: String = row.try_get(column)?;
    text.parse().map_err(|e: T::Err| StoreError::Damaged { what, why: e.to_string() })
}

fn parsed_option<T>(row: &AnyRow, column: &str, what: &'static str) -> Result<Option<T>, StoreError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    let text: Option<String> = row.try_get(column)?;
    text.map(|t| t.parse().map_err(|e: T::Err| StoreError::Damaged { what, why: e.to_string() })).transpose()
}

/// Words with spaces between, as groups are kept.
fn words<T>(row: &AnyRow, column: &str, what: &'static str) -> Result<Vec<T>, StoreError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    let text: String = row.try_get(column)?;
    text.split_ascii_whitespace()
        .map(|t| t.parse().map_err(|e: T::Err| StoreError::Damaged { what, why: e.to_string() }))
        .collect()
}
