//! Group normalisation with scale-shift, SiLU and dropout.

use super::{assert_close, assert_gradient, largest, nan, on_all, uniform, weighted};
use iddpm::ops::fast::{self, Isa};
use iddpm::ops::group_norm::{self, Dropout, GroupNormShape};
use iddpm::ops::view::{Cat, Rows, RowsMut};
use iddpm::rng::philox;

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
