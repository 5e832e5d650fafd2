//! A link: one long connection between two members of the mesh, with many streams in it.
//!
//! The rest of the mesh sees [`Link`], [`Stream`] and their errors; what carries them stays in here: QUIC ([`quic`]), or
//! TLS over TCP where no UDP comes through ([`tcp`]). The rules are the same, and so are the limits.
//!
//! An end is never silent: a stream that is dropped without [`SendHalf::finish`] is reset, a link that breaks is an
//! error on every stream in it, and neither can be mistaken for a clean end.

use std::{fmt, io as std_io, net::SocketAddr, sync::Arc, time::Duration};

use proto::code::CloseCode;
use quinn::crypto::rustls::HandshakeData;
use tokio::sync::watch;

use crate::cert::CertFacts;

pub mod buffers;
pub mod congestion;
pub(crate) mod datagrams;
pub mod end;
pub mod io;
pub mod listen;
mod priority;
pub mod quic;
mod socket;
pub mod stream;
pub mod tcp;
pub mod whereabouts;

pub use end::{EndCause, LinkEnd};
use priority::Room;
use socket::{ConnectedSocket, SignSender};
pub use socket::{Signs, address_towards};
use stream::LinkState;
pub use stream::{RecvHalf, SendHalf, Stalled, Stream, StreamError};
use tcp::TcpLink;

/// What carries a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Carrier {
    /// QUIC over UDP.
    Quic,
    /// TLS over TCP.
    Tcp,
}

impl Carrier {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Quic, Self::Tcp];

    /// The word in logs and metrics.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.slug())
    }
}

/// A connection to another member. Clones are the same connection; it is closed by [`Link::close`], or when the last
/// clone and the last stream are dropped.
#[derive(Clone, Debug)]
pub struct Link {
    way: Way,
    peer: Arc<CertFacts>,
    state: Arc<LinkState>,
}

#[derive(Clone, Debug)]
enum Way {
    Quic(quinn::Connection, Option<Own>, Arc<Room>),
    Tcp(TcpLink),
}

/// The endpoint of a link that shares it with nobody.
#[derive(Clone, Debug)]
struct Own {
    endpoint: quinn::Endpoint,
    socket: Arc<ConnectedSocket>,
    signs: SignSender,
}

impl Link {
    fn over_quic(
        connection: quinn::Connection,
        peer: Arc<CertFacts>,
        state: LinkState,
        send_window: u64,
        own: Option<Own>,
    ) -> Self {
        let room = Arc::new(Room::new(connection.clone(), send_window));
        Self { way: Way::Quic(connection, own, room), peer, state: Arc::new(state) }
    }

    fn over_tcp(link: TcpLink, peer: Arc<CertFacts>, room: usize) -> Self {
        Self { way: Way::Tcp(link), peer, state: Arc::new(LinkState::new(room, None)) }
    }

    /// What carries it.
    #[must_use]
    pub const fn carrier(&self) -> Carrier {
        match self.way {
            Way::Quic(..) => Carrier::Quic,
            Way::Tcp(_) => Carrier::Tcp,
        }
    }

    /// What the network says about the other side, now and when it changes. `None` if the link shares its socket with
    /// others, as every link does that was accepted, and over TCP.
    #[must_use]
    pub fn signs(&self) -> Option<watch::Receiver<Signs>> {
        match &self.way {
            Way::Quic(_, own, _) => own.as_ref().map(|own| own.signs.subscribe()),
            Way::Tcp(_) => None,
        }
    }

    /// Goes on from a new UDP socket: a NAT that has forgotten the link makes a new mapping for it, and an address of
    /// this host that has changed is the new one. Streams go on. Returns whether it did: a link that shares its socket
    /// with others stays on it, and one over TCP cannot.
    ///
    /// # Errors
    /// If there is no way to the other side; then nothing has changed.
    pub fn rebind(&self) -> std_io::Result<bool> {
        let Way::Quic(_, Some(own), _) = &self.way else { return Ok(false) };
        own.socket.replace()?;
        Ok(true)
    }

    /// Looks whether this host would send to the other side from another address than the link does, as after a change
    /// of network. If so, [`Signs::moved`] says it; [`Link::rebind`] is what helps.
    pub fn look_around(&self) {
        if let Way::Quic(_, Some(own), _) = &self.way {
            own.socket.look_around();
        }
    }

