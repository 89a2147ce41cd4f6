//! The recorded plan: numbered values and the list of steps that compute them.
//!
//! A network's shapes depend on its configuration and batch alone, so it is recorded once: each call of `record`
//! appends one [`Step`], [`crate::autograd`] appends more, [`crate::memory`] gives each value a place, and a
//! [`crate::device`] runs the list.

use crate::config::Precision;
use crate::ops::{Cost, Op, Operation};
use std::collections::HashSet;

/// The number of a value in its [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Val(u32);

impl Val {
    /// Position in [`Graph::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float: everything on the CPU; masters, losses and statistics elsewhere.
    F32,
    /// bfloat16: activations and compute weights on the GPU.
    Bf16,
    /// Bytes: images.
    U8,
    /// 32-bit integers: timesteps, labels, image indices, the control block.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }
}

/// Size of a value, channels fastest. Vectors are (n, 1, 1, c); convolution weights (out, kh, kw, in).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Images, or output channels of a weight.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// (n, h, w, c).
    pub fn new(n: usize, h: usize, w: usize, c: usize) -> Self {
        Shape { n, h, w, c }
    }

    /// n rows of c numbers.
    pub fn rows(n: usize, c: usize) -> Self {
        Shape { n, h: 1, w: 1, c }
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.n * self.h * self.w * self.c
    }

    /// Whether there is no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.h * self.w == 1 {
            f.pad(&format!("{}x{}", self.n, self.c))
        } else {
            f.pad(&format!("{}x{}x{}x{}", self.n, self.h, self.w, self.c))
        }
    }
}

/// A flat allocation. The first group belongs to the model and is shared by all its plans; the second to one plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// Master weights, f32.
    Params,
    /// Moving averages of the weights, one after the other.
    Ema,
    /// Gradients, laid out as `Params`.
    Grads,
    /// First moments of Adam, laid out as `Params`.
    AdamM,
    /// Second moments of Adam, laid out as `Params`.
    AdamV,
    /// The images of the data set, u8 NHWC.
    Data,
    /// What the host writes before a run.
    Inputs,
    /// What survives from run to run: drawn t, losses, the loss history.
    State,
    /// The weights of products in bf16, laid out as `Params` at half the offsets: CUDA's copy of the weights in use.
    Compute,
}

impl Region {
    /// All regions, in the order of their numbers.
    pub const ALL: [Region; 9] = [
        Region::Params,
        Region::Ema,
        Region::Grads,
        Region::AdamM,
        Region::AdamV,
        Region::Data,
        Region::Inputs,
        Region::State,
        Region::Compute,
    ];

    /// Whether the region belongs to one plan rather than to the model.
    pub fn of_plan(self) -> bool {
        matches!(self, Region::Inputs | Region::State | Region::Compute)
    }
}

/// Where a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the arena, at an offset the memory planner chooses.
    Arena,
    /// At a byte offset of a region.
    Fixed(Region, usize),
}

impl Place {
    /// The region, if it is one.
    pub fn region(self) -> Option<Region> {
        match self {
            Place::Arena => None,
            Place::Fixed(region, _) => Some(region),
        }
    }
}

/// One value: a tensor written by a step or by the host.
#[derive(Clone, Debug)]
pub struct Value {
    /// For tables and messages.
    pub name: String,
    /// Size.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
    /// Where it lives.
    pub place: Place,
    /// Not to be overwritten after its last use: the host reads it.
    pub keep: bool,
}

impl Value {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.len() * self.dtype.bytes()
    }
}

/// One entry of the list: an operation and the part of the network it belongs to.
#[derive(Clone, Debug)]
pub struct Step {
    /// Name of the module, as in the reference's state dict: `input_blocks.1.0`.
    pub scope: String,
    /// What to do.
    pub op: Op,
}

/// A tensor, or the channel concatenation of two, which is never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// First channels.
    pub a: Val,
    /// Last channels, if any.
    pub b: Option<Val>,
}

impl From<Val> for Source {
    fn from(a: Val) -> Self {
        Source { a, b: None }
    }
}

impl Source {
    /// Both values, or the one.
    pub fn vals(self) -> impl Iterator<Item = Val> {
        [Some(self.a), self.b].into_iter().flatten()
    }
}

/// What a plan is recorded for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Target {
    /// The processor, in f32.
    #[default]
    Cpu,
    /// A GPU or its emulation.
    Cuda(Precision),
}

/// Values, steps and the sizes of the plan's own regions.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Every value; a [`Val`] is a position here.
    pub values: Vec<Value>,
    /// The list to run, in order.
    pub steps: Vec<Step>,
    /// Parameter gradients already written by an earlier step, so that the next one adds.
    pub grads_written: HashSet<Val>,
    /// What the plan is recorded for.
    pub target: Target,
    /// Activations are bf16, for CUDA; otherwise f32.
    pub half: bool,
    /// Convolutions also leave behind the statistics that the norm of their result needs: of use on CUDA.
    pub epilogue_sums: bool,
    scope: String,
    region_bytes: [usize; Region::ALL.len()],
}

/// Fixed values start at multiples of this many bytes, so that vector loads are aligned.
pub const ALIGN: usize = 256;

