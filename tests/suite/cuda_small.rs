//! The element-wise kernels on a GPU or its emulation: embeddings, SiLU, sums, pooling and enlargement.
//!
//! Each tensor lies in an allocation of its own. Kernels that copy, or add in the order of the processor, are held to its bits, in bf16
//! to its result rounded once; SiLU to f64. Every case runs on several grids and under all schedules of the emulator for the
//! same bits.

use crate::cuda_ops::{gpu, normals, round, run, same_bits, traffic, write};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::{add, avg_pool, embedding, silu, timestep_embedding, upsample};

/// A plan of one step.
struct Case {
    g: Graph,
    half: bool,
    inputs: Vec<(Val, Vec<f32>)>,
    labels: Vec<(Val, Vec<i32>)>,
    outputs: Vec<Val>,
}

impl Case {
    fn new(half: bool) -> Self {
        Case { g: Graph::new(), half, inputs: Vec::new(), labels: Vec::new(), outputs: Vec::new() }
    }

    fn value(&mut self, shape: Shape, dtype: DType) -> Val {
        let region = Region::ALL[self.g.values.len()];
        self.g.at(&format!("{region:?}"), shape, dtype, region, 0)
    }

    fn dtype(&self) -> DType {
        if self.half { DType::Bf16 } else { DType::F32 }
    }

    /// An activation: its value and the numbers a kernel sees, far from 0.
    fn input(&mut self, shape: Shape) -> (Val, Vec<f32>) {
        let x: Vec<f32> = normals(shape.len(), self.inputs.len() as u32).iter().map(|x| 0.5 * x - 2.3).collect();
        let x = if self.half { round(&x) } else { x };
        let dtype = self.dtype();
        (self.given(shape, dtype, x.clone()), x)
    }

    fn given(&mut self, shape: Shape, dtype: DType, x: Vec<f32>) -> Val {
        let v = self.value(shape, dtype);
        self.inputs.push((v, x));
        v
    }

    fn labels(&mut self, labels: Vec<i32>) -> Val {
        let v = self.value(Shape::rows(labels.len(), 1), DType::I32);
        self.labels.push((v, labels));
        v
    }

    fn output(&mut self, shape: Shape) -> Val {
        let v = self.value(shape, self.dtype());
        self.outputs.push(v);
        v
    }

    /// An addend, if wanted.
    fn addend(&mut self, shape: Shape, wanted: bool) -> Option<(Val, Vec<f32>)> {
        wanted.then(|| self.input(shape))
    }

    fn write(&self, device: &mut Device, id: PlanId) {
        for &v in &self.outputs {
            write(device, id, v, &vec![f32::NAN; self.g.shape(v).len()]);
        }
        self.inputs.iter().for_each(|(v, x)| write(device, id, *v, x));
        self.labels.iter().for_each(|(v, x)| device.write(id, *v, x).unwrap());
    }

    /// The output of the one step, in every way to play it out.
    fn run(&self) -> Vec<f32> {
        same_bits(&self.g, &self.outputs, |d, id| self.write(d, id));
        let (device, id) = run(gpu(), &self.g, |d, id| self.write(d, id));
        crate::cuda_ops::read(&device, id, self.outputs[0])
    }

    /// The output is exactly `want`, rounded once in bf16.
    fn is(&self, want: &[f32], what: &str) {
        let want = if self.g[self.outputs[0]].dtype == DType::Bf16 { round(want) } else { want.to_vec() };
        let got = self.run();
        if let Some(i) = (0..want.len()).find(|&i| got[i].to_bits() != want[i].to_bits()) {
            panic!("{what}, half {}: element {i} of {}: {} is not {}", self.half, want.len(), got[i], want[i]);
        }
    }

