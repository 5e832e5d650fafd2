//! The ways to a shard: QUIC, and TCP for networks that let no UDP through. Which one is tried first, when the other one
//! joins in, and what a failure over one says about the other.
//!
//! QUIC goes ahead by a little. What the shard itself says, over whichever carrier, is not asked again over the other.
//! What worked last in a network is what the next dial in that network begins with.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use runtime::link::{
    Carrier, EndCause, Link, LinkEnd, address_towards,
    quic::{Dialer, LinkLimits},
    tcp::{TcpDialer, proxy::Proxy},
    whereabouts::Whereabouts,
};
use tokio::time::timeout;
use tracing::{debug, info};

use crate::{class::Class, journal::Journal, metrics::Metrics, proxy::Proxies};

/// Addresses of one name that are tried.
const MOST_RESOLVED: usize = 4;
/// How long resolving a name may take.
const RESOLVE: Duration = Duration::from_secs(5);
/// How much later than TCP a QUIC handshake may be through and still be taken.
const GRACE: Duration = Duration::from_millis(200);
/// How long TCP has when the host has said that nobody listens for QUIC: that host mostly runs no shard.
const SHORT: Duration = Duration::from_millis(1500);
/// Networks that are remembered.
const NETWORKS: usize = 16;

/// Whether the other carrier would be told the same.
const fn is_final(end: &LinkEnd) -> bool {
    !Class::of(end.cause).may_pass_otherwise()
}

/// What worked last, by the address of this host that leads to the shard: that is as much of a network as a host knows.
#[derive(Debug, Default)]
struct Memory(BTreeMap<IpAddr, Carrier>);

impl Memory {
    fn note(&mut self, network: IpAddr, carrier: Carrier) {
        if self.0.len() >= NETWORKS && !self.0.contains_key(&network) {
            self.0.pop_first();
        }
        self.0.insert(network, carrier);
    }
}

/// Everything that dials.
#[derive(Clone, Debug)]
pub struct Ways {
    quic: Dialer,
    tcp: Option<TcpWay>,
    whereabouts: Option<Whereabouts>,
    journal: Journal,
}

#[derive(Clone, Debug)]
struct TcpWay {
    dialer: TcpDialer,
    proxies: Proxies,
    head_start: Duration,
    memory: Arc<Mutex<Memory>>,
}

impl From<Dialer> for Ways {
    /// QUIC alone.
    fn from(quic: Dialer) -> Self {
        Self { quic, tcp: None, whereabouts: None, journal: Journal::default() }
    }
}

impl Ways {
    /// QUIC, and TCP this long after it.
    #[must_use]
    pub fn with_tcp(self, dialer: TcpDialer, proxies: Proxies, head_start: Duration) -> Self {
        let tcp = TcpWay { dialer, proxies, head_start, memory: Arc::default() };
        Self { quic: self.quic.impatient(), tcp: Some(tcp), ..self }
    }

    /// The same, with tunnels that hear when this host's addresses change.
    #[must_use]
    pub fn with_whereabouts(self, whereabouts: Whereabouts) -> Self {
        Self { whereabouts: Some(whereabouts), ..self }
    }

    /// When this host's addresses change, if anybody watches.
    #[must_use]
    pub fn whereabouts(&self) -> Option<Whereabouts> {
        self.whereabouts.clone()
    }

    /// The same ways with another identity or other roots.
    #[must_use]
    pub fn with_config(&self, quic: quinn::ClientConfig, tls: rustls::ClientConfig, limits: &LinkLimits) -> Self {
        let tcp = self.tcp.clone().map(|tcp| TcpWay { dialer: TcpDialer::new(tls, limits), ..tcp });
        Self { quic: self.quic.with_config(quic), tcp, ..self.clone() }
    }

    /// Whether there is another carrier than QUIC.
    #[must_use]
    pub const fn has_tcp(&self) -> bool {
        self.tcp.is_some()
    }

    /// Where the failures of handshakes are noted.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The proxy that TCP to this address (`host:port`) goes through, without its credentials.
    #[must_use]
    pub fn proxy_of(&self, address: &str) -> Option<&Proxy> {
        self.tcp.as_ref().and_then(|tcp| tcp.proxies.of(host_of(address)))
    }

