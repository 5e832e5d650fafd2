//! The TCP carrier, for networks that let no UDP through: TLS 1.3, yamux in it, and in each yamux stream the records
//! (`record`) that give it the rules of a QUIC stream.
//!
//! One task drives a link (`driver`); streams are queues that it shares with those who hold them (`state`, `flow`).

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use proto::code::CloseCode;
use rustls_pki_types::ServerName;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream, server::StartHandshake};

use super::{EndCause, Link, LinkEnd, end, quic::LinkLimits};
use crate::{shutdown::Tasks, tls};

mod driver;
mod flow;
mod half;
pub mod proxy;
mod record;
mod state;
mod wire;

use driver::Driver;
use half::Shared;
pub(super) use half::{Receiver, Sender, TcpLink};
use proxy::Proxy;
use wire::{Counts, Wire};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
/// Connections that have not said Hello in TLS yet; more wait in the kernel.
const FRONT: usize = 1024;
/// How long they may take for that.
const HELLO: Duration = Duration::from_secs(3);
/// Connections that have, and wait to be looked at.
const READY: usize = 64;
/// Pause after an error of accepting, as when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(50);
/// Bytes that the kernel holds which it has not sent: what goes first waits behind them.
const NOT_SENT: u32 = 32 * 1024;
/// Bytes that TLS holds which the kernel has not taken.
const TLS_BUFFER: usize = 16 * 1024;
/// The largest frame. What yamux is given at once is one record, and what is short beside it.
const FRAME: usize = 2 * record::MOST_DATA + 1024;
/// yamux's own limit of streams. The one that counts is in [`LinkLimits`], and known to the peer.
const STREAMS: usize = 1 << 20;

fn tune(socket: &TcpStream, limits: &LinkLimits) {
    let _ = socket.set_nodelay(true);
    let socket = SockRef::from(socket);
    let alive = TcpKeepalive::new().with_time(limits.idle).with_interval(limits.idle / 3);
    // A system without one of them is slower to notice, and still right.
    let _ = socket.set_tcp_keepalive(&alive);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let _ = socket.set_tcp_user_timeout(Some(limits.idle));
        let _ = socket.set_tcp_notsent_lowat(NOT_SENT);
    }
}

/// Makes a link of a connection whose handshake is done, and waits for the peer's first word: only then is it known
/// that it has accepted this side's certificate.
async fn establish(
    tls: TlsStream<TcpStream>,
    limits: &LinkLimits,
    tasks: &Tasks,
) -> Result<(Link, Weak<Shared>), LinkEnd> {
    let remote = tls.get_ref().0.peer_addr().map_err(|e| end::from_io(&e))?;
    let session = tls.get_ref().1;
    let wrong = |why: String| LinkEnd::new(EndCause::WrongPeer, why);
    let facts = tls::peer_facts(session.peer_certificates()).map_err(|e| wrong(e.to_string()))?;
    let facts = facts.ok_or_else(|| wrong("no certificate".into()))?;
    let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
    let dialer = matches!(tls, TlsStream::Client(_));
    let mut config = yamux::Config::default();
    config.set_max_connection_receive_window(None).set_max_num_streams(STREAMS).set_split_send_size(FRAME);
    let mode = if dialer { yamux::Mode::Client } else { yamux::Mode::Server };
    let counts = Arc::new(Counts::new());
    let shared = Arc::new(Shared::new(limits, Arc::clone(&counts)));
    let yamux = yamux::Connection::new(Wire::new(tls, counts), config, mode);
    let link = TcpLink::new(Arc::clone(&shared), remote, alpn.as_deref());
    let weak = Arc::downgrade(&shared);
    tasks.spawn(Driver::new(yamux, shared, dialer).run());
    link.greeted().await?;
    Ok((Link::over_tcp(link, Arc::new(facts), limits.stalled_streams()), weak))
}

async fn within<T>(deadline: Duration, work: impl Future<Output = Result<T, LinkEnd>>) -> Result<T, LinkEnd> {
    let late = || LinkEnd::new(EndCause::TimedOut, format!("no handshake within {} s", deadline.as_secs_f32()));
    timeout(deadline, work).await.unwrap_or_else(|_| Err(late()))
}

/// A handshake that the other side breaks off is no sign that it has restarted.
fn of_handshake(error: &io::Error) -> LinkEnd {
    let end = end::from_io(error);
    if end.cause == EndCause::PeerRestarted {
        return LinkEnd::new(EndCause::Transport, format!("the handshake was broken off: {}", end.detail));
    }
    end
}

/// Dials links over TCP.
#[derive(Clone, Debug)]
pub struct TcpDialer {
    config: Arc<rustls::ClientConfig>,
    limits: LinkLimits,
    tasks: Tasks,
}

impl TcpDialer {
    /// Dials with this identity. Sessions are kept apart from those of QUIC.
    #[must_use]
    pub fn new(mut config: rustls::ClientConfig, limits: &LinkLimits) -> Self {
        config.resumption = rustls::client::Resumption::in_memory_sessions(64);
        Self { config: Arc::new(config), limits: *limits, tasks: Tasks::new() }
    }

    /// Dials and does the handshake, within its deadline. `name` is as for [`super::quic::Dialer::dial`].
    ///
    /// # Errors
    /// If there is no way, no answer, or no trust.
    pub async fn dial(&self, address: SocketAddr, name: &str) -> Result<Link, LinkEnd> {
        let work = async {
            let socket = TcpStream::connect(address).await.map_err(|e| end::from_io(&e))?;
            self.shake_hands(socket, name).await
        };
        within(self.limits.handshake, work).await
    }

