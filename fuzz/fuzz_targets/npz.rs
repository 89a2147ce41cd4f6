//! Arrays of NumPy.
#![no_main]

use std::{io::Cursor, path::Path};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::npz::read_from(Path::new("fuzz.npz"), Cursor::new(bytes));
});
