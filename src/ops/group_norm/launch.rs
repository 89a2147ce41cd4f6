//! Group norm on CUDA: how images are cut into slabs of channels, chunks and parts of rows, and the kernels' arguments.
//!
//! All cuts depend on the shape alone, never on the GPU, so that every sum has one order. Channel counts that are multiples of a 16-byte
//! vector (each source's own) take the vector kernels, others the kernels `_any`.

use super::parts::int;
use super::{DropoutStep, GroupNorm, GroupNormBackward, GroupNormShape, Parts};
use crate::args;
use crate::device::driver::{Arg, Launch, Ptr};
use crate::error::{Error, Result};
use crate::graph::{ALIGN, DType, Graph, Source, Val};
use crate::ops::launch::Launcher;
use bytemuck::{Pod, Zeroable};

/// Threads of a block, and its warps: THREADS of `kernels/image.cuh`.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Most groups of a slab, and most channels of a group: MAX_GROUPS of `kernels/group_norm.cuh`.
const MAX_GROUPS: usize = 256;
/// Most vectors of a slab's row of the kernel that sums over rows within a warp.
const MAX_WARP_VECTORS: usize = 32;
/// Shared memory that a block may have on every GPU from sm_80 on.
const SHARED: usize = 99 << 10;
/// Blocks wanted where rows may be shared out between blocks.
const FULL: usize = 512;
/// Rows of a part of S1 and S2.
const PART_ROWS: usize = 128;
/// Largest count of pixels, channels or parts; the kernels count in 32 bits.
const LIMIT: usize = 1 << 30;

/// Norm of `kernels/group_norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Norm {
    x: [Ptr; 2],
    sums: [Ptr; 2],
    gamma: Ptr,
    beta: Ptr,
    scale_shift: Ptr,
    mean: Ptr,
    rstd: Ptr,
    control: Ptr,
    parts: [Parts; 2],
    channels: [i32; 2],
    n: i32,
    s: i32,
    groups: i32,
    width: i32,
    row_stride: i32,
    silu: i32,
    slab: i32,
    slabs: i32,
    chunks: i32,
    chunk_rows: i32,
    eps: f32,
    keep: f32,
    threshold: u32,
    op: u32,
    first_image: u32,
    unused: u32,
    per_element: f64,
}

/// NormGradient of `kernels/group_norm_backward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct NormGradient {
    f: Norm,
    dy: Ptr,
    dx: [Ptr; 2],
    add: [Ptr; 2],
    totals: Ptr,
    partial: Ptr,
    parts: i32,
    part_rows: i32,
}

/// Whether activations `vals` of the op called `name` are bf16 rather than f32.
///
/// # Errors
/// [`Error::Device`] for a mixture of types or sizes that no kernel covers.
pub fn check(name: &str, g: &Graph, vals: impl IntoIterator<Item = Val>, s: &GroupNormShape) -> Result<bool> {
    let no = |what: String| Err(Error::Device(format!("{name}: no kernel for {what}, in {s:?}; use --device cpu")));
    let mut half = None;
    for v in vals {
        let bf16 = match g[v].dtype {
            DType::F32 => false,
            DType::Bf16 => true,
            other => return no(format!("{} of type {other:?}", g[v].name)),
        };
        if *half.get_or_insert(bf16) != bf16 {
            return no(format!("{} of type {:?} among others of another", g[v].name, g[v].dtype));
        }
    }
    let c = s.c();
    if s.groups == 0 || !c.is_multiple_of(s.groups) || c == 0 {
        return no(format!("{c} channels, which do not divide into {} groups", s.groups));
    }
    if s.group_channels() > MAX_GROUPS {
        return no(format!("groups of {} channels (at most {MAX_GROUPS})", s.group_channels()));
    }
    let largest = (s.n * s.s).max(c * 8);
    if largest > LIMIT {
        return no(format!("{largest} pixels or channels (at most {LIMIT})"));
    }
    Ok(half.expect("an op has activations"))
}

/// Elements of a vector, or 1, with the bytes of an element and the suffix of the kernels.
#[derive(Clone, Copy)]
struct Lane {
    n: usize,
    bytes: usize,
    suffix: &'static str,
}

impl Lane {
    fn new(s: &GroupNormShape, half: bool) -> Self {
        let bytes = if half { 2 } else { 4 };
        let wide = [s.ca, s.cb].iter().all(|c| c.is_multiple_of(16 / bytes));
        let suffix = match (half, wide) {
            (true, true) => "bf16",
            (true, false) => "bf16_any",
            (false, true) => "f32",
            (false, false) => "f32_any",
        };
        Lane { n: if wide { 16 / bytes } else { 1 }, bytes, suffix }
    }

    /// Channels of a block of the kernels that sum over rows.
    fn sums_slab(&self) -> usize {
        self.n * if self.n == 1 { 32 } else { 8 }
    }

