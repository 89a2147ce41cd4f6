//! Group normalisation and what follows it in a residual block, per image n, pixel p and channel c of group g:
//!
//! `h = (x − mean[n,g])·rstd[n,g]`, `v = h·gamma[c] + beta[c]`, `u = v·(1 + scale[n,c]) + shift[n,c]`,
//! `y = dropout(silu(u))`, `silu(u) = u/(1 + e^−u)`; the last three are optional.
//!
//! x, y: (n, s, ca + cb), x as two sources (a group may lie in both); mean, rstd: (n, groups); gamma, beta: (ca + cb).

mod launch;
mod parts;
mod step;

pub use parts::Parts;

use super::Views;
use super::conv2d::Conv2d;
use super::view::{Cat, Rows, RowsMut};
use crate::graph::{Graph, Shape, Source, Val};
use crate::rng::philox;

/// Dropout as a pure function of the element: nothing is stored, the backward draws the same mask.
///
/// Element `4·quad + j` of an image is kept iff word j of Philox(\[quad, image, step, op\]; seed) is at least
/// round(p·2³²); kept values are multiplied by 1/(1 − p).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element becomes 0, below 1.
    pub p: f32,
    /// Key of the run.
    pub seed: u64,
    /// Training step.
    pub step: u32,
    /// Number of the op, so that no two share a mask.
    pub op: u32,
    /// Number of the first image of the batch.
    pub first_image: u32,
}

impl Dropout {
    /// A word below this drops its element.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0).round() as u32
    }

    /// Factor of a kept element, 1/(1 − p).
    pub fn scale(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// Philox counter of a quad of elements of the batch's image `n`.
    pub fn counter(&self, n: usize, quad: usize) -> [u32; 4] {
        [quad as u32, self.first_image.wrapping_add(n as u32), self.step, self.op]
    }

    /// What element `i` of the batch's image `n` is multiplied by: 0 or 1/(1 − p).
    pub fn factor(&self, n: usize, i: usize) -> f32 {
        let word = philox(self.counter(n, i / 4), self.seed)[i % 4];
        if word >= self.threshold() { self.scale() } else { 0.0 }
    }
}

/// Sizes and options of a group normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupNormShape {
    /// Images.
    pub n: usize,
    /// Pixels per image.
    pub s: usize,
    /// Channels of the first source.
    pub ca: usize,
    /// Channels of the second source; 0 if there is one.
    pub cb: usize,
    /// Groups; a divisor of ca + cb.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Whether SiLU follows.
    pub silu: bool,
    /// Dropout after it, if any.
    pub dropout: Option<Dropout>,
}

impl GroupNormShape {
    /// Channels.
    pub fn c(&self) -> usize {
        self.ca + self.cb
    }

    /// Channels per group.
    pub fn group_channels(&self) -> usize {
        self.c() / self.groups
    }

    /// Panics unless the sizes fit each other and the parameters and statistics have their lengths.
    pub fn check(&self, mean: &[f32], rstd: &[f32], gamma: &[f32], beta: &[f32]) {
        let (n, c, groups) = (self.n, self.c(), self.groups);
        assert!(groups > 0 && c % groups == 0 && c > 0, "group_norm: {c} channels do not divide into {groups} groups");
        assert!(mean.len() == n * groups && rstd.len() == n * groups, "group_norm: lengths of the statistics");
        assert!(gamma.len() == c && beta.len() == c, "group_norm: lengths of gamma or beta");
    }

    /// Panics unless what the backward reads and writes has its length.
    pub fn check_backward(
        &self,
        x: Cat,
        dx: [&[f32]; 2],
        add: [Option<&[f32]>; 2],
        parameters: [&[f32]; 2],
        dy: &[f32],
    ) {
        x.check(self.n * self.s, "group_norm backward");
        for (i, len) in [x.a.len(), x.b.len()].into_iter().enumerate() {
            assert_eq!(dx[i].len(), len, "group_norm backward: length of dx of source {i}");
            assert!(add[i].is_none_or(|add| add.len() == len), "group_norm backward: length of add of source {i}");
            assert_eq!(parameters[i].len(), self.c(), "group_norm backward: lengths of dgamma and dbeta");
        }
        assert_eq!(dy.len(), self.n * self.s * self.c(), "group_norm backward: length of dy");
    }

    /// dy/du of element `i` of image `n`.
    fn slope(&self, u: f64, n: usize, i: usize) -> f64 {
        let silu = if self.silu { sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u))) } else { 1.0 };
        silu * self.dropout.map_or(1.0, |dropout| f64::from(dropout.factor(n, i)))
    }
}

/// u(x) = h·(gamma·(1 + scale)) + (beta·(1 + scale) + shift) of one channel, in f64.
struct Affine {
    gamma: f64,
    beta: f64,
    scale1: f64,
    shift: f64,
}

