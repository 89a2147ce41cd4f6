//! The directory of a zip archive.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(entries) = iddpm::import::zip::entries(bytes) {
        entries.values().for_each(|e| _ = iddpm::import::zip::intact(bytes, e));
    }
});
