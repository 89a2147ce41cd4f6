//! A convolution seen along one axis, so that all its forms are one: forward and backward, stride 1 and 2, upsampled.
//!
//! Destination index `step·g + phase` sums source index `stride·g + offset` over the taps of its phase, each weighted by
//! the sum of the kernel entries in its `mask`. An upsampled 3x3 convolution has two phases of two taps with summed
//! weights (4/9 of the products); the transpose of a stride-2 convolution has phases of one and two taps.

use crate::ops::conv2d::ConvShape;

/// One term: where it reads, and which kernel entries (bits) weigh it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AxisTap {
    /// Source index less `stride·g`.
    pub offset: isize,
    /// Bit i set: kernel entry i is part of the weight.
    pub mask: u8,
}

/// A convolution along one axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    /// Source indices per g.
    pub stride: usize,
    /// Destination indices per g.
    pub step: usize,
    /// The taps of each phase.
    pub phases: &'static [&'static [AxisTap]],
}

const fn tap(offset: isize, mask: u8) -> AxisTap {
    AxisTap { offset, mask }
}

const POINT: &[AxisTap] = &[tap(0, 0b1)];
const THREE: &[AxisTap] = &[tap(-1, 0b001), tap(0, 0b010), tap(1, 0b100)];
const THREE_BACK: &[AxisTap] = &[tap(-1, 0b100), tap(0, 0b010), tap(1, 0b001)];
const UP: [&[AxisTap]; 2] = [&[tap(-1, 0b001), tap(0, 0b110)], &[tap(0, 0b011), tap(1, 0b100)]];
const UP_BACK: &[AxisTap] = &[tap(-1, 0b100), tap(0, 0b110), tap(1, 0b011), tap(2, 0b001)];
const HALF_BACK: [&[AxisTap]; 2] = [&[tap(0, 0b010)], &[tap(0, 0b100), tap(1, 0b001)]];
/// The padding behind the image alone.
const AHEAD: &[AxisTap] = &[tap(0, 0b001), tap(1, 0b010), tap(2, 0b100)];
const AHEAD_BACK: [&[AxisTap]; 2] = [&[tap(-1, 0b100), tap(0, 0b001)], &[tap(0, 0b010)]];

impl Axis {
    /// From x to y.
    pub fn forward(s: &ConvShape) -> Self {
        match (s.k, s.upsample) {
            (1, _) => Axis { stride: s.stride, step: 1, phases: &[POINT] },
            (_, false) if s.pad == 0 => Axis { stride: s.stride, step: 1, phases: &[AHEAD] },
            (_, false) => Axis { stride: s.stride, step: 1, phases: &[THREE] },
            (_, true) => Axis { stride: 1, step: 2, phases: &UP },
        }
    }

    /// From dy to dx.
    pub fn backward(s: &ConvShape) -> Self {
        match (s.k, s.stride, s.upsample) {
            (_, _, true) => Axis { stride: 2, step: 1, phases: &[UP_BACK] },
            (1, 1, _) => Axis { stride: 1, step: 1, phases: &[POINT] },
            (1, _, _) => Axis { stride: 1, step: 2, phases: &[POINT, &[]] },
            (_, 1, _) => Axis { stride: 1, step: 1, phases: &[THREE_BACK] },
            (..) if s.pad == 0 => Axis { stride: 1, step: 2, phases: &AHEAD_BACK },
            (..) => Axis { stride: 1, step: 2, phases: &HALF_BACK },
        }
    }

    /// Taps of all phases.
    pub fn taps(&self) -> usize {
        self.phases.iter().map(|taps| taps.len()).sum()
    }

    /// Number of g whose destination in `phase` is below `len`.
    pub fn count(&self, phase: usize, len: usize) -> usize {
        (len + self.step - 1 - phase) / self.step
    }
}

/// One phase of both axes: its taps in rows first order are `rows × cols`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    /// Phase along y and x.
    pub at: [usize; 2],
    /// Taps along y.
    pub rows: &'static [AxisTap],
    /// Taps along x.
    pub cols: &'static [AxisTap],
    /// Taps of the phases before this one.
    pub first: usize,
}

impl Phase {
    /// The phases of `axis` along both axes.
    pub fn all(axis: Axis) -> impl Iterator<Item = Phase> {
        let count = axis.phases.len();
        (0..count * count).scan(0, move |first, i| {
            let at = [i / count, i % count];
            let phase = Phase { at, rows: axis.phases[at[0]], cols: axis.phases[at[1]], first: *first };
            *first += phase.taps();
            Some(phase)
        })
    }

    /// Number of taps.
    pub fn taps(&self) -> usize {
        self.rows.len() * self.cols.len()
    }

    /// Tap `i` as (along y, along x).
    pub fn tap(&self, i: usize) -> (AxisTap, AxisTap) {
        (self.rows[i / self.cols.len()], self.cols[i % self.cols.len()])
    }
}
