//! Convolutions on CUDA: which kernel and tile for which shape, and the scratch memory between them.
//!
//! bf16 tensors go through tensor cores, f32 ones through plain multiply-adds. Channel counts that are multiples of 8 (each
//! source's own) are copied in blocks; others take the kernels `_any`. All choices depend on the shape alone, never on the
//! GPU, so that the order of every sum, and with it every bit, is the same everywhere.

use super::ConvShape;
use super::geometry::{ConvGemm, ConvWeight};
use crate::args;
use crate::device::driver::{Driver, Launch, Ptr};
use crate::error::{Error, Result};
use crate::graph::{ALIGN, DType, Graph, Val};
use crate::ops::group_norm::Parts;

/// Blocks that fill a large GPU once: tiles shrink until there are as many; weight gradients are split into fewer than twice as many.
pub const FULL: usize = 128;
/// Most blocks along the pixels of a weight gradient.
const MAX_SPLITS: usize = 128;
/// Fewest runs of 16 pixels for one of them.
const MIN_RUNS: usize = 16;
/// Stages of 32 values of k of the bf16 kernels: STAGES and BK of `kernels/conv2d_mma.cuh`.
const STAGE_ROW_BYTES: usize = 4 * 32 * 2;
/// Largest count of pixels, columns or products along k; the kernels count in 32 bits.
const LIMIT: usize = 1 << 30;

/// A kernel's tile: name, rows, columns, threads.
struct Tile(&'static str, usize, usize, u32);

/// The tensors an op touches, as the kernels need to know them.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    /// Activations and their gradients are bf16, otherwise f32.
    pub half: bool,
    /// So are the weights the op reads; f32 weights are rounded first where `half`.
    pub half_weights: bool,
}

impl Types {
    /// Types of an op called `name` on activations `vals` with weights `w`.
    ///
    /// # Errors
    /// [`Error::Device`] for a mixture that no kernel covers, or sizes beyond what they count.
    pub fn of(
        name: &str,
        g: &Graph,
        vals: impl IntoIterator<Item = Val>,
        w: Option<Val>,
        s: &ConvShape,
    ) -> Result<Self> {
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
        let half = half.expect("an op has activations");
        let half_weights = w.map_or(half, |w| g[w].dtype == DType::Bf16);
        if half_weights && !half {
            return no("bf16 weights with f32 activations".into());
        }
        let taps = if s.upsample { 16 } else { s.k * s.k };
        let largest = s.in_pixels().max(s.out_pixels()).max(taps * s.c().max(s.oc)) + 4096;
        if s.n * s.h * s.w == 0 || largest > LIMIT {
            return no(format!("{largest} pixels or products (1 to {LIMIT})"));
        }
        Ok(Types { half, half_weights })
    }

    fn bytes(self) -> usize {
        if self.half { 2 } else { 4 }
    }

    fn suffix(self) -> &'static str {
        if self.half { "bf16" } else { "f32" }
    }
}

/// Elements of the weights as the kernels read them.
fn prepared_len(s: &ConvShape) -> usize {
    s.oc * s.c() * if s.upsample { 16 } else { s.k * s.k }
}

/// Bytes of scratch memory of the forward convolution and the data gradient: weights folded or rounded.
pub fn weights_workspace(s: &ConvShape, t: Types) -> usize {
    if s.upsample || t.half != t.half_weights { prepared_len(s) * t.bytes() } else { 0 }
}

/// The weights as the kernels read them: folded, rounded or as they are.
fn prepare_weights(d: &Driver, s: &ConvShape, t: Types, w: Ptr, workspace: Ptr) -> Result<Ptr> {
    if weights_workspace(s, t) == 0 {
        return Ok(w);
    }
    let (len, rounds) = (prepared_len(s), t.half != t.half_weights);
    let launch = Launch::over(len, 256);
    if s.upsample {
        let kernel = if rounds { "master" } else { t.suffix() };
        d.launch(&format!("conv2d_fold_{kernel}"), launch, args![workspace, w, len as i64, s.c() as i32])?;
    } else {
        d.launch("conv2d_round_weights", launch, args![workspace, w, len as i64])?;
    }
    Ok(workspace)
}

/// Addresses of a forward convolution; see [`super::Conv2d`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Forward {
    /// Result.
    pub y: Ptr,
    /// Both parts of the input.
    pub x: [Ptr; 2],
    /// Weights.
    pub w: Ptr,
    /// Bias, f32, or none.
    pub bias: Ptr,
    /// Per-image addend or none, and the elements from one row to the next.
    pub shift: (Ptr, usize),
    /// Addend of the shape of y, or none.
    pub residual: Ptr,
    /// Statistics of the parts of y, or none.
    pub sums: Ptr,
}

