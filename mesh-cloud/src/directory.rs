//! What other shards have said about edges that are not here: the owner of an arc of the ring is the directory of that
//! arc. Everything in it is a hint; whether an edge is really there is for its holder to say.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use proto::{
    id::{EdgeId, ServiceName, ShardId},
    peer::Held,
};
use tokio::{
    sync::{Notify, futures::Notified},
    time::Instant,
};

/// How long it is remembered where an edge that left was sent to.
const TRACE: Duration = Duration::from_secs(60);
/// Traces that are kept; when there are more, those that are over are dropped, and then all.
const TRACES: usize = 50_000;
/// Entries that one other shard may put in here.
const HELD: usize = 200_000;

/// The directory of a shard. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    /// Those who wait are woken in the order in which they came, so that a simulated run is like the one before.
    news: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    held: HashMap<EdgeId, Entry>,
    traces: HashMap<EdgeId, (ShardId, Instant)>,
    peers: BTreeMap<ShardId, Peer>,
    conversations: u64,
}

#[derive(Debug)]
struct Entry {
    holder: ShardId,
    unix_ms: u64,
}

#[derive(Debug)]
struct Peer {
    /// Which of its conversations with us is the newest.
    conversation: u64,
    /// When that one began.
    since: Instant,
    /// Whether it has said which tunnels it holds at all.
    spoke: bool,
    /// The ring by which it has told all there is.
    told: Option<u64>,
    /// How many entries are its.
    held: usize,
    /// What its edges announce, once it has said so.
    services: Option<BTreeMap<ServiceName, u32>>,
}

/// One peer's word, for as long as its link lives. A newer link of the same peer takes its place.
#[derive(Debug)]
pub struct Conversation {
    directory: Directory,
    peer: ShardId,
    number: u64,
}

impl Directory {
    /// Begins to listen to a peer.
    #[must_use]
    pub fn listen(&self, peer: ShardId) -> Conversation {
        let mut inner = self.0.inner.lock();
        inner.conversations += 1;
        let number = inner.conversations;
        // What it said in the one before stands until it has said otherwise.
        let (held, services) = inner.peers.remove(&peer).map(|p| (p.held, p.services)).unwrap_or_default();
        let new = Peer { conversation: number, since: Instant::now(), spoke: false, told: None, held, services };
        inner.peers.insert(peer.clone(), new);
        Conversation { directory: self.clone(), peer, number }
    }

    /// Who holds the tunnel of an edge, and when that edge said Hello there.
    #[must_use]
    pub fn holder(&self, edge: &EdgeId) -> Option<(ShardId, u64)> {
        self.0.inner.lock().held.get(edge).map(|e| (e.holder.clone(), e.unix_ms))
    }

    /// Notes that an edge which leaves was sent to another shard.
    pub fn sent(&self, edge: EdgeId, to: ShardId) {
        let (mut inner, now) = (self.0.inner.lock(), Instant::now());
        if inner.traces.len() >= TRACES {
            inner.traces.retain(|_, (_, until)| *until > now);
        }
        if inner.traces.len() >= TRACES {
            inner.traces.clear();
        }
        inner.traces.insert(edge, (to, now + TRACE));
    }

    /// Where an edge that was here has been sent.
    #[must_use]
    pub fn trace(&self, edge: &EdgeId) -> Option<ShardId> {
        let inner = self.0.inner.lock();
        inner.traces.get(edge).filter(|(_, until)| *until > Instant::now()).map(|(to, _)| to.clone())
    }

    /// Shards with edges that announce a service, and with how many.
    #[must_use]
    pub fn providers(&self, service: &ServiceName) -> Vec<(ShardId, u32)> {
        let inner = self.0.inner.lock();
        let of = |(shard, peer): (&ShardId, &Peer)| Some((shard.clone(), *peer.services.as_ref()?.get(service)?));
        inner.peers.iter().filter_map(of).collect()
    }

