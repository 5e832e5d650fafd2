//! How an edge reaches the mesh, as it knows itself, and what it went through to get there. It is for people:
//! `meshctl why` and `meshctl edge show` tell it, and nothing is decided by it.

use serde::{Deserialize, Serialize};

use crate::wire;

/// Most troubles that are told.
pub const MAX_TROUBLES: usize = 8;
/// Most lines of what the edge allows that are told.
pub const MAX_ALLOWS: usize = 32;
/// Longest text in it, in characters.
pub const MAX_TEXT: usize = 120;

/// How an edge reaches the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// What carries its tunnel: `quic` or `tcp`.
    pub carrier: String,
    /// Why that one, if it is not the one that comes first.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The HTTP proxy in between, without credentials; empty for none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub proxy: String,
    /// Bytes of the largest UDP payload that passes; 0 over TCP.
    #[serde(skip_serializing_if = "is_zero")]
    pub mtu: u32,
    /// Of a hundred packets that the edge sends, how many were lost lately, rounded; 0 over TCP, where nobody knows.
    #[serde(skip_serializing_if = "is_zero")]
    pub loss_percent: u32,
    /// The shard's clock minus the edge's, in milliseconds.
    pub skew_ms: i64,
    /// For how long there was no tunnel before this one, in milliseconds.
    #[serde(skip_serializing_if = "is_none")]
    pub away_ms: u64,
    /// Since the edge was last connected, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub troubles: Vec<Trouble>,
    /// What the edge by itself lets the mesh reach.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allows: Vec<String>,
    /// There are more of them than are told.
    #[serde(skip_serializing_if = "is_false")]
    pub allows_more: bool,
}

/// A failure to reach a shard, and how often it came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trouble {
    /// The class, as in `mesh_edge_dials_total`.
    pub cause: String,
    /// `quic`, `tcp`, or empty if it came to neither.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub carrier: String,
    /// What was dialled.
    pub address: String,
    /// More, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// How often.
    pub times: u32,
    /// How long before the message the first one was, in milliseconds.
    pub first_ms: u64,
    /// The same of the last one.
    pub last_ms: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_none(number: &u64) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Standing {
    /// Whether it says the same as another one, however much time has passed between them.
    #[must_use]
    pub fn says_as(&self, other: &Self) -> bool {
        let timeless = |standing: &Self| {
            let mut standing = standing.clone();
            for trouble in &mut standing.troubles {
                (trouble.first_ms, trouble.last_ms) = (0, 0);
            }
            standing
        };
        timeless(self) == timeless(other)
    }

    pub(crate) fn into_wire(self) -> wire::Standing {
        wire::Standing {
            carrier: cut(self.carrier),
            why: cut(self.why),
            proxy: cut(self.proxy),
            mtu: self.mtu,
            loss_percent: self.loss_percent,
            skew_ms: self.skew_ms,
            away_ms: self.away_ms,
            troubles: self.troubles.into_iter().take(MAX_TROUBLES).map(Trouble::into_wire).collect(),
            allows_more: self.allows_more || self.allows.len() > MAX_ALLOWS,
            allows: self.allows.into_iter().take(MAX_ALLOWS).map(cut).collect(),
        }
    }

    /// What is longer or more than allowed is cut: it is not worth a broken tunnel.
    pub(crate) fn from_wire(standing: wire::Standing) -> Self {
        Self {
            carrier: cut(standing.carrier),
            why: cut(standing.why),
            proxy: cut(standing.proxy),
            mtu: standing.mtu,
            loss_percent: standing.loss_percent,
            skew_ms: standing.skew_ms,
            away_ms: standing.away_ms,
            troubles: standing.troubles.into_iter().take(MAX_TROUBLES).map(Trouble::from_wire).collect(),
            allows_more: standing.allows_more || standing.allows.len() > MAX_ALLOWS,
            allows: standing.allows.into_iter().take(MAX_ALLOWS).map(cut).collect(),
        }
    }
}

impl Trouble {
    fn into_wire(self) -> wire::Trouble {
        let Self { cause, carrier, address, detail, times, first_ms, last_ms } = self;
        let [cause, carrier, address, detail] = [cause, carrier, address, detail].map(cut);
        wire::Trouble { cause, carrier, address, detail, times, first_ms, last_ms }
    }

    fn from_wire(trouble: wire::Trouble) -> Self {
        let wire::Trouble { cause, carrier, address, detail, times, first_ms, last_ms } = trouble;
        let [cause, carrier, address, detail] = [cause, carrier, address, detail].map(cut);
        Self { cause, carrier, address, detail, times, first_ms, last_ms }
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_cut_and_said() {
        let trouble = Trouble { detail: "ä".repeat(500), ..Trouble::default() };
        let much =
            Standing { troubles: vec![trouble; 20], allows: vec!["10.0.0.0/8:22".into(); 40], ..Standing::default() };
        let read = Standing::from_wire(much.into_wire());
        assert_eq!((read.troubles.len(), read.allows.len(), read.allows_more), (MAX_TROUBLES, MAX_ALLOWS, true));
        assert_eq!(read.troubles[0].detail.chars().count(), MAX_TEXT);
    }

    #[test]
    fn time_that_passes_is_no_news() {
        let trouble = Trouble { cause: "timed-out".into(), times: 1, last_ms: 5, ..Trouble::default() };
        let standing = Standing { troubles: vec![trouble], ..Standing::default() };
        let mut later = standing.clone();
        later.troubles[0].last_ms = 5000;
        assert!(later.says_as(&standing));
        later.troubles[0].times = 2;
        assert!(!later.says_as(&standing));
    }
}
