//! Tokens, and enrolment: the use of one.

use proto::{
    api::{AccessToken, TokenKind},
    id::EdgeId,
    identity::Role,
    secret::Secret,
};
use sqlx::{AnyConnection, Row, any::AnyRow};

use super::{Change, Section, Store, StoreError, certificates, parsed_option, words};
use crate::{
    ca::Leaf,
    token::{self, Refusal, StoredToken},
};

/// An enrolment did not happen.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The token does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// An edge of that name is enrolled.
    #[error(
        "an edge named {0} is enrolled already; choose another name, or take a token that may replace it ('meshctl token create --edge --replace'), or revoke it first ('meshctl edge revoke {0}')"
    )]
    NameTaken(EdgeId),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for EnrolError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// An enrolment that the token allows and that is not committed yet. Dropping it undoes everything.
#[derive(Debug)]
pub struct Enrolment {
    change: Change,
    token: StoredToken,
    name: EdgeId,
    replaces: bool,
}

impl Store {
    /// Keeps a new token.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn create_token(&self, token: &StoredToken) -> Result<i64, StoreError> {
        let mut change = self.begin().await?;
        self.read(async {
            let groups: Vec<_> = token.groups.iter().map(|g| g.as_str()).collect();
            sqlx::query(
                "INSERT INTO tokens (id, sha256, kind, name, uses_left, expires, user_groups, site, replaces, \
                 created_by, created) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            )
            .bind(token.id.clone())
            .bind(token.sha256.clone())
            .bind(token.kind.as_str())
            .bind(token.name.as_ref().map(ToString::to_string))
            .bind(token.uses_left.map(i64::from))
            .bind(token.expires)
            .bind(groups.join(" "))
            .bind(token.site.as_ref().map(ToString::to_string))
            .bind(i64::from(token.replace))
            .bind(token.created_by.clone())
            .bind(token.created)
            .execute(&mut *change.tx)
            .await?;
            if token.kind == TokenKind::Access {
                change.touch(Section::Access).await?;
            }
            Ok(())
        })
        .await?;
        change.commit().await
    }

    /// All tokens, newest first.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn tokens(&self) -> Result<Vec<StoredToken>, StoreError> {
        self.read(async {
            const SQL: &str = "SELECT id, sha256, kind, name, uses_left, expires, user_groups, site, replaces, \
                               created_by, created FROM tokens ORDER BY created DESC, id";
            sqlx::query(SQL).fetch_all(&self.pool).await?.iter().map(stored).collect()
        })
        .await
    }

    /// Access tokens that hold at this time.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn access_tokens(&self, now: i64) -> Result<Vec<AccessToken>, StoreError> {
        let all = self.tokens().await?.into_iter().filter(|t| t.kind == TokenKind::Access && t.expires >= now);
        let access = |t: StoredToken| {
            Some(AccessToken { id: t.id, sha256: t.sha256, user: t.name?, groups: t.groups, expires: t.expires })
        };
        Ok(all.filter_map(access).collect())
    }

    /// Deletes a token. Returns the revision, or `None` if there is no such token.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn delete_token(&self, id: &str) -> Result<Option<i64>, StoreError> {
        let mut change = self.begin().await?;
        let deleted = self
            .read(async {
                let row = sqlx::query("DELETE FROM tokens WHERE id = $1 RETURNING kind")
                    .bind(id.to_owned())
                    .fetch_optional(&mut *change.tx)
                    .await?;
                let Some(row) = row else { return Ok(false) };
                if row.try_get::<String, _>(0)? == TokenKind::Access.as_str() {
                    change.touch(Section::Access).await?;
                }
                Ok(true)
            })
            .await?;
        if deleted { change.commit().await.map(Some) } else { Ok(None) }
    }

    /// Begins an enrolment: checks token and name, and holds both until [`Enrolment::finish`].
    ///
    /// # Errors
    /// If the token does not allow it, the name is taken, or the database cannot be written.
    pub async fn begin_enrolment(
        &self,
        token: &Secret,
        asked: Option<&EdgeId>,
        now: i64,
    ) -> Result<Enrolment, EnrolError> {
        let id = token::id_of(token).ok_or(Refusal::Unknown)?;
        // Once without the lock, so that guesses and late comers do not queue with the writers.
        let found = self
            .read(async {
                let mut connection = self.pool.acquire().await?;
                find(&mut connection, id).await
            })
            .await?;
        token::admit(found.as_ref(), token, asked, now)?;
        let mut change = self.begin().await?;
        let found = self.read(find(&mut change.tx, id)).await?;
        let (found, name) = token::admit(found.as_ref(), token, asked, now)?;
        let (found, name) = (found.clone(), name.clone());
        let mut replaces = false;
        if found.kind == TokenKind::Edge {
            replaces = self.read(enrolled(&mut change, &name)).await?;
            if replaces && !found.replace {
                return Err(EnrolError::NameTaken(name));
            }
        }
        Ok(Enrolment { change, token: found, name, replaces })
    }
}

