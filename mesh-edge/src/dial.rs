//! Dialing a target: resolve, try each address with a head start for the one before, and say why it did not work.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use proto::{code::RefuseCode, stream::Refusal, target::HostPort};
use runtime::flow::socket::connect;
use tokio::{
    net::{TcpStream, UdpSocket, lookup_host},
    time::{Instant, Sleep, sleep_until, timeout},
};

use crate::allow::{Allow, Over};

/// Head start of an address over the next one (RFC 8305, 5, recommends 250 ms).
const HEAD_START: Duration = Duration::from_millis(250);
/// Addresses that are tried at most.
const MOST_ADDRESSES: usize = 8;

/// A target that is connected.
#[derive(Debug)]
pub struct Dialled {
    /// The connection.
    pub socket: TcpStream,
    /// Whose it is.
    pub address: SocketAddr,
    /// What allowed it.
    pub rule: String,
}

/// A UDP socket that talks to one target.
#[derive(Debug)]
pub struct Connected {
    /// The socket.
    pub socket: UdpSocket,
    /// Whom it talks to.
    pub address: SocketAddr,
    /// What allowed it.
    pub rule: String,
}

/// Dials what [`Allow::plan`] allowed. With `by_address`, only addresses are dialled that a rule allows.
///
/// # Errors
/// The refusal to answer with.
pub async fn dial(
    allow: &Allow,
    to: &HostPort,
    rule: &str,
    by_address: bool,
    deadline: Duration,
) -> Result<Dialled, Refusal> {
    let whole = async {
        let addresses = allowed(allow, to, by_address, Over::Tcp).await?;
        let (socket, address) = race(addresses).await.map_err(|e| refusal(to, &e))?;
        let rule = match allow.address(address.ip(), address.port(), Over::Tcp) {
            Some(found) if by_address => found.to_string(),
            _ => rule.to_owned(),
        };
        Ok(Dialled { socket, address, rule })
    };
    timeout(deadline, whole).await.unwrap_or_else(|_| Err(late(to, deadline)))
}

/// Opens a socket to what [`Allow::plan`] allowed for a flow: to the first address, since UDP cannot tell which one
/// serves.
///
/// # Errors
/// The refusal to answer with.
pub async fn connect_udp(
    allow: &Allow,
    to: &HostPort,
    rule: &str,
    by_address: bool,
    deadline: Duration,
) -> Result<Connected, Refusal> {
    let addresses = timeout(deadline, allowed(allow, to, by_address, Over::Udp));
    let addresses = addresses.await.unwrap_or_else(|_| Err(late(to, deadline)))?;
    let Some(&address) = addresses.first() else { return Err(allow.denied(to, Over::Udp)) };
    let socket = connect(address).await.map_err(|e| refusal(to, &e))?;
    let rule = match allow.address(address.ip(), address.port(), Over::Udp) {
        Some(found) if by_address => found.to_string(),
        _ => rule.to_owned(),
    };
    Ok(Connected { socket, address, rule })
}

fn late(to: &HostPort, deadline: Duration) -> Refusal {
    let why = format!("{to} did not answer the edge within {} s", deadline.as_secs_f32());
    Refusal::because(RefuseCode::TargetTimeout, why)
}

/// The addresses of a target that may be reached; at least one.
async fn allowed(allow: &Allow, to: &HostPort, by_address: bool, over: Over) -> Result<Vec<SocketAddr>, Refusal> {
    let resolved = resolve(to).await?;
    if to.host.parse::<IpAddr>().is_ok() {
        return Ok(resolved);
    }
    let may = |a: &SocketAddr| {
        if by_address {
            allow.address(a.ip(), a.port(), over).is_some()
        } else {
            allow.named_address(a.ip(), a.port(), over)
        }
    };
    let addresses: Vec<_> = resolved.into_iter().filter(may).collect();
    if addresses.is_empty() { Err(allow.denied(to, over)) } else { Ok(addresses) }
}

async fn resolve(to: &HostPort) -> Result<Vec<SocketAddr>, Refusal> {
    if let Ok(ip) = to.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, to.port)]);
    }
    if to.host == "localhost" {
        // RFC 6761, 6.3: this name is never asked of anybody else.
        let both = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        return Ok(both.map(|ip| SocketAddr::new(ip, to.port)).to_vec());
    }
    let unknown = |why: &str| {
        let why = format!("the edge cannot resolve {}: {why}", to.host);
        Err(Refusal::because(RefuseCode::TargetNameUnknown, why))
    };
    match lookup_host((to.host.as_str(), to.port)).await {
        Ok(found) => {
            let found = interleaved(found.collect());
            if found.is_empty() { unknown("it has no address") } else { Ok(found) }
        }
        Err(e) => unknown(&e.to_string()),
    }
}