    /// Dials an address (`host:port`) by whatever carrier comes through.
    ///
    /// # Errors
    /// If none does: the end says why, and what to do about it.
    pub async fn dial(&self, address: &str, metrics: &Metrics) -> Result<Link, LinkEnd> {
        let name = host_of(address);
        let proxy = self.tcp.as_ref().and_then(|tcp| tcp.proxies.of(name));
        let peers = match (resolve(address).await, &self.tcp, proxy) {
            (Ok(peers), _, _) => peers,
            // Behind a proxy names are often not resolved by anybody but the proxy.
            (Err(unknown), Some(tcp), Some(proxy)) => {
                debug!(address, error = %unknown, "left to the proxy");
                let result = tcp.dialer.dial_through(proxy, address, name).await;
                return self.counted(metrics, (Carrier::Tcp, address), result);
            }
            (Err(unknown), _, _) => {
                self.journal.note(None, address, &unknown);
                return Err(unknown);
            }
        };
        let mut end = LinkEnd::new(EndCause::NameUnknown, format!("{address} has no address"));
        for peer in peers {
            let dial = Dial { ways: self, metrics, peer, address, name, proxy };
            match dial.race().await {
                Ok(link) => return Ok(link),
                Err(e) => end = e,
            }
        }
        Err(end)
    }

    /// Dials by one carrier alone: over TCP to take the place of QUIC, or over QUIC to go back to it.
    ///
    /// # Errors
    /// If it does not come through.
    pub async fn dial_by(&self, carrier: Carrier, address: &str, metrics: &Metrics) -> Result<Link, LinkEnd> {
        let name = host_of(address);
        let proxy = self.tcp.as_ref().and_then(|tcp| tcp.proxies.of(name));
        if let (Carrier::Tcp, Some(tcp), Some(proxy)) = (carrier, &self.tcp, proxy) {
            let result = tcp.dialer.dial_through(proxy, address, name).await;
            return self.counted(metrics, (Carrier::Tcp, address), result);
        }
        let mut end = LinkEnd::new(EndCause::NameUnknown, format!("{address} has no address"));
        for peer in resolve(address).await? {
            let dial = Dial { ways: self, metrics, peer, address, name, proxy };
            let result = match carrier {
                Carrier::Quic => dial.quic().await,
                Carrier::Tcp => dial.tcp().await,
            };
            match result {
                Ok(link) => {
                    dial.remember(&link);
                    return Ok(link);
                }
                Err(e) => end = e,
            }
        }
        Err(end)
    }

    /// Dials one address by one carrier, past any proxy: to find out whether that works.
    ///
    /// # Errors
    /// If it does not.
    pub async fn dial_directly(
        &self,
        carrier: Carrier,
        (address, peer): (&str, SocketAddr),
        metrics: &Metrics,
    ) -> Result<Link, LinkEnd> {
        let dial = Dial { ways: self, metrics, peer, address, name: host_of(address), proxy: None };
        match carrier {
            Carrier::Quic => dial.quic().await,
            Carrier::Tcp => dial.tcp().await,
        }
    }

    /// Counts a handshake, and notes why it failed.
    fn counted(
        &self,
        metrics: &Metrics,
        (carrier, address): (Carrier, &str),
        result: Result<Link, LinkEnd>,
    ) -> Result<Link, LinkEnd> {
        let outcome = result.as_ref().map_or_else(|end| end.cause.slug(), |_| "ok");
        metrics.handshakes.with_label_values(&[carrier.slug(), outcome]).inc();
        result.inspect_err(|end| self.journal.note(Some(carrier), address, end))
    }
}

/// One dial of one address.
struct Dial<'a> {
    ways: &'a Ways,
    metrics: &'a Metrics,
    peer: SocketAddr,
    address: &'a str,
    name: &'a str,
    proxy: Option<&'a Proxy>,
}

