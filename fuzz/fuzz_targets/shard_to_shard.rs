//! Runs [`fuzz::shard_to_shard`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::shard_to_shard(data));
