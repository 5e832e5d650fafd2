//! The end of a process, and of its parts: ask to stop, wait for what still runs, know what is left.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};
use tracing::{Instrument, Span};

/// A group of tasks that stop together. Clones are the same group.
///
/// Stopping is a request: a task sees [`Tasks::stopping`] and ends in its own way. [`Tasks::drained`] waits for that.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    stop: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    /// A group of its own.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A group that stops when this one does, or earlier; its tasks count as tasks of this one too.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { stop: self.stop.child_token(), tracker: self.tracker.clone() }
    }

    /// Starts a task of the group, in the current span.
    #[allow(clippy::disallowed_methods, reason = "the one place where tasks start")]
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tokio::spawn(self.tracker.track_future(task.instrument(Span::current())))
    }

    /// Completes once the group has been asked to stop.
    pub fn stopping(&self) -> WaitForCancellationFuture<'_> {
        self.stop.cancelled()
    }

    /// The token behind [`Tasks::stopping`], for what must own it.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Whether the group has been asked to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Asks the group to stop.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Tasks that run now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.tracker.len()
    }

    /// Waits for every task, however long it takes, without asking it to stop.
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Waits for every task, without asking it to stop. Returns how many still run at the deadline; 0 is a clean end.
    pub async fn finished(&self, deadline: Duration) -> usize {
        self.tracker.close();
        match tokio::time::timeout(deadline, self.tracker.wait()).await {
            Ok(()) => 0,
            Err(_) => self.tracker.len(),
        }
    }

    /// Asks the group to stop and waits for it. Returns how many tasks still run at the deadline; 0 is a clean end.
    pub async fn drained(&self, deadline: Duration) -> usize {
        self.stop();
        self.finished(deadline).await
    }
}

/// Waits for SIGTERM or SIGINT. From then on a second signal ends the process at once, with status 130.
///
/// # Errors
/// If the signal handlers cannot be installed.
#[allow(clippy::disallowed_methods, reason = "must outlive every group of tasks, to be able to cut them short")]
pub async fn signal() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let name = tokio::select! {
        biased;
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    };
    tokio::spawn(async move {
        tokio::select! {
            biased;
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::warn!("second signal: ending at once");
        std::process::exit(130);
    });
    Ok(name)
}

/// Lets this process have as many descriptors as the system allows it: each stream needs one.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(error = %e, "the limit of open files stays as it was");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_stops_in_time_is_waited_for_and_what_does_not_is_counted() {
        let tasks = Tasks::new();
        let polite = tasks.clone();
        tasks.spawn(async move { polite.stopping().await });
        assert_eq!(tasks.child().drained(Duration::from_secs(1)).await, 1, "only the child was asked");
        assert_eq!(tasks.drained(Duration::from_secs(1)).await, 0);
        tasks.spawn(std::future::pending::<()>());
        assert_eq!(tasks.drained(Duration::from_secs(1)).await, 1);
    }
}
