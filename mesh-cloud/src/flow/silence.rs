//! Whether a tunnel on which a question waits for its answer still lives.
//!
//! An edge may take seconds to answer, since it dials first; its QUIC stack acknowledges at once. So a link on which
//! nothing at all comes back, however often this side repeats itself, is cut, long before the tunnel counts as dead.
//! Only openers that would rather hear that now than wait are told so: kube-apiserver, whose people look at a terminal.

use std::{sync::Arc, time::Duration};

use proto::{code::RefuseCode, id::EdgeId, message::ShardToEdge, stream::Refusal};
use runtime::link::LinkStats;
use tokio::time::{Instant, sleep};

use crate::session::EdgeHandle;

/// How long nothing may come back, at least, and in round trips. A radio that changes its cell is away for less.
const PATIENCE: (Duration, u32) = (Duration::from_millis(400), 8);
/// The same once that has passed and still nothing has come: kubectl asks a second time, over SPDY, before it says no.
const AGAIN: (Duration, u32) = (Duration::from_millis(100), 4);
/// Packets that must have gone out meanwhile: the question, its repetitions, and words that ask for nothing but to be
/// acknowledged; unless the edge has not even pinged in time. A carrier that does not count them goes by the pings alone.
const ASKED: u64 = 4;
/// How often it is looked again when too few have gone out.
const LOOK: Duration = Duration::from_millis(50);
/// The token of no ping: edges skip a Pong with it. QUIC repeats itself ever more seldom, and late where round trips were
/// uneven; a new word goes out at once.
const NO_PING: u64 = 0;

/// What the link had seen when the question went out, or an earlier one that had no answer either, and when that was.
#[derive(Debug)]
pub(crate) struct Silence {
    handle: Arc<EdgeHandle>,
    then: LinkStats,
    since: Instant,
}

impl Silence {
    /// Begins now.
    pub(crate) fn new(handle: Arc<EdgeHandle>) -> Self {
        let (now, stats) = (Instant::now(), handle.link.stats());
        let (then, since) = {
            let mut asked = handle.asked.lock();
            // Others have asked before, if nothing has come since: their repetitions count as well.
            let first = asked.filter(|(then, _)| then.received_bytes == stats.received_bytes).unwrap_or((stats, now));
            *asked = Some(first);
            first
        };
        Self { then, since, handle }
    }

    /// Returns when the link is cut; never, once something has come over it.
    pub(crate) async fn cut(&self) -> Refusal {
        let link = &self.handle.link;
        let rtt = link.rtt();
        let span = |(least, round_trips): (Duration, u32)| least.max(rtt.saturating_mul(round_trips));
        let patience = span(if self.since.elapsed() < span(PATIENCE) { PATIENCE } else { AGAIN });
        let (until, quarter) = (Instant::now() + patience, patience / 4);
        loop {
            sleep(if Instant::now() < until { quarter } else { LOOK }).await;
            let now = link.stats();
            if now.received_bytes != self.then.received_bytes {
                return std::future::pending().await;
            }
            let enough = now.sent_packets >= self.then.sent_packets + ASKED;
            if (enough || self.handle.is_overdue()) && Instant::now() >= until {
                return refusal(&self.handle.id, self.since.elapsed(), rtt, self.handle.heard());
            }
            if !enough {
                // Whether it is taken does not matter: then others wait to be sent.
                let _ = self.handle.order(ShardToEdge::Pong(NO_PING));
            }
        }
    }
}

fn refusal(edge: &EdgeId, silent: Duration, rtt: Duration, heard: Duration) -> Refusal {
    let reason = format!(
        "the link to edge/{edge} is cut: nothing came back for {:.1} s where {:.0} ms are usual, and the edge was last \
         heard {:.0} s ago; try again, or look at the machine's network",
        silent.as_secs_f64(),
        (rtt.as_secs_f64() * 1000.0).max(1.0),
        heard.as_secs_f64(),
    );
    Refusal::because(RefuseCode::LinkLost, reason)
}
