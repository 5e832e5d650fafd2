//! Credentials in use. Whatever was let in by one holds a [`Lease`] on it; ending the credential ends all of that.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// All credentials in use. Clones are the same set.
#[derive(Clone, Debug, Default)]
pub struct LiveCredentials(Arc<Mutex<BTreeMap<String, Entry>>>);

#[derive(Debug)]
struct Entry {
    ended: CancellationToken,
    leases: usize,
}

/// The use of a credential, until dropped.
#[derive(Debug)]
pub struct Lease {
    key: String,
    ended: CancellationToken,
    all: LiveCredentials,
}

impl LiveCredentials {
    /// Takes note that a credential is used.
    #[must_use]
    pub fn lease(&self, key: &str) -> Lease {
        let mut all = self.0.lock();
        let entry = all.entry(key.to_owned()).or_insert_with(|| Entry { ended: CancellationToken::new(), leases: 0 });
        entry.leases += 1;
        Lease { key: key.to_owned(), ended: entry.ended.clone(), all: self.clone() }
    }

    /// Ends every credential that is not good any more. Returns how many.
    pub fn end_where(&self, is_good: impl Fn(&str) -> bool) -> usize {
        let all = self.0.lock();
        let bad = all.iter().filter(|(key, entry)| !entry.ended.is_cancelled() && !is_good(key));
        bad.map(|(_, entry)| entry.ended.cancel()).count()
    }

    /// Credentials in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Whether none is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Lease {
    /// Cancelled once the credential has ended.
    #[must_use]
    pub const fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some(entry) = all.get_mut(&self.key) {
            entry.leases -= 1;
            if entry.leases == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ending_a_credential_ends_its_uses_and_nothing_stays() {
        let live = LiveCredentials::default();
        let (a, b, other) = (live.lease("1"), live.lease("1"), live.lease("2"));
        assert_eq!(live.end_where(|key| key != "1"), 1);
        assert!(a.ended().is_cancelled() && b.ended().is_cancelled() && !other.ended().is_cancelled());
        assert_eq!(live.end_where(|key| key != "1"), 0, "it is counted once");
        drop((a, b, other));
        assert!(live.is_empty());
    }
}
