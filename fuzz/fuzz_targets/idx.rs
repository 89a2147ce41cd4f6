//! Images and labels in MNIST's format.
#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::data::idx::images(Path::new("fuzz"), bytes);
    let _ = iddpm::data::idx::labels(Path::new("fuzz"), bytes);
});
