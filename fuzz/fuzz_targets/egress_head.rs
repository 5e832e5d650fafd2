//! Runs [`fuzz::egress_head`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::egress_head(data));
