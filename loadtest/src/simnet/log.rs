//! What happened on the network, and its hash: two runs of one seed must have the same.
//!
//! What counts is the order of things on each way from host to host, and the order of notes. Two hosts that act at the
//! same moment may do so in either order: tokio wakes the waiters of a watch in one that differs from run to run, and
//! neither of the two can know of the other yet.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Entries that are kept word for word; the hash goes on beyond them.
const KEPT: usize = 2_000_000;

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// On its way, and there after this long.
    Flies(Duration),
    /// By chance.
    Lost,
    /// There is no way now.
    Cut,
    /// The queue in front of a slow link was full.
    Queued,
    /// Nobody listens there.
    Nobody,
    /// The receiver's buffer was full.
    Overrun,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// A datagram.
    Datagram {
        /// Since the beginning.
        at: Duration,
        /// From.
        from: SocketAddr,
        /// To.
        to: SocketAddr,
        /// Its size in bytes.
        size: usize,
        /// What became of it.
        fate: Fate,
    },
    /// A message of those that go by other means than datagrams of ours, as those with control do.
    Message {
        /// Since the beginning.
        at: Duration,
        /// From.
        from: IpAddr,
        /// To.
        to: IpAddr,
        /// What became of it.
        fate: Fate,
    },
    /// Something that the story did or saw.
    Note {
        /// Since the beginning.
        at: Duration,
        /// What.
        what: String,
    },
}

/// A way from host to host; none for notes.
type Way = Option<(IpAddr, IpAddr)>;

impl Entry {
    const fn place(&self) -> (Duration, Way) {
        match self {
            Self::Datagram { at, from, to, .. } => (*at, Some((from.ip(), to.ip()))),
            Self::Message { at, from, to, .. } => (*at, Some((*from, *to))),
            Self::Note { at, .. } => (*at, None),
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Datagram { at, from, to, size, fate } => {
                write!(f, "{:.6} {from} -> {to} {size} bytes {fate:?}", at.as_secs_f64())
            }
            Self::Message { at, from, to, fate } => {
                write!(f, "{:.6} {from} -> {to} a message {fate:?}", at.as_secs_f64())
            }
            Self::Note { at, what } => write!(f, "{:.6} {what}", at.as_secs_f64()),
        }
    }
}

/// The log of a network.
#[derive(Clone, Debug, Default)]
pub struct Log {
    hashers: BTreeMap<Way, DefaultHasher>,
    entries: Vec<Entry>,
    count: u64,
}

impl Log {
    pub(super) fn push(&mut self, entry: Entry) {
        entry.hash(self.hashers.entry(entry.place().1).or_default());
        self.count += 1;
        if self.entries.len() < KEPT {
            self.entries.push(entry);
        }
    }

    /// Of everything so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (way, one) in &self.hashers {
            (way, one.finish()).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Entries so far.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.count
    }

    /// Whether nothing has happened.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The beginning, word for word: at most 2,000,000 entries.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The first place where two logs differ, with what came before it; `None` if they are the same.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.hash() == other.hash() {
            return None;
        }
        let sorted = |log: &Self| {
            let mut entries = log.entries.clone();
            entries.sort_by_key(Entry::place);
            entries
        };
        let (ours, theirs) = (sorted(self), sorted(other));
        let same = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
        let line = |log: &[Entry]| log.get(same).map_or_else(|| "the end".to_owned(), ToString::to_string);
        let before: String = ours[same.saturating_sub(5)..same].iter().map(|e| format!("  {e}\n")).collect();
        Some(format!("entry {same} differs:\n{before}- {}\n+ {}", line(&ours), line(&theirs)))
    }
}