/// y = conv(x, w) + bias + shift + residual.
/// `full`: blocks wanted, [`FULL`] but in tests.
///
/// # Errors
/// When a launch is refused.
pub fn forward(d: &Driver, s: &ConvShape, t: Types, full: usize, f: &Forward, workspace: Ptr) -> Result<()> {
    let mut p = ConvGemm::forward(s);
    (p.a, p.w) = (f.x, prepare_weights(d, s, t, f.w, workspace)?);
    (p.out, p.add) = ([f.y, Ptr::NULL], [f.residual, Ptr::NULL]);
    (p.bias, p.shift, p.shift_stride) = (f.bias, f.shift.0, f.shift.1 as i32);
    (p.sums, p.phase_parts) = (f.sums, Parts::of_conv(s).phase_parts() as i32);
    gemm(d, "conv2d_forward", t, full, p)
}

/// Addresses of a data gradient; see [`super::Conv2dBackwardData`].
#[derive(Clone, Copy, Debug, Default)]
pub struct BackwardData {
    /// Gradients of both parts of the input.
    pub dx: [Ptr; 2],
    /// Gradient of the result.
    pub dy: Ptr,
    /// Weights.
    pub w: Ptr,
    /// Addends to `dx`, or none.
    pub add: [Ptr; 2],
}

/// dx = convᵀ(dy, w) + add.
/// `full`: blocks wanted, [`FULL`] but in tests.
///
/// # Errors
/// When a launch is refused.
pub fn backward_data(d: &Driver, s: &ConvShape, t: Types, full: usize, b: &BackwardData, workspace: Ptr) -> Result<()> {
    let mut p = ConvGemm::backward_data(s);
    (p.a, p.w) = ([b.dy, Ptr::NULL], prepare_weights(d, s, t, b.w, workspace)?);
    (p.out, p.add) = (b.dx, b.add);
    gemm(d, "conv2d_backward_data", t, full, p)
}

fn gemm(d: &Driver, name: &str, t: Types, full: usize, mut p: ConvGemm) -> Result<()> {
    let tile = gemm_tile(&p, t, full);
    let tiles_n = p.columns().div_ceil(tile.2);
    p.tiles_n = tiles_n as i32;
    launch(d, name, &tile, t, [p.rows().div_ceil(tile.1) * tiles_n, 1, p.phases()], args![&p])
}

/// The largest tile that still fills the GPU, or the smallest.
fn gemm_tile(p: &ConvGemm, t: Types, full: usize) -> Tile {
    let columns = p.columns();
    if !t.half {
        return if columns <= 32 { Tile("f32_narrow", 64, 32, 64) } else { Tile("f32", 64, 64, 64) };
    }
    if !p.in_eights() {
        return Tile("any", 64, 64, 128);
    }
    if columns <= 32 {
        return Tile("128x32", 128, 32, 128);
    }
    let fills = |t: &Tile| p.rows().div_ceil(t.1) * columns.div_ceil(t.2) * p.phases() >= full;
    let wasteful = |t: &Tile| columns.div_ceil(t.2) * t.2 > columns.next_multiple_of(64);
    [Tile("128x128", 128, 128, 128), Tile("128x64", 128, 64, 128), Tile("64x64", 64, 64, 128)]
        .into_iter()
        .find(|t| fills(t) && !wasteful(t))
        .unwrap_or(Tile("32x64", 32, 64, 128))
}

fn launch(
    d: &Driver,
    name: &str,
    tile: &Tile,
    t: Types,
    grid: [usize; 3],
    args: &[crate::device::driver::Arg],
) -> Result<()> {
    let &Tile(kernel, rows, columns, threads) = tile;
    let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let shared = if t.half { (rows + columns) * STAGE_ROW_BYTES } else { 0 };
    d.launch(&format!("{name}_{kernel}"), Launch::new(grid, [threads, 1, 1]).shared(shared), args)
}

/// Addresses of a weight gradient; see [`super::Conv2dBackwardWeight`].
#[derive(Clone, Copy, Debug, Default)]
pub struct BackwardWeight {
    /// Gradient of the weights, f32.
    pub dw: Ptr,
    /// Gradient of the bias, f32, or none.
    pub db: Ptr,
    /// Gradient of the shift or none, and the elements from one row to the next.
    pub dshift: (Ptr, usize),
    /// Gradient of the result.
    pub dy: Ptr,
    /// Both parts of the input.
    pub x: [Ptr; 2],
    /// Add to `dw` and `db`.
    pub accumulate: bool,
}

/// How a weight gradient is cut.
struct WeightPlan {
    p: ConvWeight,
    tile: Tile,
    grid: [usize; 3],
    splits: usize,
    parts: usize,
    /// Bytes of partial sums; none where the kernel writes dw itself.
    partial: usize,
    /// Bytes of row sums.
    sums: usize,
}

