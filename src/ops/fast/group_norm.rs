//! Group normalisation with scale-shift, SiLU and dropout. A job is some whole groups of one image, few enough for its
//! passes to run in cache.
//!
//! Three passes: sums, centred sums (with the correction Σ(x − m̂) of the first mean), then `u = (x − m̂)·a + b` and SiLU.

pub use super::group_norm_backward::{backward, backward_scratch};

use super::columns::{Columns, centred_sums, column_sums};
use super::dropout;
use super::isa::{Isa, Kernel};
use super::parallel::{Disjoint, for_each_job, part};
use super::simd::Vector;
use crate::ops::group_norm::GroupNormShape;
use crate::ops::view::{Cat, Rows};
use std::ops::Range;

/// Values per channel and image that the forward keeps in scratch.
const FORWARD: usize = 5;
/// Values of one tensor that a job should not exceed.
const RESIDENT: usize = 48 << 10;

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(s: &GroupNormShape) -> usize {
    FORWARD * s.n * s.c()
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
pub(super) struct Inputs<'a> {
    pub x: Cat<'a>,
    pub gamma: &'a [f32],
    pub beta: &'a [f32],
    pub scale_shift: Option<Rows<'a>>,
    pub s: &'a GroupNormShape,
}

/// The channels of one source that a job works on, for one image.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// 0 or 1.
    pub source: usize,
    /// First value within the source, and from one pixel to the next.
    pub start: usize,
    pub pitch: usize,
    /// Channels.
    pub width: usize,
    /// First channel, counted from the first of the job.
    pub at: usize,
}

impl Inputs<'_> {
    /// The parts of channels `c` of image `n` in the two sources, empty ones left out.
    #[inline(always)]
    pub fn pieces(&self, n: usize, c: &Range<usize>) -> impl Iterator<Item = Piece> + use<> {
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
    pub fn columns(&self, piece: &Piece) -> Columns {
        let x = if piece.source == 0 { self.x.a } else { self.x.b };
        Columns { start: x[piece.start..].as_ptr(), rows: self.s.s, pitch: piece.pitch, width: piece.width }
    }

    /// 1 + scale and shift of channel `c` of image `n`.
    pub fn scale_shift(&self, n: usize, c: usize) -> (f64, f64) {
        let channels = self.s.c();
        self.scale_shift.map_or((1.0, 0.0), |rows| {
            let row = rows.row(n, 2 * channels);
            (1.0 + f64::from(row[c]), f64::from(row[channels + c]))
        })
    }

    /// `a` and `b` of u = (x − center)·a + b, where the mean is `center + off`.
    pub fn affine(&self, n: usize, c: usize, rstd: f64, off: f64) -> (f32, f32) {
        let (scale1, shift) = self.scale_shift(n, c);
        let a = rstd * f64::from(self.gamma[c]) * scale1;
        (a as f32, (f64::from(self.beta[c]) * scale1 + shift - off * a) as f32)
    }
}

/// Calls `f(image, channels)` for every job.
pub(super) fn for_each_block(s: &GroupNormShape, f: impl Fn(usize, Range<usize>) + Sync + Send) {
    let blocks = s.c().div_ceil(block(s));
    for_each_job(s.n * blocks, |job| f(job / blocks, part(s.c(), block(s), job % blocks, blocks)));
}

/// The N rows of scratch of image `n`, cut to channels `c`.
///
/// # Safety
/// No other job has these channels.
pub(super) unsafe fn rows<'a, const N: usize>(
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
pub(super) unsafe fn load_all<V: Vector, const N: usize>(from: &[&mut [f32]; N], at: usize, lanes: usize) -> [V; N] {
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
