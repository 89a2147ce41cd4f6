//! Group norm on a GPU or its emulation against the plain loops in f64: forward, backward, dropout, two sources, parts of every size.
//!
//! f32 kernels sum in f32 (the statistics of groups in f64) and take `exp` as the fast one does: 1e-5 of the largest element of a
//! result bounds both. bf16 kernels are given what the plain loops see rounded, compute the same in f32 and round each result
//! once: 2^-8 of the element more. Gradients of the input may cancel: there the size is that of the terms, |rstd| times the largest.

use crate::cuda_ops::{CONTROL, gpu, graph, metered, read, round, same_bits, write};
use iddpm::device::PlanId;
use iddpm::device::{Device, Plan};
use iddpm::graph::{DType, Graph, Region, Shape, Source, Val};
use iddpm::ops::group_norm::{self, Dropout, DropoutStep, GroupNorm, GroupNormBackward, GroupNormShape};
use iddpm::ops::view::{Cat, Rows, RowsMut};
use iddpm::rng::philox;

mod chain;
mod recompute;
mod traffic;

/// Uniform values in [-1, 1).
fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    (0..len).map(|i| f64::from(word(i)).mul_add(1.0 / 2_147_483_648.0, -1.0) as f32).collect()
}

/// A norm and what surrounds it.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    hw: [usize; 2],
    channels: [usize; 2],
    groups: usize,
    half: bool,
    silu: bool,
    scaled: bool,
    dropout: Option<f32>,
    /// Gradients from elsewhere are added, and those of the parameters accumulated.
    add: bool,
    mean: f32,
    std: f32,
}

const PLAIN: Case = Case {
    n: 2,
    hw: [4, 4],
    channels: [64, 0],
    groups: 32,
    half: false,
    silu: true,
    scaled: false,
    dropout: None,
    add: false,
    mean: 0.0,
    std: 1.0,
};

const FIRST_IMAGE: u32 = 5;
const OP: u32 = 300;

impl Case {
    fn c(&self) -> usize {
        self.channels[0] + self.channels[1]
    }

    fn s(&self) -> usize {
        self.hw[0] * self.hw[1]
    }

    /// Columns of the matrix of scale and shift.
    fn columns(&self) -> usize {
        2 * self.c() + 5
    }

    fn shape(&self) -> GroupNormShape {
        let [ca, cb] = self.channels;
        let p = self.dropout;
        let dropout =
            p.map(|p| Dropout { p, seed: CONTROL.seed, step: CONTROL.step, op: OP, first_image: FIRST_IMAGE });
        GroupNormShape { n: self.n, s: self.s(), ca, cb, groups: self.groups, eps: 1e-5, silu: self.silu, dropout }
    }
}

/// A case as a plan, the data of its inputs, and its results.
struct Recorded {
    case: Case,
    g: Graph,
    x: Source,
    norm: GroupNorm,
    backward: GroupNormBackward,
    data: Vec<(Val, Vec<f32>)>,
}

impl Recorded {
    fn new(case: Case) -> Self {
        let mut g = graph(case.half);
        let mut data = Vec::new();
        let act = if case.half { DType::Bf16 } else { DType::F32 };
        let mut input = |g: &mut Graph, name: &str, shape: Shape, dtype, values: Vec<f32>| {
            let v = g.fixed(name, shape, dtype, Region::Inputs);
            data.push((v, if dtype == DType::Bf16 { round(&values) } else { values }));
            v
        };
        let ([h, w], c, image) = (case.hw, case.c(), |c| Shape::new(case.n, case.hw[0], case.hw[1], c));
        let [a, b] = [0, 1].map(|i| {
            let shape = image(case.channels[i]);
            let values = uniform(shape.len(), 7 + i as u64).iter().map(|u| case.mean + case.std * 1.732 * u).collect();
            (shape.c > 0).then(|| input(&mut g, "x", shape, act, values))
        });
        let x = Source { a: a.unwrap(), b };
        let mut vector = |g: &mut Graph, name, seed| {
            let values = uniform(c, seed).iter().map(|u| 0.5 + u).collect();
            input(g, name, Shape::rows(1, c), DType::F32, values)
        };
        let (gamma, beta) = (vector(&mut g, "gamma", 11), vector(&mut g, "beta", 12));
        let (dgamma, dbeta) = (vector(&mut g, "dgamma", 13), vector(&mut g, "dbeta", 14));
        let rows = Shape::rows(case.n, case.columns());
        let scale_shift = case.scaled.then(|| (input(&mut g, "scale_shift", rows, act, uniform(rows.len(), 15)), 2));
        let dy = input(&mut g, "dy", Shape::new(case.n, h, w, c), act, uniform(case.n * h * w * c, 16));
        let add = [a, b].map(|v| {
            let shape = v.map(|v| g.shape(v)).filter(|_| case.add)?;
            Some(input(&mut g, "add", shape, act, uniform(shape.len(), 17)))
        });
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let dropout = case.dropout.map(|p| DropoutStep { p, op: OP, first_image: FIRST_IMAGE, control });
        let stat = Shape::rows(case.n, case.groups);
        let norm = GroupNorm {
            y: g.shaped_like("y", x.a, image(c)),
            mean: g.arena("mean", stat),
            rstd: g.arena("rstd", stat),
            x,
            sums: [None; 2],
            gamma,
            beta,
            scale_shift,
            dropout,
            shape: GroupNormShape { dropout: None, ..case.shape() },
        };
        let dx = Source { a: g.like("dxa", x.a), b: x.b.map(|b| g.like("dxb", b)) };
        let dscale_shift = scale_shift.map(|(v, _)| (g.like("dscale_shift", v), 3));
        let forward = norm.clone();
        let backward = GroupNormBackward { dx, dgamma, dbeta, dscale_shift, dy, add, accumulate: case.add, forward };
        g.push(norm.clone());
        g.push(backward.clone());
        let mut r = Recorded { case, g, x, norm, backward, data };
        r.results().into_iter().for_each(|v| r.g.keep(v));
        r
    }