impl Dial<'_> {
    async fn race(&self) -> Result<Link, LinkEnd> {
        let Some(tcp) = &self.ways.tcp else { return self.quic().await };
        let last = address_towards(self.peer).and_then(|network| tcp.memory.lock().0.get(&network).copied());
        let link = match last {
            Some(Carrier::Tcp) => self.tcp_first(tcp.head_start).await?,
            Some(Carrier::Quic) | None => self.quic_first(tcp.head_start).await?,
        };
        self.remember(&link);
        Ok(link)
    }

    fn remember(&self, link: &Link) {
        if let (Some(tcp), Some(network)) = (&self.ways.tcp, address_towards(self.peer)) {
            tcp.memory.lock().note(network, link.carrier());
        }
    }

    async fn quic(&self) -> Result<Link, LinkEnd> {
        let result = self.ways.quic.dial(self.peer, self.name).await;
        self.ways.counted(self.metrics, (Carrier::Quic, self.address), result)
    }

    async fn tcp(&self) -> Result<Link, LinkEnd> {
        let Some(tcp) = &self.ways.tcp else { return Err(LinkEnd::new(EndCause::Local, "TCP is turned off")) };
        let result = match self.proxy {
            Some(proxy) => tcp.dialer.dial_through(proxy, self.address, self.name).await,
            None => tcp.dialer.dial(self.peer, self.name).await,
        };
        self.ways.counted(self.metrics, (Carrier::Tcp, self.address), result)
    }

    async fn quic_first(&self, head_start: Duration) -> Result<Link, LinkEnd> {
        let quic = self.quic();
        tokio::pin!(quic);
        match timeout(head_start, &mut quic).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(end)) if is_final(&end) => return Err(end),
            Ok(Err(end)) => return self.tcp_behind(end).await,
            Err(_) => debug!(peer = %self.peer, "QUIC has not come through yet: TCP is tried beside it"),
        }
        let tcp = self.tcp();
        tokio::pin!(tcp);
        let first = tokio::select! {
            biased;
            link = &mut quic => match link {
                Ok(link) => return Ok(link),
                Err(end) if is_final(&end) => return Err(end),
                Err(quic) => return tcp.await.map_err(|tcp| both(quic, &tcp)),
            },
            first = &mut tcp => first,
        };
        match first {
            Ok(link) => self.unless_late(quic, link).await,
            Err(end) if is_final(&end) => Err(end),
            Err(tcp) => quic.await.map_err(|quic| both(quic, &tcp)),
        }
    }

    /// TCP is through, and QUIC has a moment left.
    async fn unless_late(&self, quic: impl Future<Output = Result<Link, LinkEnd>>, tcp: Link) -> Result<Link, LinkEnd> {
        match timeout(GRACE, quic).await {
            Ok(Ok(link)) => {
                self.metrics.handshakes.with_label_values(&[Carrier::Tcp.slug(), "late"]).inc();
                Ok(link)
            }
            Ok(Err(end)) if is_final(&end) => Err(end),
            Ok(Err(end)) => {
                info!(peer = %self.peer, cause = %end.cause, detail = end.detail, "QUIC does not come through: TCP is taken");
                Ok(tcp)
            }
            Err(_) => {
                self.metrics.handshakes.with_label_values(&[Carrier::Quic.slug(), "late"]).inc();
                let late = LinkEnd::new(EndCause::TimedOut, "no answer when TCP was through");
                self.ways.journal.note(Some(Carrier::Quic), self.address, &late);
                info!(peer = %self.peer, "QUIC does not come through in time: TCP is taken");
                Ok(tcp)
            }
        }
    }

    async fn tcp_behind(&self, quic: LinkEnd) -> Result<Link, LinkEnd> {
        let why = Class::of(quic.cause).slug();
        info!(peer = %self.peer, why, cause = %quic.cause, detail = quic.detail, "QUIC does not come through: TCP is tried");
        // A shard that is gone is to be left for the next one without delay.
        let tcp = if quic.cause == EndCause::NobodyListens {
            timeout(SHORT, self.tcp()).await.unwrap_or_else(|_| Err(LinkEnd::new(EndCause::TimedOut, "no answer")))
        } else {
            self.tcp().await
        };
        tcp.map_err(|tcp| both(quic, &tcp))
    }

    async fn tcp_first(&self, head_start: Duration) -> Result<Link, LinkEnd> {
        let tcp = self.tcp();
        tokio::pin!(tcp);
        let failed = match timeout(head_start, &mut tcp).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(end)) if is_final(&end) => return Err(end),
            Ok(Err(end)) => Some(end),
            Err(_) => None,
        };
        let quic = self.quic();
        tokio::pin!(quic);
        if let Some(tcp) = failed {
            return quic.await.map_err(|quic| both(quic, &tcp));
        }
        tokio::select! {
            biased;
            link = &mut quic => match link {
                Err(quic) if !is_final(&quic) => tcp.await.map_err(|tcp| both(quic, &tcp)),
                decided => decided,
            },
            link = &mut tcp => match link {
                Err(tcp) if !is_final(&tcp) => quic.await.map_err(|quic| both(quic, &tcp)),
                decided => decided,
            },
        }
    }
}

