//! Convolution over NHWC images, 1x1 or 3x3 with padding, with what the U-Net puts around it:
//!
//! `y[n,p,o] = bias[o] + shift[n,o] + residual[n,p,o] + Σ_{tap,c} x[n, p·stride + tap - pad, c] · w[o,tap,c]`
//!
//! x: (n, h, w, ca + cb) as two sources; with `upsample`, x is first enlarged to (n, 2h, 2w) by repeating each pixel.
//! w: (oc, k, k, ca + cb). y: (n, oh, ow, oc). Outside the image x is 0.

mod geometry;
pub mod launch;
mod step;

use super::Op;
use super::group_norm::Parts;
use super::view::{Cat, Rows, RowsMut};
use crate::graph::{Graph, Shape, Source, Val};

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Images.
    pub n: usize,
    /// Height of the input, before any upsampling.
    pub h: usize,
    /// Width of the input, before any upsampling.
    pub w: usize,
    /// Channels of the first source.
    pub ca: usize,
    /// Channels of the second source; 0 if there is one.
    pub cb: usize,
    /// Output channels.
    pub oc: usize,
    /// Kernel size, 1 or 3.
    pub k: usize,
    /// Step between outputs, 1 or 2.
    pub stride: usize,
    /// Nearest x2 enlargement before a 3x3 convolution of stride 1.
    pub upsample: bool,
    /// Zeros before the first row and column: k/2; for a 3x3 of stride 2 also 0, with one row and column behind the last.
    pub pad: usize,
}

impl ConvShape {
    /// Input channels.
    pub fn c(&self) -> usize {
        self.ca + self.cb
    }

    /// Height of the image the kernel slides over.
    pub fn vh(&self) -> usize {
        self.h << usize::from(self.upsample)
    }

    /// Width of the image the kernel slides over.
    pub fn vw(&self) -> usize {
        self.w << usize::from(self.upsample)
    }

    /// Output height.
    pub fn oh(&self) -> usize {
        (self.vh() - 1) / self.stride + 1
    }

    /// Output width.
    pub fn ow(&self) -> usize {
        (self.vw() - 1) / self.stride + 1
    }

    /// Pixels of the input, all images together.
    pub fn in_pixels(&self) -> usize {
        self.n * self.h * self.w
    }

    /// Pixels of the output, all images together.
    pub fn out_pixels(&self) -> usize {
        self.n * self.oh() * self.ow()
    }

    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.oc * self.k * self.k * self.c()
    }

    /// Panics unless the combination of sizes is one the ops cover.
    pub fn check(&self) {
        assert!(self.k == 1 || self.k == 3, "conv2d: kernel size {} is neither 1 nor 3", self.k);
        assert!(self.stride == 1 || self.stride == 2, "conv2d: stride {} is neither 1 nor 2", self.stride);
        assert!(!self.upsample || (self.k == 3 && self.stride == 1), "conv2d: upsampling needs a 3x3 of stride 1");
        let behind =
            self.pad == 0 && self.k == 3 && self.stride == 2 && self.h.is_multiple_of(2) && self.w.is_multiple_of(2);
        assert!(self.pad == self.k / 2 || behind, "conv2d: padding {} of {self:?}", self.pad);
        let sizes = [self.n, self.h, self.w, self.ca, self.oc];
        assert!(sizes.iter().all(|&size| size > 0), "conv2d: a size is 0 in {self:?}");
    }

    /// Pixel of the input under tap (`kh`, `kw`) of output pixel (`oy`, `ox`) of image `n`; none in the padding.
    pub fn source(&self, n: usize, oy: usize, ox: usize, kh: usize, kw: usize) -> Option<usize> {
        let y = (oy * self.stride + kh).checked_sub(self.pad).filter(|&y| y < self.vh())?;
        let x = (ox * self.stride + kw).checked_sub(self.pad).filter(|&x| x < self.vw())?;
        let up = usize::from(self.upsample);
        Some((n * self.h + (y >> up)) * self.w + (x >> up))
    }

    /// Calls `f(output pixel, tap, input pixel)` for every product the convolution makes, outputs in order.
    fn for_each(&self, mut f: impl FnMut(usize, usize, usize)) {
        for out in 0..self.out_pixels() {
            let (n, oy, ox) = (out / self.ow() / self.oh(), out / self.ow() % self.oh(), out % self.ow());
            for tap in 0..self.k * self.k {
                if let Some(src) = self.source(n, oy, ox, tap / self.k, tap % self.k) {
                    f(out, tap, src);
                }
            }
        }
    }
}

