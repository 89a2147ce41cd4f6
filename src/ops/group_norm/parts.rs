//! Statistics of a tensor in parts: of each channel over some rows of an image, the mean and the sum of squared deviations from it.
//!
//! The convolution that makes a tensor leaves them behind, or a kernel of the norm computes them; the norm puts the parts of a group
//! together: `mean = Σ n_i mean_i / Σ n_i`, `M2 = Σ (M2_i + n_i (mean_i − mean)²)`. No sum of squares is ever taken about 0, so a mean
//! far from 0 costs nothing.

use crate::ops::conv2d::ConvShape;
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// Pixels of a part where the norm's own kernel sums them: what a block has in registers.
const IMAGE_ROWS: usize = 128;
/// Rows of the grid of a part of a convolution's output: PART_ROWS of `kernels/conv2d_gemm.cuh`. A divisor of every tile.
const CONV_ROWS: usize = 32;

/// How the images of a tensor are cut into parts: Parts of `kernels/group_norm.cuh`.
///
/// The parts of a convolution's output are cut from the pixels of all images in one count, as its tiles are: the first and last part
/// of an image may hold fewer pixels, or none. An upsampling convolution makes the four pixels of each small one apart: four phases.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Parts {
    grid: i32,
    rows: i32,
    phase_parts: i32,
    parts: i32,
    flat: i32,
    unused: i32,
}

/// A size as the kernels take it; the launchers refuse larger ones first.
pub(super) fn int(x: usize) -> i32 {
    i32::try_from(x).expect("sizes are checked before")
}

impl Parts {
    /// Of images of `s` pixels, each cut from its first pixel on.
    pub fn of_image(s: usize) -> Self {
        let parts = int(s.div_ceil(IMAGE_ROWS));
        Parts { grid: int(s), rows: int(IMAGE_ROWS), phase_parts: parts, parts, ..Self::default() }
    }

    /// Of the output of a convolution.
    pub fn of_conv(s: &ConvShape) -> Self {
        let (grid, phases) = if s.upsample { (s.h * s.w, 4) } else { (s.oh() * s.ow(), 1) };
        let aligned = grid.is_multiple_of(CONV_ROWS) || CONV_ROWS.is_multiple_of(grid);
        // An image that begins with the last row of a part touches the most.
        let phase_parts = (grid + if aligned { CONV_ROWS - 1 } else { 2 * CONV_ROWS - 2 }) / CONV_ROWS;
        Parts {
            grid: int(grid),
            rows: int(CONV_ROWS),
            phase_parts: int(phase_parts),
            parts: int(phases * phase_parts),
            flat: 1,
            unused: 0,
        }
    }

    /// Parts of an image.
    pub fn parts(&self) -> usize {
        self.parts as usize
    }

    /// Parts of one phase of an image.
    pub fn phase_parts(&self) -> usize {
        self.phase_parts as usize
    }

    /// Pixels of the grid, in image `n`, of its part `q` (of phase `q / phase_parts`); empty where there is none.
    pub fn pixels(&self, n: usize, q: usize) -> Range<usize> {
        let (grid, rows) = (self.grid as usize, self.rows as usize);
        let base = if self.flat == 1 { n * grid } else { 0 };
        let first = (base / rows + q % self.phase_parts()) * rows;
        let (from, to) = (first.max(base).min(base + grid), (first + rows).min(base + grid));
        from - base..to - base
    }
}

impl ConvShape {
    /// The statistics of the parts of `y`, (n, parts, 2, oc), as the convolution leaves them behind.
    pub fn sums_cpu(&self, sums: &mut [f32], y: &[f32]) {
        let parts = Parts::of_conv(self);
        assert_eq!(sums.len(), self.n * parts.parts() * 2 * self.oc, "conv2d: length of the sums");
        for (i, part) in sums.chunks_exact_mut(2 * self.oc).enumerate() {
            let (n, q) = (i / parts.parts(), i % parts.parts());
            let phase = q / parts.phase_parts();
            let at = |p: usize| {
                let (row, col) = if self.upsample {
                    (p / self.w * 2 + phase / 2, p % self.w * 2 + phase % 2)
                } else {
                    (p / self.ow(), p % self.ow())
                };
                ((n * self.oh() + row) * self.ow() + col) * self.oc
            };
            let (means, squares) = part.split_at_mut(self.oc);
            let count = parts.pixels(n, q).len().max(1) as f64;
            for o in 0..self.oc {
                let values = || parts.pixels(n, q).map(|p| f64::from(y[at(p) + o]));
                let mean = values().sum::<f64>() / count;
                (means[o], squares[o]) = (mean as f32, values().map(|v| (v - mean) * (v - mean)).sum::<f64>() as f32);
            }
        }
    }
}
