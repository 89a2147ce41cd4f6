//! The unpickler alone.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::import::pickle::read(bytes);
});