/// `y = conv(x, w) + bias + shift + residual`; see the file's head for the shapes.
///
/// `shift` holds a row of `oc` values per image, `residual` has the shape of `y`.
pub fn forward_cpu(
    y: &mut [f32],
    x: Cat,
    w: &[f32],
    bias: Option<&[f32]>,
    shift: Option<Rows>,
    residual: Option<Cat>,
    s: &ConvShape,
) {
    s.check();
    x.check(s.in_pixels(), "conv2d forward");
    assert!(y.len() == s.out_pixels() * s.oc && w.len() == s.weights(), "conv2d forward: lengths of y or w");
    let (c, taps, image) = (s.c(), s.k * s.k, s.oh() * s.ow());
    let mut sums = vec![0f64; y.len()];
    s.for_each(|out, tap, src| {
        for o in 0..s.oc {
            let w = &w[(o * taps + tap) * c..][..c];
            sums[out * s.oc + o] += (0..c).map(|i| f64::from(x.at(src, i)) * f64::from(w[i])).sum::<f64>();
        }
    });
    for (i, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
        let (p, o) = (i / s.oc, i % s.oc);
        let bias = bias.map_or(0.0, |b| b[o]);
        let shift = shift.map_or(0.0, |r| r.row(p / image, s.oc)[o]);
        let residual = residual.map_or(0.0, |r| r.at(p, o));
        *y = (sum + f64::from(bias) + f64::from(shift) + f64::from(residual)) as f32;
    }
}

/// Gradient of the input: `dx = convᵀ(dy, w) + add`, in the two pieces of x.
///
/// dxa: (n, h, w, ca), dxb: (n, h, w, cb) or empty, dy: (n, oh, ow, oc); `add_a`, `add_b` as `dxa`, `dxb`.
pub fn backward_data_cpu(
    dxa: &mut [f32],
    dxb: &mut [f32],
    dy: &[f32],
    w: &[f32],
    add_a: Option<&[f32]>,
    add_b: Option<&[f32]>,
    s: &ConvShape,
) {
    s.check();
    assert!(dxa.len() == s.in_pixels() * s.ca && dxb.len() == s.in_pixels() * s.cb, "conv2d backward: length of dx");
    assert!(dy.len() == s.out_pixels() * s.oc && w.len() == s.weights(), "conv2d backward: lengths of dy or w");
    let (c, taps) = (s.c(), s.k * s.k);
    let mut sums = vec![0f64; s.in_pixels() * c];
    s.for_each(|out, tap, src| {
        for o in 0..s.oc {
            let (dy, w) = (f64::from(dy[out * s.oc + o]), &w[(o * taps + tap) * c..][..c]);
            for (sum, w) in sums[src * c..][..c].iter_mut().zip(w) {
                *sum += dy * f64::from(*w);
            }
        }
    });
    for p in 0..s.in_pixels() {
        for i in 0..s.ca {
            let at = p * s.ca + i;
            dxa[at] = (sums[p * c + i] + f64::from(add_a.map_or(0.0, |add| add[at]))) as f32;
        }
        for i in 0..s.cb {
            let at = p * s.cb + i;
            dxb[at] = (sums[p * c + s.ca + i] + f64::from(add_b.map_or(0.0, |add| add[at]))) as f32;
        }
    }
}

/// Gradients of the parameters: `dw[o,tap,c] = Σ_{n,p} dy[n,p,o] · x[n, p·stride + tap, c]`, `db[o] = Σ_{n,p} dy`,
/// `dshift[n,o] = Σ_p dy`.
///
/// With `accumulate`, `dw` and `db` are added to; `dshift` is always overwritten.
pub fn backward_weight_cpu(
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    dshift: Option<RowsMut>,
    dy: &[f32],
    x: Cat,
    accumulate: bool,
    s: &ConvShape,
) {
    s.check();
    x.check(s.in_pixels(), "conv2d backward");
    assert!(dy.len() == s.out_pixels() * s.oc && dw.len() == s.weights(), "conv2d backward: lengths of dy or dw");
    let (c, taps, image) = (s.c(), s.k * s.k, s.oh() * s.ow());
    let kept = |old: f32| if accumulate { f64::from(old) } else { 0.0 };
    let mut sums = vec![0f64; dw.len()];
    s.for_each(|out, tap, src| {
        for o in 0..s.oc {
            let dy = f64::from(dy[out * s.oc + o]);
            for (i, sum) in sums[(o * taps + tap) * c..][..c].iter_mut().enumerate() {
                *sum += dy * f64::from(x.at(src, i));
            }
        }
    });
    for (dw, sum) in dw.iter_mut().zip(sums) {
        *dw = (kept(*dw) + sum) as f32;
    }
    let total = |n: usize, o: usize| (0..image).map(|p| f64::from(dy[(n * image + p) * s.oc + o])).sum::<f64>();
    if let Some(db) = db {
        for (o, db) in db.iter_mut().enumerate() {
            *db = (kept(*db) + (0..s.n).map(|n| total(n, o)).sum::<f64>()) as f32;
        }
    }
    if let Some(mut dshift) = dshift {
        for n in 0..s.n {
            dshift.row(n, s.oc).iter_mut().enumerate().for_each(|(o, d)| *d = total(n, o) as f32);
        }
    }
}

