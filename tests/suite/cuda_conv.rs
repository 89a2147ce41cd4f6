//! Convolution and linear layer on CUDA (the emulator, or the GPU that `IDDPM_TEST_DEVICE=cuda` asks for) against the plain loops.
//!
//! f32 kernels: a sum of `terms` products may differ from the exact one by `terms · eps · Σ|products|`, whatever its order.
//! bf16 kernels see operands rounded to bf16 (8 bits: 2^-8 relative at most) and round their result once more; so against the
//! plain loops on the rounded operands they may differ by 2^-8 of the result and the f32 bound, and where weights are folded
//! and then rounded, by 2^-8 Σ|products| more. Held against unrounded operands, their error may be at most twice that of
//! plain loops over rounded operands with a rounded result.

use crate::device::driver;
use half::bf16;
use iddpm::device::driver::{Buffer, Driver, LaunchTraffic, Ptr, Schedule};
use iddpm::ops::conv2d::launch::{self, Types};
use iddpm::ops::conv2d::{self, ConvShape};
use iddpm::ops::view::{Cat, Rows, RowsMut};
use iddpm::rng::philox;

mod plans;
mod sums;
mod traffic;

/// Uniform values in [-1, 1).
fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    (0..len).map(|i| f64::from(word(i)).mul_add(1.0 / 2_147_483_648.0, -1.0) as f32).collect()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

fn conv(n: usize, [h, w]: [usize; 2], [ca, cb, oc]: [usize; 3], k: usize, stride: usize, upsample: bool) -> ConvShape {
    ConvShape { n, h, w, ca, cb, oc, k, stride, upsample, pad: k / 2 }
}

/// Blocks wanted: few give the largest tiles and no splits, many the smallest and most.
const FEW: usize = 1;
const MANY: usize = 64;

/// Everything a convolution reads.
#[derive(Clone)]
struct Data {
    s: ConvShape,
    x: [Vec<f32>; 2],
    w: Vec<f32>,
    bias: Vec<f32>,
    shift: Vec<f32>,
    residual: Vec<f32>,
    dy: Vec<f32>,
    add: [Vec<f32>; 2],
    old: Vec<f32>,
}

/// Columns before and after those of the shift in its matrix, as the network has them: aligned if the channels are.
fn margin(s: &ConvShape) -> usize {
    if s.oc.is_multiple_of(8) { 8 } else { 3 }
}

impl Data {
    fn new(s: ConvShape, seed: u64) -> Self {
        let x = [s.in_pixels() * s.ca, s.in_pixels() * s.cb];
        Data {
            x: [uniform(x[0], seed), uniform(x[1], seed + 1)],
            w: uniform(s.weights(), seed + 2),
            bias: uniform(s.oc, seed + 3),
            shift: uniform(s.n * (s.oc + 2 * margin(&s)), seed + 4),
            residual: uniform(s.out_pixels() * s.oc, seed + 5),
            dy: uniform(s.out_pixels() * s.oc, seed + 6),
            add: [uniform(x[0], seed + 7), uniform(x[1], seed + 8)],
            old: uniform(s.weights() + s.oc, seed + 9),
            s,
        }
    }

    /// Every tensor through `f`; f32 parameters (bias, old gradients) only if `all`.
    fn map(&self, all: bool, f: impl Fn(&[f32]) -> Vec<f32>) -> Self {
        let keep = |x: &[f32]| if all { f(x) } else { x.to_vec() };
        Data {
            s: self.s,
            x: [f(&self.x[0]), f(&self.x[1])],
            w: f(&self.w),
            bias: keep(&self.bias),
            shift: f(&self.shift),
            residual: f(&self.residual),
            dy: f(&self.dy),
            add: [f(&self.add[0]), f(&self.add[1])],
            old: keep(&self.old),
        }
    }

