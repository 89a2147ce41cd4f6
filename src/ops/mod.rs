//! The operations a plan is made of: one file each, with its document, parameters, cost and CPU code.
//!
//! An op is a plain struct that names the values it touches. [`Operation`] is all that the planner, the printer and
//! the devices ask of it; the enum [`Op`] lists every kind, so the compiler shows each place a new one must touch.

pub mod adamw_ema;
pub mod add;
pub mod attention;
pub mod avg_pool;
pub mod conv2d;
pub mod dynamic_threshold;
pub mod embedding;
pub mod fast;
pub mod grad_norm;
pub mod group_norm;
pub mod hybrid_loss;
pub mod launch;
pub mod linear;
pub mod p_sample;
pub mod q_sample;
pub mod silu;
pub mod table;
pub mod timestep_dist;
pub mod timestep_embedding;
pub mod upsample;
pub mod vb_terms;
pub mod view;

use crate::error::Result;
use crate::graph::{DType, Graph, Source, Val};
use launch::Launcher;
use std::cell::Cell;
use std::marker::PhantomData;
use view::{Cat, Rows, RowsMut};

/// What a step moves and computes at the least: the basis of every percentage the benchmarks print.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations (a multiply-add is two).
    pub flops: f64,
    /// Bytes read from memory.
    pub read: f64,
    /// Bytes written to memory.
    pub written: f64,
}

impl Cost {
    /// The cost of touching every operand of `op` once, and of `flops`.
    pub fn of(op: &impl Operation, g: &Graph, flops: f64) -> Self {
        let bytes = |vals: Vec<Val>| vals.into_iter().map(|v| g[v].bytes() as f64).sum();
        Cost { flops, read: bytes(op.inputs()), written: bytes(op.outputs()) }
    }
}

/// Bytes of a matrix outside the `columns` columns of it that an op touches.
pub fn other_columns(g: &Graph, rows: Option<(Val, usize)>, columns: usize) -> f64 {
    rows.map_or(0, |(v, _)| (g.shape(v).c - columns) * g.shape(v).n * g[v].dtype.bytes()) as f64
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(iter: I) -> Self {
        iter.fold(Cost::default(), |a, b| Cost {
            flops: a.flops + b.flops,
            read: a.read + b.read,
            written: a.written + b.written,
        })
    }
}

/// What the planner, the printer and the devices ask of an op.
pub trait Operation {
    /// Values it writes, or updates in place.
    fn outputs(&self) -> Vec<Val>;
    /// Values it only reads.
    fn inputs(&self) -> Vec<Val>;
    /// Least FLOPs and bytes.
    fn cost(&self, g: &Graph) -> Cost;
    /// Scratch space of the CPU code, in f32s.
    fn scratch(&self, _g: &Graph) -> usize {
        0
    }
    /// Runs the op on the CPU.
    fn run_cpu(&self, m: &Views);
    /// The device memory that belongs to the step on CUDA, as its first run finds it: tables, counters at rest.
    ///
    /// # Errors
    /// [`Error::Device`](crate::error::Error::Device) when no kernel covers these shapes and types.
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>>;
    /// Bytes of scratch memory that the op's kernels need while they run.
    fn workspace(&self, _g: &Graph) -> usize {
        0
    }
    /// Starts the op's kernels.
    ///
    /// # Errors
    /// [`Error::Device`](crate::error::Error::Device) when a launch is refused.
    fn launch(&self, m: &Launcher) -> Result<()>;
}

