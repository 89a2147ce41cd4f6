//! Group normalisation with scale-shift, SiLU and dropout. A job is some whole groups of one image, few enough for its
//! passes to run in cache.
//!
//! Forward: sums, centred sums (with the correction Σ(x − m̂) of the first mean), then `u = (x − m̂)·a + b` and SiLU.
//! Backward: one pass writes `dz` where dx will stand and sums `dz` and `dz·(x − mean)` per channel, from which
//! everything else follows; the second is `dx = a·dz + f·(x − mean) + g`.

use super::columns::{Columns, centred_sums, column_sums};
use super::dropout;
use super::parallel::{Disjoint, for_each_job, part};
use super::simd::{Isa, Kernel, Vector};
use crate::ops::group_norm::GroupNormShape;
use crate::ops::view::{Cat, Rows, RowsMut};
use std::ops::Range;

/// Values per channel and image that the forward keeps in scratch.
const FORWARD: usize = 5;
/// Values per channel and image that the backward keeps in scratch.
const BACKWARD: usize = 8;
/// Values of one tensor that a job should not exceed.
const RESIDENT: usize = 48 << 10;

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(s: &GroupNormShape) -> usize {
    FORWARD * s.n * s.c()
}

/// Floats of scratch that [`backward`] needs.
pub fn backward_scratch(s: &GroupNormShape) -> usize {
    BACKWARD * s.n * s.c()
}

/// Channels per job: whole groups and, as far as that goes, whole cache lines; all of them if a mask is to be drawn
/// for the image.
fn block(s: &GroupNormShape) -> usize {
    let line = (1..=16).map(|i| i * s.group_channels()).find(|c| c % 16 == 0).unwrap_or(s.c());
    let lines = (RESIDENT / (s.s * line)).min(s.n * s.c() / (8 * line)).max(1);
    if s.dropout.is_some() { s.c() } else { (line * lines).min(s.c()) }
}

/// What both directions read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    x: Cat<'a>,
    gamma: &'a [f32],
    beta: &'a [f32],
    scale_shift: Option<Rows<'a>>,
    s: &'a GroupNormShape,
}

/// The channels of one source that a job works on, for one image.
#[derive(Clone, Copy)]
struct Piece {
    /// 0 or 1.
    source: usize,
    /// First value within the source, and from one pixel to the next.
    start: usize,
    pitch: usize,
    /// Channels.
    width: usize,
    /// First channel, counted from the first of the job.
    at: usize,
}

impl Inputs<'_> {
    /// The parts of channels `c` of image `n` in the two sources, empty ones left out.
    #[inline(always)]
    fn pieces(&self, n: usize, c: &Range<usize>) -> impl Iterator<Item = Piece> + use<> {
        let Inputs { x, s, .. } = *self;
        let (c, pixels) = (c.clone(), s.s);
        [(0, 0, x.ca), (1, x.ca, x.cb)].into_iter().filter_map(move |(source, first, pitch)| {
            let (start, end) = (c.start.max(first), c.end.min(first + pitch));
            let at = start - c.start;
            let width = end.saturating_sub(start);
            (width > 0).then(|| Piece { source, start: n * pixels * pitch + start - first, pitch, width, at })
        })
    }

    /// Where the values of a piece are.
    #[inline(always)]
    fn columns(&self, piece: &Piece) -> Columns {
        let x = if piece.source == 0 { self.x.a } else { self.x.b };
        Columns { start: x[piece.start..].as_ptr(), rows: self.s.s, pitch: piece.pitch, width: piece.width }
    }

    /// 1 + scale and shift of channel `c` of image `n`.
    fn scale_shift(&self, n: usize, c: usize) -> (f64, f64) {
        let channels = self.s.c();
        self.scale_shift.map_or((1.0, 0.0), |rows| {
            let row = rows.row(n, 2 * channels);
            (1.0 + f64::from(row[c]), f64::from(row[channels + c]))
        })
    }

    /// `a` and `b` of u = (x − center)·a + b, where the mean is `center + off`.
    fn affine(&self, n: usize, c: usize, rstd: f64, off: f64) -> (f32, f32) {
        let (scale1, shift) = self.scale_shift(n, c);
        let a = rstd * f64::from(self.gamma[c]) * scale1;
        (a as f32, (f64::from(self.beta[c]) * scale1 + shift - off * a) as f32)
    }
}

/// Calls `f(image, channels)` for every job.
fn for_each_block(s: &GroupNormShape, f: impl Fn(usize, Range<usize>) + Sync + Send) {
    let blocks = s.c().div_ceil(block(s));
    for_each_job(s.n * blocks, |job| f(job / blocks, part(s.c(), block(s), job % blocks, blocks)));
}

