//! Runs [`fuzz::socks5`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::socks5(data));