impl Affine {
    fn of(gamma: &[f32], beta: &[f32], scale_shift: Option<Rows>, n: usize, c: usize) -> Self {
        let channels = gamma.len();
        let (scale, shift) = scale_shift.map_or((0.0, 0.0), |r| {
            let row = r.row(n, 2 * channels);
            (row[c], row[channels + c])
        });
        Affine {
            gamma: f64::from(gamma[c]),
            beta: f64::from(beta[c]),
            scale1: 1.0 + f64::from(scale),
            shift: f64::from(shift),
        }
    }

    fn v(&self, h: f64) -> f64 {
        h * self.gamma + self.beta
    }

    fn u(&self, h: f64) -> f64 {
        self.v(h) * self.scale1 + self.shift
    }
}

fn sigmoid(u: f64) -> f64 {
    1.0 / (1.0 + (-u).exp())
}

/// y, and the statistics the backward needs: `mean`, `rstd = 1/√(variance + eps)`.
///
/// Row n of `scale_shift` holds scale in its first ca + cb values and shift in the next.
#[allow(clippy::too_many_arguments)]
pub fn forward_cpu(
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    x: Cat,
    gamma: &[f32],
    beta: &[f32],
    scale_shift: Option<Rows>,
    s: &GroupNormShape,
) {
    s.check(mean, rstd, gamma, beta);
    x.check(s.n * s.s, "group_norm");
    assert_eq!(y.len(), s.n * s.s * s.c(), "group_norm: length of y");
    let (c, per_group) = (s.c(), s.group_channels());
    let size = (s.s * per_group) as f64;
    for n in 0..s.n {
        for g in 0..s.groups {
            let sum = |f: &dyn Fn(f64) -> f64| -> f64 {
                (0..s.s * per_group)
                    .map(|i| f(f64::from(x.at(n * s.s + i / per_group, g * per_group + i % per_group))))
                    .sum()
            };
            let m = sum(&|x| x) / size;
            let r = 1.0 / (sum(&|x| (x - m) * (x - m)) / size + f64::from(s.eps)).sqrt();
            (mean[n * s.groups + g], rstd[n * s.groups + g]) = (m as f32, r as f32);
            for channel in g * per_group..(g + 1) * per_group {
                let affine = Affine::of(gamma, beta, scale_shift, n, channel);
                for p in 0..s.s {
                    let u = affine.u((f64::from(x.at(n * s.s + p, channel)) - m) * r);
                    let z = if s.silu { u * sigmoid(u) } else { u };
                    let keep = s.dropout.map_or(1.0, |d| d.factor(n, p * c + channel));
                    y[(n * s.s + p) * c + channel] = (z * f64::from(keep)) as f32;
                }
            }
        }
    }
}

/// Gradients of input and parameters. With `dz` the gradient of u, `k = gamma (1 + scale)`, means over a group:
///
/// `dx = rstd·(k dz − mean(k dz) − h·mean(k dz h)) + add`, `dgamma = Σ_n,p dz (1 + scale) h`,
/// `dbeta = Σ_n,p dz (1 + scale)`, `dscale[n,c] = Σ_p dz v`, `dshift[n,c] = Σ_p dz`.
///
/// dxa, dxb, add_a, add_b: as the two sources of x. `dgamma` and `dbeta` are added to with `accumulate`;
/// `dscale_shift` has the layout of `scale_shift` and is always overwritten.
#[allow(clippy::too_many_arguments)]
pub fn backward_cpu(
    dxa: &mut [f32],
    dxb: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    mut dscale_shift: Option<RowsMut>,
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
) {
    s.check(mean, rstd, gamma, beta);
    s.check_backward(x, [dxa, dxb], [add_a, add_b], [dgamma, dbeta], dy);
    let (c, width) = (s.c(), s.group_channels());
    let mut parameters = vec![[0f64; 2]; c];
    for (n, g) in (0..s.n).flat_map(|n| (0..s.groups).map(move |g| (n, g))) {
        let (m, r) = (f64::from(mean[n * s.groups + g]), f64::from(rstd[n * s.groups + g]));
        let h = |p: usize, channel: usize| (f64::from(x.at(n * s.s + p, channel)) - m) * r;
        let channels = g * width..(g + 1) * width;
        let (mut dz, mut means) = (vec![0f64; s.s * c], [0f64; 2]);
        for channel in channels.clone() {
            let affine = Affine::of(gamma, beta, scale_shift, n, channel);
            let (mut sum, mut sum_h) = (0.0, 0.0);
            for p in 0..s.s {
                let at = p * c + channel;
                dz[at] = f64::from(dy[n * s.s * c + at]) * s.slope(affine.u(h(p, channel)), n, at);
                sum += dz[at];
                sum_h += dz[at] * h(p, channel);
            }
            let k = affine.gamma * affine.scale1 / (s.s * width) as f64;
            means = [means[0] + k * sum, means[1] + k * sum_h];
            parameters[channel][0] += affine.scale1 * sum_h;
            parameters[channel][1] += affine.scale1 * sum;
            if let Some(rows) = &mut dscale_shift {
                let row = rows.row(n, 2 * c);
                (row[channel], row[c + channel]) = ((affine.gamma * sum_h + affine.beta * sum) as f32, sum as f32);
            }
        }
        for (p, channel) in (0..s.s).flat_map(|p| channels.clone().map(move |channel| (p, channel))) {
            let affine = Affine::of(gamma, beta, scale_shift, n, channel);
            let dx = r * (dz[p * c + channel] * affine.gamma * affine.scale1 - means[0] - h(p, channel) * means[1]);
            let (source, at) = x.place(n * s.s + p, channel);
            let add = [add_a, add_b][source].map_or(0.0, |add| add[at]);
            [&mut *dxa, &mut *dxb][source][at] = (dx + f64::from(add)) as f32;
        }
    }
    let kept = |old: f32| if accumulate { f64::from(old) } else { 0.0 };
    for (channel, [dg, db]) in parameters.into_iter().enumerate() {
        dgamma[channel] = (kept(dgamma[channel]) + dg) as f32;
        dbeta[channel] = (kept(dbeta[channel]) + db) as f32;
    }
}

