//! What the convolution kernels are told: the argument structs of `kernels/conv2d_gemm.cuh` and `kernels/conv2d_weight.cuh`.
//!
//! All directions join pixels of a grid with pixels of an image under a table of taps: pixel `i·step + dy` of the image with
//! pixel i of the grid (rows and columns alike), which is pixel `i·out_step + phase` of the output. With `pad` zeros before the image:
//!
//! | direction | grid | gathered | taps per dimension |
//! |---|---|---|---|
//! | forward | y | x, step = stride | dy = k - pad |
//! | forward, upsampling | x; phase p of y | x | a in {0, 1}: dy = p - 1 + a, folded row 3 - p - 2a |
//! | data gradient | x | dy | dy = pad - k |
//! | data gradient, stride 2 | half of x; phase p | dy | the k with p + pad - k even: dy = (p + pad - k)/2 |
//! | data gradient, upsampling | x | dy, step = 2 | folded row r: dy = r - 1 |
//! | weight gradient | y | x, step = stride | dy = k - pad |
//! | weight gradient, upsampling | x | dy, step = 2 | folded row r: dy = r - 1 |
//!
//! Upsampling reads every small pixel under two rows of the 3x3 at once. The folded weights (oc, 4, 4, c) hold those sums: row r is
//! the sum of the rows 2 - r and 3 - r that exist. That is 4 products per output pixel where 9 were.

use super::ConvShape;
use crate::device::driver::{Arg, Ptr};
use bytemuck::{Pod, Zeroable};

/// Most taps of any direction.
const MAX_TAPS: usize = 16;

/// Division by a constant: n / d = (n·factor >> 32 + n) >> shift for n < 2^31.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct FastDiv {
    divisor: u32,
    factor: u32,
    shift: u32,
}

impl FastDiv {
    /// Division by `divisor`, which is 1 to 2^31.
    pub fn new(divisor: usize) -> Self {
        let d = divisor as u64;
        assert!((1..=1 << 31).contains(&d), "division by {divisor}");
        let shift = d.next_power_of_two().trailing_zeros();
        FastDiv { divisor: d as u32, factor: ((((1u64 << shift) - d) << 32) / d + 1) as u32, shift }
    }
}

/// Offset of a gathered pixel and the tap of the weights that meets it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Tap {
    dy: i8,
    dx: i8,
    w: i16,
}

/// Argument of the forward and data-gradient kernels: ConvGemm of `kernels/conv2d_gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ConvGemm {
    pub a: [Ptr; 2],
    pub w: Ptr,
    pub out: [Ptr; 2],
    pub add: [Ptr; 2],
    pub shift: Ptr,
    pub bias: Ptr,
    pub sums: Ptr,
    a_channels: [i32; 2],
    out_channels: [i32; 2],
    rows: i32,
    ah: i32,
    aw: i32,
    a_step: i32,
    oh: i32,
    ow: i32,
    out_step: i32,
    w_taps: i32,
    w_channels: i32,
    pub shift_stride: i32,
    pub tiles_n: i32,
    first_tap: [i32; 5],
    by_grid: FastDiv,
    by_width: FastDiv,
    by_channels: FastDiv,
    taps: [Tap; MAX_TAPS],
    pub phase_parts: i32,
}

impl<'a> From<&'a ConvGemm> for Arg<'a> {
    fn from(p: &'a ConvGemm) -> Self {
        Arg::Struct(bytemuck::bytes_of(p))
    }
}

/// One dimension of a tap: offset and row of the weights.
type Side = (i8, i16);

impl ConvGemm {
    /// The forward convolution, without addresses.
    pub fn forward(s: &ConvShape) -> Self {
        let pad = s.pad as i8;
        let p = if s.upsample {
            let phase = |p: i8| (0..2).map(move |a: i8| (p - 1 + a, i16::from(3 - p - 2 * a))).collect();
            Self::new(s.n, [s.h, s.w], &[phase(0), phase(1)], 4)
        } else {
            let sides: Vec<Side> = (0..s.k as i8).map(|k| (k - pad, i16::from(k))).collect();
            Self::new(s.n, [s.oh(), s.ow()], &[sides], s.k)
        };
        p.between([s.h, s.w], s.stride, [s.ca, s.cb], [s.oh(), s.ow()], [s.oc, 0], s.c())
    }

