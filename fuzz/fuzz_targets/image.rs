//! One picture: PNG, JPEG or GIF.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::data::decode::decode(bytes);
});
