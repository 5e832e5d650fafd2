//! What the shard has been told by control: an immutable value, replaced with each change. When control is away the
//! last one stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proto::{
    api::{AccessToken, ShardOrder, WatchEvent},
    id::{EdgeId, GroupName, ShardId, SiteName, UserId},
    message::Candidate,
    policy::Policy,
    principal::Principal,
    ring::Ring,
    secret::Secret,
};
use sha2::{Digest, Sha256};

/// The mesh as of a revision.
#[derive(Clone, Debug, Default)]
pub struct MeshState {
    /// Of control; 0 before the first word from it.
    pub revision: u64,
    /// Who may reach what.
    pub policy: Policy,
    /// Serial numbers of certificates that are no longer good.
    pub revoked: BTreeSet<String>,
    /// Access tokens by their hash.
    tokens: BTreeMap<String, AccessToken>,
    /// Edges that are enrolled, with their sites.
    pub edges: BTreeMap<EdgeId, Option<SiteName>>,
    /// Shards that are alive, in the ring or not.
    pub shards: Vec<Candidate>,
    /// Who owns which edge; the newest that was ever heard of.
    pub ring: Arc<Ring>,
    /// The ring before this one: where an edge may still be that has a new owner.
    pub previous: Arc<Ring>,
    /// What administrators want of shards; those that are to serve are not in here.
    pub orders: BTreeMap<ShardId, ShardOrder>,
}

/// Who showed an access token.
#[derive(Clone, Debug)]
pub struct TokenHolder {
    /// As whom it acts.
    pub principal: Principal,
    /// Of the token, under which its use can be ended.
    pub key: String,
}

impl MeshState {
    /// This state with the sections of an event in place of the old ones.
    #[must_use]
    pub fn after(&self, event: WatchEvent) -> Self {
        let mut next = self.clone();
        next.revision = event.revision;
        if let Some(rules) = event.policy {
            next.policy = Policy { rules };
        }
        if let Some(revoked) = event.revoked {
            next.revoked = revoked.into_iter().map(|r| r.serial).collect();
        }
        if let Some(tokens) = event.access_tokens {
            next.tokens = tokens.into_iter().map(|t| (t.sha256.clone(), t)).collect();
        }
        if let Some(edges) = event.edges {
            next.edges = edges;
        }
        if let Some(shards) = event.shards {
            next.shards = shards;
        }
        // An older ring comes from a replica of control that has lost touch. It must not undo what is newer.
        if let Some(spec) = event.ring.filter(|spec| spec.epoch > self.ring.epoch()) {
            next.previous = Arc::clone(&self.ring);
            next.ring = Arc::new(Ring::new(spec));
        }
        if let Some(orders) = event.orders {
            next.orders = orders;
        }
        next
    }

    /// Whether an event changes anything but the revision.
    #[must_use]
    pub const fn is_change(event: &WatchEvent) -> bool {
        event.policy.is_some()
            || event.revoked.is_some()
            || event.access_tokens.is_some()
            || event.edges.is_some()
            || event.shards.is_some()
            || event.ring.is_some()
            || event.orders.is_some()
    }

    /// Who holds an access token; `None` if it is not known or has ended.
    #[must_use]
    pub fn holder(&self, token: &Secret, now: i64) -> Option<TokenHolder> {
        // Found by hash, so that the time of the search tells nothing about the token.
        let hash: String = Sha256::digest(token.reveal()).iter().map(|b| format!("{b:02x}")).collect();
        let found = self.tokens.get(&hash).filter(|t| t.expires > now)?;
        let name: UserId = found.user.as_str().parse().ok()?;
        let groups: Vec<GroupName> = found.groups.clone();
        Some(TokenHolder { principal: Principal::User { name, groups }, key: token_key(&found.id) })
    }

    /// Whether the credential with this key (a serial number, or [`token_key`]) is still good.
    #[must_use]
    pub fn is_good(&self, credential: &str) -> bool {
        match credential.strip_prefix("token:") {
            Some(id) => self.tokens.values().any(|t| t.id == id),
            None => !self.revoked.contains(credential),
        }
    }
}

/// The key of an access token among credentials.
#[must_use]
pub fn token_key(id: &str) -> String {
    format!("token:{id}")
}
