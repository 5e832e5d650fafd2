//! Runs [`fuzz::socks5_datagram`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::socks5_datagram(data));
