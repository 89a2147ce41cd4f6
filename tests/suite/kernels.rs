//! The numeric operations: plain references against closed forms and central differences, fast twins against the plain
//! ones on every instruction set of this CPU, with 1 and 2 threads to the same bits.
//!
//! A fast sum of `terms` products may differ from the exact one by `terms · eps · Σ|products|` (every partial sum is
//! rounded once, whatever the order); `Σ|products|` is computed by the plain reference on absolute values.

use iddpm::ops::attention::{self, AttentionShape, QkvOrder};
use iddpm::ops::conv2d::{self, ConvShape};
use iddpm::ops::fast::{self, Isa};
use iddpm::ops::group_norm::{self, Dropout, GroupNormShape};
use iddpm::ops::linear;
use iddpm::ops::view::{Cat, Rows, RowsMut};
use iddpm::rng::philox;

/// Uniform values in [-1, 1).
fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    (0..len).map(|i| f64::from(word(i)).mul_add(1.0 / 2_147_483_648.0, -1.0) as f32).collect()
}

fn abs(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.abs()).collect()
}

fn nan(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

fn isas() -> Vec<Isa> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()).collect()
}

/// Runs `f` on pools of 1 and 2 threads for every instruction set; the outputs of the two pools must have the same bits.
fn on_all(what: &str, f: impl Fn(Isa) -> Vec<Vec<f32>> + Sync) -> Vec<(Isa, Vec<Vec<f32>>)> {
    let with = |threads: usize, isa: Isa| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(|| f(isa))
    };
    let bits = |outs: &[Vec<f32>]| outs.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    isas()
        .into_iter()
        .map(|isa| {
            let (one, two) = (with(1, isa), with(2, isa));
            assert!(bits(&one) == bits(&two), "{what}, {isa:?}: 1 and 2 threads differ");
            (isa, one)
        })
        .collect()
}

/// `|got - want| <= terms · eps · size` everywhere.
fn assert_close(got: &[f32], want: &[f32], size: &[f32], terms: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let bound = terms as f32 * f32::EPSILON * size.abs() + f32::MIN_POSITIVE;
        assert!((got - want).abs() <= bound, "{what}: element {i} is {got}, plain {want}, bound {bound:e}");
    }
}

/// Central differences of `loss` in f64: compares `grad` with (loss(x + h) - loss(x - h))/2h for a few elements of x.
fn assert_gradient(grad: &[f32], x: &[f32], loss: impl Fn(&[f32]) -> f64, what: &str) {
    assert_eq!(grad.len(), x.len(), "{what}: lengths");
    let largest = grad.iter().fold(1e-3f32, |m, g| m.max(g.abs()));
    for i in (0..x.len()).step_by(1 + x.len() / 13) {
        let (mut up, mut down) = (x.to_vec(), x.to_vec());
        up[i] += 0.0078125;
        down[i] -= 0.0078125;
        let want = (loss(&up) - loss(&down)) / f64::from(up[i] - down[i]);
        // Outputs are rounded to f32 (about 1e-7 of their size over 2h = 1/64) and the third derivative weighs h²/6.
        let bound = 2e-3 * f64::from(largest);
        assert!((f64::from(grad[i]) - want).abs() <= bound, "{what}: element {i} is {}, difference {want}", grad[i]);
    }
}

