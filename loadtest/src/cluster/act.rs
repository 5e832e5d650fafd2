//! What is done to the processes of a simulated mesh.

use std::{collections::BTreeMap, str::FromStr, sync::Arc, time::Duration};

use anyhow::Context;
use proto::{
    api::{Revoked, ShardOrder},
    identity::Role,
    policy::Rule,
};
use tokio::time::sleep;

use super::{Cluster, Past, shard::ShardSeat};

/// How long a shard that was asked to stop may take, beyond its drain time.
const GRACE: Duration = Duration::from_secs(15);

impl Cluster {
    /// Starts a shard at its place.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_shard(&mut self, i: usize) -> anyhow::Result<()> {
        let following = (self.control.hosts(i), self.control.directory().clone());
        let seat = &mut self.shards[i];
        if seat.running.is_none() {
            self.net.trouble(seat.address.ip());
            seat.start((&self.net, &self.bundle, self.access.clone()), following, &self.layout)?;
            let process = seat.running.as_ref().context("it has just started")?;
            let (metrics, live) = (Arc::clone(&process.metrics), process.live.clone());
            self.past.push(Past { name: seat.id.to_string(), metrics, live });
        }
        Ok(())
    }

    /// Sets up one more shard and starts it. Returns its number. Edges hear of it from other shards alone.
    ///
    /// # Errors
    /// If it does not start.
    pub fn add_shard(&mut self) -> anyhow::Result<usize> {
        let i = self.shards.len();
        self.shards.push(ShardSeat::new(i, &mut self.authority)?);
        self.start_shard(i)?;
        Ok(i)
    }

    /// Asks a shard to stop, as SIGTERM does. Returns at once.
    pub fn stop_shard(&mut self, i: usize) {
        let seat = &mut self.shards[i];
        if let Some(process) = seat.running.take() {
            self.net.trouble(seat.address.ip());
            process.tasks.stop();
            self.leaving.push((format!("shard {i}"), process.tasks));
            self.leaving.push((format!("what shard {i} says to control"), process.following));
        }
    }

    /// Shards that run and are wanted in the ring.
    #[must_use]
    pub fn in_service(&self) -> Vec<usize> {
        let orders = self.control.database.orders();
        let serves = |i: &usize| self.shards[*i].running.is_some() && !orders.contains_key(&self.shards[*i].id);
        (0..self.shards.len()).filter(serves).collect()
    }

    /// Parts of processes that were asked to stop and have not ended.
    #[must_use]
    pub fn leaving(&self) -> usize {
        self.leaving.iter().filter(|(_, tasks)| tasks.running() > 0).count()
    }

    /// Asks a shard to stop and waits until its process has ended.
    ///
    /// # Errors
    /// If it does not end in time, or a rule is broken meanwhile.
    pub async fn drain_shard(&mut self, i: usize) -> anyhow::Result<Duration> {
        let Some(tasks) = self.shards[i].running.as_ref().map(|p| p.tasks.clone()) else { return Ok(Duration::ZERO) };
        self.stop_shard(i);
        let limit = Duration::from_secs(self.layout.drain_secs) + GRACE;
        self.wait_for("the shard has drained", limit, |_| tasks.running() == 0).await
    }

    /// Restarts every shard, one after the other, each when all is calm again.
    ///
    /// # Errors
    /// If one does not end or start, or it does not become calm.
    pub async fn rolling_restart(&mut self) -> anyhow::Result<()> {
        for i in 0..self.shards.len() {
            if self.shards[i].running.is_some() {
                self.drain_shard(i).await?;
                self.start_shard(i)?;
                self.calm().await?;
            }
        }
        Ok(())
    }

    /// Kills a shard: nobody hears a last word from it.
    pub fn kill_shard(&mut self, i: usize) {
        if let Some(process) = &self.shards[i].running {
            process.killed.cancel();
            self.net.unplug(self.shards[i].address);
        }
        self.stop_shard(i);
    }

    /// Stops a shard's process for a while, as SIGSTOP does. That is modelled as a host which nothing reaches or leaves
    /// for that time: its own timers go on, other than those of a real process that is stopped.
    pub fn pause_shard(&mut self, i: usize, time: Duration) {
        let (net, host) = (self.net.clone(), self.shards[i].address.ip());
        net.freeze(host);
        let end = self.harness.spawn(async move {
            sleep(time).await;
            net.thaw(host);
        });
        self.pauses.push((host, end));
    }

    /// Lets every process go on that was stopped for a while.
    pub(super) fn end_pauses(&mut self) {
        for (host, end) in self.pauses.drain(..) {
            end.abort();
            self.net.thaw(host);
        }
    }

    /// Says what is wanted of a shard, as `meshctl shard drain`, `cordon`, `undrain` and `uncordon` do.
    pub fn order(&self, i: usize, order: ShardOrder) {
        self.control.order(&self.shards[i].id, order);
    }

    /// Starts an edge at its place.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_edge(&mut self, i: usize) -> anyhow::Result<()> {
        let shards = self.shards.iter().map(|s| s.address.to_string()).collect();
        let seat = &mut self.edges[i];
        if seat.runs() {
            return Ok(());
        }
        self.net.trouble(seat.host);
        seat.start((&self.net, &self.bundle), shards, &self.layout, self.seed)
    }

    /// Starts every edge.
    ///
    /// # Errors
    /// If one does not start.
    pub fn start_edges(&mut self) -> anyhow::Result<()> {
        (0..self.edges.len()).try_for_each(|i| self.start_edge(i))
    }

    /// Asks an edge to stop, as SIGTERM does. Returns at once.
    pub fn stop_edge(&mut self, i: usize) {
        let seat = &mut self.edges[i];
        if let Some(tasks) = seat.stop() {
            self.net.trouble(seat.host);
            self.leaving.push((format!("edge {i}"), tasks));
        }
    }

    /// Kills an edge: nobody hears a last word from it.
    pub fn kill_edge(&mut self, i: usize) {
        if let Some(address) = self.edges[i].address() {
            self.net.unplug(address);
        }
        self.stop_edge(i);
    }

    /// Revokes an edge's certificate, as control's word reaches the shards.
    pub fn revoke_edge(&mut self, i: usize) {
        let seat = &mut self.edges[i];
        seat.revoked = true;
        let (serial, name) = (seat.serial().to_owned(), seat.name.clone());
        self.revoke(Revoked { serial, role: Role::Edge, name, not_after: i64::MAX });
        self.publish();
    }

    /// Revokes a user's certificate.
    pub fn revoke_user(&mut self, i: usize) {
        let user = &self.users[i];
        let (serial, name) = (user.serial().to_owned(), user.name.clone());
        self.revoke(Revoked { serial, role: Role::User, name, not_after: i64::MAX });
    }

    fn revoke(&self, revoked: Revoked) {
        self.control.decide(|word| word.revoked.get_or_insert_default().push(revoked));
    }

    /// Writes who is enrolled and what is allowed.
    pub(super) fn publish(&self) {
        let edges: BTreeMap<_, _> = self.edges.iter().filter(|e| !e.revoked).map(|e| (e.name.clone(), None)).collect();
        self.control.decide(|word| {
            word.policy = Some(everything());
            word.access_tokens = Some(Vec::new());
            word.revoked.get_or_insert_default();
            word.edges = Some(edges);
        });
    }
}

/// Users may reach all edges.
fn everything() -> Vec<Rule> {
    fn only<T: FromStr>(text: &str) -> Vec<T> {
        text.parse().ok().into_iter().collect()
    }
    vec![Rule { name: "all".into(), from: only("user/*"), to: only("edge/*"), ports: only("*") }]
}
