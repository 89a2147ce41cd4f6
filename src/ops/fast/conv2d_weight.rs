//! Gradients of a convolution's parameters: per tap the product of dyᵀ and the x under it, as register tiles of output ×
//! input channels that sum over pixels.
//!
//! The images are cut into parts and the output channels into columns by shape alone; each part sums its images into
//! its own partial weights, which are then added in order. Upsampled convolutions sum their 16 taps over the small
//! image and fold them to 9 at the end.

use super::axis::{Axis, AxisTap, Phase};
use super::columns::{Columns, column_sums};
use super::isa::{Isa, Kernel};
use super::parallel::{ALIGN, Disjoint, aligned, for_each_job, jobs_for, part};
use super::simd::Vector;
use super::tile::{Target, Terms, outer_product};
use crate::ops::conv2d::ConvShape;
use crate::ops::view::{Cat, RowsMut};

/// Output channels are cut at multiples of this.
const GRAIN: usize = 16;
/// Floats of x and dy that a job works on at a time, so that they stay in the second-level cache.
const RESIDENT: usize = 64 << 10;

/// Floats of scratch that [`backward_weight`] needs.
pub fn backward_weight_scratch(s: &ConvShape) -> usize {
    let cut = Cut::of(s);
    ALIGN + 2 * cut.pairs + cut.parts * cut.partial + s.n * s.oc
}

/// How the work on a shape is cut and laid out.
#[derive(Clone, Copy)]
struct Cut {
    /// Parts of the images, each with partial weights of its own.
    parts: usize,
    /// Columns of the output channels.
    columns: usize,
    /// Whether the lanes are output channels (partials: tap, c, oc) rather than input channels (oc, tap, c).
    swapped: bool,
    /// Taps of all phases.
    taps: usize,
    /// Pixel pairs of all taps, at most.
    pairs: usize,
    /// Values of partial weights per part.
    partial: usize,
}

impl Cut {
    fn of(s: &ConvShape) -> Self {
        let axis = Axis::forward(s);
        let taps = axis.taps() * axis.taps();
        let partial = s.oc * taps * s.c();
        let target = jobs_for(2 * s.out_pixels() * s.weights()).min(16);
        // Fewest bytes: partials are cleared, added to and read; every column reads all of x.
        let traffic = |(parts, columns): (usize, usize)| {
            target.div_ceil(parts * columns) * (3 * parts * partial + columns * s.in_pixels() * s.c())
        };
        let cuts = (0..5).map(|i| 1 << i).filter(|&parts| parts == 1 || parts <= s.n.min(target));
        let (parts, columns) = cuts
            .map(|parts| (parts, (target / parts).clamp(1, s.oc.div_ceil(GRAIN))))
            .min_by_key(|&cut| traffic(cut))
            .expect("one part is always possible");
        let lanes = |c: usize| c.next_multiple_of(16);
        let swapped = s.c() * lanes(s.oc) < s.oc * (lanes(s.ca) + lanes(s.cb));
        Cut { parts, columns, swapped, taps, pairs: taps * s.oh() * s.ow() / (axis.step * axis.step), partial }
    }

    /// Partial weights of (output channel, tap, all input channels): first value and step.
    fn row(&self, s: &ConvShape, o: usize, tap: usize) -> (usize, usize) {
        if self.swapped { (tap * s.c() * s.oc + o, s.oc) } else { ((o * self.taps + tap) * s.c(), 1) }
    }
}

