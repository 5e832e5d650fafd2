//! The doors of a shard, with real sockets: a shard without control, an edge that does what an edge must, and services
//! that say and do exactly what a test wants.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run beside each other and stop where it is wrong"
)]

mod carrier;
mod dns;
mod egress;
mod egress_grpc;
mod egress_silence;
mod http;
mod http2;
mod https;
mod identity;
mod mesh;
mod proxy;
mod smuggling;
mod socks;
mod ssh;
mod tcp;
mod udp;
