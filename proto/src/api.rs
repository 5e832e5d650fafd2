//! The JSON API of control: what enrolment, shards and `meshctl` send and get. Times are seconds since 1970.
//!
//! | method and path | who | body | answer |
//! |---|---|---|---|
//! | `POST /v1/enrol` | anybody with a token | [`EnrolRequest`] | [`Enrolled`] |
//! | `POST /v1/renew` | the holder of a certificate, by mutual TLS | [`RenewRequest`] | [`Enrolled`] |
//! | `POST /v1/renew-for` | a shard, for an edge | [`RenewFor`] | [`Enrolled`] |
//! | `GET /v1/watch` | shards | | lines of [`WatchEvent`], without end |
//! | `POST /v1/shards/report` | shards | [`ShardReport`] | `204` |
//! | `POST /v1/shards/access` | shards | [`crate::audit::AccessBatch`] | `204` |
//! | `GET /v1/access` | admins | | [`crate::audit::AccessPage`] |
//! | `GET /v1/shards` | users | | [`ShardView`]s |
//! | `PUT /v1/shards/{name}/order` | admins | [`ShardOrder`] | [`ShardView`] |
//! | `GET /v1/ring` | users | | [`RingSpec`](crate::ring::RingSpec) |
//! | `GET/POST /v1/tokens`, `DELETE /v1/tokens/{id}` | admins | [`TokenRequest`] | [`TokenView`]s, [`TokenCreated`] |
//! | `GET /v1/edges`, `GET /v1/edges/{name}` | users | | [`EdgeView`]s |
//! | `POST /v1/edges/{name}/revoke` | admins | | [`EdgeView`] |
//! | `POST /v1/users/{name}/revoke` | admins | | `204` |
//! | `GET /v1/policy`, `PUT/DELETE /v1/policy/{rule}` | users, admins | [`Rule`](crate::policy::Rule) | [`Rule`](crate::policy::Rule)s |
//! | `GET /v1/whoami` | any member | | [`WhoAmI`] |
//! | `/v1/ssh/…`, `/v1/users/{name}/keys` | | | in [`crate::ssh`] |
//!
//! Every error is an [`ApiError`].

mod edges;
mod enrol;
mod shards;
mod watch;

use serde::{Deserialize, Serialize};

use crate::{
    id::{GroupName, TrustDomain},
    message::Candidate,
};

pub use self::{
    edges::{EdgeView, Parting, Presence},
    enrol::{EnrolRequest, Enrolled, RenewFor, RenewRequest, TokenCreated, TokenKind, TokenRequest, TokenView},
    shards::{ShardOrder, ShardReport, ShardState, ShardView},
    watch::{AccessToken, Revoked, WatchEvent},
};

/// The group whose users may change things.
pub const ADMIN_GROUP: &str = "admin";

/// The caller, as control sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WhoAmI {
    /// SPIFFE ID.
    pub identity: String,
    /// Groups of a user.
    pub groups: Vec<GroupName>,
    /// When the certificate ends.
    pub not_after: i64,
    /// The mesh.
    pub trust_domain: TrustDomain,
    /// Hash of the CA, for join lines.
    pub ca: String,
    /// Shards that are alive.
    pub shards: Vec<Candidate>,
}

/// What went wrong, with a cause and a remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The kind, for programs.
    pub code: ApiCode,
    /// Cause and remedy, for people.
    pub message: String,
}

/// Kinds of API errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ApiCode {
    /// The request could not be understood.
    BadRequest,
    /// A client certificate is needed.
    Unauthenticated,
    /// The caller may not do this.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// The name is taken by an edge that is enrolled.
    NameTaken,
    /// The token is not known, or has been deleted.
    TokenUnknown,
    /// The token has ended.
    TokenExpired,
    /// The token has been used as often as it allows.
    TokenUsed,
    /// The token is for another name or another kind.
    TokenMismatch,
    /// The certificate is revoked.
    Revoked,
    /// The proof of a renewal does not hold.
    BadProof,
    /// Too many at once.
    Busy,
    /// The database cannot be used now.
    StoreUnavailable,
    /// A fault of control.
    Internal,
}

impl ApiCode {
    /// The HTTP status that goes with it.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden
            | Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenUsed
            | Self::TokenMismatch
            | Self::Revoked
            | Self::BadProof => 403,
            Self::NotFound => 404,
            Self::NameTaken => 409,
            Self::Busy => 429,
            Self::Internal => 500,
            Self::StoreUnavailable => 503,
        }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Busy | Self::StoreUnavailable | Self::Internal)
    }
}

impl ApiError {
    /// Puts an error together.
    #[must_use]
    pub fn new(code: ApiCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}
