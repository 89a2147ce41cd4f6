//! The device that tests run on: `IDDPM_TEST_DEVICE`, the processor by default.

use iddpm::device::Device;

/// A new device.
pub fn device() -> Device {
    match std::env::var("IDDPM_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::cpu(0).unwrap(),
        Ok(other) => panic!("IDDPM_TEST_DEVICE={other}: this build knows cpu"),
    }
}
