//! Streams of users in a simulated mesh, and how they ended.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use anyhow::ensure;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::{Cluster, shard::ShardSeat};
use crate::{
    probe::{Load, StreamEnd},
    simnet::seed_for,
};

/// How streams ended.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Byte-exact.
    pub exact: usize,
    /// Refused, by code.
    pub refused: BTreeMap<&'static str, usize>,
    /// Broken, by reason.
    pub broken: BTreeMap<String, usize>,
    /// Against the rules.
    pub wrong: Vec<String>,
    /// The first ones that were refused or broke, word for word.
    pub felt: Vec<String>,
}

impl Tally {
    fn add(&mut self, name: &str, end: &StreamEnd) {
        if *end != StreamEnd::Exact && self.felt.len() < 10 {
            self.felt.push(format!("{name}: {end}"));
        }
        match end {
            StreamEnd::Exact => self.exact += 1,
            StreamEnd::Refused(code) => *self.refused.entry(code.slug()).or_default() += 1,
            StreamEnd::Broken(why) => *self.broken.entry(why.clone()).or_default() += 1,
            StreamEnd::Wrong(why) => self.wrong.push(format!("{name}: {why}")),
        }
    }

    /// How many broke.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.broken.values().sum()
    }

    /// How many were refused.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.values().sum()
    }
}

impl Cluster {
    /// Opens streams from a user to an edge, and returns at once.
    pub fn open_streams(&mut self, user: usize, edge: usize, count: usize, bytes: u64) {
        for _ in 0..count {
            let load = Load::of(seed_for(self.seed, ("stream", self.opened)), bytes);
            self.open_stream(user, edge, load);
        }
    }

    /// Opens one stream, and returns at once. It goes by way of any shard, whether that one holds the edge or not; a
    /// shard that is leaving or cannot be reached sends it to another one.
    pub fn open_stream(&mut self, user: usize, edge: usize, load: Load) {
        let ways = self.ways();
        self.open_stream_by(ways, user, edge, load);
    }

    /// Opens one stream by way of these shards, each if the one before it says that another one serves.
    pub fn open_stream_by(&mut self, ways: Vec<SocketAddr>, user: usize, edge: usize, load: Load) {
        self.opened += 1;
        let name = self.edges[edge].name.clone();
        let user = Arc::clone(&self.users[user]);
        let title = format!("{} to {name} by {ways:?}, {} bytes at {:?}", user.name, load.bytes, self.net.elapsed());
        let stream = self.harness.spawn(async move { user.stream_by(&ways, &name, &load).await });
        self.streams.push((title, stream));
    }

    /// The shards that run and have heard from control, which is when `/readyz` says yes, in an order of chance.
    fn ways(&self) -> Vec<SocketAddr> {
        let ready = |s: &&ShardSeat| s.running.as_ref().is_some_and(|p| p.state.borrow().revision > 0);
        let mut ways: Vec<_> = self.shards.iter().filter(ready).map(|s| s.address).collect();
        ways.shuffle(&mut StdRng::seed_from_u64(seed_for(self.seed, ("way", self.opened))));
        if ways.is_empty() {
            ways.extend(self.shards.first().map(|s| s.address));
        }
        ways
    }

    /// Streams whose end was not waited for.
    #[must_use]
    pub fn open(&self) -> usize {
        self.streams.iter().filter(|(_, stream)| !stream.is_finished()).count()
    }

    /// Drops every stream where it is, as an opener that crashes in its own code does.
    pub fn forget_streams(&mut self) {
        self.streams.drain(..).for_each(|(_, stream)| stream.abort());
    }

    /// Waits until every stream has ended, and says how.
    ///
    /// # Errors
    /// If one ended against the rules, or a rule is broken meanwhile.
    pub async fn streams_ended(&mut self) -> anyhow::Result<Tally> {
        let mut tally = Tally::default();
        for (name, mut stream) in std::mem::take(&mut self.streams) {
            let end = loop {
                match tokio::time::timeout(super::STEP, &mut stream).await {
                    Ok(end) => break end.unwrap_or_else(|e| StreamEnd::Wrong(e.to_string())),
                    Err(_) => self.look()?,
                }
            };
            self.net.note(format!("{name}: {end}"));
            tally.add(&name, &end);
        }
        ensure!(tally.wrong.is_empty(), "streams ended as none may:\n{}", tally.wrong.join("\n"));
        Ok(tally)
    }
}
