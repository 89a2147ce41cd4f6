//! The C++ side of the emulator: `kernels/emu/launch.cpp`, `memory.cpp` and `hopper.cpp` as foreign functions.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};

use super::args::Shape;
use super::schedule::{Schedule, Traffic};
use super::{Launch, Packed, Ptr, TensorMap, TensorMapMode, TensorMapSpec};
use crate::error::{Error, Result};

/// `emu::Kernel`: what the C++ side tells of a kernel.
#[repr(C)]
pub struct EmulatedKernel {
    name: *const c_char,
    call: *const c_void,
    params: *const Param,
    param_count: u32,
    max_threads: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Param {
    size: u32,
    kind: u8,
}

/// `EmuLaunch`.
#[repr(C)]
struct RawLaunch {
    kernel: *const EmulatedKernel,
    args: *const *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    cluster: u32,
    order: i32,
    copies: i32,
    seed: u64,
    workers: u32,
    metered: u32,
}

type LaunchFn = unsafe extern "C" fn(*const RawLaunch, *mut Traffic, *mut c_char, usize) -> c_int;
type AllocFn = unsafe extern "C" fn(usize) -> *mut c_void;
type FreeFn = unsafe extern "C" fn(*mut c_void) -> c_int;
type CheckFn = unsafe extern "C" fn(*const c_void, usize, *const c_char, *mut c_char, usize) -> c_int;
type MapFn = unsafe extern "C" fn(*mut c_void, *const RawMap) -> c_int;

/// `EmuTensorMap`: a [`TensorMapSpec`] in C.
#[repr(C)]
struct RawMap {
    address: u64,
    dims: [u64; 5],
    strides: [u64; 4],
    sizes: [u32; 5],
    element_strides: [u32; 5],
    rank: u32,
    element_bytes: u32,
    swizzle: u32,
    im2col: u32,
    lower: [i32; 2],
    upper: [i32; 2],
    channels: u32,
    pixels: u32,
}

unsafe extern "C" {
    fn emu_launch(launch: *const RawLaunch, traffic: *mut Traffic, error: *mut c_char, bytes: usize) -> c_int;
    fn emu_alloc(bytes: usize) -> *mut c_void;
    fn emu_free(p: *mut c_void) -> c_int;
    fn emu_check_range(p: *const c_void, n: usize, what: *const c_char, error: *mut c_char, bytes: usize) -> c_int;
    fn emu_tensor_map(map: *mut c_void, spec: *const RawMap) -> c_int;
}

/// The C++ side: linked into the program, or, for a build under a sanitizer, the library named by `IDDPM_EMULATOR_LIB`.
pub(super) struct Library {
    launch: LaunchFn,
    alloc: AllocFn,
    free: FreeFn,
    check: CheckFn,
    tensor_map: MapFn,
    kernels: HashMap<&'static str, *const EmulatedKernel>,
}

impl Library {
    pub(super) fn linked() -> Library {
        Library {
            launch: emu_launch,
            alloc: emu_alloc,
            free: emu_free,
            check: emu_check_range,
            tensor_map: emu_tensor_map,
            kernels: super::emulated_kernels().into_iter().collect(),
        }
    }

    /// Opens a shared library with the same functions (`scripts/sanitize.sh` builds such ones).
    pub(super) fn load(path: &std::ffi::OsStr) -> Result<Library> {
        use std::os::unix::ffi::OsStrExt;
        let fail = |what: &str| Error::Device(format!("IDDPM_EMULATOR_LIB={}: {what}", path.display()));
        let name = CString::new(path.as_bytes()).map_err(|_| fail("the path holds a zero byte"))?;
        // SAFETY: `name` is a C string; the library's constructors are ours or the sanitizer's.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror returns null or a C string that lives until the next dl call of this thread.
            let why = unsafe { libc::dlerror() };
            if why.is_null() {
                return Err(fail("cannot be opened"));
            }
            // SAFETY: not null, see above.
            return Err(fail(&unsafe { CStr::from_ptr(why) }.to_string_lossy()));
        }
        let symbol = |name: &str| -> Result<*mut c_void> {
            let c = CString::new(name).map_err(|_| fail(name))?;
            // SAFETY: `handle` came from dlopen and is never closed.
            let p = unsafe { libc::dlsym(handle, c.as_ptr()) };
            if p.is_null() { Err(fail(&format!("has no {name}"))) } else { Ok(p) }
        };
        let mut kernels = HashMap::new();
        for (name, _) in super::emulated_kernels() {
            kernels.insert(name, symbol(&format!("emu_kernel_{name}"))?.cast_const().cast::<EmulatedKernel>());
        }
        // SAFETY: the library is built from the same sources, so these symbols have these types.
        unsafe {
            Ok(Library {
                launch: std::mem::transmute::<*mut c_void, LaunchFn>(symbol("emu_launch")?),
                alloc: std::mem::transmute::<*mut c_void, AllocFn>(symbol("emu_alloc")?),
                free: std::mem::transmute::<*mut c_void, FreeFn>(symbol("emu_free")?),
                check: std::mem::transmute::<*mut c_void, CheckFn>(symbol("emu_check_range")?),
                tensor_map: std::mem::transmute::<*mut c_void, MapFn>(symbol("emu_tensor_map")?),
                kernels,
            })
        }
    }

