//! Enrolment: tokens, certificate requests, and what comes back.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    id::{EdgeId, GroupName, SiteName},
    message::Candidate,
    secret::Secret,
};

/// Asks for the first certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// The right to enrol.
    pub token: Secret,
    /// The name to enrol under; `None` takes the one that the token fixes.
    pub name: Option<EdgeId>,
    /// PKCS#10, PEM. Only its public key is used.
    pub csr: String,
}

/// Asks for the next certificate over the API itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenewRequest {
    /// PKCS#10, PEM. Only its public key is used.
    pub csr: String,
}

/// A [`crate::message::Renew`] that a shard passes on; each field is base64 of the bytes there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenewFor {
    /// PKCS#10, DER.
    pub csr: String,
    /// The present leaf, DER.
    pub certificate: String,
    /// The proof that the key's holder asked.
    pub signature: String,
}

/// A certificate, and what its holder needs to find the mesh.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Enrolled {
    /// Who the holder now is.
    pub identity: String,
    /// PEM, leaf first.
    pub chain: String,
    /// The trust bundle, PEM.
    pub bundle: String,
    /// When the leaf ends.
    pub not_after: i64,
    /// The shards, for a start.
    pub shards: Vec<Candidate>,
}

/// What a token lets one enrol as, or do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenKind {
    /// Enrol an edge.
    Edge,
    /// Enrol a shard.
    Shard,
    /// Enrol a user: `meshctl login`.
    User,
    /// Use the proxy door as a user, without a certificate: for `curl -x` and the like.
    Access,
}

impl TokenKind {
    /// The word in commands and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Shard => "shard",
            Self::User => "user",
            Self::Access => "access",
        }
    }
}

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Asks for a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What for.
    pub kind: TokenKind,
    /// The only name that may be enrolled with it; needed for `user` and `access`.
    #[serde(default)]
    pub name: Option<EdgeId>,
    /// How often it can be used; access tokens ignore it. 1 or more.
    #[serde(default = "one")]
    pub uses: u32,
    /// For how long, in seconds.
    pub ttl_secs: u32,
    /// Groups of the user.
    #[serde(default)]
    pub groups: Vec<GroupName>,
    /// Site of the edges.
    #[serde(default)]
    pub site: Option<SiteName>,
    /// Whether an edge that is enrolled already may be enrolled anew; its old certificates are then revoked.
    #[serde(default)]
    pub replace: bool,
}

const fn one() -> u32 {
    1
}

/// A token, the only time that it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenCreated {
    /// What is known of it.
    #[serde(flatten)]
    pub view: TokenView,
    /// The token itself.
    pub token: Secret,
    /// The join line ([`crate::join::JoinLine`]); none for access tokens.
    pub join: Option<Secret>,
}

/// What is known of a token; its text is kept as a hash only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenView {
    /// To name it by; the part of the token before the dot.
    pub id: String,
    /// What for.
    pub kind: TokenKind,
    /// The name that it is fixed to.
    pub name: Option<EdgeId>,
    /// Uses left; `None` for access tokens.
    pub uses_left: Option<u32>,
    /// When it ends.
    pub expires: i64,
    /// Groups of the user.
    pub groups: Vec<GroupName>,
    /// Site of the edges.
    pub site: Option<SiteName>,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created: i64,
}
