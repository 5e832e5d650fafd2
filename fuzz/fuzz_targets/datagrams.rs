//! Runs [`fuzz::datagrams`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::datagrams(data));