    /// Who is on the other side, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &CertFacts {
        &self.peer
    }

    /// Where the other side is now; changes when it roams. An IPv4 address is never dressed up as IPv6.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        let address = match &self.way {
            Way::Quic(connection, ..) => connection.remote_address(),
            Way::Tcp(link) => link.remote_address(),
        };
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    /// The protocol that both sides agreed on (ALPN). `None` if they agreed on none.
    #[must_use]
    pub fn alpn(&self) -> Option<Vec<u8>> {
        match &self.way {
            Way::Quic(connection, ..) => {
                let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
                data.protocol
            }
            Way::Tcp(link) => link.alpn(),
        }
    }

    /// Whether the peer has accepted this side's certificate. In TLS 1.3 a dialler is done before the other side has
    /// looked at it; QUIC confirms the handshake (RFC 9001, 4.1.2), and over TCP a link is only up once the peer spoke.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        match &self.way {
            Way::Quic(connection, ..) => connection.stats().frame_rx.handshake_done > 0,
            Way::Tcp(_) => true,
        }
    }

    /// Bytes of the largest UDP payload that is looked for; 0 over TCP.
    #[must_use]
    pub const fn most_payload(&self) -> u16 {
        match &self.way {
            Way::Quic(..) => quic::MOST_PAYLOAD,
            Way::Tcp(_) => 0,
        }
    }

    /// The estimated round trip. Over TCP that of the last ping of the carrier, with what it waited in queues.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        match &self.way {
            Way::Quic(connection, ..) => connection.rtt(),
            Way::Tcp(link) => link.rtt(),
        }
    }

    /// Opens a stream. The peer sees it with the first bytes. Waits while the peer allows no more streams; cancel-safe.
    ///
    /// # Errors
    /// If the link has ended.
    pub async fn open(&self) -> Result<Stream, LinkEnd> {
        match &self.way {
            Way::Quic(connection, _, room) => {
                let halves = connection.open_bi().await.map_err(|e| LinkEnd::from_connection(&e))?;
                Ok(Stream::over_quic(halves, room, Arc::clone(&self.state)))
            }
            Way::Tcp(link) => Ok(Stream::over_tcp(link.open().await?, Arc::clone(&self.state))),
        }
    }

    /// The next stream that the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// If the link has ended.
    pub async fn accept(&self) -> Result<Stream, LinkEnd> {
        match &self.way {
            Way::Quic(connection, _, room) => {
                let halves = connection.accept_bi().await.map_err(|e| LinkEnd::from_connection(&e))?;
                Ok(Stream::over_quic(halves, room, Arc::clone(&self.state)))
            }
            Way::Tcp(link) => Ok(Stream::over_tcp(link.accept().await?, Arc::clone(&self.state))),
        }
    }

    /// Bytes that a link between shards may hold which nobody has read: it carries the streams of many.
    pub const WIDE_WINDOW: u32 = 64 * 1024 * 1024;

    /// Lets the peer have this many streams open at once, with room for all of them: for links between shards, which
    /// are QUIC. Over TCP the room stays as it is.
    pub fn carry_many(&self, streams: u32) {
        if let Way::Quic(connection, _, room) = &self.way {
            connection.set_receive_window(Self::WIDE_WINDOW.into());
            room.set(Self::WIDE_WINDOW.into());
        }
        self.allow_streams(streams);
    }

    /// Lets the peer have this many streams open at once.
    pub fn allow_streams(&self, count: u32) {
        match &self.way {
            Way::Quic(connection, ..) => connection.set_max_concurrent_bi_streams(count.into()),
            Way::Tcp(link) => link.allow_streams(count),
        }
    }

    /// Ends the link now; streams in it break. What was sent and not yet acknowledged may be lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        match &self.way {
            Way::Quic(connection, ..) => connection.close(code.number().into(), reason.as_bytes()),
            Way::Tcp(link) => link.close(code, reason),
        }
    }

    /// Waits for the end, and tells why.
    pub async fn ended(&self) -> LinkEnd {
        match &self.way {
            Way::Quic(connection, ..) => LinkEnd::from_connection(&connection.closed().await),
            Way::Tcp(link) => link.ended().await,
        }
    }

    /// Why it ended; `None` while it lives.
    #[must_use]
    pub fn end(&self) -> Option<LinkEnd> {
        match &self.way {
            Way::Quic(connection, ..) => connection.close_reason().map(|e| LinkEnd::from_connection(&e)),
            Way::Tcp(link) => link.end(),
        }
    }

    /// What the congestion controller believes of the path; `None` if it has no model, as over TCP, where the system has
    /// its own.
    #[must_use]
    pub fn path_model(&self) -> Option<congestion::PathModel> {
        match &self.way {
            Way::Quic(connection, ..) => congestion::path_model(connection),
            Way::Tcp(_) => None,
        }
    }

    /// Whether datagrams travel by themselves on it, as QUIC's do if both sides have them. Otherwise they travel in
    /// streams.
    #[must_use]
    pub fn has_datagrams(&self) -> bool {
        self.state.has_datagrams()
    }

    /// What the carrier counted. Over TCP only the bytes.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        let connection = match &self.way {
            Way::Quic(connection, ..) => connection,
            Way::Tcp(link) => return link.stats(),
        };
        let stats = connection.stats();
        LinkStats {
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            sent_packets: stats.path.sent_packets,
            mtu: stats.path.current_mtu,
            window: stats.path.cwnd,
        }
    }
}

/// What the carrier counted over the life of a link.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkStats {
    /// On the wire, with everything.
    pub sent_bytes: u64,
    /// On the wire, with everything.
    pub received_bytes: u64,
    /// Packets taken for lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes of the largest packet that the path takes.
    pub mtu: u16,
    /// Congestion window in bytes.
    pub window: u64,
}