    /// The output is `want` within `bound`, and half a unit in bf16.
    fn is_near(&self, want: &[(f64, f64)], what: &str) {
        for (i, (got, (want, bound))) in self.run().into_iter().zip(want).enumerate() {
            let bound = bound + if self.half { want.abs() / 256.0 } else { 0.0 };
            let off = (f64::from(got) - want).abs();
            assert!(
                off <= bound,
                "{what}, half {}: element {i}: {got} for {want}: off {off:e}, bound {bound:e}",
                self.half
            );
        }
    }
}

/// Both types, with and without an addend.
fn forms() -> impl Iterator<Item = (bool, bool)> {
    [false, true].into_iter().flat_map(|half| [(half, false), (half, true)])
}

/// One element, fewer than a vector, a vector and a tail, more than one block.
const LENGTHS: [usize; 5] = [1, 5, 8, 19, 2085];
/// Odd and even sizes, channels that are whole vectors and that are not.
const IMAGES: [[usize; 4]; 6] =
    [[1, 2, 2, 1], [2, 3, 5, 3], [3, 4, 4, 8], [1, 7, 2, 12], [2, 6, 6, 24], [1, 16, 16, 40]];

fn shape([n, h, w, c]: [usize; 4]) -> Shape {
    Shape::new(n, h, w, c)
}

#[test]
fn sums_are_those_of_the_processor() {
    for (n, half) in LENGTHS.into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let mut case = Case::new(half);
        let s = Shape::rows(1, n);
        let ((a, av), (b, bv)) = (case.input(s), case.input(s));
        let y = case.output(s);
        case.g.push(add::Add { y, a, b });
        let mut want = vec![0.0; n];
        add::forward_cpu(&mut want, &av, &bv);
        case.is(&want, &format!("add of {n}"));
    }
}

/// s(x) and its derivative times x in f64.
fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

/// expf is good to two units, 2.4e-7 of s; the quotient, the product and their roundings make 4e-7 of the result, and 1 - s adds
/// 1.2e-7 of x s to the gradient. Below -88.7 expf overflows and the result, under 3e-37, is 0.
#[test]
fn silu_follows_f64() {
    let extremes = [-200.0, -90.0, -30.0, -1e-3, 0.0, 1e-30, 30.0, 100.0];
    for n in LENGTHS {
        for (half, added) in forms() {
            let s = Shape::rows(1, n);
            let x: Vec<f32> = normals(n, 5)
                .iter()
                .zip(extremes.into_iter().cycle())
                .map(|(x, e)| if n > 5 { 3.0 * x + e } else { *x })
                .collect();
            let x = if half { round(&x) } else { x };
            let mut case = Case::new(half);
            let dtype = case.dtype();
            let v = case.given(s, dtype, x.clone());
            if !added {
                let y = case.output(s);
                case.g.push(silu::Silu { y, x: v });
                let want = |x: &f32| {
                    let y = f64::from(*x) * sigmoid(*x);
                    (y, 5e-7 * y.abs() + 1e-36)
                };
                case.is_near(&x.iter().map(want).collect::<Vec<_>>(), &format!("silu of {n}"));
                case = Case::new(half);
                case.given(s, dtype, x.clone());
            }
            let (dy, dyv) = case.input(s);
            let add = case.addend(s, added);
            let dx = case.output(s);
            case.g.push(silu::SiluBackward { dx, dy, x: v, add: add.as_ref().map(|a| a.0) });
            let want = |i: usize| {
                let (x, dy, s) = (f64::from(x[i]), f64::from(dyv[i]), sigmoid(x[i]));
                let more = add.as_ref().map_or(0.0, |a| f64::from(a.1[i]));
                let size = dy.abs() * s * (1.0 + x.abs()) + more.abs();
                (dy * s * (1.0 + x * (1.0 - s)) + more, 1e-6 * size + 1e-36)
            };
            case.is_near(&(0..n).map(want).collect::<Vec<_>>(), &format!("silu backward of {n}, addend {added}"));
        }
    }
}

