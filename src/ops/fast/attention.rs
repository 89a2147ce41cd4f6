//! Attention, one (image, head) at a time: products by register tiles, softmax on the rows of a tile while in cache.
//!
//! The backward recomputes `p = exp(score − lse)` for blocks of queries; dk and dv are summed block by block where they
//! belong, in dqkv.

use super::isa::{Isa, Kernel};
use super::parallel::{ALIGN, Disjoint, aligned, for_each_job, part};
use super::simd::Vector;
use super::tile::{MAX_ROWS, MAX_WIDTH, RowPointers, Target, Terms, Tile, block_width, outer_product, rows_product};
use crate::ops::attention::AttentionShape;

/// Queries per block of the backward, a multiple of every instruction set's tile.
const QUERIES: usize = 48;

/// The terms of a product over the queries of a block: row i of both operands.
static EACH_QUERY: [[u32; 2]; QUERIES] = {
    let mut pairs = [[0; 2]; QUERIES];
    let mut i = 0;
    while i < QUERIES {
        pairs[i] = [i as u32; 2];
        i += 1;
    }
    pairs
};

/// Jobs, each with scratch of its own.
fn jobs(s: &AttentionShape) -> usize {
    (s.n * s.heads).clamp(1, 16)
}

/// Length of a packed (tokens, d) matrix with tokens as lanes, of one with d as lanes, and of a row of scores.
fn packed_lens(s: &AttentionShape) -> (usize, usize, usize) {
    let row = s.s.next_multiple_of(MAX_WIDTH);
    (s.d * row, s.s * s.d.next_multiple_of(MAX_WIDTH), row)
}

fn forward_job_scratch(s: &AttentionShape) -> usize {
    let (keys, values, row) = packed_lens(s);
    keys + values + MAX_ROWS * row
}

fn backward_job_scratch(s: &AttentionShape) -> usize {
    let (keys, values, row) = packed_lens(s);
    2 * keys + values + 2 * QUERIES * row
}

/// Floats of scratch that [`forward`] needs.
pub fn forward_scratch(s: &AttentionShape) -> usize {
    ALIGN + jobs(s) * forward_job_scratch(s)
}

/// Floats of scratch that [`backward`] needs.
pub fn backward_scratch(s: &AttentionShape) -> usize {
    ALIGN + jobs(s) * backward_job_scratch(s)
}

/// Fast twin of [`crate::ops::attention::forward_cpu`].
pub fn forward(isa: Isa, out: &mut [f32], lse: &mut [f32], qkv: &[f32], s: &AttentionShape, scratch: &mut [f32]) {
    s.check(qkv, out, lse);
    let (jobs, len, needed) = (jobs(s), forward_job_scratch(s), forward_scratch(s));
    assert!(scratch.len() >= needed, "attention: {} floats of scratch, {needed} needed", scratch.len());
    let [out, lse, scratch] = [out, lse, aligned(scratch)].map(Disjoint::new);
    for_each_job(jobs, |job| {
        // SAFETY: each job has its part of scratch.
        let scratch = unsafe { scratch.slice(job * len, len) };
        for pair in part(s.n * s.heads, 1, job, jobs) {
            isa.run(Forward { s, pair, out, lse, qkv, scratch: &mut *scratch });
        }
    });
}

/// Fast twin of [`crate::ops::attention::backward_cpu`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    isa: Isa,
    dqkv: &mut [f32],
    dout: &[f32],
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    s: &AttentionShape,
    scratch: &mut [f32],
) {
    s.check(qkv, out, lse);
    assert!(dqkv.len() == qkv.len() && dout.len() == out.len(), "attention backward: lengths of dqkv or dout");
    let (jobs, len, needed) = (jobs(s), backward_job_scratch(s), backward_scratch(s));
    assert!(scratch.len() >= needed, "attention backward: {} floats of scratch, {needed} needed", scratch.len());
    let [dqkv, scratch] = [dqkv, aligned(scratch)].map(Disjoint::new);
    for_each_job(jobs, |job| {
        // SAFETY: each job has its part of scratch.
        let scratch = unsafe { scratch.slice(job * len, len) };
        for pair in part(s.n * s.heads, 1, job, jobs) {
            isa.run(Backward { s, pair, dqkv, dout, qkv, out, lse, scratch: &mut *scratch });
        }
    });
}

/// Tokens of one image and d channels: row i at `start + i · pitch`.
#[derive(Clone, Copy)]
struct Tokens {
    start: *const f32,
    pitch: usize,
}

