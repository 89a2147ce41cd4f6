//! Attention on CUDA (the emulator, or the GPU that `IDDPM_TEST_DEVICE=cuda` asks for) against plain loops in f64.
//!
//! f32: a score is a sum of d products, off by `d · eps · Σ|q||k|/√d` at most, which is then the relative error of p, as are those of
//! the exponential's argument and of lse; results are sums of s products with it, dp and delta sums of d. Together
//! `u = eps (s + 3 (d + 8)(1 + Σ|q||k|/√d))` times the sum of the absolute terms bounds a result. bf16 adds 2^-8 of these terms for the
//! rounding of p or ds, as much for the rounded `out` in delta, and 2^-8 of the result for its own; all against loops on operands rounded to bf16.
//! Held against unrounded operands, the error may be at most twice that of loops that round operands, p, ds and results to bf16,
//! and what f32 sums leave (where one key takes all, such loops are exact).

use crate::device::driver;
use half::bf16;
use iddpm::device::driver::{Buffer, Driver, Ptr, Schedule};
use iddpm::ops::attention::{AttentionShape, QkvOrder, launch};
use iddpm::rng::philox;

mod plans;
mod reference;
mod traffic;

use reference::{Reference, reference};

/// Uniform values in [-1, 1).
fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    (0..len).map(|i| f64::from(word(i)).mul_add(1.0 / 2_147_483_648.0, -1.0) as f32).collect()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// Blocks wanted: few give the largest tiles, many the smaller ones.
const FEW: usize = 1;
const MANY: usize = 1 << 20;

fn shape([n, s, heads, d]: [usize; 4], order: QkvOrder) -> AttentionShape {
    AttentionShape { n, s, heads, d, order }
}

/// What an attention and its gradient read. q and k have a mean far from 0 and scores of up to about gain²√d.
#[derive(Clone)]
struct Data {
    s: AttentionShape,
    qkv: Vec<f32>,
    dout: Vec<f32>,
}

impl Data {
    fn new(s: AttentionShape, gain: f32, seed: u64) -> Self {
        let qkv = uniform(s.n * s.s * 3 * s.c(), seed).iter().map(|x| (x + 0.5) * gain).collect();
        Data { s, qkv, dout: uniform(s.n * s.s * s.c(), seed + 1) }
    }

    fn rounded(&self) -> Self {
        Data { s: self.s, qkv: rounded(&self.qkv), dout: rounded(&self.dout) }
    }
}

/// Buffers of a run.
struct Memory<'a> {
    d: &'a Driver,
    half: bool,
    buffers: Vec<Buffer>,
}

impl Memory<'_> {
    fn put(&mut self, data: &[f32], half: bool) -> Ptr {
        let halves: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
        let bytes: &[u8] = if half { bytemuck::cast_slice(&halves) } else { bytemuck::cast_slice(data) };
        let buffer = self.d.alloc(bytes.len()).unwrap();
        self.d.write(buffer.ptr(), bytes).unwrap();
        self.buffers.push(buffer);
        self.buffers[self.buffers.len() - 1].ptr()
    }

    fn act(&mut self, data: &[f32]) -> Ptr {
        self.put(data, self.half)
    }

    fn nan(&mut self, len: usize, half: bool) -> Ptr {
        self.put(&vec![f32::NAN; len], half)
    }

    fn read(&self, p: Ptr, len: usize, half: bool) -> Vec<f32> {
        let (mut f, mut h) = (vec![0f32; len], vec![bf16::ZERO; len]);
        if half {
            self.d.read(p, &mut h).unwrap();
            return h.iter().map(|x| x.to_f32()).collect();
        }
        self.d.read(p, &mut f).unwrap();
        f
    }
}

/// out, lse and dqkv by the kernels.
fn kernels(d: &Driver, data: &Data, half: bool, full: usize) -> [Vec<f32>; 3] {
    let s = &data.s;
    let mut m = Memory { d, half, buffers: Vec::new() };
    let (qkv, dout) = (m.act(&data.qkv), m.act(&data.dout));
    let rows = s.n * s.heads * s.s;
    let (out, lse, dqkv) = (m.nan(data.dout.len(), half), m.nan(rows, false), m.nan(data.qkv.len(), half));
    launch::forward(d, s, half, full, &launch::Forward { out, lse, qkv }).unwrap();
    let workspace = m.nan(launch::backward_workspace(s) / 4, false);
    launch::backward(d, s, half, full, &launch::Backward { dqkv, dout, qkv, out, lse }, workspace).unwrap();
    [m.read(out, data.dout.len(), half), m.read(lse, rows, false), m.read(dqkv, data.qkv.len(), half)]
}

