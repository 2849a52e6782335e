//! libFuzzer on `undertone_fuzz::experiment`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::experiment(bytes);
});