impl Tokens {
    /// The channels from `column` on of image `n` of a tensor with `pitch` channels.
    fn of(x: &[f32], n: usize, column: usize, pitch: usize, s: &AttentionShape) -> Self {
        Tokens { start: x[n * s.s * pitch + column..].as_ptr(), pitch }
    }

    /// # Safety
    /// i is a token of the image, `d` the channels of a head.
    #[inline(always)]
    unsafe fn row(&self, i: usize, d: usize) -> &[f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(i * self.pitch), d) }
    }

    /// Pointers to `count` rows from `first` on; the unused ones repeat the first.
    #[inline(always)]
    fn pointers(&self, first: usize, count: usize) -> [RowPointers; 1] {
        let mut rows = [self.start.wrapping_add(first * self.pitch); MAX_ROWS];
        for (i, row) in rows.iter_mut().enumerate().take(count) {
            *row = self.start.wrapping_add((first + i) * self.pitch);
        }
        [rows]
    }

    /// `dst[block][e][token] = factor · row(token)[e]`: tokens as lanes, 0 beyond the last.
    #[inline(always)]
    fn pack_lanes<V: Vector>(&self, dst: &mut [f32], factor: f32, s: &AttentionShape) {
        let mut first = 0;
        while first < s.s {
            let width = block_width(s.s, first, V::LANES);
            let block = &mut dst[first * s.d..][..width * s.d];
            let tokens = width.min(s.s - first);
            for e in 0..s.d {
                for (l, dst) in block[e * width..][..width].iter_mut().enumerate() {
                    // SAFETY: first + l is a token.
                    *dst = if l < tokens { factor * unsafe { self.row(first + l, s.d)[e] } } else { 0.0 };
                }
            }
            first += width;
        }
    }

    /// `dst[block][token][e] = row(token)[e]`: channels as lanes, 0 beyond the last.
    #[inline(always)]
    fn pack_rows<V: Vector>(&self, dst: &mut [f32], s: &AttentionShape) {
        let mut first = 0;
        while first < s.d {
            let width = block_width(s.d, first, V::LANES);
            let lanes = width.min(s.d - first);
            for (i, dst) in dst[first * s.s..][..width * s.s].chunks_exact_mut(width).enumerate() {
                dst.fill(0.0);
                // SAFETY: i is a token.
                dst[..lanes].copy_from_slice(unsafe { &self.row(i, s.d)[first..first + lanes] });
            }
            first += width;
        }
    }
}

/// Forward of one (image, head).
struct Forward<'a> {
    s: &'a AttentionShape,
    pair: usize,
    out: Disjoint<'a>,
    lse: Disjoint<'a>,
    qkv: &'a [f32],
    scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Forward { s, pair, out, lse, qkv, scratch } = self;
        let (n, head, c) = (pair / s.heads, pair % s.heads, s.c());
        let [q, k, v] = s.columns(head).map(|column| Tokens::of(qkv, n, column, 3 * c, s));
        let (key_len, value_len, pitch) = packed_lens(s);
        let (keys, rest) = scratch.split_at_mut(key_len);
        let (values, scores) = rest.split_at_mut(value_len);
        k.pack_lanes::<V>(keys, s.scale() as f32, s);
        v.pack_rows::<V>(values, s);
        let mut tile = Tile([0.0; MAX_ROWS * MAX_WIDTH]);
        for first in (0..s.s).step_by(V::ROWS) {
            let rows = V::ROWS.min(s.s - first);
            let queries = q.pointers(first, rows);
            let mut key = 0;
            while key < s.s {
                let width = block_width(s.s, key, V::LANES);
                // SAFETY: d channels of each query, d × width packed keys, MAX_ROWS rows of scores.
                unsafe {
                    let keys = keys.as_ptr().add(key * s.d);
                    let target = Target { start: scores[key..].as_mut_ptr(), pitch };
                    rows_product::<V>(target, (rows, width / V::LANES), &queries, &[s.d], keys);
                }
                key += width;
            }
            let mut inverse = [0.0; MAX_ROWS];
            for i in 0..rows {
                let (sum, log_sum) = softmax::<V>(&mut scores[i * pitch..][..pitch], s.s);
                inverse[i] = 1.0 / sum;
                // SAFETY: this job's pair.
                unsafe { *lse.at(pair * s.s + first + i, 1) = log_sum };
            }
            let weights = Tokens { start: scores.as_ptr(), pitch }.pointers(0, rows);
            let mut e = 0;
            while e < s.d {
                let width = block_width(s.d, e, V::LANES);
                // SAFETY: s weights of each row, s × width packed values; the output is this job's pair.
                unsafe {
                    let values = values.as_ptr().add(e * s.s);
                    let target = Target { start: tile.0.as_mut_ptr(), pitch: width };
                    rows_product::<V>(target, (rows, width / V::LANES), &weights, &[s.s], values);
                    for (i, inverse) in inverse.iter().enumerate().take(rows) {
                        let at = out.at((n * s.s + first + i) * c + head * s.d + e, width.min(s.d - e));
                        store_row::<V>(at, &tile.0[i * width..][..width], *inverse, s.d - e);
                    }
                }
                e += width;
            }
        }
    }
}

