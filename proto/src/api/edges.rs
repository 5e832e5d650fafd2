//! Edges, as control and the shards know them.

use serde::{Deserialize, Serialize};

use crate::{
    id::{EdgeId, ShardId, SiteName},
    message::Service,
    standing::Standing,
};

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
