//! The database of a simulated control: what replicas share, on a host of its own that can be slow, read-only or away.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

use control::{membership::BoardState, store::shards::StoredLease};
use parking_lot::Mutex;
use proto::{
    api::{ShardOrder, WatchEvent},
    id::ShardId,
    ring::RingSpec,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{sleep, timeout};

use crate::simnet::{Net, seed_for};

/// How long a call of the database may take, as in the real store.
const DEADLINE: Duration = Duration::from_secs(5);

/// How a database is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Health {
    /// Well.
    #[default]
    Good,
    /// Each call takes up to so long.
    Slow(Duration),
    /// Whatever would write fails.
    ReadOnly,
    /// Whatever is called fails at once, as on a host that lives without its database.
    Away,
}

/// A call of the database failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Nobody knows whether it was done.
    #[error("the database did not answer in time")]
    Silent,
    /// It was not done.
    #[error("the database is away")]
    Away,
    /// It was not done.
    #[error("the database is read-only")]
    ReadOnly,
}

/// The database. Clones are the same one.
#[derive(Clone)]
pub struct Database {
    net: Net,
    host: IpAddr,
    stored: Arc<Mutex<Stored>>,
}

#[derive(Debug)]
struct Stored {
    health: Health,
    chance: StdRng,
    ring: RingSpec,
    leader: String,
    beat: i64,
    leases: BTreeMap<ShardId, StoredLease>,
    orders: BTreeMap<ShardId, ShardOrder>,
    /// Everything else that shards follow; its revision counts what administrators decided.
    decided: Arc<WatchEvent>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.picture())
    }
}

impl Database {
    pub(super) fn new(net: &Net, host: IpAddr) -> Self {
        let stored = Stored {
            health: Health::Good,
            chance: StdRng::seed_from_u64(seed_for(net.seed(), ("database", host))),
            ring: RingSpec::default(),
            leader: String::new(),
            beat: 0,
            leases: BTreeMap::new(),
            orders: BTreeMap::new(),
            decided: Arc::default(),
        };
        Self { net: net.clone(), host, stored: Arc::new(Mutex::new(stored)) }
    }

    /// Where it is.
    #[must_use]
    pub const fn host(&self) -> IpAddr {
        self.host
    }

    /// Makes it well or ill.
    pub fn set_health(&self, health: Health) {
        self.stored.lock().health = health;
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        self.stored.lock().health
    }

    /// The ring that it holds.
    #[must_use]
    pub fn ring(&self) -> RingSpec {
        self.stored.lock().ring.clone()
    }

    /// What administrators want of shards.
    #[must_use]
    pub fn orders(&self) -> BTreeMap<ShardId, ShardOrder> {
        self.stored.lock().orders.clone()
    }

    /// Puts a copy of the ring back that was made earlier, as whoever restores a backup does.
    pub fn restore(&self, ring: RingSpec) {
        let mut stored = self.stored.lock();
        stored.ring = ring;
        stored.leases.clear();
    }

    pub(super) fn decide(&self, change: impl FnOnce(&mut WatchEvent)) {
        let mut stored = self.stored.lock();
        let mut decided = WatchEvent::clone(&stored.decided);
        change(&mut decided);
        decided.revision += 1;
        stored.decided = Arc::new(decided);
    }

    pub(super) fn order(&self, shard: &ShardId, order: ShardOrder) {
        let mut stored = self.stored.lock();
        match order {
            ShardOrder::Serve => stored.orders.remove(shard),
            ShardOrder::Cordon | ShardOrder::Drain => stored.orders.insert(shard.clone(), order),
        };
    }

    pub(super) fn picture(&self) -> String {
        let Stored { health, ring, leader, beat, orders, .. } = &*self.stored.lock();
        let members: Vec<_> = ring.members.iter().map(|m| m.shard.as_str()).collect();
        format!("database {health:?}: epoch {} {members:?}, led by '{leader}' at beat {beat}; {orders:?}", ring.epoch)
    }
}

/// A replica's way to the database.
#[derive(Clone, Debug)]
pub struct Connection {
    database: Database,
    from: IpAddr,
}

impl Connection {
    pub(super) fn new(database: &Database, from: IpAddr) -> Self {
        Self { database: database.clone(), from }
    }

    /// The replica's host.
    #[must_use]
    pub const fn host(&self) -> IpAddr {
        self.from
    }

    /// The network.
    #[must_use]
    pub const fn net(&self) -> &Net {
        &self.database.net
    }

    /// A call. When its answer is lost it has been done all the same, and the caller does not know.
    async fn call<T>(&self, writes: bool, work: impl FnOnce(&mut Stored) -> T) -> Result<T, Unavailable> {
        let Database { net, host, stored } = &self.database;
        let whole = async {
            net.carry(self.from, *host).await;
            let wait = stored.lock().wait();
            sleep(wait).await;
            let done = stored.lock().work(writes, work);
            net.carry(*host, self.from).await;
            done
        };
        timeout(DEADLINE, whole).await.unwrap_or(Err(Unavailable::Silent))
    }

