//! libFuzzer on `undertone_fuzz::dataset`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::dataset(bytes);
});