/// The N rows of scratch of image `n`, cut to channels `c`.
///
/// # Safety
/// No other job has these channels.
unsafe fn rows<'a, const N: usize>(
    scratch: &Disjoint<'a>,
    n: usize,
    c: &Range<usize>,
    channels: usize,
) -> [&'a mut [f32]; N] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { scratch.slice((n * N + i) * channels + c.start, c.len()) })
}

fn total(x: &[f32]) -> f64 {
    x.iter().copied().map(f64::from).sum()
}

/// Fast twin of [`crate::ops::group_norm::forward_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn forward(
    isa: Isa,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    x: Cat,
    gamma: &[f32],
    beta: &[f32],
    scale_shift: Option<Rows>,
    s: &GroupNormShape,
    scratch: &mut [f32],
) {
    s.check(mean, rstd, gamma, beta);
    x.check(s.n * s.s, "group_norm");
    assert_eq!(y.len(), s.n * s.s * s.c(), "group_norm: length of y");
    let needed = forward_scratch(s);
    assert!(scratch.len() >= needed, "group_norm: {} floats of scratch, {needed} needed", scratch.len());
    let inputs = Inputs { x, gamma, beta, scale_shift, s };
    let [y, mean, rstd, scratch] = [y, mean, rstd, scratch].map(Disjoint::new);
    for_each_block(s, |n, c| {
        let (groups, first) = (c.len() / s.group_channels(), n * s.groups + c.start / s.group_channels());
        // SAFETY: these groups are this job's.
        unsafe {
            let (mean, rstd) = (mean.slice(first, groups), rstd.slice(first, groups));
            isa.run(Forward { inputs, n, y, mean, rstd, scratch: rows(&scratch, n, &c, s.c()), c });
        }
    });
}

/// Forward of some groups of one image.
struct Forward<'a> {
    inputs: Inputs<'a>,
    n: usize,
    c: Range<usize>,
    y: Disjoint<'a>,
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
    scratch: [&'a mut [f32]; FORWARD],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Forward { inputs, n, c, y, mean, rstd, scratch } = self;
        let s = inputs.s;
        let [center, a, b, sums, squares] = scratch;
        let (width, size) = (s.group_channels(), (s.s * s.group_channels()) as f64);
        for piece in inputs.pieces(n, &c) {
            // SAFETY: `columns` are those of the piece.
            unsafe { column_sums::<V>(&mut sums[piece.at..], inputs.columns(&piece)) };
        }
        for (center, sums) in center.chunks_exact_mut(width).zip(sums.chunks_exact(width)) {
            center.fill((total(sums) / size) as f32);
        }
        for piece in inputs.pieces(n, &c) {
            let (sums, squares) = (&mut sums[piece.at..], &mut squares[piece.at..]);
            // SAFETY: as above.
            unsafe { centred_sums::<V>(sums, squares, &center[piece.at..], inputs.columns(&piece)) };
        }
        for g in 0..mean.len() {
            let group = g * width..(g + 1) * width;
            let off = total(&sums[group.clone()]) / size;
            let variance = (total(&squares[group.clone()]) / size - off * off).max(0.0);
            let r = 1.0 / (variance + f64::from(s.eps)).sqrt();
            (mean[g], rstd[g]) = ((f64::from(center[group.start]) + off) as f32, r as f32);
            for i in group {
                (a[i], b[i]) = inputs.affine(n, c.start + i, r, off);
            }
        }
        for piece in inputs.pieces(n, &c) {
            // SAFETY: the pixels of image n and the channels of this piece are this job's part of y.
            unsafe {
                let y = y.at(n * s.s * s.c() + c.start + piece.at, piece.width);
                apply::<V>(y, s.c(), &[center, a, b], piece.at, inputs.columns(&piece), s.silu);
            }
        }
        if let Some(dropout) = &s.dropout {
            // SAFETY: with dropout a job has the whole image.
            dropout::apply(unsafe { y.slice(n * s.s * s.c(), s.s * s.c()) }, n, dropout);
        }
    }
}

/// `lanes` values from `at` on of each of some vectors.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn load_all<V: Vector, const N: usize>(from: &[&mut [f32]; N], at: usize, lanes: usize) -> [V; N] {
    let mut loaded = [V::splat(0.0); N];
    for (loaded, from) in loaded.iter_mut().zip(from) {
        // SAFETY: the caller's promise.
        *loaded = unsafe { V::load_first(from.as_ptr().add(at), lanes) };
    }
    loaded
}

