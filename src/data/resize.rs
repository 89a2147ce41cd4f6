//! The reference's way to the training size, with Pillow's 8-bit resampling reproduced bit for bit:
//!
//! 1. while the shorter side is at least twice `size`, halve both sides (rounding down) with BOX;
//! 2. scale the shorter side to `size` with BICUBIC (a = -1/2), the other to `round(side · size / shorter)`, ties to even;
//! 3. cut the middle `size` x `size`, the odd pixel going to the bottom right.
//!
//! One axis, `in` to `out` samples: `scale = in/out`, `f = max(scale, 1)`, `centre = (i + 1/2) scale`, window
//! `centre ± support·f`, weights `k(x) = filter((x - centre + 1/2)/f)` in f64 divided by their sum, then as integers of
//! 2^-22; pixel = `clamp((2^21 + Σ k p) >> 22)`. Columns first, to u8, then rows; the other way round where the height
//! shrinks by more than twice what the width does, as Pillow 13 does. (Older Pillow never turns round; the two orders
//! differ by rounding only.)

use super::decode::{MAX_PIXELS, MAX_SIDE, Picture};

/// Resampling kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Mean of the covered pixels.
    Box,
    /// Cubic convolution, a = -1/2.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        match (self, x.abs()) {
            (Filter::Box, _) => f64::from(-0.5 < x && x <= 0.5),
            (Filter::Bicubic, x) if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            (Filter::Bicubic, x) if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            (Filter::Bicubic, _) => 0.0,
        }
    }
}

/// Fraction bits of the integer weights.
const BITS: u32 = 22;

/// First input sample and weights of one output sample.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

fn windows(input: usize, output: usize, filter: Filter) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let (support, per_pixel) = (filter.support() * stretch, 1.0 / stretch);
    let window = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let start = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(input);
        let weight = |x: usize| filter.at((x as f64 - centre + 0.5) * per_pixel);
        let sum: f64 = (start..end).map(weight).sum();
        let fixed = |w: f64| {
            let w = if sum == 0.0 { w } else { w / sum } * f64::from(1 << BITS);
            (w + 0.5f64.copysign(w)) as i32
        };
        Window { start, weights: (start..end).map(weight).map(fixed).collect() }
    };
    (0..output).map(window).collect()
}

fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Resizes to (h, w) exactly as Pillow's `Image.resize((w, h), filter)` does for modes L and RGB. A pass that would not
/// change the size is left out.
pub fn resize(picture: &Picture, h: usize, w: usize, filter: Filter) -> Picture {
    let (saved_h, saved_w) = (picture.h as i64 - h as i64, picture.w as i64 - w as i64);
    match (h != picture.h, w != picture.w) {
        (false, false) => picture.clone(),
        (true, false) => rows(picture, h, filter),
        (false, true) => columns(picture, w, filter),
        (true, true) if saved_h > 0 && saved_h > 2 * saved_w => columns(&rows(picture, h, filter), w, filter),
        (true, true) => rows(&columns(picture, w, filter), h, filter),
    }
}

fn columns(picture: &Picture, w: usize, filter: Filter) -> Picture {
    match picture.c {
        1 => columns_of::<1>(picture, w, filter),
        _ => columns_of::<3>(picture, w, filter),
    }
}

fn columns_of<const C: usize>(picture: &Picture, w: usize, filter: Filter) -> Picture {
    let windows = windows(picture.w, w, filter);
    let mut pixels = Vec::with_capacity(picture.h * w * C);
    for row in picture.pixels.chunks_exact(picture.w * C) {
        for window in &windows {
            let mut sum = [1i32 << (BITS - 1); C];
            for (p, k) in row[window.start * C..].chunks_exact(C).zip(&window.weights) {
                for c in 0..C {
                    sum[c] += i32::from(p[c]) * k;
                }
            }
            pixels.extend(sum.map(to_byte));
        }
    }
    Picture { w, pixels, ..*picture }
}

fn rows(picture: &Picture, h: usize, filter: Filter) -> Picture {
    let stride = picture.w * picture.c;
    let mut pixels = Vec::with_capacity(h * stride);
    let mut sums = vec![0i32; stride];
    for window in windows(picture.h, h, filter) {
        sums.fill(1 << (BITS - 1));
        for (row, k) in picture.pixels[window.start * stride..].chunks_exact(stride).zip(&window.weights) {
            for (sum, p) in sums.iter_mut().zip(row) {
                *sum += i32::from(*p) * k;
            }
        }
        pixels.extend(sums.iter().copied().map(to_byte));
    }
    Picture { h, pixels, ..*picture }
}

/// The middle `size` x `size` of the picture scaled so that its shorter side is `size` (the three steps above).
///
/// # Errors
/// In words, when the picture is so elongated that scaling it to `size` would make it absurdly large.
pub fn fit(picture: Picture, size: usize) -> Result<Picture, String> {
    assert!(0 < size && size <= MAX_SIDE, "fit: size {size}");
    let mut picture = picture;
    while picture.h.min(picture.w) >= 2 * size {
        picture = resize(&picture, picture.h / 2, picture.w / 2, Filter::Box);
    }
    let scale = size as f64 / picture.h.min(picture.w) as f64;
    let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
    let (h, w) = (scaled(picture.h), scaled(picture.w));
    if h.saturating_mul(w) > MAX_PIXELS {
        return Err(format!("{}x{} pixels would become {w}x{h} on the way to {size}x{size}", picture.w, picture.h));
    }
    Ok(crop(resize(&picture, h, w, Filter::Bicubic), size))
}

fn crop(picture: Picture, size: usize) -> Picture {
    let Picture { h, w, c, pixels } = picture;
    if h == size && w == size {
        return Picture { h, w, c, pixels };
    }
    let (top, left) = ((h - size) / 2, (w - size) / 2);
    let row = |y: usize| &pixels[((top + y) * w + left) * c..][..size * c];
    Picture { h: size, w: size, c, pixels: (0..size).flat_map(row).copied().collect() }
}
