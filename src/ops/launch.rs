//! A step on its way to the device: addresses of its values, its own memory, and the start of its kernels.

use crate::device::driver::{Arg, Driver, Launch, Ptr};
use crate::error::Result;
use crate::graph::{DType, Graph, Val};

/// Threads of a block of the kernels that share `kernels/image.cuh`.
const THREADS: u32 = 256;

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
