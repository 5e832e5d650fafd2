//! Whether a replica of control still sees the database that it shares with others.
//!
//! One that is cut off cannot know what the others decide. Shards that follow it would stay on its last ring for as long
//! as that lasts, so it lets them go to another replica. One that is alone never does so: nobody knows better.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// For how long a replica that does not see the database still speaks.
pub const BLIND: Duration = Duration::from_secs(6);

/// What a replica sees. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Sight(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Nobody else could know better.
    alone: bool,
    saw: Mutex<Instant>,
    lost: watch::Sender<bool>,
}

impl Sight {
    /// Sees the database now.
    #[must_use]
    pub fn new(alone: bool, now: Instant) -> Self {
        Self(Arc::new(Inner { alone, saw: Mutex::new(now), lost: watch::channel(false).0 }))
    }

    /// What was read just now is what stood in the database at this time.
    pub fn saw(&self, then: Instant) {
        *self.0.saw.lock() = then;
        if then.elapsed() < BLIND {
            self.0.lost.send_if_modified(std::mem::take);
        }
    }

    /// Whether this replica has nothing to say any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        *self.0.lost.borrow()
    }

    /// Tells of each change.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<bool> {
        self.0.lost.subscribe()
    }

    /// Looks at the clock, without end. `tell` is called at each change.
    pub async fn keep(self, mut tell: impl FnMut(bool)) {
        if self.0.alone {
            return std::future::pending().await;
        }
        let mut changes = self.follow();
        loop {
            let due = *self.0.saw.lock() + BLIND;
            sleep_until(due).await;
            if *self.0.saw.lock() + BLIND > Instant::now() {
                continue;
            }
            self.0.lost.send_replace(true);
            tell(true);
            // The sender lives as long as `self`.
            let _ = changes.wait_for(|lost| !lost).await;
            tell(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime::shutdown::Tasks;
    use tokio::time::sleep;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_sees_nothing_has_nothing_to_say_until_it_sees_again() {
        let sight = Sight::new(false, Instant::now());
        let tasks = Tasks::new();
        tasks.spawn(tasks.token().run_until_cancelled_owned(sight.clone().keep(|_| ())));
        for _ in 0..10 {
            sleep(BLIND - MS).await;
            assert!(!sight.is_lost());
            sight.saw(Instant::now());
        }
        sleep(BLIND + MS).await;
        assert!(sight.is_lost());
        sleep(10 * BLIND).await;
        assert!(sight.is_lost());
        sight.saw(Instant::now());
        assert!(!sight.is_lost());
        sleep(BLIND + MS).await;
        assert!(sight.is_lost(), "and again");
        assert_eq!(tasks.drained(BLIND).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_alone_always_has() {
        let sight = Sight::new(true, Instant::now());
        let tasks = Tasks::new();
        tasks.spawn(tasks.token().run_until_cancelled_owned(sight.clone().keep(|_| ())));
        sleep(100 * BLIND).await;
        assert!(!sight.is_lost());
        assert_eq!(tasks.drained(BLIND).await, 0);
    }
}