    /// The gradient with respect to the input, without addresses.
    pub fn backward_data(s: &ConvShape) -> Self {
        let (pad, k) = (s.pad as i8, s.k as i8);
        let p = if s.upsample {
            let sides: Vec<Side> = (0..4).map(|r: i8| (r - 1, i16::from(r))).collect();
            Self::new(s.n, [s.h, s.w], &[sides], 4)
        } else if s.stride == 2 {
            let met = |p: i8| (0..k).filter(move |k| (p + pad - k) % 2 == 0);
            let phase = |p: i8| met(p).map(move |k| ((p + pad - k) / 2, i16::from(k))).collect();
            Self::new(s.n, [s.h.div_ceil(2), s.w.div_ceil(2)], &[phase(0), phase(1)], s.k)
        } else {
            let sides: Vec<Side> = (0..k).map(|k| (pad - k, i16::from(k))).collect();
            Self::new(s.n, [s.h, s.w], &[sides], s.k)
        };
        let step = 1 + usize::from(s.upsample);
        p.between([s.oh(), s.ow()], step, [s.oc, 0], [s.h, s.w], [s.ca, s.cb], s.c())
    }

    /// A grid of `n` images and the taps of its phases: each pair of sides, rows first. `width`: columns of the weights' window.
    fn new(n: usize, grid: [usize; 2], sides: &[Vec<Side>], width: usize) -> Self {
        let mut p = ConvGemm {
            rows: int(n * grid[0] * grid[1]),
            by_grid: FastDiv::new(grid[0] * grid[1]),
            by_width: FastDiv::new(grid[1]),
            out_step: int(sides.len()),
            w_taps: int(width * width),
            ..Self::default()
        };
        let mut count = 0;
        for (phase, (rows, cols)) in sides.iter().flat_map(|r| sides.iter().map(move |c| (r, c))).enumerate() {
            for (&(dy, row), &(dx, col)) in rows.iter().flat_map(|r| cols.iter().map(move |c| (r, c))) {
                p.taps[count] = Tap { dy, dx, w: row * width as i16 + col };
                count += 1;
            }
            p.first_tap[phase + 1..].fill(int(count));
        }
        p
    }

    fn between(
        self,
        a: [usize; 2],
        a_step: usize,
        a_channels: [usize; 2],
        out: [usize; 2],
        out_channels: [usize; 2],
        w_channels: usize,
    ) -> Self {
        ConvGemm {
            a_channels: a_channels.map(int),
            out_channels: out_channels.map(int),
            ah: int(a[0]),
            aw: int(a[1]),
            a_step: int(a_step),
            oh: int(out[0]),
            ow: int(out[1]),
            w_channels: int(w_channels),
            by_channels: FastDiv::new(a_channels[0] + a_channels[1]),
            ..self
        }
    }

    /// Rows of the GEMM in each phase.
    pub fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Columns of the GEMM: channels of the output.
    pub fn columns(&self) -> usize {
        (self.out_channels[0] + self.out_channels[1]) as usize
    }

    /// Phases, each a GEMM of its own.
    pub fn phases(&self) -> usize {
        (self.out_step * self.out_step) as usize
    }

    /// Whether all operands can be read eight channels at a time.
    pub fn in_eights(&self) -> bool {
        self.a_channels.iter().chain([&self.w_channels]).all(|c| c % 8 == 0) && self.w.0.is_multiple_of(16)
    }
}

/// A tap of the weight gradient: where it meets dy and x, and the slot of its row sums, -1 for none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct WeightTap {
    ydy: i8,
    ydx: i8,
    xdy: i8,
    xdx: i8,
    slot: i16,
    unused: i16,
}

