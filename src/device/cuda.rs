//! A GPU, or its emulation, as a device: the kernels of every step in order, over the same regions and the same arena.
//!
//! Addresses never change between two calls of `bind`, `set_weights` and `write_region`, so a plan can be recorded as one graph
//! (`Cuda::capture`) and started as a whole.
//!
//! A plan in bf16 multiplies by rounded copies of its weights, [`Region::Compute`]. Training writes its own beside the
//! weights; whenever the weights behind a plan change otherwise, its copies are made anew before its next run.

use super::driver::{self, Buffer, Driver, Event, Launch, Pinned, Ptr};
use super::{Plan, PlanId, Weights};
use crate::args;
use crate::config::Precision;
use crate::error::{Error, Result};
use crate::graph::{ALIGN, DType, Place, Region, Val};
use crate::ops::Operation;
use crate::ops::launch::Launcher;
use std::collections::HashSet;

/// Blocks of a striding kernel per multiprocessor: 8 blocks of 256 threads are all that one holds.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

struct Bound {
    plan: Plan,
    inputs: Option<Buffer>,
    state: Option<Buffer>,
    arena: Option<Buffer>,
    /// bf16 copies of the weights, and whether the weights have changed since they were made.
    compute: Option<Buffer>,
    stale: bool,
    /// Regions of weights that a run writes, and whether it writes the copies too.
    changes: Vec<Region>,
    keeps_copies: bool,
    /// Memory of the steps, and where that of each begins.
    memory: Option<Buffer>,
    memory_at: Vec<usize>,
    /// Scratch memory that the steps share, one after the other.
    workspace: Option<Buffer>,
    weights: Weights,
    /// Address of each value.
    address: Vec<Ptr>,
    /// The list as one graph, with whether one is wanted.
    graph: Option<driver::Graph>,
    captured: bool,
}

/// See the module.
pub struct Cuda {
    // Before the driver, which the buffers need to be freed.
    model: [Option<Buffer>; Region::ALL.len()],
    plans: Vec<Bound>,
    driver: Driver,
    blocks: usize,
    /// Numbers of the network in plans recorded for this device.
    pub(super) precision: Precision,
    /// Numbers on their way to a bf16 value.
    rounded: Vec<half::bf16>,
}

/// A zeroed buffer, or none for no bytes.
fn buffer(driver: &Driver, bytes: usize, what: &str) -> Result<Option<Buffer>> {
    if bytes == 0 {
        return Ok(None);
    }
    let buffer = driver.alloc_zeroed(bytes);
    buffer.map(Some).map_err(|e| Error::Device(format!("{what}: {e}")))
}

fn ptr(buffer: &Option<Buffer>) -> Ptr {
    buffer.as_ref().map_or(Ptr::NULL, Buffer::ptr)
}