#[test]
fn pooling_is_that_of_the_processor() {
    for (size, (half, added)) in IMAGES.into_iter().flat_map(|s| forms().map(move |f| (s, f))) {
        let (s, small) = (shape(size), shape([size[0], size[1] / 2, size[2] / 2, size[3]]));
        let mut case = Case::new(half);
        let (x, xv) = case.input(s);
        let y = case.output(small);
        case.g.push(avg_pool::AvgPool { y, x });
        let mut want = vec![0.0; small.len()];
        avg_pool::forward_cpu(&mut want, &xv, s);
        case.is(&want, &format!("avg_pool of {s}"));

        let mut case = Case::new(half);
        let (dy, dyv) = case.input(small);
        let more = case.addend(s, added);
        let dx = case.output(s);
        case.g.push(avg_pool::AvgPoolBackward { dx, dy, add: more.as_ref().map(|a| a.0) });
        let mut want = vec![0.0; s.len()];
        avg_pool::backward_cpu(&mut want, &dyv, more.as_ref().map(|a| &a.1[..]), s);
        case.is(&want, &format!("avg_pool backward of {s}"));
    }
}

#[test]
fn enlargement_is_that_of_the_processor() {
    for (size, (half, added)) in IMAGES.into_iter().flat_map(|s| forms().map(move |f| (s, f))) {
        let (s, large) = (shape(size), shape([size[0], size[1] * 2, size[2] * 2, size[3]]));
        let mut case = Case::new(half);
        let (x, xv) = case.input(s);
        let y = case.output(large);
        case.g.push(upsample::Upsample { y, x });
        let mut want = vec![0.0; large.len()];
        upsample::forward_cpu(&mut want, &xv, s);
        case.is(&want, &format!("upsample of {s}"));

        let mut case = Case::new(half);
        let (dy, dyv) = case.input(large);
        let more = case.addend(s, added);
        let dx = case.output(s);
        case.g.push(upsample::UpsampleBackward { dx, dy, add: more.as_ref().map(|a| a.0) });
        let mut want = vec![0.0; s.len()];
        upsample::backward_cpu(&mut want, &dyv, more.as_ref().map(|a| &a.1[..]), s);
        case.is(&want, &format!("upsample backward of {s}"));
    }
}

#[test]
fn class_embeddings_are_those_of_the_processor() {
    // Images, classes, columns; the labels leave a class without an image and repeat others.
    for [n, classes, c] in [[1, 1, 1], [5, 3, 7], [9, 4, 16], [40, 10, 264]] {
        for (half, accumulate) in forms() {
            let labels: Vec<i32> = (0..n).map(|i| (i * i % classes) as i32).collect();
            let table: Vec<f32> = normals(classes * c, 8);
            let mut case = Case::new(half);
            let (x, xv) = case.input(Shape::rows(n, c));
            let (t, l) = (case.given(Shape::rows(classes, c), DType::F32, table.clone()), case.labels(labels.clone()));
            let y = case.output(Shape::rows(n, c));
            case.g.push(embedding::Embedding { y, x, table: t, labels: l });
            let mut want = vec![0.0; n * c];
            embedding::forward_cpu(&mut want, &xv, &table, &labels);
            case.is(&want, &format!("embedding of {n} x {c}"));

            let mut case = Case::new(half);
            let (dy, dyv) = case.input(Shape::rows(n, c));
            let l = case.labels(labels.clone());
            let before = if accumulate { table } else { vec![f32::NAN; classes * c] };
            let dtable = case.given(Shape::rows(classes, c), DType::F32, before.clone());
            case.outputs = vec![dtable];
            case.g.push(embedding::EmbeddingBackward { dtable, dy, labels: l, accumulate });
            let mut want = before;
            embedding::backward_cpu(&mut want, &dyv, &labels, accumulate);
            case.is(&want, &format!("embedding backward of {n} x {c} into {classes}"));
        }
    }
}

