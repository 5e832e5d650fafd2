//! The QUIC carrier: endpoints, their limits, and dialing.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::hmac;
use proto::{
    code::CloseCode,
    connection_id::{self, Place},
};
use quinn::{
    ClientConfig, Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, IdleTimeout,
    MtuDiscoveryConfig, ServerConfig, TokioRuntime, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    ConnectedSocket, EndCause, Link, LinkEnd, LinkState, Own, SignSender, buffers, congestion::Congestion,
    datagrams::Datagrams,
};
use crate::tls;

/// What a link may use. Every limit is set here; none is left to a library's default.
#[derive(Clone, Copy, Debug)]
pub struct LinkLimits {
    /// Bytes that the peer may send on one stream before they are read here.
    pub stream_window: u32,
    /// Bytes that the peer may send on all streams of a link before they are read here.
    pub link_window: u32,
    /// Bytes that may be sent on a link before the peer has acknowledged them.
    pub send_window: u64,
    /// Streams that the peer may have open at once.
    pub streams: u32,
    /// Silence after which the link counts as dead.
    pub idle: Duration,
    /// How often to break one's own silence; `None` where the peer or a message does.
    pub keep_alive: Option<Duration>,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// Who decides how much may be in flight.
    pub congestion: Congestion,
    /// Bytes of datagrams that may wait on a link, each way; with 0 there are none and they travel in streams.
    pub datagrams: usize,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            // What is not read costs up to three times its size, since a packet that waits keeps the whole batch that it
            // came with. So this is 2 MiB for a stream at most, and 32 MiB for a link.
            stream_window: 512 * 1024,
            link_window: 7 * 1024 * 1024,
            // Less than what a peer of ours takes on a link, so that the rest of that is for those who go first.
            send_window: 6 * 1024 * 1024,
            streams: 64,
            idle: Duration::from_secs(12),
            keep_alive: None,
            handshake: Duration::from_secs(5),
            congestion: Congestion::default(),
            datagrams: 512 * 1024,
        }
    }
}

/// Least time between two resets for links that are not known. quinn's 20 ms would need minutes for ten thousand edges.
const RESET_INTERVAL: Duration = Duration::from_micros(100);

/// Connection ids that say to whom they belong, and have no signature. quinn's own are signed with a key of the process,
/// so that a process which was started again would take those of the one before for noise, and send no reset.
#[derive(Debug)]
struct PlacedIds(Place);

impl ConnectionIdGenerator for PlacedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&self.0.id(rand::random()))
    }

    fn cid_len(&self) -> usize {
        connection_id::LEN
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), quinn_proto::InvalidCid> {
        // Another one's link: what is sent about it from here could not be believed there.
        if Place::of_id(id) == Some(self.0) { Ok(()) } else { Err(quinn_proto::InvalidCid) }
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// First size of a datagram's payload: what every IPv6 path takes (RFC 9000, 14).
const INITIAL_MTU: u16 = 1200;
/// Size of the largest datagram's payload that is looked for: what passes over Ethernet with IPv6 and UDP in it.
pub(super) const MOST_PAYLOAD: u16 = 1452;
/// How often a larger one is tried again on a path that took none, or took the largest and became another.
const MTU_AGAIN: Duration = Duration::from_secs(300);
/// How long after a black hole larger ones are tried again.
const AFTER_BLACK_HOLE: Duration = Duration::from_secs(60);

impl LinkLimits {
    /// Streams that may each hold their whole window before they hold three quarters of the link's.
    pub(super) const fn stalled_streams(&self) -> usize {
        (self.link_window / 4 * 3 / self.stream_window) as usize
    }

    fn transport(&self) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(MOST_PAYLOAD).interval(MTU_AGAIN).black_hole_cooldown(AFTER_BLACK_HOLE);
        let mut transport = TransportConfig::default();
        transport
            .stream_receive_window(self.stream_window.into())
            .receive_window(self.link_window.into())
            .send_window(self.send_window)
            .max_concurrent_bidi_streams(self.streams.into())
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_idle_timeout(IdleTimeout::try_from(self.idle).ok())
            .keep_alive_interval(self.keep_alive)
            .initial_mtu(INITIAL_MTU)
            .mtu_discovery_config(Some(discovery))
            .congestion_controller_factory(self.congestion.factory())
            .datagram_send_buffer_size(self.datagrams)
            .datagram_receive_buffer_size((self.datagrams > 0).then_some(self.datagrams));
        transport
    }
}

/// Makes the server half of an endpoint.
///
/// # Errors
/// If the TLS configuration cannot do QUIC.
pub fn server_config(tls: rustls::ServerConfig, limits: &LinkLimits) -> Result<ServerConfig, LinkEnd> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| LinkEnd::new(EndCause::Transport, e.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(limits.transport()));
    Ok(config)
}

/// Makes the client half of an endpoint.
///
/// # Errors
/// If the TLS configuration cannot do QUIC.
pub fn client_config(tls: rustls::ClientConfig, limits: &LinkLimits) -> Result<ClientConfig, LinkEnd> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| LinkEnd::new(EndCause::Transport, e.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(limits.transport()));
    Ok(config)
}

/// Opens a UDP socket with buffers as large as they get; `[::]` takes IPv4 as well.
///
/// # Errors
/// If the address is taken or not of this host.
pub fn udp_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    buffers::enlarge(&socket);
    Ok(socket)
}

