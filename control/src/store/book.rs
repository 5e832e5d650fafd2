//! The address book, for a start while Kubernetes is away. It changes what nobody may do, so its writes do not wait for
//! the row that all other changes lock.

use sqlx::Row;

use super::{Dialect, Store, StoreError};
use crate::watch::book::{Entry, Key};

/// An entry as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// The entry as JSON.
    pub entry: String,
}

/// The name under which an entry is kept.
#[must_use]
pub fn name_of(key: &Key) -> String {
    match key {
        Key::Node(name) => format!("node/{name}"),
        Key::Pod(key) => format!("pod/{key}"),
        Key::Service(key) => format!("service/{key}"),
    }
}

impl Kept {
    /// Writes an entry.
    ///
    /// # Errors
    /// Never, for an entry of a cluster.
    pub fn of(entry: &Entry) -> Result<Self, serde_json::Error> {
        let json = match entry {
            Entry::Node(node) => serde_json::to_string(node),
            Entry::Pod(pod) => serde_json::to_string(pod),
            Entry::Service(service) => serde_json::to_string(service),
        };
        Ok(Self { name: name_of(&entry.key()), entry: json? })
    }

    /// Reads it.
    ///
    /// # Errors
    /// If it is not what was written.
    pub fn read(&self) -> Result<Entry, serde_json::Error> {
        let Self { name, entry } = self;
        match name.split('/').next() {
            Some("node") => serde_json::from_str(entry).map(Entry::Node),
            Some("pod") => serde_json::from_str(entry).map(Entry::Pod),
            Some(_) | None => serde_json::from_str(entry).map(Entry::Service),
        }
    }
}

impl Store {
    /// All entries.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn book(&self) -> Result<Vec<Kept>, StoreError> {
        self.read(async {
            let rows = sqlx::query("SELECT name, entry FROM book").fetch_all(&self.pool).await?;
            rows.iter().map(|row| Ok(Kept { name: row.try_get("name")?, entry: row.try_get("entry")? })).collect()
        })
        .await
    }

    /// Puts some entries and takes others out; a few hundred at once, so that others who write need not wait for long.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn keep_book(&self, put: &[Kept], gone: &[String]) -> Result<(), StoreError> {
        self.read(async {
            let _turn = self.turn.acquire().await.map_err(|_| StoreError::Busy)?;
            let mut tx = match self.dialect {
                Dialect::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await?,
                Dialect::Postgres => self.pool.begin().await?,
            };
            for Kept { name, entry } in put {
                const SQL: &str = "INSERT INTO book (name, entry) VALUES ($1, $2) \
                                   ON CONFLICT (name) DO UPDATE SET entry = excluded.entry";
                sqlx::query(SQL).bind(name.clone()).bind(entry.clone()).execute(&mut *tx).await?;
            }
            for name in gone {
                sqlx::query("DELETE FROM book WHERE name = $1").bind(name.clone()).execute(&mut *tx).await?;
            }
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}
