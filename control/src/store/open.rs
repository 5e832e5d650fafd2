//! Opening the database: an SQLite file for one control, PostgreSQL for several.

use std::{fs, io, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prometheus::IntCounter;
use proto::{id::TrustDomain, join::CaHash, secret::Secret};
use sqlx::{
    AnyPool, ConnectOptions, Row, SqlSafeStr,
    any::{AnyConnectOptions, AnyPoolOptions},
    migrate::{Migration, MigrationType, Migrator},
};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use super::{Dialect, Store, StoreError, Written};

/// Connections to the database.
const CONNECTIONS: u32 = 8;
/// Connections for those who follow: the watch, and the ring.
const FOLLOWERS: u32 = 2;
/// Longest wait for one of them.
const ACQUIRE: Duration = Duration::from_secs(3);
/// Longest time for the first connection and the migrations.
const OPENING: Duration = Duration::from_secs(30);

const INIT: &str = include_str!("../../migrations/0001_init.sql");
const RING: &str = include_str!("../../migrations/0002_ring.sql");
const ACCESS: &str = include_str!("../../migrations/0005_access.sql");
const BOOK: &str = include_str!("../../migrations/0004_book.sql");
const SSH: &str = include_str!("../../migrations/0006_ssh.sql");
const REPORTS: &str = include_str!("../../migrations/0003_reports.sql");

/// The URL of the SQLite file, which is made with mode 0600 if it is not there.
///
/// # Errors
/// If it cannot be made.
pub fn sqlite_url(path: &Path) -> io::Result<Secret> {
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    let encoded: String = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .map(|&b| match b {
            b if b.is_ascii_alphanumeric() || b"/._-~".contains(&b) => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect();
    Ok(Secret::new(format!("sqlite://{encoded}?mode=rw")))
}

impl Store {
    /// Connects, and brings the schema up to date. `errors` counts calls that fail.
    ///
    /// # Errors
    /// If the database cannot be reached, or was written by a newer version.
    pub async fn open(url: &Secret, errors: IntCounter) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let scheme = url.reveal().split(':').next().unwrap_or_default();
        let dialect = match scheme {
            "sqlite" => Dialect::Sqlite,
            "postgres" | "postgresql" => Dialect::Postgres,
            _ => return Err(StoreError::Url("the database must be a URL that begins with sqlite: or postgres:")),
        };
        let options: AnyConnectOptions = url.reveal().parse().map_err(|_| {
            StoreError::Url("the database's URL cannot be read (it is not shown: it may hold a password)")
        })?;
        let options = options.disable_statement_logging();
        let opened = timeout(OPENING, pool(dialect, options.clone(), CONNECTIONS));
        let all = opened.await.map_err(|_| StoreError::Deadline)??;
        timeout(OPENING, migrations().run(&all)).await.map_err(|_| StoreError::Deadline)??;
        let followers =
            timeout(OPENING, pool(dialect, options, FOLLOWERS)).await.map_err(|_| StoreError::Deadline)??;
        let (committed, _) = watch::channel(0);
        // One writer at a time is what SQLite can do. With PostgreSQL the row lock decides, and more than one in the
        // queue there hides the latency of the network.
        let writers = match dialect {
            Dialect::Sqlite => 1,
            Dialect::Postgres => 4,
        };
        Ok(Self {
            pool: all,
            followers,
            url: (dialect == Dialect::Postgres).then(|| url.clone()),
            dialect,
            turn: Arc::new(Semaphore::new(writers)),
            committed,
            written: Arc::new(Mutex::new(Written::default())),
            errors,
        })
    }

    /// Marks the database as that of this mesh and this CA. Returns whether it was nobody's before.
    ///
    /// `roots` are hashes of other CAs that are trusted: one of them may have been the CA until now.
    ///
    /// # Errors
    /// If it belongs to another mesh, or to a CA that is not trusted here.
    pub async fn claim(&self, domain: &TrustDomain, ca: CaHash, roots: &[CaHash]) -> Result<bool, StoreError> {
        let (domain, ca) = (domain.to_string(), ca.to_string());
        let owner = |pool: AnyPool| async move {
            sqlx::query("SELECT trust_domain, ca FROM meta WHERE id = 1").fetch_optional(&pool).await
        };
        let mut fresh = false;
        if owner(self.pool.clone()).await?.is_none() {
            let inserted = sqlx::query(
                "INSERT INTO meta (id, trust_domain, ca, revision, policy_at, revoked_at, access_at, edges_at) \
                 VALUES (1, $1, $2, 1, 1, 1, 1, 1) ON CONFLICT (id) DO NOTHING",
            )
            .bind(domain.clone())
            .bind(ca.clone())
            .execute(&self.pool)
            .await?;
            fresh = inserted.rows_affected() == 1;
        }
        let row = owner(self.pool.clone()).await?.ok_or(sqlx::Error::RowNotFound)?;
        let (their_domain, their_ca): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        if their_domain != domain {
            return Err(StoreError::Foreign(format!(
                "the database belongs to the mesh {their_domain}, and this control is set to {domain}; correct \
                 trust_domain, or give it a database of its own"
            )));
        }
        if their_ca != ca {
            if !roots.iter().any(|root| root.to_string() == their_ca) {
                return Err(StoreError::Foreign(format!(
                    "the database belongs to the CA {their_ca}, and this control has {ca}; copy ca.pem and ca.key from \
                     the control that made them, or, if the CA is being replaced, put the old certificate into roots.d"
                )));
            }
            sqlx::query("UPDATE meta SET ca = $1 WHERE id = 1").bind(ca).execute(&self.pool).await?;
        }
        Ok(fresh)
    }
}

async fn pool(dialect: Dialect, options: AnyConnectOptions, connections: u32) -> Result<AnyPool, sqlx::Error> {
    AnyPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE)
        .idle_timeout(Duration::from_secs(600))
        .after_connect(move |connection, _| {
            Box::pin(async move {
                let setup: &[&'static str] = match dialect {
                    // A certificate that was handed out must be on the disk, so synchronous stays FULL.
                    Dialect::Sqlite => &[
                        "PRAGMA busy_timeout = 3000",
                        "PRAGMA journal_mode = WAL",
                        "PRAGMA synchronous = FULL",
                        "PRAGMA foreign_keys = ON",
                    ],
                    // A replica that vanished in the middle of a change must not hold the others up.
                    Dialect::Postgres => {
                        &["SET statement_timeout = '5s'", "SET idle_in_transaction_session_timeout = '10s'"]
                    }
                };
                for statement in setup {
                    sqlx::raw_sql(*statement).execute(&mut *connection).await?;
                }
                Ok(())
            })
        })
        .connect_with(options)
        .await
}

fn migrations() -> Migrator {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(vec![
        migration(1, "init", INIT),
        migration(2, "ring", RING),
        migration(3, "reports", REPORTS),
        migration(4, "book", BOOK),
        migration(5, "access", ACCESS),
        migration(6, "ssh", SSH),
    ])
}
