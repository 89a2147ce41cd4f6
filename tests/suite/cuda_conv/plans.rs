//! The ops in recorded plans: a chain with every option and its gradients on the CPU and on CUDA; what is refused.

use super::{rounded, uniform};
use crate::device::gpu;
use half::bf16;
use iddpm::autograd;
use iddpm::device::{Device, Plan};
use iddpm::graph::{DType, Graph, Region, Shape, Source, Val};
use iddpm::ops::conv2d::{Conv2d, ConvOptions};
use iddpm::ops::linear::Linear;

/// A plan, the data of its inputs, and the values to compare.
struct Chain {
    g: Graph,
    data: Vec<(Val, Vec<f32>)>,
    params: usize,
    watched: Vec<Val>,
}

impl Chain {
    fn new(half: bool) -> Self {
        let mut g = Graph::new();
        g.half = half;
        Chain { g, data: Vec::new(), params: 0, watched: Vec::new() }
    }

    fn input(&mut self, name: &str, shape: Shape) -> Val {
        let dtype = if self.g.half { DType::Bf16 } else { DType::F32 };
        let v = self.g.fixed(name, shape, dtype, Region::Inputs);
        self.data.push((v, rounded(&uniform(shape.len(), self.data.len() as u64))));
        v
    }

    fn param(&mut self, name: &str, shape: Shape) -> Val {
        let v = self.g.at(name, shape, DType::F32, Region::Params, 4 * self.params);
        self.params = (self.params + shape.len()).next_multiple_of(16);
        v
    }

    fn watch(&mut self, v: Val) {
        self.g.keep(v);
        self.watched.push(v);
    }

    /// Values of the watched and all parameter gradients after a run.
    fn run(&self, mut d: Device) -> Vec<Vec<f32>> {
        let id = d.bind(Plan::new(self.g.clone(), true)).unwrap();
        let params = self.g.region_bytes(Region::Params) / 4;
        d.write_region(Region::Params, &uniform(params, 99)).unwrap();
        for (v, data) in &self.data {
            if self.g[*v].dtype == DType::Bf16 {
                d.write(id, *v, &data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()).unwrap();
            } else {
                d.write(id, *v, data).unwrap();
            }
        }
        d.run(id).unwrap();
        let mut out: Vec<Vec<f32>> = self.watched.iter().map(|&v| self.read(&d, id, v)).collect();
        let mut grads = vec![0f32; params];
        d.read_region(Region::Grads, &mut grads).unwrap();
        out.push(grads);
        out
    }

    fn read(&self, d: &Device, id: iddpm::device::PlanId, v: Val) -> Vec<f32> {
        let len = self.g.shape(v).len();
        if self.g[v].dtype == DType::Bf16 {
            let mut out = vec![bf16::ZERO; len];
            d.read(id, v, &mut out).unwrap();
            return out.iter().map(|x| x.to_f32()).collect();
        }
        let mut out = vec![0f32; len];
        d.read(id, v, &mut out).unwrap();
        out
    }
}

/// Two images through a convolution of two sources, down, up, and a 1x1 with residual; a linear layer's columns shift two of them.
fn chain(half: bool) -> Chain {
    let mut c = Chain::new(half);
    let (a, b) = (c.input("a", Shape::new(2, 6, 6, 16)), c.input("b", Shape::new(2, 6, 6, 8)));
    let e = c.input("e", Shape::rows(2, 24));
    let conv = |c: &mut Chain, name: &str, o: usize, k: usize, i: usize| {
        (c.param(name, Shape::new(o, k, k, i)), Some(c.param(&format!("{name}.bias"), Shape::rows(1, o))))
    };
    let (w, bias) = (c.param("linear", Shape::rows(32, 24)), c.param("linear.bias", Shape::rows(1, 32)));
    let [(w0, b0), (w1, b1), (w2, b2), (w3, b3)] =
        [("in", 16, 3, 24), ("down", 24, 3, 16), ("up", 16, 3, 24), ("out", 16, 1, 16)]
            .map(|(n, o, k, i)| conv(&mut c, n, o, k, i));
    let g = &mut c.g;
    let rows = Linear::record(g, e, w, bias);
    let x = Source { a, b: Some(b) };
    let h = Conv2d::record(g, x, w0, b0, ConvOptions { shift: Some((rows, 16)), ..ConvOptions::default() });
    let d = Conv2d::record(g, h.into(), w1, b1, ConvOptions { downsample: true, ..ConvOptions::default() });
    let u = ConvOptions { upsample: true, shift: Some((rows, 0)), ..ConvOptions::default() };
    let u = Conv2d::record(g, d.into(), w2, b2, u);
    let y = Conv2d::record(g, u.into(), w3, b3, ConvOptions { residual: Some(h), ..ConvOptions::default() });
    let end = c.g.steps.len();
    let dy = c.input("dy", Shape::new(2, 6, 6, 16));
    let grads = autograd::backward(&mut c.g, 0..end, y, dy, &[a, b, e]);
    c.watch(y);
    grads.into_iter().flatten().for_each(|v| c.watch(v));
    assert_eq!(c.watched.len(), 4, "y and three gradients");
    c
}

