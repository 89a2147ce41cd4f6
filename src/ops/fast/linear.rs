//! The linear layer is the 1x1 convolution of images of one pixel.

use super::conv2d;
use super::isa::Isa;
use crate::ops::conv2d::ConvShape;
use crate::ops::view::Cat;

fn as_conv(n: usize, c: usize, oc: usize) -> ConvShape {
    ConvShape { n, h: 1, w: 1, ca: c, cb: 0, oc, k: 1, stride: 1, upsample: false, pad: 0 }
}

/// Outputs of a single row that are computed together: their packed weights are all the scratch it needs, rather than a
/// second copy of the whole matrix.
const PART: usize = 4096;

/// Outputs computed together.
fn part(n: usize, oc: usize) -> usize {
    if n == 1 { oc.min(PART) } else { oc }
}

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(n: usize, c: usize, oc: usize) -> usize {
    conv2d::forward_scratch(&as_conv(n, c, part(n, oc)))
}

/// Floats of scratch that [`backward_data`] needs.
pub fn backward_data_scratch(n: usize, c: usize, oc: usize) -> usize {
    conv2d::backward_data_scratch(&as_conv(n, c, oc))
}

/// Floats of scratch that [`backward_weight`] needs.
pub fn backward_weight_scratch(n: usize, c: usize, oc: usize) -> usize {
    conv2d::backward_weight_scratch(&as_conv(n, c, oc))
}

/// Fast twin of [`crate::ops::linear::forward_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn forward(
    isa: Isa,
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    b: &[f32],
    n: usize,
    c: usize,
    oc: usize,
    scratch: &mut [f32],
) {
    let part = part(n, oc);
    for ((y, w), b) in y.chunks_mut(n * part).zip(w.chunks(part * c)).zip(b.chunks(part)) {
        let s = as_conv(n, c, b.len());
        conv2d::forward(isa, y, Cat::single(x, c), w, Some(b), None, None, &s, scratch);
    }
}

/// Fast twin of [`crate::ops::linear::backward_data_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward_data(
    isa: Isa,
    dx: &mut [f32],
    dy: &[f32],
    w: &[f32],
    add: Option<&[f32]>,
    n: usize,
    c: usize,
    oc: usize,
    scratch: &mut [f32],
) {
    conv2d::backward_data(isa, dx, &mut [], dy, w, add, None, &as_conv(n, c, oc), scratch);
}

/// Fast twin of [`crate::ops::linear::backward_weight_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward_weight(
    isa: Isa,
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    x: &[f32],
    accumulate: bool,
    n: usize,
    c: usize,
    oc: usize,
    scratch: &mut [f32],
) {
    let s = as_conv(n, c, oc);
    conv2d::backward_weight(isa, dw, Some(db), None, dy, Cat::single(x, c), accumulate, &s, scratch);
}
