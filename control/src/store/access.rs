//! Access records: kept in the order in which they come, for a time and up to a number.

use proto::audit::{AccessBatch, AccessRecord, KeptRecord};
use sqlx::{Row, any::AnyRow};

use super::{Dialect, Store, StoreError};

/// Records that are forgotten in one transaction: others who write wait for it.
const PORTION: i64 = 2000;

/// Which records are wanted; empty texts and zeros want all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Who asked, as `user/alice`.
    pub who: String,
    /// The edge that served.
    pub edge: String,
    /// `finished`, `reset`, `refused`, `cancelled`, or a code.
    pub outcome: String,
    /// Not before, in milliseconds since 1970.
    pub since_ms: i64,
    /// Numbers above this one, oldest first.
    pub after: Option<i64>,
    /// Numbers below this one, newest first.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: i64,
}

impl Store {
    /// Keeps a batch of a shard, and counts what it had no room for. Returns how many records were new.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn keep_access(&self, shard: &str, batch: &AccessBatch) -> Result<u64, StoreError> {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let [started, first, lost] = [batch.started, batch.first, batch.lost].map(whole);
        self.read(async {
            let _turn = self.turn.acquire().await.map_err(|_| StoreError::Busy)?;
            let mut tx = match self.dialect {
                Dialect::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await?,
                Dialect::Postgres => self.pool.begin().await?,
            };
            const LAST: &str = "UPDATE access_state SET last = last + $1, lost = lost + $2 WHERE id = 1 RETURNING last";
            let count = whole(batch.records.len() as u64);
            let row = sqlx::query(LAST).bind(count).bind(lost).fetch_one(&mut *tx).await?;
            let (mut number, mut kept) = (row.try_get::<i64, _>(0)? - count, 0);
            for (at, entry) in (first..).zip(&batch.records) {
                number += 1;
                const INSERT: &str = "INSERT INTO access \
                    (number, at_ms, shard, started, seq, who, edge, outcome, code, record) \
                    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (shard, started, seq) DO NOTHING";
                let done = sqlx::query(INSERT)
                    .bind(number)
                    .bind(whole(entry.unix_ms))
                    .bind(shard.to_owned())
                    .bind(started)
                    .bind(at)
                    .bind(entry.who.clone())
                    .bind(entry.edge.clone())
                    .bind(entry.outcome.clone().into_owned())
                    .bind(entry.code.clone().into_owned())
                    .bind(text_of(entry)?)
                    .execute(&mut *tx)
                    .await?;
                kept += done.rows_affected();
            }
            tx.commit().await?;
            Ok(kept)
        })
        .await
    }

    /// Records that are wanted: newest first, or, behind a number, oldest first.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn access(&self, wanted: &Wanted) -> Result<Vec<KeptRecord>, StoreError> {
        macro_rules! select {
            ($order:literal) => {
                concat!(
                    "SELECT number, record FROM access WHERE number > $1 AND number < $2 AND at_ms >= $3 ",
                    "AND ($4 = '' OR who = $4) AND ($5 = '' OR edge = $5) ",
                    "AND ($6 = '' OR outcome = $6 OR code = $6) ORDER BY number ",
                    $order,
                    " LIMIT $7"
                )
            };
        }
        let sql = if wanted.after.is_some() { select!("ASC") } else { select!("DESC") };
        self.read(async {
            let rows = sqlx::query(sql)
                .bind(wanted.after.unwrap_or(0))
                .bind(wanted.before.unwrap_or(i64::MAX))
                .bind(wanted.since_ms)
                .bind(wanted.who.clone())
                .bind(wanted.edge.clone())
                .bind(wanted.outcome.clone())
                .bind(wanted.limit)
                .fetch_all(&self.pool)
                .await?;
            rows.iter().map(kept).collect()
        })
        .await
    }

    /// Records that shards had no room for, since the database was made.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn access_lost(&self) -> Result<u64, StoreError> {
        self.read(async {
            let row = sqlx::query("SELECT lost FROM access_state WHERE id = 1").fetch_one(&self.pool).await?;
            Ok(row.try_get::<i64, _>(0)?.unsigned_abs())
        })
        .await
    }

    /// Forgets a portion of the records that are older than a time, or more than so many. Returns how many went; call
    /// it again while there are some.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn forget_access(&self, before_ms: i64, most: i64) -> Result<u64, StoreError> {
        const OLD: &str =
            "DELETE FROM access WHERE number IN (SELECT number FROM access WHERE at_ms < $1 ORDER BY number LIMIT $2)";
        const MANY: &str = "DELETE FROM access WHERE number IN (SELECT number FROM access WHERE number <= \
                            (SELECT last FROM access_state WHERE id = 1) - $1 ORDER BY number LIMIT $2)";
        let mut gone = 0;
        for (sql, bound) in [(OLD, before_ms), (MANY, most)] {
            let _turn = self.turn.acquire().await.map_err(|_| StoreError::Busy)?;
            gone += self
                .read(async {
                    let done = sqlx::query(sql).bind(bound).bind(PORTION).execute(&self.pool).await?;
                    Ok(done.rows_affected())
                })
                .await?;
        }
        Ok(gone)
    }
}

fn damaged(error: &serde_json::Error) -> StoreError {
    StoreError::Damaged { what: "an access record", why: error.to_string() }
}

fn text_of(entry: &AccessRecord) -> Result<String, StoreError> {
    // PostgreSQL keeps every character but this one.
    serde_json::to_string(entry).map(|text| text.replace("\\u0000", "")).map_err(|e| damaged(&e))
}

fn kept(row: &AnyRow) -> Result<KeptRecord, StoreError> {
    let text: String = row.try_get("record")?;
    let entry = serde_json::from_str(&text).map_err(|e| damaged(&e))?;
    Ok(KeptRecord { number: row.try_get("number")?, entry })
}
