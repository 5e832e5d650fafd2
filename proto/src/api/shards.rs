//! Shards: what they report, and what administrators want of them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    api::{Parting, Presence},
    id::{EdgeId, ShardId},
};

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