/// Alternates between the families, beginning with that of the first address, so that a broken family costs one head
/// start only (RFC 8305, 4).
fn interleaved(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addresses.first().map(SocketAddr::is_ipv6) else { return addresses };
    let (mut a, mut b): (VecDeque<_>, VecDeque<_>) = addresses.into_iter().partition(|x| x.is_ipv6() == first);
    let mut mixed = Vec::new();
    while mixed.len() < MOST_ADDRESSES && !(a.is_empty() && b.is_empty()) {
        mixed.extend(a.pop_front());
        mixed.extend(b.pop_front());
    }
    mixed
}

type Attempt = Pin<Box<dyn Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send>>;

/// Attempts that run next to each other.
struct Race {
    waiting: VecDeque<SocketAddr>,
    running: Vec<Attempt>,
    next_start: Pin<Box<Sleep>>,
    last_error: Option<io::Error>,
}

/// Connects to the first address that answers. The error is that of the last one.
async fn race(addresses: Vec<SocketAddr>) -> io::Result<(TcpStream, SocketAddr)> {
    let mut race = Race {
        waiting: addresses.into(),
        running: Vec::new(),
        next_start: Box::pin(sleep_until(Instant::now())),
        last_error: None,
    };
    poll_fn(move |cx| race.poll(cx)).await
}

impl Race {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        loop {
            let mut i = 0;
            while let Some(attempt) = self.running.get_mut(i) {
                match attempt.as_mut().poll(cx) {
                    Poll::Ready(Ok(winner)) => return Poll::Ready(Ok(winner)),
                    Poll::Ready(Err(e)) => {
                        drop(self.running.swap_remove(i));
                        self.last_error = Some(e);
                    }
                    Poll::Pending => i += 1,
                }
            }
            if self.waiting.is_empty() && self.running.is_empty() {
                let none = || io::Error::other("no address");
                return Poll::Ready(Err(self.last_error.take().unwrap_or_else(none)));
            }
            let turn = self.running.is_empty() || self.next_start.as_mut().poll(cx).is_ready();
            let Some(address) = turn.then(|| self.waiting.pop_front()).flatten() else { return Poll::Pending };
            self.running.push(Box::pin(async move { Ok((TcpStream::connect(address).await?, address)) }));
            self.next_start.as_mut().reset(Instant::now() + HEAD_START);
        }
    }
}

fn refusal(to: &HostPort, error: &io::Error) -> Refusal {
    use io::ErrorKind as K;
    #[allow(clippy::wildcard_enum_match_arm, reason = "the list of the standard library grows")]
    let (code, why) = match error.kind() {
        K::ConnectionRefused | K::ConnectionReset => {
            (RefuseCode::TargetRefused, format!("{to} refused the connection: nothing listens on that port"))
        }
        K::TimedOut => (RefuseCode::TargetTimeout, format!("{to} did not answer the edge: {error}")),
        K::QuotaExceeded | K::OutOfMemory => {
            (RefuseCode::LimitReached, format!("the edge is short of memory: {error}"))
        }
        // EMFILE and ENFILE have no kind.
        _ if matches!(error.raw_os_error(), Some(23 | 24)) => {
            (RefuseCode::LimitReached, "the edge has too many files open; raise its LimitNOFILE".to_owned())
        }
        _ => (RefuseCode::TargetUnreachable, format!("the edge cannot reach {to}: {error}")),
    };
    Refusal::because(code, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate_and_the_number_is_bounded() {
        let parse = |list: &[&str]| list.iter().map(|a| a.parse::<SocketAddr>().unwrap()).collect::<Vec<_>>();
        let given = parse(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "2.2.2.2:1"]);
        assert_eq!(interleaved(given), parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"]));
        assert!(interleaved(vec![]).is_empty());
        assert_eq!(interleaved(parse(&["1.1.1.1:1"; 30])).len(), MOST_ADDRESSES);
    }

    #[tokio::test]
    async fn a_dead_address_is_passed_over_for_the_next() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live = listener.local_addr().unwrap();
        let dead = {
            let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            gone.local_addr().unwrap()
        };
        let (_socket, address) = race(vec![dead, live]).await.unwrap();
        assert_eq!(address, live);
        let error = race(vec![dead]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
