//! Edges: who is enrolled, and who no longer is.

use std::collections::BTreeMap;

use proto::{
    id::{EdgeId, SiteName},
    identity::Role,
};
use sqlx::{Row, any::AnyRow};

use super::{Section, Store, StoreError, certificates, parsed, parsed_option};

const WHAT: &str = "an edge";

/// An edge, as the database knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEdge {
    /// Its name.
    pub name: EdgeId,
    /// Its site.
    pub site: Option<SiteName>,
    /// When it enrolled last.
    pub enrolled: i64,
    /// When its newest certificate ends.
    pub not_after: i64,
    /// Whether it is revoked.
    pub revoked: bool,
    /// When a shard last saw it, as far as that was written down.
    pub last_seen: Option<i64>,
}

impl Store {
    /// All edges by name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn edges(&self) -> Result<Vec<StoredEdge>, StoreError> {
        self.read(async {
            const SQL: &str = "SELECT name, site, enrolled, not_after, revoked_at, last_seen FROM edges ORDER BY name";
            sqlx::query(SQL).fetch_all(&self.pool).await?.iter().map(stored).collect()
        })
        .await
    }

    /// One edge.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn edge(&self, name: &EdgeId) -> Result<Option<StoredEdge>, StoreError> {
        self.read(async {
            const SQL: &str =
                "SELECT name, site, enrolled, not_after, revoked_at, last_seen FROM edges WHERE name = $1";
            let row = sqlx::query(SQL).bind(name.to_string()).fetch_optional(&self.pool).await?;
            row.as_ref().map(stored).transpose()
        })
        .await
    }

    /// Edges that are enrolled and not revoked, with their sites.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn edge_sites(&self) -> Result<BTreeMap<EdgeId, Option<SiteName>>, StoreError> {
        self.read(async {
            let rows =
                sqlx::query("SELECT name, site FROM edges WHERE revoked_at IS NULL").fetch_all(&self.pool).await?;
            rows.iter().map(|row| Ok((parsed(row, "name", WHAT)?, parsed_option(row, "site", WHAT)?))).collect()
        })
        .await
    }

    /// Revokes an edge with all its certificates. Returns the revision, or `None` if there is no such edge.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn revoke_edge(&self, name: &EdgeId, now: i64) -> Result<Option<i64>, StoreError> {
        let mut change = self.begin().await?;
        let found = self
            .read(async {
                let edge = sqlx::query("UPDATE edges SET revoked_at = COALESCE(revoked_at, $1) WHERE name = $2")
                    .bind(now)
                    .bind(name.to_string())
                    .execute(&mut *change.tx)
                    .await?;
                certificates::revoke_all(&mut change, Role::Edge, name, now).await?;
                change.touch(Section::Edges).await?;
                Ok(edge.rows_affected() > 0)
            })
            .await?;
        if found { change.commit().await.map(Some) } else { Ok(None) }
    }

    /// Writes down when edges were last seen.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn saw(&self, edges: &[(EdgeId, i64)]) -> Result<(), StoreError> {
        if edges.is_empty() {
            return Ok(());
        }
        let mut change = self.begin().await?;
        self.read(async {
            for (name, at) in edges {
                sqlx::query(
                    "UPDATE edges SET last_seen = $1 WHERE name = $2 AND (last_seen IS NULL OR last_seen < $1)",
                )
                .bind(*at)
                .bind(name.to_string())
                .execute(&mut *change.tx)
                .await?;
            }
            Ok(())
        })
        .await?;
        change.commit().await.map(|_| ())
    }
}

fn stored(row: &AnyRow) -> Result<StoredEdge, StoreError> {
    Ok(StoredEdge {
        name: parsed(row, "name", WHAT)?,
        site: parsed_option(row, "site", WHAT)?,
        enrolled: row.try_get("enrolled")?,
        not_after: row.try_get("not_after")?,
        revoked: row.try_get::<Option<i64>, _>("revoked_at")?.is_some(),
        last_seen: row.try_get("last_seen")?,
    })
}