fn weighted(y: &[f32], dy: &[f32]) -> f64 {
    y.iter().zip(dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
}

/// Everything a convolution reads.
struct ConvData {
    s: ConvShape,
    a: Vec<f32>,
    b: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    shift: Vec<f32>,
    residual: [Vec<f32>; 2],
    residual_ca: usize,
    dy: Vec<f32>,
    old: Vec<f32>,
}

impl ConvData {
    fn new(s: ConvShape, seed: u64) -> Self {
        let residual_ca = s.oc.div_ceil(2);
        let residual = |channels: usize, i| uniform(s.out_pixels() * channels, seed + i);
        ConvData {
            s,
            a: uniform(s.in_pixels() * s.ca, seed),
            b: uniform(s.in_pixels() * s.cb, seed + 1),
            w: uniform(s.weights(), seed + 2),
            bias: uniform(s.oc, seed + 3),
            shift: uniform(s.n * (s.oc + 5), seed + 4),
            residual: [residual(residual_ca, 5), residual(s.oc - residual_ca, 6)],
            residual_ca,
            dy: uniform(s.out_pixels() * s.oc, seed + 7),
            old: uniform(s.weights() + s.oc, seed + 8),
        }
    }

    fn absolute(&self) -> Self {
        ConvData {
            s: self.s,
            a: abs(&self.a),
            b: abs(&self.b),
            w: abs(&self.w),
            bias: abs(&self.bias),
            shift: abs(&self.shift),
            residual: [abs(&self.residual[0]), abs(&self.residual[1])],
            residual_ca: self.residual_ca,
            dy: abs(&self.dy),
            old: abs(&self.old),
        }
    }

    fn x(&self) -> Cat<'_> {
        Cat { a: &self.a, ca: self.s.ca, b: &self.b, cb: self.s.cb }
    }

    fn shift(&self) -> Option<Rows<'_>> {
        Some(Rows { data: &self.shift, stride: self.s.oc + 5, col: 3 })
    }

    fn residual(&self) -> Option<Cat<'_>> {
        let [a, b] = &self.residual;
        Some(Cat { a, ca: self.residual_ca, b, cb: self.s.oc - self.residual_ca })
    }

    fn forward(&self, isa: Option<Isa>) -> Vec<f32> {
        let (s, mut y) = (&self.s, nan(self.dy.len()));
        let (bias, mut scratch) = (Some(&self.bias[..]), nan(fast::conv2d::forward_scratch(s)));
        match isa {
            None => conv2d::forward_cpu(&mut y, self.x(), &self.w, bias, self.shift(), self.residual(), s),
            Some(isa) => fast::conv2d::forward(
                isa,
                &mut y,
                self.x(),
                &self.w,
                bias,
                self.shift(),
                self.residual(),
                s,
                &mut scratch,
            ),
        }
        y
    }

    /// dxa (with something added) and dxb (without).
    fn backward_data(&self, isa: Option<Isa>) -> [Vec<f32>; 2] {
        let (s, mut dxa, mut dxb) = (&self.s, nan(self.a.len()), nan(self.b.len()));
        let (add, mut scratch) = (Some(&self.a[..]), nan(fast::conv2d::backward_data_scratch(s)));
        match isa {
            None => conv2d::backward_data_cpu(&mut dxa, &mut dxb, &self.dy, &self.w, add, None, s),
            Some(isa) => {
                fast::conv2d::backward_data(isa, &mut dxa, &mut dxb, &self.dy, &self.w, add, None, s, &mut scratch)
            }
        }
        [dxa, dxb]
    }

    /// dw, db and dshift.
    fn backward_weight(&self, isa: Option<Isa>, accumulate: bool) -> [Vec<f32>; 3] {
        let s = &self.s;
        let (mut dw, mut db) = (self.old[..s.weights()].to_vec(), self.old[s.weights()..].to_vec());
        if !accumulate {
            dw.fill(f32::NAN);
            db.fill(f32::NAN);
        }
        let mut dshift = nan(s.n * (s.oc + 1));
        let rows = Some(RowsMut { data: &mut dshift, stride: s.oc + 1, col: 1 });
        let mut scratch = nan(fast::conv2d_weight::backward_weight_scratch(s));
        match isa {
            None => conv2d::backward_weight_cpu(&mut dw, Some(&mut db), rows, &self.dy, self.x(), accumulate, s),
            Some(isa) => fast::conv2d_weight::backward_weight(
                isa,
                &mut dw,
                Some(&mut db),
                rows,
                &self.dy,
                self.x(),
                accumulate,
                s,
                &mut scratch,
            ),
        }
        let dshift = dshift.chunks_exact(s.oc + 1).flat_map(|row| row[1..].to_vec()).collect();
        [dw, db, dshift]
    }
}

fn conv(n: usize, [h, w]: [usize; 2], [ca, cb, oc]: [usize; 3], k: usize, stride: usize, upsample: bool) -> ConvShape {
    ConvShape { n, h, w, ca, cb, oc, k, stride, upsample }
}