    /// Whether a peer has told all that follows from the ring of this epoch. Until then an edge of our arc may be there
    /// though it is not in here: an arc has a new owner before that one has heard what is in it.
    #[must_use]
    pub fn has_heard(&self, peer: &ShardId, epoch: u64) -> bool {
        self.0.inner.lock().peers.get(peer).is_some_and(|p| p.told == Some(epoch))
    }

    /// Whether a peer has said which services can be reached there.
    #[must_use]
    pub fn knows_services(&self, peer: &ShardId) -> bool {
        self.0.inner.lock().peers.get(peer).is_some_and(|p| p.services.is_some())
    }

    /// Since when a peer has been speaking: later than an event if it has started again since, or could not be reached.
    #[must_use]
    pub fn speaks_since(&self, peer: &ShardId) -> Option<Instant> {
        self.0.inner.lock().peers.get(peer).map(|p| p.since)
    }

    /// Waits until a peer has told something new. Cancel-safe.
    pub fn news(&self) -> Notified<'_> {
        self.0.news.notified()
    }

    /// Edges of this shard's arc whose tunnels end elsewhere.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.inner.lock().held.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn forget(&mut self, peer: &ShardId) {
        if self.peers.get(peer).is_some_and(|p| p.held > 0) {
            self.held.retain(|_, entry| entry.holder != *peer);
        }
        if let Some(known) = self.peers.get_mut(peer) {
            known.held = 0;
        }
    }

    fn enter(&mut self, peer: &ShardId, Held { edge, unix_ms }: Held) {
        if self.held.get(&edge).is_some_and(|known| known.unix_ms > unix_ms && known.holder != *peer) {
            return;
        }
        if self.peers.get(peer).is_some_and(|p| p.held >= HELD) {
            return;
        }
        let old = self.held.insert(edge, Entry { holder: peer.clone(), unix_ms });
        if let Some(loser) = old.and_then(|old| self.peers.get_mut(&old.holder)) {
            loser.held -= 1;
        }
        if let Some(known) = self.peers.get_mut(peer) {
            known.held += 1;
        }
    }

    fn remove(&mut self, peer: &ShardId, edge: &EdgeId) {
        if self.held.get(edge).is_some_and(|entry| entry.holder == *peer) {
            self.held.remove(edge);
            if let Some(known) = self.peers.get_mut(peer) {
                known.held -= 1;
            }
        }
    }
}

impl Conversation {
    fn with(&self, work: impl FnOnce(&mut Inner)) {
        let mut inner = self.directory.0.inner.lock();
        if inner.peers.get(&self.peer).is_some_and(|p| p.conversation == self.number) {
            work(&mut inner);
            drop(inner);
            self.directory.0.news.notify_waiters();
        }
    }

    fn with_peer(&self, work: impl FnOnce(&mut Peer)) {
        self.with(|inner| {
            if let Some(peer) = inner.peers.get_mut(&self.peer) {
                work(peer);
            }
        });
    }

    /// The peer goes by the ring of this epoch. When it says so after it has said what it holds, it has told all there
    /// is by that ring.
    pub fn greeted(&self, epoch: u64) {
        self.with_peer(|peer| peer.told = peer.spoke.then_some(epoch));
    }

    /// The peer holds these; with `all`, nothing that it said before counts.
    pub fn held(&self, all: bool, edges: Vec<Held>) {
        self.with(|inner| {
            if all {
                inner.forget(&self.peer);
            }
            edges.into_iter().for_each(|held| inner.enter(&self.peer, held));
            inner.peers.get_mut(&self.peer).into_iter().for_each(|peer| peer.spoke = true);
        });
    }

    /// The peer does not hold these any more.
    pub fn released(&self, edges: &[EdgeId]) {
        self.with(|inner| edges.iter().for_each(|edge| inner.remove(&self.peer, edge)));
    }

