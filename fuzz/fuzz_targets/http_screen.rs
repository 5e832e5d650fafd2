//! Runs [`fuzz::http_screen`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::http_screen(data));
