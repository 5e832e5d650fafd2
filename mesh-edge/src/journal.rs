//! What the edge went through: failures to reach a shard since it was last connected, and how it reaches one now. It is
//! told to the shard ([`Standing`]), and on the machine by `/status`. Bounded; what comes again is counted.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::standing::{MAX_TROUBLES, Standing, Trouble};
use runtime::link::{Carrier, EndCause, Link, LinkEnd};
use tokio::time::Instant;

/// Longest detail that is kept, in bytes.
const DETAIL: usize = 400;

/// The journal of one edge. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    troubles: VecDeque<Noted>,
    /// Since when there is no tunnel; `None` while one serves.
    down: Option<Instant>,
    away: Duration,
    skew_ms: i64,
    seen_as: String,
}

/// A failure, and how often it came.
#[derive(Clone, Debug)]
pub struct Noted {
    /// Why.
    pub cause: EndCause,
    /// By what; `None` if it did not come that far.
    pub carrier: Option<Carrier>,
    /// What was dialled.
    pub address: String,
    /// More, for people.
    pub detail: String,
    /// How often.
    pub times: u32,
    /// When first.
    pub first: Instant,
    /// When last.
    pub last: Instant,
}

impl Noted {
    /// As it is told.
    #[must_use]
    pub fn told(&self, now: Instant) -> Trouble {
        let ago = |then| u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX);
        Trouble {
            cause: self.cause.slug().to_owned(),
            carrier: self.carrier.map_or("", Carrier::slug).to_owned(),
            address: self.address.clone(),
            detail: self.detail.clone(),
            times: self.times,
            first_ms: ago(self.first),
            last_ms: ago(self.last),
        }
    }
}

impl Journal {
    /// Notes that an edge begins, and has no tunnel yet.
    pub fn begun(&self) {
        self.0.lock().down = Some(Instant::now());
    }

    /// Notes a failure.
    pub fn note(&self, carrier: Option<Carrier>, address: &str, end: &LinkEnd) {
        let (now, mut inner) = (Instant::now(), self.0.lock());
        let detail = end.detail[..end.detail.floor_char_boundary(DETAIL)].to_owned();
        let same = |noted: &Noted| noted.cause == end.cause && noted.carrier == carrier && noted.address == address;
        if let Some(at) = inner.troubles.iter().position(same)
            && let Some(noted) = inner.troubles.remove(at)
        {
            let times = noted.times.saturating_add(1);
            inner.troubles.push_back(Noted { detail, times, last: now, ..noted });
            return;
        }
        if inner.troubles.len() >= MAX_TROUBLES {
            inner.troubles.pop_front();
        }
        let address = address.to_owned();
        inner.troubles.push_back(Noted { cause: end.cause, carrier, address, detail, times: 1, first: now, last: now });
    }

    /// A shard says Welcome: its clock minus this one in milliseconds, and the address that it sees.
    pub fn welcomed(&self, skew_ms: i64, seen_as: &str) {
        let mut inner = self.0.lock();
        inner.skew_ms = skew_ms;
        seen_as.clone_into(&mut inner.seen_as);
    }

    /// A tunnel serves.
    pub fn up(&self) {
        let mut inner = self.0.lock();
        inner.away = inner.down.take().map(|since| since.elapsed()).unwrap_or_default();
    }

    /// The tunnel is no more: what was before it is over, and why it ended is the first of what follows.
    pub fn lost(&self, carrier: Carrier, address: &str, end: &LinkEnd) {
        {
            let mut inner = self.0.lock();
            inner.troubles.clear();
            inner.down = Some(Instant::now());
        }
        self.note(Some(carrier), address, end);
    }

    /// Failures since the edge was last connected, the last of each kind last.
    #[must_use]
    pub fn troubles(&self) -> Vec<Noted> {
        self.0.lock().troubles.iter().cloned().collect()
    }

    /// For how long there is no tunnel; `None` while one serves.
    #[must_use]
    pub fn down(&self) -> Option<Duration> {
        self.0.lock().down.map(|since| since.elapsed())
    }

    /// The shard's clock minus this one, in milliseconds, and the address that it sees this machine at.
    #[must_use]
    pub fn seen(&self) -> (i64, String) {
        let inner = self.0.lock();
        (inner.skew_ms, inner.seen_as.clone())
    }

    /// Why this carrier is in use, if it is not the one that comes first.
    #[must_use]
    pub fn why(&self, carrier: Carrier) -> String {
        match carrier {
            Carrier::Quic => String::new(),
            Carrier::Tcp => {
                let inner = self.0.lock();
                let quic = inner.troubles.iter().rev().find(|noted| noted.carrier == Some(Carrier::Quic));
                quic.map_or_else(
                    || "TCP was what came through in this network before".to_owned(),
                    |noted| format!("QUIC: {} ({})", noted.cause, noted.detail),
                )
            }
        }
    }

    /// How the edge reaches the mesh over this link.
    #[must_use]
    pub fn standing(&self, link: &Link, loss_percent: u32, (proxy, allows): (&str, &[String])) -> Standing {
        let (now, carrier) = (Instant::now(), link.carrier());
        let why = self.why(carrier);
        let inner = self.0.lock();
        Standing {
            carrier: carrier.slug().to_owned(),
            why,
            proxy: proxy.to_owned(),
            mtu: link.stats().mtu.into(),
            loss_percent,
            skew_ms: inner.skew_ms,
            away_ms: u64::try_from(inner.away.as_millis()).unwrap_or(u64::MAX),
            troubles: inner.troubles.iter().map(|noted| noted.told(now)).collect(),
            allows: allows.to_vec(),
            allows_more: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(cause: EndCause) -> LinkEnd {
        LinkEnd::new(cause, "why")
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_again_is_counted_and_a_new_loss_begins_anew() {
        let journal = Journal::default();
        journal.begun();
        for _ in 0..3 {
            journal.note(Some(Carrier::Quic), "s:1", &end(EndCause::TimedOut));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        journal.note(Some(Carrier::Tcp), "s:1", &end(EndCause::ProxyRefused));
        let [quic, tcp] = &journal.troubles()[..] else { panic!("{:?}", journal.troubles()) };
        assert_eq!((quic.times, tcp.times, quic.told(Instant::now()).first_ms), (3, 1, 3000));
        assert_eq!(journal.why(Carrier::Tcp), "QUIC: timed-out (why)");
        assert_eq!(journal.down(), Some(Duration::from_secs(3)));
        journal.up();
        assert_eq!(journal.down(), None);
        assert_eq!(journal.troubles().len(), 2, "they are told by the tunnel that came of it");
        journal.lost(Carrier::Tcp, "s:1", &end(EndCause::PeerRestarted));
        assert_eq!(journal.troubles().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded() {
        let journal = Journal::default();
        for port in 0..100 {
            journal.note(None, &format!("s:{port}"), &LinkEnd::new(EndCause::NameUnknown, "ä".repeat(9999)));
        }
        let troubles = journal.troubles();
        assert_eq!((troubles.len(), troubles[7].address.as_str()), (MAX_TROUBLES, "s:99"));
        assert!(troubles[0].detail.len() <= DETAIL);
    }
}
