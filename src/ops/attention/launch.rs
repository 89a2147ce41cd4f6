//! Attention on CUDA: which kernel for which shape.
//!
//! bf16 heads of up to 192 channels, in eights, go through kernels that keep a head's rows in shared memory and its sums in registers,
//! built for the widths `WIDTHS`; other bf16 heads and f32 through kernels that make the result slice by slice. The choice depends on
//! the shape alone, and so does the order of every sum.

use super::{AttentionShape, QkvOrder};
use crate::device::driver::{Arg, Driver, Launch, Ptr};
use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Val};
use bytemuck::{Pod, Zeroable};

/// Widths of a head that kernels are built for; others are padded with zeros to the next.
const WIDTHS: [usize; 6] = [32, 64, 96, 128, 144, 192];
/// Widest head of the gradient with 128 rows to a block: shared memory ends there.
const WIDEST_128: usize = 128;
/// From this width on dk and dv are found by different blocks: the registers do not hold both.
const APART: usize = 128;
/// Blocks that fill a large GPU once: below, tiles of 128 rows become tiles of 64.
pub const FULL: usize = 128;
/// Most tokens times channels of an image, and most blocks; the kernels count in 32 bits.
const LIMIT: usize = 1 << 30;

/// Argument of the kernels: Attention of `kernels/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Sizes {
    tokens: i32,
    heads: i32,
    d: i32,
    pairs: i32,
    part_step: i32,
    head_step: i32,
    scale: f32,
    unused: i32,
}

impl Sizes {
    fn new(s: &AttentionShape) -> Self {
        let (part_step, head_step) = match s.order {
            QkvOrder::Legacy => (s.d, 3 * s.d),
            QkvOrder::New => (s.c(), s.d),
        };
        let [tokens, heads, d, pairs, part_step, head_step] =
            [s.s, s.heads, s.d, s.n * s.heads, part_step, head_step].map(|n| n as i32);
        Sizes { tokens, heads, d, pairs, part_step, head_step, scale: s.scale() as f32, unused: 0 }
    }
}

/// Whether an op called `name` computes in bf16: the one type of its activations `vals`.
///
/// # Errors
/// [`Error::Device`] for a mixture that no kernel covers, or sizes beyond what they count.
pub fn is_half(name: &str, g: &Graph, vals: &[Val], s: &AttentionShape) -> Result<bool> {
    let no = |what: String| Err(Error::Device(format!("{name}: no kernel for {what}, in {s:?}; use --device cpu")));
    let dtype = g[vals[0]].dtype;
    for &v in vals {
        if g[v].dtype != dtype || !matches!(dtype, DType::F32 | DType::Bf16) {
            return no(format!("{} of type {:?} beside {} of type {dtype:?}", g[v].name, g[v].dtype, g[vals[0]].name));
        }
    }
    let largest = (s.s * 3 * s.c()).max(s.n * s.heads * s.s * s.d.div_ceil(64));
    if s.n * s.s * s.c() == 0 || largest > LIMIT {
        return no(format!("{largest} channels of an image or rows of heads (1 to {LIMIT})"));
    }
    Ok(dtype == DType::Bf16)
}

/// How a pass is cut: kernel, grid, threads, shared memory.
struct Cut {
    kernel: String,
    blocks: usize,
    threads: u32,
    shared: usize,
}

