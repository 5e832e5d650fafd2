//! How the edge stands, as it says itself on its admin address (`/status`): for `mesh-edge status` and
//! `meshctl why --here`, which work when the edge reaches nobody.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{id::EdgeId, standing::Trouble};
use runtime::{
    admin, clock,
    link::{Carrier, LinkStats},
    telemetry,
    tls::LiveIdentity,
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use crate::{
    journal::Journal,
    life::{Line, Phase},
    ways::Ways,
};

mod judge;

pub use judge::Verdict;

/// How long an admin server may take to answer.
const ASK: Duration = Duration::from_secs(3);

/// How an edge stands. Fields that are not known to a reader are skipped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Who it is.
    pub edge: String,
    /// The version of the software.
    pub version: String,
    /// `starting`, `dialing`, `waiting`, `refused`, `connected` or `stopped`.
    pub state: String,
    /// More on it, for people.
    pub detail: String,
    /// What is dialled, or carries the tunnel: `host:port`.
    pub address: String,
    /// The shard that serves.
    pub shard: String,
    /// `quic` or `tcp`; empty without a tunnel.
    pub carrier: String,
    /// Why that one, if it is not the one that comes first.
    pub carrier_why: String,
    /// The HTTP proxy in between, without credentials.
    pub proxy: String,
    /// Round trip, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// How long ago the shard last answered, in milliseconds.
    pub answered_ms: Option<u64>,
    /// Bytes of the largest UDP payload that passes.
    pub mtu: Option<u16>,
    /// Packets that the tunnel lost, and sent.
    pub lost: Option<(u64, u64)>,
    /// The shard's clock minus this one, in milliseconds, as of the last Welcome; none before it.
    pub skew_ms: Option<i64>,
    /// The address that the shard sees, and whether it is this machine's own: if not, there is NAT in between.
    pub seen_as: String,
    /// For how long there is a tunnel, or none, in seconds.
    pub since_s: u64,
    /// When it is tried again, in seconds.
    pub next_s: Option<u64>,
    /// This machine's clock, in seconds since 1970.
    pub now: i64,
    /// The life of its certificate, in seconds since 1970.
    pub certificate: (i64, i64),
    /// Where it may be reached.
    pub shards: Vec<String>,
    /// Failures since it was last connected, the last of each kind last.
    pub troubles: Vec<Trouble>,
    /// What follows from all that.
    pub verdict: Option<Verdict>,
}

/// Knows how an edge stands.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// Who.
    pub edge: EdgeId,
    /// Where it begins.
    pub shards: Vec<String>,
    /// Where it stands.
    pub phase: watch::Receiver<Phase>,
    /// The present tunnel.
    pub line: watch::Receiver<Line>,
    /// What it went through.
    pub journal: Journal,
    /// Its certificate.
    pub identity: LiveIdentity,
    /// Knows the proxy.
    pub ways: Arc<Mutex<Ways>>,
}

impl Reporter {
    /// How it stands now.
    #[must_use]
    pub fn status(&self) -> Status {
        let (facts, now) = (self.identity.facts(), Instant::now());
        let (skew_ms, seen_as) = self.journal.seen();
        let mut status = Status {
            edge: self.edge.to_string(),
            version: telemetry::version().to_owned(),
            now: clock::unix_now(),
            certificate: (facts.not_before, facts.not_after),
            shards: self.shards.clone(),
            troubles: self.journal.troubles().iter().map(|noted| noted.told(now)).collect(),
            since_s: self.journal.down().unwrap_or_default().as_secs(),
            skew_ms: (!seen_as.is_empty() || skew_ms != 0).then_some(skew_ms),
            seen_as,
            ..Status::default()
        };
        let seconds = |until: Instant| Some(until.saturating_duration_since(now).as_secs());
        let state = match &*self.phase.borrow() {
            Phase::Starting => "starting",
            Phase::Dialing { attempt, address } => {
                status.address.clone_from(address);
                status.detail = format!("attempt {attempt}");
                "dialing"
            }
            Phase::Connected { shard, since } => {
                status.shard = shard.to_string();
                status.since_s = since.elapsed().as_secs();
                "connected"
            }
            Phase::Waiting { until, why } => {
                (status.next_s, status.detail) = (seconds(*until), why.clone());
                "waiting"
            }
            Phase::Refused { until, why, .. } => {
                (status.next_s, status.detail) = (seconds(*until), why.clone());
                "refused"
            }
            Phase::Stopped => "stopped",
        };
        state.clone_into(&mut status.state);
        self.of_tunnel(&mut status);
        let proxy = self.ways.lock().proxy_of(&status.address).map(ToString::to_string);
        if status.carrier != Carrier::Quic.slug() {
            status.proxy = proxy.unwrap_or_default();
        }
        status.verdict = Some(status.judge());
        status
    }

