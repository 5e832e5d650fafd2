//! The newest tunnel of each edge on this shard, and who announces what.
//!
//! A newer connection of an edge replaces the older one, and the older one's clean-up never removes the newer: entries
//! carry generations. Two machines with one identity are told apart from a restarted one by their instance numbers: a
//! dead process never comes back, so an instance that was replaced and returns is a second machine.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use proto::id::{EdgeId, ServiceName};
use tokio::{sync::Notify, time::Instant};

use crate::session::EdgeHandle;

/// Replaced instances that are remembered per edge.
const REMEMBERED: usize = 4;
/// For how long.
const MEMORY: Duration = Duration::from_secs(600);
/// Edges that have gone whose time of going is remembered.
const GONE: usize = 100_000;

/// All edges here. Clones are the same registry.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    edges: HashMap<EdgeId, Entry>,
    services: HashMap<ServiceName, BTreeSet<EdgeId>>,
    gone: HashMap<EdgeId, i64>,
    followers: BTreeMap<u64, Follower>,
    followed: u64,
    generation: u64,
}

/// What has changed since one that follows the registry looked last.
#[derive(Debug, Default)]
struct Follower {
    changed: BTreeSet<EdgeId>,
    news: Arc<Notify>,
}

/// Tells which edges came, changed or went, each follower for itself.
#[derive(Debug)]
pub struct Changes {
    registry: Registry,
    number: u64,
    news: Arc<Notify>,
}

#[derive(Debug)]
struct Entry {
    handle: Arc<EdgeHandle>,
    replaced: VecDeque<(u64, Instant)>,
}

/// The identity is in use by another machine right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// Where the one that stays is.
    pub incumbent: std::net::SocketAddr,
}

/// Keeps an edge in the registry until dropped, unless a newer one has taken its place.
#[derive(Debug)]
pub struct Registered {
    registry: Registry,
    handle: Arc<EdgeHandle>,
}

impl Registry {
    /// A number for the next tunnel, larger than all before.
    #[must_use]
    pub fn next_generation(&self) -> u64 {
        let mut inner = self.0.lock();
        inner.generation += 1;
        inner.generation
    }

    /// Enters a tunnel. Returns the one that it replaces, which its session must then close.
    ///
    /// # Errors
    /// If its instance was replaced before, while another one lives.
    pub fn enter(&self, handle: Arc<EdgeHandle>) -> Result<(Registered, Option<Arc<EdgeHandle>>), Duplicate> {
        let mut inner = self.0.lock();
        let mut replaced = VecDeque::new();
        let old = inner.edges.get_mut(&handle.id).map(|entry| {
            entry.replaced.retain(|(_, when)| when.elapsed() < MEMORY);
            (Arc::clone(&entry.handle), std::mem::take(&mut entry.replaced))
        });
        let old = match old {
            None => None,
            Some((old, remembered)) if old.instance == handle.instance => {
                replaced = remembered;
                Some(old)
            }
            Some((old, remembered)) => {
                replaced = remembered;
                if replaced.iter().any(|(instance, _)| *instance == handle.instance) {
                    let incumbent = old.link.remote_address();
                    if let Some(entry) = inner.edges.get_mut(&handle.id) {
                        entry.replaced = replaced;
                    }
                    return Err(Duplicate { incumbent });
                }
                replaced.push_back((old.instance, Instant::now()));
                if replaced.len() > REMEMBERED {
                    replaced.pop_front();
                }
                Some(old)
            }
        };
        if let Some(old) = &old {
            inner.withdraw(old);
        }
        inner.edges.insert(handle.id.clone(), Entry { handle: Arc::clone(&handle), replaced });
        inner.gone.remove(&handle.id);
        inner.changed(&handle.id);
        Ok((Registered { registry: self.clone(), handle }, old))
    }

    /// The tunnel of an edge.
    #[must_use]
    pub fn find(&self, edge: &EdgeId) -> Option<Arc<EdgeHandle>> {
        self.0.lock().edges.get(edge).map(|e| Arc::clone(&e.handle))
    }