/// Size 1, odd sizes, one above a tile, and real ones; every kind of kernel.
fn conv_shapes() -> Vec<ConvShape> {
    let kinds = [(1, 1, false), (1, 2, false), (3, 1, false), (3, 2, false), (3, 1, true)];
    let images = [(1, [1, 1]), (2, [5, 6]), (3, [1, 7]), (1, [7, 2])];
    let channels = [[1, 0, 1], [3, 0, 33], [6, 5, 7], [17, 33, 18], [32, 16, 6]];
    let mut shapes = Vec::new();
    for (k, stride, up) in kinds {
        for (n, hw) in images {
            shapes.extend(channels.map(|c| conv(n, hw, c, k, stride, up)));
        }
    }
    shapes.extend([
        conv(3, [16, 16], [32, 0, 32], 3, 1, false),
        conv(2, [16, 16], [64, 32, 32], 3, 1, false),
        conv(2, [8, 8], [64, 0, 64], 3, 1, true),
        conv(2, [16, 16], [32, 0, 64], 3, 2, false),
        conv(5, [4, 4], [128, 0, 96], 3, 1, false),
        conv(2, [16, 16], [64, 0, 192], 1, 1, false),
        conv(3, [32, 32], [3, 0, 32], 3, 1, false),
        conv(3, [32, 32], [32, 0, 6], 3, 1, false),
    ]);
    shapes
}

#[test]
fn fast_convolution_equals_the_plain_one() {
    for (seed, s) in conv_shapes().into_iter().enumerate() {
        let seed = 1000 + 10 * seed as u64;
        let (data, what) = (ConvData::new(s, seed), format!("seed {seed}, {s:?}"));
        let size = data.absolute();
        let (fan_in, fan_out, pixels) = (s.c() * s.k * s.k + 8, s.oc * 4 * s.k * s.k + 8, s.out_pixels() + 8);
        let plain = (data.forward(None), data.backward_data(None), data.backward_weight(None, seed.is_multiple_of(20)));
        let sizes = (size.forward(None), size.backward_data(None), size.backward_weight(None, true));
        let fast = on_all(&what, |isa| {
            let isa = Some(isa);
            let mut outs = vec![data.forward(isa)];
            outs.extend(data.backward_data(isa));
            outs.extend(data.backward_weight(isa, seed.is_multiple_of(20)));
            outs
        });
        for (isa, outs) in fast {
            let name = |part: &str| format!("{part}, {isa:?}, {what}");
            assert_close(&outs[0], &plain.0, &sizes.0, fan_in, &name("y"));
            assert_close(&outs[1], &plain.1[0], &sizes.1[0], fan_out, &name("dxa"));
            assert_close(&outs[2], &plain.1[1], &sizes.1[1], fan_out, &name("dxb"));
            assert_close(&outs[3], &plain.2[0], &sizes.2[0], 4 * pixels, &name("dw"));
            assert_close(&outs[4], &plain.2[1], &sizes.2[1], pixels, &name("db"));
            assert_close(&outs[5], &plain.2[2], &sizes.2[2], pixels, &name("dshift"));
        }
    }
}

#[test]
fn plain_convolution_closed_forms() {
    // An identity kernel copies; a kernel of ones on an image of ones counts the pixels under it.
    let s = conv(2, [5, 6], [3, 0, 3], 3, 1, false);
    let x = uniform(s.in_pixels() * 3, 1);
    let mut w = vec![0.0; s.weights()];
    (0..3).for_each(|o| w[(o * 9 + 4) * 3 + o] = 1.0);
    let mut y = nan(x.len());
    conv2d::forward_cpu(&mut y, Cat::single(&x, 3), &w, None, None, None, &s);
    assert_eq!(y, x);
    let count = |s: ConvShape| {
        let mut y = nan(s.out_pixels());
        let ones = vec![1.0; s.in_pixels().max(9)];
        conv2d::forward_cpu(&mut y, Cat::single(&ones[..s.in_pixels()], 1), &ones[..9], None, None, None, &s);
        y
    };
    assert_eq!(count(conv(1, [3, 3], [1, 0, 1], 3, 1, false)), [4., 6., 4., 6., 9., 6., 4., 6., 4.]);
    assert_eq!(count(conv(1, [3, 4], [1, 0, 1], 3, 2, false)), [4., 6., 4., 6.]);
    assert_eq!(count(conv(1, [1, 2], [1, 0, 1], 3, 1, true)), [4., 6., 6., 4., 4., 6., 6., 4.]);
}

