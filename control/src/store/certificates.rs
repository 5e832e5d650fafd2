//! Certificates: those that were issued, renewals, and those that are revoked.

use proto::{
    api::Revoked,
    id::EdgeId,
    identity::{Identity, Role},
};
use runtime::cert::CertFacts;
use sqlx::Row;

use super::{Change, Section, Store, StoreError, parsed};
use crate::ca::Leaf;

/// A renewal did not happen.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The certificate, or the edge, is revoked.
    #[error("{0} is revoked; it can only be enrolled again, with a new token")]
    Revoked(Identity),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A renewal that is allowed and not committed yet. Dropping it undoes everything.
#[derive(Debug)]
pub struct Renewal {
    change: Change,
    facts: CertFacts,
}

impl Store {
    /// Begins the renewal of a certificate that has been verified, and holds off every revocation until
    /// [`Renewal::finish`].
    ///
    /// # Errors
    /// If the certificate or its edge is revoked, or the database cannot be written.
    pub async fn begin_renewal(&self, facts: &CertFacts) -> Result<Renewal, RenewError> {
        let mut change = self.begin().await?;
        if self.read(is_revoked(&mut change, facts)).await? {
            return Err(RenewError::Revoked(facts.identity.clone()));
        }
        Ok(Renewal { change, facts: facts.clone() })
    }

    /// Writes down a certificate for somebody who needed no token of ours.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn enrolled(&self, name: &EdgeId, leaf: &Leaf, now: i64) -> Result<i64, StoreError> {
        let mut change = self.begin().await?;
        self.read(insert(&mut change, name, leaf, now)).await?;
        change.commit().await
    }

    /// All revoked certificates that have not ended.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn revoked(&self, now: i64) -> Result<Vec<Revoked>, StoreError> {
        const WHAT: &str = "a revoked certificate";
        self.read(async {
            const SQL: &str = "SELECT serial, role, name, not_after FROM certificates \
                               WHERE revoked_at IS NOT NULL AND not_after >= $1 ORDER BY serial";
            let rows = sqlx::query(SQL).bind(now).fetch_all(&self.pool).await?;
            rows.iter()
                .map(|row| {
                    Ok(Revoked {
                        serial: row.try_get("serial")?,
                        role: parsed(row, "role", WHAT)?,
                        name: parsed(row, "name", WHAT)?,
                        not_after: row.try_get("not_after")?,
                    })
                })
                .collect()
        })
        .await
    }

    /// Revokes everything that a user holds: certificates, SSH keys, access tokens, and tokens to log in with. Returns
    /// the revision, or `None` if the user holds nothing.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn revoke_user(&self, name: &EdgeId, now: i64) -> Result<Option<i64>, StoreError> {
        let mut change = self.begin().await?;
        let found = self
            .read(async {
                let certificates = revoke_all(&mut change, Role::User, name, now).await?;
                let tokens = sqlx::query("DELETE FROM tokens WHERE name = $1 AND kind IN ('user', 'access')")
                    .bind(name.to_string())
                    .execute(&mut *change.tx)
                    .await?;
                if tokens.rows_affected() > 0 {
                    change.touch(Section::Access).await?;
                }
                let keys = super::ssh::delete_all(&mut change, name).await?;
                Ok(certificates + tokens.rows_affected() + keys > 0)
            })
            .await?;
        if found { change.commit().await.map(Some) } else { Ok(None) }
    }

    /// Forgets certificates and tokens that ended before this time.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn sweep(&self, before: i64) -> Result<u64, StoreError> {
        let mut change = self.begin().await?;
        let swept = self
            .read(async {
                let mut swept = 0;
                for sql in ["DELETE FROM certificates WHERE not_after < $1", "DELETE FROM tokens WHERE expires < $1"] {
                    swept += sqlx::query(sql).bind(before).execute(&mut *change.tx).await?.rows_affected();
                }
                Ok(swept)
            })
            .await?;
        if swept > 0 {
            change.commit().await?;
        }
        Ok(swept)
    }
}

