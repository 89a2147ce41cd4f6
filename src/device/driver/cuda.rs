//! The real driver: CUDA's driver API, opened at run time through cudarc.
//!
//! Only `libcuda` is needed, and only when a GPU is asked for. cudarc panics where that library is absent, so
//! [`super::cuda_present`] is asked first, once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaStream, sys};
use sys::CUdevice_attribute as DeviceAttribute;

use super::cuda_error::{NEEDED_DRIVER, describe, driver_version, is_sticky, plain};
use super::cuda_modules::Gpu;
use super::cuda_staging::Staging;
use super::{DeviceInfo, Launch, MODULES, Packed, Ptr};
use crate::error::{Error, Result};

/// Memory that is left for loaded kernels, graphs and the rounding of allocations, which no plan counts.
const RESERVE: usize = 128 << 20;

/// What changes while the driver is used.
pub(super) struct State {
    step: String,
    pub(super) mode: Mode,
    /// The first error after which the context is lost.
    lost: Option<String>,
}

/// What becomes of launches, copies and fills.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// They are started.
    Run,
    /// Kernels are loaded, nothing is started: a module must not be loaded while a graph is captured.
    Load,
    /// They are recorded.
    Capture,
}

/// What [`super::Driver::Cuda`] holds.
pub struct CudaDriver {
    pub(super) gpu: Arc<Gpu>,
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    /// Copies beside the work.
    pub(super) copies: Arc<CudaStream>,
    state: Mutex<State>,
    pub(super) staging: Mutex<Staging>,
    pub(super) sync_each: bool,
}

// SAFETY: the handles may be used from any thread once the context is bound to it, which every call does first.
unsafe impl Send for CudaDriver {}
// SAFETY: as above; what changes is behind a mutex, and the driver API locks its own.
unsafe impl Sync for CudaDriver {}

impl CudaDriver {
    pub(super) fn open(ordinal: usize) -> Result<CudaDriver> {
        let fail = |what: String| Err(Error::Device(what));
        if MODULES.is_empty() {
            return fail(
                "this binary was built without nvcc and holds no CUDA kernels: run scripts/setup-cuda.sh, build again, \
                 or use --device cpu"
                    .into(),
            );
        }
        let version = driver_version()?;
        if version < NEEDED_DRIVER {
            return fail(format!(
                "the NVIDIA driver supports CUDA {}.{}, this binary needs 13.0: update the driver to 580 or newer, or use \
                 --device cpu",
                version / 1000,
                version % 1000 / 10
            ));
        }
        let count = CudaContext::device_count().map_err(|e| plain("listing the GPUs", e))?;
        if ordinal >= count.max(0) as usize {
            return fail(format!(
                "GPU {ordinal} does not exist: this machine has {count} (counting from 0; CUDA_VISIBLE_DEVICES \
                 hides others); name another, or use --device cpu"
            ));
        }
        let gpu = Gpu::open(ordinal)?;
        let context = gpu.context.clone();
        let stream = context.new_stream().map_err(|e| plain("making a stream", e))?;
        let copies = context.new_stream().map_err(|e| plain("making a stream for copies", e))?;
        let state = State { step: String::new(), mode: Mode::Run, lost: None };
        let (state, staging) = (Mutex::new(state), Mutex::new(Staging::EMPTY));
        Ok(CudaDriver { gpu, context, stream, copies, state, staging, sync_each: super::sync_wanted() })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context current on this thread: the first half of every call.
    pub(super) fn bind(&self, what: &str) -> Result<()> {
        self.check(what, self.context.bind_to_thread())
    }

    /// Turns a CUDA error into what was done, what went wrong and the way out.
    pub(super) fn check<T>(&self, what: &str, answer: std::result::Result<T, DriverError>) -> Result<T> {
        let error = match answer {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let mut state = self.state();
        let at = if state.step.is_empty() { String::new() } else { format!("{}: ", state.step) };
        let mut text = format!("{at}{what}: {}", describe(error));
        if let Some(first) = &state.lost {
            text += &format!("; the GPU was lost earlier, at: {first}");
        } else if is_sticky(error.0) {
            state.lost = Some(format!("{at}{what}"));
            text += "; the error may stem from any launch before it: run again with IDDPM_SYNC=1 to name the step";
        }
        Err(Error::Device(text))
    }

    pub(super) fn set_step(&self, step: &str) {
        self.state().step = step.into();
    }

    pub(super) fn info(&self) -> Result<DeviceInfo> {
        self.bind("asking the GPU")?;
        let attribute = |a| self.check("asking the GPU's attributes", self.context.attribute(a));
        let (free_bytes, total_bytes) = self.check("asking the GPU's memory", result::mem_get_info())?;
        Ok(DeviceInfo {
            name: self.check("asking the GPU's name", self.context.name())?,
            compute_capability: self.gpu.compute_capability,
            driver_version: driver_version()?,
            multiprocessors: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            l2_bytes: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            max_shared_bytes: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            total_bytes,
            free_bytes: free_bytes.saturating_sub(RESERVE),
        })
    }

    // ---- kernels ----

    pub(super) fn launch(&self, name: &str, launch: Launch, mut args: Packed) -> Result<()> {
        self.bind(name)?;
        let function = self.function(name)?;
        self.allow_shared(name, launch.shared_bytes)?;
        let mode = self.state().mode;
        if mode == Mode::Load {
            return Ok(());
        }
        let mut pointers = args.pointers();
        let mut attributes = Vec::with_capacity(2);
        attributes.extend((launch.cluster > 1).then(|| cluster_attribute(launch.cluster)));
        attributes.extend(launch.overlap.then(overlap_attribute));
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the function is loaded, and `pointers` holds one live value for each of its parameters, which the driver copies
        // before it returns; the emulator checks the same argument list against the kernel's signature.
        let started = unsafe {
            sys::cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), std::ptr::null_mut()).result()
        };
        let what = || {
            let ([x, y, z], [a, b, c]) = (launch.grid, launch.block);
            format!("{name} <<<({x},{y},{z}), ({a},{b},{c}), {} bytes>>>", launch.shared_bytes)
        };
        if started.is_err() {
            self.check(&what(), started)?;
        }
        if self.sync_each && mode == Mode::Run {
            self.check(&what(), self.stream.synchronize())?;
        }
        Ok(())
    }

