//! What the network between this machine and the mesh lets through: names, UDP, TCP, the proxy, sizes, clocks.
//!
//! Every handshake is done with the very dialers that an edge uses ([`Ways`]), and none counts before the shard has
//! accepted this machine's certificate and has not closed behind that. So what is said to work does work. Facts are
//! gathered here; what they mean is decided in `judge`, which is pure.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use prometheus::Registry;
use proto::{code::CloseCode, target::HostPort};
use runtime::{
    api,
    cert::CertFacts,
    clock,
    identity::IdentityDir,
    link::{Carrier, EndCause, Link, LinkEnd},
    tls::{LiveIdentity, TrustBundle},
};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use crate::{config::EdgeConfig, enrol, metrics::Metrics, status::Status, ways::Ways};

mod interface;
mod judge;

pub use judge::{Check, Conclusion, Word};

/// Shard addresses that are tried; more of them say no more about the network.
const MOST_SHARDS: usize = 8;
/// Addresses of one name that are tried.
const MOST_ADDRESSES: usize = 4;
/// How long a name may take.
const RESOLVE: Duration = Duration::from_secs(5);
/// How long a shard may take to accept the certificate behind the handshake.
const ACCEPTED: Duration = Duration::from_secs(3);
/// How long a shard may take to say that it does not want this member: two round trips, and at least this.
const SECOND_THOUGHT: Duration = Duration::from_millis(250);
/// How long the search for the largest datagram may take, and how long it must have found nothing new to be over.
const SIZES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(2500));
/// How often to look at a link.
const LOOK: Duration = Duration::from_millis(20);

/// What is to be checked, and as whom.
#[derive(Debug)]
pub struct Netcheck {
    /// The dialers.
    pub ways: Ways,
    /// Addresses (`host:port`) of shards.
    pub shards: Vec<String>,
    /// Control, if it is known.
    pub control: Option<HostPort>,
    /// Whom to trust.
    pub bundle: TrustBundle,
    /// The certificate that is shown.
    pub own: CertFacts,
    /// The address that a shard has said it sees this machine at, if an edge runs here.
    pub seen_as: Option<SocketAddr>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Each check.
    pub checks: Vec<Check>,
    /// What they come to.
    #[serde(flatten)]
    pub conclusion: Conclusion,
}

/// A name, and what it stands for.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    host: String,
    found: Result<Vec<IpAddr>, String>,
    took: Duration,
}

/// A handshake that the shard accepted.
#[derive(Clone, Debug)]
pub(crate) struct Through {
    shard: String,
    took: Duration,
    rtt: Duration,
}

/// What the path takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Bytes of the largest UDP payload that came through.
    payload: u16,
    /// The largest that is looked for.
    most: u16,
    /// What the interface takes, as a UDP payload; `None` if that is not known.
    interface: Option<u16>,
}

impl Report {
    /// For people: a line for each check, with what to do below those that are not well, and what it comes to.
    #[must_use]
    pub fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.of.chars().count()).max().unwrap_or_default();
        let mut text = String::new();
        for Check { what, of, verdict, figure, remedy, .. } in &self.checks {
            text += &format!("{what:<11}  {:<8}  {of:<width$}  {figure}\n", verdict.as_str());
            if !remedy.is_empty() {
                text += &format!("{:<11}  {remedy}\n", "");
            }
        }
        text + &format!("\n{}\n", self.conclusion.sentence)
    }

    /// The status of a process that says this: 0 all is well, 1 a shard can be reached and something is not well, 3 none
    /// can for want of trust or rights, 4 none can.
    #[must_use]
    pub fn status(&self) -> u8 {
        match (self.conclusion.reachable, self.conclusion.cause.as_str()) {
            (true, "none") => 0,
            (true, _) => 1,
            (false, "wrong-ca" | "clock" | "distrusted" | "expired" | "revoked" | "duplicate-identity") => 3,
            (false, _) => 4,
        }
    }
}

impl Netcheck {
    /// What an edge with this configuration would meet, as that edge.
    ///
    /// # Errors
    /// If it has not enrolled, or its configuration makes no sense.
    pub async fn of_edge(config: &EdgeConfig) -> anyhow::Result<Self> {
        let dir = IdentityDir::open(&config.data_dir)?;
        let (credentials, bundle) = dir.load()?.with_context(|| {
            format!("{} holds no identity; enrol first with 'mesh-edge join'", config.data_dir.display())
        })?;
        let identity = LiveIdentity::new(&credentials).context("the private key cannot be used")?;
        let mut shards = config.shards.clone();
        if shards.is_empty() {
            shards = enrol::noted_shards(&dir)?;
        }
        // Where the edge that runs here stands, if one does.
        let seen_as = Status::ask(config.admin).await.ok().and_then(|status| status.seen_as.parse().ok());
        let own = identity.facts().as_ref().clone();
        let ways = crate::ways_of(config, &identity, &bundle)?;
        Ok(Self { ways, shards, control: enrol::noted_control(&dir)?, bundle, own, seen_as })
    }

