//! Convolution forward and gradient of its input: a register tile of output pixels × channels over packed weights.
//!
//! A tile is any 12 (or 6, 4) consecutive output pixels, of several rows or images if need be. Each tap reads every
//! pixel through its own pointer, and what lies in the padding points to zeros; so there are no borders, no copies and
//! no two ways for one or two sources. Stride, upsampling and both directions differ only in their `Axis`.

pub use super::conv2d_weight::{backward_weight, backward_weight_scratch};

use super::axis::{Axis, AxisTap, Phase};
use super::isa::{Isa, Kernel};
use super::parallel::{ALIGN, Disjoint, aligned, for_each_job, jobs_for, part};
use super::simd::Vector;
use super::tile::{MAX_ROWS, MAX_WIDTH, RowPointers, Target, Tile, block_width, rows_product};
use crate::ops::conv2d::ConvShape;
use crate::ops::view::{Cat, Rows};

/// Most taps of a phase, times two sources.
const MAX_SEGMENTS: usize = 32;

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(s: &ConvShape) -> usize {
    scratch_for(Axis::forward(s), s.ca.max(s.cb), s.c(), s.oc)
}

/// Floats of scratch that [`backward_data`] needs.
pub fn backward_data_scratch(s: &ConvShape) -> usize {
    scratch_for(Axis::backward(s), s.oc, s.oc, s.c())
}

/// Zeros for the padding, then the packed weights.
fn scratch_for(axis: Axis, widest: usize, inputs: usize, outputs: usize) -> usize {
    let taps = axis.taps() * axis.taps();
    ALIGN + widest.next_multiple_of(ALIGN) + taps * inputs * outputs.next_multiple_of(MAX_WIDTH)
}

/// Fast twin of [`crate::ops::conv2d::forward_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn forward(
    isa: Isa,
    y: &mut [f32],
    x: Cat,
    w: &[f32],
    bias: Option<&[f32]>,
    shift: Option<Rows>,
    residual: Option<Cat>,
    s: &ConvShape,
    scratch: &mut [f32],
) {
    s.check();
    x.check(s.in_pixels(), "conv2d forward");
    assert!(y.len() == s.out_pixels() * s.oc && w.len() == s.weights(), "conv2d forward: lengths of y or w");
    assert!(bias.is_none_or(|bias| bias.len() == s.oc), "conv2d forward: length of bias");
    if let Some(shift) = shift {
        assert!(shift.data.len() >= (s.n - 1) * shift.stride + shift.col + s.oc, "conv2d forward: length of shift");
    }
    if let Some(residual) = residual {
        assert_eq!(residual.c(), s.oc, "conv2d forward: channels of the residual");
        residual.check(s.out_pixels(), "conv2d forward: residual");
    }
    let add = [residual.map(|r| r.a), residual.map(|r| r.b)];
    let add_ca = residual.map_or(s.oc, |r| r.ca);
    let epilogue =
        Epilogue { out: [Disjoint::new(y), Disjoint::new(&mut [])], ca: s.oc, c: s.oc, bias, shift, add, add_ca };
    let weights = Weights { w, k: s.k, c: s.c(), transposed: false };
    Convolution { axis: Axis::forward(s), n: s.n, from: [s.h, s.w], to: [s.oh(), s.ow()], src: x, weights, epilogue }
        .run(isa, scratch);
}

/// Fast twin of [`crate::ops::conv2d::backward_data_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward_data(
    isa: Isa,
    dxa: &mut [f32],
    dxb: &mut [f32],
    dy: &[f32],
    w: &[f32],
    add_a: Option<&[f32]>,
    add_b: Option<&[f32]>,
    s: &ConvShape,
    scratch: &mut [f32],
) {
    s.check();
    assert!(dxa.len() == s.in_pixels() * s.ca && dxb.len() == s.in_pixels() * s.cb, "conv2d backward: length of dx");
    assert!(dy.len() == s.out_pixels() * s.oc && w.len() == s.weights(), "conv2d backward: lengths of dy or w");
    assert!(add_a.is_none_or(|add| add.len() == dxa.len()), "conv2d backward: length of add_a");
    assert!(add_b.is_none_or(|add| add.len() == dxb.len()), "conv2d backward: length of add_b");
    let epilogue = Epilogue {
        out: [Disjoint::new(dxa), Disjoint::new(dxb)],
        ca: s.ca,
        c: s.c(),
        bias: None,
        shift: None,
        add: [add_a, add_b],
        add_ca: s.ca,
    };
    let weights = Weights { w, k: s.k, c: s.c(), transposed: true };
    let (from, to, src) = ([s.oh(), s.ow()], [s.h, s.w], Cat::single(dy, s.oc));
    Convolution { axis: Axis::backward(s), n: s.n, from, to, src, weights, epilogue }.run(isa, scratch);
}

