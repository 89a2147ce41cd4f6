//! Convolutions and the norm of their results: statistics from the epilogue, and the same from the norm's own kernel.

use super::{largest, uniform};
use crate::cuda_ops::{gpu, metered, read, round, same_bits, write};
use iddpm::config::Precision;
use iddpm::device::{Device, Plan, PlanId};
use iddpm::graph::{DType, Graph, Region, Shape, Source, Target, Val};
use iddpm::ops::conv2d::{Conv2d, ConvOptions};
use iddpm::ops::group_norm::{GroupNorm, NormOptions};
use iddpm::ops::{Op, Operation};

/// Two convolutions of an input, and the norm of both results side by side.
struct Chain {
    g: Graph,
    data: Vec<(Val, Vec<f32>)>,
    results: Vec<Val>,
}

impl Chain {
    /// `hw`: of the result; `mean`: the bias of the first convolution; `kind`: stride 2, upsampling, or 0.
    fn new(g: Graph, n: usize, [h, w]: [usize; 2], [ca, cb]: [usize; 2], kind: usize, mean: f32) -> Self {
        let mut c = Chain { g, data: Vec::new(), results: Vec::new() };
        let act = if c.g.half { DType::Bf16 } else { DType::F32 };
        let options = ConvOptions { downsample: kind == 1, upsample: kind == 2, ..ConvOptions::default() };
        let (h, w) = [(h, w), (2 * h, 2 * w), (h / 2, w / 2)][kind];
        let x = c.input("x", Shape::new(n, h, w, 8), act, 1.0, 0.0);
        let y = [ca, cb].map(|oc| {
            let weights = c.input("w", Shape::new(oc, 3, 3, 8), act, 0.2, 0.0);
            let bias = c.input("b", Shape::rows(1, oc), DType::F32, 1.0, mean);
            Conv2d::record(&mut c.g, x.into(), weights, Some(bias), options)
        });
        let gamma = c.input("gamma", Shape::rows(1, ca + cb), DType::F32, 1.0, 0.5);
        let beta = c.input("beta", Shape::rows(1, ca + cb), DType::F32, 1.0, 0.0);
        let x = Source { a: y[0], b: Some(y[1]) };
        let options = NormOptions { silu: true, ..NormOptions::default() };
        let out = GroupNorm::record(&mut c.g, x, gamma, beta, options);
        let Some(Op::GroupNorm(norm)) = c.g.steps.last().map(|s| s.op.clone()) else {
            panic!("the last step is the norm")
        };
        c.results = vec![out, norm.mean, norm.rstd];
        c.results.clone().into_iter().for_each(|v| c.g.keep(v));
        c
    }

    fn input(&mut self, name: &str, shape: Shape, dtype: DType, size: f32, mean: f32) -> Val {
        let v = self.g.fixed(name, shape, dtype, Region::Inputs);
        let values: Vec<f32> = uniform(shape.len(), self.data.len() as u64).iter().map(|u| size * u + mean).collect();
        self.data.push((v, if dtype == DType::Bf16 { round(&values) } else { values }));
        v
    }

    fn write(&self, d: &mut Device, id: PlanId) {
        self.data.iter().for_each(|(v, values)| write(d, id, *v, values));
    }

    fn run(&self, mut d: Device) -> Vec<Vec<f32>> {
        let id = d.bind(Plan::new(self.g.clone(), true)).unwrap();
        self.write(&mut d, id);
        d.run(id).unwrap();
        self.results.iter().map(|&v| read(&d, id, v)).collect()
    }

    /// The values that convolutions leave for the norm.
    fn sums(&self) -> Vec<Val> {
        let conv = |op: &Op| if let Op::Conv2d(conv) = op { conv.sums } else { None };
        self.g.steps.iter().filter_map(|s| conv(&s.op)).collect()
    }
}

fn on_cuda(half: bool) -> Graph {
    Graph::on(Target::Cuda(if half { Precision::Bf16 } else { Precision::F32 }))
}

