//! The two register-tile products under every fast operation: `P` rows of `Q` vectors held in registers while the sum
//! runs. Both broadcast a value of the left operand and multiply it with vectors of the right one.

use super::simd::Vector;

/// Rows of the largest tile of any instruction set.
pub(super) const MAX_ROWS: usize = 12;
/// Columns of the largest tile of any instruction set.
pub(super) const MAX_WIDTH: usize = 32;

/// Width of the block of columns that starts at `first` of `len`: two vectors, or one where that is enough.
#[inline(always)]
pub(super) fn block_width(len: usize, first: usize, lanes: usize) -> usize {
    if len - first > lanes { 2 * lanes } else { lanes }
}

/// Room for the values of a tile.
#[repr(align(64))]
pub(super) struct Tile(pub [f32; MAX_ROWS * MAX_WIDTH]);

/// Where a product goes: row p at `start + p · pitch`.
#[derive(Clone, Copy)]
pub(super) struct Target {
    /// First row.
    pub start: *mut f32,
    /// From one row to the next.
    pub pitch: usize,
}

/// Pointers to the left rows of one segment of the sum.
pub(super) type RowPointers = [*const f32; MAX_ROWS];

/// `target[p, l] = Σ_segment Σ_k left[segment][p][k] · right[segment, k, l]`, where segment i has
/// `lengths[i % lengths.len()]` terms and `right` is contiguous: the l of one k, then the next k, then the next segment.
///
/// # Safety
/// The pointers reach as many values as this reads and writes.
#[inline(always)]
unsafe fn rows_tile<V: Vector, const P: usize, const Q: usize>(
    target: Target,
    left: &[RowPointers],
    lengths: &[usize],
    mut right: *const f32,
) {
    let mut acc = [[V::splat(0.0); Q]; P];
    for (i, rows) in left.iter().enumerate() {
        let mut row = [std::ptr::null(); P];
        row.copy_from_slice(&rows[..P]);
        for k in 0..lengths[i % lengths.len()] {
            let mut r = [V::splat(0.0); Q];
            for (q, r) in r.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *r = unsafe { V::load(right.add(q * V::LANES)) };
            }
            for (acc, row) in acc.iter_mut().zip(row) {
                // SAFETY: the caller's promise.
                let l = V::splat(unsafe { *row.add(k) });
                for (acc, r) in acc.iter_mut().zip(r) {
                    *acc = l.mul_add(r, *acc);
                }
            }
            // SAFETY: at most one past the end.
            right = unsafe { right.add(Q * V::LANES) };
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (q, acc) in acc.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { acc.store(target.start.add(p * target.pitch + q * V::LANES)) };
        }
    }
}

/// [`rows_tile`] for `rows` rows and `vectors` vectors (1 or 2). Rows are rounded up to at most `V::ROWS`: all pointers
/// must be valid and the target must have room.
///
/// # Safety
/// As [`rows_tile`].
#[inline(always)]
pub(super) unsafe fn rows_product<V: Vector>(
    target: Target,
    (rows, vectors): (usize, usize),
    left: &[RowPointers],
    lengths: &[usize],
    right: *const f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (rows, vectors) {
            (9.., 2) if V::ROWS >= 12 => rows_tile::<V, 12, 2>(target, left, lengths, right),
            (9.., 1) if V::ROWS >= 12 => rows_tile::<V, 12, 1>(target, left, lengths, right),
            (5.., 2) if V::ROWS >= 12 => rows_tile::<V, 8, 2>(target, left, lengths, right),
            (5.., 1) if V::ROWS >= 12 => rows_tile::<V, 8, 1>(target, left, lengths, right),
            (5.., 2) => rows_tile::<V, 6, 2>(target, left, lengths, right),
            (5.., 1) => rows_tile::<V, 6, 1>(target, left, lengths, right),
            (_, 2) => rows_tile::<V, 4, 2>(target, left, lengths, right),
            (..) => rows_tile::<V, 4, 1>(target, left, lengths, right),
        }
    }
}

/// The terms of an outer product: for each image and each entry of `pairs`, one row of either operand.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    /// Row of the left and of the right operand of each term, within an image.
    pub pairs: &'a [[u32; 2]],
    /// Images.
    pub images: usize,
    /// Values from one row to the next, left and right.
    pub pitch: [usize; 2],
    /// Values from one image to the next, left and right.
    pub image: [usize; 2],
}

