//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011), uniforms, normals, masks and permutations.
//!
//! Nothing here has a state. Every number is a function of (seed, step, op, image, element), so it is the same on every
//! device, for every batch size, launch shape and thread count, and a resumed run needs no saved generator:
//!
//! ```text
//! key     = the 64-bit seed (low word first)
//! counter = [quad, image, step, op],   quad = element / 4
//! word    = element % 4
//! ```
//!
//! One call yields the words of elements `4·quad .. 4·quad + 4` of one image. [`op`] numbers the uses. A uniform is
//! `fma(float(word), 2^-32, 2^-33)`, in (0, 1]; normals are Box-Muller on the word pairs (0, 1) and (2, 3). Logarithm, sine
//! and cosine are polynomials of correctly rounded operations (add, multiply, fma, sqrt), so a port that does the same operations in
//! the same order gives the same bits. Against f64 the normals
//! err by less than 3 units in the last place: three roundings that count, each up to one unit of the result.

/// What a random number is for: the last word of the Philox counter.
pub mod op {
    /// Draw of the timesteps of a batch: element 0 of each image.
    pub const TIMESTEP: u32 = 1;
    /// The noise eps of `q_sample` in training.
    pub const Q_SAMPLE: u32 = 2;
    /// Horizontal flips: element 0 of each image.
    pub const FLIP: u32 = 3;
    /// The noise of one reverse step.
    pub const P_SAMPLE: u32 = 4;
    /// The start x_T of a sampling walk.
    pub const X_T: u32 = 5;
    /// Order of the images in an epoch.
    pub const SHUFFLE: u32 = 6;
    /// The noise of the bits/dim evaluation.
    pub const NLL: u32 = 7;
    /// Class labels drawn for sampling: element 0 of each image.
    pub const LABEL: u32 = 8;
    /// Labels replaced by the null class in training: element 0 of each image.
    pub const LABEL_DROPOUT: u32 = 9;
    /// Initial values of parameter tensor `k`: `PARAM_INIT + k`.
    pub const PARAM_INIT: u32 = 0x1000_0000;
    /// Mask of dropout layer `k`: `DROPOUT + k`.
    pub const DROPOUT: u32 = 0x2000_0000;
}

/// Lanes of the bulk loops: quads worked on at once.
const LANES: usize = 8;

/// Philox4x32-10: four words from a counter `[quad, image, step, op]` and a seed.
pub fn philox(counter: [u32; 4], seed: u64) -> [u32; 4] {
    philox_inline(counter, seed)
}