#[test]
fn plain_convolution_gradients() {
    for (seed, (k, stride, up)) in [(1, 1, false), (3, 1, false), (3, 2, false), (3, 1, true)].into_iter().enumerate() {
        let seed = 7 + 10 * seed as u64;
        let data = ConvData::new(conv(2, [5, 6], [3, 2, 4], k, stride, up), seed);
        let (s, what) = (&data.s, format!("seed {seed}, {:?}", data.s));
        let loss = |a: &[f32], b: &[f32], w: &[f32], bias: &[f32], shift: &[f32]| {
            let mut y = nan(data.dy.len());
            let x = Cat { a, ca: s.ca, b, cb: s.cb };
            let shift = Some(Rows { data: shift, stride: s.oc, col: 0 });
            conv2d::forward_cpu(&mut y, x, w, Some(bias), shift, data.residual(), s);
            weighted(&y, &data.dy)
        };
        let ConvData { a, b, w, bias, .. } = &data;
        let shift = &data.shift[..s.n * s.oc];
        let (mut dxa, mut dxb) = (nan(a.len()), nan(b.len()));
        conv2d::backward_data_cpu(&mut dxa, &mut dxb, &data.dy, w, None, None, s);
        let [dw, db, dshift] = data.backward_weight(None, false);
        assert_gradient(&dxa, a, |a| loss(a, b, w, bias, shift), &format!("dxa, {what}"));
        assert_gradient(&dxb, b, |b| loss(a, b, w, bias, shift), &format!("dxb, {what}"));
        assert_gradient(&dw, w, |w| loss(a, b, w, bias, shift), &format!("dw, {what}"));
        assert_gradient(&db, bias, |bias| loss(a, b, w, bias, shift), &format!("db, {what}"));
        assert_gradient(&dshift, shift, |shift| loss(a, b, w, bias, shift), &format!("dshift, {what}"));
    }
}

#[test]
fn fast_linear_equals_the_plain_one() {
    for (i, [n, c, oc]) in [[1, 1, 1], [3, 5, 7], [13, 33, 65], [16, 128, 192]].into_iter().enumerate() {
        let seed = 300 + 10 * i as u64;
        let what = format!("seed {seed}, n {n}, c {c}, oc {oc}");
        let (x, w, b) = (uniform(n * c, seed), uniform(oc * c, seed + 1), uniform(oc, seed + 2));
        let (dy, add) = (uniform(n * oc, seed + 3), uniform(n * c, seed + 4));
        let new = || [nan(n * oc), nan(n * c), w.clone(), b.clone()];
        let plain = |x: &[f32], w: &[f32], b: &[f32], dy: &[f32], add: &[f32]| {
            let [mut y, mut dx, mut dw, mut db] = new().map(|v| if x[0] < 0.0 { v } else { abs(&v) });
            linear::forward_cpu(&mut y, x, w, b, n, c, oc);
            linear::backward_data_cpu(&mut dx, dy, w, Some(add), n, c, oc);
            linear::backward_weight_cpu(&mut dw, &mut db, dy, x, true, n, c, oc);
            [y, dx, dw, db]
        };
        let x: Vec<f32> = std::iter::once(-1.0).chain(x[1..].iter().copied()).collect();
        let want = plain(&x, &w, &b, &dy, &add);
        let size = plain(&abs(&x), &abs(&w), &abs(&b), &abs(&dy), &abs(&add));
        let fast = on_all(&what, |isa| {
            let [mut y, mut dx, mut dw, mut db] = new();
            let mut scratch = nan(fast::linear::forward_scratch(n, c, oc));
            fast::linear::forward(isa, &mut y, &x, &w, &b, n, c, oc, &mut scratch);
            let mut scratch = nan(fast::linear::backward_data_scratch(n, c, oc));
            fast::linear::backward_data(isa, &mut dx, &dy, &w, Some(&add), n, c, oc, &mut scratch);
            let mut scratch = nan(fast::linear::backward_weight_scratch(n, c, oc));
            fast::linear::backward_weight(isa, &mut dw, &mut db, &dy, &x, true, n, c, oc, &mut scratch);
            vec![y, dx, dw, db]
        });
        for (isa, outs) in fast {
            for (part, name) in ["y", "dx", "dw", "db"].into_iter().enumerate() {
                assert_close(&outs[part], &want[part], &size[part], n + c + oc, &format!("{name}, {isa:?}, {what}"));
            }
        }
    }
}

