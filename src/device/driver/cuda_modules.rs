//! A GPU as this process has opened it: its context and the kernels loaded there.
//!
//! They are kept to the end of the process and shared by all drivers on that GPU, which come and go: a context and its kernels take longer
//! to make than most of what is done with them. Modules are loaded from the embedded fatbins when a kernel of theirs is first used.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};
use sys::CUfunction_attribute as FunctionAttribute;

use super::cuda::CudaDriver;
use super::cuda_error::{arch_list, plain};
use super::{FunctionInfo, MODULES, Module};
use crate::error::{Error, Result};

/// A loaded kernel.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub(super) handle: sys::CUfunction,
    /// Dynamic shared memory that launches may ask for without another attribute call. At first 0: what a launch may have
    /// unasked depends on the kernel's static shared memory.
    shared_bytes: u32,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<String, Function>,
}

/// See the module.
pub(super) struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) compute_capability: (i32, i32),
    loaded: Mutex<Loaded>,
}

// SAFETY: the handles may be used from any thread once the context is bound to it, which every call does first.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind a mutex.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPU number `ordinal`, opened at its first use.
    pub(super) fn open(ordinal: usize) -> Result<Arc<Gpu>> {
        static OPEN: Mutex<Vec<(usize, Arc<Gpu>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gpu)) = open.iter().find(|(o, _)| *o == ordinal) {
            return Ok(gpu.clone());
        }
        let context = CudaContext::new(ordinal).map_err(|e| plain("opening the GPU", e))?;
        // SAFETY: streams of our own order everything, so cudarc's hidden events would only disturb graph captures.
        unsafe { context.disable_event_tracking() };
        let compute_capability = context.compute_capability().map_err(|e| plain("asking the GPU's architecture", e))?;
        let gpu = Arc::new(Gpu { context, compute_capability, loaded: Mutex::default() });
        open.push((ordinal, gpu.clone()));
        Ok(gpu)
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CudaDriver {
    /// Finds kernel `name`, loading its module at first use. Loads under the lock: two drivers do not load it twice.
    pub(super) fn function(&self, name: &str) -> Result<Function> {
        let mut loaded = self.gpu.loaded();
        if let Some(f) = loaded.functions.get(name) {
            return Ok(*f);
        }
        let symbol =
            CString::new(name).map_err(|_| Error::Device(format!("kernel name {name:?} holds a zero byte")))?;
        // A build of PTX alone has no list of kernels; then every module may hold it.
        for module in MODULES.iter().filter(|m| m.kernels.is_empty() || m.kernels.contains(&name)) {
            let handle = self.module(&mut loaded, module)?;
            // SAFETY: the module is loaded and never unloaded.
            let found = unsafe { result::module::get_function(handle, symbol.clone()) };
            if matches!(found, Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND))) {
                continue;
            }
            let function = Function { handle: self.check(&format!("kernel {name}"), found)?, shared_bytes: 0 };
            loaded.functions.insert(name.into(), function);
            return Ok(function);
        }
        Err(Error::Device(format!("kernel {name:?} is not in this binary")))
    }

    fn module(&self, loaded: &mut Loaded, module: &'static Module) -> Result<sys::CUmodule> {
        if let Some(m) = loaded.modules.get(module.file) {
            return Ok(*m);
        }
        // SAFETY: the image is a fatbin that nvcc made, 16-byte aligned and alive for ever.
        let answer = unsafe { result::module::load_data(module.image.as_ptr().cast()) };
        if let Err(DriverError(
            sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | sys::CUresult::CUDA_ERROR_INVALID_PTX
            | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
        )) = answer
        {
            let (major, minor) = self.gpu.compute_capability;
            return Err(Error::Device(format!(
                "this binary holds kernels for {} and the GPU is sm_{major}{minor}: build again with \
                 IDDPM_CUDA_ARCHS={major}{minor}, or use --device cpu",
                arch_list()
            )));
        }
        let handle = self.check(&format!("loading the kernels of {}", module.file), answer)?;
        loaded.modules.insert(module.file, handle);
        Ok(handle)
    }

    /// Lets launches of `name` ask for `bytes` of dynamic shared memory: what is more than its static memory leaves of 48 KiB must be
    /// said once.
    pub(super) fn allow_shared(&self, name: &str, bytes: u32) -> Result<()> {
        let mut loaded = self.gpu.loaded();
        let Some(function) = loaded.functions.get_mut(name).filter(|f| bytes > f.shared_bytes) else { return Ok(()) };
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was found in a loaded module.
        let set = unsafe { result::function::set_function_attribute(function.handle, attribute, bytes as i32) };
        self.check(&format!("{name}: {bytes} bytes of dynamic shared memory"), set)?;
        function.shared_bytes = bytes;
        Ok(())
    }

    pub(super) fn function_info(&self, name: &str) -> Result<Option<FunctionInfo>> {
        self.bind(name)?;
        let function = self.function(name)?;
        let ask = |attribute| {
            // SAFETY: the function was found in a loaded module.
            let value = unsafe { result::function::get_function_attribute(function.handle, attribute) };
            self.check(name, value).map(|v| v as u32)
        };
        Ok(Some(FunctionInfo {
            registers: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_shared_bytes: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_dynamic_shared_bytes: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?,
            max_threads: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            binary_version: ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        }))
    }
}