#[inline(always)]
fn philox_inline(mut c: [u32; 4], seed: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k0, b as u32, (a >> 32) as u32 ^ c[3] ^ k1, a as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

/// Uniform number in (0, 1]: `fma(float(bits), 2^-32, 2^-33)`, the conversion rounded to nearest.
#[inline(always)]
pub fn uniform(bits: u32) -> f32 {
    const SCALE: f32 = 1.0 / 4_294_967_296.0;
    (bits as f32).mul_add(SCALE, 0.5 * SCALE)
}

/// `ln u` for a normal `u > 0`: `u = 2^k (1 + m)`, m in [-1/3, 1/3], `ln(1 + m) = m - m²/2 + m³ R(m)`.
#[inline(always)]
fn ln(u: f32) -> f32 {
    let bits = u.to_bits();
    let e = bits.wrapping_sub(0x3F2A_AAAB) & 0xFF80_0000;
    let m = f32::from_bits(bits.wrapping_sub(e)) - 1.0;
    let k = (e as i32) as f32 * (1.0 / 8_388_608.0);
    let r = 0.113_306_32_f32;
    let r = r.mul_add(m, -0.124_222_17);
    let r = r.mul_add(m, 0.109_156_53);
    let r = r.mul_add(m, -0.122_887_19);
    let r = r.mul_add(m, 0.142_918_68);
    let r = r.mul_add(m, -0.166_733_16);
    let r = r.mul_add(m, 0.199_999_48);
    let r = r.mul_add(m, -0.249_999_45);
    let r = r.mul_add(m, 0.333_333_34);
    let r = r.mul_add(m, -0.5);
    let r = r.mul_add(m * m, m);
    k.mul_add(std::f32::consts::LN_2, r)
}

/// `sin 2πr = r·(2π + r² P(r²))` for |r| <= 1/8: P from the highest power down.
const SIN: [f32; 4] = [41.589_542, -76.701_29, 81.605_23, -41.341_7];
/// `cos 2πr = 1 + r² P(r²)` for |r| <= 1/8: P from the highest power down.
const COS: [f32; 4] = [59.424_107, -85.448_82, 64.939_37, -19.739_208];

/// `(sin 2πu, cos 2πu)` for u in [0, 1]: u less the nearest quarter turn, polynomials on ±1/8 turn, then the quadrant.
#[inline(always)]
fn sincos_turns(u: f32) -> (f32, f32) {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to an integer kept in the low bits
    let shifted = u.mul_add(4.0, ROUND);
    let quadrant = shifted.to_bits();
    let r = (shifted - ROUND).mul_add(-0.25, u);
    let z = r * r;
    let s = SIN[0].mul_add(z, SIN[1]);
    let s = s.mul_add(z, SIN[2]);
    let s = s.mul_add(z, SIN[3]);
    let s = s.mul_add(z, -1.748_455_5e-7); // 2π less its f32 value
    let turn = r * std::f32::consts::TAU;
    let s = s.mul_add(r, r.mul_add(std::f32::consts::TAU, -turn)) + turn; // the product's rounding error goes back in
    let c = COS[0].mul_add(z, COS[1]);
    let c = c.mul_add(z, COS[2]);
    let c = c.mul_add(z, COS[3]);
    let c = c.mul_add(z, 1.0);
    let (sin, cos) = if quadrant & 1 == 0 { (s, c) } else { (c, s) };
    let sin_sign = (quadrant << 30) & 0x8000_0000;
    let cos_sign = (quadrant.wrapping_add(1) << 30) & 0x8000_0000;
    (f32::from_bits(sin.to_bits() ^ sin_sign), f32::from_bits(cos.to_bits() ^ cos_sign))
}

/// Two independent standard normals of two words (Box-Muller): `√(-2 ln u1)·(cos 2πu2, sin 2πu2)`.
#[inline(always)]
pub fn normal_pair(bits1: u32, bits2: u32) -> [f32; 2] {
    let radius = (-2.0 * ln(uniform(bits1))).sqrt();
    let (sin, cos) = sincos_turns(uniform(bits2));
    [radius * cos, radius * sin]
}

/// The four standard normals of one Philox call: words (0, 1) give the first two, words (2, 3) the last two.
#[inline(always)]
pub fn normals(bits: [u32; 4]) -> [f32; 4] {
    let [a, b] = normal_pair(bits[0], bits[1]);
    let [c, d] = normal_pair(bits[2], bits[3]);
    [a, b, c, d]
}

/// Standard normals of elements `0..out.len()` of one image.
pub fn fill_normal(out: &mut [f32], seed: u64, image: u32, step: u32, op: u32) {
    fill(out, seed, [image, step, op], Kind::Normal);
}

/// Uniform numbers in (0, 1] of elements `0..out.len()` of one image.
pub fn fill_uniform(out: &mut [f32], seed: u64, image: u32, step: u32, op: u32) {
    fill(out, seed, [image, step, op], Kind::Uniform);
}

/// Dropout mask times its scale of elements `0..out.len()` of one image: 0 or `1/(1 - p)`; see [`keep`].
pub fn fill_dropout(out: &mut [f32], p: f32, seed: u64, image: u32, step: u32, op: u32) {
    fill(out, seed, [image, step, op], Kind::Dropout { threshold: keep_threshold(p), scale: 1.0 / (1.0 - p) });
}

/// Smallest word that is kept by dropout with probability `p` of dropping: `p·2^32`, exact for an f32 in [0, 1).
pub fn keep_threshold(p: f32) -> u32 {
    assert!((0.0..1.0).contains(&p), "dropout probability {p} is not in [0, 1)");
    (f64::from(p) * 4_294_967_296.0) as u32
}

/// Whether dropout with probability `p` keeps the element of this word: `bits >= p·2^32`. What is kept is scaled by `1/(1 - p)`.
pub fn keep(bits: u32, p: f32) -> bool {
    bits >= keep_threshold(p)
}

/// Whether the label of image `image` of the batch is dropped at `step` with probability `p`: word 0 below `p·2^32`.
pub fn drops_label(p: f64, seed: u64, image: u32, step: u32) -> bool {
    f64::from(philox([0, image, step, op::LABEL_DROPOUT], seed)[0]) < p * 4_294_967_296.0
}

/// Integer in `0..n` of one word: `⌊bits·n / 2^32⌋`. Its probabilities differ from 1/n by less than 2^-32.
pub fn below(bits: u32, n: u32) -> u32 {
    ((u64::from(bits) * u64::from(n)) >> 32) as u32
}

/// Permutation of `0..n` for one epoch: Fisher-Yates from the last place down; place `i` swaps with `⌊bits64·(i + 1) / 2^64⌋`,
/// where bits64 are words 2(i%2) (high) and 2(i%2) + 1 (low) of counter `[i/2, 0, epoch, SHUFFLE]`.
pub fn permutation(n: usize, seed: u64, epoch: u32) -> Vec<u32> {
    let n = u32::try_from(n).expect("a data set has fewer than 2^32 images");
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        let words = philox([i / 2, 0, epoch, op::SHUFFLE], seed);
        let half = 2 * (i as usize % 2);
        let bits = u64::from(words[half]) << 32 | u64::from(words[half + 1]);
        let j = (u128::from(bits) * u128::from(i + 1)) >> 64;
        order.swap(i as usize, j as usize);
    }
    order
}