/// `dst[l] = factor · row[l]` for l below `len`.
///
/// # Safety
/// `dst` has as many values.
#[inline(always)]
unsafe fn store_row<V: Vector>(dst: *mut f32, row: &[f32], factor: f32, len: usize) {
    let mut l = 0;
    while l < row.len().min(len) {
        // SAFETY: rows of a tile are whole vectors; the caller's promise.
        unsafe {
            let v = V::load(row.as_ptr().add(l)).mul(V::splat(factor));
            v.store_first(dst.add(l), V::LANES.min(len - l));
        }
        l += V::LANES;
    }
}

/// Turns the first `len` of a padded row of scores into `exp(score − max)`; returns their sum and the log of
/// Σ exp(score).
#[inline(always)]
fn softmax<V: Vector>(row: &mut [f32], len: usize) -> (f32, f32) {
    let whole = len.next_multiple_of(V::LANES);
    row[len..whole].fill(f32::NEG_INFINITY);
    let mut largest = V::splat(f32::NEG_INFINITY);
    // SAFETY of both loops: `row` is a multiple of every vector long.
    for l in (0..whole).step_by(V::LANES) {
        largest = largest.max(unsafe { V::load(row[l..].as_ptr()) });
    }
    let largest = largest.largest();
    let mut sum = V::splat(0.0);
    for l in (0..whole).step_by(V::LANES) {
        unsafe {
            let p = V::load(row[l..].as_ptr()).sub(V::splat(largest)).exp();
            p.store(row[l..].as_mut_ptr());
            sum = sum.add(V::load_first(row[l..].as_ptr(), V::LANES.min(len - l)));
        }
    }
    let sum = sum.sum();
    (sum, largest + sum.ln())
}

/// Backward of one (image, head).
struct Backward<'a> {
    s: &'a AttentionShape,
    pair: usize,
    dqkv: Disjoint<'a>,
    dout: &'a [f32],
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    scratch: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Backward { s, pair, dqkv, dout, qkv, out, lse, scratch } = self;
        let (n, head, c) = (pair / s.heads, pair % s.heads, s.c());
        let [q, k, v] = s.columns(head).map(|column| Tokens::of(qkv, n, column, 3 * c, s));
        let [dout, out] = [dout, out].map(|x| Tokens::of(x, n, head * s.d, c, s));
        let (key_len, value_len, pitch) = packed_lens(s);
        let (keys, rest) = scratch.split_at_mut(key_len);
        let (values, rest) = rest.split_at_mut(key_len);
        let (key_rows, rest) = rest.split_at_mut(value_len);
        let (p, ds) = rest.split_at_mut(QUERIES * pitch);
        k.pack_lanes::<V>(keys, s.scale() as f32, s);
        v.pack_lanes::<V>(values, 1.0, s);
        k.pack_rows::<V>(key_rows, s);
        // SAFETY: the channels of this head of this image are this job's alone.
        let [dq, dk, dv] = s.columns(head).map(|column| unsafe { dqkv.at(n * s.s * 3 * c + column, s.d) });
        for i in 0..s.s {
            for row in [dk, dv] {
                // SAFETY: as above.
                unsafe { std::slice::from_raw_parts_mut(row.add(i * 3 * c), s.d).fill(0.0) };
            }
        }
        for block in (0..s.s).step_by(QUERIES) {
            let queries = QUERIES.min(s.s - block);
            for first in (block..block + queries).step_by(V::ROWS) {
                let rows = V::ROWS.min(block + queries - first);
                let at = (first - block) * pitch;
                let (p, ds) = (&mut p[at..][..rows * pitch], &mut ds[at..][..rows * pitch]);
                let lse = &lse[pair * s.s + first..][..rows];
                // SAFETY: the packed operands are those of `s`.
                unsafe { scores::<V>(p, ds, [q, dout, out], first, lse, keys, values, s) };
                let rows_of_ds = Tokens { start: ds.as_ptr(), pitch }.pointers(0, rows);
                let mut tile = Tile([0.0; MAX_ROWS * MAX_WIDTH]);
                let mut e = 0;
                while e < s.d {
                    let width = block_width(s.d, e, V::LANES);
                    // SAFETY: s values of each row, s × width packed keys; dq of these rows is this job's.
                    unsafe {
                        let keys = key_rows.as_ptr().add(e * s.s);
                        let target = Target { start: tile.0.as_mut_ptr(), pitch: width };
                        rows_product::<V>(target, (rows, width / V::LANES), &rows_of_ds, &[s.s], keys);
                        for i in 0..rows {
                            let row = &tile.0[i * width..][..width];
                            store_row::<V>(dq.add((first + i) * 3 * c + e), row, 1.0, s.d - e);
                        }
                    }
                    e += width;
                }
            }
            let pairs = &EACH_QUERY[..queries];
            for (target, left, right) in [(dk, &*ds, q), (dv, &*p, dout)] {
                let terms = Terms { pairs, images: 1, pitch: [pitch, right.pitch], image: [0, 0] };
                // SAFETY: `queries` rows of s weights and of d channels; dk and dv of this pair are this job's.
                unsafe {
                    let right = right.start.add(block * right.pitch);
                    let target = Target { start: target, pitch: 3 * c };
                    outer_product::<V>(target, left.as_ptr(), right, &terms, (s.s, s.d));
                }
            }
        }
    }
}

