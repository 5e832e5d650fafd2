//! What the shard has been told by control: an immutable value, replaced with each change. When control is away the
//! last one stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use parking_lot::RwLock;
use proto::{
    api::{AccessToken, ShardOrder, WatchEvent},
    book::{Book, BookChange, Resolved, Unresolved},
    id::{EdgeId, GroupName, ShardId, SiteName, UserId},
    message::Candidate,
    policy::Policy,
    principal::Principal,
    ring::Ring,
    secret::Secret,
    ssh,
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
    /// Who may come in by SSH.
    ssh: Arc<KnownKeys>,
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
    /// Where the nodes, pods and services of the cluster are. The one thing that all states share and that is changed
    /// in place: it may have a million entries, and changes all the time.
    pub book: SharedBook,
}

/// The newest address book. Clones are the same book.
#[derive(Clone, Debug, Default)]
pub struct SharedBook(Arc<RwLock<Editions>>);

#[derive(Debug, Default)]
struct Editions {
    /// What counts; none before the first whole book.
    present: Option<Book>,
    /// A whole book of which parts are still to come.
    coming: Option<Book>,
}

impl SharedBook {
    /// Takes a change in.
    pub fn change(&self, change: BookChange) {
        let mut editions = self.0.write();
        if change.fresh {
            editions.coming = Some(Book::default());
        }
        let Editions { present, coming } = &mut *editions;
        // A change of a book that was never begun says too little to be used.
        let Some(book) = coming.as_mut().or(present.as_mut()) else { return };
        book.remove(&change.gone);
        book.put(change.put);
        if !change.more
            && let Some(whole) = coming.take()
        {
            *present = Some(whole);
        }
    }

    /// Where a request goes; `None` if there is no book yet.
    #[must_use]
    pub fn resolve(&self, host: &str, port: u16, turn: u64) -> Option<Result<Resolved, Unresolved>> {
        self.0.read().present.as_ref().map(|book| book.resolve(host, port, turn))
    }

    /// Nodes, pods and services that are known, and those that found no room; `None` if there is no book yet.
    #[must_use]
    pub fn size(&self) -> Option<([usize; 3], u64)> {
        self.0.read().present.as_ref().map(|book| (book.size(), book.left_out()))
    }
}

/// Keys that open the SSH door, as lines without comments.
#[derive(Debug, Default)]
struct KnownKeys {
    authorities: BTreeSet<String>,
    users: BTreeMap<String, ssh::Key>,
    ids: BTreeSet<String>,
}

impl From<ssh::Trust> for KnownKeys {
    fn from(trust: ssh::Trust) -> Self {
        let ids = trust.keys.iter().map(|key| key.id.clone()).collect();
        let users = trust.keys.into_iter().map(|key| (key.key.clone(), key)).collect();
        Self { authorities: trust.authorities.into_iter().collect(), users, ids }
    }
}

/// Who showed an access token, or a key.
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
        if let Some(trust) = event.ssh {
            next.ssh = Arc::new(trust.into());
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
        if let Some(change) = event.book {
            next.book.change(change);
        }
        next
    }

    /// Whether an event changes anything but the revision and the book.
    #[must_use]
    pub const fn is_change(event: &WatchEvent) -> bool {
        event.policy.is_some()
            || event.revoked.is_some()
            || event.access_tokens.is_some()
            || event.ssh.is_some()
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

    /// Whose key this is, a line without a comment; `None` if it is not registered.
    #[must_use]
    pub fn key_holder(&self, line: &str) -> Option<TokenHolder> {
        let key = self.ssh.users.get(line)?;
        let name: UserId = key.user.as_str().parse().ok()?;
        let principal = Principal::User { name, groups: key.groups.clone() };
        Some(TokenHolder { principal, key: ssh::key_name(&key.id) })
    }

    /// Whether this key, a line without a comment, signs SSH certificates of users.
    #[must_use]
    pub fn is_ssh_authority(&self, line: &str) -> bool {
        self.ssh.authorities.contains(line)
    }

    /// Whether the credential with this key (a serial number, [`token_key`], or a name of [`proto::ssh`]) is still good.
    #[must_use]
    pub fn is_good(&self, credential: &str) -> bool {
        if let Some(id) = credential.strip_prefix(ssh::KEY_PREFIX) {
            return self.ssh.ids.contains(id);
        }
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
