//! Group normalisation with scale-shift, SiLU and dropout, one image per job so that its passes run in cache.
//!
//! Forward: sums, centred sums (with the correction Σ(x − m̂) of the first mean), then `u = (x − m̂)·a + b` and SiLU.
//! Backward: one pass writes `dz` where dx will stand and sums `dz` and `dz·(x − mean)` per channel, from which
//! everything else follows; the second is `dx = a·dz + f·(x − mean) + g`.

use super::columns::{Columns, column_sums};
use super::dropout;
use super::parallel::{Disjoint, for_each_job};
use super::simd::{Isa, Kernel, Vector};
use crate::ops::group_norm::GroupNormShape;
use crate::ops::view::{Cat, Rows, RowsMut};

/// Values per channel and image that the forward keeps in scratch.
const FORWARD: usize = 5;
/// Values per channel and image that the backward keeps in scratch.
const BACKWARD: usize = 8;

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(s: &GroupNormShape) -> usize {
    FORWARD * s.n * s.c()
}

/// Floats of scratch that [`backward`] needs.
pub fn backward_scratch(s: &GroupNormShape) -> usize {
    BACKWARD * s.n * s.c()
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

impl Inputs<'_> {
    /// The sources of image `n`.
    #[inline(always)]
    fn sources(&self, n: usize) -> impl Iterator<Item = Source> + use<> {
        let Inputs { x, s, .. } = *self;
        let a = Source { x: x.a.as_ptr().wrapping_add(n * s.s * x.ca), channels: x.ca, first: 0, pixels: s.s };
        let b = Source { x: x.b.as_ptr().wrapping_add(n * s.s * x.cb), channels: x.cb, first: x.ca, pixels: s.s };
        [a, b].into_iter().filter(|source| source.channels > 0)
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
    let outs = [y, mean, rstd, scratch].map(Disjoint::new);
    for_each_job(s.n, |n| {
        let lens = [s.s * s.c(), s.groups, s.groups, FORWARD * s.c()];
        // SAFETY: image n's parts are this job's.
        let [y, mean, rstd, scratch] = [0, 1, 2, 3].map(|i| unsafe { outs[i].slice(n * lens[i], lens[i]) });
        isa.run(Forward { inputs, n, y, mean, rstd, scratch });
    });
}

/// Forward of one image.
struct Forward<'a> {
    inputs: Inputs<'a>,
    n: usize,
    y: &'a mut [f32],
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Forward { inputs, n, y, mean, rstd, scratch } = self;
        let s = inputs.s;
        let [center, a, b, sums, squares] = split(scratch, s.c());
        for Source { x, channels, first, pixels } in inputs.sources(n) {
            // SAFETY: the image's pixels of one source.
            unsafe {
                let columns = Columns { start: x, rows: pixels, pitch: channels, width: channels };
                column_sums::<V>(&mut sums[first..first + channels], columns);
            }
        }
        let (size, width) = ((s.s * s.group_channels()) as f64, s.group_channels());
        for (center, sums) in center.chunks_exact_mut(width).zip(sums.chunks_exact(width)) {
            center.fill((total(sums) / size) as f32);
        }
        for source in inputs.sources(n) {
            // SAFETY: as above.
            unsafe { centred_sums::<V>(sums, squares, center, source) };
        }
        for g in 0..s.groups {
            let group = g * width..(g + 1) * width;
            let off = total(&sums[group.clone()]) / size;
            let variance = (total(&squares[group.clone()]) / size - off * off).max(0.0);
            let r = 1.0 / (variance + f64::from(s.eps)).sqrt();
            (mean[g], rstd[g]) = ((f64::from(center[group.start]) + off) as f32, r as f32);
            for c in group {
                (a[c], b[c]) = inputs.affine(n, c, r, off);
            }
        }
        for source in inputs.sources(n) {
            // SAFETY: as above; y has all channels of every pixel.
            unsafe { apply::<V>(y, &[center, a, b], source, s) };
        }
        if let Some(dropout) = &s.dropout {
            dropout::apply(y, n, dropout);
        }
    }
}

/// Cuts scratch into vectors of `c` values.
fn split<const N: usize>(scratch: &mut [f32], c: usize) -> [&mut [f32]; N] {
    let mut parts = scratch.chunks_exact_mut(c);
    std::array::from_fn(|_| parts.next().expect("scratch of N vectors"))
}

fn total(x: &[f32]) -> f64 {
    x.iter().copied().map(f64::from).sum()
}

