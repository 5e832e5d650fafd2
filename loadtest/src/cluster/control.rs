//! Control in a simulated mesh: a database, one to three replicas, and how shards report to them and follow them.
//!
//! What a replica decides is the real thing (`control::membership`, `control::presence`); its API and its SQL are played
//! by messages over the simulated network, so that any of the ways between shards, replicas and the database can be cut.

use std::{collections::BTreeMap, fmt::Write, net::IpAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{
    api::{ShardOrder, WatchEvent},
    id::ShardId,
};
use runtime::shutdown::Tasks;

use super::host;
use crate::simnet::{Net, Path};

pub mod database;
pub mod follow;
pub mod replica;

use database::{Connection, Database};
use replica::Replica;

/// Between a replica and the database: one machine room.
const NEAR: Path = Path {
    latency: Duration::from_millis(1),
    jitter: Duration::from_millis(1),
    loss: 0.0,
    rate: None,
    queue: Duration::ZERO,
};

/// Replicas that run, by host, for those who want to call one.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<Mutex<BTreeMap<IpAddr, Replica>>>);

impl Directory {
    /// Who answers on a host.
    #[must_use]
    pub fn at(&self, host: IpAddr) -> Option<Replica> {
        self.0.lock().get(&host).cloned()
    }
}

/// A replica's place.
#[derive(Debug)]
pub struct ReplicaSeat {
    /// Its host.
    pub host: IpAddr,
    /// The process, if one runs.
    pub running: Option<Replica>,
    number: usize,
    starts: u32,
}

/// All of control.
#[derive(Debug)]
pub struct Control {
    /// What all replicas share.
    pub database: Database,
    /// The replicas' places, taken or not.
    pub replicas: Vec<ReplicaSeat>,
    directory: Directory,
    net: Net,
}

impl Control {
    /// Control with so many replicas, which all run.
    #[must_use]
    pub fn new(net: &Net, replicas: usize) -> Self {
        let database = Database::new(net, host(4, 0));
        let seat = |number| ReplicaSeat { host: host(3, number), running: None, number, starts: 0 };
        let mut control = Self {
            database,
            replicas: (0..replicas).map(seat).collect(),
            directory: Directory::default(),
            net: net.clone(),
        };
        (0..replicas).for_each(|i| control.start(i));
        control
    }

    /// Hosts of replicas, to be tried in this order by the shard with this number.
    #[must_use]
    pub fn hosts(&self, shard: usize) -> Vec<IpAddr> {
        let mut hosts: Vec<_> = self.replicas.iter().map(|r| r.host).collect();
        if !hosts.is_empty() {
            let first = shard % hosts.len();
            hosts.rotate_left(first);
        }
        hosts
    }

    /// For those who want to call a replica.
    #[must_use]
    pub const fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Starts a replica at its place, if none runs there.
    pub fn start(&mut self, i: usize) {
        // A replica without sisters keeps leases in memory: nobody else needs to see them.
        let alone = self.replicas.len() == 1;
        let seat = &mut self.replicas[i];
        if seat.running.is_some() {
            return;
        }
        seat.starts += 1;
        self.net.trouble(seat.host);
        self.net.set_path(seat.host, self.database.host(), NEAR);
        let name = format!("control-{}-{}", seat.number, seat.starts);
        let replica = Replica::start(name, Connection::new(&self.database, seat.host), alone, &Tasks::new());
        self.directory.0.lock().insert(seat.host, replica.clone());
        seat.running = Some(replica);
    }

    /// Kills a replica. Whoever is connected to it hears of that.
    pub fn kill(&mut self, i: usize) {
        let seat = &mut self.replicas[i];
        if let Some(replica) = seat.running.take() {
            self.net.trouble(seat.host);
            self.directory.0.lock().remove(&seat.host);
            replica.stop();
        }
    }

    /// Ends all of it.
    pub fn stop(&mut self) {
        (0..self.replicas.len()).for_each(|i| self.kill(i));
    }

    /// Replicas that run.
    pub fn running(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter_map(|seat| seat.running.as_ref())
    }

    /// Writes what administrators decided, as a call of the API does that has succeeded.
    pub fn decide(&self, change: impl FnOnce(&mut WatchEvent)) {
        self.database.decide(change);
        self.hear();
    }

    /// Writes what an administrator wants of a shard.
    pub fn order(&self, shard: &ShardId, order: ShardOrder) {
        self.database.order(shard, order);
        self.hear();
    }

    /// The replica through which something was written knows of it at once, the others by asking.
    fn hear(&self) {
        if let Some(replica) = self.running().next() {
            replica.hear();
        }
    }

    /// How things stand, for a failure's report.
    #[must_use]
    pub fn picture(&self) -> String {
        let mut text = format!("{}\n", self.database.picture());
        for seat in &self.replicas {
            let state = seat.running.as_ref().map_or_else(|| "does not run".to_owned(), Replica::picture);
            let _ = writeln!(text, "replica {} {state}", seat.host);
        }
        text
    }
}