    /// Widths of a slab of whole groups, best first: whole sectors, whole vectors.
    fn slabs(&self, s: &GroupNormShape) -> [usize; 2] {
        let width = s.group_channels();
        let common = |m: usize| width / gcd(width, m) * m;
        if self.n == 1 { [width * 16usize.div_ceil(width), width] } else { [common(32 / self.bytes), common(self.n)] }
    }

    /// `slab` times what gives every thread a vector, with at most `most` vectors in a row and for which `fits` holds.
    fn widened(&self, s: &GroupNormShape, slab: usize, most: usize, fits: impl Fn(usize) -> bool) -> usize {
        let vectors = slab / self.n;
        let wanted = THREADS.div_ceil(s.s * vectors).min(most / vectors).min(s.c().div_ceil(slab));
        let times = |m: &usize| m * slab / s.group_channels() <= MAX_GROUPS && fits(m * slab);
        (1..=wanted).rev().find(times).unwrap_or(1) * slab
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Norm {
    fn new(f: &GroupNorm, m: &Launcher) -> Self {
        let s = &f.shape;
        let rows = f.scale_shift;
        let dropout = |d: DropoutStep| d.with(0, 0);
        let (threshold, keep) = f.dropout.map(dropout).map_or((0, 1.0), |d| (d.threshold(), d.scale()));
        Norm {
            x: both(m, f.x),
            gamma: m.ptr(f.gamma),
            beta: m.ptr(f.beta),
            scale_shift: rows.map_or(Ptr::NULL, |(v, col)| m.ptr(v).offset(col * m.graph[v].dtype.bytes())),
            row_stride: rows.map_or(0, |(v, _)| int(m.graph.shape(v).c)),
            mean: m.ptr(f.mean),
            rstd: m.ptr(f.rstd),
            control: m.optional(f.dropout.map(|d| d.control)),
            channels: [int(s.ca), int(s.cb)],
            n: int(s.n),
            s: int(s.s),
            groups: int(s.groups),
            width: int(s.group_channels()),
            silu: i32::from(s.silu),
            eps: s.eps,
            keep,
            threshold,
            op: f.dropout.map_or(0, |d| d.op),
            first_image: f.dropout.map_or(0, |d| d.first_image),
            per_element: 1.0 / (s.s * s.group_channels()) as f64,
            ..Self::default()
        }
    }

    /// Cuts channels into slabs and rows into chunks, as many as give [`FULL`] blocks of at least four vectors a thread.
    fn cut(&mut self, s: &GroupNormShape, lane: Lane) -> usize {
        let [best, other] = lane.slabs(s);
        let slab = if best <= THREADS * lane.n { best } else { other };
        let slab = lane.widened(s, slab, THREADS, |_| true);
        let (slabs, least) = (s.c().div_ceil(slab), (4 * THREADS).div_ceil(slab / lane.n));
        let chunks = FULL.div_ceil(s.n * slabs).min(s.s.div_ceil(least)).max(1);
        let rows = s.s.div_ceil(chunks);
        (self.slab, self.slabs, self.chunk_rows, self.chunks) =
            (int(slab), int(slabs), int(rows), int(s.s.div_ceil(rows)));
        s.n * slabs * s.s.div_ceil(rows)
    }
}

/// Addresses of both parts of a source.
fn both(m: &Launcher, x: Source) -> [Ptr; 2] {
    [m.ptr(x.a), m.optional(x.b)]
}

impl Launcher<'_> {
    /// Starts a group norm kernel, one block for each of `items` or fewer that stride over them.
    fn norm(&self, kernel: &str, items: usize, shared: usize, args: &[Arg]) -> Result<()> {
        let blocks = u32::try_from(items.min(self.blocks)).unwrap_or(u32::MAX);
        let launch = Launch::new([blocks, 1, 1], [THREADS as u32, 1, 1]).shared(shared);
        self.driver.launch(kernel, launch, args)
    }
}

/// Bytes of scratch memory for the statistics of the parts of each source, 0 where they come with it.
fn sums_bytes(f: &GroupNorm) -> [usize; 2] {
    let parts = f.shape.n * Parts::of_image(f.shape.s).parts();
    let bytes = |i: usize, channels: usize| if f.sums[i].is_some() { 0 } else { parts * 2 * channels * 4 };
    [bytes(0, f.shape.ca), bytes(1, f.shape.cb)].map(|bytes| bytes.next_multiple_of(ALIGN))
}

/// Bytes of scratch memory of the forward.
pub fn forward_workspace(f: &GroupNorm) -> usize {
    sums_bytes(f).iter().sum()
}

/// Statistics of the parts where x comes without, then y.
///
/// # Errors
/// When a launch is refused.
pub fn forward(f: &GroupNorm, half: bool, m: &Launcher) -> Result<()> {
    let s = &f.shape;
    if s.n * s.s == 0 {
        return Ok(());
    }
    let (lane, mut p) = (Lane::new(s, half), Norm::new(f, m));
    let items = p.cut(s, lane);
    let places = [m.workspace, m.workspace.offset(sums_bytes(f)[0])];
    for (i, channels) in [s.ca, s.cb].into_iter().enumerate().filter(|&(_, channels)| channels > 0) {
        if let Some((sums, parts)) = f.sums[i] {
            (p.sums[i], p.parts[i]) = (m.ptr(sums), parts);
            continue;
        }
        let parts = Parts::of_image(s.s);
        (p.sums[i], p.parts[i]) = (places[i], parts);
        let items = s.n * parts.parts() * channels.div_ceil(lane.sums_slab());
        let args = args![p.sums[i], p.x[i], Arg::Struct(bytemuck::bytes_of(&parts)), p.n, p.channels[i]];
        m.norm(&format!("group_norm_sums_{}", lane.suffix), items, 0, args)?;
    }
    let args = args![m.ptr(f.y), Arg::Struct(bytemuck::bytes_of(&p))];
    m.norm(&format!("group_norm_apply_{}", lane.suffix), items, 3 * channel_floats(p.slab), args)
}

/// Shared memory for a float of each channel of a slab.
fn channel_floats(slab: i32) -> usize {
    (slab as usize * 4).next_multiple_of(128)
}

/// Shared memory of a block that keeps `slab` channels of x and dy.
fn resident_bytes(s: &GroupNormShape, lane: Lane, slab: usize) -> usize {
    let round = |bytes: usize| bytes.next_multiple_of(128);
    let (sums, means) = (WARPS * 2 * slab * 4, 2 * slab / s.group_channels() * 4);
    2 * round(s.s * slab * lane.bytes) + round(sums) + round(means) + round(4 * slab * 4)
}

/// The widest slab of x and dy that a block can keep, if any.
fn resident_slab(s: &GroupNormShape, lane: Lane) -> Option<usize> {
    let fits = |slab: usize| resident_bytes(s, lane, slab) <= SHARED;
    let slab = lane.slabs(s).into_iter().find(|&slab| slab / lane.n <= MAX_WARP_VECTORS && fits(slab))?;
    Some(lane.widened(s, slab, MAX_WARP_VECTORS, fits))
}

/// Scratch memory of the backward: S1 and S2 of each image, and of its parts where x is read twice.
pub fn backward_workspace(b: &GroupNormBackward, half: bool) -> usize {
    let s = &b.forward.shape;
    let parts = if resident_slab(s, Lane::new(s, half)).is_some() { 0 } else { s.s.div_ceil(PART_ROWS) };
    (1 + parts) * (s.n * 2 * s.c() * 4).next_multiple_of(ALIGN)
}

/// dx, then the gradients of the parameters.
///
/// # Errors
/// When a launch is refused.
pub fn backward(b: &GroupNormBackward, half: bool, m: &Launcher) -> Result<()> {
    let (f, s) = (&b.forward, &b.forward.shape);
    let lane = Lane::new(s, half);
    let mut p = NormGradient {
        f: Norm::new(f, m),
        dy: m.ptr(b.dy),
        dx: both(m, b.dx),
        add: b.add.map(|v| m.optional(v)),
        totals: m.workspace,
        partial: m.workspace.offset((s.n * 2 * s.c() * 4).next_multiple_of(ALIGN)),
        parts: int(s.s.div_ceil(PART_ROWS)),
        part_rows: int(PART_ROWS),
    };
    let kernel = |pass: &str| format!("group_norm_backward_{pass}_{}", lane.suffix);
    if let Some(slab) = resident_slab(s, lane) {
        let slabs = s.c().div_ceil(slab);
        (p.f.slab, p.f.slabs) = (int(slab), int(slabs));
        let args = args![Arg::Struct(bytemuck::bytes_of(&p))];
        m.norm(&kernel("resident"), s.n * slabs, resident_bytes(s, lane, slab), args)?;
    } else {
        let items = p.f.cut(s, lane);
        let args = args![Arg::Struct(bytemuck::bytes_of(&p))];
        m.norm(&kernel("sums"), s.n * p.parts as usize * s.c().div_ceil(lane.sums_slab()), 0, args)?;
        // S1 and S2, two means of each group, four numbers of each channel.
        m.norm(&kernel("apply"), items, 8 * channel_floats(p.f.slab), args)?;
    }
    let (rows, stride) = b
        .dscale_shift
        .map_or((Ptr::NULL, 0), |(v, col)| (m.ptr(v).offset(col * m.graph[v].dtype.bytes()), int(m.graph.shape(v).c)));
    let grid = Launch::new([s.c().div_ceil(32) as u32, 1, 1], [32, 8, 1]);
    let (gamma, beta) = (m.ptr(b.dgamma), m.ptr(b.dbeta));
    let args = args![gamma, beta, rows, Arg::Struct(bytemuck::bytes_of(&p)), stride, i32::from(b.accumulate)];
    m.driver.launch(if half { "group_norm_parameters_bf16" } else { "group_norm_parameters_f32" }, grid, args)
}