#[test]
fn plain_linear_gradients() {
    let ([n, c, oc], seed) = ([3, 4, 5], 41);
    let (x, w, b) = (uniform(n * c, seed), uniform(oc * c, seed + 1), uniform(oc, seed + 2));
    let dy = uniform(n * oc, seed + 3);
    let loss = |x: &[f32], w: &[f32], b: &[f32]| {
        let mut y = nan(n * oc);
        linear::forward_cpu(&mut y, x, w, b, n, c, oc);
        weighted(&y, &dy)
    };
    let (mut dx, mut dw, mut db) = (nan(n * c), nan(oc * c), nan(oc));
    linear::backward_data_cpu(&mut dx, &dy, &w, None, n, c, oc);
    linear::backward_weight_cpu(&mut dw, &mut db, &dy, &x, false, n, c, oc);
    assert_gradient(&dx, &x, |x| loss(x, &w, &b), "linear dx");
    assert_gradient(&dw, &w, |w| loss(&x, w, &b), "linear dw");
    assert_gradient(&db, &b, |b| loss(&x, &w, b), "linear db");
}

/// Every size of an element is the largest of its tensor: for results whose terms cancel a little.
fn largest(x: &[f32]) -> Vec<f32> {
    vec![x.iter().fold(0.0, |m: f32, x| m.max(x.abs())); x.len()]
}

/// out and lse, then dqkv.
fn attention_outputs(isa: Option<Isa>, qkv: &[f32], dout: &[f32], s: &AttentionShape) -> Vec<Vec<f32>> {
    let (mut out, mut lse, mut dqkv) = (nan(dout.len()), nan(s.n * s.heads * s.s), nan(qkv.len()));
    if let Some(isa) = isa {
        fast::attention::forward(isa, &mut out, &mut lse, qkv, s, &mut nan(fast::attention::forward_scratch(s)));
        let mut scratch = nan(fast::attention::backward_scratch(s));
        fast::attention::backward(isa, &mut dqkv, dout, qkv, &out, &lse, s, &mut scratch);
    } else {
        attention::forward_cpu(&mut out, &mut lse, qkv, s);
        attention::backward_cpu(&mut dqkv, dout, qkv, &out, &lse, s);
    }
    vec![out, lse, dqkv]
}

fn attention_shape([n, s, heads, d]: [usize; 4], order: QkvOrder) -> AttentionShape {
    AttentionShape { n, s, heads, d, order }
}

#[test]
fn fast_attention_equals_the_plain_one() {
    let sizes = [[1, 1, 1, 1], [2, 5, 3, 7], [1, 17, 2, 33], [2, 64, 4, 16], [1, 49, 1, 8], [3, 100, 2, 32]];
    for (i, size) in sizes.into_iter().enumerate() {
        for (order, gain) in [(QkvOrder::Legacy, 1.0), (QkvOrder::New, 1.0), (QkvOrder::Legacy, 4.0)] {
            let (s, seed) = (attention_shape(size, order), 500 + i as u64);
            let what = format!("seed {seed}, gain {gain}, {s:?}");
            let qkv: Vec<f32> = uniform(s.n * s.s * 3 * s.c(), seed).iter().map(|x| x * gain).collect();
            let dout = uniform(s.n * s.s * s.c(), seed + 100);
            let plain = attention_outputs(None, &qkv, &dout, &s);
            // A score of at most gain²√d is off by d + 4 roundings, which is then the relative error of p; the
            // backward uses it with an lse and a delta that are off as much, and everything sums s tokens.
            let score = ((s.d + 4) as f32 * gain * gain * (s.d as f32).sqrt()) as usize + 4;
            for (isa, outs) in on_all(&what, |isa| attention_outputs(Some(isa), &qkv, &dout, &s)) {
                let name = |part: &str| format!("{part}, {isa:?}, {what}");
                assert_close(&outs[0], &plain[0], &largest(&plain[0]), s.s + 2 * score, &name("out"));
                assert_close(&outs[1], &plain[1], &vec![1.0; plain[1].len()], s.s + 2 * score, &name("lse"));
                assert_close(&outs[2], &plain[2], &largest(&plain[2]), 2 * s.s + 8 * score, &name("dqkv"));
            }
        }
    }
}