/// Argument of the weight-gradient kernels: ConvWeight of `kernels/conv2d_weight.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ConvWeight {
    pub dy: Ptr,
    pub x: [Ptr; 2],
    pub dw: Ptr,
    pub sums: Ptr,
    pub split_stride: i64,
    oc: i32,
    x_channels: [i32; 2],
    yh: i32,
    yw: i32,
    y_step: i32,
    xh: i32,
    xw: i32,
    x_step: i32,
    pixels: i32,
    pub segments: i32,
    pub segments_per_split: i32,
    columns: i32,
    pub tiles_n: i32,
    pub tiles_a: i32,
    pub tiles_tap: i32,
    pub flat: i32,
    pub accumulate: i32,
    by_runs: FastDiv,
    by_parts: FastDiv,
    by_width: FastDiv,
    by_channels: FastDiv,
    taps: [WeightTap; MAX_TAPS],
}

impl<'a> From<&'a ConvWeight> for Arg<'a> {
    fn from(p: &'a ConvWeight) -> Self {
        Arg::Struct(bytemuck::bytes_of(p))
    }
}

impl ConvWeight {
    /// The weight gradient without addresses, tiles and segments.
    pub fn new(s: &ConvShape) -> Self {
        let (side, pad, step) = if s.upsample { (4, 1, 2) } else { (s.k, s.pad, 1) };
        let mut taps = [WeightTap { slot: -1, ..WeightTap::default() }; MAX_TAPS];
        for (i, tap) in taps[..side * side].iter_mut().enumerate() {
            let (row, col) = ((i / side) as i8 - pad as i8, (i % side) as i8 - pad as i8);
            if s.upsample {
                (tap.ydy, tap.ydx) = (row, col);
            } else {
                (tap.xdy, tap.xdx) = (row, col);
            }
        }
        // Taps under which every pixel of dy is met once.
        let summed: &[usize] = if s.upsample { &[5, 6, 9, 10] } else { &[0] };
        summed.iter().zip(0..).for_each(|(&tap, slot)| taps[tap].slot = slot);
        let grid = if s.upsample { [s.h, s.w] } else { [s.oh(), s.ow()] };
        ConvWeight {
            oc: int(s.oc),
            x_channels: [int(s.ca), int(s.cb)],
            yh: int(s.oh()),
            yw: int(s.ow()),
            y_step: int(step),
            xh: int(s.h),
            xw: int(s.w),
            x_step: int(s.stride),
            pixels: int(grid[0] * grid[1]),
            columns: int(side * side * s.c()),
            by_width: FastDiv::new(grid[1]),
            by_channels: FastDiv::new(s.c()),
            taps,
            ..Self::default()
        }
    }

    /// Cuts the pixels of `images` images into segments, `parts` an image, for `splits` blocks along k.
    pub fn cut(&mut self, images: usize, parts: usize, splits: usize) {
        let segments = images * parts;
        self.segments = int(segments);
        self.segments_per_split = int(segments.div_ceil(splits));
        self.by_runs = FastDiv::new(self.runs().div_ceil(parts));
        self.by_parts = FastDiv::new(parts);
    }

    /// Runs of 16 pixels of an image.
    pub fn runs(&self) -> usize {
        (self.pixels as usize).div_ceil(16)
    }

    /// Blocks along k.
    pub fn splits(&self) -> usize {
        (self.segments as usize).div_ceil(self.segments_per_split as usize)
    }

    /// Elements of one partial sum.
    pub fn len(&self) -> usize {
        self.oc as usize * self.columns as usize
    }

    /// Row sums of each output channel, one per segment, that make up one row of dy's.
    pub fn slots(&self) -> usize {
        self.taps.iter().filter(|t| t.slot >= 0).count()
    }
}

/// A size as the kernels take it; the launchers refuse larger ones first.
fn int(x: usize) -> i32 {
    i32::try_from(x).expect("sizes are checked before")
}

#[cfg(test)]
mod tests {
    use super::FastDiv;

    #[test]
    fn division_by_multiplication_is_exact() {
        for divisor in (1..100).chain([127, 128, 255, 4095, 4096, 65_537, 1 << 30, (1 << 31) - 1]) {
            let f = FastDiv::new(divisor);
            for n in (0..3000u32).chain([1 << 16, (1 << 30) - 1, 1 << 30, (1 << 31) - 2, (1 << 31) - 1]) {
                let high = (u64::from(n) * u64::from(f.factor)) >> 32;
                assert_eq!((high + u64::from(n)) >> f.shift, u64::from(n) / divisor as u64, "{n} / {divisor}");
            }
        }
    }
}
