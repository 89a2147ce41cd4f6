//! The processor as a device: every op's CPU code, in f32, over one arena, on a pool of threads.

use super::{Plan, PlanId, Weights};
use crate::error::{Error, Result};
use crate::graph::{DType, Place, Region, Target, Val};
use crate::ops::fast::Isa;
use crate::ops::{Operation, Views};
use std::time::Instant;

/// 64 bytes, the unit of allocation: a cache line and a vector register.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// A zeroed, 64-byte aligned allocation.
#[derive(Default)]
struct Buffer(Vec<Line>);

impl Buffer {
    fn grow(&mut self, bytes: usize, what: &str) -> Result<()> {
        let lines = bytes.div_ceil(64);
        let more = lines.saturating_sub(self.0.len());
        self.0.try_reserve_exact(more).map_err(|_| {
            let mib = bytes >> 20;
            Error::Device(format!("cannot allocate {mib} MiB for {what}: use a smaller --batch-size or --microbatch"))
        })?;
        self.0.resize(lines.max(self.0.len()), Line([0; 64]));
        Ok(())
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: Line is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 64) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 64) }
    }
}

struct Bound {
    plan: Plan,
    inputs: Buffer,
    state: Buffer,
    arena: Buffer,
    weights: Weights,
    /// Address of each value and of each step's scratch space.
    address: Vec<*mut u8>,
    scratch: Vec<(*mut u8, usize)>,
}

/// See the module.
pub struct Cpu {
    pool: rayon::ThreadPool,
    isa: Isa,
    model: [Buffer; Region::ALL.len()],
    plans: Vec<Bound>,
}