    fn of_tunnel(&self, status: &mut Status) {
        let line = self.line.borrow();
        let Some(link) = line.link.as_ref().filter(|_| status.state == "connected") else { return };
        let carrier = link.carrier();
        status.address.clone_from(&line.address);
        carrier.slug().clone_into(&mut status.carrier);
        status.carrier_why = self.journal.why(carrier);
        status.rtt_ms = Some(link.rtt().as_secs_f64() * 1000.0);
        let answered = line.pulse.as_ref().and_then(|pulse| *pulse.borrow());
        status.answered_ms = answered.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        if carrier == Carrier::Quic {
            let LinkStats { mtu, lost_packets, sent_packets, .. } = link.stats();
            (status.mtu, status.lost) = (Some(mtu), Some((lost_packets, sent_packets)));
        }
    }

    /// The page of the admin server.
    #[must_use]
    pub fn page(self) -> admin::Page {
        admin::Page::json("/status", move || serde_json::to_string(&self.status()).unwrap_or_default())
    }
}

/// Nobody could be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Nothing listens there.
    #[error(
        "mesh-edge does not run on this machine, or not with its admin server on {0}: start it (systemctl start mesh-edge), or name its address"
    )]
    NotThere(SocketAddr),
    /// Something else does.
    #[error("what listens on {0} is no mesh-edge of this version: {1}")]
    NoEdge(SocketAddr, String),
}

impl Status {
    /// Asks the edge of this machine.
    ///
    /// # Errors
    /// If there is none at that address.
    pub async fn ask(admin: SocketAddr) -> Result<Self, AskError> {
        let no_edge = |why: String| AskError::NoEdge(admin, why);
        match admin::get(admin, "/status", ASK).await {
            Ok((200, body)) => serde_json::from_slice(&body).map_err(|e| no_edge(e.to_string())),
            Ok((status, _)) => Err(no_edge(format!("it answers {status} to /status"))),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => Err(AskError::NotThere(admin)),
            Err(e) => Err(no_edge(e.to_string())),
        }
    }

    /// What is wrong, for a reader of another version than the edge's.
    #[must_use]
    pub fn told(&self) -> Verdict {
        self.verdict.clone().unwrap_or_else(|| self.judge())
    }

    /// For people: the sentence, what to do, and the facts.
    #[must_use]
    pub fn text(&self) -> String {
        let Verdict { sentence, remedy, .. } = self.told();
        let mut text = format!("{sentence}\n");
        if !remedy.is_empty() {
            text += &format!("{remedy}\n");
        }
        text.push('\n');
        for (name, fact) in self.facts() {
            text += &format!("{name:<19}  {fact}\n");
        }
        text
    }

    /// What it was concluded from, as names and values for people.
    #[must_use]
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![("edge", self.edge.clone()), ("version", self.version.clone())];
        let mut fact = |name, value: String| {
            if !value.is_empty() {
                facts.push((name, value));
            }
        };
        fact("state", self.state.clone());
        fact("address", self.address.clone());
        fact("carrier", self.carrier.clone());
        fact("why that carrier", self.carrier_why.clone());
        fact("proxy", self.proxy.clone());
        fact("round trip", self.rtt_ms.map(|ms| format!("{ms:.1} ms")).unwrap_or_default());
        fact("largest UDP payload", self.mtu.map(|mtu| format!("{mtu} bytes")).unwrap_or_default());
        fact("lost packets", self.lost.map(|(lost, sent)| format!("{lost} of {sent}")).unwrap_or_default());
        fact("clock", self.skew_ms.map(judge::skew).unwrap_or_default());
        fact("seen as", self.seen_as.clone());
        fact("shards", self.shards.join(", "));
        for trouble in &self.troubles {
            let Trouble { cause, carrier, address, detail, times, last_ms, .. } = trouble;
            let by = if carrier.is_empty() { String::new() } else { format!(" over {carrier}") };
            let ago = last_ms / 1000;
            fact("trouble", format!("{address}{by}: {cause} ({detail}), {times} times, last {ago} s ago"));
        }
        facts
    }
}
