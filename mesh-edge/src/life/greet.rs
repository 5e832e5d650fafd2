//! A fresh link: Hello, what the shard says to it, and what is noted of that.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use proto::{
    code::CloseCode,
    id::ShardId,
    message::{Candidate, Hello, Welcome},
};
use runtime::{
    clock,
    link::{Carrier, EndCause, Link, LinkEnd},
    telemetry,
};
use tracing::warn;

use super::Life;
use crate::{
    course::Outcome,
    link::{Greeting, Tunnel, greet},
};

/// Difference between two clocks that is worth a warning.
const SKEW: Duration = Duration::from_secs(60);

impl Life {
    /// A shard that takes this edge's certificate for ended, which by the clock here is not, goes by another time.
    pub(super) fn by_own_clock(&self, outcome: Outcome) -> Outcome {
        let facts = self.parts.identity.facts();
        match outcome {
            Outcome::Failed(end) => Outcome::Failed(end.by_own_clock(&facts, clock::unix_now())),
            Outcome::Lost(_, _) | Outcome::Redirected(_) | Outcome::Refused(_) => outcome,
        }
    }

    /// Says Hello on a fresh link.
    pub(super) async fn greeted(
        &self,
        link: Link,
        address: &str,
        avoid: Vec<ShardId>,
    ) -> Result<(Tunnel, Vec<Candidate>), Outcome> {
        let carrier = link.carrier();
        let greeted = self.greet(link, address, avoid).await;
        let journal = &self.parts.tunnel.journal;
        match &greeted {
            Err(Outcome::Failed(end) | Outcome::Lost(end, _)) => journal.note(Some(carrier), address, end),
            Err(Outcome::Refused(refuse)) => {
                let end = LinkEnd::new(EndCause::Closed(refuse.code), refuse.reason.clone());
                journal.note(Some(carrier), address, &end);
            }
            Ok(_) | Err(Outcome::Redirected(_)) => {}
        }
        greeted
    }

    async fn greet(&self, link: Link, address: &str, avoid: Vec<ShardId>) -> Result<(Tunnel, Vec<Candidate>), Outcome> {
        let hello = Hello {
            name: self.parts.name.clone(),
            instance: self.instance,
            version: telemetry::version().to_owned(),
            unix_ms: clock::unix_millis(),
            epoch: self.epoch.load(Ordering::Relaxed),
            avoid,
        };
        match greet(&link, hello).await.map_err(Outcome::Failed)? {
            Greeting::Welcome(welcome, control) => {
                self.heard_of(welcome.epoch);
                self.compare_clocks(&welcome);
                let way = (address.to_owned(), self.proxy_of(&link, address));
                let tunnel = Tunnel::start(link, way, &welcome, *control, self.parts.tunnel.clone());
                let (server, over) = (Arc::clone(&self.parts.server), tunnel.over.clone());
                let accept = server.accept(tunnel.link.clone(), welcome.shard, tunnel.load.clone(), over);
                self.parts.tunnel.tasks.spawn(accept);
                Ok((tunnel, welcome.candidates))
            }
            Greeting::Redirect { to, epoch } => {
                self.heard_of(epoch);
                link.close(CloseCode::Redirected, "");
                Err(Outcome::Redirected(to))
            }
            Greeting::Refuse(refuse) => {
                link.close(CloseCode::Done, "");
                Err(Outcome::Refused(refuse))
            }
        }
    }

    /// The proxy that a link goes through; empty for none.
    fn proxy_of(&self, link: &Link, address: &str) -> String {
        match link.carrier() {
            Carrier::Quic => String::new(),
            Carrier::Tcp => self.parts.ways.lock().proxy_of(address).map(ToString::to_string).unwrap_or_default(),
        }
    }

    fn compare_clocks(&self, welcome: &Welcome) {
        let (theirs, ours) = (Duration::from_millis(welcome.unix_ms), Duration::from_millis(clock::unix_millis()));
        self.parts.tunnel.metrics.clock_skew.set(theirs.as_secs_f64() - ours.as_secs_f64());
        let skew = i128::from(welcome.unix_ms) - i128::from(clock::unix_millis());
        let skew = i64::try_from(skew).unwrap_or(i64::MAX);
        self.parts.tunnel.journal.welcomed(skew, &welcome.seen_as);
        if theirs.abs_diff(ours) > SKEW {
            let (shard, seconds) = (&welcome.shard, theirs.abs_diff(ours).as_secs());
            warn!(%shard, seconds, "this machine's clock and the shard's differ; certificates need right clocks");
        }
    }
}
