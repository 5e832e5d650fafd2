//! The DNS door: where `<edge>.<domain>` and `<service>.<edge>.<domain>` lead, which is to the shards. It is the name
//! server of that domain alone, over UDP and TCP on one port. It asks nobody else and keeps nothing.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use runtime::{link::quic::udp_socket, shutdown::Tasks};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Door, PAUSE, Visitor};
use crate::{
    config::ShardConfig,
    fair::{Arrivals, Shares},
    route::Router,
};
use zone::Zone;

mod zone;

/// The name of the door.
const DOOR: &str = "dns";
/// Longest query in bytes; a question with cookies and padding has a few hundred.
const LONGEST: usize = 4096;
/// Queries of one network that are answered in a row, and after that one in this time: an answer to a forged address is
/// of no use as a flood, and a resolver that keeps answers for their time asks far less.
const BURST: u32 = 200;
const REFILL: Duration = Duration::from_millis(10);
/// Connections of one network at once.
const CONNECTIONS: usize = 32;
/// How long a connection may take for its next query, and for taking its answer.
const IDLE: Duration = Duration::from_secs(10);
/// Tries to find a port that is free for UDP and for TCP, if none is named.
const TRIES: u32 = 16;

/// The door.
#[derive(Debug)]
pub struct DnsDoor {
    zone: Zone,
    router: Router,
    stopping: CancellationToken,
    arrivals: Arrivals<(Over, IpAddr)>,
    connections: Shares<IpAddr>,
}

/// What carries a query. The bound of each is its own: a network in whose name somebody floods this door over UDP is
/// still answered over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Over {
    Udp,
    Tcp,
}

impl DnsDoor {
    /// Opens the door where the configuration has it; it is open until `accepting` stops. Where it is.
    ///
    /// # Errors
    /// If the domain is not a name, or the address is taken.
    pub(crate) fn open(config: &ShardConfig, router: &Router, accepting: &Tasks) -> anyhow::Result<Option<SocketAddr>> {
        let Some(address) = config.doors.dns else { return Ok(None) };
        let zone = Zone::new(&config.domain, &config.doors.dns_answers)
            .with_context(|| format!("domain = {:?} is not a name that DNS can have", config.domain))?;
        let (tcp, udp) = bind(address, config.limits.door_connections, router)
            .with_context(|| format!("cannot open the {DOOR} door on UDP and TCP {address}"))?;
        let address = tcp.local_addr()?;
        let door = Arc::new(Self {
            zone,
            router: router.clone(),
            stopping: accepting.token(),
            arrivals: Arrivals::new(BURST, REFILL),
            connections: Shares::new(CONNECTIONS),
        });
        accepting.spawn(Arc::clone(&door).serve(udp));
        let visit = move |visitor| Arc::clone(&door).visit(visitor);
        accepting.spawn(tcp.run(accepting.clone(), accepting.clone(), visit));
        Ok(Some(address))
    }

    /// Answers datagrams, one after the other: an answer is a few microseconds' work.
    async fn serve(self: Arc<Self>, socket: UdpSocket) {
        let mut buffer = vec![0; LONGEST];
        loop {
            let received = tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            match received {
                Ok((length, from)) => {
                    if self.arrivals.come(&(Over::Udp, network(from.ip())), Instant::now()).is_err() {
                        self.count(Over::Udp, "dropped");
                    } else if let Some(answer) = self.answer(&buffer[..length], Over::Udp) {
                        // What finds no room is lost, as a datagram may be; whoever asked asks again.
                        let _ = socket.try_send_to(&answer, from);
                    }
                }
                Err(error) => {
                    tracing::debug!(door = DOOR, %error, "the door cannot receive");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Answers a connection's queries in their order, until it is silent.
    async fn visit(self: Arc<Self>, visitor: Visitor) {
        let Visitor { mut socket, from } = visitor;
        let source = network(from.ip());
        let Some(_share) = self.connections.take(&source) else {
            self.router.metrics().door_refusals.with_label_values(&[DOOR, "source-limit"]).inc();
            return;
        };
        loop {
            let done = tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                done = timeout(IDLE, self.exchange(&mut socket, source)) => done,
            };
            if !matches!(done, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// A query and its answer, each behind its length (RFC 7766, 8).
    async fn exchange(&self, socket: &mut TcpStream, source: IpAddr) -> io::Result<()> {
        let length = usize::from(socket.read_u16().await?);
        if length > LONGEST {
            self.count(Over::Tcp, "malformed");
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut query = vec![0; length];
        socket.read_exact(&mut query).await?;
        while let Err(wait) = self.arrivals.come(&(Over::Tcp, source), Instant::now()) {
            sleep(wait).await;
        }
        let answer = self.answer(&query, Over::Tcp).ok_or(io::ErrorKind::InvalidData)?;
        let mut framed = u16::try_from(answer.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
        framed.extend(answer);
        socket.write_all(&framed).await
    }

    fn answer(&self, query: &[u8], over: Over) -> Option<Vec<u8>> {
        let (answer, outcome) = self.zone.answer(query, &self.router.state(), over == Over::Udp);
        self.count(over, outcome.slug());
        answer
    }

    fn count(&self, over: Over, outcome: &str) {
        let over = match over {
            Over::Udp => "udp",
            Over::Tcp => "tcp",
        };
        self.router.metrics().dns_queries.with_label_values(&[over, outcome]).inc();
    }
}

/// UDP and TCP on one port.
fn bind(address: SocketAddr, connections: usize, router: &Router) -> io::Result<(Door, UdpSocket)> {
    let mut tries = if address.port() == 0 { TRIES } else { 1 };
    loop {
        tries -= 1;
        let tcp = Door::open(DOOR, address, connections, Arc::clone(router.metrics()))?;
        let udp = match udp_socket(SocketAddr::new(address.ip(), tcp.local_addr()?.port())) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries > 0 => continue,
            udp => udp?,
        };
        udp.set_nonblocking(true)?;
        return Ok((tcp, UdpSocket::from_std(udp)?));
    }
}

/// The network that an address is of, as far as one owner has it as a rule: a /24 or a /56.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & (!0 << 8))),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (!0 << 72))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_a_bound() {
        let network = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.77"), "192.0.2.0");
        assert_eq!(network("::ffff:192.0.2.77"), "192.0.2.0");
        assert_eq!(network("2001:db8:1:2ff:3::4"), "2001:db8:1:200::");
    }
}