    /// These services can be reached there.
    pub fn announced(&self, services: BTreeMap<ServiceName, u32>) {
        self.with_peer(|peer| peer.services = Some(services));
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.with(|inner| {
            inner.forget(&self.peer);
            inner.peers.remove(&self.peer);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(edge: &str, unix_ms: u64) -> Held {
        Held { edge: edge.parse().unwrap(), unix_ms }
    }

    fn holder(directory: &Directory, edge: &str) -> Option<String> {
        directory.holder(&edge.parse().unwrap()).map(|(shard, _)| shard.to_string())
    }

    #[test]
    fn the_newer_tunnel_counts_and_an_older_end_does_not_remove_it() {
        let directory = Directory::default();
        let (a, b) = (directory.listen("a".parse().unwrap()), directory.listen("b".parse().unwrap()));
        a.held(true, vec![held("x", 10), held("y", 10)]);
        b.held(true, vec![held("x", 20)]);
        a.held(false, vec![held("x", 10)]);
        assert_eq!(holder(&directory, "x").unwrap(), "b");
        a.released(&["x".parse().unwrap()]);
        assert_eq!(holder(&directory, "x").unwrap(), "b");
        a.held(true, vec![]);
        assert_eq!((holder(&directory, "y"), directory.len()), (None, 1));
        b.released(&["x".parse().unwrap()]);
        assert!(directory.is_empty());
    }

    #[test]
    fn a_peers_word_ends_with_its_link_and_an_older_link_says_nothing_more() {
        let directory = Directory::default();
        let old = directory.listen("a".parse().unwrap());
        old.held(true, vec![held("x", 10)]);
        let new = directory.listen("a".parse().unwrap());
        old.held(true, vec![held("y", 10)]);
        assert_eq!(holder(&directory, "y"), None);
        new.held(true, vec![held("z", 10)]);
        new.announced(BTreeMap::from([("web".parse().unwrap(), 3)]));
        drop(old);
        assert_eq!(holder(&directory, "z").unwrap(), "a");
        assert_eq!(directory.providers(&"web".parse().unwrap()), [("a".parse().unwrap(), 3)]);
        drop(new);
        assert!(directory.is_empty() && directory.providers(&"web".parse().unwrap()).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_heard_when_it_has_told_all_by_the_same_ring() {
        let (directory, peer) = (Directory::default(), "a".parse().unwrap());
        assert!(!directory.has_heard(&peer, 4) && directory.speaks_since(&peer).is_none());
        let a = directory.listen("a".parse().unwrap());
        let began = Instant::now();
        a.greeted(4);
        assert!(!directory.has_heard(&peer, 4), "it has said nothing yet");
        a.held(true, vec![held("x", 10)]);
        assert!(!directory.has_heard(&peer, 4), "more may follow");
        a.greeted(4);
        assert!(directory.has_heard(&peer, 4) && !directory.has_heard(&peer, 5));
        let news = directory.news();
        tokio::pin!(news);
        news.as_mut().enable();
        a.greeted(5);
        news.await;
        assert!(directory.has_heard(&peer, 5) && !directory.has_heard(&peer, 4));
        assert!(!directory.knows_services(&peer));
        a.announced(BTreeMap::new());
        assert!(directory.knows_services(&peer));
        tokio::time::advance(TRACE).await;
        assert_eq!(directory.speaks_since(&peer), Some(began));
        let again = directory.listen("a".parse().unwrap());
        assert!(!directory.has_heard(&peer, 5), "it may hold others now");
        assert_eq!((directory.len(), directory.speaks_since(&peer)), (1, Some(began + TRACE)));
        drop((a, again));
        assert_eq!(directory.speaks_since(&peer), None);
    }

    #[tokio::test(start_paused = true)]
    async fn traces_fade() {
        let directory = Directory::default();
        directory.sent("x".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(directory.trace(&"x".parse().unwrap()).unwrap().as_str(), "b");
        tokio::time::advance(TRACE).await;
        assert_eq!(directory.trace(&"x".parse().unwrap()), None);
    }
}