#[test]
fn timestep_embeddings_are_those_of_the_processor() {
    let times = [0.0, 1.0, 0.25, 999.0, 3999.0, 17.5];
    for (n, dim) in [(1, 1), (1, 2), (3, 7), (6, 32), (5, 129)] {
        for half in [false, true] {
            let mut case = Case::new(half);
            let t = case.given(Shape::rows(n, 1), DType::F32, times[..n].to_vec());
            let y = case.output(Shape::rows(n, dim));
            case.g.push(timestep_embedding::TimestepEmbedding { y, t, max_period: 10_000.0 });
            let mut want = vec![0.0; n * dim];
            timestep_embedding::forward_cpu(&mut want, &times[..n], 10_000.0);
            case.is(&want, &format!("timestep_embedding of {n} x {dim}"));
        }
    }
}

/// Real sizes: what is moved is what is declared.
#[test]
fn element_wise_kernels_move_what_they_declare() {
    for half in [false, true] {
        let (s, small, large) = (Shape::new(2, 16, 16, 64), Shape::new(2, 8, 8, 64), Shape::new(2, 32, 32, 64));
        let meter = |build: &dyn Fn(&mut Case)| {
            let mut case = Case::new(half);
            build(&mut case);
            traffic(&case.g, |d, id| case.write(d, id));
        };
        meter(&|c| {
            let (a, b, y) = (c.input(s).0, c.input(s).0, c.output(s));
            c.g.push(add::Add { y, a, b });
        });
        meter(&|c| {
            let (x, y) = (c.input(s).0, c.output(s));
            c.g.push(silu::Silu { y, x });
        });
        meter(&|c| {
            let (dy, x, add, dx) = (c.input(s).0, c.input(s).0, Some(c.input(s).0), c.output(s));
            c.g.push(silu::SiluBackward { dx, dy, x, add });
        });
        meter(&|c| {
            let (x, y) = (c.input(s).0, c.output(small));
            c.g.push(avg_pool::AvgPool { y, x });
        });
        meter(&|c| {
            let (dy, add, dx) = (c.input(small).0, Some(c.input(s).0), c.output(s));
            c.g.push(avg_pool::AvgPoolBackward { dx, dy, add });
        });
        meter(&|c| {
            let (x, y) = (c.input(s).0, c.output(large));
            c.g.push(upsample::Upsample { y, x });
        });
        meter(&|c| {
            let (dy, add, dx) = (c.input(large).0, Some(c.input(s).0), c.output(s));
            c.g.push(upsample::UpsampleBackward { dx, dy, add });
        });
        let labels: Vec<i32> = (0..64).map(|i| i * 7 % 10).collect();
        meter(&|c| {
            let (x, y) = (c.input(Shape::rows(64, 512)).0, c.output(Shape::rows(64, 512)));
            let (table, labels) =
                (c.given(Shape::rows(10, 512), DType::F32, normals(5120, 1)), c.labels(labels.clone()));
            c.g.push(embedding::Embedding { y, x, table, labels });
        });
        meter(&|c| {
            let (dy, labels) = (c.input(Shape::rows(64, 512)).0, c.labels(labels.clone()));
            let dtable = c.given(Shape::rows(10, 512), DType::F32, normals(5120, 1));
            c.g.push(embedding::EmbeddingBackward { dtable, dy, labels, accumulate: true });
        });
    }
}

#[test]
fn mixed_types_are_refused_by_name() {
    let mut g = Graph::new();
    g.scope("head");
    let x = g.fixed("x", Shape::rows(4, 4), DType::F32, Region::Inputs);
    let y = g.fixed("y", Shape::rows(4, 4), DType::Bf16, Region::State);
    g.push(silu::Silu { x, y });
    let message = gpu().bind(Plan::new(g, true)).unwrap_err().to_string();
    for part in ["Silu", "head", "silu: no kernel for x of type F32 beside Bf16", "--device cpu"] {
        assert!(message.contains(part), "{message}");
    }
}
