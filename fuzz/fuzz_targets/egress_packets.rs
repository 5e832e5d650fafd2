//! Runs [`fuzz::egress_packets`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::egress_packets(data));