/// `y = silu((x − center)·a + b)`; the coefficients of the columns start at `at`, rows of y are `pitch` apart.
///
/// # Safety
/// The columns are there in x and y, and so are their coefficients.
#[inline(always)]
unsafe fn apply<V: Vector>(
    y: *mut f32,
    pitch: usize,
    coefficients: &[&mut [f32]; 3],
    at: usize,
    x: Columns,
    silu: bool,
) {
    for l in (0..x.width).step_by(V::LANES) {
        let lanes = V::LANES.min(x.width - l);
        // SAFETY: l + lanes <= width, the caller's promise.
        unsafe {
            let [center, a, b] = load_all::<V, 3>(coefficients, at + l, lanes);
            for p in 0..x.rows {
                let u = V::load_first(x.start.add(p * x.pitch + l), lanes).sub(center).mul_add(a, b);
                let z = if silu { u.mul(u.sigmoid()) } else { u };
                z.store_first(y.add(p * pitch + l), lanes);
            }
        }
    }
}

/// Fast twin of [`crate::ops::group_norm::backward_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    isa: Isa,
    dxa: &mut [f32],
    dxb: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    dscale_shift: Option<RowsMut>,
    dy: &[f32],
    x: Cat,
    mean: &[f32],
    rstd: &[f32],
    gamma: &[f32],
    beta: &[f32],
    scale_shift: Option<Rows>,
    add_a: Option<&[f32]>,
    add_b: Option<&[f32]>,
    accumulate: bool,
    s: &GroupNormShape,
    scratch: &mut [f32],
) {
    s.check(mean, rstd, gamma, beta);
    x.check(s.n * s.s, "group_norm");
    let c = s.c();
    assert!(dxa.len() == x.a.len() && dxb.len() == x.b.len(), "group_norm backward: length of dx");
    assert!(add_a.is_none_or(|add| add.len() == dxa.len()), "group_norm backward: length of add_a");
    assert!(add_b.is_none_or(|add| add.len() == dxb.len()), "group_norm backward: length of add_b");
    assert!(dgamma.len() == c && dbeta.len() == c, "group_norm backward: lengths of dgamma or dbeta");
    assert_eq!(dy.len(), s.n * s.s * c, "group_norm backward: length of dy");
    let needed = backward_scratch(s);
    assert!(scratch.len() >= needed, "group_norm backward: {} floats of scratch, {needed} needed", scratch.len());
    let inputs = Inputs { x, gamma, beta, scale_shift, s };
    let dx = [Disjoint::new(dxa), Disjoint::new(dxb)];
    let shared = Disjoint::new(&mut *scratch);
    for_each_block(s, |n, c| {
        let groups = n * s.groups + c.start / s.group_channels()..n * s.groups + c.end / s.group_channels();
        let (mean, rstd) = (&mean[groups.clone()], &rstd[groups]);
        // SAFETY: these channels of image n are this job's.
        let scratch = unsafe { rows(&shared, n, &c, s.c()) };
        isa.run(Backward { inputs, n, c, dx, dy, mean, rstd, add: [add_a, add_b], scratch });
    });
    // Rows 0 and 1 of each image's scratch now hold its share of dgamma and dbeta, rows 2 and 3 dscale and dshift.
    for (row, sums) in [dgamma, dbeta].into_iter().enumerate() {
        if !accumulate {
            sums.fill(0.0);
        }
        for image in scratch.chunks_exact(BACKWARD * c).take(s.n) {
            sums.iter_mut().zip(&image[row * c..]).for_each(|(sum, share)| *sum += share);
        }
    }
    if let Some(mut rows) = dscale_shift {
        for (n, image) in scratch.chunks_exact(BACKWARD * c).take(s.n).enumerate() {
            rows.row(n, 2 * c).copy_from_slice(&image[2 * c..4 * c]);
        }
    }
}

