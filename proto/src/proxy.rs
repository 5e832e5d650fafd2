//! What programs say to a proxy: SOCKS5 and CONNECT, as bytes, and where the names in them lead. The doors of shards and
//! of edges read the same.

pub mod connect;
pub mod destination;
pub mod socks;