    /// y, mean, rstd, dgamma, dbeta, dxa, dxb, the matrix of dscale and dshift; those that are there.
    fn results(&self) -> Vec<Val> {
        let b = &self.backward;
        let rows = b.dscale_shift.map(|(v, _)| v);
        let first = [self.norm.y, self.norm.mean, self.norm.rstd, b.dgamma, b.dbeta];
        first.into_iter().chain(b.dx.vals()).chain(rows).collect()
    }

    fn write(&self, d: &mut Device, id: PlanId) {
        for (v, values) in &self.data {
            write(d, id, *v, values);
        }
        let old = [self.backward.dgamma, self.backward.dbeta];
        for v in self.results().into_iter().filter(|v| !(self.case.add && old.contains(v))) {
            write(d, id, v, &vec![f32::NAN; self.g.shape(v).len()]);
        }
        if let Some(dropout) = self.norm.dropout {
            d.write(id, dropout.control, &[CONTROL]).unwrap();
        }
    }

    fn run(&self) -> Vec<Vec<f32>> {
        let mut d = gpu();
        let id = d.bind(Plan::new(self.g.clone(), true)).unwrap();
        self.write(&mut d, id);
        d.run(id).unwrap();
        self.results().into_iter().map(|v| read(&d, id, v)).collect()
    }

    fn values(&self, v: Val) -> &[f32] {
        &self.data.iter().find(|(input, _)| *input == v).expect("an input").1
    }

