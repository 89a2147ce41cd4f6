//! Cutting work into jobs, and outputs that jobs write side by side.

use rayon::prelude::*;

/// Calls `f` for every job number, on all threads of the current pool.
pub(super) fn for_each_job(jobs: usize, f: impl Fn(usize) + Sync + Send) {
    if jobs == 1 {
        f(0);
    } else {
        (0..jobs).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// A sensible number of jobs for this much arithmetic: of some microseconds each, at most 32.
pub(super) fn jobs_for(flops: usize) -> usize {
    (flops / 1_000_000).clamp(1, 32)
}

/// Part `i` of `parts` of `0..len`, cut at multiples of `grain`.
pub(super) fn part(len: usize, grain: usize, i: usize, parts: usize) -> std::ops::Range<usize> {
    let grains = len.div_ceil(grain);
    let cut = |i: usize| (grains * i / parts * grain).min(len);
    cut(i)..cut(i + 1)
}

/// A slice that several jobs write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: jobs write disjoint elements, the promise made to `at` and `slice`.
unsafe impl Send for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), borrow: std::marker::PhantomData }
    }

    /// Pointer to the `len` elements from `i` on.
    ///
    /// # Safety
    /// No other job touches them while the pointer is in use.
    #[inline(always)]
    pub unsafe fn at(&self, i: usize, len: usize) -> *mut f32 {
        debug_assert!(i + len <= self.len, "elements {i}..{} of {}", i + len, self.len);
        // SAFETY: within the slice.
        unsafe { self.start.add(i) }
    }

    /// The `len` elements from `i` on.
    ///
    /// # Safety
    /// No other job touches them while the slice lives.
    pub unsafe fn slice(&self, i: usize, len: usize) -> &'a mut [f32] {
        assert!(i + len <= self.len, "elements {i}..{} of {}", i + len, self.len);
        // SAFETY: within the slice, and this job's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i), len) }
    }
}

/// Floats to add to a scratch length so that its use can start at a cache line.
pub(super) const ALIGN: usize = 16;

/// The part of `scratch` from its first cache line on.
pub(super) fn aligned(scratch: &mut [f32]) -> &mut [f32] {
    let skip = scratch.as_ptr().align_offset(64);
    &mut scratch[skip..]
}
