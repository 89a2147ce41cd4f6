//! Devices run a plan: `bind` gives it memory, `write` and `read` move values, `run` executes the list.
//!
//! A device holds the regions of one model (weights, gradients, moments, averages, data), shared by every plan bound to
//! it, and for each plan its inputs, its state and its arena.

pub mod cpu;
pub mod cuda;
pub mod driver;
pub mod host;
pub mod ring;
pub mod room;

use crate::config::Precision;
use crate::error::Result;
use crate::graph::{ALIGN, DType, Graph, Region, Target, Val};
use crate::memory::{self, Layout};
use crate::ops::Operation;
use cpu::Cpu;
use cuda::Cuda;
use driver::Driver;

/// A recorded list with a place for every value.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Values and steps.
    pub graph: Graph,
    /// Offsets in the arena.
    pub layout: Layout,
    /// Bytes of scratch memory on CUDA, which the steps share, one after the other.
    pub scratch: usize,
    /// Bytes of the steps' tables on CUDA.
    pub tables: usize,
}

impl Plan {
    /// Plans the memory of `graph`; `reuse` off gives each value bytes of its own.
    pub fn new(graph: Graph, reuse: bool) -> Self {
        let layout = memory::plan(&graph, reuse);
        let ops = || graph.steps.iter().map(|step| &step.op).filter(|_| graph.target != Target::Cpu);
        let scratch = ops().map(|op| op.workspace(&graph)).max().unwrap_or(0);
        let tables = ops().map(|op| op.prepare_cuda(&graph).map_or(0, |bytes| bytes.len().next_multiple_of(ALIGN)));
        let tables = tables.sum();
        Plan { graph, layout, scratch, tables }
    }

    /// Bytes the plan needs on a device: its regions, its arena, and on CUDA scratch memory and tables.
    pub fn bytes(&self) -> usize {
        self.layout.bytes
            + self.scratch
            + self.tables
            + Region::ALL.iter().map(|&r| self.graph.region_bytes(r)).sum::<usize>()
    }
}

/// A plan bound to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanId(pub(crate) usize);

/// Which weights a plan computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The weights being trained.
    Live,
    /// The moving average of this number.
    Ema(usize),
}

/// Where plans run.
pub enum Device {
    /// The processor, in f32.
    Cpu(Cpu),
    /// A GPU, or its emulation.
    Cuda(Cuda),
}

