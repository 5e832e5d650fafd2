//! Runs [`fuzz::ssh_certificate`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::ssh_certificate(data));
