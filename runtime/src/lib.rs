//! How every process of the mesh behaves: configuration, telemetry, the admin server, shutdown, identity, TLS, links
//! and the moving of bytes.
//!
//! Nothing here knows what an edge, a shard or control *does*; it knows what they have in common. quinn's names end in
//! [`link`], rustls' in [`tls`], x509's in [`cert`].

pub mod access;
pub mod admin;
pub mod api;
pub mod audit;
pub mod cert;
pub mod clock;
pub mod config;
pub mod flow;
pub mod frames;
pub mod identity;
pub mod link;
pub mod open;
pub mod shutdown;
pub mod speak;
pub mod splice;
pub mod telemetry;
pub mod tls;
