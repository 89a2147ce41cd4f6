//! Dropout masks, 16 Philox counters at a time; the same words as [`Dropout::factor`].

use crate::ops::group_norm::Dropout;

/// Counters computed together.
const QUADS: usize = 16;
/// Elements computed together.
const ELEMENTS: usize = 4 * QUADS;

/// Philox4x32-10 of `QUADS` consecutive counters, word by word.
#[inline(always)]
fn words(quad: usize, n: usize, dropout: &Dropout) -> [[u32; QUADS]; 4] {
    let first = dropout.counter(n, quad);
    let [mut a, mut b, mut c, mut d] = first.map(|word| [word; QUADS]);
    for (i, a) in a.iter_mut().enumerate() {
        *a = a.wrapping_add(i as u32);
    }
    let (mut k0, mut k1) = (dropout.seed as u32, (dropout.seed >> 32) as u32);
    for _ in 0..10 {
        for i in 0..QUADS {
            let (p, q) = (u64::from(a[i]) * 0xD251_1F53, u64::from(c[i]) * 0xCD9E_8D57);
            a[i] = (q >> 32) as u32 ^ b[i] ^ k0;
            c[i] = (p >> 32) as u32 ^ d[i] ^ k1;
            (b[i], d[i]) = (q as u32, p as u32);
        }
        (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
    }
    [a, b, c, d]
}

/// Factors of the `ELEMENTS` elements from `4·quad` on of image `n`.
#[inline(always)]
fn factors(quad: usize, n: usize, dropout: &Dropout) -> [f32; ELEMENTS] {
    let (words, threshold, scale) = (words(quad, n, dropout), dropout.threshold(), dropout.scale());
    let mut factors = [0.0; ELEMENTS];
    for i in 0..QUADS {
        for j in 0..4 {
            factors[4 * i + j] = if words[j][i] >= threshold { scale } else { 0.0 };
        }
    }
    factors
}

/// Multiplies the elements of image `n` by their factors.
#[inline(always)]
pub(super) fn apply(y: &mut [f32], n: usize, dropout: &Dropout) {
    for (i, y) in y.chunks_mut(ELEMENTS).enumerate() {
        let factors = factors(i * QUADS, n, dropout);
        y.iter_mut().zip(factors).for_each(|(y, factor)| *y *= factor);
    }
}

/// `dx = dy · factor` for the channels `first..first + channels` of the `c` of image `n`.
#[inline(always)]
pub(super) fn apply_to(
    dx: &mut [f32],
    dy: &[f32],
    (channels, first, c): (usize, usize, usize),
    n: usize,
    dropout: &Dropout,
) {
    for (i, dy) in dy.chunks(ELEMENTS).enumerate() {
        let (start, factors) = (i * ELEMENTS, factors(i * QUADS, n, dropout));
        if channels == c {
            let dx = &mut dx[start..start + dy.len()];
            dx.iter_mut().zip(dy).zip(factors).for_each(|((dx, dy), factor)| *dx = dy * factor);
            continue;
        }
        for (j, (dy, factor)) in dy.iter().zip(factors).enumerate() {
            let (pixel, channel) = ((start + j) / c, (start + j) % c);
            if (first..first + channels).contains(&channel) {
                dx[pixel * channels + channel - first] = dy * factor;
            }
        }
    }
}