async fn enrolled(change: &mut Change, name: &EdgeId) -> Result<bool, StoreError> {
    let row = sqlx::query("SELECT revoked_at FROM edges WHERE name = $1")
        .bind(name.to_string())
        .fetch_optional(&mut *change.tx)
        .await?;
    Ok(match row {
        Some(row) => row.try_get::<Option<i64>, _>(0)?.is_none(),
        None => false,
    })
}

impl Enrolment {
    /// The token that is used.
    #[must_use]
    pub const fn token(&self) -> &StoredToken {
        &self.token
    }

    /// The name that is enrolled.
    #[must_use]
    pub const fn name(&self) -> &EdgeId {
        &self.name
    }

    /// What is enrolled.
    #[must_use]
    pub const fn role(&self) -> Role {
        match self.token.kind {
            TokenKind::Edge => Role::Edge,
            TokenKind::Shard => Role::Shard,
            TokenKind::User | TokenKind::Access => Role::User,
        }
    }

    /// Whether certificates of an edge of that name are revoked by this.
    #[must_use]
    pub const fn replaces(&self) -> bool {
        self.replaces
    }

    /// Commits it: the token is used once more, the certificate is known, old ones are revoked. Returns the revision.
    ///
    /// # Errors
    /// If the database cannot be written; then nothing happened.
    pub async fn finish(self, leaf: &Leaf, now: i64) -> Result<i64, EnrolError> {
        let role = self.role();
        let Self { mut change, token, name, replaces } = self;
        let store = change.store.clone();
        store
            .read(async {
                if replaces {
                    certificates::revoke_all(&mut change, role, &name, now).await?;
                }
                if role == Role::Edge {
                    sqlx::query(
                        "INSERT INTO edges (name, site, enrolled, not_after) VALUES ($1, $2, $3, $4) \
                         ON CONFLICT (name) DO UPDATE SET site = excluded.site, enrolled = excluded.enrolled, \
                         not_after = excluded.not_after, revoked_at = NULL",
                    )
                    .bind(name.to_string())
                    .bind(token.site.as_ref().map(ToString::to_string))
                    .bind(now)
                    .bind(leaf.not_after)
                    .execute(&mut *change.tx)
                    .await?;
                    change.touch(Section::Edges).await?;
                }
                certificates::insert(&mut change, &name, leaf, now).await?;
                let used = sqlx::query("UPDATE tokens SET uses_left = uses_left - 1 WHERE id = $1 AND uses_left > 0")
                    .bind(token.id.clone())
                    .execute(&mut *change.tx)
                    .await?;
                if used.rows_affected() == 1 { Ok(()) } else { Err(sqlx::Error::RowNotFound.into()) }
            })
            .await?;
        Ok(change.commit().await?)
    }
}

async fn find(connection: &mut AnyConnection, id: &str) -> Result<Option<StoredToken>, StoreError> {
    const SQL: &str = "SELECT id, sha256, kind, name, uses_left, expires, user_groups, site, replaces, created_by, \
                       created FROM tokens WHERE id = $1";
    sqlx::query(SQL).bind(id.to_owned()).fetch_optional(connection).await?.as_ref().map(stored).transpose()
}

fn stored(row: &AnyRow) -> Result<StoredToken, StoreError> {
    const WHAT: &str = "a token";
    let damaged = |why: String| StoreError::Damaged { what: WHAT, why };
    let kind: String = row.try_get("kind")?;
    let kinds = [TokenKind::Edge, TokenKind::Shard, TokenKind::User, TokenKind::Access];
    let kind = kinds.into_iter().find(|k| k.as_str() == kind).ok_or_else(|| damaged(format!("kind {kind:?}")))?;
    let uses_left: Option<i64> = row.try_get("uses_left")?;
    Ok(StoredToken {
        id: row.try_get("id")?,
        sha256: row.try_get("sha256")?,
        kind,
        name: parsed_option(row, "name", WHAT)?,
        uses_left: uses_left.map(u32::try_from).transpose().map_err(|e| damaged(e.to_string()))?,
        expires: row.try_get("expires")?,
        groups: words(row, "user_groups", WHAT)?,
        site: parsed_option(row, "site", WHAT)?,
        replace: row.try_get::<i64, _>("replaces")? != 0,
        created_by: row.try_get("created_by")?,
        created: row.try_get("created")?,
    })
}
