//! What a shard is told of how the edge came to it.

use std::sync::Arc;

use proto::{message::EdgeToShard, standing::Standing};
use runtime::link::Link;

use crate::journal::Journal;

/// What is told over one tunnel.
pub(super) struct Story {
    journal: Journal,
    proxy: String,
    allows: Arc<[String]>,
    told: Option<Standing>,
}

impl Story {
    /// Nothing has been told yet.
    pub(super) const fn new(journal: Journal, proxy: String, allows: Arc<[String]>) -> Self {
        Self { journal, proxy, allows, told: None }
    }

    /// How the edge stands, if that is news.
    pub(super) fn news(&mut self, link: &Link) -> Option<EdgeToShard> {
        let standing = self.journal.standing(link, &self.proxy, &self.allows);
        if self.told.as_ref().is_some_and(|told| told.says_as(&standing)) {
            return None;
        }
        self.told = Some(standing.clone());
        Some(EdgeToShard::Standing(standing))
    }
}