/// The weights (oc, k, k, c), seen from the input (lanes are oc) or, transposed, from the output (lanes are c).
#[derive(Clone, Copy)]
struct Weights<'a> {
    w: &'a [f32],
    k: usize,
    c: usize,
    transposed: bool,
}

impl Weights<'_> {
    /// Writes lanes `first..first + width` of one tap as `dst[input][lane]`; lanes beyond the weights are 0.
    fn pack(&self, dst: &mut [f32], (rows, cols): (AxisTap, AxisTap), first: usize, width: usize) {
        dst.fill(0.0);
        for entry in 0..self.k * self.k {
            let (kh, kw) = (entry / self.k, entry % self.k);
            if rows.mask >> kh & 1 == 0 || cols.mask >> kw & 1 == 0 {
                continue;
            }
            let row = |o: usize| &self.w[(o * self.k * self.k + entry) * self.c..][..self.c];
            if self.transposed {
                let lanes = width.min(self.c - first);
                for (o, dst) in dst.chunks_exact_mut(width).enumerate() {
                    dst[..lanes].iter_mut().zip(&row(o)[first..]).for_each(|(dst, w)| *dst += w);
                }
            } else {
                let oc = self.w.len() / (self.k * self.k * self.c);
                for lane in 0..width.min(oc - first) {
                    let column = dst[lane..].iter_mut().step_by(width);
                    column.zip(row(first + lane)).for_each(|(dst, w)| *dst += w);
                }
            }
        }
    }
}

/// What is added to a tile, and where it is stored.
struct Epilogue<'a> {
    /// The two destinations, of `ca` and `c - ca` channels.
    out: [Disjoint<'a>; 2],
    ca: usize,
    c: usize,
    bias: Option<&'a [f32]>,
    shift: Option<Rows<'a>>,
    /// Added tensors, of `add_ca` and `c - add_ca` channels.
    add: [Option<&'a [f32]>; 2],
    add_ca: usize,
}

impl Epilogue<'_> {
    /// Finishes and stores the sums of a tile: `width` channels from `first` on of `count` pixels.
    ///
    /// # Safety
    /// The tensors have the pixels and channels (`forward` and `backward_data` check their lengths), and no other job
    /// stores them.
    #[inline(always)]
    unsafe fn store<V: Vector>(&self, tile: &Tile, at: &Pixels, count: usize, first: usize, width: usize) {
        let end = width.min(self.c - first);
        let mut l = 0;
        while l < end {
            // At most a vector, and within one piece of what is stored and of what is added.
            let (c0, mut lanes) = (first + l, V::LANES.min(end - l));
            for cut in [self.ca, self.add_ca] {
                if cut > c0 {
                    lanes = lanes.min(cut - c0);
                }
            }
            let (to, out_pitch, out_c0) = piece(c0, self.ca, self.c);
            let (from, add_pitch, add_c0) = piece(c0, self.add_ca, self.c);
            let (out, add) = (self.out[to], self.add[from]);
            // SAFETY: the caller's promise.
            unsafe {
                let bias = self.bias.map_or(V::splat(0.0), |bias| V::load_first(bias.as_ptr().add(c0), lanes));
                for p in 0..count {
                    let mut v = V::load_first(tile.0.as_ptr().add(p * width + l), lanes).add(bias);
                    if let Some(shift) = self.shift {
                        let row = shift.data.as_ptr().add(at.image[p] * shift.stride + shift.col);
                        v = v.add(V::load_first(row.add(c0), lanes));
                    }
                    if let Some(add) = add {
                        v = v.add(V::load_first(add.as_ptr().add(at.dst[p] * add_pitch + add_c0), lanes));
                    }
                    v.store_first(out.at(at.dst[p] * out_pitch + out_c0, lanes), lanes);
                }
            }
            l += lanes;
        }
    }
}