    /// The results by the plain loops, in the order of `results`; dscale and dshift without the columns around them.
    fn plain(&self) -> Vec<Vec<f32>> {
        let (s, b, c) = (self.case.shape(), &self.backward, self.case.c());
        let (gamma, beta) = (self.values(self.norm.gamma), self.values(self.norm.beta));
        let part = |v: Option<Val>| v.map_or(&[][..], |v| self.values(v));
        let x = Cat { a: part(Some(self.x.a)), ca: s.ca, b: part(self.x.b), cb: s.cb };
        let rows =
            self.norm.scale_shift.map(|(v, col)| Rows { data: self.values(v), stride: self.case.columns(), col });
        let (mut y, mut mean, mut rstd) =
            (vec![0.0; s.n * s.s * c], vec![0.0; s.n * s.groups], vec![0.0; s.n * s.groups]);
        group_norm::forward_cpu(&mut y, &mut mean, &mut rstd, x, gamma, beta, rows, &s);
        let (mut dxa, mut dxb) = (vec![0.0; x.a.len()], vec![0.0; x.b.len()]);
        let (mut dg, mut db) = (self.values(b.dgamma).to_vec(), self.values(b.dbeta).to_vec());
        let mut drows = vec![0.0; s.n * 2 * c];
        let into = rows.is_some().then(|| RowsMut { data: &mut drows, stride: 2 * c, col: 0 });
        let [add_a, add_b] = b.add.map(|v| v.map(|v| self.values(v)));
        let (dy, acc) = (self.values(b.dy), self.case.add);
        group_norm::backward_cpu(
            &mut dxa, &mut dxb, &mut dg, &mut db, into, dy, x, &mean, &rstd, gamma, beta, rows, add_a, add_b, acc, &s,
        );
        let mut all = vec![y, mean, rstd, dg, db, dxa];
        all.extend(self.x.b.map(|_| dxb));
        all.extend(rows.map(|_| drows));
        all
    }
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

fn check(case: Case) {
    let r = Recorded::new(case);
    let (got, want) = (r.run(), r.plain());
    let slope = 4.0 * largest(&want[2]);
    for (i, v) in r.results().into_iter().enumerate() {
        let value = &r.g[v];
        let got = if value.name == "dscale_shift" {
            let rows = got[i].chunks_exact(case.columns());
            rows.flat_map(|row| row[3..3 + 2 * case.c()].to_vec()).collect()
        } else {
            got[i].clone()
        };
        let rounding = if value.dtype == DType::Bf16 { 1.0 / 256.0 } else { 0.0 };
        let size = match value.name.as_str() {
            "mean" => case.mean.abs() + case.std,
            "dxa" | "dxb" => slope + largest(&want[i]),
            _ => largest(&want[i]),
        };
        assert_eq!(got.len(), want[i].len(), "{} of {case:?}", value.name);
        for (k, (got, want)) in got.iter().zip(&want[i]).enumerate() {
            let bound = rounding * want.abs() + 1e-5 * size + f32::MIN_POSITIVE;
            let name = &value.name;
            assert!((got - want).abs() <= bound, "{name}[{k}] is {got}, plain {want}, bound {bound:e}, {case:?}");
        }
    }
}

fn both(case: Case) {
    check(case);
    check(Case { half: true, ..case });
}

#[test]
fn kernels_are_the_plain_loops_at_every_size() {
    for (n, hw) in [(1, [1, 1]), (3, [3, 5]), (2, [4, 4]), (3, [8, 8]), (1, [16, 16]), (1, [32, 32]), (1, [33, 33])] {
        both(Case { n, hw, ..PLAIN });
        both(Case { n, hw, scaled: true, add: true, dropout: Some(0.3), ..PLAIN });
    }
}

/// Groups in both sources, slabs that end in one, vectors and single channels, more and fewer groups.
#[test]
fn kernels_are_the_plain_loops_for_every_number_of_channels() {
    let channels = [
        ([64, 32], 32),
        ([128, 64], 32),
        ([40, 56], 32),
        ([20, 12], 32),
        ([33, 63], 32),
        ([256, 128], 32),
        ([3, 3], 3),
        ([1, 0], 1),
        ([7, 0], 7),
        ([6, 0], 2),
        ([136, 0], 8),
        ([256, 0], 1),
        ([528, 528], 32),
        ([300, 212], 2),
        ([640, 0], 640),
    ];
    for (channels, groups) in channels {
        let case = Case { channels, groups, hw: [3, 5], scaled: true, dropout: Some(0.5), add: true, ..PLAIN };
        both(case);
        both(Case { silu: false, scaled: false, ..case });
    }
}

/// Images that no block can keep: rows are read twice.
#[test]
fn large_images_take_two_passes() {
    for (hw, channels) in [([64, 64], [32, 0]), ([33, 40], [192, 0]), ([48, 31], [33, 63])] {
        both(Case { n: 1, hw, channels, scaled: true, dropout: Some(0.1), add: true, ..PLAIN });
    }
}

#[test]
fn means_far_from_zero_do_not_hurt() {
    for (mean, std) in [(-2.3, 0.5), (100.0, 1.0), (-100.0, 1.0)] {
        for hw in [[5, 3], [16, 16], [32, 40]] {
            both(Case { n: 1, hw, channels: [48, 16], mean, std, scaled: true, ..PLAIN });
        }
    }
}

/// An element is dropped exactly where the processor drops it.
#[test]
fn masks_are_those_of_the_processor() {
    for channels in [[64, 0], [20, 12], [32, 32]] {
        for half in [false, true] {
            let case = Case { n: 2, hw: [5, 7], channels, half, silu: false, dropout: Some(0.4), ..PLAIN };
            let r = Recorded::new(case);
            let (y, dropout) = (&r.run()[0], case.shape().dropout.unwrap());
            let size = case.s() * case.c();
            for (i, y) in y.iter().enumerate() {
                let dropped = dropout.factor(i / size, i % size) == 0.0;
                assert_eq!(*y == 0.0, dropped, "element {i} of {case:?} is {y}");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_grid_or_schedule() {
    for (hw, channels) in [([5, 3], [40, 24]), ([8, 8], [20, 12]), ([40, 40], [32, 0])] {
        for half in [false, true] {
            let r = Recorded::new(Case { hw, channels, half, scaled: true, dropout: Some(0.2), add: true, ..PLAIN });
            // The columns around dscale and dshift are nobody's: their bits stay those of NaN.
            same_bits(&r.g, &r.results(), |d, id| r.write(d, id));
        }
    }
}

#[test]
fn what_no_kernel_covers_is_refused_by_name() {
    let refused = |case: Case, change: &dyn Fn(&mut Graph)| {
        let mut r = Recorded::new(case);
        change(&mut r.g);
        gpu().bind(Plan::new(r.g, true)).unwrap_err().to_string()
    };
    let message = refused(Case { channels: [300, 212], groups: 1, ..PLAIN }, &|_| {});
    for part in ["group_norm", "512 channels", "256", "--device cpu"] {
        assert!(message.contains(part), "{message}");
    }
    let message = refused(PLAIN, &|g| g.values[0].dtype = DType::Bf16);
    assert!(message.contains("group_norm") && message.contains("F32"), "{message}");
}