/// Neither came through. What the shard or the proxy said counts more than silence.
fn both(quic: LinkEnd, tcp: &LinkEnd) -> LinkEnd {
    let tcp_knows = is_final(tcp) || (tcp.cause == EndCause::ProxyRefused && !is_final(&quic));
    let cause = if tcp_knows { tcp.cause } else { quic.cause };
    LinkEnd::new(cause, format!("QUIC: {} ({}); TCP: {} ({})", quic.cause, quic.detail, tcp.cause, tcp.detail))
}

fn host_of(address: &str) -> &str {
    let (host, _) = address.rsplit_once(':').unwrap_or((address, ""));
    host.trim_start_matches('[').trim_end_matches(']')
}

/// An IP address with a port as it is; anything else by DNS.
async fn resolve(address: &str) -> Result<Vec<SocketAddr>, LinkEnd> {
    if let Ok(address) = address.parse::<SocketAddr>() {
        return Ok(vec![address]);
    }
    let unknown = |why: String| LinkEnd::new(EndCause::NameUnknown, format!("{address}: {why}"));
    match timeout(RESOLVE, tokio::net::lookup_host(address)).await {
        Ok(Ok(found)) => Ok(found.take(MOST_RESOLVED).collect()),
        Ok(Err(e)) => Err(unknown(e.to_string())),
        Err(_) => Err(unknown("no answer from DNS".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(cause: EndCause) -> LinkEnd {
        LinkEnd::new(cause, "x")
    }

    #[test]
    fn of_two_failures_the_one_that_says_more_is_told() {
        use EndCause as E;
        let told = |quic, tcp| both(end(quic), &end(tcp)).cause;
        assert_eq!(told(E::TimedOut, E::TimedOut), E::TimedOut);
        assert_eq!(told(E::NobodyListens, E::TimedOut), E::NobodyListens);
        assert_eq!(told(E::TimedOut, E::WrongCa), E::WrongCa, "something in between opens TLS");
        assert_eq!(told(E::TimedOut, E::ProxyRefused), E::ProxyRefused);
        let detail = both(end(E::TimedOut), &end(E::NobodyListens)).detail;
        assert_eq!(detail, "QUIC: timed-out (x); TCP: nobody-listens (x)");
    }

    #[test]
    fn networks_are_remembered_up_to_a_number() {
        let mut memory = Memory::default();
        for last in 0..=255 {
            memory.note(IpAddr::from([10, 0, 0, last]), Carrier::Tcp);
        }
        assert_eq!(memory.0.len(), NETWORKS);
        memory.note(IpAddr::from([10, 0, 0, 255]), Carrier::Quic);
        assert_eq!(memory.0.get(&IpAddr::from([10, 0, 0, 255])), Some(&Carrier::Quic));
        assert!(address_towards(SocketAddr::from(([127, 0, 0, 1], 9))).unwrap().is_loopback());
    }

    #[test]
    fn a_host_is_found_in_its_address() {
        assert_eq!(host_of("shard.example:7400"), "shard.example");
        assert_eq!(host_of("[fd00::1]:7400"), "fd00::1");
    }
}