/// Root mean square of the difference, relative to that of `want`.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w))) / norm(&mut want.iter().map(|&w| f64::from(w)))
}

#[test]
fn a_chain_and_its_gradients_follow_the_processor() {
    let cpu = chain(false).run(Device::cpu(1).unwrap());
    // f32: sums of at most 400 products rounded in another order. bf16: 2^-8 for each of the nine rounded tensors on the longest
    // path, weights and activations, as a plain bf16 implementation has it; errors of the elements are independent.
    for (half, bound) in [(false, 1e-5), (true, 9f64.sqrt() / 256.0)] {
        let got = chain(half).run(gpu());
        for (i, (got, want)) in got.iter().zip(&cpu).enumerate() {
            let off = distance(got, want);
            assert!(off <= bound, "half {half}, value {i}: relative difference {off:e}, bound {bound:e}");
        }
    }
}

/// (rows, columns in, columns out).
#[test]
fn linear_layers_follow_the_processor() {
    for (n, c, oc) in [(1, 1, 1), (3, 7, 5), (2, 64, 200), (130, 40, 72), (33, 128, 6)] {
        let build = |half| {
            let mut l = Chain::new(half);
            let x = l.input("x", Shape::rows(n, c));
            let (w, b) = (l.param("w", Shape::rows(oc, c)), l.param("b", Shape::rows(1, oc)));
            let y = Linear::record(&mut l.g, x, w, b);
            let dy = l.input("dy", Shape::rows(n, oc));
            let dx = autograd::backward(&mut l.g, 0..1, y, dy, &[x])[0].unwrap();
            l.watch(y);
            l.watch(dx);
            l
        };
        let cpu = build(false).run(Device::cpu(1).unwrap());
        // One product of rounded factors and a rounded result: three roundings of 2^-8, the inputs being rounded already: two.
        for (half, bound) in [(false, 1e-6 * (4 + c.max(oc).max(n)) as f64), (true, 2.0 / 256.0)] {
            let got = build(half).run(gpu());
            for (i, (got, want)) in got.iter().zip(&cpu).enumerate() {
                let off = distance(got, want);
                assert!(off <= bound, "{n}x{c} to {oc}, half {half}, value {i}: {off:e}, bound {bound:e}");
            }
        }
    }
}

#[test]
fn what_no_kernel_covers_is_refused_by_name() {
    let refused = |x_type: DType, w_type: DType| {
        let mut g = Graph::new();
        let x = g.fixed("x", Shape::new(1, 4, 5, 8), x_type, Region::Inputs);
        let w = g.fixed("w", Shape::new(16, 3, 3, 8), w_type, Region::Inputs);
        Conv2d::record(&mut g, x.into(), w, None, ConvOptions::default());
        gpu().bind(Plan::new(g, true)).unwrap_err().to_string()
    };
    for (x, w) in [(DType::Bf16, DType::F32), (DType::F32, DType::Bf16), (DType::U8, DType::F32)] {
        let message = refused(x, w);
        for part in ["conv2d", "h: 4, w: 5", "oc: 16", "--device cpu"] {
            assert!(message.contains(part), "{x:?} {w:?}: {message}");
        }
    }
    let mut g = Graph::new();
    let x = g.fixed("x", Shape::rows(3, 1 << 31), DType::F32, Region::Inputs);
    let w = g.fixed("w", Shape::rows(1, 1 << 31), DType::F32, Region::Inputs);
    let b = g.fixed("b", Shape::rows(1, 1), DType::F32, Region::Inputs);
    Linear::record(&mut g, x, w, b);
    let message = gpu().bind(Plan::new(g, true)).unwrap_err().to_string();
    assert!(message.contains("linear") && message.contains("2147483648"), "{message}");
}
