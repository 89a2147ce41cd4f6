//! Sums over the pixels of an image, channel by channel.

use super::simd::Vector;

/// What is summed: `width` columns of `rows` rows that start `pitch` values apart.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// First value.
    pub start: *const f32,
    /// Rows.
    pub rows: usize,
    /// From one row to the next.
    pub pitch: usize,
    /// Columns.
    pub width: usize,
}

/// `sums[l] = Σ_row x[row, l]`.
///
/// # Safety
/// The columns lie inside one allocation; `sums` has as many values as there are columns.
#[inline(always)]
pub(super) unsafe fn column_sums<V: Vector>(sums: &mut [f32], x: Columns) {
    let mut l = 0;
    while l < x.width {
        let lanes = V::LANES.min(x.width - l);
        let mut acc = [V::splat(0.0); 4];
        for row in (0..x.rows).step_by(4) {
            for (i, acc) in acc.iter_mut().enumerate() {
                if row + i < x.rows {
                    // SAFETY: the caller's promise.
                    let v = unsafe { V::load_first(x.start.add((row + i) * x.pitch + l), lanes) };
                    *acc = acc.add(v);
                }
            }
        }
        let sum = acc[0].add(acc[1]).add(acc[2].add(acc[3]));
        // SAFETY: l + lanes <= width.
        unsafe { sum.store_first(sums[l..].as_mut_ptr(), lanes) };
        l += lanes;
    }
}