    /// Dials through a proxy, which resolves the name in `address` (`host:port`).
    ///
    /// # Errors
    /// As [`TcpDialer::dial`], or if the proxy does not let it through.
    pub async fn dial_through(&self, proxy: &Proxy, address: &str, name: &str) -> Result<Link, LinkEnd> {
        let work = async { self.shake_hands(proxy.connect(address).await?, name).await };
        within(self.limits.handshake, work).await
    }

    async fn shake_hands(&self, socket: TcpStream, name: &str) -> Result<Link, LinkEnd> {
        tune(&socket, &self.limits);
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| LinkEnd::new(EndCause::NameUnknown, format!("{name} is no name")))?;
        let connector = TlsConnector::from(Arc::clone(&self.config));
        let connecting = connector.connect_with(name, socket, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)));
        let tls = connecting.await.map_err(|e| of_handshake(&e))?;
        Ok(establish(tls.into(), &self.limits, &self.tasks).await?.0)
    }
}

/// Accepts links over TCP. Clones are the same door.
#[derive(Clone)]
pub struct TcpDoor(Arc<Door>);

struct Door {
    address: SocketAddr,
    arriving: tokio::sync::Mutex<mpsc::Receiver<TcpArriving>>,
    /// What accepts, and waits for the first word.
    front: Tasks,
    tls: Arc<rustls::ServerConfig>,
    limits: LinkLimits,
    /// The links' drivers.
    tasks: Tasks,
    links: Mutex<Vec<Weak<Shared>>>,
}

impl fmt::Debug for TcpDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpDoor({})", self.0.address)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.front.stop();
    }
}

impl TcpDoor {
    /// Listens on a TCP address; `[::]` takes IPv4 as well.
    ///
    /// # Errors
    /// If the address is taken or not of this host.
    pub fn bind(address: SocketAddr, tls: rustls::ServerConfig, limits: &LinkLimits) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let socket = TcpListener::from_std(socket.into())?;
        let (address, front) = (socket.local_addr()?, Tasks::new());
        let (ready, arriving) = mpsc::channel(READY);
        front.spawn(front.token().run_until_cancelled_owned(receive(socket, ready, front.clone())));
        Ok(Self(Arc::new(Door {
            address,
            arriving: tokio::sync::Mutex::new(arriving),
            front,
            tls: Arc::new(tls),
            limits: *limits,
            tasks: Tasks::new(),
            links: Mutex::default(),
        })))
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.0.address
    }

    /// The next one who wants in, behind its first word; never returns once nobody is let in. Cancel-safe.
    pub(super) async fn accept(&self) -> TcpArriving {
        match self.0.arriving.lock().await.recv().await {
            Some(arriving) => arriving,
            None => std::future::pending().await,
        }
    }

    /// Links that are open or have not said their last word.
    pub(super) fn links(&self) -> usize {
        self.0.tasks.running()
    }

    /// Takes no one in any more; links live on.
    pub(super) fn refuse_new(&self) {
        self.0.front.stop();
    }

    /// Closes every link, and takes no one in any more.
    pub(super) fn close(&self, code: CloseCode) {
        self.refuse_new();
        for link in self.0.links.lock().drain(..).filter_map(|link| link.upgrade()) {
            link.close(code, code.sentence());
        }
    }

    /// Waits until every link has said its last word.
    pub(super) async fn idle(&self) {
        self.0.tasks.ended().await;
    }

    /// Does the handshake with somebody who came through it.
    pub(super) async fn admit(&self, arriving: TcpArriving) -> Result<Link, LinkEnd> {
        let door = &self.0;
        let config = Arc::clone(&door.tls);
        tune(&arriving.hello.io, &door.limits);
        let work = async {
            let accepting = arriving.hello.into_stream_with(config, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)));
            let tls = accepting.await.map_err(|e| of_handshake(&e))?;
            establish(tls.into(), &door.limits, &door.tasks).await
        };
        let (link, shared) = within(door.limits.handshake, work).await?;
        let mut links = door.links.lock();
        if links.len() == links.capacity() {
            links.retain(|link| link.strong_count() > 0);
        }
        links.push(shared);
        Ok(link)
    }
}

/// Accepts connections, and passes those on that have said Hello in TLS: whoever only connects takes no place among
/// those whose handshakes are paid for.
async fn receive(socket: TcpListener, ready: mpsc::Sender<TcpArriving>, front: Tasks) {
    let room = Arc::new(Semaphore::new(FRONT));
    loop {
        let permit = Arc::clone(&room).acquire_owned().await;
        let (connection, from) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no TCP connection can be accepted");
                sleep(PAUSE).await;
                continue;
            }
        };
        let ready = ready.clone();
        front.spawn(front.token().run_until_cancelled_owned(async move {
            let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), connection);
            match timeout(HELLO, hello).await {
                Ok(Ok(hello)) => drop(ready.send(TcpArriving { hello, from }).await),
                Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS came over TCP"),
                Err(_) => tracing::debug!(%from, "a TCP connection that says nothing"),
            }
            drop(permit);
        }));
    }
}

/// Somebody who has opened a TCP connection and said Hello in TLS.
pub(super) struct TcpArriving {
    hello: StartHandshake<TcpStream>,
    from: SocketAddr,
}

impl fmt::Debug for TcpArriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpArriving({})", self.from)
    }
}

impl TcpArriving {
    pub(super) const fn remote_address(&self) -> SocketAddr {
        self.from
    }

    /// Turns it away with a reset: so nothing is left of it here.
    pub(super) fn refuse(self) {
        let _ = SockRef::from(&self.hello.io).set_linger(Some(Duration::ZERO));
    }
}
