//! What is heard from outside a tunnel while nothing is heard in it.

use runtime::link::{Link, Signs, whereabouts::Whereabouts};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// What is heard from outside the link: what the network says about the other side, and that this host has moved.
pub(super) struct Outside {
    link: Link,
    signs: Option<watch::Receiver<Signs>>,
    whereabouts: Option<Whereabouts>,
}

/// Waits for the next value; for ever if nobody sends any.
async fn next<T>(values: &mut Option<watch::Receiver<T>>) {
    let heard = match values {
        Some(values) => values.changed().await.is_ok(),
        None => false,
    };
    if !heard {
        *values = None;
        std::future::pending().await
    }
}

impl Outside {
    pub(super) fn of(link: &Link, whereabouts: Option<Whereabouts>) -> Self {
        Self { link: link.clone(), signs: link.signs(), whereabouts }
    }

    /// Waits until it is time, or something is heard. Cancel-safe.
    pub(super) async fn wait(&mut self, until: Instant) {
        tokio::select! {
            biased;
            () = next(&mut self.signs) => {}
            () = next(&mut self.whereabouts) => self.link.look_around(),
            () = sleep_until(until) => {}
        }
    }
}
