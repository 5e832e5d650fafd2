//! The ring, who leads, and what administrators want of shards. Leader and ring change by compare-and-swap alone.

use std::collections::BTreeMap;

use proto::{
    api::ShardOrder,
    id::ShardId,
    ring::{Member, RingSpec},
};
use sqlx::Row;

use super::{Store, StoreError, parsed};

/// The row of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRing {
    /// The ring in force.
    pub ring: RingSpec,
    /// The replica that leads; empty if nobody does.
    pub leader: String,
    /// Its sign of life.
    pub beat: i64,
}

impl Store {
    /// The ring in force, and who leads.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn ring(&self) -> Result<StoredRing, StoreError> {
        self.read(async {
            const SQL: &str = "SELECT epoch, members, leader, beat FROM ring WHERE id = 1";
            let row = sqlx::query(SQL).fetch_one(&self.pool).await?;
            let json: String = row.try_get("members")?;
            let members: Vec<Member> = serde_json::from_str(&json)
                .map_err(|e| StoreError::Damaged { what: "the ring", why: e.to_string() })?;
            let epoch = u64::try_from(row.try_get::<i64, _>("epoch")?).unwrap_or(0);
            Ok(StoredRing {
                ring: RingSpec { epoch, members },
                leader: row.try_get("leader")?,
                beat: row.try_get("beat")?,
            })
        })
        .await
    }

    /// Takes or keeps the lead, if leader and beat are as they were seen.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn lead(&self, me: &str, seen_leader: &str, seen_beat: i64) -> Result<bool, StoreError> {
        self.read(async {
            const SQL: &str = "UPDATE ring SET leader = $1, beat = beat + 1 WHERE id = 1 AND leader = $2 AND beat = $3";
            let done = sqlx::query(SQL)
                .bind(me.to_owned())
                .bind(seen_leader.to_owned())
                .bind(seen_beat)
                .execute(&self.pool)
                .await?;
            Ok(done.rows_affected() == 1)
        })
        .await
    }

    /// Puts the next ring, if `me` leads with this beat (`None`: with any) and the epoch is as it was seen.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn put_ring(
        &self,
        me: &str,
        beat: Option<i64>,
        seen_epoch: u64,
        next: &RingSpec,
    ) -> Result<bool, StoreError> {
        let epoch = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let members = serde_json::to_string(&next.members)
            .map_err(|e| StoreError::Damaged { what: "members", why: e.to_string() })?;
        self.read(async {
            const SQL: &str = "UPDATE ring SET epoch = $1, members = $2 WHERE id = 1 AND leader = $3 AND epoch = $4 \
                               AND beat = COALESCE($5, beat)";
            let done = sqlx::query(SQL)
                .bind(epoch(next.epoch))
                .bind(members)
                .bind(me.to_owned())
                .bind(epoch(seen_epoch))
                .bind(beat)
                .execute(&self.pool)
                .await?;
            Ok(done.rows_affected() == 1)
        })
        .await
    }

    /// What administrators want of shards. Those that are to serve are left out.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn orders(&self) -> Result<BTreeMap<ShardId, ShardOrder>, StoreError> {
        const WHAT: &str = "a shard's order";
        self.read(async {
            let rows = sqlx::query("SELECT name, ordered FROM shard_orders").fetch_all(&self.pool).await?;
            rows.iter()
                .map(|row| {
                    let word: String = row.try_get("ordered")?;
                    let order = serde_json::from_value(word.into())
                        .map_err(|e| StoreError::Damaged { what: WHAT, why: e.to_string() })?;
                    Ok((parsed(row, "name", WHAT)?, order))
                })
                .collect()
        })
        .await
    }

    /// Writes down what an administrator wants of a shard.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn order(&self, shard: &ShardId, order: ShardOrder, by: &str, now: i64) -> Result<(), StoreError> {
        self.read(async {
            let query = match order {
                ShardOrder::Serve => sqlx::query("DELETE FROM shard_orders WHERE name = $1").bind(shard.to_string()),
                ShardOrder::Cordon | ShardOrder::Drain => sqlx::query(
                    "INSERT INTO shard_orders (name, ordered, given_by, given_at) VALUES ($1, $2, $3, $4) \
                     ON CONFLICT (name) DO UPDATE SET ordered = excluded.ordered, given_by = excluded.given_by, \
                     given_at = excluded.given_at",
                )
                .bind(shard.to_string())
                .bind(order.as_str())
                .bind(by.to_owned())
                .bind(now),
            };
            query.execute(&self.pool).await?;
            Ok(())
        })
        .await
    }
}
