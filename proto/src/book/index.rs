//! Lookups: from a name, an address or a network to those that have it, who may be more than one.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, btree_map},
    hash::Hash,
    net::IpAddr,
    sync::Arc,
};

use super::spec::Cidr;

/// Who is found under a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hit<'a> {
    /// Nobody.
    None,
    /// One.
    One(&'a Arc<str>),
    /// More than one, in order.
    Many(Vec<&'a Arc<str>>),
}

/// From keys to names. The same name may be put under the same key more than once, and then has to be taken away as
/// often. Never iterated over.
#[derive(Clone, Debug)]
pub(super) struct Index<K>(HashMap<K, Holders>);

/// Nearly always one, and so without a map of its own.
#[derive(Clone, Debug)]
enum Holders {
    One(Arc<str>, u32),
    Many(BTreeMap<Arc<str>, u32>),
}

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Index<K> {
    pub(super) fn add(&mut self, key: K, name: &Arc<str>) {
        match self.0.get_mut(&key) {
            None => {
                self.0.insert(key, Holders::One(Arc::clone(name), 1));
            }
            Some(Holders::One(held, times)) if held == name => *times += 1,
            Some(holders) => {
                if let Holders::One(held, times) = holders {
                    *holders = Holders::Many(BTreeMap::from([(Arc::clone(held), *times)]));
                }
                if let Holders::Many(all) = holders {
                    *all.entry(Arc::clone(name)).or_insert(0) += 1;
                }
            }
        }
    }

    pub(super) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q, name: &Arc<str>)
    where
        K: Borrow<Q>,
    {
        let empty = match self.0.get_mut(key) {
            None => return,
            Some(Holders::One(held, times)) => {
                *times -= u32::from(held == name);
                *times == 0
            }
            Some(Holders::Many(all)) => {
                if let btree_map::Entry::Occupied(mut held) = all.entry(Arc::clone(name)) {
                    *held.get_mut() -= 1;
                    if *held.get() == 0 {
                        held.remove();
                    }
                }
                all.is_empty()
            }
        };
        if empty {
            self.0.remove(key);
        }
    }

    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Hit<'_>
    where
        K: Borrow<Q>,
    {
        match self.0.get(key) {
            None => Hit::None,
            Some(Holders::One(held, _)) => Hit::One(held),
            Some(Holders::Many(all)) => match (all.len(), all.keys().next()) {
                (1, Some(only)) => Hit::One(only),
                (_, None) => Hit::None,
                (_, Some(_)) => Hit::Many(all.keys().collect()),
            },
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Networks. A lookup costs one step per length of prefix that is in use, of which a cluster has one or two.
#[derive(Clone, Debug, Default)]
pub(super) struct Nets(BTreeMap<u8, Index<Cidr>>);

impl Nets {
    pub(super) fn add(&mut self, net: Cidr, name: &Arc<str>) {
        self.0.entry(net.bits()).or_default().add(net, name);
    }

    pub(super) fn remove(&mut self, net: Cidr, name: &Arc<str>) {
        if let Some(index) = self.0.get_mut(&net.bits()) {
            index.remove(&net, name);
            if index.is_empty() {
                self.0.remove(&net.bits());
            }
        }
    }

    /// Those with the longest prefix.
    pub(super) fn get(&self, ip: IpAddr) -> Hit<'_> {
        let hits = self.0.iter().rev().filter_map(|(bits, index)| Some(index.get(&Cidr::new(ip, *bits)?)));
        hits.into_iter().find(|hit| *hit != Hit::None).unwrap_or(Hit::None)
    }
}
