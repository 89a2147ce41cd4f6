//! What CUDA says when it cannot: whether there is a driver at all, and each error with the way out.

use std::sync::OnceLock;

use cudarc::driver::result::DriverError;
use cudarc::driver::{CudaContext, sys};

use super::{ARCHS, MODULES};
use crate::error::{Error, Result};

/// CUDA version whose fatbins this binary holds: older drivers cannot read them.
pub(super) const NEEDED_DRIVER: i32 = 13000;

/// Is there a `libcuda` to open?
pub fn cuda_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opening the library runs its constructors, which NVIDIA's may.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// CUDA version that the installed driver supports, such as 13000.
///
/// # Errors
/// [`Error::Device`] when there is no driver.
pub fn driver_version() -> Result<i32> {
    if !cuda_present() {
        return Err(Error::Device(
            "no NVIDIA driver: libcuda was not found on this machine; install the driver (580 or newer), or use \
             --device cpu"
                .into(),
        ));
    }
    let mut version = 0;
    // SAFETY: the library is there, and the function fills one integer.
    unsafe { sys::cuDriverGetVersion(&mut version).result() }.map_err(|e| plain("asking the driver's version", e))?;
    Ok(version)
}

/// GPUs that this binary has kernels for and whose driver is new enough, as far as can be told without opening one.
pub fn usable_gpus() -> usize {
    let ready = !MODULES.is_empty() && cuda_present() && driver_version().is_ok_and(|v| v >= NEEDED_DRIVER);
    if ready { CudaContext::device_count().map_or(0, |n| n.max(0) as usize) } else { 0 }
}

/// The architectures in this binary, in words.
pub fn arch_list() -> String {
    if ARCHS.is_empty() {
        return "no architecture".into();
    }
    let name = |a: &&str| a.strip_prefix('+').map_or_else(|| format!("sm_{a}"), |p| format!("PTX of compute_{p}"));
    ARCHS.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Errors after which nothing in this process reaches the GPU any more.
pub(super) fn is_sticky(code: sys::CUresult) -> bool {
    use sys::CUresult as R;
    matches!(
        code,
        R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
    )
}

/// Name and text of a CUDA error, and what helps. Only called when the library is there.
pub(super) fn describe(error: DriverError) -> String {
    use sys::CUresult as R;
    let text = |t: std::result::Result<&std::ffi::CStr, DriverError>| {
        t.map_or_else(|_| format!("CUDA error {}", error.0 as u32), |c| c.to_string_lossy().into_owned())
    };
    let (name, words) = (text(error.error_name()), text(error.error_string()));
    let help = match error.0 {
        R::CUDA_ERROR_NO_DEVICE => " (no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu)",
        R::CUDA_ERROR_OUT_OF_MEMORY => " (use a smaller --batch-size or --microbatch)",
        R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | R::CUDA_ERROR_INVALID_IMAGE => {
            " (update the NVIDIA driver to 580 or newer)"
        }
        R::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => " (the block needs more registers or shared memory than this GPU has)",
        R::CUDA_ERROR_ECC_UNCORRECTABLE => " (the GPU's memory is faulty: reset or replace it)",
        R::CUDA_ERROR_DEVICE_UNAVAILABLE => " (another process holds the GPU exclusively: see nvidia-smi)",
        code if is_sticky(code) => " (the process has lost the GPU: end it and resume from the last checkpoint)",
        _ => "",
    };
    format!("{name}, {words}{help}")
}

/// An error before there is a driver to remember it.
pub(super) fn plain(what: &str, error: DriverError) -> Error {
    Error::Device(format!("{what}: {}", describe(error)))
}