    fn cat(&self) -> Cat<'_> {
        Cat { a: &self.x[0], ca: self.s.ca, b: &self.x[1], cb: self.s.cb }
    }

    /// By the plain loops: y; both parts of dx; dw, db (accumulated) and dshift.
    fn plain(&self, pass: Pass) -> Vec<Vec<f32>> {
        let (s, nan) = (&self.s, |n: usize| vec![f32::NAN; n]);
        match pass {
            Pass::Forward => {
                let mut y = nan(self.dy.len());
                let shift = Rows { data: &self.shift, stride: s.oc + 2 * margin(s), col: margin(s) };
                let residual = Cat::single(&self.residual, s.oc);
                conv2d::forward_cpu(&mut y, self.cat(), &self.w, Some(&self.bias), Some(shift), Some(residual), s);
                vec![y]
            }
            Pass::Data => {
                let (mut a, mut b) = (nan(self.x[0].len()), nan(self.x[1].len()));
                conv2d::backward_data_cpu(&mut a, &mut b, &self.dy, &self.w, Some(&self.add[0]), Some(&self.add[1]), s);
                vec![a, b]
            }
            Pass::Weight => {
                let (mut dw, mut db) = (self.old[..s.weights()].to_vec(), self.old[s.weights()..].to_vec());
                let mut dshift = vec![0.0; s.n * s.oc];
                let rows = Some(RowsMut { data: &mut dshift, stride: s.oc, col: 0 });
                conv2d::backward_weight_cpu(&mut dw, Some(&mut db), rows, &self.dy, self.cat(), true, s);
                vec![dw, db, dshift]
            }
        }
    }

    /// Products in a sum, at most.
    fn terms(&self, pass: Pass) -> usize {
        4 + match pass {
            Pass::Forward => 9 * self.s.c(),
            Pass::Data => 16 * self.s.oc,
            Pass::Weight => self.s.out_pixels(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Pass {
    Forward,
    Data,
    Weight,
}

/// Buffers of a run and what to read from them.
struct Gpu<'a> {
    d: &'a Driver,
    half: bool,
    buffers: Vec<Buffer>,
}

impl Gpu<'_> {
    fn bytes(&mut self, data: &[u8]) -> Ptr {
        let buffer = self.d.alloc(data.len().max(1)).unwrap();
        self.d.write(buffer.ptr(), data).unwrap();
        self.buffers.push(buffer);
        self.buffers[self.buffers.len() - 1].ptr()
    }

    fn f32(&mut self, data: &[f32]) -> Ptr {
        self.bytes(bytemuck::cast_slice(data))
    }

    /// An activation, in the type of the run; no address for no elements.
    fn act(&mut self, data: &[f32]) -> Ptr {
        match (data.is_empty(), self.half) {
            (true, _) => Ptr::NULL,
            (_, false) => self.f32(data),
            (_, true) => {
                let data: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
                self.bytes(bytemuck::cast_slice(&data))
            }
        }
    }

    fn nan(&mut self, len: usize) -> Ptr {
        self.act(&vec![f32::NAN; len])
    }

    fn read(&self, p: Ptr, len: usize, half: bool) -> Vec<f32> {
        let (mut f, mut h) = (vec![0f32; len], vec![bf16::ZERO; len]);
        if len > 0 && half {
            self.d.read(p, &mut h).unwrap();
            return h.iter().map(|x| x.to_f32()).collect();
        }
        if len > 0 {
            self.d.read(p, &mut f).unwrap();
        }
        f
    }
}

/// The same by the kernels, in f32 or bf16 (weights as f32 or bf16).
fn kernels(d: &Driver, data: &Data, pass: Pass, t: Types, full: usize) -> Vec<Vec<f32>> {
    let s = &data.s;
    let mut gpu = Gpu { d, half: t.half, buffers: Vec::new() };
    let x = [gpu.act(&data.x[0]), gpu.act(&data.x[1])];
    let w = if t.half_weights { gpu.act(&data.w) } else { gpu.f32(&data.w) };
    let workspace = match pass {
        Pass::Weight => launch::backward_weight_workspace(s, t, full),
        _ => launch::weights_workspace(s, t),
    };
    let scratch = d.alloc(workspace.max(1)).unwrap();
    let stride = s.oc + 2 * margin(s);
    let first = margin(s) * if t.half { 2 } else { 4 };
    match pass {
        Pass::Forward => {
            let (y, shift) = (gpu.nan(data.dy.len()), gpu.act(&data.shift));
            let shift = (shift.offset(first), stride);
            let residual = gpu.act(&data.residual);
            let f = launch::Forward { y, x, w, bias: gpu.f32(&data.bias), shift, residual, ..Default::default() };
            launch::forward(d, s, t, full, &f, scratch.ptr()).unwrap();
            vec![gpu.read(y, data.dy.len(), t.half)]
        }
        Pass::Data => {
            let dx = [gpu.nan(data.x[0].len()), gpu.nan(data.x[1].len())];
            let add = [gpu.act(&data.add[0]), gpu.act(&data.add[1])];
            let b = launch::BackwardData { dx, dy: gpu.act(&data.dy), w, add };
            launch::backward_data(d, s, t, full, &b, scratch.ptr()).unwrap();
            [0, 1].map(|i| gpu.read(dx[i], data.x[i].len(), t.half)).into()
        }
        Pass::Weight => {
            let (dw, db) = (gpu.f32(&data.old[..s.weights()]), gpu.f32(&data.old[s.weights()..]));
            let dshift = gpu.nan(s.n * stride);
            let column = dshift.offset(first);
            let dy = gpu.act(&data.dy);
            let b = launch::BackwardWeight { dw, db, dshift: (column, stride), dy, x, accumulate: true };
            launch::backward_weight(d, s, t, full, &b, scratch.ptr()).unwrap();
            let shift = gpu.read(dshift, s.n * stride, t.half);
            let rows = shift.chunks_exact(stride).flat_map(|row| row[margin(s)..][..s.oc].to_vec()).collect();
            vec![gpu.read(dw, s.weights(), false), gpu.read(db, s.oc, false), rows]
        }
    }
}

const F32: Types = Types { half: false, half_weights: false };
const BF16: Types = Types { half: true, half_weights: true };
const BF16_MASTER: Types = Types { half: true, half_weights: false };

fn check_f32(d: &Driver, s: ConvShape, pass: Pass, full: usize) {
    let data = Data::new(s, 7);
    let size = data.map(true, |x| x.iter().map(|x| x.abs()).collect()).plain(pass);
    let got = kernels(d, &data, pass, F32, full);
    for ((got, want), size) in got.iter().zip(data.plain(pass)).zip(size) {
        assert_eq!(got.len(), want.len(), "{pass:?} {s:?}: lengths");
        for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
            let bound = data.terms(pass) as f32 * f32::EPSILON * size + f32::MIN_POSITIVE;
            assert!((got - want).abs() <= bound, "{pass:?} {s:?}: element {i} is {got}, plain {want}, bound {bound:e}");
        }
    }
}