async fn is_revoked(change: &mut Change, facts: &CertFacts) -> Result<bool, StoreError> {
    let certificate = sqlx::query("SELECT revoked_at FROM certificates WHERE serial = $1")
        .bind(facts.serial.clone())
        .fetch_optional(&mut *change.tx)
        .await?;
    let mut marks = vec![certificate];
    if facts.identity.role == Role::Edge {
        let edge = sqlx::query("SELECT revoked_at FROM edges WHERE name = $1")
            .bind(facts.identity.name.to_string())
            .fetch_optional(&mut *change.tx)
            .await?;
        marks.push(edge);
    }
    for row in marks.into_iter().flatten() {
        if row.try_get::<Option<i64>, _>(0)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Renewal {
    /// Commits an SSH certificate for the holder in place of the next one of its own kind. It is revoked with the
    /// holder's others, by this name.
    ///
    /// # Errors
    /// If the database cannot be written; then nothing happened.
    pub async fn finish_for_ssh(self, serial: &str, not_after: i64, now: i64) -> Result<i64, RenewError> {
        let Self { mut change, facts } = self;
        let store = change.store.clone();
        let (name, role) = (&facts.identity.name, facts.identity.role);
        store.read(note(&mut change, (name, role), (serial, not_after), now)).await?;
        Ok(change.commit().await?)
    }

    /// Commits it.
    ///
    /// An edge that the database does not know is taken up again: after the loss of a database its fleet comes back by
    /// itself, because the CA still vouches for it.
    ///
    /// # Errors
    /// If the database cannot be written; then nothing happened.
    pub async fn finish(self, leaf: &Leaf, now: i64) -> Result<i64, RenewError> {
        let Self { mut change, facts } = self;
        let store = change.store.clone();
        store
            .read(async {
                if facts.identity.role == Role::Edge {
                    let known = sqlx::query("UPDATE edges SET not_after = $1 WHERE name = $2")
                        .bind(leaf.not_after)
                        .bind(facts.identity.name.to_string())
                        .execute(&mut *change.tx)
                        .await?;
                    if known.rows_affected() == 0 {
                        take_up(&mut change, &facts, leaf, now).await?;
                    }
                }
                insert(&mut change, &facts.identity.name, leaf, now).await
            })
            .await?;
        Ok(change.commit().await?)
    }
}

async fn take_up(change: &mut Change, facts: &CertFacts, leaf: &Leaf, now: i64) -> Result<(), StoreError> {
    tracing::warn!(target: "audit", edge = %facts.identity.name, "taken up again: its certificate is good and the database did not know it");
    sqlx::query("INSERT INTO edges (name, site, enrolled, not_after) VALUES ($1, $2, $3, $4)")
        .bind(facts.identity.name.to_string())
        .bind(facts.site.as_ref().map(ToString::to_string))
        .bind(now)
        .bind(leaf.not_after)
        .execute(&mut *change.tx)
        .await?;
    change.touch(Section::Edges).await?;
    Ok(())
}

/// Keeps a new certificate.
pub(super) async fn insert(change: &mut Change, name: &EdgeId, leaf: &Leaf, now: i64) -> Result<(), StoreError> {
    note(change, (name, leaf.role), (&leaf.serial, leaf.not_after), now).await
}

async fn note(
    change: &mut Change,
    (name, role): (&EdgeId, Role),
    (serial, not_after): (&str, i64),
    now: i64,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO certificates (serial, role, name, issued, not_after) VALUES ($1, $2, $3, $4, $5)")
        .bind(serial.to_owned())
        .bind(role.as_str())
        .bind(name.to_string())
        .bind(now)
        .bind(not_after)
        .execute(&mut *change.tx)
        .await?;
    Ok(())
}

/// Revokes all certificates of a holder that live. Returns how many there were.
pub(super) async fn revoke_all(change: &mut Change, role: Role, name: &EdgeId, now: i64) -> Result<u64, StoreError> {
    let revoked = sqlx::query(
        "UPDATE certificates SET revoked_at = $1 \
         WHERE role = $2 AND name = $3 AND revoked_at IS NULL AND not_after >= $1",
    )
    .bind(now)
    .bind(role.as_str())
    .bind(name.to_string())
    .execute(&mut *change.tx)
    .await?;
    if revoked.rows_affected() > 0 {
        change.touch(Section::Revoked).await?;
    }
    Ok(revoked.rows_affected())
}
