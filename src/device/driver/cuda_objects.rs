//! What the real driver hands out: events, graphs and tensor maps.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::cuda::CudaDriver;
use super::{Element, Swizzle, TensorMap, TensorMapMode, TensorMapSpec};
use crate::error::Result;

/// An event on the GPU.
pub struct CudaEvent {
    pub(super) handle: sys::CUevent,
    pub(super) driver: Arc<CudaDriver>,
}

// SAFETY: events may be used from any thread once the context is bound to it.
unsafe impl Send for CudaEvent {}

impl CudaEvent {
    pub(super) fn wait(&self) -> Result<()> {
        self.driver.bind("waiting for an event")?;
        // SAFETY: the event is alive.
        self.driver.check("waiting for an event", unsafe { result::event::synchronize(self.handle) })
    }

    pub(super) fn passed(&self) -> Result<bool> {
        self.driver.bind("asking an event")?;
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.handle) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            answer => self.driver.check("asking an event", answer).map(|()| true),
        }
    }

    pub(super) fn elapsed_ms(&self, start: &CudaEvent) -> Result<f64> {
        self.wait()?;
        // SAFETY: both events are alive and recorded.
        let ms = unsafe { result::event::elapsed(start.handle, self.handle) };
        self.driver.check("timing between events", ms).map(f64::from)
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: made by record and destroyed once; an error belongs to an earlier launch.
        let _ = self.driver.context.bind_to_thread().and_then(|()| unsafe { result::event::destroy(self.handle) });
    }
}

/// A captured graph, ready to start.
pub struct CudaGraph {
    pub(super) exec: sys::CUgraphExec,
    pub(super) driver: Arc<CudaDriver>,
}

// SAFETY: a graph is started from one thread at a time, because Driver::replay borrows it and the stream orders it.
unsafe impl Send for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: made by end_capture and destroyed once; an error belongs to an earlier launch.
        let _ = self.driver.context.bind_to_thread().and_then(|()| unsafe { result::graph::exec_destroy(self.exec) });
    }
}

impl CudaDriver {
    pub(super) fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.bind("tensor map")?;
        let mut map = MaybeUninit::<sys::CUtensorMap>::zeroed();
        let element = match spec.element {
            Element::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match spec.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let interleave = sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE;
        let l2 = sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
        let fill = sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
        let (rank, address) = (spec.dims.len() as u32, spec.address.0 as *mut c_void);
        let (dims, strides, steps) = (spec.dims.as_ptr(), spec.strides_bytes.as_ptr(), spec.element_strides.as_ptr());
        // SAFETY: TensorMapSpec::check made the lists as long as the rank wants; the map is ours to fill.
        let done = unsafe {
            match &spec.mode {
                TensorMapMode::Tile { sizes } => sys::cuTensorMapEncodeTiled(
                    map.as_mut_ptr(),
                    element,
                    rank,
                    address,
                    dims,
                    strides,
                    sizes.as_ptr(),
                    steps,
                    interleave,
                    swizzle,
                    l2,
                    fill,
                ),
                TensorMapMode::Im2col { lower, upper, channels, pixels } => sys::cuTensorMapEncodeIm2col(
                    map.as_mut_ptr(),
                    element,
                    rank,
                    address,
                    dims,
                    strides,
                    lower.as_ptr(),
                    upper.as_ptr(),
                    *channels,
                    *pixels,
                    steps,
                    interleave,
                    swizzle,
                    l2,
                    fill,
                ),
            }
        };
        self.check(&format!("tensor map {spec:?}"), done.result())?;
        // SAFETY: CUtensorMap is 128 bytes of plain data, as TensorMap is.
        Ok(unsafe { std::mem::transmute::<sys::CUtensorMap, TensorMap>(map.assume_init()) })
    }
}