/// What the bulk loops make of the words.
#[derive(Clone, Copy)]
enum Kind {
    Normal,
    Uniform,
    Dropout { threshold: u32, scale: f32 },
}

/// Fills `out` on the widest path of this processor; all paths do the same operations, so they give the same bits.
fn fill(out: &mut [f32], seed: u64, tail: [u32; 3], kind: Kind) {
    assert!(out.len() as u64 <= 1 << 34, "an image has at most 2^34 elements");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: both features were detected on this processor in the line above.
        return unsafe { fill_avx2(out, seed, tail, kind) };
    }
    fill_portable(out, seed, tail, kind);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fill_avx2(out: &mut [f32], seed: u64, tail: [u32; 3], kind: Kind) {
    fill_portable(out, seed, tail, kind);
}

#[inline(always)]
fn fill_portable(out: &mut [f32], seed: u64, tail: [u32; 3], kind: Kind) {
    match kind {
        Kind::Normal => fill_blocks(out, seed, tail, normals),
        Kind::Uniform => fill_blocks(out, seed, tail, |w| w.map(uniform)),
        Kind::Dropout { threshold, scale } => {
            fill_blocks(out, seed, tail, |w| w.map(|w| if w >= threshold { scale } else { 0.0 }));
        }
    }
}

/// Blocks of [`LANES`] quads; each stage is a loop over the lanes, which compilers turn into vector instructions.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // the plain loops are what gets vectorised
fn fill_blocks(out: &mut [f32], seed: u64, [image, step, op]: [u32; 3], map: impl Fn([u32; 4]) -> [f32; 4]) {
    for (block, out) in out.chunks_mut(4 * LANES).enumerate() {
        let first = (block * LANES) as u32;
        let (mut words, mut values) = ([[0u32; LANES]; 4], [[0f32; LANES]; 4]);
        for lane in 0..LANES {
            let w = philox_inline([first + lane as u32, image, step, op], seed);
            (0..4).for_each(|j| words[j][lane] = w[j]);
        }
        for lane in 0..LANES {
            let v = map([words[0][lane], words[1][lane], words[2][lane], words[3][lane]]);
            (0..4).for_each(|j| values[j][lane] = v[j]);
        }
        for (i, out) in out.iter_mut().enumerate() {
            *out = values[i % 4][i / 4];
        }
    }
}

#[cfg(test)]
mod tests;