impl Cut {
    /// The kernel for a shape; tiles of 128 rows where they give `full` blocks.
    fn new(s: &AttentionShape, half: bool, backward: bool, full: usize) -> Self {
        let pairs = s.n * s.heads;
        let width = WIDTHS.into_iter().find(|&w| half && s.d.is_multiple_of(8) && s.d <= w);
        let Some(width) = width else {
            let (kernel, rows, slice) = if half { ("any", 64, 128) } else { ("f32", 32, 64) };
            let blocks = pairs * s.s.div_ceil(rows) * s.d.div_ceil(slice) * if backward { 3 } else { 1 };
            return Cut { kernel: kernel.into(), blocks, threads: 128, shared: 0 };
        };
        // Kinds of blocks, tiles that rest and tiles that pass, of 2-byte values; statistics of the rows that pass.
        let kinds = match (backward, width >= APART) {
            (false, _) => 1,
            (true, false) => 2,
            (true, true) => 3,
        };
        let wide = s.s > 64 && pairs * s.s.div_ceil(128) * kinds >= full && !(backward && width > WIDEST_128);
        let (rows, teams) = if s.s <= 16 {
            (16, 4)
        } else if wide {
            (128, 1)
        } else {
            (64, 1)
        };
        let stream = match (rows, backward, width) {
            (16, ..) | (_, true, 145..) => 16,
            (_, true, _) | (_, _, 65..) => 32,
            _ => 64,
        };
        let stages = if rows == 16 { 1 } else { 2 };
        let tiles = (if backward { 2 } else { 1 } * rows + 2 * stages * stream) * width * 2;
        let statistics = if backward { stages * 2 * stream * 4 } else { 0 };
        Cut {
            kernel: format!("{rows}x{width}"),
            blocks: pairs.div_ceil(teams) * kinds * s.s.div_ceil(rows),
            threads: (rows * 2 * teams) as u32,
            shared: teams * (tiles + statistics),
        }
    }

    fn launch(&self, d: &Driver, pass: &str, args: &[Arg]) -> Result<()> {
        let blocks = u32::try_from(self.blocks).unwrap_or(u32::MAX);
        let launch = Launch::new([blocks, 1, 1], [self.threads, 1, 1]).shared(self.shared);
        d.launch(&format!("{pass}_{}", self.kernel), launch, args)
    }
}

/// Addresses of the forward pass; see [`super::Attention`].
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// Result.
    pub out: Ptr,
    /// Logarithms of the softmax denominators, f32.
    pub lse: Ptr,
    /// Queries, keys and values.
    pub qkv: Ptr,
}

/// out and lse from qkv, in bf16 if `half`, else f32.
/// `full`: blocks wanted, [`FULL`] but in tests.
///
/// # Errors
/// When a launch is refused.
pub fn forward(d: &Driver, s: &AttentionShape, half: bool, full: usize, f: &Forward) -> Result<()> {
    let sizes = Sizes::new(s);
    let sizes = Arg::Struct(bytemuck::bytes_of(&sizes));
    Cut::new(s, half, false, full).launch(d, "attention_forward", &[f.out.into(), f.lse.into(), f.qkv.into(), sizes])
}

/// Addresses of the backward pass; see [`super::AttentionBackward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    /// Gradient of qkv.
    pub dqkv: Ptr,
    /// Gradient of out.
    pub dout: Ptr,
    /// Queries, keys and values.
    pub qkv: Ptr,
    /// Result of the forward pass.
    pub out: Ptr,
    /// Logarithms of the softmax denominators, f32.
    pub lse: Ptr,
}

/// Bytes of scratch memory of the backward pass: dout·out of each row and head.
pub fn backward_workspace(s: &AttentionShape) -> usize {
    s.n * s.heads * s.s * 4
}

/// dqkv from dout, qkv, out and lse.
/// `full`: blocks wanted, [`FULL`] but in tests.
///
/// # Errors
/// When a launch is refused.
pub fn backward(d: &Driver, s: &AttentionShape, half: bool, full: usize, b: &Backward, workspace: Ptr) -> Result<()> {
    let sizes = Sizes::new(s);
    let sizes = Arg::Struct(bytemuck::bytes_of(&sizes));
    let delta = if half { "attention_delta_bf16" } else { "attention_delta_f32" };
    let rows = Launch::over(s.n * s.heads * s.s * 8, 256);
    d.launch(delta, rows, &[workspace.into(), b.dout.into(), b.out.into(), sizes])?;
    let args = [b.dqkv.into(), b.dout.into(), b.qkv.into(), b.lse.into(), workspace.into(), sizes];
    Cut::new(s, half, true, full).launch(d, "attention_backward", &args)
}