fn check_bf16(d: &Driver, s: ConvShape, pass: Pass, t: Types, full: usize) {
    let data = Data::new(s, 11);
    let operands = data.map(false, rounded);
    let size = operands.map(true, |x| x.iter().map(|x| x.abs()).collect()).plain(pass);
    // The kernel rounds what the plain loops see rounded, so both may be given the unrounded data.
    let got = kernels(d, &data, pass, t, full);
    let (want, exact) = (operands.plain(pass), data.plain(pass));
    for (part, got) in got.iter().enumerate() {
        let (want, exact, size) = (&want[part], &exact[part], &size[part]);
        // dw and db stay f32.
        let stays = pass == Pass::Weight && part < 2;
        let (result, folded) = (if stays { 0.0 } else { 1.0 / 256.0 }, if s.upsample { 1.0 / 256.0 } else { 0.0 });
        let (mut error, mut plain) = (0f64, 0f64);
        for i in 0..got.len() {
            let bound = result * want[i].abs() + (folded + 2.0 * data.terms(pass) as f32 * f32::EPSILON) * size[i];
            let off = (got[i] - want[i]).abs();
            assert!(
                off <= bound + 1e-30,
                "{pass:?} {part} {s:?}: element {i} is {}, plain {}, bound {bound:e}",
                got[i],
                want[i]
            );
            let rounding = if stays { want[i] } else { bf16::from_f32(want[i]).to_f32() };
            error += f64::from(got[i] - exact[i]).powi(2);
            plain += f64::from(rounding - exact[i]).powi(2);
        }
        assert!(
            error.sqrt() <= 2.0 * plain.sqrt() + 1e-6,
            "{pass:?} {part} {s:?}: error {error:e}, plain bf16 {plain:e}"
        );
    }
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::Data, Pass::Weight];

/// Size 1, odd sizes, every kind of kernel; one and two sources; 1, 3 and 6 channels and multiples of 8.
fn odd_shapes() -> Vec<ConvShape> {
    let kinds = [(1, 1, false), (1, 2, false), (3, 1, false), (3, 2, false), (3, 1, true)];
    let images = [(1, [1, 1]), (2, [5, 6]), (3, [1, 7])];
    let channels = [[1, 0, 1], [3, 0, 40], [24, 0, 6], [7, 10, 33], [8, 16, 24]];
    let mut shapes = Vec::new();
    for (k, stride, up) in kinds {
        for (n, hw) in images {
            shapes.extend(channels.map(|c| conv(n, hw, c, k, stride, up)));
        }
    }
    for (n, hw) in [(1, [2, 2]), (2, [6, 4])] {
        shapes.extend(channels.map(|c| half(n, hw, c)));
    }
    shapes
}

/// Halved with the padding behind the image alone.
fn half(n: usize, hw: [usize; 2], channels: [usize; 3]) -> ConvShape {
    ConvShape { pad: 0, ..conv(n, hw, channels, 3, 2, false) }
}

