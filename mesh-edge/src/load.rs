//! How many streams a tunnel carries, so that it can be left when there are none.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

/// The streams of one tunnel. Clones count together.
#[derive(Clone, Debug)]
pub struct Load(Arc<watch::Sender<usize>>);

impl Load {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// One more, until the guard is dropped.
    #[must_use]
    pub fn enter(&self) -> InFlight {
        self.0.send_modify(|count| *count += 1);
        InFlight(self.clone())
    }

    /// Streams now.
    #[must_use]
    pub fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there has been no stream for as long as `quiet`: one may be on its way when the last one ends.
    pub async fn quiet(&self, quiet: Duration) {
        let mut count = self.0.subscribe();
        loop {
            // The sender is held by self.
            let _ = count.wait_for(|c| *c == 0).await;
            if timeout(quiet, count.wait_for(|c| *c > 0)).await.is_err() {
                return;
            }
        }
    }
}

impl Default for Load {
    fn default() -> Self {
        Self::new()
    }
}

/// A stream that is counted.
#[derive(Debug)]
pub struct InFlight(Load);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn quiet_is_when_nothing_came_for_a_while() {
        let load = Load::new();
        let first = load.enter();
        let waiting = timeout(Duration::from_secs(5), load.quiet(Duration::from_secs(1)));
        assert!(waiting.await.is_err());
        drop(first);
        let began = tokio::time::Instant::now();
        load.quiet(Duration::from_secs(1)).await;
        assert_eq!((began.elapsed(), load.count()), (Duration::from_secs(1), 0));
    }
}