/// Holds the kernels against the loops; returns the largest error in units of the largest value of its tensor.
fn check(d: &Driver, data: &Data, half: bool, full: usize, what: &str) -> f64 {
    let s = &data.s;
    let got = kernels(d, data, half, full);
    let operands = if half { data.rounded() } else { data.clone() };
    let want = reference(&operands, false);
    let u = f64::from(f32::EPSILON) * (s.s as f64 + 3.0 * (s.d + 8) as f64 * (1.0 + want.largest_score));
    let (terms, result) = if half { (u + 2.0 / 256.0, 1.0 / 256.0) } else { (u, f64::from(f32::EPSILON)) };
    let parts = [
        ("out", &want.out, &want.out_size, terms),
        ("lse", &want.lse, &want.lse_size, u),
        ("dqkv", &want.dqkv, &want.dqkv_size, terms),
    ];
    let mut largest_error = 0f64;
    for ((name, want, size, terms), got) in parts.into_iter().zip(&got) {
        let largest = want.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
            let (off, bound) = ((f64::from(*got) - want).abs(), terms * size + result * want.abs() + 1e-37);
            assert!(off <= bound, "{what}: {name}[{i}] is {got}, plain {want}, bound {bound:e}");
            largest_error = largest_error.max(off / largest);
        }
    }
    if half {
        compare_with_plain_bf16(data, &got, u, what);
    }
    largest_error
}

/// Against unrounded operands: at most twice the error of a plain bf16 implementation, and what f32 sums leave.
fn compare_with_plain_bf16(data: &Data, got: &[Vec<f32>; 3], u: f64, what: &str) {
    let (exact, plain) = (reference(data, false), reference(&data.rounded(), true));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    for part in ["out", "dq", "dk", "dv"] {
        let of = |r: &Reference| if part == "out" { r.out.clone() } else { r.dqkv.clone() };
        let (exact_all, plain, size) =
            (of(&exact), of(&plain), if part == "out" { &exact.out_size } else { &exact.dqkv_size });
        let got = &got[if part == "out" { 0 } else { 2 }];
        let own = exact.part(&data.s, part);
        let error = norm(&mut own.iter().map(|&i| f64::from(got[i]) - exact_all[i]));
        let bound =
            2.0 * norm(&mut own.iter().map(|&i| plain[i] - exact_all[i])) + u * norm(&mut own.iter().map(|&i| size[i]));
        assert!(error <= bound, "{what}: {part} is off by {error:e}, bound from plain bf16 {bound:e}");
    }
}

/// Every width that kernels are built for, some between, and those that no tensor-core kernel of their own covers; token counts 1, a
/// tile, one above a tile, odd, several tiles; more heads than fit a block and fewer.
const SIZES: [[usize; 4]; 20] = [
    [1, 1, 1, 32],
    [3, 16, 3, 64],
    [1, 5, 2, 192],
    [2, 16, 1, 144],
    [2, 49, 1, 40],
    [1, 64, 2, 96],
    [1, 65, 1, 128],
    [1, 65, 1, 144],
    [1, 33, 1, 192],
    [1, 256, 1, 64],
    [1, 130, 2, 32],
    [1, 17, 1, 512],
    [2, 65, 1, 4],
    [1, 1, 2, 1],
    [1, 33, 2, 10],
    [1, 257, 1, 8],
    [1, 66, 1, 88],
    [1, 66, 1, 184],
    [5, 3, 1, 80],
    [1, 2, 3, 120],
];