/// Shapes of the network: a level's blocks, the decoder's two sources, down, up, a head; more columns than a tile.
fn real_shapes() -> Vec<ConvShape> {
    vec![
        conv(2, [16, 16], [32, 0, 32], 3, 1, false),
        conv(1, [16, 16], [64, 32, 64], 3, 1, false),
        conv(2, [8, 8], [64, 0, 64], 3, 1, true),
        conv(2, [16, 16], [32, 0, 64], 3, 2, false),
        half(2, [16, 16], [32, 0, 64]),
        conv(9, [4, 4], [128, 0, 136], 1, 1, false),
        conv(1, [16, 16], [32, 0, 6], 3, 1, false),
        conv(1, [16, 16], [3, 0, 128], 3, 1, false),
    ]
}

#[test]
fn f32_kernels_are_the_plain_loops() {
    let d = driver();
    for s in odd_shapes() {
        PASSES.iter().for_each(|&pass| check_f32(&d, s, pass, MANY));
    }
    for s in real_shapes() {
        PASSES.iter().for_each(|&pass| check_f32(&d, s, pass, FEW));
        check_f32(&d, s, Pass::Weight, MANY);
    }
}

#[test]
fn bf16_kernels_are_the_plain_loops_rounded() {
    let d = driver();
    for s in odd_shapes() {
        PASSES.iter().for_each(|&pass| check_bf16(&d, s, pass, BF16, MANY));
    }
    for s in real_shapes() {
        PASSES.iter().for_each(|&pass| check_bf16(&d, s, pass, BF16_MASTER, FEW));
        PASSES.iter().for_each(|&pass| check_bf16(&d, s, pass, BF16, MANY));
    }
}

#[test]
fn every_tile_is_right() {
    let d = driver();
    // 128x128, 128x64 (192 columns waste less so), 64x64 and 32x64 (too few blocks otherwise), 128x32.
    for (s, full) in [
        (conv(3, [8, 8], [136, 0, 128], 3, 1, false), FEW),
        (conv(3, [8, 8], [192, 0, 192], 1, 1, false), FEW),
        (conv(3, [8, 8], [64, 64, 128], 1, 1, false), 6),
        (conv(1, [8, 8], [64, 0, 192], 3, 1, false), 6),
        (conv(3, [8, 8], [32, 0, 32], 3, 1, false), FEW),
    ] {
        PASSES.iter().for_each(|&pass| check_bf16(&d, s, pass, BF16, full));
    }
}

/// The same bits whatever the order of threads and the fate of asynchronous copies, and on a second run.
#[test]
fn bits_do_not_depend_on_the_schedule() {
    let d = driver();
    let Some(emulator) = d.emulator() else { return };
    for s in [
        conv(2, [9, 7], [40, 24, 72], 3, 1, false),
        conv(2, [8, 8], [16, 0, 32], 3, 1, true),
        conv(2, [9, 8], [16, 0, 6], 3, 2, false),
        conv(2, [16, 16], [3, 0, 16], 3, 1, false),
    ] {
        let data = Data::new(s, 5);
        for (pass, t) in PASSES.into_iter().flat_map(|pass| [(pass, F32), (pass, BF16_MASTER)]) {
            let bits =
                || -> Vec<u32> { kernels(&d, &data, pass, t, MANY).concat().iter().map(|x| x.to_bits()).collect() };
            emulator.set_schedule(Schedule::default());
            let first = bits();
            assert_eq!(first, bits(), "{pass:?} {t:?} {s:?}: a second run");
            for schedule in Schedule::sweep() {
                emulator.set_schedule(schedule);
                assert_eq!(first, bits(), "{pass:?} {t:?} {s:?}: {schedule:?}");
            }
        }
    }
}

/// A result is summed in one order whatever tile it falls in: pictures do not depend on the batch they are made in.
#[test]
fn bits_do_not_depend_on_the_tile() {
    let d = driver();
    for s in [
        conv(3, [8, 8], [136, 0, 128], 3, 1, false),
        conv(3, [8, 8], [64, 64, 192], 1, 1, false),
        conv(3, [8, 8], [64, 0, 128], 3, 1, true),
        conv(3, [8, 8], [64, 0, 128], 3, 2, false),
    ] {
        let data = Data::new(s, 5);
        for pass in [Pass::Forward, Pass::Data] {
            let bits = |full| -> Vec<u32> {
                kernels(&d, &data, pass, BF16, full).concat().iter().map(|x| x.to_bits()).collect()
            };
            let first = bits(FEW);
            assert!([3, 6, 1000].iter().all(|&full| bits(full) == first), "{pass:?} {s:?}");
        }
    }
}

/// Runs `work` with the traffic meter on, if this is the emulator.
fn metered(d: &Driver, work: impl FnOnce()) -> Option<Vec<LaunchTraffic>> {
    let emulator = d.emulator()?;
    let measured = emulator.metered(|| {
        work();
        Ok(())
    });
    Some(measured.unwrap().1)
}
