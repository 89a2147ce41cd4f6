//! The driver: memory, kernel launches, events and graphs on one device, in two kinds.
//!
//! [`Driver::Cuda`] talks to the NVIDIA driver; `Driver::Emulated` runs the same `kernels/*.cu`, compiled as C++, on the
//! CPU. Everything above calls the same functions with the same grid and the same arguments, so that a launch that works
//! on one is the launch that runs on the other.
//!
//! Work goes to one stream in order. Errors name what was done and what can be done about it; nothing here panics where
//! there is no GPU, no driver or no memory. `IDDPM_SYNC=1` waits after each launch, so that a failed one is named.

/// Calls the same method on whichever kind `$driver` is.
macro_rules! each {
    ($driver:expr, $d:ident => $call:expr) => {
        match $driver {
            Driver::Cuda($d) => $call,
            #[cfg(feature = "emulator")]
            Driver::Emulated($d) => $call,
        }
    };
}

mod args;
mod cuda;
mod cuda_error;
mod cuda_modules;
mod cuda_objects;
mod cuda_staging;
mod cuda_stream;
#[cfg(feature = "emulator")]
mod emulated;
#[cfg(feature = "emulator")]
mod library;
mod objects;
#[cfg(feature = "emulator")]
mod schedule;
mod tensor_map;

use std::sync::Arc;

pub use args::{Arg, Packed};
pub use cuda::CudaDriver;
pub use cuda_error::{arch_list, cuda_present, driver_version, usable_gpus};
pub use cuda_objects::{CudaEvent, CudaGraph};
#[cfg(feature = "emulator")]
pub use emulated::{EmulatedDriver, EmulatedEvent, EmulatedGraph, Started};
pub use objects::{Buffer, Event, Graph, Pinned};
#[cfg(feature = "emulator")]
pub use schedule::{Copies, LaunchTraffic, Order, Schedule, Traffic};
pub use tensor_map::{Element, Swizzle, TensorMap, TensorMapMode, TensorMapSpec};

use crate::error::{Error, Result};

/// One `kernels/*.cu`, compiled.
pub(crate) struct Module {
    /// Name of the file without `.cu`.
    pub(crate) file: &'static str,
    /// The kernels in it; empty when the build made PTX only and nobody listed them.
    pub(crate) kernels: &'static [&'static str],
    /// The fatbin.
    pub(crate) image: &'static [u8],
}

/// What the compiler reported of one kernel on one architecture.
#[derive(Debug, Clone, Copy)]
pub struct Resources {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Architecture, such as `sm_90a`.
    pub arch: &'static str,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of registers spilled to local memory, per thread.
    pub spilled_bytes: u32,
}

#[cfg(feature = "emulator")]
use library::EmulatedKernel;
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Ptr(pub u64);

impl Ptr {
    /// No address; kernels take it as an absent optional array.
    pub const NULL: Ptr = Ptr(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Ptr {
        Ptr(self.0 + bytes as u64)
    }
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks that run together as a cluster (1: no clusters).
    pub cluster: u32,
    /// May start before the launch before it has ended; the kernel waits by itself (sm_90, `grid_wait` of `kernels/ptx.cuh`).
    pub overlap: bool,
}

impl Launch {
    /// `grid` blocks of `block` threads.
    pub fn new(grid: [u32; 3], block: [u32; 3]) -> Launch {
        Launch { grid, block, shared_bytes: 0, cluster: 1, overlap: false }
    }

    /// One thread for each of `n` items, in blocks of `block`.
    pub fn over(n: usize, block: u32) -> Launch {
        let blocks = n.div_ceil(block as usize);
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX); // refused by the launch: the grid is too large
        Launch::new([blocks, 1, 1], [block, 1, 1])
    }

    /// With `bytes` of dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Launch {
        Launch { shared_bytes: u32::try_from(bytes).unwrap_or(u32::MAX), ..self }
    }

    /// In clusters of `blocks` along x.
    pub fn cluster(self, blocks: u32) -> Launch {
        Launch { cluster: blocks, ..self }
    }

    /// Starting before the one before it has ended.
    pub fn overlapping(self) -> Launch {
        Launch { overlap: true, ..self }
    }
}

/// What a device is.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// Name as the vendor gives it.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub compute_capability: (i32, i32),
    /// CUDA version that the driver supports, such as 13000; 0 on the emulator.
    pub driver_version: i32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Size of the second-level cache.
    pub l2_bytes: usize,
    /// Dynamic shared memory that one block may have.
    pub max_shared_bytes: usize,
    /// Memory of the device.
    pub total_bytes: usize,
    /// Memory that allocations can have now.
    pub free_bytes: usize,
}

