//! Who somebody is, as a SPIFFE ID: `spiffe://<trust-domain>/<kind>/<name>`
//! (<https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::id::{EdgeId, InvalidName, ShardId, TrustDomain, UserId};

/// Longest SPIFFE ID in bytes, by the standard.
const MAX_SPIFFE_ID: usize = 2048;

/// Kinds of members of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A machine outside the cloud.
    Edge,
    /// A `mesh-cloud` process.
    Shard,
    /// A `mesh-control` process.
    Control,
    /// A person or a program.
    User,
}

impl Role {
    /// The word in a SPIFFE ID.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Shard => "shard",
            Self::Control => "control",
            Self::User => "user",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
        match text {
            "edge" => Ok(Self::Edge),
            "shard" => Ok(Self::Shard),
            "control" => Ok(Self::Control),
            "user" => Ok(Self::User),
            _ => Err(InvalidIdentity::Role(text.chars().take(40).collect())),
        }
    }
}

/// One member of a mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The mesh.
    pub domain: TrustDomain,
    /// What it is.
    pub role: Role,
    /// Its name; an [`EdgeId`], [`ShardId`] or [`UserId`] by role.
    pub name: EdgeId,
}

impl Identity {
    /// Puts an identity together. Names of all roles follow one grammar, that of [`EdgeId`].
    #[must_use]
    pub const fn new(domain: TrustDomain, role: Role, name: EdgeId) -> Self {
        Self { domain, role, name }
    }

    /// The name as that of an edge, if it is one.
    #[must_use]
    pub fn edge(&self) -> Option<EdgeId> {
        (self.role == Role::Edge).then(|| self.name.clone())
    }

    /// The name as that of a shard, if it is one.
    #[must_use]
    pub fn shard(&self) -> Option<ShardId> {
        (self.role == Role::Shard).then(|| self.name.as_str().parse().ok()).flatten()
    }

    /// The name as that of a user, if it is one.
    #[must_use]
    pub fn user(&self) -> Option<UserId> {
        (self.role == Role::User).then(|| self.name.as_str().parse().ok()).flatten()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.domain, self.role, self.name)
    }
}

/// A text was no identity of a mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Not `spiffe://domain/role/name`.
    #[error("{0:?} is not of the form spiffe://<trust-domain>/<role>/<name>")]
    Form(String),
    /// A role that does not exist.
    #[error("{0:?} is no role; there are edge, shard, control and user")]
    Role(String),
    /// A bad name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let form = || InvalidIdentity::Form(uri.chars().take(80).collect());
        if uri.len() > MAX_SPIFFE_ID {
            return Err(form());
        }
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        Ok(Self { domain: domain.parse()?, role: role.parse()?, name: name.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_and_its_uri() {
        let uri = "spiffe://mesh.example.org/edge/shop-17";
        let id: Identity = uri.parse().unwrap();
        assert_eq!(id.role, Role::Edge);
        assert_eq!(id.edge().unwrap().as_str(), "shop-17");
        assert_eq!(id.shard(), None);
        assert_eq!(id.to_string(), uri);
    }

    #[test]
    fn what_is_no_identity() {
        for uri in [
            "",
            "spiffe://",
            "spiffe://a/edge",
            "spiffe://a/edge/",
            "spiffe://a/edge/b/c",
            "https://a/edge/b",
            "spiffe://a/admin/b",
            "spiffe://a:1/edge/b",
            "spiffe://a/edge/b?x",
            "SPIFFE://a/edge/b",
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
    }
}
