//! The device that tests run on: `IDDPM_TEST_DEVICE`, the processor by default.

use iddpm::device::Device;

/// A new device: the processor, the CUDA kernels on the processor (feature `emulator`), or the first GPU.
pub fn device() -> Device {
    match std::env::var("IDDPM_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::cpu(0).unwrap(),
        Ok("emulated") => Device::emulated().unwrap(),
        Ok("cuda") => Device::cuda(0).unwrap(),
        Ok(other) => panic!("IDDPM_TEST_DEVICE={other}: cpu, emulated and cuda are known"),
    }
}