/// What the device reports of a loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionInfo {
    /// Registers per thread.
    pub registers: u32,
    /// Local memory per thread: spilled registers and indexed arrays.
    pub local_bytes: u32,
    /// Static shared memory per block.
    pub static_shared_bytes: u32,
    /// Dynamic shared memory that a launch may ask for now.
    pub max_dynamic_shared_bytes: u32,
    /// Largest block.
    pub max_threads: u32,
    /// Architecture of the machine code that was chosen, such as 90.
    pub binary_version: u32,
}

/// A device that runs kernels. Cheap to clone: clones share the device.
#[derive(Clone)]
pub enum Driver {
    /// An NVIDIA GPU.
    Cuda(Arc<CudaDriver>),
    /// The kernels as C++ on the CPU (feature `emulator`).
    #[cfg(feature = "emulator")]
    Emulated(Arc<EmulatedDriver>),
}

impl Driver {
    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Device`] when there is no driver, the driver is too old, there is no such GPU, or the binary has no kernels for it.
    pub fn cuda(ordinal: usize) -> Result<Driver> {
        Ok(Driver::Cuda(Arc::new(CudaDriver::open(ordinal)?)))
    }

    /// Opens the emulator.
    ///
    /// # Errors
    /// [`Error::Device`] when the build has no emulator.
    pub fn emulated() -> Result<Driver> {
        #[cfg(feature = "emulator")]
        return Ok(Driver::Emulated(Arc::new(EmulatedDriver::open()?)));
        #[cfg(not(feature = "emulator"))]
        Err(Error::Device(
            "this build has no emulator: build with --features emulator, or use --device cpu or cuda".into(),
        ))
    }

    /// The emulator behind this driver, for its schedule and its traffic meter.
    #[cfg(feature = "emulator")]
    pub fn emulator(&self) -> Option<&EmulatedDriver> {
        match self {
            Driver::Cuda(_) => None,
            Driver::Emulated(d) => Some(d),
        }
    }

    /// Is this the emulator?
    pub fn is_emulated(&self) -> bool {
        !matches!(self, Driver::Cuda(_))
    }

    /// What the device is, with its memory as of now.
    ///
    /// # Errors
    /// [`Error::Device`] when the device does not answer.
    pub fn info(&self) -> Result<DeviceInfo> {
        each!(self, d => d.info())
    }

    /// What the device reports of kernel `name`; `None` on the emulator, which has neither registers nor machine code.
    ///
    /// # Errors
    /// [`Error::Device`] when the kernel is not in this binary.
    pub fn function_info(&self, name: &str) -> Result<Option<FunctionInfo>> {
        each!(self, d => d.function_info(name))
    }

    /// Starts kernel `name`. `args` are the kernel's parameters in order; see [`args!`](crate::args).
    ///
    /// # Errors
    /// [`Error::Device`] when the kernel is not in this binary, the launch is refused, or an earlier one failed. On the
    /// emulator also what the checks found while it ran.
    pub fn launch(&self, name: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let packed = Packed::new(args);
        each!(self, d => d.launch(name, launch, packed))
    }

    /// Names the step of the plan that the next launches belong to; errors then begin with it.
    pub fn set_step(&self, step: &str) {
        each!(self, d => d.set_step(step));
    }

    /// Allocates `bytes`; the contents are undefined (NaN on the emulator).
    ///
    /// # Errors
    /// [`Error::Device`] with the need and what is free when there is not enough memory.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let ptr = each!(self, d => d.alloc(bytes))?;
        Ok(Buffer { ptr, bytes, driver: self.clone() })
    }

    /// Allocates `bytes` of zeros.
    ///
    /// # Errors
    /// As [`Driver::alloc`].
    pub fn alloc_zeroed(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.alloc(bytes)?;
        self.fill(buffer.ptr(), 0, bytes)?;
        Ok(buffer)
    }

    /// Allocates page-locked host memory of `bytes` zeros, for copies that overlap with the host's work.
    ///
    /// # Errors
    /// [`Error::Device`] when the host has not enough memory.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        let host = each!(self, d => d.alloc_host(bytes))?;
        Ok(Pinned { host, bytes, driver: self.clone() })
    }

    /// Copies `data` to the device; `data` may be reused on return.
    ///
    /// # Errors
    /// [`Error::Device`] when the range is not device memory or an earlier launch failed.
    pub fn write<T: bytemuck::NoUninit>(&self, dst: Ptr, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        each!(self, d => d.write(dst, bytes.as_ptr(), bytes.len()))
    }

    /// Starts copying `data` to the device. Do not change `data` before an event recorded after this call has passed.
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn write_pinned(&self, dst: Ptr, data: &Pinned) -> Result<()> {
        match self {
            Driver::Cuda(d) => d.write_pinned(dst, data.host, data.bytes),
            #[cfg(feature = "emulator")]
            Driver::Emulated(d) => d.write(dst, data.host, data.bytes),
        }
    }

    /// Waits for the stream and copies from the device.
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn read<T: bytemuck::NoUninit + bytemuck::AnyBitPattern>(&self, src: Ptr, out: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        each!(self, d => d.read(bytes.as_mut_ptr(), src, bytes.len()))?;
        self.sync()
    }

    /// Starts copying from the device. `out` holds the data once an event recorded after this call has passed.
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn read_pinned(&self, src: Ptr, out: &mut Pinned) -> Result<()> {
        each!(self, d => d.read(out.host, src, out.bytes))
    }

    /// Copies `bytes` within the device; the ranges must not overlap.
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn copy(&self, dst: Ptr, src: Ptr, bytes: usize) -> Result<()> {
        each!(self, d => d.copy(dst, src, bytes))
    }

    /// Sets `bytes` bytes to `value`.
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<()> {
        each!(self, d => d.fill(dst, value, bytes))
    }

    /// Waits until everything started so far has ended.
    ///
    /// # Errors
    /// [`Error::Device`] when any of it failed.
    pub fn sync(&self) -> Result<()> {
        each!(self, d => d.sync())
    }

    /// Marks this place in the stream.
    ///
    /// # Errors
    /// [`Error::Device`] when an earlier launch failed.
    pub fn record(&self) -> Result<Event> {
        each!(self, d => d.record())
    }

    /// Starts copying `data` to the device beside the work, once `after` has passed; the event passes when it is there.
    /// Do not change `data` before. Work that needs it is held back by [`Driver::wait_for`].
    ///
    /// # Errors
    /// As [`Driver::write`].
    pub fn write_aside(&self, dst: Ptr, data: &Pinned, after: Option<&Event>) -> Result<Event> {
        match self {
            Driver::Cuda(d) => d.write_aside(dst, data.host, data.bytes, after.and_then(Event::cuda)),
            #[cfg(feature = "emulator")]
            Driver::Emulated(d) => d.write(dst, data.host, data.bytes).and_then(|()| d.record()),
        }
    }

    /// Lets the work started from now on begin when `event` has passed; the host does not wait.
    ///
    /// # Errors
    /// [`Error::Device`] when an earlier launch failed.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        match (self, event.cuda()) {
            (Driver::Cuda(d), Some(event)) => d.wait_for(event),
            _ => Ok(()),
        }
    }

    /// Records what `work` starts, without running it, as a graph. Copies from and to the host do not belong in it, and
    /// memory must not be allocated or freed meanwhile. On a GPU `work` is called twice, first to load its kernels.
    ///
    /// # Errors
    /// What `work` returns, or [`Error::Device`] when the device refuses the graph.
    pub fn capture(&self, mut work: impl FnMut() -> Result<()>) -> Result<Graph> {
        match self {
            Driver::Cuda(d) => {
                d.begin_load();
                let loaded = work();
                d.end_load();
                loaded?;
            }
            #[cfg(feature = "emulator")]
            Driver::Emulated(_) => {}
        }
        each!(self, d => d.begin_capture())?;
        let done = work();
        let graph = match self {
            Driver::Cuda(d) => d.end_capture().map(Graph::Cuda),
            #[cfg(feature = "emulator")]
            Driver::Emulated(d) => d.end_capture().map(Graph::Emulated),
        };
        done?;
        graph
    }

    /// Starts a captured graph.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        match (self, graph) {
            (Driver::Cuda(d), Graph::Cuda(g)) => d.replay(g),
            #[cfg(feature = "emulator")]
            (Driver::Emulated(d), Graph::Emulated(g)) => d.replay(g),
            #[cfg(feature = "emulator")]
            _ => panic!("a graph captured on one kind of driver cannot run on the other"),
        }
    }

    /// Describes a tensor to the bulk-copy engine of Hopper and later.
    ///
    /// # Errors
    /// [`Error::Device`] when the description breaks a rule of the hardware.
    pub fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        spec.check()?;
        each!(self, d => d.tensor_map(spec))
    }
}

/// The message when memory runs out: what was needed, what there is, and the way out.
fn out_of_memory(need: usize, free: usize, total: usize) -> Error {
    let mib = |b: usize| b as f64 / (1 << 20) as f64;
    Error::Device(format!(
        "out of device memory: {:.1} MiB needed, {:.1} of {:.1} MiB free; use a smaller --batch-size or --microbatch, or free \
         the device (nvidia-smi lists who uses it)",
        mib(need),
        mib(free),
        mib(total)
    ))
}

/// Is `IDDPM_SYNC=1` set?
fn sync_wanted() -> bool {
    std::env::var_os("IDDPM_SYNC").is_some_and(|v| v == "1")
}
