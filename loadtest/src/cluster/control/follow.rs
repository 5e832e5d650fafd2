//! How a simulated shard follows control and reports to it: as `mesh_cloud::follow` does, by messages instead of HTTP.

use std::{net::IpAddr, sync::Arc, time::Duration};

use mesh_cloud::{live::LiveCredentials, registry::Registry, state::MeshState};
use proto::{
    api::{ShardReport, ShardState, WatchEvent},
    id::ShardId,
};
use rand::{RngExt, rngs::StdRng};
use runtime::shutdown::Tasks;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Directory, replica::Replica};
use crate::simnet::Net;

/// Between two reports.
const REPORT: Duration = Duration::from_secs(2);
/// How long a replica may take to answer before the next one is tried.
const ANSWER: Duration = Duration::from_secs(2);
/// How often a watch without news gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence after which a watch counts as lost.
const SILENCE: Duration = Duration::from_secs(6);
/// Bounds of the pause after a watch was lost.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));

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
    /// Of the shard's process: stopping means draining.
    pub process: Tasks,
    /// Cancelled when the process dies without a last word.
    pub killed: CancellationToken,
}

impl Following {
    /// Follows and reports until `tasks` stop, which is the end of the process.
    pub fn start(self, tasks: &Tasks, chance: StdRng) {
        let (stop, killed) = (tasks.token(), self.killed.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(self.clone().follow(chance)));
        tasks.spawn(killed.run_until_cancelled_owned(self.report(stop)));
    }

    async fn follow(self, mut chance: StdRng) {
        for host in self.replicas.iter().cycle() {
            // However it ended, the next one may know more.
            let _ = self.follow_one(*host).await;
            sleep(RETRY.0 + (RETRY.1 - RETRY.0).mul_f64(chance.random::<f64>())).await;
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
        timeout(ANSWER, there_and_back).await.ok().flatten()
    }

    async fn follow_one(&self, host: IpAddr) -> Option<()> {
        let replica = self.call(host).await?;
        let mut follower = replica.follow();
        drop(replica);
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

    /// Reports until `stop`. Whoever stops in good order has said so before.
    async fn report(self, stop: CancellationToken) {
        let mut ticks = interval(REPORT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut first, mut drained) = (0, false);
        loop {
            tokio::select! {
                biased;
                () = self.process.stopping(), if !drained => drained = true,
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            // Each once, beginning with the one that answered last.
            for turn in 0..self.replicas.len() {
                let at = (first + turn) % self.replicas.len();
                let host = self.replicas[at];
                if matches!(timeout(ANSWER, self.report_to(host)).await, Ok(Some(()))) {
                    first = at;
                    break;
                }
            }
        }
    }

    async fn report_to(&self, host: IpAddr) -> Option<()> {
        self.net.carry(self.host, host).await;
        let taken = match self.directory.at(host) {
            Some(replica) => replica.report(&self.shard, self.about()).await.is_ok(),
            None => false,
        };
        self.net.carry(host, self.host).await;
        taken.then_some(())
    }

    fn about(&self) -> ShardReport {
        let state = if self.process.is_stopping() { ShardState::Draining } else { ShardState::Serving };
        ShardReport {
            addresses: self.addresses.clone(),
            version: String::new(),
            state,
            weight: self.weight,
            epoch: self.state.borrow().ring.epoch(),
            streams: self.registry.all().iter().map(|edge| edge.streams() as u64).sum(),
            full: false,
            online: Vec::new(),
            offline: Vec::new(),
        }
    }
}