/// Channel `c0` of two tensors of `ca` and `c - ca` channels: which of them, its channels, and the channel in it.
#[inline(always)]
fn piece(c0: usize, ca: usize, c: usize) -> (usize, usize, usize) {
    if c0 < ca { (0, ca, c0) } else { (1, c - ca, c0 - ca) }
}

/// A convolution of any kind: dst[step·g + phase] = Σ_taps src[stride·g + offset] · weights.
struct Convolution<'a> {
    axis: Axis,
    n: usize,
    /// Height and width of the source.
    from: [usize; 2],
    /// Height and width of the destination.
    to: [usize; 2],
    src: Cat<'a>,
    weights: Weights<'a>,
    epilogue: Epilogue<'a>,
}

impl Convolution<'_> {
    fn run(self, isa: Isa, scratch: &mut [f32]) {
        let widest = self.src.ca.max(self.src.cb);
        let needed = scratch_for(self.axis, widest, self.src.c(), self.epilogue.c);
        assert!(scratch.len() >= needed, "conv2d: {} floats of scratch, {needed} needed", scratch.len());
        let (zeros, packed) = aligned(scratch).split_at_mut(widest.next_multiple_of(ALIGN));
        zeros.fill(0.0);
        let flops = 2 * self.n * self.to[0] * self.to[1] * self.weights.w.len();
        self.pack(isa.lanes(), packed, jobs_for(flops) > 1);
        let chunks = jobs_for(flops).min((self.n * self.to[0] * self.to[1]).div_ceil(2 * MAX_ROWS));
        let columns = (jobs_for(flops) / chunks).clamp(1, self.epilogue.c.div_ceil(MAX_WIDTH));
        for_each_job(chunks * columns, |job| {
            let (chunk, column) = ([job / columns, chunks], [job % columns, columns]);
            isa.run(Job { conv: &self, zeros, packed, chunk, column });
        });
    }

    /// Start in the packed weights of a tap of a phase, for the block of channels that starts at `first`.
    #[inline(always)]
    fn packed_at(&self, phase: &Phase, first: usize, tap: usize, lanes: usize) -> usize {
        let c = self.epilogue.c;
        let last = (c - 1) / (2 * lanes) * 2 * lanes;
        let whole = last + block_width(c, last, lanes);
        self.src.c() * (phase.first * whole + phase.taps() * first + tap * block_width(c, first, lanes))
    }

    /// Brings the weights into the order the tiles read them: phase, block of channels, tap, input channel, lane.
    fn pack(&self, lanes: usize, packed: &mut [f32], parallel: bool) {
        let packed = Disjoint::new(packed);
        let (taps, blocks) = (self.axis.taps() * self.axis.taps(), self.epilogue.c.div_ceil(2 * lanes));
        let pack = |i: usize| {
            let (tap, first) = (i / blocks, i % blocks * 2 * lanes);
            let phase = Phase::all(self.axis).find(|phase| tap < phase.first + phase.taps()).expect("a tap of a phase");
            let (tap, width) = (tap - phase.first, block_width(self.epilogue.c, first, lanes));
            // SAFETY: each tap and block has its own part of the packed weights.
            let dst = unsafe { packed.slice(self.packed_at(&phase, first, tap, lanes), self.src.c() * width) };
            self.weights.pack(dst, phase.tap(tap), first, width);
        };
        if parallel {
            for_each_job(taps * blocks, pack);
        } else {
            (0..taps * blocks).for_each(pack);
        }
    }
}

/// One job: part `chunk[0]` of `chunk[1]` of the pixels of every phase, times part `column` of the output channels.
struct Job<'a> {
    conv: &'a Convolution<'a>,
    zeros: &'a [f32],
    packed: &'a [f32],
    chunk: [usize; 2],
    column: [usize; 2],
}

/// The output pixels of a tile.
struct Pixels {
    /// Position under the tap of offset 0; far outside the image for rows of the tile that are not used.
    y: [isize; MAX_ROWS],
    x: [isize; MAX_ROWS],
    /// That position as a pixel of the source, all images together.
    src: [isize; MAX_ROWS],
    image: [usize; MAX_ROWS],
    /// Pixel of the destination, all images together.
    dst: [usize; MAX_ROWS],
}