#[test]
fn plain_attention_closed_forms() {
    // Equal keys: the output is the mean of v and lse = score + log s. The orders agree on permuted channels.
    let s = attention_shape([1, 4, 1, 2], QkvOrder::Legacy);
    let qkv: Vec<f32> = (0..4).flat_map(|i| [1.0, 1.0, 0.5, 0.5, i as f32, 1.0]).collect();
    let outs = attention_outputs(None, &qkv, &[1.0; 8], &s);
    assert_close(&outs[0], &[1.5, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0], &[2.0; 8], 2, "mean of v");
    let lse = (1.0 / 2f64.sqrt() + 4f64.ln()) as f32;
    assert_close(&outs[1], &[lse; 4], &[lse; 4], 1, "lse");
    let [legacy, new] = [QkvOrder::Legacy, QkvOrder::New].map(|order| attention_shape([1, 5, 3, 2], order));
    let qkv = uniform(5 * 18, 3);
    let mut moved = nan(qkv.len());
    for (i, x) in qkv.iter().enumerate() {
        let (token, head, part, e) = (i / 18, i % 18 / 6, i % 6 / 2, i % 2);
        moved[token * 18 + part * 6 + head * 2 + e] = *x;
    }
    let dout = uniform(5 * 6, 4);
    let (a, b) = (attention_outputs(None, &qkv, &dout, &legacy), attention_outputs(None, &moved, &dout, &new));
    assert_eq!((&a[0], &a[1]), (&b[0], &b[1]));
}

#[test]
fn plain_attention_gradients() {
    for order in [QkvOrder::Legacy, QkvOrder::New] {
        let (s, seed) = (attention_shape([2, 5, 2, 3], order), 77);
        let (qkv, dout) = (uniform(s.n * s.s * 3 * s.c(), seed), uniform(s.n * s.s * s.c(), seed + 1));
        let dqkv = &attention_outputs(None, &qkv, &dout, &s)[2];
        let loss = |qkv: &[f32]| weighted(&attention_outputs(None, qkv, &dout, &s)[0], &dout);
        assert_gradient(dqkv, &qkv, loss, &format!("dqkv, seed {seed}, {order:?}"));
    }
}

/// Everything a group norm reads.
struct NormData {
    s: GroupNormShape,
    a: Vec<f32>,
    b: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    scale_shift: Option<Vec<f32>>,
    dy: Vec<f32>,
}

impl NormData {
    fn new(s: GroupNormShape, (mean, std): (f32, f32), scaled: bool, seed: u64) -> Self {
        let x = |channels: usize, seed| -> Vec<f32> {
            uniform(s.n * s.s * channels, seed).iter().map(|u| mean + std * 1.732 * u).collect()
        };
        NormData {
            s,
            a: x(s.ca, seed),
            b: x(s.cb, seed + 1),
            gamma: uniform(s.c(), seed + 2),
            beta: uniform(s.c(), seed + 3),
            scale_shift: scaled.then(|| uniform(s.n * (2 * s.c() + 3), seed + 4)),
            dy: uniform(s.n * s.s * s.c(), seed + 5),
        }
    }

    fn x(&self) -> Cat<'_> {
        Cat { a: &self.a, ca: self.s.ca, b: &self.b, cb: self.s.cb }
    }

    fn rows(&self) -> Option<Rows<'_>> {
        self.scale_shift.as_ref().map(|data| Rows { data, stride: 2 * self.s.c() + 3, col: 2 })
    }

    /// y, mean, rstd.
    fn forward(&self, isa: Option<Isa>) -> [Vec<f32>; 3] {
        let s = &self.s;
        let (mut y, mut mean, mut rstd) = (nan(self.dy.len()), nan(s.n * s.groups), nan(s.n * s.groups));
        let (x, gamma, beta, rows) = (self.x(), &self.gamma, &self.beta, self.rows());
        if let Some(isa) = isa {
            let mut scratch = nan(fast::group_norm::forward_scratch(s));
            fast::group_norm::forward(isa, &mut y, &mut mean, &mut rstd, x, gamma, beta, rows, s, &mut scratch);
        } else {
            group_norm::forward_cpu(&mut y, &mut mean, &mut rstd, x, gamma, beta, rows, s);
        }
        [y, mean, rstd]
    }

    /// dxa, dxb, dgamma, dbeta, dscale_shift; gamma and beta also serve as what is added to, x as what dxa adds.
    fn backward(&self, isa: Option<Isa>, mean: &[f32], rstd: &[f32], add: bool) -> [Vec<f32>; 5] {
        let (s, c) = (&self.s, self.s.c());
        let (mut dxa, mut dxb) = (nan(self.a.len()), nan(self.b.len()));
        let (mut dgamma, mut dbeta) = if add { (self.gamma.clone(), self.beta.clone()) } else { (nan(c), nan(c)) };
        let mut drows = nan(s.n * (2 * c + 1));
        let into = self.scale_shift.is_some().then(|| RowsMut { data: &mut drows, stride: 2 * c + 1, col: 1 });
        let (x, gamma, beta, rows, dy) = (self.x(), &self.gamma, &self.beta, self.rows(), &self.dy);
        let adds = (add.then_some(&self.a[..]), add.then_some(&self.b[..]));
        if let Some(isa) = isa {
            let mut scratch = nan(fast::group_norm::backward_scratch(s));
            fast::group_norm::backward(
                isa,
                &mut dxa,
                &mut dxb,
                &mut dgamma,
                &mut dbeta,
                into,
                dy,
                x,
                mean,
                rstd,
                gamma,
                beta,
                rows,
                adds.0,
                adds.1,
                add,
                s,
                &mut scratch,
            );
        } else {
            group_norm::backward_cpu(
                &mut dxa,
                &mut dxb,
                &mut dgamma,
                &mut dbeta,
                into,
                dy,
                x,
                mean,
                rstd,
                gamma,
                beta,
                rows,
                adds.0,
                adds.1,
                add,
                s,
            );
        }
        let rows = drows.chunks_exact(2 * c + 1).flat_map(|row| row[1..].to_vec());
        [dxa, dxb, dgamma, dbeta, if self.scale_shift.is_some() { rows.collect() } else { vec![] }]
    }
}

