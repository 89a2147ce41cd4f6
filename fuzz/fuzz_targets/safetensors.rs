//! A checkpoint: its header, its configuration and the list of tensors that follows from it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = iddpm::import::tensor_file::parse(bytes);
    if let Ok(progress) = iddpm::checkpoint::parse(bytes) {
        let _ = iddpm::unet::Params::new(&progress.config.model);
    }
});