impl Cuda {
    /// A device over `driver`.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn new(driver: Driver) -> Result<Self> {
        let blocks = BLOCKS_PER_MULTIPROCESSOR * driver.info()?.multiprocessors;
        Ok(Cuda {
            model: Default::default(),
            plans: Vec::new(),
            driver,
            blocks,
            precision: Precision::default(),
            rounded: Vec::new(),
        })
    }

    /// The driver.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// Limits kernels that stride over their items to `blocks` blocks. No result depends on it.
    pub fn set_blocks(&mut self, blocks: usize) {
        assert!(blocks > 0, "a launch has at least one block");
        self.blocks = blocks;
        self.drop_graphs();
    }

    pub(super) fn bind(&mut self, plan: Plan) -> Result<PlanId> {
        let g = &plan.graph;
        let (mut memory, mut memory_at) = (Vec::new(), Vec::new());
        for (i, step) in g.steps.iter().enumerate() {
            let bytes = step.op.prepare_cuda(g).map_err(|e| named(&plan, i, e))?;
            memory_at.push(memory.len());
            memory.extend(bytes);
            memory.resize(memory.len().next_multiple_of(ALIGN), 0);
        }
        let workspace = g.steps.iter().map(|step| step.op.workspace(g)).max().unwrap_or(0);
        let outputs = g.steps.iter().flat_map(|step| step.op.outputs());
        let written: HashSet<Region> = outputs.filter_map(|v| g[v].place.region()).collect();
        let d = &self.driver;
        let bound = Bound {
            inputs: buffer(d, g.region_bytes(Region::Inputs), "the inputs")?,
            state: buffer(d, g.region_bytes(Region::State), "the state")?,
            arena: buffer(d, plan.layout.bytes, "activations and gradients")?,
            compute: buffer(d, g.region_bytes(Region::Compute), "bf16 weights")?,
            stale: true,
            changes: [Region::Params, Region::Ema].into_iter().filter(|r| written.contains(r)).collect(),
            keeps_copies: written.contains(&Region::Compute),
            memory: buffer(d, memory.len(), "tables")?,
            memory_at,
            workspace: buffer(d, workspace, "scratch memory")?,
            weights: Weights::Live,
            address: Vec::new(),
            graph: None,
            captured: false,
            plan: plan.clone(),
        };
        if let Some(buffer) = &bound.memory {
            d.write(buffer.ptr(), &memory)?;
        }
        for region in Region::ALL.into_iter().filter(|r| !r.of_plan()) {
            self.grow(region, g.region_bytes(region))?;
        }
        self.plans.push(bound);
        self.address();
        Ok(PlanId(self.plans.len() - 1))
    }

    /// Enlarges a region of the model to `bytes`; its contents move along.
    fn grow(&mut self, region: Region, bytes: usize) -> Result<()> {
        let slot = &mut self.model[region as usize];
        let have = slot.as_ref().map_or(0, Buffer::bytes);
        if bytes <= have {
            return Ok(());
        }
        let new = buffer(&self.driver, bytes, &format!("{region:?}"))?;
        if have > 0 {
            self.driver.copy(ptr(&new), ptr(slot), have)?;
            self.driver.sync()?;
        }
        *slot = new;
        Ok(())
    }

    /// Fills in every plan's addresses anew, after an allocation has moved.
    fn address(&mut self) {
        let model = &self.model;
        for b in &mut self.plans {
            let params = b.plan.graph.region_bytes(Region::Params);
            let base = |region| match (region, b.weights) {
                (Region::Inputs, _) => ptr(&b.inputs),
                (Region::State, _) => ptr(&b.state),
                (Region::Compute, _) => ptr(&b.compute),
                (Region::Params, Weights::Ema(i)) => ptr(&model[Region::Ema as usize]).offset(i * params),
                _ => ptr(&model[region as usize]),
            };
            let values = b.plan.graph.values.iter().zip(&b.plan.layout.offsets);
            let address: Vec<Ptr> = values
                .map(|(v, &offset)| match v.place {
                    Place::Arena => ptr(&b.arena).offset(offset),
                    Place::Fixed(region, at) => base(region).offset(at),
                })
                .collect();
            // A graph holds the addresses it was recorded with.
            if b.address != address {
                (b.address, b.graph) = (address, None);
            }
        }
    }

    fn drop_graphs(&mut self) {
        self.plans.iter_mut().for_each(|b| b.graph = None);
    }

    pub(super) fn plan(&self, id: PlanId) -> &Plan {
        &self.plans[id.0].plan
    }

    pub(super) fn set_weights(&mut self, id: PlanId, weights: Weights) {
        if let Weights::Ema(i) = weights {
            let need = (i + 1) * self.plans[id.0].plan.graph.region_bytes(Region::Params);
            let have = self.model[Region::Ema as usize].as_ref().map_or(0, Buffer::bytes);
            assert!(need <= have, "moving average {i} needs {need} bytes of {have}");
        }
        self.plans[id.0].weights = weights;
        self.plans[id.0].stale = true;
        self.address();
    }

    /// Address of a value for the host: a parameter is always the live one.
    fn host_address(&self, id: PlanId, v: Val) -> Ptr {
        let b = &self.plans[id.0];
        match b.plan.graph[v].place {
            Place::Fixed(Region::Params, at) => ptr(&self.model[Region::Params as usize]).offset(at),
            _ => b.address[v.index()],
        }
    }

    pub(super) fn write(&mut self, id: PlanId, v: Val, data: &[u8]) -> Result<()> {
        let value = &self.plans[id.0].plan.graph[v];
        assert_eq!(data.len(), value.bytes(), "{}: bytes written", value.name);
        self.driver.write(self.host_address(id, v), data)?;
        if let Some(region) = value.place.region() {
            self.changed(region, None);
        }
        Ok(())
    }

    pub(super) fn write_bf16(&mut self, id: PlanId, v: Val, data: &[f32]) -> Result<()> {
        let mut rounded = std::mem::take(&mut self.rounded);
        rounded.clear();
        rounded.extend(data.iter().map(|&x| half::bf16::from_f32(x)));
        let written = self.write(id, v, bytemuck::cast_slice(&rounded));
        self.rounded = rounded;
        written
    }

    /// Notes that the weights in `region` have changed, by plan `by`, if by one, which keeps its own copies.
    fn changed(&mut self, region: Region, by: Option<PlanId>) {
        let others = self.plans.iter_mut().enumerate().filter(|&(i, _)| Some(PlanId(i)) != by);
        for (_, b) in others {
            b.stale |= match b.weights {
                Weights::Live => region == Region::Params,
                Weights::Ema(_) => region == Region::Ema,
            };
        }
    }

    /// Rounds the weights of a plan anew, if they have changed.
    fn refresh(&mut self, id: PlanId) -> Result<()> {
        let b = &mut self.plans[id.0];
        let Some(compute) = b.compute.as_ref().filter(|_| b.stale) else { return Ok(()) };
        let (params, len) = (b.plan.graph.region_bytes(Region::Params), b.plan.graph.region_bytes(Region::Compute) / 2);
        let from = match b.weights {
            Weights::Live => ptr(&self.model[Region::Params as usize]),
            Weights::Ema(i) => ptr(&self.model[Region::Ema as usize]).offset(i * params),
        };
        let args = args![compute.ptr(), from, len as i64];
        b.stale = false;
        self.driver.launch("conv2d_round_weights", Launch::over(len, 256), args)
    }

    /// Notes what a run of plan `id` has changed.
    fn ran(&mut self, id: PlanId) {
        let Bound { changes, keeps_copies, .. } = &self.plans[id.0];
        let own = keeps_copies.then_some(id);
        for region in changes.clone() {
            self.changed(region, own);
        }
    }

    pub(super) fn read(&self, id: PlanId, v: Val, out: &mut [u8]) -> Result<()> {
        let value = &self.plans[id.0].plan.graph[v];
        assert_eq!(out.len(), value.bytes(), "{}: bytes read", value.name);
        self.driver.read(self.host_address(id, v), out)
    }

    /// Bytes that `region` of the model has.
    pub(super) fn held(&self, region: Region) -> usize {
        self.model[region as usize].as_ref().map_or(0, Buffer::bytes)
    }

    /// Where the plan's own `region` begins.
    pub(super) fn region(&self, id: PlanId, region: Region) -> Ptr {
        let b = &self.plans[id.0];
        match region {
            Region::Inputs => ptr(&b.inputs),
            Region::State => ptr(&b.state),
            _ => panic!("{region:?} belongs to the model"),
        }
    }

    pub(super) fn start_write(&self, to: Ptr, data: &Pinned) -> Result<()> {
        if data.is_empty() { Ok(()) } else { self.driver.write_pinned(to, data) }
    }

    pub(super) fn start_read(&self, from: Ptr, out: &mut Pinned) -> Result<()> {
        if out.is_empty() { Ok(()) } else { self.driver.read_pinned(from, out) }
    }

    pub(super) fn write_data_aside(&self, at: usize, data: &Pinned, after: Option<&Event>) -> Result<Event> {
        self.driver.write_aside(ptr(&self.model[Region::Data as usize]).offset(at), data, after)
    }

    pub(super) fn write_region(&mut self, region: Region, data: &[u8]) -> Result<()> {
        self.grow(region, data.len())?;
        self.address();
        if data.is_empty() {
            return Ok(());
        }
        self.changed(region, None);
        self.driver.write(ptr(&self.model[region as usize]), data)
    }

    pub(super) fn read_region(&self, region: Region, out: &mut [u8]) -> Result<()> {
        let have = self.model[region as usize].as_ref().map_or(0, Buffer::bytes);
        assert!(out.len() <= have, "{region:?}: {} bytes read of {have}", out.len());
        if out.is_empty() {
            return Ok(());
        }
        self.driver.read(ptr(&self.model[region as usize]), out)
    }

    /// From now on `run` starts the plan as one recorded graph.
    pub(super) fn capture(&mut self, id: PlanId) -> Result<()> {
        self.plans[id.0].captured = true;
        self.record(id)
    }

    fn record(&mut self, id: PlanId) -> Result<()> {
        let graph = self.driver.capture(|| self.each_step(id, |_| Ok(())))?;
        self.plans[id.0].graph = Some(graph);
        Ok(())
    }

    pub(super) fn run(&mut self, id: PlanId) -> Result<()> {
        self.refresh(id)?;
        if self.plans[id.0].captured && self.plans[id.0].graph.is_none() {
            self.record(id)?;
        }
        match &self.plans[id.0].graph {
            Some(graph) => self.driver.replay(graph),
            None => self.each_step(id, |_| Ok(())),
        }?;
        self.ran(id);
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.driver.sync()
    }

    pub(super) fn run_timed(&mut self, id: PlanId, seconds: &mut [f64]) -> Result<()> {
        self.refresh(id)?;
        // While the device is busy with the graph, the host gets ahead: no kernel below waits to be started.
        if let Some(graph) = &self.plans[id.0].graph {
            self.driver.replay(graph)?;
        }
        let mut events = vec![self.driver.record()?];
        self.each_step(id, |_| {
            events.push(self.driver.record()?);
            Ok(())
        })?;
        for (seconds, pair) in seconds.iter_mut().zip(events.windows(2)) {
            *seconds += pair[1].elapsed_ms(&pair[0])? / 1e3;
        }
        self.ran(id);
        Ok(())
    }

    pub(super) fn first_non_finite(&mut self, id: PlanId) -> Result<Option<(usize, String)>> {
        self.refresh(id)?;
        let (mut found, b) = (None, &self.plans[id.0]);
        self.each_step(id, |i| {
            for v in b.plan.graph.steps[i].op.outputs() {
                if found.is_none() && !self.is_finite(b, v)? {
                    found = Some((i, b.plan.graph[v].name.clone()));
                }
            }
            Ok(())
        })?;
        self.ran(id);
        Ok(found)
    }

    fn is_finite(&self, b: &Bound, v: Val) -> Result<bool> {
        let value = &b.plan.graph[v];
        let mut bytes = vec![0u8; value.bytes()];
        self.driver.read(b.address[v.index()], &mut bytes)?;
        let finite_f32 = |x: &[u8]| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite();
        let finite_bf16 = |x: &[u8]| half::bf16::from_le_bytes([x[0], x[1]]).is_finite();
        Ok(match value.dtype {
            DType::F32 => bytes.chunks_exact(4).all(finite_f32),
            DType::Bf16 => bytes.chunks_exact(2).all(finite_bf16),
            DType::U8 | DType::I32 => true,
        })
    }

    /// Starts the kernels of each step in order; `done` is told after each.
    fn each_step(&self, id: PlanId, mut done: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let b = &self.plans[id.0];
        for (i, step) in b.plan.graph.steps.iter().enumerate() {
            self.driver.set_step(&step_name(&b.plan, i));
            step.op.launch(&Launcher {
                driver: &self.driver,
                graph: &b.plan.graph,
                address: &b.address,
                memory: ptr(&b.memory).offset(b.memory_at[i]),
                workspace: ptr(&b.workspace),
                blocks: self.blocks,
            })?;
            done(i)?;
        }
        self.driver.set_step("");
        Ok(())
    }
}

/// `step 3 (Conv2d, input_blocks.1.0)`.
fn step_name(plan: &Plan, i: usize) -> String {
    let step = &plan.graph.steps[i];
    format!("step {i} ({}, {})", step.op.name(), step.scope)
}

fn named(plan: &Plan, i: usize, e: Error) -> Error {
    Error::Device(format!("{}: {e}", step_name(plan, i)))
}
