//! The address book of the cluster, as it goes to shards: whole for one that begins to follow, then what changed.
//!
//! Each entry has the number of the change that put it there, and entries stand in the order of these numbers. So a
//! follower that has seen everything up to a number gets what comes after it, however slow it is: nothing queues up, and
//! an entry that changed a hundred times meanwhile is sent once. Entries that went leave their names behind for a while.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;
use proto::{
    book::{BookChange, BookKeys, BookSpec, Node, ObjectKey, Pod, Service},
    id::EdgeId,
};
use tokio::sync::watch;

/// Entries in one line of the watch, endpoints counted: some hundred kilobytes.
const ENTRIES: usize = 1000;
/// Names of entries that went. A follower that is further behind gets the whole book.
const GONE: usize = 100_000;

/// Names one entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A node by its name.
    Node(String),
    /// A pod.
    Pod(ObjectKey),
    /// A service.
    Service(ObjectKey),
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A node.
    Node(Node),
    /// A pod.
    Pod(Pod),
    /// A service.
    Service(Service),
}

impl Entry {
    /// Its name.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Node(node) => Key::Node(node.name.clone()),
            Self::Pod(pod) => Key::Pod(pod.key.clone()),
            Self::Service(service) => Key::Service(service.key.clone()),
        }
    }

    /// The edge that a node is, if it is one.
    #[must_use]
    pub fn edge(&self) -> Option<&EdgeId> {
        match self {
            Self::Node(node) => node.edge.as_ref(),
            Self::Pod(_) | Self::Service(_) => None,
        }
    }
}

/// Which changes of the book somebody has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Up to this one.
    at: u64,
    /// The last one when they began to see it whole; `None` before.
    from: Option<u64>,
}

/// The book. Clones are the same one.
#[derive(Clone, Debug)]
pub struct SharedBook {
    log: Arc<Mutex<Log>>,
    /// The number of the last change.
    at: watch::Sender<u64>,
}

impl Default for SharedBook {
    fn default() -> Self {
        Self { log: Arc::default(), at: watch::channel(0).0 }
    }
}

impl SharedBook {
    /// Whether there is a book at all.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.log.lock().known
    }

    /// Says that what is in it now is a whole book, which may be empty.
    pub fn complete(&self) {
        self.change(|log| log.known = true);
    }

    /// Puts entries in, in place of those with the same names. What is there already as it is costs nothing.
    pub fn put(&self, entries: impl IntoIterator<Item = Entry>) {
        self.change(|log| entries.into_iter().for_each(|entry| log.put(entry)));
    }

    /// Takes entries out.
    pub fn remove<'a>(&self, keys: impl IntoIterator<Item = &'a Key>) {
        self.change(|log| keys.into_iter().for_each(|key| log.remove(key)));
    }

    /// How many nodes that are edges, nodes, pods and services it has.
    #[must_use]
    pub fn size(&self) -> [usize; 4] {
        let log = self.log.lock();
        let mut size = [0; 4];
        for entry in log.entries.values().filter_map(|(_, entry)| entry.as_ref()) {
            match entry {
                Entry::Node(node) => {
                    size[0] += usize::from(node.edge.is_some());
                    size[1] += 1;
                }
                Entry::Pod(_) => size[2] += 1,
                Entry::Service(_) => size[3] += 1,
            }
        }
        size
    }

    /// All names of one kind, which `of` picks.
    #[must_use]
    pub fn keys(&self, of: impl Fn(&Key) -> bool) -> Vec<Key> {
        let log = self.log.lock();
        let held = log.entries.iter().filter(|(key, (_, entry))| entry.is_some() && of(key));
        held.map(|(key, _)| key.clone()).collect()
    }

    /// The next part of what somebody has not seen yet, which then is seen; `None` if that is nothing.
    #[must_use]
    pub fn next(&self, seen: &mut Seen) -> Option<BookChange> {
        self.log.lock().next(seen, ENTRIES)
    }

    /// Tells of changes.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.at.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut Log)) {
        let mut log = self.log.lock();
        let before = (log.at, log.known);
        change(&mut log);
        if (log.at, log.known) != before {
            log.forget(GONE);
            let at = log.at;
            drop(log);
            self.at.send_replace(at);
        }
    }
}

