//! What a shard is told of how the edge came to it.

use std::sync::Arc;

use proto::{message::EdgeToShard, standing::Standing};
use runtime::link::Link;
use tokio::time::Instant;

use super::losses::Losses;
use crate::journal::Journal;

/// What is told over one tunnel.
pub(super) struct Story {
    journal: Journal,
    proxy: String,
    allows: Arc<[String]>,
    losses: Losses,
    told: Option<Standing>,
}

impl Story {
    /// Nothing has been told yet.
    pub(super) fn new(journal: Journal, proxy: String, allows: Arc<[String]>) -> Self {
        Self { journal, proxy, allows, losses: Losses::default(), told: None }
    }

    /// How the edge stands, if that is news.
    pub(super) fn news(&mut self, link: &Link) -> Option<EdgeToShard> {
        let stats = link.stats();
        let lost = self.losses.percent((stats.sent_packets, stats.lost_packets), stats.mtu, Instant::now());
        let standing = self.journal.standing(link, lost, (&self.proxy, &self.allows));
        if self.told.as_ref().is_some_and(|told| told.says_as(&standing)) {
            return None;
        }
        self.told = Some(standing.clone());
        Some(EdgeToShard::Standing(standing))
    }
}
