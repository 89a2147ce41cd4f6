//! One clear message, and no panic, where there is no driver, no emulator or no kernel.

use iddpm::device::driver::{Driver, cuda_present};

#[test]
fn without_a_driver_the_message_says_what_to_install() {
    if cuda_present() {
        println!("skipped without_a_driver_the_message_says_what_to_install: this machine has a driver");
        return;
    }
    let text = Driver::cuda(0).err().expect("no driver").to_string();
    assert!(text.contains("--device cpu"), "{text}");
    assert!(text.contains("libcuda") || text.contains("setup-cuda.sh"), "{text}");
    let mut report = Vec::new();
    iddpm::cli::doctor::run(&mut report).unwrap();
    let report = String::from_utf8(report).unwrap();
    assert!(report.contains("libcuda") && report.contains("CPU"), "{report}");
}

#[cfg(not(feature = "emulator"))]
#[test]
fn without_the_feature_the_message_says_how_to_build_it() {
    let text = Driver::emulated().err().expect("no emulator").to_string();
    assert!(text.contains("--features emulator"), "{text}");
}
