//! Leases of shards, for other replicas of control and for the next start of this one. The truth is in memory; what is
//! here may be late, and losing it costs nothing but a few seconds.

use proto::{api::ShardState, id::ShardId};
use sqlx::Row;

use super::{Store, StoreError, parsed};

/// A shard's lease, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLease {
    /// The shard.
    pub name: ShardId,
    /// Where edges reach it.
    pub addresses: Vec<String>,
    /// Version of its software.
    pub version: String,
    /// Edges that it holds.
    pub edges: i64,
    /// When it reported last, by the clock of whom it reported to.
    pub last_seen: i64,
    /// Counts reports.
    pub beat: i64,
    /// How it stands, by its own word.
    pub state: ShardState,
    /// Its weight in the ring.
    pub weight: u32,
    /// Of the ring that it goes by.
    pub epoch: u64,
    /// Streams that go through it.
    pub streams: u64,
    /// When its process started, in milliseconds since 1970; 0 if it did not say.
    pub started: u64,
    /// The how-many-th report of that process this is.
    pub number: u64,
}

impl StoredLease {
    /// The part that decides about the ring at once; whether its beat moves is the other one.
    #[must_use]
    pub fn tells_of_ring(&self) -> (ShardState, u32, &[String]) {
        (self.state, self.weight, &self.addresses)
    }

    /// Whether this is a later word of the shard than the other one. A shard that does not number its reports is believed
    /// as they come.
    #[must_use]
    pub fn is_after(&self, other: &Self) -> bool {
        self.started == 0 || (self.started, self.number) > (other.started, other.number)
    }
}

impl Store {
    /// All leases.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn leases(&self) -> Result<Vec<StoredLease>, StoreError> {
        const WHAT: &str = "a shard's lease";
        self.read(async {
            const SQL: &str = "SELECT name, addresses, version, edges, last_seen, beat, state, weight, epoch, streams, \
                               started, reports FROM shards ORDER BY name";
            let rows = sqlx::query(SQL).fetch_all(&self.pool).await?;
            rows.iter()
                .map(|row| {
                    let json: String = row.try_get("addresses")?;
                    let count = |column| -> Result<u64, sqlx::Error> {
                        Ok(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0))
                    };
                    Ok(StoredLease {
                        name: parsed(row, "name", WHAT)?,
                        addresses: serde_json::from_str(&json)
                            .map_err(|e| StoreError::Damaged { what: WHAT, why: e.to_string() })?,
                        version: row.try_get("version")?,
                        edges: row.try_get("edges")?,
                        last_seen: row.try_get("last_seen")?,
                        beat: row.try_get("beat")?,
                        state: state_of(&row.try_get::<String, _>("state")?),
                        weight: u32::try_from(count("weight")?).unwrap_or(u32::MAX),
                        epoch: count("epoch")?,
                        streams: count("streams")?,
                        started: count("started")?,
                        number: count("reports")?,
                    })
                })
                .collect()
        })
        .await
    }

    /// Writes down that a shard reported. The database counts the beat; it takes only what is after what it has, in which
    /// case this returns true. Without such an order it takes a report all the same if its beat still is `silent`, at which
    /// it has not moved for a lease: then no later process lives, and only the shard's clock was set back.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn beat(&self, lease: &StoredLease, silent: Option<i64>) -> Result<bool, StoreError> {
        let addresses = serde_json::to_string(&lease.addresses)
            .map_err(|e| StoreError::Damaged { what: "addresses", why: e.to_string() })?;
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.read(async {
            let done = sqlx::query(
                "INSERT INTO shards (name, addresses, version, edges, last_seen, beat, state, weight, epoch, streams, \
                 started, reports) VALUES ($1, $2, $3, $4, $5, 1, $6, $7, $8, $9, $10, $11) \
                 ON CONFLICT (name) DO UPDATE SET \
                 addresses = excluded.addresses, version = excluded.version, edges = excluded.edges, \
                 last_seen = excluded.last_seen, beat = shards.beat + 1, state = excluded.state, \
                 weight = excluded.weight, epoch = excluded.epoch, streams = excluded.streams, \
                 started = excluded.started, reports = excluded.reports \
                 WHERE excluded.started = 0 OR excluded.started > shards.started \
                 OR (excluded.started = shards.started AND excluded.reports > shards.reports) OR shards.beat = $12",
            )
            .bind(lease.name.to_string())
            .bind(addresses)
            .bind(lease.version.clone())
            .bind(lease.edges)
            .bind(lease.last_seen)
            .bind(state_word(lease.state))
            .bind(i64::from(lease.weight))
            .bind(whole(lease.epoch))
            .bind(whole(lease.streams))
            .bind(whole(lease.started))
            .bind(whole(lease.number))
            // Beats are counted from 1.
            .bind(silent.unwrap_or(0))
            .execute(&self.pool)
            .await?;
            Ok(done.rows_affected() == 1)
        })
        .await
    }

    /// Forgets a shard that reported last before this time.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn forget_shards(&self, before: i64) -> Result<(), StoreError> {
        self.read(async {
            sqlx::query("DELETE FROM shards WHERE last_seen < $1").bind(before).execute(&self.pool).await?;
            Ok(())
        })
        .await
    }
}

const DRAINING: &str = "draining";

const fn state_word(state: ShardState) -> &'static str {
    match state {
        ShardState::Serving => "serving",
        ShardState::Draining => DRAINING,
    }
}

fn state_of(word: &str) -> ShardState {
    if word == DRAINING { ShardState::Draining } else { ShardState::Serving }
}
