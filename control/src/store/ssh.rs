//! Public keys of users for the SSH door.

use proto::{id::EdgeId, ssh::Key};
use sqlx::{Row, any::AnyRow};

use super::{Change, Section, Store, StoreError, parsed, words};

const WHAT: &str = "an SSH key";

/// Most keys of one user.
pub const MAX_KEYS: usize = 32;

/// What became of a key that was to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in force with this revision.
    At(i64),
    /// Another user has it.
    OfAnother(EdgeId),
    /// The user has as many as [`MAX_KEYS`].
    TooMany,
}

impl Store {
    /// All keys, by user and then by age.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn ssh_keys(&self) -> Result<Vec<Key>, StoreError> {
        self.read(async {
            const SQL: &str = "SELECT id, fingerprint, name, user_groups, public_key, remark, created, created_by \
                               FROM ssh_keys ORDER BY name, created, id";
            sqlx::query(SQL).fetch_all(&self.pool).await?.iter().map(key).collect()
        })
        .await
    }

    /// The keys of a user.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn ssh_keys_of(&self, user: &EdgeId) -> Result<Vec<Key>, StoreError> {
        Ok(self.ssh_keys().await?.into_iter().filter(|key| key.user == *user).collect())
    }

    /// Adds a key. One that its user has already is replaced, with its groups and its comment.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn add_ssh_key(&self, key: &Key) -> Result<Added, StoreError> {
        let mut change = self.begin().await?;
        let refused = self
            .read(async {
                let row = sqlx::query("SELECT name FROM ssh_keys WHERE id = $1")
                    .bind(key.id.clone())
                    .fetch_optional(&mut *change.tx)
                    .await?;
                if let Some(row) = &row {
                    let user: EdgeId = parsed(row, "name", WHAT)?;
                    if user != key.user {
                        return Ok(Some(Added::OfAnother(user)));
                    }
                }
                let count: i64 = sqlx::query("SELECT COUNT(*) FROM ssh_keys WHERE name = $1 AND id <> $2")
                    .bind(key.user.to_string())
                    .bind(key.id.clone())
                    .fetch_one(&mut *change.tx)
                    .await?
                    .try_get(0)?;
                if usize::try_from(count).is_ok_and(|count| count >= MAX_KEYS) {
                    return Ok(Some(Added::TooMany));
                }
                insert(&mut change, key).await?;
                Ok(None)
            })
            .await?;
        match refused {
            Some(refused) => Ok(refused),
            None => Ok(Added::At(change.commit().await?)),
        }
    }

    /// Deletes a user's key. Returns the revision, or `None` if the user has no such key.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn delete_ssh_key(&self, user: &EdgeId, id: &str) -> Result<Option<i64>, StoreError> {
        let mut change = self.begin().await?;
        let found = self
            .read(async {
                let deleted = sqlx::query("DELETE FROM ssh_keys WHERE name = $1 AND id = $2")
                    .bind(user.to_string())
                    .bind(id.to_owned())
                    .execute(&mut *change.tx)
                    .await?;
                change.touch(Section::Ssh).await?;
                Ok(deleted.rows_affected() > 0)
            })
            .await?;
        if found { change.commit().await.map(Some) } else { Ok(None) }
    }
}

async fn insert(change: &mut Change, key: &Key) -> Result<(), StoreError> {
    let groups: Vec<_> = key.groups.iter().map(|g| g.as_str()).collect();
    sqlx::query(
        "INSERT INTO ssh_keys (id, fingerprint, name, user_groups, public_key, remark, created, created_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) \
         ON CONFLICT (id) DO UPDATE SET user_groups = excluded.user_groups, remark = excluded.remark, \
         created = excluded.created, created_by = excluded.created_by",
    )
    .bind(key.id.clone())
    .bind(key.fingerprint.clone())
    .bind(key.user.to_string())
    .bind(groups.join(" "))
    .bind(key.key.clone())
    .bind(key.comment.clone())
    .bind(key.created)
    .bind(key.created_by.clone())
    .execute(&mut *change.tx)
    .await?;
    Ok(change.touch(Section::Ssh).await?)
}

/// Deletes all keys of a user. Returns how many there were.
pub(super) async fn delete_all(change: &mut Change, user: &EdgeId) -> Result<u64, StoreError> {
    let deleted =
        sqlx::query("DELETE FROM ssh_keys WHERE name = $1").bind(user.to_string()).execute(&mut *change.tx).await?;
    if deleted.rows_affected() > 0 {
        change.touch(Section::Ssh).await?;
    }
    Ok(deleted.rows_affected())
}

fn key(row: &AnyRow) -> Result<Key, StoreError> {
    Ok(Key {
        id: row.try_get("id")?,
        fingerprint: row.try_get("fingerprint")?,
        user: parsed(row, "name", WHAT)?,
        groups: words(row, "user_groups", WHAT)?,
        key: row.try_get("public_key")?,
        comment: row.try_get("remark")?,
        created: row.try_get("created")?,
        created_by: row.try_get("created_by")?,
    })
}