/// Fast twin of [`crate::ops::conv2d::backward_weight_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward_weight(
    isa: Isa,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    dshift: Option<RowsMut>,
    dy: &[f32],
    x: Cat,
    accumulate: bool,
    s: &ConvShape,
    scratch: &mut [f32],
) {
    s.check();
    x.check(s.in_pixels(), "conv2d backward");
    assert!(dy.len() == s.out_pixels() * s.oc && dw.len() == s.weights(), "conv2d backward: lengths of dy or dw");
    let needed = backward_weight_scratch(s);
    assert!(scratch.len() >= needed, "conv2d backward: {} floats of scratch, {needed} needed", scratch.len());
    let cut = Cut::of(s);
    let (pairs, rest) = aligned(scratch).split_at_mut(2 * cut.pairs);
    let (partials, rest) = rest.split_at_mut(cut.parts * cut.partial);
    let sums = &mut rest[..s.n * s.oc];
    let pairs: &mut [[u32; 2]] = bytemuck::cast_slice_mut(pairs);
    let ends = list_pairs(pairs, s, cut.swapped);
    let (shared, shared_sums) = (Disjoint::new(partials), Disjoint::new(sums));
    for_each_job(cut.parts * cut.columns, |job| {
        let (i, column) = (job / cut.columns, part(s.oc, GRAIN, job % cut.columns, cut.columns));
        let images = part(s.n, 1, i, cut.parts);
        isa.run(Job {
            dy,
            x,
            s,
            cut,
            pairs,
            ends: &ends,
            images,
            column,
            part: i,
            partials: shared,
            sums: shared_sums,
        });
    });
    fold(dw, partials, accumulate, s, &cut);
    if let Some(db) = db {
        assert_eq!(db.len(), s.oc, "conv2d backward: length of db");
        for (o, db) in db.iter_mut().enumerate() {
            let sum: f32 = sums[o..].iter().step_by(s.oc).sum();
            *db = if accumulate { *db + sum } else { sum };
        }
    }
    if let Some(mut dshift) = dshift {
        (0..s.n).for_each(|n| dshift.row(n, s.oc).copy_from_slice(&sums[n * s.oc..][..s.oc]));
    }
}

/// For each tap of each phase, the (output, input) pixels of one image that it multiplies, those in the padding left
/// out; (input, output) if `swapped`. Returns where each tap's list ends.
fn list_pairs(pairs: &mut [[u32; 2]], s: &ConvShape, swapped: bool) -> [usize; 16] {
    let axis = Axis::forward(s);
    let (mut ends, mut tap, mut end) = ([0; 16], 0, 0);
    for phase in Phase::all(axis) {
        let grid = [axis.count(phase.at[0], s.oh()), axis.count(phase.at[1], s.ow())];
        for i in 0..phase.taps() {
            let (ty, tx) = phase.tap(i);
            let cols = inside(&axis, tx, grid[1], s.w);
            for y in inside(&axis, ty, grid[0], s.h) {
                let dst = (y * axis.step + phase.at[0]) * s.ow() + phase.at[1];
                let src = (y * axis.stride).wrapping_add_signed(ty.offset) * s.w;
                for (pair, x) in pairs[end..].iter_mut().zip(cols.clone()) {
                    let column = (x * axis.stride).wrapping_add_signed(tx.offset);
                    let (dst, src) = ((dst + x * axis.step) as u32, (src + column) as u32);
                    *pair = if swapped { [src, dst] } else { [dst, src] };
                }
                end += cols.len();
            }
            ends[tap] = end;
            tap += 1;
        }
    }
    ends
}

/// The g below `grid` whose source index under `tap` lies in `0..len`.
fn inside(axis: &Axis, tap: AxisTap, grid: usize, len: usize) -> std::ops::Range<usize> {
    let first = usize::from(tap.offset < 0);
    let last = (len as isize - tap.offset + axis.stride as isize - 1) / axis.stride as isize;
    first..(last.max(0) as usize).min(grid).max(first)
}

/// Adds the partial weights in order, and taps that share a kernel entry with them.
fn fold(dw: &mut [f32], partials: &[f32], accumulate: bool, s: &ConvShape, cut: &Cut) {
    let (c, entries) = (s.c(), s.k * s.k);
    let dw = Disjoint::new(dw);
    let jobs = jobs_for(4 * partials.len()).min(s.oc);
    for_each_job(jobs, |job| {
        for o in part(s.oc, 1, job, jobs) {
            // SAFETY: the rows of different output channels do not meet.
            let rows = unsafe { dw.slice(o * entries * c, entries * c) };
            if !accumulate {
                rows.fill(0.0);
            }
            for phase in Phase::all(Axis::forward(s)) {
                for i in 0..phase.taps() {
                    let (ty, tx) = phase.tap(i);
                    let touched = |entry: usize| (ty.mask >> (entry / s.k)) & (tx.mask >> (entry % s.k)) & 1 == 1;
                    for row in (0..entries).filter(|&entry| touched(entry)).map(|entry| entry * c..(entry + 1) * c) {
                        for partial in partials.chunks_exact(cut.partial) {
                            let (start, step) = cut.row(s, o, phase.first + i);
                            let row = &mut rows[row.clone()];
                            if step == 1 {
                                row.iter_mut().zip(&partial[start..]).for_each(|(dw, sum)| *dw += sum);
                            } else {
                                let column = partial[start..].iter().step_by(step);
                                row.iter_mut().zip(column).for_each(|(dw, sum)| *dw += sum);
                            }
                        }
                    }
                }
            }
        }
    });
}

