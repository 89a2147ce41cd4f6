//! Backward of group normalisation with scale-shift, SiLU and dropout, cut as the forward is.
//!
//! One pass writes `dz` where dx will stand and sums `dz` and `dz·(x − mean)` per channel, from which everything else
//! follows; the second is `dx = a·dz + f·(x − mean) + g`.

use super::columns::Columns;
use super::dropout;
use super::group_norm::{Inputs, for_each_block, load_all, rows};
use super::isa::{Isa, Kernel};
use super::parallel::Disjoint;
use super::simd::Vector;
use crate::ops::group_norm::GroupNormShape;
use crate::ops::view::{Cat, Rows, RowsMut};
use std::ops::Range;

/// Values per channel and image kept in scratch.
const BACKWARD: usize = 8;

/// Floats of scratch that [`backward`] needs.
pub fn backward_scratch(s: &GroupNormShape) -> usize {
    BACKWARD * s.n * s.c()
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
    s.check_backward(x, [dxa, dxb], [add_a, add_b], [dgamma, dbeta], dy);
    let c = s.c();
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