    // ---- memory ----

    pub(super) fn alloc(&self, bytes: usize) -> Result<Ptr> {
        self.bind("allocating")?;
        // SAFETY: any size is allowed; 0 is not, so one byte stands for it.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = self.check("asking the GPU's memory", result::mem_get_info())?;
                Err(super::out_of_memory(bytes, free, total))
            }
            answer => self.check(&format!("allocating {bytes} bytes"), answer).map(Ptr),
        }
    }

    pub(super) fn free(&self, ptr: Ptr) {
        // SAFETY: `ptr` came from alloc and is freed once. An error here belongs to an earlier launch, and the next call reports it.
        let _ = self.context.bind_to_thread().and_then(|()| unsafe { result::free_sync(ptr.0) });
    }

    pub(super) fn alloc_host(&self, bytes: usize) -> Result<*mut u8> {
        self.bind("allocating pinned memory")?;
        // SAFETY: flags 0: cached, so that the host may read it as well.
        let host = unsafe { result::malloc_host(bytes.max(1), 0) };
        let host: *mut u8 = self.check(&format!("allocating {bytes} bytes of pinned host memory"), host)?.cast();
        // SAFETY: the driver returned that many bytes.
        unsafe { host.write_bytes(0, bytes) };
        Ok(host)
    }

    pub(super) fn free_host(&self, host: *mut u8, _bytes: usize) {
        // A copy may still be under way. Errors as in free.
        let _ = self.context.bind_to_thread().and_then(|()| self.copies.synchronize());
        let _ = self.stream.synchronize();
        // SAFETY: `host` came from alloc_host and is freed once.
        let _ = self.context.bind_to_thread().and_then(|()| unsafe { result::free_host(host.cast()) });
    }

    pub(super) fn refuse_in_capture(&self, what: &str) -> Result<()> {
        if self.state().mode == Mode::Run {
            return Ok(());
        }
        Err(Error::Device(format!("{what} the host does not belong in a captured graph: do it before or after")))
    }

    /// Starts copying `bytes` bytes from `src`, which is page-locked and does not change before they are there.
    pub(super) fn write_pinned(&self, dst: Ptr, src: *const u8, bytes: usize) -> Result<()> {
        self.refuse_in_capture("a copy from")?;
        self.bind("copying to the GPU")?;
        self.start_write(dst, src, bytes)
    }

    pub(super) fn start_write(&self, dst: Ptr, src: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: `src` holds `bytes` bytes, and the callers keep them until they are copied.
        let done = unsafe {
            let data = std::slice::from_raw_parts(src, bytes);
            result::memcpy_htod_async(dst.0, data, self.stream.cu_stream())
        };
        self.check(&format!("copying {bytes} bytes to the GPU"), done)
    }

    pub(super) fn read(&self, dst: *mut u8, src: Ptr, bytes: usize) -> Result<()> {
        self.refuse_in_capture("a copy to")?;
        self.bind("copying from the GPU")?;
        // SAFETY: `dst` holds `bytes` bytes, and the caller waits before it looks at them.
        let done = unsafe {
            let data = std::slice::from_raw_parts_mut(dst, bytes);
            result::memcpy_dtoh_async(data, src.0, self.stream.cu_stream())
        };
        self.check(&format!("copying {bytes} bytes from the GPU"), done)
    }

    pub(super) fn copy(&self, dst: Ptr, src: Ptr, bytes: usize) -> Result<()> {
        if self.state().mode == Mode::Load {
            return Ok(());
        }
        self.bind("copying on the GPU")?;
        // SAFETY: the driver checks both ranges against its allocations.
        let done = unsafe { result::memcpy_dtod_async(dst.0, src.0, bytes, self.stream.cu_stream()) };
        self.check(&format!("copying {bytes} bytes on the GPU"), done)
    }

    pub(super) fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<()> {
        if self.state().mode == Mode::Load {
            return Ok(());
        }
        self.bind("filling")?;
        // SAFETY: the driver checks the range against its allocations.
        let done = unsafe { result::memset_d8_async(dst.0, value, bytes, self.stream.cu_stream()) };
        self.check(&format!("filling {bytes} bytes on the GPU"), done)
    }
}

fn overlap_attribute() -> sys::CUlaunchAttribute {
    use sys::{CUlaunchAttributeID as Id, CUlaunchAttributeValue as Value};
    let value = Value { programmaticStreamSerializationAllowed: 1 };
    sys::CUlaunchAttribute { id: Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, pad: [0; 4], value }
}

fn cluster_attribute(blocks: u32) -> sys::CUlaunchAttribute {
    use sys::{CUlaunchAttributeID as Id, CUlaunchAttributeValue as Value};
    let dim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    let id = Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    sys::CUlaunchAttribute { id, pad: [0; 4], value: Value { clusterDim: dim } }
}
