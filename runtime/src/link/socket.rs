//! The UDP socket of one dialled link. It is connected, so that the kernel tells it what the network says about the
//! other side: that nobody listens on that port any more, or that there is no way there.
//!
//! Whoever can guess both ports can forge such a message (RFC 5927), so that none of them ends a link. They are counted
//! in [`Signs`], and it is for the one who uses the link to ask the other side whether it still lives.

use std::{
    fmt, io,
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use parking_lot::{Mutex, RwLock};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use rustix::io::Errno;
use tokio::{io::Interest, net::UdpSocket, sync::watch};
use tracing::trace;

use super::quic::udp_socket;

/// Errors that are taken off a socket in a row before others get their turn.
const ERRORS_IN_A_ROW: usize = 16;

/// What the network has said about the other side of a link. Counters, none of which goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// Times that a host said: nobody listens on that port.
    pub refused: u64,
    /// Times that nothing could be sent: no route, or an address of ours that is gone.
    pub unsent: u64,
    /// Times that this host was seen to reach the other side from another address than the link's.
    pub moved: u64,
}

/// Where the signs about a link go in.
pub(super) type SignSender = Arc<watch::Sender<Signs>>;

/// A UDP socket for one peer, which can be replaced by a new one. quinn is not told: its own way of changing sockets
/// (`Endpoint::rebind`) ends the process when the connection happens to end at the same moment.
pub(super) struct ConnectedSocket {
    present: RwLock<Arc<Io>>,
    waiting: Mutex<Waiting>,
    peer: SocketAddr,
    signs: SignSender,
}

struct Io {
    socket: UdpSocket,
    state: UdpSocketState,
}

/// Who waits for the socket, to be told when there is another one.
#[derive(Default)]
struct Waiting {
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl fmt::Debug for ConnectedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectedSocket({:?})", self.present().socket.local_addr())
    }
}

impl ConnectedSocket {
    /// Opens one with a new source port.
    pub(super) fn open(peer: SocketAddr, signs: SignSender) -> io::Result<Self> {
        let present = RwLock::new(Arc::new(Io::open(peer)?));
        Ok(Self { present, waiting: Mutex::default(), peer, signs })
    }

    /// Goes on with a new source port, and with whatever address this host has now.
    pub(super) fn replace(&self) -> io::Result<()> {
        let next = Arc::new(Io::open(self.peer)?);
        *self.present.write() = next;
        let Waiting { reader, writer } = std::mem::take(&mut *self.waiting.lock());
        reader.into_iter().chain(writer).for_each(Waker::wake);
        Ok(())
    }

    /// Notes whether this host would now send to the peer from another address than the present socket does.
    pub(super) fn look_around(&self) {
        let (now, then) = (address_towards(self.peer), self.present().socket.local_addr());
        // Without any way there is nothing to change to; sending fails, and that is a sign of its own.
        if let (Some(now), Ok(then)) = (now, then)
            && now != then.ip()
        {
            trace!(%now, then = %then.ip(), "another address");
            self.signs.send_modify(|signs| signs.moved += 1);
        }
    }

    fn present(&self) -> Arc<Io> {
        Arc::clone(&self.present.read())
    }

    /// Takes note of an error. None of them is the end: what is lost is sent again, or the link dies of silence.
    fn note(&self, error: &io::Error, sending: bool) {
        trace!(%error, sending, "UDP");
        if error.kind() == io::ErrorKind::ConnectionRefused {
            self.signs.send_modify(|signs| signs.refused += 1);
        } else if sending && !is(error, Errno::MSGSIZE) {
            self.signs.send_modify(|signs| signs.unsent += 1);
        }
    }
}

impl Io {
    fn open(peer: SocketAddr) -> io::Result<Self> {
        let socket = udp_socket(any(peer))?;
        // Elsewhere a connected socket does not take the address that quinn puts on each datagram.
        if cfg!(any(target_os = "linux", target_os = "android")) {
            socket.connect(peer)?;
        }
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket: UdpSocket::from_std(socket)?, state })
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_io(Interest::WRITABLE, || self.state.try_send((&self.socket).into(), transmit))
    }
}

fn any(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    }
}

/// The address of this host from which a packet to this peer would go. `None` if there is no way to it. Nothing is sent.
#[must_use]
pub fn address_towards(peer: SocketAddr) -> Option<IpAddr> {
    let socket = std::net::UdpSocket::bind(any(peer)).ok()?;
    socket.connect(peer).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

impl AsyncUdpSocket for ConnectedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable(self))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let io = self.present();
        let Err(first) = io.send(transmit) else { return Ok(()) };
        if first.kind() == io::ErrorKind::WouldBlock {
            return Err(first);
        }
        // The error may be that of an earlier datagram: the kernel hands it out once, and does not send this one.
        if first.kind() == io::ErrorKind::ConnectionRefused {
            self.note(&first, true);
        }
        match io.send(transmit) {
            Err(second) if second.kind() == io::ErrorKind::WouldBlock => return Err(second),
            Err(second) => self.note(&second, true),
            Ok(()) => {}
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // Before the look at the socket: one that comes in between then wakes.
        self.waiting.lock().reader = Some(cx.waker().clone());
        let io = self.present();
        for _ in 0..ERRORS_IN_A_ROW {
            ready!(io.socket.poll_recv_ready(cx))?;
            match io.socket.try_io(Interest::READABLE, || io.state.recv((&io.socket).into(), bufs, meta)) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.note(&error, false),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.present().socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.present().state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.present().state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.present().state.may_fragment()
    }
}

/// Waits until a socket takes more. A socket remembers one who waits, and there is only one connection on it.
#[derive(Debug)]
struct Writable(Arc<ConnectedSocket>);

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.waiting.lock().writer = Some(cx.waker().clone());
        self.0.present().socket.poll_send_ready(cx)
    }
}
