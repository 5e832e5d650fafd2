//! Runs [`fuzz::ssh_key`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::ssh_key(data));