    /// Checks everything; takes some ten seconds at the most for each shard address that is blocked.
    pub async fn run(self) -> Report {
        let mut checks = vec![judge::certificate(&self.own, clock::unix_now())];
        let mut reached = false;
        let control = self.control.as_ref().map(|control| control.host.clone());
        let hosts = self.shards.iter().take(MOST_SHARDS).map(|address| host_of(address).to_owned());
        let mut known: Vec<Resolved> = Vec::new();
        for host in hosts.chain(control) {
            if !known.iter().any(|resolved| resolved.host == host) {
                known.push(resolve(host).await);
            }
        }
        checks.extend(known.iter().map(judge::name));
        for address in self.shards.iter().take(MOST_SHARDS) {
            let found = known.iter().find(|r| r.host == host_of(address)).and_then(|r| r.found.clone().ok());
            let (here, more) = self.shard(address, &found.unwrap_or_default()).await;
            reached |= here;
            checks.extend(more);
        }
        checks.push(self.clock().await);
        if let Some(seen) = self.seen_as {
            checks.push(judge::nat(seen, interface::is_own(seen.ip())));
        }
        let conclusion = judge::conclude(&checks, reached);
        Report { checks, conclusion }
    }

    /// All ways to one address. Returns whether one of them leads there.
    async fn shard(&self, address: &str, found: &[IpAddr]) -> (bool, Vec<Check>) {
        let Ok(metrics) = Metrics::new(&Registry::new()) else { return (false, Vec::new()) };
        let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or_default();
        let (mut checks, mut reached) = (Vec::new(), false);
        for ip in found.iter().take(MOST_ADDRESSES) {
            let peer = SocketAddr::new(*ip, port);
            for carrier in Carrier::ALL {
                let begun = Instant::now();
                let dialled = self.ways.dial_directly(carrier, (address, peer), &metrics).await;
                let (through, sizes) = self.look_at(dialled, begun, carrier == Carrier::Quic).await;
                reached |= through.is_ok();
                checks.push(judge::handshake(carrier, address, peer, &through));
                checks.extend(sizes.map(|sizes| judge::sizes(address, peer, sizes)));
            }
        }
        if let Some(proxy) = self.ways.proxy_of(address).map(ToString::to_string) {
            let begun = Instant::now();
            let dialled = self.ways.dial_by(Carrier::Tcp, address, &metrics).await;
            let (through, _) = self.look_at(dialled, begun, false).await;
            reached |= through.is_ok();
            checks.push(judge::proxy(&proxy, address, &through));
        }
        (reached, checks)
    }

    /// Waits until it is certain that the shard lets this machine in, and, if asked to, for the largest datagram.
    async fn look_at(
        &self,
        dialled: Result<Link, LinkEnd>,
        begun: Instant,
        sizes: bool,
    ) -> (Result<Through, LinkEnd>, Option<Sizes>) {
        let link = match dialled {
            Ok(link) => link,
            Err(end) => return (Err(end.by_own_clock(&self.own, clock::unix_now())), None),
        };
        let took = begun.elapsed();
        let accepted = accepted(&link).await;
        let sizes = match (&accepted, sizes) {
            (Ok(()), true) => Some(measure(&link).await),
            (Ok(()) | Err(_), _) => None,
        };
        let through = Through { shard: link.peer().identity.name.to_string(), took, rtt: link.rtt() };
        link.close(CloseCode::Done, "");
        // So that the shard hears of it now and not by silence.
        sleep(LOOK).await;
        let through = accepted.map(|()| through);
        (through.map_err(|end| end.by_own_clock(&self.own, clock::unix_now())), sizes)
    }

    async fn clock(&self) -> Check {
        let Some(control) = &self.control else { return judge::no_clock("it is not known here where control is") };
        match api::time_at(control, &self.bundle).await {
            Ok(time) => judge::clock(control, &time),
            Err(error) => judge::no_clock(&error.to_string()),
        }
    }
}

/// Waits for the proof that the shard has accepted the certificate, and then for as long as a refusal behind that takes.
async fn accepted(link: &Link) -> Result<(), LinkEnd> {
    let confirmed = async {
        while !link.is_confirmed() {
            sleep(LOOK).await;
        }
        sleep(SECOND_THOUGHT.max(link.rtt() * 2)).await;
    };
    tokio::select! {
        biased;
        end = link.ended() => Err(end),
        done = timeout(ACCEPTED, confirmed) => {
            let why = "the handshake was never confirmed: answers get lost";
            done.map_err(|_| LinkEnd::new(EndCause::TimedOut, why))
        }
    }
}

/// Lets the carrier look for the largest datagram that passes.
async fn measure(link: &Link) -> Sizes {
    let (begun, most) = (Instant::now(), link.most_payload());
    let (mut payload, mut since) = (link.stats().mtu, Instant::now());
    while payload < most && since.elapsed() < SIZES.1 && begun.elapsed() < SIZES.0 && link.end().is_none() {
        sleep(LOOK).await;
        let now = link.stats().mtu;
        if now != payload {
            (payload, since) = (now, Instant::now());
        }
    }
    Sizes { payload, most, interface: interface::payload_to(link.remote_address()) }
}

fn host_of(address: &str) -> &str {
    let (host, _) = address.rsplit_once(':').unwrap_or((address, ""));
    host.trim_start_matches('[').trim_end_matches(']')
}

async fn resolve(host: String) -> Resolved {
    let begun = Instant::now();
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Resolved { host, found: Ok(vec![ip]), took: Duration::ZERO };
    }
    let found = match timeout(RESOLVE, tokio::net::lookup_host((host.as_str(), 0))).await {
        Ok(Ok(found)) => {
            let mut all: Vec<IpAddr> = Vec::new();
            for address in found.map(|address| address.ip()) {
                if !all.contains(&address) {
                    all.push(address);
                }
            }
            if all.is_empty() { Err("it has no address".to_owned()) } else { Ok(all) }
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", RESOLVE.as_secs())),
    };
    Resolved { host, found, took: begun.elapsed() }
}