/// Per channel of one source of one image, Σ(x − center) and Σ(x − center)².
///
/// # Safety
/// x reaches every pixel and channel of the source; the slices have a value for each of all channels.
#[inline(always)]
unsafe fn centred_sums<V: Vector>(
    sums: &mut [f32],
    squares: &mut [f32],
    center: &[f32],
    Source { x, channels, first, pixels }: Source,
) {
    let mut l = 0;
    while l < channels {
        let lanes = V::LANES.min(channels - l);
        // SAFETY: l + lanes <= channels, the caller's promise.
        unsafe {
            let center = V::load_first(center[first + l..].as_ptr(), lanes);
            let (mut sum, mut square) = ([V::splat(0.0); 4], [V::splat(0.0); 4]);
            for p in (0..pixels).step_by(4) {
                for i in 0..4 {
                    if p + i < pixels {
                        let d = V::load_first(x.add((p + i) * channels + l), lanes).sub(center);
                        sum[i] = sum[i].add(d);
                        square[i] = d.mul_add(d, square[i]);
                    }
                }
            }
            let sum = sum[0].add(sum[1]).add(sum[2].add(sum[3]));
            let square = square[0].add(square[1]).add(square[2].add(square[3]));
            sum.store_first(sums[first + l..].as_mut_ptr(), lanes);
            square.store_first(squares[first + l..].as_mut_ptr(), lanes);
        }
        l += lanes;
    }
}

/// `y = silu((x − center)·a + b)` for one source of one image.
///
/// # Safety
/// As [`centred_sums`]; y has all channels of every pixel.
#[inline(always)]
unsafe fn apply<V: Vector>(
    y: &mut [f32],
    coefficients: &[&mut [f32]; 3],
    Source { x, channels, first, pixels }: Source,
    s: &GroupNormShape,
) {
    let mut l = 0;
    while l < channels {
        let lanes = V::LANES.min(channels - l);
        // SAFETY: l + lanes <= channels, the caller's promise.
        unsafe {
            let [center, a, b] = load_all::<V, 3>(coefficients, first + l, lanes);
            for p in 0..pixels {
                let u = V::load_first(x.add(p * channels + l), lanes).sub(center).mul_add(a, b);
                let z = if s.silu { u.mul(u.sigmoid()) } else { u };
                z.store_first(y.as_mut_ptr().add(p * s.c() + first + l), lanes);
            }
        }
        l += lanes;
    }
}

