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
/// The columns are there; `sums` has at least as many values.
#[inline(always)]
pub(super) unsafe fn column_sums<V: Vector>(sums: &mut [f32], x: Columns) {
    for l in (0..x.width).step_by(V::LANES) {
        let lanes = V::LANES.min(x.width - l);
        let mut acc = [V::splat(0.0); 4];
        for row in (0..x.rows).step_by(4) {
            for (i, acc) in acc.iter_mut().enumerate() {
                if row + i < x.rows {
                    // SAFETY: the caller's promise.
                    *acc = acc.add(unsafe { V::load_first(x.start.add((row + i) * x.pitch + l), lanes) });
                }
            }
        }
        let sum = acc[0].add(acc[1]).add(acc[2].add(acc[3]));
        // SAFETY: l + lanes <= width.
        unsafe { sum.store_first(sums[l..].as_mut_ptr(), lanes) };
    }
}

/// `sums[l] = Σ_row (x[row, l] − center[l])` and `squares[l] = Σ_row (x[row, l] − center[l])²`.
///
/// # Safety
/// The columns are there; the slices have at least as many values.
#[inline(always)]
pub(super) unsafe fn centred_sums<V: Vector>(sums: &mut [f32], squares: &mut [f32], center: &[f32], x: Columns) {
    for l in (0..x.width).step_by(V::LANES) {
        let lanes = V::LANES.min(x.width - l);
        let (mut sum, mut square) = ([V::splat(0.0); 4], [V::splat(0.0); 4]);
        // SAFETY: l + lanes <= width, the caller's promise.
        unsafe {
            let center = V::load_first(center[l..].as_ptr(), lanes);
            for row in (0..x.rows).step_by(4) {
                for i in 0..4 {
                    if row + i < x.rows {
                        let d = V::load_first(x.start.add((row + i) * x.pitch + l), lanes).sub(center);
                        sum[i] = sum[i].add(d);
                        square[i] = d.mul_add(d, square[i]);
                    }
                }
            }
            let sum = sum[0].add(sum[1]).add(sum[2].add(sum[3]));
            let square = square[0].add(square[1]).add(square[2].add(square[3]));
            sum.store_first(sums[l..].as_mut_ptr(), lanes);
            square.store_first(squares[l..].as_mut_ptr(), lanes);
        }
    }
}
