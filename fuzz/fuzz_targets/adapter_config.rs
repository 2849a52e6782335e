//! libFuzzer on `undertone_fuzz::adapter_config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::adapter_config(bytes);
});