macro_rules! ops {
    ($($(#[$doc:meta])* $kind:ident($path:path),)*) => {
        /// Every kind of step.
        #[derive(Clone, Debug)]
        pub enum Op { $($(#[$doc])* $kind($path),)* }

        $(impl From<$path> for Op { fn from(op: $path) -> Self { Op::$kind(op) } })*

        impl Op {
            /// The kind, for tables and messages.
            pub fn name(&self) -> &'static str { match self { $(Op::$kind(_) => stringify!($kind),)* } }
        }

        impl Operation for Op {
            fn outputs(&self) -> Vec<Val> { match self { $(Op::$kind(op) => op.outputs(),)* } }
            fn inputs(&self) -> Vec<Val> { match self { $(Op::$kind(op) => op.inputs(),)* } }
            fn cost(&self, g: &Graph) -> Cost { match self { $(Op::$kind(op) => op.cost(g),)* } }
            fn scratch(&self, g: &Graph) -> usize { match self { $(Op::$kind(op) => op.scratch(g),)* } }
            fn run_cpu(&self, m: &Views) { match self { $(Op::$kind(op) => op.run_cpu(m),)* } }
            fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> { match self { $(Op::$kind(op) => op.prepare_cuda(g),)* } }
            fn workspace(&self, g: &Graph) -> usize { match self { $(Op::$kind(op) => op.workspace(g),)* } }
            fn launch(&self, m: &Launcher) -> Result<()> { match self { $(Op::$kind(op) => op.launch(m),)* } }
        }
    };
}

ops! {
    /// Choice of t for every image of the batch, from the loss history.
    TimestepDist(timestep_dist::TimestepDist),
    /// Forward noising of u8 images.
    QSample(q_sample::QSample),
    /// Sinusoidal embedding of the time value.
    TimestepEmbedding(timestep_embedding::TimestepEmbedding),
    /// Adds the embedding of the class label.
    Embedding(embedding::Embedding),
    /// Gradient of the class embedding table.
    EmbeddingBackward(embedding::EmbeddingBackward),
    /// x sigmoid(x).
    Silu(silu::Silu),
    /// Gradient of `Silu`.
    SiluBackward(silu::SiluBackward),
    /// Rows times a matrix.
    Linear(linear::Linear),
    /// Gradient of `Linear` with respect to its rows.
    LinearBackwardData(linear::LinearBackwardData),
    /// Gradient of `Linear` with respect to matrix and bias.
    LinearBackwardWeight(linear::LinearBackwardWeight),
    /// Convolution.
    Conv2d(conv2d::Conv2d),
    /// Gradient of `Conv2d` with respect to its input.
    Conv2dBackwardData(conv2d::Conv2dBackwardData),
    /// Gradient of `Conv2d` with respect to weights, bias and time shift.
    Conv2dBackwardWeight(conv2d::Conv2dBackwardWeight),
    /// Group norm, scale-shift, SiLU, dropout.
    GroupNorm(group_norm::GroupNorm),
    /// Gradient of `GroupNorm`.
    GroupNormBackward(group_norm::GroupNormBackward),
    /// Self-attention.
    Attention(attention::Attention),
    /// Gradient of `Attention`.
    AttentionBackward(attention::AttentionBackward),
    /// 2x2 mean.
    AvgPool(avg_pool::AvgPool),
    /// Gradient of `AvgPool`.
    AvgPoolBackward(avg_pool::AvgPoolBackward),
    /// Nearest-neighbour enlargement by 2.
    Upsample(upsample::Upsample),
    /// Gradient of `Upsample`.
    UpsampleBackward(upsample::UpsampleBackward),
    /// Sum of two values.
    Add(add::Add),
    /// Training loss and its gradient with respect to the network's output.
    HybridLoss(hybrid_loss::HybridLoss),
    /// Euclidean norm of all gradients.
    GradNorm(grad_norm::GradNorm),
    /// Optimiser step and moving averages.
    AdamwEma(adamw_ema::AdamwEma),
    /// The dynamic threshold of the x_0 that a reverse step predicts.
    DynamicThreshold(dynamic_threshold::DynamicThreshold),
    /// One reverse step.
    PSample(p_sample::PSample),
    /// Terms of the variational bound.
    VbTerms(vb_terms::VbTerms),
}

/// What the host tells a run: one block of 64 bytes, so that a captured graph can be replayed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Control {
    /// Seed of all random numbers of the run.
    pub seed: u64,
    /// Training step, counted from 0.
    pub step: u32,
    /// Sampling: index of the reverse step in the process in use; see [`p_sample::Pass::row`].
    pub t: u32,
    /// Learning rate.
    pub lr: f32,
    /// 1 - beta1^k, k = number of optimiser steps with this one.
    pub bias1: f32,
    /// 1 - beta2^k.
    pub bias2: f32,
    /// Evaluation: number of the image that the data on the device begins with.
    pub first: u32,
    /// Unused, zero.
    pub reserved: [u32; 8],
}

/// The memory of one step, as the CPU code of its op sees it.
pub struct Views<'a> {
    graph: &'a Graph,
    /// Address of each value.
    address: &'a [*mut u8],
    scratch: (*mut u8, usize),
    isa: fast::Isa,
    taken: Cell<bool>,
    life: PhantomData<&'a mut [u8]>,
}

impl<'a> Views<'a> {
    /// Views over `address`, one per value of `graph`, and over `scratch` (address and length in f32s).
    ///
    /// # Safety
    /// Every address must be aligned and valid for the value's bytes for `'a`, with no other reference to them. The
    /// outputs of the step must not overlap each other, its inputs or the scratch space (the device checks this when
    /// it binds a plan), and the op asks mutably for outputs only, each once.
    pub unsafe fn new(graph: &'a Graph, address: &'a [*mut u8], scratch: (*mut u8, usize), isa: fast::Isa) -> Self {
        Views { graph, address, scratch, isa, taken: Cell::new(false), life: PhantomData }
    }

    /// The plan.
    pub fn graph(&self) -> &'a Graph {
        self.graph
    }

    /// The instruction set of the fast twins.
    pub fn isa(&self) -> fast::Isa {
        self.isa
    }

    /// Elements of `v` to read.
    pub fn get<T: bytemuck::Pod>(&self, v: Val) -> &'a [T] {
        let bytes = self.graph[v].bytes();
        assert!(bytes.is_multiple_of(size_of::<T>()), "{}: {bytes} bytes", self.graph[v].name);
        // SAFETY: the contract of `new`; every bit pattern is a T.
        unsafe { std::slice::from_raw_parts(self.address[v.index()].cast::<T>(), bytes / size_of::<T>()) }
    }

    /// Elements of output `v` to write.
    #[allow(clippy::mut_from_ref)]
    pub fn get_mut<T: bytemuck::Pod>(&self, v: Val) -> &'a mut [T] {
        let bytes = self.graph[v].bytes();
        assert!(bytes.is_multiple_of(size_of::<T>()), "{}: {bytes} bytes", self.graph[v].name);
        // SAFETY: the contract of `new`; an op asks for each of its outputs once.
        unsafe { std::slice::from_raw_parts_mut(self.address[v.index()].cast::<T>(), bytes / size_of::<T>()) }
    }

    /// Numbers of `v` to read.
    pub fn f32(&self, v: Val) -> &'a [f32] {
        debug_assert_ne!(self.graph[v].dtype, DType::Bf16, "{}: the processor computes in f32", self.graph[v].name);
        self.get(v)
    }

    /// Numbers of output `v` to write.
    #[allow(clippy::mut_from_ref)]
    pub fn f32_mut(&self, v: Val) -> &'a mut [f32] {
        debug_assert_ne!(self.graph[v].dtype, DType::Bf16, "{}: the processor computes in f32", self.graph[v].name);
        self.get_mut(v)
    }

    /// Both parts of a source.
    pub fn cat(&self, x: Source) -> Cat<'a> {
        let c = |v| self.graph.shape(v).c;
        Cat { a: self.f32(x.a), ca: c(x.a), b: x.b.map_or(&[], |b| self.f32(b)), cb: x.b.map_or(0, c) }
    }

    /// The rows of `v` from column `col` on, to read.
    pub fn rows(&self, v: Val, col: usize) -> Rows<'a> {
        Rows { data: self.f32(v), stride: self.graph.shape(v).c, col }
    }

    /// The rows of output `v` from column `col` on, to write.
    pub fn rows_mut(&self, v: Val, col: usize) -> RowsMut<'a> {
        RowsMut { data: self.f32_mut(v), stride: self.graph.shape(v).c, col }
    }

    /// The control block in `v`.
    pub fn control(&self, v: Val) -> Control {
        self.get::<Control>(v)[0]
    }

    /// The scratch space the op asked for.
    #[allow(clippy::mut_from_ref)]
    pub fn scratch(&self) -> &'a mut [f32] {
        assert!(!self.taken.replace(true), "scratch space asked for twice");
        // SAFETY: the contract of `new`, and it is handed out once.
        unsafe { std::slice::from_raw_parts_mut(self.scratch.0.cast::<f32>(), self.scratch.1) }
    }
}