fn norm([n, s, ca, cb, groups]: [usize; 5], silu: bool, dropout: Option<Dropout>) -> GroupNormShape {
    GroupNormShape { n, s, ca, cb, groups, eps: 1e-5, silu, dropout }
}

fn dropout(p: f32) -> Option<Dropout> {
    Some(Dropout { p, seed: 0x1234_5678_9abc, step: 7, op: 3, first_image: 5 })
}

#[test]
fn fast_group_norm_equals_the_plain_one() {
    let sizes = [[1, 1, 32, 0, 32], [2, 30, 6, 0, 3], [3, 35, 20, 28, 16], [2, 64, 64, 32, 32], [2, 1024, 32, 0, 32]];
    for (i, size) in sizes.into_iter().enumerate() {
        for (j, moments) in [(0.0, 1.0), (-2.3, 0.5), (100.0, 0.01)].into_iter().enumerate() {
            let seed = 2000 + 100 * i as u64 + 10 * j as u64;
            let (scaled, silu) = (j != 1, j != 2);
            let s = norm(size, silu, if j == 0 { dropout(0.3) } else { None });
            let data = NormData::new(s, moments, scaled, seed);
            let what = format!("seed {seed}, mean and std {moments:?}, {s:?}");
            let [y, mean, rstd] = data.forward(None);
            let grads = data.backward(None, &mean, &rstd, j == 1);
            // Sums over s pixels and n images round once per term; what follows, SiLU with its exp included, some more.
            let terms = s.n * s.s + 64;
            let fast = on_all(&what, |isa| {
                let mut outs = data.forward(Some(isa)).to_vec();
                outs.extend(data.backward(Some(isa), &mean, &rstd, j == 1));
                outs
            });
            for (isa, outs) in fast {
                let name = |part: &str| format!("{part}, {isa:?}, {what}");
                assert_close(&outs[0], &y, &largest(&y), terms, &name("y"));
                assert_close(&outs[1], &mean, &largest(&data.a), 1, &name("mean"));
                assert_close(&outs[2], &rstd, &rstd, terms, &name("rstd"));
                // dx = rstd (k dz - means of it) may cancel; |k| <= 2, |dz| <= 1.1 |dy| / 0.7, |dy| <= 1.
                let slope = 4.0 * largest(&rstd)[0];
                for (k, part) in ["dxa", "dxb", "dgamma", "dbeta", "dscale_shift"].into_iter().enumerate() {
                    let size =
                        largest(&grads[k]).iter().map(|g| if k < 2 { g + slope } else { *g }).collect::<Vec<_>>();
                    assert_close(&outs[3 + k], &grads[k], &size, terms, &name(part));
                }
            }
        }
    }
}