impl Kernel for Job<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let conv = self.conv;
        let c = conv.epilogue.c;
        let columns = part(c, 2 * V::LANES, self.column[0], self.column[1]);
        let lengths = [conv.src.ca, conv.src.cb];
        let lengths = &lengths[..if conv.src.cb > 0 { 2 } else { 1 }];
        let mut rows = [[self.zeros.as_ptr(); MAX_ROWS]; MAX_SEGMENTS];
        let mut tile = Tile([0.0; MAX_ROWS * MAX_WIDTH]);
        for phase in Phase::all(conv.axis) {
            let grid = [0, 1].map(|i| conv.axis.count(phase.at[i], conv.to[i]));
            let pixels = part(conv.n * grid[0] * grid[1], V::ROWS, self.chunk[0], self.chunk[1]);
            let mut start = pixels.start;
            while start < pixels.end {
                let count = V::ROWS.min(pixels.end - start);
                let at = self.locate(&phase, grid, start, count);
                self.point(&mut rows, &phase, &at, lengths);
                let segments = &rows[..phase.taps() * lengths.len()];
                let mut first = columns.start;
                while first < columns.end {
                    let width = block_width(c, first, V::LANES);
                    // SAFETY: the pointers reach `lengths` values each (`point`), and the block holds all taps.
                    unsafe {
                        let right = self.packed.as_ptr().add(conv.packed_at(&phase, first, 0, V::LANES));
                        let target = Target { start: tile.0.as_mut_ptr(), pitch: width };
                        rows_product::<V>(target, (count, width / V::LANES), segments, lengths, right);
                    }
                    // SAFETY: these pixels and channels are this job's.
                    unsafe { conv.epilogue.store::<V>(&tile, &at, count, first, width) };
                    first += width;
                }
                start += count;
            }
        }
    }
}

impl Job<'_> {
    /// Where the `count` grid points from `start` on read and write.
    #[inline(always)]
    fn locate(&self, phase: &Phase, grid: [usize; 2], start: usize, count: usize) -> Pixels {
        let Convolution { axis, from: [h, w], to: [to_h, to_w], .. } = *self.conv;
        let outside = isize::MIN / 2;
        let mut at = Pixels {
            y: [outside; MAX_ROWS],
            x: [outside; MAX_ROWS],
            src: [0; MAX_ROWS],
            image: [0; MAX_ROWS],
            dst: [0; MAX_ROWS],
        };
        let (mut n, mut y, mut x) = (start / grid[1] / grid[0], start / grid[1] % grid[0], start % grid[1]);
        for p in 0..count {
            (at.y[p], at.x[p]) = ((y * axis.stride) as isize, (x * axis.stride) as isize);
            at.src[p] = (n * h * w + y * axis.stride * w + x * axis.stride) as isize;
            at.image[p] = n;
            at.dst[p] = (n * to_h + y * axis.step + phase.at[0]) * to_w + x * axis.step + phase.at[1];
            x += 1;
            if x == grid[1] {
                (x, y) = (0, y + 1);
                if y == grid[0] {
                    (y, n) = (0, n + 1);
                }
            }
        }
        at
    }

    /// Points every tap and source of every row of the tile at its channels, or at zeros outside the image.
    #[inline(always)]
    fn point(&self, rows: &mut [RowPointers; MAX_SEGMENTS], phase: &Phase, at: &Pixels, lengths: &[usize]) {
        let [h, w] = self.conv.from;
        let sources = [self.conv.src.a.as_ptr(), self.conv.src.b.as_ptr()];
        let mut segment = 0;
        for ty in phase.rows {
            for tx in phase.cols {
                let step = ty.offset * w as isize + tx.offset;
                for (source, &channels) in sources.iter().zip(lengths) {
                    // Without branches, which would be hard to foresee, and in vectors.
                    for (p, row) in rows[segment].iter_mut().enumerate() {
                        let (y, x) = ((at.y[p] + ty.offset) as usize, (at.x[p] + tx.offset) as usize);
                        let pixel = source.wrapping_offset((at.src[p] + step) * channels as isize);
                        *row = if (y < h) & (x < w) { pixel } else { self.zeros.as_ptr() };
                    }
                    segment += 1;
                }
            }
        }
    }
}