    /// The tunnels of the edges that announce a service.
    #[must_use]
    pub fn announcing(&self, service: &ServiceName) -> Vec<Arc<EdgeHandle>> {
        let inner = self.0.lock();
        let edges = inner.services.get(service).into_iter().flatten();
        edges.filter_map(|edge| inner.edges.get(edge)).map(|e| Arc::clone(&e.handle)).collect()
    }

    /// When an edge that is not here was last here, in seconds since 1970.
    #[must_use]
    pub fn last_seen(&self, edge: &EdgeId) -> Option<i64> {
        self.0.lock().gone.get(edge).copied()
    }

    /// Every tunnel, in the order of the edges' names.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<EdgeHandle>> {
        let mut all: Vec<_> = self.0.lock().edges.values().map(|e| Arc::clone(&e.handle)).collect();
        all.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// How many tunnels there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().edges.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Follows the registry from now on.
    #[must_use]
    pub fn changes(&self) -> Changes {
        let mut inner = self.0.lock();
        inner.followed += 1;
        let (number, follower) = (inner.followed, Follower::default());
        let news = Arc::clone(&follower.news);
        inner.followers.insert(number, follower);
        Changes { registry: self.clone(), number, news }
    }

    /// How many edges announce each service.
    #[must_use]
    pub fn services(&self) -> BTreeMap<ServiceName, u32> {
        let inner = self.0.lock();
        let count = |edges: &BTreeSet<EdgeId>| u32::try_from(edges.len()).unwrap_or(u32::MAX);
        inner.services.iter().map(|(name, edges)| (name.clone(), count(edges))).collect()
    }
}

impl Changes {
    /// Edges that came, changed or went since the last call.
    #[must_use]
    pub fn take(&self) -> BTreeSet<EdgeId> {
        let mut inner = self.registry.0.lock();
        inner.followers.get_mut(&self.number).map(|f| std::mem::take(&mut f.changed)).unwrap_or_default()
    }

    /// Waits until something has changed. Cancel-safe; one waiter.
    pub async fn some(&self) {
        self.news.notified().await;
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.registry.0.lock().followers.remove(&self.number);
    }
}

impl Inner {
    fn changed(&mut self, edge: &EdgeId) {
        for follower in self.followers.values_mut() {
            follower.changed.insert(edge.clone());
            follower.news.notify_one();
        }
    }

    fn withdraw(&mut self, handle: &EdgeHandle) {
        for service in handle.services().iter() {
            if let Some(edges) = self.services.get_mut(&service.name) {
                edges.remove(&handle.id);
                if edges.is_empty() {
                    self.services.remove(&service.name);
                }
            }
        }
    }

    fn is_newest(&self, handle: &EdgeHandle) -> bool {
        self.edges.get(&handle.id).is_some_and(|e| e.handle.generation == handle.generation)
    }
}

impl Registered {
    /// Takes note of what the edge now announces.
    pub fn announce(&self, services: Vec<proto::message::Service>) {
        let mut inner = self.registry.0.lock();
        if !inner.is_newest(&self.handle) {
            return;
        }
        inner.withdraw(&self.handle);
        for service in &services {
            inner.services.entry(service.name.clone()).or_default().insert(self.handle.id.clone());
        }
        self.handle.set_services(services);
        inner.changed(&self.handle.id);
    }

    /// Takes note of how the edge says that it came here. Control is told with the next report; nobody is woken for it.
    pub fn stands(&self, standing: proto::standing::Standing) {
        self.handle.set_standing(standing);
        let mut inner = self.registry.0.lock();
        if inner.is_newest(&self.handle) {
            for follower in inner.followers.values_mut() {
                follower.changed.insert(self.handle.id.clone());
            }
        }
    }

    /// Whether no newer tunnel of the edge has come.
    #[must_use]
    pub fn is_newest(&self) -> bool {
        self.registry.0.lock().is_newest(&self.handle)
    }

    /// Takes the tunnel out, unless a newer one has taken its place: no more streams are opened to it.
    pub fn leave(&self) {
        let mut inner = self.registry.0.lock();
        if !inner.is_newest(&self.handle) {
            return;
        }
        inner.withdraw(&self.handle);
        inner.edges.remove(&self.handle.id);
        if inner.gone.len() < GONE {
            inner.gone.insert(self.handle.id.clone(), runtime::clock::unix_now());
        }
        inner.changed(&self.handle.id);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.leave();
    }
}