/// y = conv(x) + bias + shift + residual, as a step.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// Result, (n, oh, ow, oc).
    pub y: Val,
    /// Statistics of its parts, (n, parts, 2, oc), for the norm that follows; see [`Parts`].
    pub sums: Option<Val>,
    /// Input, possibly in two parts.
    pub x: Source,
    /// Weights, (oc, k, k, c).
    pub w: Val,
    /// Bias, (oc).
    pub b: Option<Val>,
    /// Per-image, per-channel addend: rows of a matrix from this column on.
    pub shift: Option<(Val, usize)>,
    /// Addend of the shape of y.
    pub residual: Option<Val>,
    /// Sizes.
    pub shape: ConvShape,
}

/// Gradient of [`Conv2d`] with respect to x.
#[derive(Clone, Debug)]
pub struct Conv2dBackwardData {
    /// Gradient of x, in the parts of x.
    pub dx: Source,
    /// Gradient of y.
    pub dy: Val,
    /// Weights.
    pub w: Val,
    /// Gradients of the parts of x from elsewhere.
    pub add: [Option<Val>; 2],
    /// Sizes.
    pub shape: ConvShape,
}

/// Gradient of [`Conv2d`] with respect to weights, bias and shift.
#[derive(Clone, Debug)]
pub struct Conv2dBackwardWeight {
    /// Gradient of the weights.
    pub dw: Val,
    /// Gradient of the bias.
    pub db: Option<Val>,
    /// Gradient of the shift: rows of a matrix from this column on.
    pub dshift: Option<(Val, usize)>,
    /// Gradient of y.
    pub dy: Val,
    /// Input.
    pub x: Source,
    /// Add to `dw` and `db` rather than overwrite them.
    pub accumulate: bool,
    /// Sizes.
    pub shape: ConvShape,
}

/// What a convolution does besides the product with its weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConvOptions {
    /// Stride 2 rather than 1.
    pub downsample: bool,
    /// No padding before the image, one row and column behind it.
    pub pad_behind: bool,
    /// Nearest-neighbour enlargement by 2 before it.
    pub upsample: bool,
    /// Per-image, per-channel addend: rows of a matrix from this column on.
    pub shift: Option<(Val, usize)>,
    /// Addend of the shape of y.
    pub residual: Option<Val>,
}

impl Conv2d {
    /// Appends the convolution of `x` with `w` (oc, k, k, c), bias `b`.
    pub fn record(g: &mut Graph, x: Source, w: Val, b: Option<Val>, o: ConvOptions) -> Val {
        let (s, ws) = (g.shape(x.a), g.shape(w));
        let shape = ConvShape {
            n: s.n,
            h: s.h,
            w: s.w,
            ca: s.c,
            cb: x.b.map_or(0, |b| g.shape(b).c),
            oc: ws.n,
            k: ws.h,
            stride: 1 + usize::from(o.downsample),
            upsample: o.upsample,
            pad: if o.pad_behind { 0 } else { ws.h / 2 },
        };
        shape.check();
        assert_eq!(shape.c(), ws.c, "conv2d: {} input channels for {}", shape.c(), g[w].name);
        let y = g.activation("conv2d", Shape::new(s.n, shape.oh(), shape.ow(), shape.oc));
        g.push(Conv2d { y, sums: None, x, w, b, shift: o.shift, residual: o.residual, shape });
        y
    }

    /// The statistics of the parts of `y`, which the convolution that makes it is to leave behind; none if none makes it.
    pub fn sums_of(g: &mut Graph, y: Val) -> Option<(Val, Parts)> {
        let i = g.steps.iter().rposition(|step| matches!(&step.op, Op::Conv2d(conv) if conv.y == y))?;
        let Op::Conv2d(conv) = g.steps[i].op.clone() else { return None };
        let (s, parts) = (conv.shape, Parts::of_conv(&conv.shape));
        let sums = conv.sums.unwrap_or_else(|| g.arena("sums", Shape::new(s.n, parts.parts(), 2, s.oc)));
        g.steps[i].op = Conv2d { sums: Some(sums), ..conv }.into();
        Some((sums, parts))
    }
}

impl ConvShape {
    /// Multiply-adds, times two: the enlarged image of an upsampling convolution has four kinds of pixel, each of
    /// which sees 2x2 pixels of the small one.
    pub fn flops(&self) -> f64 {
        let taps = if self.upsample { 4 } else { self.k * self.k };
        2.0 * (self.n * self.oh() * self.ow() * self.oc * taps * self.c()) as f64
    }
}