/// For the queries from `first` on, as many as `lse` has: `p = exp(q·k/√d − lse)` and
/// `ds = p·(dout·v − dout·out)/√d`, rows of whole vectors.
///
/// # Safety
/// `keys` (scaled) and `values` are packed with tokens as lanes.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn scores<V: Vector>(
    p: &mut [f32],
    ds: &mut [f32],
    [q, dout, out]: [Tokens; 3],
    first: usize,
    lse: &[f32],
    keys: &[f32],
    values: &[f32],
    s: &AttentionShape,
) {
    let (rows, scale) = (lse.len(), s.scale() as f32);
    let pitch = p.len() / rows;
    let (left_q, left_dout) = (q.pointers(first, rows), dout.pointers(first, rows));
    let mut delta = [0.0; MAX_ROWS];
    for (i, delta) in delta.iter_mut().enumerate().take(rows) {
        // SAFETY: first + i is a token.
        *delta = unsafe { dot::<V>(dout.row(first + i, s.d), out.row(first + i, s.d)) };
    }
    let mut tiles = [Tile([0.0; MAX_ROWS * MAX_WIDTH]), Tile([0.0; MAX_ROWS * MAX_WIDTH])];
    let mut key = 0;
    while key < s.s {
        let width = block_width(s.s, key, V::LANES);
        let size = (rows, width / V::LANES);
        // SAFETY: d channels of each row, d × width packed keys and values; the rows of p and ds hold `key + width`.
        unsafe {
            let [for_q, for_dout] = tiles.each_mut().map(|tile| Target { start: tile.0.as_mut_ptr(), pitch: width });
            rows_product::<V>(for_q, size, &left_q, &[s.d], keys.as_ptr().add(key * s.d));
            rows_product::<V>(for_dout, size, &left_dout, &[s.d], values.as_ptr().add(key * s.d));
            for i in 0..rows {
                for l in (0..width).step_by(V::LANES) {
                    let (from, to) = (i * width + l, i * pitch + key + l);
                    let weight = V::load(tiles[0].0.as_ptr().add(from)).sub(V::splat(lse[i])).exp();
                    let slope = V::load(tiles[1].0.as_ptr().add(from)).sub(V::splat(delta[i]));
                    weight.store(p.as_mut_ptr().add(to));
                    weight.mul(slope).mul(V::splat(scale)).store(ds.as_mut_ptr().add(to));
                }
            }
        }
        key += width;
    }
}

/// a · b
#[inline(always)]
fn dot<V: Vector>(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = V::splat(0.0);
    for l in (0..a.len()).step_by(V::LANES) {
        let lanes = V::LANES.min(a.len() - l);
        // SAFETY: l + lanes is at most the length of both.
        sum = unsafe { V::load_first(a[l..].as_ptr(), lanes).mul_add(V::load_first(b[l..].as_ptr(), lanes), sum) };
    }
    sum.sum()
}