#[test]
fn plain_group_norm_closed_forms() {
    // Group 0 holds 0 and 2 (mean 1, variance 1), group 1 is constant: it becomes beta.
    let s = norm([1, 2, 4, 0, 2], false, None);
    let x = [0.0, 2.0, 5.0, 5.0, 2.0, 0.0, 5.0, 5.0];
    let mut outs = [nan(8), nan(2), nan(2)];
    let [y, mean, rstd] = &mut outs;
    group_norm::forward_cpu(y, mean, rstd, Cat::single(&x, 4), &[1.0; 4], &[0.25; 4], None, &s);
    let r = (1.0 / (1.0 + f64::from(s.eps)).sqrt()) as f32;
    let want = [0.25 - r, 0.25 + r, 0.25, 0.25, 0.25 + r, 0.25 - r, 0.25, 0.25];
    assert_close(&outs[0], &want, &[1.0; 8], 1, "y");
    assert_eq!(outs[1], [1.0, 5.0]);
    // Dropout keeps what the generator says, at 1/(1 - p), about 1 - p of the time; SiLU(x) of x = beta.
    let s = norm([2, 500, 4, 0, 1], true, dropout(0.25));
    let mut y = nan(4000);
    let beta = [3.0; 4];
    group_norm::forward_cpu(
        &mut y,
        &mut [0.0; 2],
        &mut [0.0; 2],
        Cat::single(&vec![1.0; 4000], 4),
        &[1.0; 4],
        &beta,
        None,
        &s,
    );
    let silu = (3.0 / (1.0 + (-3f64).exp())) as f32;
    for (i, y) in y.iter().enumerate() {
        let word = philox([(i % 2000 / 4) as u32, 5 + (i / 2000) as u32, 7, 3], 0x1234_5678_9abc)[i % 4];
        let want = if word >= 1 << 30 { silu / 0.75 } else { 0.0 };
        assert!((y - want).abs() <= 4.0 * f32::EPSILON * want, "element {i} is {y}, not {want}");
    }
    let kept = y.iter().filter(|y| **y != 0.0).count();
    // 3,000 expected, standard deviation 27.
    assert!((2_880..3_120).contains(&kept), "{kept} of 4,000 kept");
}

#[test]
fn plain_group_norm_gradients() {
    for (i, (scaled, drop)) in [(false, None), (true, None), (true, dropout(0.3))].into_iter().enumerate() {
        let seed = 90 + 10 * i as u64;
        let data = NormData::new(norm([2, 6, 5, 4, 3], true, drop), (-2.3, 0.5), scaled, seed);
        let s = data.s;
        let [_, mean, rstd] = data.forward(None);
        let [dxa, dxb, dgamma, dbeta, drows] = data.backward(None, &mean, &rstd, false);
        let copy = || NormData { s, ..NormData::new(s, (-2.3, 0.5), scaled, seed) };
        let loss = |change: &dyn Fn(&mut NormData)| {
            let mut changed = copy();
            change(&mut changed);
            weighted(&changed.forward(None)[0], &changed.dy)
        };
        let name = |part: &str| format!("{part}, seed {seed}, {s:?}");
        assert_gradient(&dxa, &data.a, |x| loss(&|d| d.a = x.to_vec()), &name("dxa"));
        assert_gradient(&dxb, &data.b, |x| loss(&|d| d.b = x.to_vec()), &name("dxb"));
        assert_gradient(&dgamma, &data.gamma, |x| loss(&|d| d.gamma = x.to_vec()), &name("dgamma"));
        assert_gradient(&dbeta, &data.beta, |x| loss(&|d| d.beta = x.to_vec()), &name("dbeta"));
        if let Some(rows) = &data.scale_shift {
            // Only the columns 2..2 + 2c of each row are read.
            let (width, len) = (2 * s.c() + 3, 2 * s.c());
            let used: Vec<f32> =
                rows.chunks_exact(width).flat_map(|row| row[2..].to_vec()).take(s.n * (len + 1)).collect();
            let used: Vec<f32> = used.chunks_exact(len + 1).flat_map(|row| row[..len].to_vec()).collect();
            let put = |values: &[f32]| {
                let mut rows = rows.clone();
                for (row, values) in rows.chunks_exact_mut(width).zip(values.chunks_exact(len)) {
                    row[2..2 + len].copy_from_slice(values);
                }
                rows
            };
            assert_gradient(&drows, &used, |x| loss(&|d| d.scale_shift = Some(put(x))), &name("dscale_shift"));
        }
    }
}