impl WeightPlan {
    fn new(s: &ConvShape, t: Types, full: usize) -> Self {
        let mut p = ConvWeight::new(s);
        let (y8, x8) = (s.oc.is_multiple_of(8), s.ca.is_multiple_of(8) && s.cb.is_multiple_of(8));
        let taps = if s.upsample { 16 } else { s.k * s.k };
        // Many narrow tiles would waste more than counting columns through taps and channels costs.
        let flat = !s.upsample && if t.half { !x8 } else { !s.c().is_multiple_of(32) };
        let area =
            |side: usize| s.oc.next_multiple_of(side) * (s.ca.next_multiple_of(side) + s.cb.next_multiple_of(side));
        let tile = match (t.half, y8, x8) {
            (false, ..) if flat && taps * s.c() <= 32 || !flat && s.ca.max(s.cb) <= 32 => {
                Tile("f32_narrow", 64, 32, 64)
            }
            (false, ..) => Tile("f32", 64, 64, 64),
            (_, true, true) if area(128) * 5 <= area(64) * 6 => Tile("128x128", 128, 128, 128),
            (_, true, true) => Tile("64x64", 64, 64, 128),
            (_, false, true) => Tile("any_y", 64, 64, 128),
            (_, true, false) => Tile("any_x", 64, 64, 128),
            (_, false, false) => Tile("any", 64, 64, 128),
        };
        let tiles_a = s.ca.div_ceil(tile.2);
        let tiles_tap = tiles_a + s.cb.div_ceil(tile.2);
        let tiles_n = if flat { (taps * s.c()).div_ceil(tile.2) } else { taps * tiles_tap };
        let tiles = s.oc.div_ceil(tile.1) * tiles_n;
        // Two blocks share a multiprocessor. One block too many would leave all others waiting for the few with three.
        let splits = ((2 * full - 1) / tiles).min(s.n * p.runs() / MIN_RUNS).clamp(1, MAX_SPLITS);
        let parts = splits.div_ceil(s.n).min(p.runs());
        p.cut(s.n, parts, splits);
        let splits = p.splits();
        (p.flat, p.tiles_a, p.tiles_tap, p.tiles_n) =
            (i32::from(flat), tiles_a as i32, tiles_tap as i32, tiles_n as i32);
        let partial = if splits > 1 || s.upsample { splits * p.len() * 4 } else { 0 };
        let sums = p.slots() * p.segments as usize * s.oc * 4;
        WeightPlan { p, tile, grid: [tiles, splits, 1], splits, parts, partial: partial.next_multiple_of(ALIGN), sums }
    }
}

/// Bytes of scratch memory of the weight gradient: partial sums and row sums.
pub fn backward_weight_workspace(s: &ConvShape, t: Types, full: usize) -> usize {
    let plan = WeightPlan::new(s, t, full);
    plan.partial + plan.sums
}

/// dw, db and dshift from dy and x; dw and db are added to with `accumulate`.
/// `full`: blocks wanted, [`FULL`] but in tests.
///
/// # Errors
/// When a launch is refused.
pub fn backward_weight(
    d: &Driver,
    s: &ConvShape,
    t: Types,
    full: usize,
    b: &BackwardWeight,
    workspace: Ptr,
) -> Result<()> {
    let WeightPlan { mut p, tile, grid, splits, parts, partial, .. } = WeightPlan::new(s, t, full);
    let (summed, accumulate) = (b.db != Ptr::NULL || b.dshift.0 != Ptr::NULL, i32::from(b.accumulate));
    let sums = workspace.offset(partial);
    (p.dy, p.x, p.split_stride) = (b.dy, b.x, p.len() as i64);
    p.sums = if summed { sums } else { Ptr::NULL };
    (p.dw, p.accumulate) = if partial > 0 { (workspace, 0) } else { (b.dw, accumulate) };
    launch(d, "conv2d_backward_weight", &tile, t, grid, args![&p])?;
    if partial > 0 {
        let (len, fold) = (s.weights(), i32::from(s.upsample));
        let args = args![b.dw, workspace, splits as i32, p.split_stride, len as i64, s.c() as i32, fold, accumulate];
        d.launch("conv2d_weight_reduce", Launch::over(len, 256), args)?;
    }
    if summed {
        let sizes = [p.slots(), s.n, parts, s.oc, b.dshift.1].map(|n| n as i32);
        let [slots, images, parts, oc, stride] = sizes;
        let args = args![b.db, b.dshift.0, sums, slots, images, parts, oc, stride, accumulate];
        let grid = [s.oc.div_ceil(32) as u32, 1, 1];
        d.launch(&format!("conv2d_row_sums_{}", t.suffix()), Launch::new(grid, [32, 8, 1]), args)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The levels of a network at batch 128: blocks for most of the places of a GPU, two to a multiprocessor, and never one too many.
    #[test]
    fn weight_gradients_fill_a_gpu_without_a_rest() {
        for (side, c, oc, k) in [
            (32, 128, 128, 3),
            (32, 384, 128, 3),
            (16, 256, 256, 3),
            (16, 512, 256, 3),
            (8, 256, 256, 3),
            (16, 512, 256, 1),
        ] {
            let s = ConvShape { n: 128, h: side, w: side, ca: c, cb: 0, oc, k, stride: 1, upsample: false, pad: k / 2 };
            let [tiles, splits, _] = WeightPlan::new(&s, Types { half: true, half_weights: true }, FULL).grid;
            let blocks = tiles * splits;
            assert!((3 * FULL / 2..2 * FULL).contains(&blocks), "{s:?}: {tiles} tiles in {splits} splits");
        }
    }
}