// SAFETY: the raw addresses point into buffers this struct owns; they are used only through `&mut self`.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A pool of `threads` threads (0: as many as there are cores).
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("iddpm-{i}"))
            .build()
            .map_err(|e| Error::Device(format!("cannot start {threads} threads: {e}; try --threads 1")))?;
        Ok(Cpu { pool, isa: Isa::detect(), model: Default::default(), plans: Vec::new() })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` on this device's threads.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    pub(super) fn bind(&mut self, plan: Plan) -> Result<PlanId> {
        let g = &plan.graph;
        assert_eq!(g.target, Target::Cpu, "a plan recorded for another device");
        check_disjoint(&plan);
        if let Some(v) = g.steps.iter().flat_map(|s| s.op.inputs()).find(|&v| g[v].dtype == DType::Bf16) {
            let name = &g[v].name;
            return Err(Error::Device(format!(
                "{name} is bf16, the processor computes in f32: record the plan in f32"
            )));
        }
        let mut bound = Bound {
            inputs: Buffer::default(),
            state: Buffer::default(),
            arena: Buffer::default(),
            weights: Weights::Live,
            address: Vec::new(),
            scratch: Vec::new(),
            plan: plan.clone(),
        };
        bound.inputs.grow(g.region_bytes(Region::Inputs), "the inputs")?;
        bound.state.grow(g.region_bytes(Region::State), "the state")?;
        bound.arena.grow(plan.layout.bytes, "activations and gradients")?;
        for region in Region::ALL.into_iter().filter(|r| !r.of_plan()) {
            self.model[region as usize].grow(g.region_bytes(region), &format!("{region:?}"))?;
        }
        self.plans.push(bound);
        self.address();
        Ok(PlanId(self.plans.len() - 1))
    }

    /// Fills in every plan's addresses anew, after an allocation has moved.
    fn address(&mut self) {
        let model: Vec<*mut u8> = self.model.iter_mut().map(|b| b.0.as_mut_ptr().cast()).collect();
        for b in &mut self.plans {
            let arena: *mut u8 = b.arena.0.as_mut_ptr().cast();
            let (inputs, state): (*mut u8, *mut u8) = (b.inputs.0.as_mut_ptr().cast(), b.state.0.as_mut_ptr().cast());
            let params = b.plan.graph.region_bytes(Region::Params);
            let base = |region| match (region, b.weights) {
                (Region::Inputs, _) => inputs,
                (Region::State, _) => state,
                (Region::Params, Weights::Ema(i)) => model[Region::Ema as usize].wrapping_add(i * params),
                _ => model[region as usize],
            };
            let values = b.plan.graph.values.iter().zip(&b.plan.layout.offsets);
            b.address.clear();
            b.address.extend(values.map(|(v, &offset)| match v.place {
                Place::Arena => arena.wrapping_add(offset),
                Place::Fixed(region, at) => base(region).wrapping_add(at),
            }));
            let steps = b.plan.graph.steps.iter().zip(&b.plan.layout.scratch);
            b.scratch.clear();
            b.scratch.extend(steps.map(|(s, &at)| (arena.wrapping_add(at), s.op.scratch(&b.plan.graph))));
        }
    }

    pub(super) fn plan(&self, id: PlanId) -> &Plan {
        &self.plans[id.0].plan
    }

    pub(super) fn set_weights(&mut self, id: PlanId, weights: Weights) {
        if let Weights::Ema(i) = weights {
            let need = (i + 1) * self.plans[id.0].plan.graph.region_bytes(Region::Params);
            let have = self.model[Region::Ema as usize].bytes().len();
            assert!(need <= have, "moving average {i} needs {need} bytes of {have}");
        }
        self.plans[id.0].weights = weights;
        self.address();
    }

    pub(super) fn bytes(&self, id: PlanId, v: Val) -> &[u8] {
        let b = &self.plans[id.0];
        let value = &b.plan.graph[v];
        let (buffer, at) = match value.place {
            Place::Arena => (&b.arena, b.plan.layout.offsets[v.index()]),
            Place::Fixed(Region::Inputs, at) => (&b.inputs, at),
            Place::Fixed(Region::State, at) => (&b.state, at),
            Place::Fixed(region, at) => (&self.model[region as usize], at),
        };
        &buffer.bytes()[at..at + value.bytes()]
    }

    pub(super) fn bytes_mut(&mut self, id: PlanId, v: Val) -> &mut [u8] {
        let b = &mut self.plans[id.0];
        let value = &b.plan.graph[v];
        let (buffer, at) = match value.place {
            Place::Arena => (&mut b.arena, b.plan.layout.offsets[v.index()]),
            Place::Fixed(Region::Inputs, at) => (&mut b.inputs, at),
            Place::Fixed(Region::State, at) => (&mut b.state, at),
            Place::Fixed(region, at) => (&mut self.model[region as usize], at),
        };
        &mut buffer.bytes_mut()[at..at + value.bytes()]
    }

    /// The memory of the plan's own `region`.
    pub(super) fn region_mut(&mut self, id: PlanId, region: Region) -> &mut [u8] {
        let b = &mut self.plans[id.0];
        match region {
            Region::Inputs => b.inputs.bytes_mut(),
            Region::State => b.state.bytes_mut(),
            _ => panic!("{region:?} belongs to the model"),
        }
    }

    /// Bytes that `region` of the model has.
    pub(super) fn held(&self, region: Region) -> usize {
        self.model[region as usize].bytes().len()
    }

    /// The memory of the images.
    pub(super) fn data_mut(&mut self) -> &mut [u8] {
        self.model[Region::Data as usize].bytes_mut()
    }

    pub(super) fn write_region(&mut self, region: Region, data: &[u8]) -> Result<()> {
        self.model[region as usize].grow(data.len(), &format!("{region:?}"))?;
        self.model[region as usize].bytes_mut()[..data.len()].copy_from_slice(data);
        self.address();
        Ok(())
    }

    pub(super) fn read_region(&self, region: Region, out: &mut [u8]) {
        out.copy_from_slice(&self.model[region as usize].bytes()[..out.len()]);
    }

    pub(super) fn run(&mut self, id: PlanId) {
        self.each_step(id, |_, step, views| step.run_cpu(views));
    }

    pub(super) fn run_timed(&mut self, id: PlanId, seconds: &mut [f64]) {
        self.each_step(id, |i, step, views| {
            let start = Instant::now();
            step.run_cpu(views);
            seconds[i] += start.elapsed().as_secs_f64();
        });
    }

    pub(super) fn first_non_finite(&mut self, id: PlanId) -> Option<(usize, String)> {
        let mut found = None;
        self.each_step(id, |i, step, views| {
            step.run_cpu(views);
            let g = views.graph();
            let bad = |v: &Val| g[*v].dtype == DType::F32 && views.f32(*v).iter().any(|x| !x.is_finite());
            if found.is_none() {
                found = step.outputs().into_iter().find(bad).map(|v| (i, g[v].name.clone()));
            }
        });
        found
    }

    fn each_step(&mut self, id: PlanId, mut f: impl FnMut(usize, &crate::ops::Op, &Views) + Send) {
        /// Addresses may go to the pool's thread: it alone uses them while `install` blocks this one.
        struct Sendable<'a>(&'a Bound);
        // SAFETY: `install` blocks, and `&mut self` keeps everybody else away.
        unsafe impl Send for Sendable<'_> {}
        let (bound, isa) = (Sendable(&self.plans[id.0]), self.isa);
        self.pool.install(move || {
            let Sendable(b) = { bound };
            for (i, step) in b.plan.graph.steps.iter().enumerate() {
                // SAFETY: addresses lie in buffers sized by `bind`, aligned to 64; `check_disjoint` holds.
                let views = unsafe { Views::new(&b.plan.graph, &b.address, b.scratch[i], isa) };
                f(i, &step.op, &views);
            }
        });
    }
}

/// Each output of a step lies apart from its other operands and its scratch space.
fn check_disjoint(plan: &Plan) {
    let (g, layout) = (&plan.graph, &plan.layout);
    // Arena and regions are different spaces: the number tells them apart.
    let range = |v: Val| match g[v].place {
        Place::Arena => (usize::MAX, layout.offsets[v.index()], g[v].bytes()),
        Place::Fixed(region, at) => (region as usize, at, g[v].bytes()),
    };
    let overlap = |a: (usize, usize, usize), b: (usize, usize, usize)| a.0 == b.0 && a.1 < b.1 + b.2 && b.1 < a.1 + a.2;
    for (i, step) in g.steps.iter().enumerate() {
        let (outs, ins) = (step.op.outputs(), step.op.inputs());
        let scratch = (usize::MAX, layout.scratch[i], step.op.scratch(g) * 4);
        for (k, &out) in outs.iter().enumerate() {
            let others = outs[k + 1..].iter().chain(&ins).map(|&v| (g[v].name.as_str(), range(v)));
            for (name, other) in others.chain([("scratch", scratch)]) {
                let apart = other.2 == 0 || !overlap(range(out), other);
                assert!(apart, "step {i} ({}, {}): {} overlaps {name}", step.op.name(), step.scope, g[out].name);
            }
        }
    }
}