impl Device {
    /// The processor with `threads` threads (0: as many as there are cores).
    pub fn cpu(threads: usize) -> Result<Self> {
        Ok(Device::Cpu(Cpu::new(threads)?))
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or the binary has no kernels for it.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Device::Cuda(Cuda::new(Driver::cuda(ordinal)?)?))
    }

    /// The CUDA kernels run on the processor.
    ///
    /// # Errors
    /// When the build has no emulator.
    pub fn emulated() -> Result<Self> {
        Ok(Device::Cuda(Cuda::new(Driver::emulated()?)?))
    }

    /// The device with the network in `precision`, which the processor has no choice of.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        if let Device::Cuda(d) = &mut self {
            d.precision = precision;
        }
        self
    }

    /// What plans for this device are recorded for.
    pub fn target(&self) -> Target {
        match self {
            Device::Cpu(_) => Target::Cpu,
            Device::Cuda(d) => Target::Cuda(d.precision),
        }
    }

    /// Is this the emulator, which is slow?
    pub fn is_emulated(&self) -> bool {
        matches!(self, Device::Cuda(d) if d.driver().is_emulated())
    }

    /// The device for people: `the processor, 8 threads, f32`.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(d) => format!("the processor, {} threads, f32", d.threads()),
            Device::Cuda(d) => {
                let name = d.driver().info().map_or_else(|e| e.to_string(), |info| info.name);
                format!("{name}, {}", d.precision.name())
            }
        }
    }

    /// Records the plan as one graph where the device can: `run` then starts it as a whole.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn capture(&mut self, id: PlanId) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.capture(id),
        }
    }

    /// Waits until everything that was started has ended.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn sync(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.sync(),
        }
    }

    /// Gives `plan` its memory; regions of the model grow to what it needs and keep their contents.
    ///
    /// # Errors
    /// When the memory cannot be had; the message names what is needed.
    pub fn bind(&mut self, plan: Plan) -> Result<PlanId> {
        match self {
            Device::Cpu(d) => d.bind(plan),
            Device::Cuda(d) => d.bind(plan),
        }
    }

    /// The plan behind `id`.
    pub fn plan(&self, id: PlanId) -> &Plan {
        match self {
            Device::Cpu(d) => d.plan(id),
            Device::Cuda(d) => d.plan(id),
        }
    }

    /// Chooses the weights that the plan's parameters stand for.
    pub fn set_weights(&mut self, id: PlanId, weights: Weights) {
        match self {
            Device::Cpu(d) => d.set_weights(id, weights),
            Device::Cuda(d) => d.set_weights(id, weights),
        }
    }

    /// Writes all elements of a fixed or kept value.
    pub fn write<T: bytemuck::Pod>(&mut self, id: PlanId, v: Val, data: &[T]) -> Result<()> {
        match self {
            Device::Cpu(d) => d.bytes_mut(id, v).copy_from_slice(bytemuck::cast_slice(data)),
            Device::Cuda(d) => d.write(id, v, bytemuck::cast_slice(data))?,
        }
        Ok(())
    }

    /// Writes all elements of a fixed or kept value of floats, rounded where it is bf16.
    pub fn write_f32(&mut self, id: PlanId, v: Val, data: &[f32]) -> Result<()> {
        match self {
            Device::Cuda(d) if d.plan(id).graph[v].dtype == DType::Bf16 => d.write_bf16(id, v, data),
            _ => self.write(id, v, data),
        }
    }

    /// Reads all elements of a fixed or kept value into `out`.
    pub fn read<T: bytemuck::Pod>(&self, id: PlanId, v: Val, out: &mut [T]) -> Result<()> {
        match self {
            Device::Cpu(d) => bytemuck::cast_slice_mut(out).copy_from_slice(d.bytes(id, v)),
            Device::Cuda(d) => d.read(id, v, bytemuck::cast_slice_mut(out))?,
        }
        Ok(())
    }

    /// Writes a region of the model from its start, enlarging it if needed.
    pub fn write_region<T: bytemuck::Pod>(&mut self, region: Region, data: &[T]) -> Result<()> {
        match self {
            Device::Cpu(d) => d.write_region(region, bytemuck::cast_slice(data)),
            Device::Cuda(d) => d.write_region(region, bytemuck::cast_slice(data)),
        }
    }

    /// Reads a region of the model from its start.
    pub fn read_region<T: bytemuck::Pod>(&self, region: Region, out: &mut [T]) -> Result<()> {
        match self {
            Device::Cpu(d) => d.read_region(region, bytemuck::cast_slice_mut(out)),
            Device::Cuda(d) => d.read_region(region, bytemuck::cast_slice_mut(out))?,
        }
        Ok(())
    }

    /// Runs the list once.
    pub fn run(&mut self, id: PlanId) -> Result<()> {
        match self {
            Device::Cpu(d) => d.run(id),
            Device::Cuda(d) => d.run(id)?,
        }
        Ok(())
    }

    /// Runs the list once and adds each step's seconds to `seconds` (one entry per step). A captured plan runs once more, untimed, before.
    pub fn run_timed(&mut self, id: PlanId, seconds: &mut [f64]) -> Result<()> {
        match self {
            Device::Cpu(d) => d.run_timed(id, seconds),
            Device::Cuda(d) => d.run_timed(id, seconds)?,
        }
        Ok(())
    }

    /// Runs the list and returns the first step that writes a NaN or an infinity, with the name of the value.
    pub fn first_non_finite(&mut self, id: PlanId) -> Result<Option<(usize, String)>> {
        match self {
            Device::Cpu(d) => Ok(d.first_non_finite(id)),
            Device::Cuda(d) => d.first_non_finite(id),
        }
    }
}
