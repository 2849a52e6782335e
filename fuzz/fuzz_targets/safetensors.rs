//! libFuzzer on `undertone_fuzz::safetensors`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::safetensors(bytes);
});
