//! Every parser of ours that meets bytes from outside, as a function that takes any bytes.
//!
//! A function here never fails on wrong input; it panics when one of our own promises is broken: a parser that panics,
//! something accepted that does not print and parse again alike, or more kept in memory than the cap allows. libFuzzer
//! runs them (`fuzz_targets/`), and `tests/replay.rs` replays what it has found (`corpus/`) in every test run.

mod api;
mod certificate;
mod door;
mod egress;
mod ssh;
mod text;
mod wire;

pub use api::{api, ring, rule};
pub use certificate::{certificate, client_hello, csr, pem};
pub use door::{authorization, http_screen, socks5, socks5_datagram};
pub use egress::{book, egress_head, egress_packets};
pub use ssh::{ssh_certificate, ssh_key};
pub use text::{config, host_port, hostname, identity, join_line, names, target};
pub use wire::{answer, connection_id, datagrams, edge_to_shard, frames, open, shard_to_edge, shard_to_shard};

/// A parser by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them; each has a program `fuzz_targets/NAME.rs` and a folder `corpus/NAME`.
pub const TARGETS: &[Target] = &[
    ("answer", answer),
    ("api", api),
    ("authorization", authorization),
    ("book", book),
    ("certificate", certificate),
    ("client_hello", client_hello),
    ("config", config),
    ("connection_id", connection_id),
    ("csr", csr),
    ("datagrams", datagrams),
    ("edge_to_shard", edge_to_shard),
    ("egress_head", egress_head),
    ("egress_packets", egress_packets),
    ("frames", frames),
    ("host_port", host_port),
    ("hostname", hostname),
    ("http_screen", http_screen),
    ("identity", identity),
    ("join_line", join_line),
    ("names", names),
    ("open", open),
    ("pem", pem),
    ("ring", ring),
    ("rule", rule),
    ("shard_to_edge", shard_to_edge),
    ("shard_to_shard", shard_to_shard),
    ("socks5", socks5),
    ("socks5_datagram", socks5_datagram),
    ("ssh_certificate", ssh_certificate),
    ("ssh_key", ssh_key),
    ("target", target),
];