    /// Writes down that a shard reported, unless something later is known. `silent` is the beat at which its lease has not
    /// moved for too long.
    ///
    /// # Errors
    /// If it could not be written.
    pub async fn beat(&self, lease: StoredLease, silent: Option<i64>) -> Result<(), Unavailable> {
        let work = |stored: &mut Stored| {
            let before = stored.leases.get(&lease.name);
            if before.is_none_or(|before| lease.is_after(before) || silent == Some(before.beat)) {
                let beat = before.map_or(0, |before| before.beat) + 1;
                stored.leases.insert(lease.name.clone(), StoredLease { beat, ..lease });
            }
        };
        self.call(true, work).await
    }

    /// Reads what replicas share.
    ///
    /// # Errors
    /// If it could not be read.
    pub async fn load(&self) -> Result<BoardState, Unavailable> {
        let work = |stored: &mut Stored| BoardState {
            ring: stored.ring.clone(),
            leader: stored.leader.clone(),
            beat: stored.beat,
            leases: stored.leases.values().cloned().collect(),
            orders: stored.orders.clone(),
        };
        self.call(false, work).await
    }

    /// Takes or keeps the lead, if nobody else did.
    ///
    /// # Errors
    /// If it could not be written.
    pub async fn lead(&self, me: &str, seen_leader: &str, seen_beat: i64) -> Result<bool, Unavailable> {
        let work = |stored: &mut Stored| {
            let free = stored.leader == seen_leader && stored.beat == seen_beat;
            if free {
                me.clone_into(&mut stored.leader);
                stored.beat += 1;
            }
            free
        };
        self.call(true, work).await
    }

    /// Puts the next ring, if nobody else did; `beat` is that of the leader.
    ///
    /// # Errors
    /// If it could not be written.
    pub async fn put_ring(
        &self,
        me: &str,
        beat: Option<i64>,
        seen_epoch: u64,
        next: &RingSpec,
    ) -> Result<bool, Unavailable> {
        let work = |stored: &mut Stored| {
            let leads = stored.leader == me && beat.is_none_or(|beat| beat == stored.beat);
            let still = leads && stored.ring.epoch == seen_epoch;
            if still {
                stored.ring.clone_from(next);
            }
            still
        };
        self.call(true, work).await
    }

    /// What administrators decided.
    ///
    /// # Errors
    /// If it could not be read.
    pub async fn decided(&self) -> Result<Arc<WatchEvent>, Unavailable> {
        self.call(false, |stored| Arc::clone(&stored.decided)).await
    }
}

impl Stored {
    fn wait(&mut self) -> Duration {
        // Drawn for each call, so that what comes later does not depend on how the database was.
        let part = self.chance.random::<f64>();
        match self.health {
            Health::Slow(most) => most.mul_f64(part),
            Health::Good | Health::ReadOnly | Health::Away => Duration::from_millis(1).mul_f64(part),
        }
    }

    fn work<T>(&mut self, writes: bool, work: impl FnOnce(&mut Self) -> T) -> Result<T, Unavailable> {
        match self.health {
            Health::Away => Err(Unavailable::Away),
            Health::ReadOnly if writes => Err(Unavailable::ReadOnly),
            Health::Good | Health::Slow(_) | Health::ReadOnly => Ok(work(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime::shutdown::Tasks;
    use tokio::time::Instant;

    use super::*;
    use crate::simnet::Path;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 3, 0, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 4, 0, 1));

    fn database() -> (Net, Database, Connection) {
        let net = Net::new(1, Path::default(), &Tasks::new());
        let database = Database::new(&net, THERE);
        let connection = Connection::new(&database, HERE);
        (net, database, connection)
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_saw_the_same_one_leads_and_only_the_leader_puts_a_ring() {
        let (_, database, one) = database();
        let next = |epoch| RingSpec { epoch, members: vec![] };
        assert_eq!(one.lead("one", "", 0).await, Ok(true));
        assert_eq!(one.lead("other", "", 0).await, Ok(false), "somebody was faster");
        assert_eq!(one.put_ring("other", Some(1), 0, &next(1)).await, Ok(false));
        assert_eq!(one.put_ring("one", Some(1), 0, &next(1)).await, Ok(true));
        assert_eq!(one.put_ring("one", Some(1), 0, &next(2)).await, Ok(false), "the epoch is another one by now");
        assert_eq!(one.lead("other", "one", 1).await, Ok(true));
        assert_eq!(one.put_ring("one", Some(1), 1, &next(2)).await, Ok(false), "it does not lead any more");
        assert_eq!(database.ring().epoch, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_ill_database_fails_as_it_should() {
        let (net, database, one) = database();
        database.set_health(Health::ReadOnly);
        assert!(one.load().await.is_ok());
        assert_eq!(one.lead("one", "", 0).await, Err(Unavailable::ReadOnly));
        database.set_health(Health::Away);
        assert_eq!(one.load().await, Err(Unavailable::Away));
        database.set_health(Health::Good);
        net.cut(HERE, THERE);
        let begun = Instant::now();
        assert_eq!(one.load().await, Err(Unavailable::Silent));
        assert_eq!(begun.elapsed(), DEADLINE);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_done_stays_done_when_the_answer_is_lost() {
        let (net, _, one) = database();
        net.cut_one_way(THERE, HERE);
        assert_eq!(one.lead("one", "", 0).await, Err(Unavailable::Silent));
        net.heal_all();
        assert_eq!(one.load().await.unwrap().leader, "one");
    }
}
