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
//! | `GET /v1/ring` | users | | [`RingSpec`] |
//! | `GET/POST /v1/tokens`, `DELETE /v1/tokens/{id}` | admins | [`TokenRequest`] | [`TokenView`]s, [`TokenCreated`] |
//! | `GET /v1/edges`, `GET /v1/edges/{name}` | users | | [`EdgeView`]s |
//! | `POST /v1/edges/{name}/revoke` | admins | | [`EdgeView`] |
//! | `POST /v1/users/{name}/revoke` | admins | | `204` |
//! | `GET /v1/policy`, `PUT/DELETE /v1/policy/{rule}` | users, admins | [`Rule`] | [`Rule`]s |
//! | `GET /v1/whoami` | any member | | [`WhoAmI`] |
//! | `/v1/ssh/…`, `/v1/users/{name}/keys` | | | in [`crate::ssh`] |
//!
//! Every error is an [`ApiError`].

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    book::BookChange,
    id::{EdgeId, GroupName, ShardId, SiteName, TrustDomain},
    identity::Role,
    message::{Candidate, Service},
    policy::Rule,
    ring::RingSpec,
    secret::Secret,
    ssh,
    standing::Standing,
};

/// The group whose users may change things.
pub const ADMIN_GROUP: &str = "admin";

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

/// An edge, as control knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgeView {
    /// Its name.
    pub name: EdgeId,
    /// Its site.
    pub site: Option<SiteName>,
    /// When it enrolled last.
    pub enrolled: i64,
    /// When its certificate ends.
    pub not_after: i64,
    /// Whether its certificates are revoked.
    pub revoked: bool,
    /// Where it is connected, as far as the shards have said.
    pub presence: Option<Presence>,
    /// When a shard last saw it.
    pub last_seen: Option<i64>,
    /// Why a shard had to do without it last, as far as this replica of control has heard since it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parting: Option<Parting>,
}

/// Why an edge's tunnel ended, or why the edge was not let in, as the shard saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parting {
    /// The edge.
    pub edge: EdgeId,
    /// The shard.
    pub shard: ShardId,
    /// When.
    pub at: i64,
    /// The kind: `bye` if the edge left by its own will, or as in `mesh_shard_session_ends_total`.
    pub cause: String,
    /// More, for people.
    pub detail: String,
    /// The address from which the edge came.
    pub from: String,
}

/// An edge on a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// The edge.
    pub edge: EdgeId,
    /// The shard that holds its tunnel.
    pub shard: ShardId,
    /// Since when.
    pub since: i64,
    /// The address that the shard sees.
    pub address: String,
    /// Version of its software.
    pub version: String,
    /// What it announces.
    pub services: Vec<Service>,
    /// Round trip, in microseconds.
    pub rtt_us: u64,
    /// Open streams.
    pub streams: u64,
    /// What carries its tunnel, `quic` or `tcp`; empty if the shard does not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub carrier: String,
    /// How the edge says that it came here, and what it went through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
    /// When it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing_at: Option<i64>,
}

/// What a shard tells control every few seconds. Fields that control does not know yet are skipped, so that shards may be
/// newer than it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardReport {
    /// When the shard's process started, in milliseconds since 1970 by its own clock; 0 if it does not say.
    #[serde(default)]
    pub started: u64,
    /// Counts the reports of this process, whichever replica they go to. Control ignores a report that is older than one
    /// that it knows.
    #[serde(default)]
    pub number: u64,
    /// Where edges reach it; the name comes from its certificate.
    pub addresses: Vec<String>,
    /// Version of its software.
    pub version: String,
    /// How it stands.
    #[serde(default)]
    pub state: ShardState,
    /// Its weight in the ring ([`crate::ring::WEIGHT`] is usual).
    #[serde(default = "usual_weight")]
    pub weight: u32,
    /// Of the ring that it goes by. Control never gives a ring a smaller number than one that a shard has seen.
    #[serde(default)]
    pub epoch: u64,
    /// Streams that go through it.
    #[serde(default)]
    pub streams: u64,
    /// Bytes that it has moved since it started, both ways.
    #[serde(default)]
    pub bytes: u64,
    /// Links that wanted in since it started, whether they were let in or not.
    #[serde(default)]
    pub handshakes: u64,
    /// Whether `online` is all of its edges, so that those missing are gone.
    pub full: bool,
    /// Edges that came or changed.
    pub online: Vec<Presence>,
    /// Edges that went.
    pub offline: Vec<EdgeId>,
    /// Why edges went, or were not let in, since the last report.
    #[serde(default)]
    pub partings: Vec<Parting>,
}