impl Graph {
    /// An empty plan for the processor.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty plan for `target`; for CUDA with statistics from convolutions.
    pub fn on(target: Target) -> Self {
        let (half, epilogue_sums) = (target == Target::Cuda(Precision::Bf16), target != Target::Cpu);
        Graph { target, half, epilogue_sums, ..Self::default() }
    }

    /// Names the module that the next steps belong to.
    pub fn scope(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// A new f32 value in the arena.
    pub fn arena(&mut self, name: &str, shape: Shape) -> Val {
        self.value(name, shape, DType::F32, Place::Arena)
    }

    /// A new value in the arena of the type of activations: f32, or bf16 where the plan is recorded for it.
    pub fn activation(&mut self, name: &str, shape: Shape) -> Val {
        self.value(name, shape, self.float(), Place::Arena)
    }

    /// The type of activations.
    pub fn float(&self) -> DType {
        if self.half { DType::Bf16 } else { DType::F32 }
    }

    /// A new value in the arena of the size and type of `v`.
    pub fn like(&mut self, name: &str, v: Val) -> Val {
        let Value { shape, dtype, .. } = self[v];
        self.value(name, shape, dtype, Place::Arena)
    }

    /// A new value in the arena of the type of `v`.
    pub fn shaped_like(&mut self, name: &str, v: Val, shape: Shape) -> Val {
        self.value(name, shape, self[v].dtype, Place::Arena)
    }

    /// A new value at the end of `region`.
    pub fn fixed(&mut self, name: &str, shape: Shape, dtype: DType, region: Region) -> Val {
        let at = self.region_bytes[region as usize].next_multiple_of(ALIGN);
        self.value(name, shape, dtype, Place::Fixed(region, at))
    }

    /// A value at a byte offset of `region`: a parameter, its gradient, a whole region.
    pub fn at(&mut self, name: &str, shape: Shape, dtype: DType, region: Region, offset: usize) -> Val {
        self.value(name, shape, dtype, Place::Fixed(region, offset))
    }

    /// Rows `first .. first + n` of a fixed value.
    pub fn rows(&mut self, v: Val, first: usize, n: usize) -> Val {
        let value = self[v].clone();
        assert!(first + n <= value.shape.n, "{}: rows {first}..{} of {}", value.name, first + n, value.shape.n);
        let Place::Fixed(region, at) = value.place else { panic!("{}: a view of an arena value", value.name) };
        let row = value.bytes() / value.shape.n;
        self.value(&value.name, Shape { n, ..value.shape }, value.dtype, Place::Fixed(region, at + first * row))
    }

    fn value(&mut self, name: &str, shape: Shape, dtype: DType, place: Place) -> Val {
        let value = Value { name: name.into(), shape, dtype, place, keep: false };
        if let Place::Fixed(region, at) = place {
            let end = &mut self.region_bytes[region as usize];
            *end = (*end).max(at + value.bytes());
        }
        self.values.push(value);
        Val(u32::try_from(self.values.len() - 1).expect("fewer than 2^32 values"))
    }

    /// Marks `v` as read by the host after the run.
    pub fn keep(&mut self, v: Val) {
        self.values[v.index()].keep = true;
    }

    /// Size of `v`.
    pub fn shape(&self, v: Val) -> Shape {
        self[v].shape
    }

    /// Channels of a source: those of both parts.
    pub fn channels(&self, x: Source) -> usize {
        x.vals().map(|v| self.shape(v).c).sum()
    }

    /// Bytes that `region` must have for this plan.
    pub fn region_bytes(&self, region: Region) -> usize {
        self.region_bytes[region as usize]
    }

    /// Appends a step.
    pub fn push(&mut self, op: impl Into<Op>) {
        self.steps.push(Step { scope: self.scope.clone(), op: op.into() });
    }

    /// The gradient of parameter `p`, and whether an earlier step has written it (the next one must add).
    pub fn grad_of(&mut self, p: Val) -> (Val, bool) {
        let value = self[p].clone();
        let at = match value.place {
            Place::Fixed(Region::Params, at) => at,
            Place::Fixed(Region::Compute, at) => 2 * at,
            _ => panic!("{} is no parameter", value.name),
        };
        let accumulate = !self.grads_written.insert(p);
        self.region_bytes[Region::Grads as usize] = self.region_bytes[Region::Params as usize];
        (self.at(&format!("d {}", value.name), value.shape, DType::F32, Region::Grads, at), accumulate)
    }

    /// Whether `v` is a parameter, or the bf16 copy of one.
    pub fn is_param(&self, v: Val) -> bool {
        matches!(self[v].place, Place::Fixed(Region::Params | Region::Compute, _))
    }

    /// Bytes that the kernels of the list write to scratch memory and read again: partial sums, folded weights. The steps share
    /// that memory, one after the other, and a GPU's cache can hold it; it is not part of [`Graph::cost`].
    pub fn scratch_traffic(&self) -> f64 {
        self.steps.iter().map(|s| 2.0 * s.op.workspace(self) as f64).sum()
    }

    /// FLOPs and bytes of the whole list.
    pub fn cost(&self) -> Cost {
        self.steps.iter().map(|s| s.op.cost(self)).sum()
    }
}

impl std::ops::Index<Val> for Graph {
    type Output = Value;
    fn index(&self, v: Val) -> &Value {
        &self.values[v.index()]
    }
}
