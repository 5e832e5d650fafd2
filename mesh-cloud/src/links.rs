//! What a shard's links may use, and what it shows and wants to see in their handshakes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use proto::{ALPN_MESH, ALPN_PEER, connection_id::Place, identity::Role};
use runtime::{
    identity::IdentityDir,
    link::{
        Link,
        listen::Listener,
        quic::{self, LinkLimits},
        tcp::TcpDoor,
    },
    tls::{LiveIdentity, MeshVerifier, TrustBundle, client_config, server_config},
};

use crate::config::ShardConfig;

/// Streams that may come before it is known who comes, and how many it may open. QUIC sets memory aside for each.
const FIRST_STREAMS: u32 = 8;
/// Ports that are tried when any will do.
const TRIES: u32 = 16;
/// Arrivals that wait for a decision; the carrier drops what is beyond.
const MAX_INCOMING: usize = 4096;
/// Bytes that one of them may send meanwhile, and all of them.
const INCOMING_BYTES: u64 = 16 * 1024;
const ALL_INCOMING_BYTES: u64 = 32 * 1024 * 1024;

/// The limits of a shard's links. Windows are what a stream and a tunnel may keep in memory here.
#[must_use]
pub fn link_limits() -> LinkLimits {
    LinkLimits { streams: FIRST_STREAMS, ..LinkLimits::default() }
}

fn endpoint_tls(identity: &LiveIdentity, bundle: &TrustBundle, alpn: &[&[u8]]) -> anyhow::Result<rustls::ServerConfig> {
    let mut tls = server_config(identity, MeshVerifier::of_clients(bundle.clone(), true), alpn)?;
    // Sessions are kept by those who come back and not here, so that ten thousand edges can resume theirs.
    tls.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()?;
    Ok(tls)
}

/// Listens for links over QUIC, and over TCP on the same port if that is configured. If any port will do, one is looked for
/// that both have free.
///
/// # Errors
/// If TLS cannot be set up, or the address is taken.
pub(crate) fn listen(
    config: &ShardConfig,
    (identity, bundle): (&LiveIdentity, &TrustBundle),
    limits: &LinkLimits,
    (reset_key, place): (&[u8], Place),
) -> anyhow::Result<Listener> {
    let endpoint = endpoint_config(identity, bundle, limits)?;
    let mut tries = if config.listen.port() == 0 { TRIES } else { 1 };
    loop {
        let listener = Listener::bind_again(config.listen, endpoint.clone(), limits, (reset_key, place))
            .with_context(|| format!("cannot listen on UDP {}", config.listen))?;
        if !config.tcp {
            return Ok(listener);
        }
        tries -= 1;
        match tcp_door(identity, bundle, listener.local_addr()?, limits) {
            Ok(door) => return Ok(listener.with_tcp(door)),
            Err(_) if tries > 0 => {}
            Err(error) => return Err(error),
        }
    }
}

/// The way in over TCP, for edges and people's tools; shards reach each other over QUIC.
///
/// # Errors
/// If TLS cannot be set up, or the address is taken.
pub fn tcp_door(
    identity: &LiveIdentity,
    bundle: &TrustBundle,
    address: SocketAddr,
    limits: &LinkLimits,
) -> anyhow::Result<TcpDoor> {
    let tls = endpoint_tls(identity, bundle, &[ALPN_MESH])?;
    TcpDoor::bind(address, tls, limits).with_context(|| {
        format!("cannot listen on TCP {address}; free that port, or set tcp = false to take tunnels over UDP alone")
    })
}

/// The server half of a shard's endpoint.
///
/// # Errors
/// If TLS cannot be set up.
pub fn endpoint_config(
    identity: &LiveIdentity,
    bundle: &TrustBundle,
    limits: &LinkLimits,
) -> anyhow::Result<quinn::ServerConfig> {
    let mut config = quic::server_config(endpoint_tls(identity, bundle, &[ALPN_MESH, ALPN_PEER])?, limits)?;
    // What may wait here for a handshake, by number and by size.
    config
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(ALL_INCOMING_BYTES);
    Ok(config)
}

/// The limits of the links between shards, which carry the streams of many edges.
#[must_use]
pub fn peer_limits() -> LinkLimits {
    LinkLimits {
        link_window: Link::WIDE_WINDOW,
        send_window: Link::WIDE_WINDOW.into(),
        // Streams are opened by the one that dialled.
        streams: 0,
        idle: Duration::from_secs(6),
        keep_alive: Some(Duration::from_secs(1)),
        handshake: Duration::from_secs(3),
        ..LinkLimits::default()
    }
}

/// The client half of a shard's links to other shards.
///
/// # Errors
/// If TLS cannot be set up.
pub fn peer_config(
    identity: &LiveIdentity,
    bundle: &TrustBundle,
    limits: &LinkLimits,
) -> anyhow::Result<quinn::ClientConfig> {
    let verifier = MeshVerifier::of_servers(bundle.clone(), Role::Shard);
    let mut tls = client_config(Some(identity), Arc::new(verifier), &[ALPN_PEER])?;
    // A resumed session would show a certificate that has been renewed meanwhile; shards do not dial often.
    tls.resumption = rustls::client::Resumption::disabled();
    Ok(quic::client_config(tls, limits)?)
}

/// The key by which links of a shard that was killed know its successor's resets; made at the first start.
pub(crate) fn reset_key(dir: &IdentityDir) -> anyhow::Result<Vec<u8>> {
    const NOTE: &str = "reset.key";
    if let Some(key) = dir.read(NOTE)?.filter(|key| key.len() >= 32) {
        return Ok(key.into_bytes());
    }
    let key = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
    dir.write(NOTE, &key)?;
    Ok(key.into_bytes())
}