/// `lanes` values from `at` on of each of some vectors.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn load_all<V: Vector, const N: usize>(from: &[&mut [f32]; N], at: usize, lanes: usize) -> [V; N] {
    let mut loaded = [V::splat(0.0); N];
    for i in 0..N {
        // SAFETY: the caller's promise.
        loaded[i] = unsafe { V::load_first(from[i].as_ptr().add(at), lanes) };
    }
    loaded
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
    let out = [Disjoint::new(dxa), Disjoint::new(dxb)];
    let shared = Disjoint::new(&mut *scratch);
    for_each_job(s.n, |n| {
        // SAFETY: image n's parts are this job's.
        let scratch = unsafe { shared.slice(n * BACKWARD * c, BACKWARD * c) };
        let (mean, rstd) = (&mean[n * s.groups..][..s.groups], &rstd[n * s.groups..][..s.groups]);
        isa.run(Backward { inputs, n, dx: out, dy, mean, rstd, add: [add_a, add_b], scratch });
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

/// Backward of one image.
struct Backward<'a> {
    inputs: Inputs<'a>,
    n: usize,
    dx: [Disjoint<'a>; 2],
    dy: &'a [f32],
    mean: &'a [f32],
    rstd: &'a [f32],
    add: [Option<&'a [f32]>; 2],
    scratch: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Backward { inputs, n, dx, dy, mean, rstd, add, scratch } = self;
        let (s, c, width) = (inputs.s, inputs.s.c(), inputs.s.group_channels());
        let [dgamma, dbeta, sums_h, sums, center, a, b, g] = split(scratch, c);
        for i in 0..c {
            center[i] = mean[i / width];
            (a[i], b[i]) = inputs.affine(n, i, f64::from(rstd[i / width]), 0.0);
        }
        let dy = &dy[n * s.s * c..][..s.s * c];
        for source in inputs.sources(n) {
            let Source { channels, first, .. } = source;
            // SAFETY: image n's part of the source, this job's alone; `dz` and x have all its pixels and channels.
            unsafe {
                let dx = dx[usize::from(first > 0)].slice(n * s.s * channels, s.s * channels);
                let mut incoming = (dy[first..].as_ptr(), c);
                if let Some(dropout) = &s.dropout {
                    dropout::apply_to(dx, dy, (channels, first, c), n, dropout);
                    incoming = (dx.as_mut_ptr().cast_const(), channels);
                }
                slopes::<V>(dx.as_mut_ptr(), [sums, sums_h], &[center, a, b], incoming, source, s.silu);
            }
        }
        let size = (s.s * width) as f64;
        for (group, r) in rstd.iter().copied().map(f64::from).enumerate() {
            let mut means = [0f64; 2];
            let group = group * width..(group + 1) * width;
            for i in group.clone() {
                let (sum, sum_h) = (f64::from(sums[i]), r * f64::from(sums_h[i]));
                let (gamma, scale1) = (f64::from(inputs.gamma[i]), inputs.scale_shift(n, i).0);
                means = [means[0] + gamma * scale1 * sum / size, means[1] + gamma * scale1 * sum_h / size];
                (dgamma[i], dbeta[i]) = ((scale1 * sum_h) as f32, (scale1 * sum) as f32);
                // dscale in place of the sum; `sums` is dshift as it is.
                sums_h[i] = (gamma * sum_h + f64::from(inputs.beta[i]) * sum) as f32;
            }
            b[group.clone()].fill((-r * r * means[1]) as f32);
            g[group].fill((-r * means[0]) as f32);
        }
        for source in inputs.sources(n) {
            let (piece, start) = (usize::from(source.first > 0), n * s.s * source.channels);
            // SAFETY: as above.
            unsafe {
                let dx = dx[piece].slice(start, s.s * source.channels);
                let add = add[piece].map(|add| add[start..].as_ptr());
                combine::<V>(dx.as_mut_ptr(), &[center, a, b, g], add, source);
            }
        }
    }
}

/// One source of one image.
#[derive(Clone, Copy)]
struct Source {
    x: *const f32,
    channels: usize,
    /// Its first channel among all.
    first: usize,
    pixels: usize,
}

/// `dz = incoming · silu'(u)`, its sums and those of `dz·(x − center)` per channel; `incoming` as (first value, pitch).
///
/// # Safety
/// The pointers reach every pixel and channel of the source; `incoming` may be `dz` itself.
#[inline(always)]
unsafe fn slopes<V: Vector>(
    dz: *mut f32,
    [sums, sums_h]: [&mut [f32]; 2],
    coefficients: &[&mut [f32]; 3],
    (incoming, pitch): (*const f32, usize),
    source: Source,
    silu: bool,
) {
    let one = V::splat(1.0);
    let mut l = 0;
    while l < source.channels {
        let lanes = V::LANES.min(source.channels - l);
        // SAFETY: l + lanes <= channels, the caller's promise.
        unsafe {
            let [center, a, b] = load_all::<V, 3>(coefficients, source.first + l, lanes);
            let (mut sum, mut sum_h) = (V::splat(0.0), V::splat(0.0));
            for p in 0..source.pixels {
                let d = V::load_first(source.x.add(p * source.channels + l), lanes).sub(center);
                let mut z = V::load_first(incoming.add(p * pitch + l), lanes);
                if silu {
                    let u = d.mul_add(a, b);
                    let sigmoid = u.sigmoid();
                    z = z.mul(sigmoid.mul(u.mul_add(one.sub(sigmoid), one)));
                }
                z.store_first(dz.add(p * source.channels + l), lanes);
                sum = sum.add(z);
                sum_h = z.mul_add(d, sum_h);
            }
            sum.store_first(sums[source.first + l..].as_mut_ptr(), lanes);
            sum_h.store_first(sums_h[source.first + l..].as_mut_ptr(), lanes);
        }
        l += lanes;
    }
}

/// `dx = a·dz + f·(x − center) + g + add`, where dx holds dz.
///
/// # Safety
/// As [`slopes`].
#[inline(always)]
unsafe fn combine<V: Vector>(dx: *mut f32, coefficients: &[&mut [f32]; 4], add: Option<*const f32>, source: Source) {
    let mut l = 0;
    while l < source.channels {
        let lanes = V::LANES.min(source.channels - l);
        // SAFETY: l + lanes <= channels, the caller's promise.
        unsafe {
            let [center, a, f, g] = load_all::<V, 4>(coefficients, source.first + l, lanes);
            for p in 0..source.pixels {
                let at = p * source.channels + l;
                let d = V::load_first(source.x.add(at), lanes).sub(center);
                let mut v = V::load_first(dx.add(at), lanes).mul_add(a, d.mul_add(f, g));
                if let Some(add) = add {
                    v = v.add(V::load_first(add.add(at), lanes));
                }
                v.store_first(dx.add(at), lanes);
            }
        }
        l += lanes;
    }
}
