//! A file of tensors: zip archive, plain stream or safetensors.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::import::tensor_file::parse(bytes);
});