/// `target[p, l] += Σ_term left[term + p] · right[term + l]`; the last vector has `last` lanes (all of them unless TAIL).
///
/// # Safety
/// The pointers reach as many values as this reads and writes.
#[inline(always)]
unsafe fn outer_tile<V: Vector, const P: usize, const Q: usize, const TAIL: bool>(
    target: Target,
    left: *const f32,
    right: *const f32,
    terms: &Terms,
    last: usize,
) {
    let mut acc = [[V::splat(0.0); Q]; P];
    for image in 0..terms.images {
        // SAFETY: within the operands, the caller's promise.
        let (left, right) = unsafe { (left.add(image * terms.image[0]), right.add(image * terms.image[1])) };
        for &[l, r] in terms.pairs {
            // SAFETY: as above.
            let (l, r) = unsafe { (left.add(l as usize * terms.pitch[0]), right.add(r as usize * terms.pitch[1])) };
            let mut v = [V::splat(0.0); Q];
            for (q, v) in v.iter_mut().enumerate() {
                let at = r.wrapping_add(q * V::LANES);
                // SAFETY: as above; the last vector of a tail is read only as far as it is there.
                *v = unsafe { if TAIL && q == Q - 1 { V::load_first(at, last) } else { V::load(at) } };
            }
            for (p, acc) in acc.iter_mut().enumerate() {
                // SAFETY: as above.
                let x = V::splat(unsafe { *l.add(p) });
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = x.mul_add(v, *acc);
                }
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (q, acc) in acc.iter().enumerate() {
            let lanes = if TAIL && q == Q - 1 { last } else { V::LANES };
            // SAFETY: the caller's promise.
            unsafe {
                let at = target.start.add(p * target.pitch + q * V::LANES);
                acc.add(V::load_first(at, lanes)).store_first(at, lanes);
            }
        }
    }
}

/// [`outer_tile`] for P rows and `width` columns (at most two vectors).
///
/// # Safety
/// As [`outer_tile`].
#[inline(always)]
unsafe fn outer_rows<V: Vector, const P: usize>(
    target: Target,
    left: *const f32,
    right: *const f32,
    terms: &Terms,
    width: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if width == 2 * V::LANES {
            outer_tile::<V, P, 2, false>(target, left, right, terms, V::LANES);
        } else if width > V::LANES {
            outer_tile::<V, P, 2, true>(target, left, right, terms, width - V::LANES);
        } else if width == V::LANES {
            outer_tile::<V, P, 1, false>(target, left, right, terms, V::LANES);
        } else {
            outer_tile::<V, P, 1, true>(target, left, right, terms, width);
        }
    }
}

/// `target[p, l] += Σ_term left[term + p] · right[term + l]` for p < rows, l < width, tile by tile.
///
/// # Safety
/// The pointers reach as many values as this reads and writes.
#[inline(always)]
pub(super) unsafe fn outer_product<V: Vector>(
    target: Target,
    left: *const f32,
    right: *const f32,
    terms: &Terms,
    (rows, width): (usize, usize),
) {
    let mut l = 0;
    while l < width {
        let block = (width - l).min(2 * V::LANES);
        let mut p = 0;
        while p < rows {
            // SAFETY: p < rows and l < width, the caller's promise.
            unsafe {
                let target = Target { start: target.start.add(p * target.pitch + l), pitch: target.pitch };
                let (left, right) = (left.add(p), right.add(l));
                p += match rows - p {
                    12.. if V::ROWS >= 12 => outer_step::<V, 12>(target, left, right, terms, block),
                    8.. if V::ROWS >= 12 => outer_step::<V, 8>(target, left, right, terms, block),
                    6.. if V::ROWS >= 6 => outer_step::<V, 6>(target, left, right, terms, block),
                    4.. => outer_step::<V, 4>(target, left, right, terms, block),
                    2.. => outer_step::<V, 2>(target, left, right, terms, block),
                    _ => outer_step::<V, 1>(target, left, right, terms, block),
                };
            }
        }
        l += block;
    }
}

/// [`outer_rows`], saying how many rows it did.
///
/// # Safety
/// As [`outer_tile`].
#[inline(always)]
unsafe fn outer_step<V: Vector, const P: usize>(
    target: Target,
    left: *const f32,
    right: *const f32,
    terms: &Terms,
    width: usize,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe { outer_rows::<V, P>(target, left, right, terms, width) };
    P
}
