//! Runs [`fuzz::join_line`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::join_line(data));