/// Checks all sizes; the largest relative error.
fn check_all(half: bool) -> f64 {
    let (d, mut largest) = (driver(), 0f64);
    for (i, size) in SIZES.into_iter().enumerate() {
        let order = [QkvOrder::Legacy, QkvOrder::New][i % 2];
        let (s, seed) = (shape(size, order), 40 + i as u64);
        let what = format!("half {half}, seed {seed}, {s:?}");
        largest = largest.max(check(&d, &Data::new(s, 1.0, seed), half, MANY, &what));
        if half && s.s > 64 && s.d.is_multiple_of(8) {
            check(&d, &Data::new(s, 1.0, seed), half, FEW, &format!("{what}, few blocks"));
        }
    }
    largest
}

#[test]
fn f32_kernels_are_the_plain_loops() {
    // Rounding errors of a sum's terms are independent, so the whole stays far below the bound of each element.
    let largest = check_all(false);
    assert!(largest <= 1e-5, "an element is off by {largest:e} of the largest");
}

#[test]
fn bf16_kernels_are_the_plain_loops_rounded() {
    check_all(true);
}

#[test]
fn many_tokens() {
    let s = shape([1, 1024, 1, 8], QkvOrder::Legacy);
    check(&driver(), &Data::new(s, 1.0, 3), true, FEW, "1024 tokens");
}

#[test]
fn both_orders_give_the_same_bits() {
    let d = driver();
    let [legacy, new] = [QkvOrder::Legacy, QkvOrder::New].map(|order| shape([2, 20, 3, 16], order));
    let data = Data::new(legacy, 1.0, 8);
    let (c3, width) = (3 * legacy.c(), legacy.d);
    let moved = |x: &[f32]| -> Vec<f32> {
        let mut to = vec![f32::NAN; x.len()];
        for (i, x) in x.iter().enumerate() {
            let (token, head, part, e) = (i / c3, i % c3 / (3 * width), i % (3 * width) / width, i % width);
            to[token * c3 + part * legacy.c() + head * width + e] = *x;
        }
        to
    };
    for half in [false, true] {
        let a = kernels(&d, &data, half, MANY);
        let b = kernels(&d, &Data { s: new, qkv: moved(&data.qkv), dout: data.dout.clone() }, half, MANY);
        assert_eq!((&a[0], &a[1], &moved(&a[2])), (&b[0], &b[1], &b[2]), "half {half}");
    }
}

/// Scores in the thousands: one key takes all, nothing overflows, and the bounds (which grow with the scores) still hold.
#[test]
fn large_scores_do_not_overflow() {
    let d = driver();
    for (half, size) in
        [(true, [1, 70, 1, 64]), (true, [1, 20, 1, 264]), (false, [1, 40, 1, 24]), (true, [2, 9, 1, 32])]
    {
        let s = shape(size, QkvOrder::Legacy);
        let data = Data::new(s, 40.0, 21);
        check(&d, &data, half, MANY, &format!("gain 40, half {half}, {s:?}"));
        // All scores of a row far below 0: padding, whose scores would be 0, must not win.
        let mut below = Data::new(s, 1.0, 22);
        for (i, x) in below.qkv.iter_mut().enumerate() {
            *x += [-40.0, 40.0, 0.0][i % (3 * s.d) / s.d];
        }
        check(&d, &below, half, MANY, &format!("negative scores, half {half}, {s:?}"));
    }
}

/// The same bits whatever the order of threads and the fate of asynchronous copies, for any number of blocks, and on a second run.
#[test]
fn bits_do_not_depend_on_the_schedule() {
    let d = driver();
    let Some(emulator) = d.emulator() else { return };
    for (half, size) in [
        (true, [1, 70, 1, 32]),
        (true, [3, 10, 1, 40]),
        (true, [1, 40, 1, 152]),
        (true, [1, 36, 1, 10]),
        (false, [1, 33, 1, 12]),
    ] {
        let data = Data::new(shape(size, QkvOrder::New), 1.0, 5);
        let bits = |full| -> Vec<u32> { kernels(&d, &data, half, full).concat().iter().map(|x| x.to_bits()).collect() };
        emulator.set_schedule(Schedule::default());
        let first = bits(MANY);
        assert_eq!(first, bits(FEW), "{size:?}: larger tiles");
        for schedule in Schedule::sweep() {
            emulator.set_schedule(schedule);
            assert_eq!(first, bits(MANY), "{size:?}: {schedule:?}");
        }
    }
}
