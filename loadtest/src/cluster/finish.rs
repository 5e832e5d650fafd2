//! The end of a simulated mesh: everything stops in good order, and nothing is left (rule 4 of the design).

use std::time::Duration;

use anyhow::ensure;
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

use super::{Cluster, LOOK};
use crate::simnet::Log;

/// How long the end of everything may take.
const END: Duration = Duration::from_secs(120);

impl Cluster {
    /// Ends everything in good order and checks that nothing is left. Returns the log.
    ///
    /// # Errors
    /// If something is left: a task, a stream, a credential in use, a socket.
    pub async fn finish(mut self) -> anyhow::Result<Log> {
        self.end_pauses();
        self.streams_ended().await?;
        for i in 0..self.edges.len() {
            self.stop_edge(i);
        }
        for user in &self.users {
            user.leave();
        }
        self.ended().await?;
        // Of edges that were killed, or are behind a cut, the shards learn by silence.
        let gone = |c: &Self| c.shards.iter().all(|s| s.running.as_ref().is_none_or(|p| p.shard.registry.is_empty()));
        self.wait_for("no shard holds an edge", END, gone).await?;
        for i in 0..self.shards.len() {
            self.stop_shard(i);
        }
        self.ended().await?;
        self.control.stop();
        self.users.clear();
        let (handle, begun) = (Handle::current(), Instant::now());
        while handle.metrics().num_alive_tasks() > self.baseline && begun.elapsed() < END {
            sleep(LOOK).await;
        }
        self.nothing_is_left(&handle)?;
        self.harness.stop();
        Ok(self.net.log())
    }

    /// Waits for all processes that were asked to stop.
    async fn ended(&mut self) -> anyhow::Result<()> {
        for (name, tasks) in std::mem::take(&mut self.leaving) {
            let left = tasks.finished(END).await;
            ensure!(left == 0, "{name} has {left} tasks left");
        }
        self.look()
    }

    fn nothing_is_left(&self, handle: &Handle) -> anyhow::Result<()> {
        for past in &self.past {
            let metrics = &past.metrics;
            let gauges =
                [metrics.tunnels.get(), metrics.user_links.get(), metrics.streams.with_label_values(&["link"]).get()];
            ensure!(gauges == [0; 3], "{}: tunnels, links of users and streams are left: {gauges:?}", past.name);
            ensure!(past.live.is_empty(), "{}: {} credentials are still in use", past.name, past.live.len());
        }
        for seat in &self.edges {
            seat.check_left()?;
        }
        let left = handle.metrics().num_alive_tasks().saturating_sub(self.baseline);
        ensure!(left == 0, "{left} tasks are left");
        ensure!(self.net.sockets() == 0, "{} sockets are left", self.net.sockets());
        Ok(())
    }
}