#[derive(Debug, Default)]
struct Log {
    at: u64,
    /// Whether it ever was whole.
    known: bool,
    /// What each name stands for and since which change; nothing if it went.
    entries: HashMap<Key, (u64, Option<Entry>)>,
    /// The same by change.
    order: BTreeMap<u64, Key>,
    /// Changes by which entries went.
    gone: BTreeSet<u64>,
    /// The last one of these that is forgotten.
    horizon: u64,
}

impl Log {
    fn put(&mut self, entry: Entry) {
        let key = entry.key();
        if self.entries.get(&key).is_some_and(|(_, held)| held.as_ref() == Some(&entry)) {
            return;
        }
        self.place(key, Some(entry));
    }

    fn remove(&mut self, key: &Key) {
        if self.entries.get(key).is_some_and(|(_, held)| held.is_some()) {
            self.place(key.clone(), None);
        }
    }

    fn place(&mut self, key: Key, entry: Option<Entry>) {
        self.at += 1;
        let went = entry.is_none();
        if let Some((before, _)) = self.entries.insert(key.clone(), (self.at, entry)) {
            self.order.remove(&before);
            self.gone.remove(&before);
        }
        if went {
            self.gone.insert(self.at);
        }
        self.order.insert(self.at, key);
    }

    /// Forgets names that went long ago; whoever has not heard of these by then needs the whole book.
    fn forget(&mut self, most: usize) {
        if self.gone.len() <= most {
            return;
        }
        // Half of them at once: each time costs everybody who is behind the whole book.
        while self.gone.len() > most / 2
            && let Some(at) = self.gone.pop_first()
        {
            if let Some(key) = self.order.remove(&at) {
                self.entries.remove(&key);
            }
            self.horizon = at;
        }
    }

    fn next(&self, seen: &mut Seen, most: usize) -> Option<BookChange> {
        if !self.known {
            return None;
        }
        let from = seen.from.filter(|from| seen.at.max(*from) >= self.horizon);
        let fresh = from.is_none();
        let (start, from) = from.map_or((0, self.at), |from| (seen.at, from));
        let mut news = self.order.range(start + 1..).peekable();
        let (mut put, mut gone) = (BookSpec::default(), BookKeys::default());
        let (mut at, mut room) = (start, most);
        while room > 0
            && let Some((change, key)) = news.next()
        {
            at = *change;
            room = room.saturating_sub(self.weight(key));
            match self.entries.get(key) {
                Some((_, Some(Entry::Node(node)))) => put.nodes.push(node.clone()),
                Some((_, Some(Entry::Pod(pod)))) => put.pods.push(pod.clone()),
                Some((_, Some(Entry::Service(service)))) => put.services.push(service.clone()),
                // Whoever gets the whole book has never heard of it.
                Some((_, None)) if at <= from => {}
                Some((_, None)) | None => match key {
                    Key::Node(name) => gone.nodes.push(name.clone()),
                    Key::Pod(key) => gone.pods.push(key.clone()),
                    Key::Service(key) => gone.services.push(key.clone()),
                },
            }
        }
        if at == start && !fresh {
            return None;
        }
        *seen = Seen { at, from: Some(from) };
        Some(BookChange { fresh, more: news.peek().is_some(), put, gone })
    }

