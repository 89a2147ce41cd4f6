//! The device that tests run on: `IDDPM_TEST_DEVICE`, the processor by default.

use iddpm::config::Precision;
use iddpm::device::Device;

/// A new device, in f32: the processor, the CUDA kernels on the processor (feature `emulator`), or the first GPU.
pub fn device() -> Device {
    match std::env::var("IDDPM_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::cpu(0).unwrap(),
        Ok("emulated") => Device::emulated().unwrap().with_precision(Precision::F32),
        Ok("cuda") => Device::cuda(0).unwrap().with_precision(Precision::F32),
        Ok(other) => panic!("IDDPM_TEST_DEVICE={other}: cpu, emulated and cuda are known"),
    }
}
