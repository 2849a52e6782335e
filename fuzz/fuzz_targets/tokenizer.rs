//! libFuzzer on `undertone_fuzz::tokenizer`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::tokenizer(bytes);
});
