//! The watch: what control tells the shards.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    api::ShardOrder,
    book::BookChange,
    id::{EdgeId, GroupName, ShardId, SiteName},
    identity::Role,
    message::Candidate,
    policy::Rule,
    ring::RingSpec,
    ssh,
};

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
