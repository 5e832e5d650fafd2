//! Runs [`fuzz::edge_to_shard`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::edge_to_shard(data));