const fn usual_weight() -> u32 {
    crate::ring::WEIGHT
}

/// How a shard stands, by its own word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardState {
    /// It serves.
    #[default]
    Serving,
    /// It is about to stop: it belongs in no ring, and its edges are leaving it.
    Draining,
}

/// What an administrator wants of a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardOrder {
    /// To be in the ring.
    #[default]
    Serve,
    /// To be in no ring and take no new edge, but to keep those that it has.
    Cordon,
    /// To be in no ring and to send its edges elsewhere.
    Drain,
}

impl ShardOrder {
    /// The word in commands and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Cordon => "cordon",
            Self::Drain => "drain",
        }
    }
}

impl fmt::Display for ShardOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A shard, as control knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardView {
    /// Its name.
    pub name: ShardId,
    /// Where edges reach it.
    pub addresses: Vec<String>,
    /// Version of its software.
    pub version: String,
    /// Edges that it holds.
    pub edges: u64,
    /// When it last reported.
    pub last_seen: i64,
    /// Whether it reported within the lease.
    pub alive: bool,
    /// How it stands.
    #[serde(default)]
    pub state: ShardState,
    /// What an administrator wants of it.
    #[serde(default)]
    pub order: ShardOrder,
    /// Its weight in the ring.
    #[serde(default = "usual_weight")]
    pub weight: u32,
    /// Of the ring that it goes by.
    #[serde(default)]
    pub epoch: u64,
    /// Streams that go through it.
    #[serde(default)]
    pub streams: u64,
}

/// A certificate that is no longer good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Hexadecimal serial number, lower case, without leading zeros.
    pub serial: String,
    /// Whose it was.
    pub role: Role,
    /// Their name.
    pub name: EdgeId,
    /// When it would have ended, after which it is dropped from the list.
    pub not_after: i64,
}

/// An access token, as shards check it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessToken {
    /// To name it by.
    pub id: String,
    /// Hexadecimal SHA-256 of the whole token.
    pub sha256: String,
    /// As whom it acts.
    pub user: EdgeId,
    /// Groups of that user.
    pub groups: Vec<GroupName>,
    /// When it ends.
    pub expires: i64,
}

/// A line of the watch. The first has every section; later ones have those that changed, and the rest is as before. A
/// line without any section comes every two seconds as a sign of life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchEvent {
    /// Grows with each change.
    pub revision: u64,
    /// All rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Vec<Rule>>,
    /// All revoked certificates that have not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Vec<Revoked>>,
    /// All access tokens that have not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_tokens: Option<Vec<AccessToken>>,
    /// Who may come in by SSH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<ssh::Trust>,
    /// All edges that are enrolled and not revoked, with their sites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edges: Option<BTreeMap<EdgeId, Option<SiteName>>>,
    /// All shards that are alive, in the ring or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<Vec<Candidate>>,
    /// The ring. A shard ignores one that is older than its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ring: Option<RingSpec>,
    /// What administrators want of shards; those that are to serve are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orders: Option<BTreeMap<ShardId, ShardOrder>>,
    /// The trust bundle, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<String>,
    /// What changed in the address book of the cluster, after a first one that has all of it. Without Kubernetes there
    /// is none; shards keep the last one that they have heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub book: Option<BookChange>,
}

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