    fn weight(&self, key: &Key) -> usize {
        match self.entries.get(key) {
            Some((_, Some(Entry::Service(service)))) => {
                1 + service.ports.iter().map(|p| p.endpoints.len()).sum::<usize>()
            }
            Some((_, Some(Entry::Node(_) | Entry::Pod(_)) | None)) | None => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::book::Book;

    use super::*;

    fn node(name: &str, edge: bool) -> Entry {
        let edge = edge.then(|| name.parse().unwrap());
        Entry::Node(Node { name: name.into(), edge, addresses: vec![], kubelet_port: 10250, pod_cidrs: vec![] })
    }

    fn names(book: &BTreeMap<String, Node>) -> Vec<&str> {
        book.keys().map(String::as_str).collect()
    }

    /// What a shard makes of it: the nodes that it knows of.
    fn read(log: &Log, seen: &mut Seen, into: &mut BTreeMap<String, Node>, most: usize) -> usize {
        for parts in 1.. {
            let Some(change) = log.next(seen, most) else { return parts - 1 };
            if change.fresh {
                into.clear();
            }
            into.extend(change.put.nodes.into_iter().map(|n| (n.name.clone(), n)));
            change.gone.nodes.iter().for_each(|name| assert!(into.remove(name).is_some(), "{name}"));
            if !change.more {
                return parts;
            }
        }
        unreachable!()
    }

    #[test]
    fn who_follows_gets_all_and_then_what_changed() {
        let book = SharedBook::default();
        let mut seen = Seen::default();
        book.put([node("a", true), node("b", false)]);
        assert_eq!(book.next(&mut seen), None, "not whole yet");
        book.complete();
        let all = book.next(&mut seen).unwrap();
        assert!(all.fresh && !all.more && all.put.nodes.len() == 2);
        let mut shard = Book::new(all.put);
        assert!(shard.resolve("a", 10250, 0).is_ok());
        assert_eq!(book.next(&mut seen), None);
        book.put([node("a", true)]);
        assert_eq!(book.next(&mut seen), None, "the same again is no news");
        book.put([node("c", true)]);
        book.remove([&Key::Node("b".into()), &Key::Node("never".into())]);
        let change = book.next(&mut seen).unwrap();
        assert_eq!((change.fresh, change.put.nodes.len(), change.gone.nodes.clone()), (false, 1, vec!["b".into()]));
        shard.remove(&change.gone);
        assert_eq!(book.size(), [2, 2, 0, 0]);
    }

    #[test]
    fn a_slow_follower_gets_the_newest_and_never_more_than_the_book() {
        let (mut log, mut seen, mut shard) = (Log { known: true, ..Log::default() }, Seen::default(), BTreeMap::new());
        for name in ["a", "b", "c", "d", "e"] {
            log.put(node(name, true));
        }
        assert_eq!(read(&log, &mut seen, &mut shard, 2), 3, "in three parts");
        assert_eq!(names(&shard), ["a", "b", "c", "d", "e"]);
        for round in 0..100 {
            log.put(node("a", round % 2 == 0));
        }
        log.remove(&Key::Node("b".into()));
        log.put(node("b", false));
        log.remove(&Key::Node("c".into()));
        assert_eq!(log.order.len(), 5);
        assert_eq!(read(&log, &mut seen, &mut shard, 100), 1);
        assert_eq!(names(&shard), ["a", "b", "d", "e"]);
        assert!(shard["b"].edge.is_none());
    }

    #[test]
    fn one_who_is_too_far_behind_begins_anew_even_in_the_middle() {
        let (mut log, mut shard) = (Log { known: true, ..Log::default() }, BTreeMap::new());
        let (mut behind, mut fast, mut middle) = (Seen::default(), Seen::default(), Seen::default());
        (0..10).for_each(|i| log.put(node(&format!("n{i}"), true)));
        read(&log, &mut behind, &mut shard, 100);
        read(&log, &mut fast, &mut BTreeMap::new(), 100);
        let part = log.next(&mut middle, 3).unwrap();
        assert!(part.fresh && part.more);
        (0..6).for_each(|i| log.remove(&Key::Node(format!("n{i}"))));
        log.next(&mut fast, 100).unwrap();
        log.forget(4);
        assert_eq!((log.gone.len(), log.entries.len()), (2, 6));
        assert_eq!(log.next(&mut fast, 100), None, "it has heard of all");
        for seen in [&mut behind, &mut middle] {
            let mut again = *seen;
            assert!(log.next(&mut again, 3).unwrap().fresh);
            read(&log, seen, &mut shard, 3);
            assert_eq!(names(&shard), ["n6", "n7", "n8", "n9"]);
        }
        assert!(!log.next(&mut { behind }, 3).is_some_and(|c| c.fresh), "once is enough");
    }
}
