//! The device that tests run on: `IDDPM_TEST_DEVICE`, the processor by default; tests of kernels take the emulator by default.

use iddpm::config::Precision;
use iddpm::device::Device;
#[cfg(feature = "emulator")]
use iddpm::device::driver::Driver;

/// A new device, in f32: the processor, the CUDA kernels on the processor (feature `emulator`), or the first GPU.
pub fn device() -> Device {
    match std::env::var("IDDPM_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::cpu(0).unwrap(),
        Ok("emulated") => Device::emulated().unwrap().with_precision(Precision::F32),
        Ok("cuda") => Device::cuda(0).unwrap().with_precision(Precision::F32),
        Ok(other) => panic!("IDDPM_TEST_DEVICE={other}: cpu, emulated and cuda are known"),
    }
}

/// Whether `IDDPM_TEST_DEVICE=cuda` asks for a GPU.
#[cfg(feature = "emulator")]
pub fn on_a_gpu() -> bool {
    std::env::var("IDDPM_TEST_DEVICE").is_ok_and(|d| d == "cuda")
}

/// The driver whose kernels are tested: the first GPU's if one is asked for, else the emulator.
#[cfg(feature = "emulator")]
pub fn driver() -> Driver {
    if on_a_gpu() { Driver::cuda(0).unwrap() } else { Driver::emulated().unwrap() }
}

/// A device over that driver, in bf16.
#[cfg(feature = "emulator")]
pub fn gpu() -> Device {
    if on_a_gpu() { Device::cuda(0).unwrap() } else { Device::emulated().unwrap() }
}
