//! libFuzzer on `undertone_fuzz::config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::config(bytes);
});
