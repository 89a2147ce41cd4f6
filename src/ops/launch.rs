//! A step on its way to the device: addresses of its values, its own memory, and the start of its kernels.

use crate::device::driver::{Arg, Driver, Launch, Ptr};
use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Val};

/// Threads of a block of the kernels that share `kernels/image.cuh`.
const THREADS: u32 = 256;

/// Most elements of one tensor of the element-wise kernels, which count in 32 bits.
const MOST_ELEMENTS: usize = i32::MAX as usize;

/// Checks that the activations `vals` of an op called `name` are all f32 or all bf16, and of a size that kernels count.
///
/// # Errors
/// [`Error::Device`] naming the tensor.
pub fn check(name: &str, g: &Graph, vals: impl IntoIterator<Item = Val>) -> Result<()> {
    let mut first = None;
    for v in vals {
        let value = &g[v];
        let no =
            |what: String| Err(Error::Device(format!("{name}: no kernel for {} {what}; use --device cpu", value.name)));
        if !matches!(value.dtype, DType::F32 | DType::Bf16) {
            return no(format!("of type {:?}", value.dtype));
        }
        let dtype = *first.get_or_insert(value.dtype);
        if dtype != value.dtype {
            return no(format!("of type {:?} beside {dtype:?}", value.dtype));
        }
        if value.shape.len() > MOST_ELEMENTS {
            return no(format!("of {} elements (at most {MOST_ELEMENTS})", value.shape.len()));
        }
    }
    Ok(())
}

/// What an op starts its kernels with.
pub struct Launcher<'a> {
    /// The device.
    pub driver: &'a Driver,
    /// The plan.
    pub graph: &'a Graph,
    /// Address of each value.
    pub address: &'a [Ptr],
    /// The step's own memory, as [`super::Operation::prepare_cuda`] made it.
    pub memory: Ptr,
    /// Scratch memory of at least [`super::Operation::workspace`] bytes, undefined at first.
    pub workspace: Ptr,
    /// Most blocks of a kernel that strides over its items. No result depends on it.
    pub blocks: usize,
}

impl Launcher<'_> {
    /// Where `v` begins.
    pub fn ptr(&self, v: Val) -> Ptr {
        self.address[v.index()]
    }

    /// Where `v` begins, or no address.
    pub fn optional(&self, v: Option<Val>) -> Ptr {
        v.map_or(Ptr::NULL, |v| self.ptr(v))
    }

    /// Starts the form of kernel `name` for the element type of `v`, one block per item or fewer that stride over them.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    pub fn start_typed(&self, name: &str, v: Val, items: usize, args: &[Arg]) -> Result<()> {
        let suffix = if self.graph[v].dtype == DType::Bf16 { "bf16" } else { "f32" };
        self.start(&format!("{name}_{suffix}"), items, args)
    }

    /// Starts the form of the element-wise kernel `name` for the element type of `v`, over `elements` in vectors of 16 bytes.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    pub fn start_elementwise(&self, name: &str, v: Val, elements: usize, args: &[Arg]) -> Result<()> {
        let vector = 16 / self.graph[v].dtype.bytes();
        self.start_typed(name, v, elements.div_ceil(THREADS as usize * vector), args)
    }

    /// Starts kernel `name`, one block per item or fewer that stride over them; nothing for no items.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    pub fn start(&self, name: &str, items: usize, args: &[Arg]) -> Result<()> {
        let blocks = u32::try_from(items.min(self.blocks)).unwrap_or(u32::MAX);
        if blocks == 0 {
            return Ok(());
        }
        self.driver.launch(name, Launch::new([blocks, 1, 1], [THREADS, 1, 1]), args)
    }
}
