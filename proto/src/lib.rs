//! The words of the mesh, as values: ids, messages, framing, targets, codes, identity, policy, backoff.
//!
//! This crate is pure. It has no socket, no file, no clock and no tokio: whatever it decides, it decides from its
//! arguments, and so every process of the mesh, and every test, decides alike. The wire itself is documented in
//! `proto/*.proto`; [`wire`] is what prost makes of that, and only [`message`] and [`stream`] turn it into the types
//! that the rest of the mesh uses.

pub mod api;
pub mod audit;
pub mod backoff;
pub mod book;
pub mod code;
pub mod connection_id;
pub mod datagram;
pub mod frame;
pub mod hostname;
pub mod id;
pub mod identity;
pub mod join;
pub mod message;
pub mod peer;
pub mod policy;
pub mod principal;
pub mod proxy;
pub mod ring;
pub mod secret;
pub mod ssh;
pub mod standing;
pub mod stream;
pub mod target;

/// The wire as prost generates it from `proto/*.proto`.
pub mod wire {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::use_self,
        clippy::doc_markdown,
        reason = "generated; documented in the .proto files"
    )]
    include!(concat!(env!("OUT_DIR"), "/causeway.v1.rs"));
}

/// The packets of kube-apiserver's gRPC egress, as prost generates them from `proto/egress.proto`.
pub mod egress {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::use_self,
        clippy::doc_markdown,
        reason = "generated; documented in the .proto file"
    )]
    include!(concat!(env!("OUT_DIR"), "/causeway.egress.rs"));
}

/// ALPN of a tunnel or of a person's tool, towards a shard.
pub const ALPN_MESH: &[u8] = b"causeway/1";
/// ALPN between shards, and between edges.
pub const ALPN_PEER: &[u8] = b"causeway-peer/1";