/// One job: the sums of some images for some output channels.
struct Job<'a> {
    dy: &'a [f32],
    x: Cat<'a>,
    s: &'a ConvShape,
    cut: Cut,
    pairs: &'a [[u32; 2]],
    ends: &'a [usize; 16],
    images: std::ops::Range<usize>,
    column: std::ops::Range<usize>,
    part: usize,
    partials: Disjoint<'a>,
    sums: Disjoint<'a>,
}

impl Kernel for Job<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Job { dy, s, cut, ref column, .. } = self;
        let (width, image) = (column.len(), s.oh() * s.ow());
        if width == 0 {
            return;
        }
        self.clear();
        let group = (RESIDENT / (s.h * s.w * s.c() + image * width)).max(1);
        let mut first = self.images.start;
        while first < self.images.end {
            let images = group.min(self.images.end - first);
            for n in first..first + images {
                // SAFETY: the sums of these images and channels are this job's; the columns lie in dy.
                unsafe {
                    let start = dy.as_ptr().add(n * image * s.oc + column.start);
                    let columns = Columns { start, rows: image, pitch: s.oc, width };
                    column_sums::<V>(self.sums.slice(n * s.oc + column.start, width), columns);
                }
            }
            for tap in 0..cut.taps {
                let start = if tap == 0 { 0 } else { self.ends[tap - 1] };
                self.multiply::<V>(tap, &self.pairs[start..self.ends[tap]], first, images);
            }
            first += images;
        }
    }
}

impl Job<'_> {
    /// Zeroes the partial weights of this job.
    #[inline(always)]
    fn clear(&self) {
        let Job { s, cut, ref column, .. } = *self;
        for tap in 0..cut.taps {
            if cut.swapped {
                for c in 0..s.c() {
                    let at = self.part * cut.partial + (tap * s.c() + c) * s.oc + column.start;
                    // SAFETY: this job's part and channels.
                    unsafe { self.partials.slice(at, column.len()).fill(0.0) };
                }
            } else {
                for o in column.clone() {
                    let at = self.part * cut.partial + (o * cut.taps + tap) * s.c();
                    // SAFETY: as above.
                    unsafe { self.partials.slice(at, s.c()).fill(0.0) };
                }
            }
        }
    }

    /// Adds the products of one tap over some images.
    #[inline(always)]
    fn multiply<V: Vector>(&self, tap: usize, pairs: &[[u32; 2]], first: usize, images: usize) {
        let Job { dy, x, s, cut, ref column, .. } = *self;
        let (in_image, out_image) = (s.h * s.w, s.oh() * s.ow());
        for (source, c, c0) in [(x.a, x.ca, 0), (x.b, x.cb, x.ca)] {
            if c == 0 {
                continue;
            }
            // SAFETY: pixels of the pairs are inside their images, images and channels inside the tensors; the target
            // is this job's part and channels.
            unsafe {
                let dy = dy.as_ptr().add(first * out_image * s.oc + column.start);
                let source = source.as_ptr().add(first * in_image * c);
                let (row, step) = cut.row(s, column.start, tap);
                let start = self.partials.at(self.part * cut.partial + row + c0 * step, 1);
                if cut.swapped {
                    let terms = Terms { pairs, images, pitch: [c, s.oc], image: [in_image * c, out_image * s.oc] };
                    outer_product::<V>(Target { start, pitch: s.oc }, source, dy, &terms, (c, column.len()));
                } else {
                    let terms = Terms { pairs, images, pitch: [s.oc, c], image: [out_image * s.oc, in_image * c] };
                    let pitch = cut.taps * s.c();
                    outer_product::<V>(Target { start, pitch }, dy, source, &terms, (column.len(), c));
                }
            }
        }
    }
}