/// Dropout of a recorded norm: its mask is a function of the control block's seed and step.
#[derive(Clone, Copy, Debug)]
pub struct DropoutStep {
    /// Probability of being dropped.
    pub p: f32,
    /// Number of the layer: the op word of the random counter.
    pub op: u32,
    /// Position in the batch of the first image of the plan's microbatch.
    pub first_image: u32,
    /// The control block.
    pub control: Val,
}

impl DropoutStep {
    fn at(&self, m: &Views) -> Dropout {
        let control = m.control(self.control);
        self.with(control.seed, control.step)
    }

    fn with(&self, seed: u64, step: u32) -> Dropout {
        Dropout { p: self.p, seed, step, op: self.op, first_image: self.first_image }
    }
}

/// y = dropout(silu(norm(x) gamma + beta, scaled and shifted)), as a step.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Result, (n, h, w, c).
    pub y: Val,
    /// Mean of each group, (n, groups).
    pub mean: Val,
    /// Reciprocal standard deviation of each group, (n, groups).
    pub rstd: Val,
    /// Input, possibly in two parts.
    pub x: Source,
    /// Statistics of the parts of each source, (n, parts, 2, channels), where its convolution leaves them behind; used on CUDA.
    pub sums: [Option<(Val, Parts)>; 2],
    /// Gain, (c).
    pub gamma: Val,
    /// Offset, (c).
    pub beta: Val,
    /// Scale and shift: rows of a matrix from this column on.
    pub scale_shift: Option<(Val, usize)>,
    /// Dropout after the activation.
    pub dropout: Option<DropoutStep>,
    /// Sizes.
    pub shape: GroupNormShape,
}

/// Gradient of [`GroupNorm`].
#[derive(Clone, Debug)]
pub struct GroupNormBackward {
    /// Gradient of x, in the parts of x.
    pub dx: Source,
    /// Gradient of gamma.
    pub dgamma: Val,
    /// Gradient of beta.
    pub dbeta: Val,
    /// Gradient of scale and shift: rows of a matrix from this column on.
    pub dscale_shift: Option<(Val, usize)>,
    /// Gradient of y.
    pub dy: Val,
    /// Gradients of the parts of x from elsewhere.
    pub add: [Option<Val>; 2],
    /// Add to `dgamma` and `dbeta` rather than overwrite them.
    pub accumulate: bool,
    /// The step whose gradient this is.
    pub forward: GroupNorm,
}

/// What a norm does besides normalising.
#[derive(Clone, Copy, Debug)]
pub struct NormOptions {
    /// SiLU after it.
    pub silu: bool,
    /// Scale and shift: rows of a matrix from this column on.
    pub scale_shift: Option<(Val, usize)>,
    /// Dropout after the activation.
    pub dropout: Option<DropoutStep>,
    /// Added to the variance.
    pub eps: f32,
}

impl Default for NormOptions {
    fn default() -> Self {
        NormOptions { silu: false, scale_shift: None, dropout: None, eps: 1e-5 }
    }
}

/// Groups of every norm of the network.
pub const GROUPS: usize = 32;

impl GroupNorm {
    /// Appends the norm of `x` in [`GROUPS`] groups.
    pub fn record(g: &mut Graph, x: Source, gamma: Val, beta: Val, o: NormOptions) -> Val {
        let s = g.shape(x.a);
        let (ca, cb) = (s.c, x.b.map_or(0, |b| g.shape(b).c));
        let shape =
            GroupNormShape { n: s.n, s: s.h * s.w, ca, cb, groups: GROUPS, eps: o.eps, silu: o.silu, dropout: None };
        let y = g.shaped_like("group_norm", x.a, Shape { c: ca + cb, ..s });
        let sums = [Some(x.a), x.b].map(|v| if g.epilogue_sums { Conv2d::sums_of(g, v?) } else { None });
        let mean = g.arena("mean", Shape::rows(s.n, GROUPS));
        let rstd = g.arena("rstd", Shape::rows(s.n, GROUPS));
        g.push(GroupNorm {
            y,
            mean,
            rstd,
            x,
            sums,
            gamma,
            beta,
            scale_shift: o.scale_shift,
            dropout: o.dropout,
            shape,
        });
        y
    }
}
