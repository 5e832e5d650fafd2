//! The rules of the policy, each kept as JSON.

use proto::policy::Rule;
use sqlx::Row;

use super::{Section, Store, StoreError};

const WHAT: &str = "a rule";

impl Store {
    /// All rules, by name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn rules(&self) -> Result<Vec<Rule>, StoreError> {
        self.read(async {
            let rows = sqlx::query("SELECT rule FROM rules ORDER BY name").fetch_all(&self.pool).await?;
            rows.iter()
                .map(|row| {
                    let json: String = row.try_get(0)?;
                    serde_json::from_str(&json).map_err(|e| StoreError::Damaged { what: WHAT, why: e.to_string() })
                })
                .collect()
        })
        .await
    }

    /// Adds a rule, or replaces the one of that name.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn put_rule(&self, rule: &Rule) -> Result<i64, StoreError> {
        let json = serde_json::to_string(rule).map_err(|e| StoreError::Damaged { what: WHAT, why: e.to_string() })?;
        let mut change = self.begin().await?;
        self.read(async {
            sqlx::query(
                "INSERT INTO rules (name, rule) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET rule = excluded.rule",
            )
            .bind(rule.name.clone())
            .bind(json)
            .execute(&mut *change.tx)
            .await?;
            Ok(change.touch(Section::Policy).await?)
        })
        .await?;
        change.commit().await
    }

    /// Deletes a rule. Returns the revision, or `None` if there is no such rule.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn delete_rule(&self, name: &str) -> Result<Option<i64>, StoreError> {
        let mut change = self.begin().await?;
        let found = self
            .read(async {
                let deleted = sqlx::query("DELETE FROM rules WHERE name = $1")
                    .bind(name.to_owned())
                    .execute(&mut *change.tx)
                    .await?;
                change.touch(Section::Policy).await?;
                Ok(deleted.rows_affected() > 0)
            })
            .await?;
        if found { change.commit().await.map(Some) } else { Ok(None) }
    }
}