    /// Names of all kernels, sorted.
    pub(super) fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.kernels.keys().copied().collect();
        names.sort_unstable();
        names
    }

    /// The descriptor of kernel `name`.
    pub(super) fn kernel(&self, name: &str) -> Result<*const EmulatedKernel> {
        let found = self.kernels.get(name).copied();
        found.ok_or_else(|| Error::Device(format!("kernel {name:?} is not in this binary")))
    }

    /// Compares the arguments with the kernel's parameters, which C++ would read as whatever bytes are there.
    pub(super) fn check_args(&self, name: &str, args: &[Shape]) -> Result<()> {
        // SAFETY: the descriptor and its parameter list are constants of the program or of the loaded library.
        let params = unsafe {
            let kernel = &*self.kernel(name)?;
            std::slice::from_raw_parts(kernel.params, kernel.param_count as usize)
        };
        if params.len() != args.len() {
            return Err(Error::Device(format!("{name}: {} arguments for {} parameters", args.len(), params.len())));
        }
        let text = |size: u32, kind: u8| match kind {
            b'p' => "a pointer".to_string(),
            b'i' => format!("an integer of {size} bytes"),
            b'f' => format!("a float of {size} bytes"),
            _ => format!("a struct of {size} bytes"),
        };
        for (i, (p, a)) in params.iter().zip(args).enumerate() {
            if (p.size, p.kind) != (a.size, a.kind) {
                return Err(Error::Device(format!(
                    "{name}: argument {i} is {}, the kernel takes {}",
                    text(a.size, a.kind),
                    text(p.size, p.kind)
                )));
            }
        }
        Ok(())
    }

    /// Runs a kernel to its end; `args` have passed [`Library::check_args`].
    pub(super) fn launch(
        &self,
        name: &str,
        launch: Launch,
        args: &mut Packed,
        schedule: Schedule,
        metered: bool,
    ) -> Result<Traffic> {
        let pointers = args.pointers();
        let raw = RawLaunch {
            kernel: self.kernel(name)?,
            args: pointers.as_ptr(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            cluster: launch.cluster,
            order: schedule.order as i32,
            copies: schedule.copies as i32,
            seed: schedule.seed,
            workers: schedule.workers,
            metered: u32::from(metered),
        };
        let (mut traffic, mut error) = (Traffic::default(), [0; 2048]);
        // SAFETY: the arguments match the kernel's parameters, and the buffers outlive the call.
        let rc = unsafe { (self.launch)(&raw, &mut traffic, error.as_mut_ptr(), error.len()) };
        if rc == 0 { Ok(traffic) } else { Err(Error::Device(text_of(&error))) }
    }

    /// Allocates device memory; `None` when the reserved addresses are used up.
    pub(super) fn alloc(&self, bytes: usize) -> Option<Ptr> {
        // SAFETY: any size is allowed.
        let p = unsafe { (self.alloc)(bytes) } as u64;
        (p != 0).then_some(Ptr(p))
    }

    /// Frees what `alloc` returned; false when it is not a live allocation.
    pub(super) fn free(&self, ptr: Ptr) -> bool {
        // SAFETY: the function looks the address up and refuses a foreign one.
        unsafe { (self.free)(ptr.0 as *mut c_void) == 0 }
    }

    /// Is `[ptr, ptr + bytes)` inside one live allocation? `what` names the access in the error.
    pub(super) fn check_range(&self, what: &str, ptr: Ptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let what = CString::new(what).unwrap_or_default();
        let mut error = [0; 256];
        // SAFETY: the function only looks the range up and fills the buffer it is given.
        let rc = unsafe { (self.check)(ptr.0 as *const c_void, bytes, what.as_ptr(), error.as_mut_ptr(), error.len()) };
        if rc == 0 { Ok(()) } else { Err(Error::Device(text_of(&error))) }
    }

    /// Encodes a checked description.
    pub(super) fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let mut raw = RawMap {
            address: spec.address.0,
            dims: [1; 5],
            strides: [0; 4],
            sizes: [1; 5],
            element_strides: [1; 5],
            rank: spec.dims.len() as u32,
            element_bytes: spec.element.bytes() as u32,
            swizzle: spec.swizzle as u32,
            im2col: 0,
            lower: [0; 2],
            upper: [0; 2],
            channels: 0,
            pixels: 0,
        };
        raw.dims[..spec.dims.len()].copy_from_slice(&spec.dims);
        raw.strides[..spec.strides_bytes.len()].copy_from_slice(&spec.strides_bytes);
        raw.element_strides[..spec.element_strides.len()].copy_from_slice(&spec.element_strides);
        match &spec.mode {
            TensorMapMode::Tile { sizes } => raw.sizes[..sizes.len()].copy_from_slice(sizes),
            TensorMapMode::Im2col { lower, upper, channels, pixels } => {
                (raw.im2col, raw.lower, raw.upper) = (1, *lower, *upper);
                (raw.channels, raw.pixels) = (*channels, *pixels);
            }
        }
        let mut map = TensorMap([0; 128]);
        // SAFETY: the map has the 128 bytes that the function fills.
        let rc = unsafe { (self.tensor_map)(map.0.as_mut_ptr().cast(), &raw) };
        if rc == 0 { Ok(map) } else { Err(Error::Device("tensor map: the emulator refuses the description".into())) }
    }
}

/// The C string in a message buffer.
fn text_of(buffer: &[c_char]) -> String {
    // SAFETY: the C++ side writes with snprintf, which always ends the text with a zero.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
}