fn plain(half: bool) -> Graph {
    let mut g = Graph::new();
    g.half = half;
    g
}

/// Statistics in parts of 32 or of 128 rows are rounded differently, by 1e-6 of what they are; an element of y in bf16 may then
/// round to its neighbour, 2^-7 of it away.
#[test]
fn sums_from_the_epilogue_change_nothing_but_roundings() {
    let kinds = [(0, 0.0), (0, 100.0), (1, 0.0), (2, -2.3)];
    let sizes = [(3, [4, 4], [64, 32], &kinds[..]), (5, [8, 8], [32, 64], &kinds), (2, [6, 10], [20, 12], &kinds[2..])];
    for (n, hw, channels, kinds) in
        sizes.into_iter().chain([(1, [33, 33], [33, 31], &kinds[..1]), (3, [1, 1], [64, 64], &kinds[..1])])
    {
        for &(kind, mean) in kinds {
            for half in [false, true] {
                let with = Chain::new(on_cuda(half), n, hw, channels, kind, mean);
                let without = Chain::new(plain(half), n, hw, channels, kind, mean);
                assert_eq!((with.sums().len(), without.sums().len()), (2, 0), "sums recorded");
                let (got, want) = (with.run(gpu()), without.run(gpu()));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let rounding = if half && i == 0 { 1.0 / 128.0 } else { 0.0 };
                    for (got, want_one) in got.iter().zip(want) {
                        let bound = rounding * want_one.abs() + 1e-5 * largest(want);
                        let off = (got - want_one).abs();
                        assert!(
                            off <= bound,
                            "{n}x{hw:?}x{channels:?} {kind} {mean} {half}, {i}: {got} for {want_one}"
                        );
                    }
                }
            }
        }
    }
}

/// The processor runs the same list, and fills the sums that it does not need.
#[test]
fn the_processor_runs_the_same_list() {
    for (hw, kind) in [([8, 8], 0), ([7, 5], 1), ([6, 10], 2)] {
        let mut on_cpu = Graph::new();
        on_cpu.epilogue_sums = true;
        let [got, want] = [(on_cuda(false), gpu()), (on_cpu, Device::cpu(1).unwrap())].map(|(g, device)| {
            let mut c = Chain::new(g, 3, hw, [40, 24], kind, 3.0);
            c.results.extend(c.sums());
            c.sums().into_iter().for_each(|v| c.g.keep(v));
            assert_eq!(c.results.len(), 5, "y, its statistics and the sums of two convolutions");
            c.run(device)
        });
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // Sums of 72 products, in f32 on both.
            let bound = 1e-5 * largest(want);
            assert!(
                got.iter().zip(want).all(|(g, w)| (g - w).abs() <= bound),
                "{hw:?} {kind}, value {i}, bound {bound:e}"
            );
        }
    }
}

#[test]
fn bits_do_not_depend_on_grid_or_schedule() {
    for half in [false, true] {
        let c = Chain::new(on_cuda(half), 2, [6, 7], [40, 24], 0, 1.0);
        same_bits(&c.g, &c.results, |d, id| c.write(d, id));
    }
}

/// With the sums at hand x is read once, and the sums are an eighth of a bf16 tensor.
#[test]
fn the_norm_reads_its_input_once() {
    let c = Chain::new(on_cuda(true), 16, [32, 32], [96, 32], 0, 0.0);
    let (launches, _) = metered(&c.g, |d, id| c.write(d, id));
    let names: Vec<_> = launches.iter().map(|l| l.kernel.as_str()).filter(|k| k.contains("norm")).collect();
    assert_eq!(names, ["group_norm_apply_bf16"]);
    let cost = c.g.steps.last().unwrap().op.cost(&c.g);
    let (declared, moved) = (cost.read + cost.written, launches.last().unwrap().traffic.bytes() as f64);
    println!("group_norm_apply_bf16: declared {declared}, moved {moved} ({:.3})", moved / declared);
    assert!(moved <= 1.15 * declared, "{moved} bytes moved, {declared} declared");
}
