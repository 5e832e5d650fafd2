//! Accepting links, over both carriers.

use std::{io, net::SocketAddr, sync::Arc};

use proto::{code::CloseCode, connection_id::Place};
use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};

use super::{
    Carrier, Link, LinkEnd,
    quic::{self, LinkLimits},
    tcp::{TcpArriving, TcpDoor},
};

/// Accepts links: over QUIC, and over TCP if it has been given a door for that. Clones are the same listener.
#[derive(Clone, Debug)]
pub struct Listener {
    endpoint: Endpoint,
    limits: LinkLimits,
    tcp: Option<TcpDoor>,
}

impl Listener {
    /// Listens on a UDP address.
    ///
    /// # Errors
    /// If the socket cannot be opened.
    pub fn bind(address: SocketAddr, config: ServerConfig, limits: &LinkLimits) -> io::Result<Self> {
        Self::open(EndpointConfig::default(), address, config, limits)
    }

    /// Listens as the process before this one did: with the same reset key, links of a process that was killed are
    /// told so with their next packet (RFC 9000, 10.3) instead of dying of silence. Connection ids say `place`.
    ///
    /// # Errors
    /// If the socket cannot be opened.
    pub fn bind_again(
        address: SocketAddr,
        config: ServerConfig,
        limits: &LinkLimits,
        (reset_key, place): (&[u8], Place),
    ) -> io::Result<Self> {
        Self::open(quic::known_endpoint(reset_key, place), address, config, limits)
    }

    fn open(
        endpoint: EndpointConfig,
        address: SocketAddr,
        config: ServerConfig,
        limits: &LinkLimits,
    ) -> io::Result<Self> {
        let socket = quic::udp_socket(address)?;
        let endpoint = Endpoint::new(endpoint, Some(config), socket, Arc::new(TokioRuntime))?;
        Ok(Self::from_endpoint(endpoint, limits))
    }

    /// Listens on an endpoint that was made elsewhere, as simulations do.
    #[must_use]
    pub const fn from_endpoint(endpoint: Endpoint, limits: &LinkLimits) -> Self {
        Self { endpoint, limits: *limits, tcp: None }
    }

    /// Accepts over TCP as well.
    #[must_use]
    pub fn with_tcp(self, tcp: TcpDoor) -> Self {
        Self { tcp: Some(tcp), ..self }
    }

    /// Where it listens, by UDP.
    ///
    /// # Errors
    /// If the socket cannot tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next one who wants in; `None` once the listener is closed. Cancel-safe.
    pub async fn accept(&self) -> Option<Arriving> {
        let Some(tcp) = &self.tcp else { return self.accept_quic().await };
        // Not in an order: a crowd over one carrier must not keep those out who come over the other.
        tokio::select! {
            arriving = self.accept_quic() => arriving,
            arriving = tcp.accept() => Some(Arriving(Way::Tcp(Box::new(arriving), tcp.clone()))),
        }
    }

    async fn accept_quic(&self) -> Option<Arriving> {
        let incoming = self.endpoint.accept().await?;
        Some(Arriving(Way::Quic(incoming, self.limits)))
    }

    /// Links that are open or have not said their last word.
    #[must_use]
    pub fn links(&self) -> usize {
        self.endpoint.open_connections() + self.tcp.as_ref().map_or(0, TcpDoor::links)
    }

    /// Takes no one in any more; links live on.
    pub fn refuse_new(&self) {
        self.endpoint.set_server_config(None);
        self.tcp.iter().for_each(TcpDoor::refuse_new);
    }

    /// Closes every link.
    pub fn close(&self, code: CloseCode) {
        self.endpoint.close(code.number().into(), code.sentence().as_bytes());
        self.tcp.iter().for_each(|tcp| tcp.close(code));
    }

    /// Waits until every link has said its last word.
    pub async fn idle(&self) {
        self.endpoint.wait_idle().await;
        if let Some(tcp) = &self.tcp {
            tcp.idle().await;
        }
    }
}

/// Somebody who wants in.
#[derive(Debug)]
pub struct Arriving(Way);

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "most arrivals are the large one, and none is kept")]
enum Way {
    Quic(quinn::Incoming, LinkLimits),
    Tcp(Box<TcpArriving>, TcpDoor),
}

impl Arriving {
    /// By what it comes.
    #[must_use]
    pub const fn carrier(&self) -> Carrier {
        match self.0 {
            Way::Quic(..) => Carrier::Quic,
            Way::Tcp(..) => Carrier::Tcp,
        }
    }

    /// From where.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        let address = match &self.0 {
            Way::Quic(incoming, _) => incoming.remote_address(),
            Way::Tcp(arriving, _) => arriving.remote_address(),
        };
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    /// Turns it away without spending anything on it.
    pub fn refuse(self) {
        match self.0 {
            Way::Quic(incoming, _) => incoming.refuse(),
            Way::Tcp(arriving, _) => arriving.refuse(),
        }
    }

    /// Lets it prove its address first, without keeping state (RFC 9000, 8.1.2). Does nothing if it has, as everybody
    /// has who comes by TCP.
    ///
    /// # Errors
    /// Gives it back if the address is already proven.
    #[allow(clippy::result_large_err, reason = "the error is the value itself, handed back")]
    pub fn retry(self) -> Result<(), Self> {
        match self.0 {
            Way::Quic(incoming, limits) if incoming.may_retry() => {
                incoming.retry().map_err(|e| Self(Way::Quic(e.into_incoming(), limits)))
            }
            proven @ (Way::Quic(..) | Way::Tcp(..)) => Err(Self(proven)),
        }
    }

    /// Does the handshake, within its deadline.
    ///
    /// # Errors
    /// If it fails, or the peer's certificate is not of a mesh.
    pub async fn accept(self) -> Result<Link, LinkEnd> {
        match self.0 {
            Way::Quic(incoming, limits) => {
                let connecting = incoming.accept().map_err(|e| LinkEnd::from_connection(&e))?;
                let connection = quic::within(limits.handshake, connecting).await?;
                quic::link_of(connection, &limits, None)
            }
            Way::Tcp(arriving, door) => door.admit(*arriving).await,
        }
    }
}
