//! libFuzzer on `undertone_fuzz::chat_template`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    undertone_fuzz::chat_template(bytes);
});
