//! Access records on their way from shards to control, and from there to people.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::{
    code::{RefuseCode, ResetCode},
    principal::Principal,
};

/// Most records in one batch.
pub const MAX_BATCH: usize = 1000;
/// Most records on one page.
pub const MAX_PAGE: u32 = 1000;

/// One stream, after its end, as its shard wrote it down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AccessRecord {
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who asked, as policy writes it: `user/alice`.
    pub who: String,
    /// From where.
    pub from: String,
    /// The door, or `link` for a stream that came through a tunnel.
    pub door: String,
    /// The shard that wrote the record, or at an edge the shard that the stream came from.
    pub shard: String,
    /// The shard that holds the edge's tunnel, if it is another one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub holder: String,
    /// The edge that served.
    pub edge: String,
    /// What carries its tunnel, `quic` or `tcp`, where the record's shard holds it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub carrier: String,
    /// What was asked for.
    pub target: String,
    /// What the edge dialled.
    pub address: String,
    /// The rule that allowed it.
    pub rule: String,
    /// Bytes towards the target.
    pub up: u64,
    /// Bytes from the target.
    pub down: u64,
    /// How long until the target was connected, in microseconds.
    pub open_us: u64,
    /// How long it lasted, in milliseconds.
    pub duration_ms: u64,
    /// `finished`, `reset`, `refused`, or `cancelled` by an opener that went away first.
    pub outcome: Cow<'static, str>,
    /// The code of a reset or a refusal.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub code: Cow<'static, str>,
    /// More on it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// W3C trace id, if there is one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub trace: String,
}

impl AccessRecord {
    /// A record that names the one who asked and what for; the rest is filled in as it becomes known.
    #[must_use]
    pub fn new(who: &Principal, target: &impl ToString) -> Self {
        let outcome = Cow::Borrowed("finished");
        Self { who: who.to_string(), target: target.to_string(), outcome, ..Self::default() }
    }

    /// Notes a refusal.
    #[must_use]
    pub fn refused(mut self, code: RefuseCode, reason: &str) -> Self {
        self.outcome = Cow::Borrowed("refused");
        self.code = Cow::Borrowed(code.slug());
        reason.clone_into(&mut self.detail);
        self
    }

    /// Notes a reset, with what is known of it.
    #[must_use]
    pub fn reset(mut self, code: ResetCode, detail: &str) -> Self {
        self.outcome = Cow::Borrowed("reset");
        self.code = Cow::Borrowed(code.slug());
        detail.clone_into(&mut self.detail);
        self
    }
}

/// What a shard sends control.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessBatch {
    /// When the shard's process started, in milliseconds since 1970.
    pub started: u64,
    /// The number of the first record within that process. A batch that comes again is kept once.
    pub first: u64,
    /// In order; [`MAX_BATCH`] at most.
    pub records: Vec<AccessRecord>,
    /// Records for which the shard had no room since the last batch that arrived.
    #[serde(default)]
    pub lost: u64,
}

/// A record that control keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptRecord {
    /// In the order in which records came to control.
    pub number: i64,
    /// The record.
    #[serde(flatten)]
    pub entry: AccessRecord,
}

/// Records that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessPage {
    /// Oldest first.
    pub records: Vec<KeptRecord>,
    /// There are older ones: ask again with `before` at this number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
    /// Records that never came here, since the database was made: shards had no room for them.
    pub lost: u64,
}