/// The endpoint of a process whose peers notice at their next packet that it has restarted: its stateless resets are
/// made with a key that outlives it. Its connection ids say `place`.
#[must_use]
pub fn known_endpoint(reset_key: &[u8], place: Place) -> EndpointConfig {
    let mut endpoint = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset_key)));
    endpoint.cid_generator(move || Box::new(PlacedIds(place))).min_reset_interval(RESET_INTERVAL);
    endpoint
}

/// Where a dialer's sockets come from.
#[derive(Clone, Debug)]
enum Sockets {
    /// A new one, with a new source port, for each try: a path that some middlebox has given up is not tried twice. It
    /// is connected, so that what the network says about the other side is heard.
    PerDial,
    /// One endpoint for all, as simulations do.
    Shared(Endpoint),
}

/// Dials links.
#[derive(Clone, Debug)]
pub struct Dialer {
    sockets: Sockets,
    config: ClientConfig,
    limits: LinkLimits,
    impatient: bool,
}

impl Dialer {
    /// Dials from a new UDP socket each time.
    #[must_use]
    pub const fn new(config: ClientConfig, limits: &LinkLimits) -> Self {
        Self { sockets: Sockets::PerDial, config, limits: *limits, impatient: false }
    }

    /// Dials from an endpoint that was made elsewhere.
    #[must_use]
    pub const fn from_endpoint(endpoint: Endpoint, config: ClientConfig, limits: &LinkLimits) -> Self {
        Self { sockets: Sockets::Shared(endpoint), config, limits: *limits, impatient: false }
    }

    /// The same dialer with another identity or other roots.
    #[must_use]
    pub fn with_config(&self, config: ClientConfig) -> Self {
        Self { config, ..self.clone() }
    }

    /// Gives up at once when this host cannot send: for those who have another way.
    #[must_use]
    pub fn impatient(self) -> Self {
        Self { impatient: true, ..self }
    }

    /// Dials and does the handshake, within its deadline. `name` is for the session cache and for the log of the other
    /// side; who it is comes from its certificate.
    ///
    /// # Errors
    /// If there is no way, no answer, or no trust.
    pub async fn dial(&self, address: SocketAddr, name: &str) -> Result<Link, LinkEnd> {
        let no_route = |e: &dyn std::error::Error| LinkEnd::new(EndCause::NoRoute, e.to_string());
        let dial =
            |endpoint: &Endpoint| endpoint.connect_with(self.config.clone(), address, name).map_err(|e| no_route(&e));
        let own = match &self.sockets {
            Sockets::Shared(endpoint) => {
                let connection = within(self.limits.handshake, dial(endpoint)?).await?;
                return link_of(connection, &self.limits, None);
            }
            Sockets::PerDial => Own::open(address).map_err(|e| no_route(&e))?,
        };
        let connecting = dial(&own.endpoint)?;
        let connection = tokio::select! {
            biased;
            connection = within(self.limits.handshake, connecting) => connection?,
            end = own.refused(address, self.impatient) => return Err(end),
        };
        link_of(connection, &self.limits, Some(own))
    }
}

impl Own {
    fn open(peer: SocketAddr) -> io::Result<Self> {
        let signs = SignSender::default();
        let socket = Arc::new(ConnectedSocket::open(peer, Arc::clone(&signs))?);
        let (config, shared) = (EndpointConfig::default(), Arc::clone(&socket));
        let endpoint = Endpoint::new_with_abstract_socket(config, None, shared, Arc::new(TokioRuntime))?;
        Ok(Self { endpoint, socket, signs })
    }

    /// Waits until the other host says that nobody listens there, or, if that is enough, until nothing can be sent: an
    /// attempt need not wait any longer then.
    async fn refused(&self, address: SocketAddr, or_unsent: bool) -> LinkEnd {
        let mut signs = self.signs.subscribe();
        // The sender is held by self.
        let heard = signs.wait_for(|signs| signs.refused > 0 || (or_unsent && signs.unsent > 0)).await;
        if heard.is_ok_and(|signs| signs.refused == 0) {
            return LinkEnd::new(EndCause::NoRoute, format!("UDP to {address} cannot be sent from this machine"));
        }
        LinkEnd::new(EndCause::NobodyListens, format!("{address} sent ICMP port unreachable"))
    }
}

pub(super) async fn within(deadline: Duration, connecting: quinn::Connecting) -> Result<Connection, LinkEnd> {
    match tokio::time::timeout(deadline, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(e)) => Err(LinkEnd::from_connection(&e)),
        Err(_) => Err(LinkEnd::new(EndCause::TimedOut, format!("no handshake within {} s", deadline.as_secs_f32()))),
    }
}

pub(super) fn link_of(connection: Connection, limits: &LinkLimits, own: Option<Own>) -> Result<Link, LinkEnd> {
    let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    match tls::peer_facts(chain.as_deref().map(Vec::as_slice)) {
        Ok(Some(facts)) => {
            let datagrams = if limits.datagrams > 0 { Datagrams::of(&connection) } else { None };
            let state = LinkState::new(limits.stalled_streams(), datagrams);
            Ok(Link::over_quic(connection, Arc::new(facts), state, limits.send_window, own))
        }
        Ok(None) => Err(refuse(&connection, "no certificate")),
        Err(e) => Err(refuse(&connection, &e.to_string())),
    }
}

fn refuse(connection: &Connection, why: &str) -> LinkEnd {
    connection.close(CloseCode::WrongRole.number().into(), why.as_bytes());
    LinkEnd::new(EndCause::WrongPeer, why)
}