/// Backward of some groups of one image.
struct Backward<'a> {
    inputs: Inputs<'a>,
    n: usize,
    c: Range<usize>,
    dx: [Disjoint<'a>; 2],
    dy: &'a [f32],
    mean: &'a [f32],
    rstd: &'a [f32],
    add: [Option<&'a [f32]>; 2],
    scratch: [&'a mut [f32]; BACKWARD],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Backward { inputs, n, c, dx, dy, mean, rstd, add, scratch } = self;
        let (s, width) = (inputs.s, inputs.s.group_channels());
        let [dgamma, dbeta, sums_h, sums, center, a, b, g] = scratch;
        for i in 0..c.len() {
            center[i] = mean[i / width];
            (a[i], b[i]) = inputs.affine(n, c.start + i, f64::from(rstd[i / width]), 0.0);
        }
        let dy = &dy[n * s.s * s.c()..][..s.s * s.c()];
        for piece in inputs.pieces(n, &c) {
            let x = inputs.columns(&piece);
            // SAFETY: the channels of this piece of image n are this job's part of dx; dy and x have them too.
            unsafe {
                let mut incoming = (dy[c.start + piece.at..].as_ptr(), s.c());
                if let Some(dropout) = &s.dropout {
                    let dx = dx[piece.source].slice(piece.start, s.s * piece.pitch);
                    dropout::apply_to(dx, dy, (piece.width, piece.at, s.c()), n, dropout);
                    incoming = (dx.as_ptr(), piece.pitch);
                }
                let dz = dx[piece.source].at(piece.start, piece.width);
                slopes::<V>(dz, [sums, sums_h], &[center, a, b], piece.at, incoming, x, s.silu);
            }
        }
        let size = (s.s * width) as f64;
        for (group, r) in rstd.iter().copied().map(f64::from).enumerate() {
            let mut means = [0f64; 2];
            let group = group * width..(group + 1) * width;
            for i in group.clone() {
                let (sum, sum_h) = (f64::from(sums[i]), r * f64::from(sums_h[i]));
                let (gamma, beta) = (f64::from(inputs.gamma[c.start + i]), f64::from(inputs.beta[c.start + i]));
                let scale1 = inputs.scale_shift(n, c.start + i).0;
                means = [means[0] + gamma * scale1 * sum / size, means[1] + gamma * scale1 * sum_h / size];
                (dgamma[i], dbeta[i]) = ((scale1 * sum_h) as f32, (scale1 * sum) as f32);
                // dscale in place of the sum; `sums` is dshift as it is.
                sums_h[i] = (gamma * sum_h + beta * sum) as f32;
            }
            b[group.clone()].fill((-r * r * means[1]) as f32);
            g[group].fill((-r * means[0]) as f32);
        }
        for piece in inputs.pieces(n, &c) {
            let add = add[piece.source].map(|add| add[piece.start..].as_ptr());
            // SAFETY: as above.
            unsafe {
                let dx = dx[piece.source].at(piece.start, piece.width);
                combine::<V>(dx, &[center, a, b, g], piece.at, add, inputs.columns(&piece));
            }
        }
    }
}

/// `dz = incoming · silu'(u)` with the pitch of x, its sums and those of `dz·(x − center)` per column; `incoming` as
/// (first value, pitch). Coefficients and sums of the columns start at `at`.
///
/// # Safety
/// The columns are there in x, dz and `incoming`, which may be dz itself.
#[inline(always)]
unsafe fn slopes<V: Vector>(
    dz: *mut f32,
    [sums, sums_h]: [&mut [f32]; 2],
    coefficients: &[&mut [f32]; 3],
    at: usize,
    (incoming, pitch): (*const f32, usize),
    x: Columns,
    silu: bool,
) {
    let one = V::splat(1.0);
    for l in (0..x.width).step_by(V::LANES) {
        let lanes = V::LANES.min(x.width - l);
        // SAFETY: l + lanes <= width, the caller's promise.
        unsafe {
            let [center, a, b] = load_all::<V, 3>(coefficients, at + l, lanes);
            let (mut sum, mut sum_h) = (V::splat(0.0), V::splat(0.0));
            for p in 0..x.rows {
                let d = V::load_first(x.start.add(p * x.pitch + l), lanes).sub(center);
                let mut z = V::load_first(incoming.add(p * pitch + l), lanes);
                if silu {
                    let u = d.mul_add(a, b);
                    let sigmoid = u.sigmoid();
                    z = z.mul(sigmoid.mul(u.mul_add(one.sub(sigmoid), one)));
                }
                z.store_first(dz.add(p * x.pitch + l), lanes);
                sum = sum.add(z);
                sum_h = z.mul_add(d, sum_h);
            }
            sum.store_first(sums[at + l..].as_mut_ptr(), lanes);
            sum_h.store_first(sums_h[at + l..].as_mut_ptr(), lanes);
        }
    }
}

/// `dx = a·dz + f·(x − center) + g + add`, where dx holds dz; dx and `add` have the pitch of x.
///
/// # Safety
/// The columns are there in x, dx and `add`.
#[inline(always)]
unsafe fn combine<V: Vector>(
    dx: *mut f32,
    coefficients: &[&mut [f32]; 4],
    at: usize,
    add: Option<*const f32>,
    x: Columns,
) {
    for l in (0..x.width).step_by(V::LANES) {
        let lanes = V::LANES.min(x.width - l);
        // SAFETY: l + lanes <= width, the caller's promise.
        unsafe {
            let [center, a, f, g] = load_all::<V, 4>(coefficients, at + l, lanes);
            for p in 0..x.rows {
                let i = p * x.pitch + l;
                let d = V::load_first(x.start.add(i), lanes).sub(center);
                let mut v = V::load_first(dx.add(i), lanes).mul_add(a, d.mul_add(f, g));
                if let Some(add) = add {
                    v = v.add(V::load_first(add.add(i), lanes));
                }
                v.store_first(dx.add(i), lanes);
            }
        }
    }
}
