//! Convolution in all its forms.

use super::{abs, assert_close, assert_gradient, nan, on_all, uniform, weighted};
use iddpm::ops::conv2d::{self, ConvShape};
use iddpm::ops::fast::{self, Isa};
use iddpm::ops::view::{Cat, Rows, RowsMut};

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
        let mut scratch = nan(fast::conv2d::backward_weight_scratch(s));
        match isa {
            None => conv2d::backward_weight_cpu(&mut dw, Some(&mut db), rows, &self.dy, self.x(), accumulate, s),
            Some(isa) => fast::conv2d::backward_weight(
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
    ConvShape { n, h, w, ca, cb, oc, k, stride, upsample, pad: k / 2 }
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
        half(2, [16, 16], [32, 0, 64]),
    ]);
    for (n, hw) in [(1, [2, 2]), (2, [6, 4]), (3, [2, 8])] {
        shapes.extend(channels.map(|c| half(n, hw, c)));
    }
    shapes
}

/// Halved with the padding behind the image alone.
fn half(n: usize, hw: [usize; 2], channels: [usize; 3]) -> ConvShape {
    ConvShape { pad: 0, ..conv(n, hw, channels, 3, 2, false) }
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
    assert_eq!(count(half(1, [4, 4], [1, 0, 1])), [9., 6., 6., 4.]);
    assert_eq!(count(conv(1, [1, 2], [1, 0, 1], 3, 1, true)), [4., 6., 6., 4., 4., 6., 6., 4.]);
}

#[test]
fn plain_convolution_gradients() {
    let kinds = [(1, 1, false), (3, 1, false), (3, 2, false), (3, 1, true)];
    let shapes = kinds.map(|(k, stride, up)| conv(2, [5, 6], [3, 2, 4], k, stride, up));
    for (seed, s) in shapes.into_iter().chain([half(2, [4, 6], [3, 2, 4])]).enumerate() {
        let seed = 7 + 10 * seed as u64;
        let data = ConvData::new(s, seed);
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
