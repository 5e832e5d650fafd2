//! How a simulated shard follows control and reports to it: as `mesh_cloud::follow` does, by messages instead of HTTP.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_cloud::{live::LiveCredentials, registry::Registry, state::MeshState};
use proto::{
    api::{ShardReport, ShardState, WatchEvent},
    backoff::Backoff,
    id::ShardId,
};
use rand::{RngExt, rngs::StdRng};
use runtime::shutdown::Tasks;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Directory, replica::Replica};
use crate::simnet::Net;

/// Between two reports.
const REPORT: Duration = Duration::from_secs(2);
/// How long a replica may take to answer.
const CALL: Duration = Duration::from_secs(15);
/// How often a watch without news gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence after which a watch counts as lost.
const SILENCE: Duration = Duration::from_secs(8);
/// Bounds of the pause after a watch was lost.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What a shard shares with control.
#[derive(Clone, Debug)]
pub struct Following {
    /// The network.
    pub net: Net,
    /// The shard.
    pub shard: ShardId,
    /// Its host.
    pub host: IpAddr,
    /// Where it says it can be reached.
    pub addresses: Vec<String>,
    /// How much it takes.
    pub weight: u32,
    /// Replicas, in the order in which this shard tries them.
    pub replicas: Vec<IpAddr>,
    /// Who answers there.
    pub directory: Directory,
    /// What the shard knows.
    pub state: watch::Sender<Arc<MeshState>>,
    /// Ended when their credential is revoked.
    pub live: LiveCredentials,
    /// Edges that are there.
    pub registry: Registry,
    /// Whether the shard is about to stop; closed when it has.
    pub standing: watch::Receiver<ShardState>,
    /// When its process started, in milliseconds since 1970.
    pub started: u64,
    /// How often it has reported.
    pub reports: Arc<AtomicU64>,
}

impl Following {
    /// Follows and reports until the shard has stopped, or is killed.
    pub fn start(self, killed: &CancellationToken, tasks: &Tasks, chance: StdRng) {
        // Not by several waiters of one watch: tokio wakes them in an order that differs from run to run.
        let over = killed.child_token();
        let due: Vec<_> = self.replicas.iter().map(|_| Arc::new(Notify::new())).collect();
        for (host, due) in self.replicas.iter().zip(&due) {
            let reports = self.clone().report(*host, Arc::clone(due));
            tasks.spawn(over.clone().run_until_cancelled_owned(reports));
        }
        let mut standing = self.standing.clone();
        tasks.spawn(over.clone().run_until_cancelled_owned(self.follow(chance)));
        tasks.spawn(killed.clone().run_until_cancelled_owned(async move {
            while standing.changed().await.is_ok() {
                due.iter().for_each(|due| due.notify_one());
            }
            over.cancel();
        }));
    }

    async fn follow(self, mut chance: StdRng) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        for host in self.replicas.iter().cycle() {
            let begun = Instant::now();
            // However it ended, the next one may know more.
            let _ = self.follow_one(*host).await;
            backoff.link_lived(begun.elapsed());
            sleep(backoff.next_delay(chance.random())).await;
        }
    }

    /// Calls a replica; `None` if nobody answers in time.
    async fn call(&self, host: IpAddr) -> Option<Replica> {
        let there_and_back = async {
            self.net.carry(self.host, host).await;
            let replica = self.directory.at(host);
            self.net.carry(host, self.host).await;
            replica
        };
        timeout(CALL, there_and_back).await.ok().flatten()
    }

    async fn follow_one(&self, host: IpAddr) -> Option<()> {
        let replica = self.call(host).await?;
        let follower = replica.follow();
        drop(replica);
        let mut follower = follower?;
        loop {
            let event = timeout(HEARTBEAT, follower.next()).await;
            timeout(SILENCE - HEARTBEAT, self.net.carry(host, self.host)).await.ok()?;
            match event {
                Ok(Some(event)) => self.take(&event),
                Ok(None) => return None,
                Err(_) => {}
            }
        }
    }

    fn take(&self, event: &WatchEvent) {
        let next = Arc::new(self.state.borrow().after(event.clone()));
        self.state.send_replace(Arc::clone(&next));
        self.live.end_where(|credential| next.is_good(credential));
    }

    /// Reports to one replica.
    async fn report(self, host: IpAddr, due: Arc<Notify>) {
        let mut ticks = interval(REPORT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = due.notified() => {}
                _ = ticks.tick() => {}
            }
            let call = async {
                self.net.carry(self.host, host).await;
                if let Some(replica) = self.directory.at(host) {
                    // What it could not tell its sisters it knows itself.
                    let _ = replica.report(&self.shard, self.about()).await;
                }
                self.net.carry(host, self.host).await;
            };
            // One that is lost is made up for by the next.
            let _ = timeout(CALL, call).await;
        }
    }

    fn about(&self) -> ShardReport {
        ShardReport {
            started: self.started,
            number: self.reports.fetch_add(1, Ordering::Relaxed) + 1,
            bytes: 0,
            handshakes: 0,
            addresses: self.addresses.clone(),
            version: String::new(),
            state: *self.standing.borrow(),
            weight: self.weight,
            epoch: self.state.borrow().ring.epoch(),
            streams: self.registry.all().iter().map(|edge| edge.streams() as u64).sum(),
            full: false,
            online: Vec::new(),
            offline: Vec::new(),
            partings: Vec::new(),
        }
    }
}
