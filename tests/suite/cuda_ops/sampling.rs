//! q_sample and p_sample against the f64 specification.

use super::*;
use iddpm::diffusion::gaussian::{self, q_sample_value};
use iddpm::diffusion::{clip, reverse};
use iddpm::ops::p_sample::{PSample, Reverse};
use iddpm::ops::q_sample::QSample;

/// A plan of one q_sample: x_t, and eps where it is stored.
fn noising(
    half: bool,
    size: [usize; 3],
    process: &Arc<Process>,
    noise: Noise,
    store: bool,
) -> (Graph, Batch, Vec<Val>) {
    let mut g = graph(half);
    let batch = Batch::record(&mut g, size, &steps_of(process), true);
    let (images, process) = (batch.images.clone(), process.clone());
    let vals = if store {
        let (x_t, eps) = QSample::record_stored(&mut g, images, batch.t, noise, process);
        vec![x_t, eps]
    } else {
        vec![QSample::record(&mut g, images, batch.t, noise, process)]
    };
    vals.iter().for_each(|&v| g.keep(v));
    (g, batch, vals)
}

/// The kernel keeps the roundings of both products, so that one rounding of the sum remains, and one to bf16.
fn check_x_t(got: &[f32], half: bool, batch: &Batch, process: &Process, eps: &[f32]) {
    let t = steps_of(process);
    for (i, (&x_0, &eps)) in batch.x_0().iter().zip(eps).enumerate() {
        let want = q_sample_value(&process.at(t[i / batch.size()]), f64::from(x_0), f64::from(eps));
        let allowed = want.abs() * if half { 1.0 / 256.0 } else { 1.2e-7 };
        let off = (f64::from(got[i]) - want).abs();
        assert!(off <= allowed, "{} half {half}, element {i}: {} {want}", batch.shape, got[i]);
    }
}

#[test]
fn q_sample_matches_the_specification() {
    for process in processes() {
        for size in SIZES {
            for noise in [Noise::Drawn, Noise::PerImage] {
                for (half, store) in [(false, false), (false, true), (true, false), (true, true)] {
                    let (g, batch, vals) = noising(half, size, &process, noise, store);
                    let (device, id) = run(gpu(), &g, |d, id| batch.write(d, id));
                    let eps = if half && store { round(&batch.eps(noise)) } else { batch.eps(noise) };
                    // Normals are the same operations in the same order: the same bits.
                    assert!(!store || read(&device, id, vals[1]) == eps, "{size:?} {noise:?} half {half}");
                    check_x_t(&read(&device, id, vals[0]), half, &batch, &process, &eps);
                }
            }
        }
    }
}

#[test]
fn q_sample_reads_given_noise() {
    let process = &processes()[0];
    for (half, dtype) in [(false, DType::F32), (true, DType::F32), (true, DType::Bf16)] {
        for size in SIZES {
            let mut g = graph(half);
            let batch = Batch::record(&mut g, size, &steps_of(process), false);
            let eps = g.fixed("eps", batch.shape, dtype, Region::Inputs);
            let x_t = QSample::record(&mut g, batch.images.clone(), batch.t, Noise::Stored(eps), process.clone());
            g.keep(x_t);
            let given = round(&normals(batch.shape.len(), 4));
            let (device, id) = run(gpu(), &g, |d, id| {
                batch.write(d, id);
                write(d, id, eps, &given);
            });
            check_x_t(&read(&device, id, x_t), half, &batch, process, &given);
        }
    }
}

/// 3 bytes per element, 5 where eps is stored; the same bits however it is run.
#[test]
fn q_sample_moves_what_it_must() {
    let process = &processes()[0];
    for (store, each) in [(false, 3.0), (true, 5.0)] {
        let (g, batch, vals) = noising(true, [32, 32, 3], process, Noise::Drawn, store);
        let (launches, moved) = traffic(&g, |d, id| batch.write(d, id));
        assert_eq!(launches.len(), 1);
        assert!(moved <= 1.05 * each * batch.shape.len() as f64, "{moved} bytes for {} elements", batch.shape.len());
        same_bits(&g, &vals, |d, id| batch.write(d, id));
    }
}

/// One reverse step: the plan, and what it is steered by.
struct Step {
    g: Graph,
    op: PSample,
}

fn reverse_step(
    half: bool,
    [h, w, c]: [usize; 3],
    process: &Arc<Process>,
    output: Output,
    reverse: Reverse,
    clip: bool,
) -> Step {
    let mut g = Graph::new();
    let s = Shape::new(3, h, w, c);
    let mut fixed = |name: &str, shape, dtype, region| g.fixed(name, shape, dtype, region);
    let control = fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let seeds = fixed("seeds", Shape::rows(3, 2), DType::I32, Region::Inputs);
    let dtype = if half { DType::Bf16 } else { DType::F32 };
    let out = fixed("out", Shape { c: output.channels(c), ..s }, dtype, Region::Inputs);
    let x = fixed("x", s, DType::F32, Region::State);
    // The lean form of sampling has the copy alone, the one that is watched the prediction too.
    let copy = half.then(|| fixed("copy", s, DType::Bf16, Region::State));
    let x_0 = (!half || reverse.remembers()).then(|| fixed("x_0", s, DType::F32, Region::State));
    let (noise, process) = (None, process.clone());
    let (guidance, threshold) = (None, None);
    let op = PSample { x, copy, x_0, out, seeds, noise, control, reverse, output, guidance, clip, threshold, process };
    g.push(op.clone());
    Step { g, op }
}

const SEEDS: [u64; 3] = [3, 0xffff_0000_0000_0001, 99];

impl Step {
    fn x_t(&self) -> Vec<f32> {
        normals(self.g.shape(self.op.x).len(), 1)
    }

    /// The prediction of the call before.
    fn before(&self) -> Vec<f32> {
        normals(self.g.shape(self.op.x).len(), 3)
    }

    /// The network's output, with log-variances near the ends of the range and far outside.
    fn out(&self) -> Vec<f32> {
        let s = self.g.shape(self.op.out);
        let c = self.g.shape(self.op.x).c;
        let range = self.op.output.var_type == VarType::LearnedRange;
        let noise = normals(s.len(), 2);
        let at = |i: usize, x: f32| match (i % s.c < c, range) {
            (true, _) => x,
            (false, true) => 2.5 * x,
            (false, false) => 3.0 * x - 6.0,
        };
        round(&noise.iter().enumerate().map(|(i, &x)| at(i, x)).collect::<Vec<_>>())
    }

    fn write(&self, t: usize, d: &mut Device, id: PlanId) {
        let words: Vec<i32> = SEEDS.iter().flat_map(|s| [*s as i32, (s >> 32) as i32]).collect();
        d.write(id, self.op.seeds, &words).unwrap();
        d.write(id, self.op.control, &[Control { t: t as u32, ..CONTROL }]).unwrap();
        write(d, id, self.op.x, &self.x_t());
        if let Some(x_0) = self.op.x_0 {
            write(d, id, x_0, &self.before());
        }
        write(d, id, self.op.out, &self.out());
    }

    /// x_{t-1}, x_0 and the size of what x_{t-1} is a sum of, by the specification.
    fn specified(&self, row: usize) -> Vec<[f64; 3]> {
        let (steps, before) = (self.op.process.steps(), self.before());
        let t = row % steps;
        let (op, c, s) = (&self.op, self.op.process.at(t), self.g.shape(self.op.x));
        let reverse = if op.reverse == Reverse::Heun && row < steps { Reverse::Ddim(0.0) } else { op.reverse };
        let (x_t, out, size, stride) = (self.x_t(), self.out(), s.len() / s.n, op.output.channels(s.c));
        let mut noise = vec![0.0; s.len()];
        for (noise, seed) in noise.chunks_exact_mut(size).zip(SEEDS) {
            rng::fill_normal(noise, seed, 0, t as u32, rng::op::P_SAMPLE);
        }
        (0..s.len())
            .map(|i| {
                let o = i / s.c * stride + i % s.c;
                let var = if stride > s.c { f64::from(out[o + s.c]) } else { 0.0 };
                let x = f64::from(x_t[i]);
                let p = gaussian::p_mean_variance(&c, op.output, x, (f64::from(out[o]), var), clip(op.clip));
                let noise = if t > 0 { f64::from(noise[i]) } else { 0.0 };
                let eps = || gaussian::eps_from_x_0(&c, x, p.x_0);
                let solver = |[a, b, k]: [f64; 3]| [a * p.x_0, b * f64::from(before[i]), k * x];
                let [a, b, d] = match reverse {
                    Reverse::Ancestral => [p.mean, 0.0, (0.5 * p.log_variance).exp() * noise],
                    Reverse::Ddim(eta) => {
                        let (keep, eps_scale, sigma) = reverse::ddim_coefs(&c, eta);
                        [keep * p.x_0, eps_scale * eps(), sigma * noise]
                    }
                    Reverse::DdimReverse => {
                        [c.alpha_bar_next.sqrt() * p.x_0, (1.0 - c.alpha_bar_next).sqrt() * eps(), 0.0]
                    }
                    Reverse::DpmSolver => solver(reverse::dpm_solver_coefs(&c)),
                    Reverse::Heun => solver(reverse::heun_coefs(&c)),
                };
                // The mean itself is coef1 x_0 + coef2 x_t, whose terms may cancel.
                let size = (c.coef1 * p.x_0).abs() + (c.coef2 * x).abs() + a.abs() + b.abs() + d.abs();
                [a + b + d, p.x_0, size]
            })
            .collect()
    }

    fn check(&self, t: usize) {
        let (device, id) = run(gpu(), &self.g, |d, id| self.write(t, d, id));
        let x = read(&device, id, self.op.x);
        let x_0 = self.op.x_0.map(|v| read(&device, id, v));
        let what = format!(
            "t = {t} {:?} {:?} clip {} {}",
            self.op.output,
            self.op.reverse,
            self.op.clip,
            self.g.shape(self.op.x)
        );
        for (i, [want, want_x_0, size]) in self.specified(t).into_iter().enumerate() {
            // A prediction of x_0 keeps f32's precision however large its terms; the step is a sum of three such numbers.
            let off = (f64::from(x[i]) - want).abs();
            assert!(off <= 1e-6 * size, "{what}, element {i}: {} {want}, of terms {size}", x[i]);
            if let Some(x_0) = &x_0 {
                assert!((f64::from(x_0[i]) - want_x_0).abs() <= 3e-7 * want_x_0.abs(), "{what}: {} {want_x_0}", x_0[i]);
            }
        }
        if let Some(copy) = self.op.copy {
            assert_eq!(read(&device, id, copy), round(&x), "{what}");
        }
    }
}

const REVERSES: [Reverse; 6] = [
    Reverse::Ancestral,
    Reverse::Ddim(0.0),
    Reverse::Ddim(0.7),
    Reverse::DdimReverse,
    Reverse::DpmSolver,
    Reverse::Heun,
];

#[test]
fn p_sample_matches_the_specification() {
    for process in processes() {
        for t in steps_of(&process) {
            for (k, output) in outputs().enumerate() {
                for (j, reverse) in REVERSES.into_iter().enumerate() {
                    // Every combination at one size, all sizes among the combinations.
                    let size = SIZES[(k + j + t) % 4];
                    for (half, clip) in [(false, true), (true, false)] {
                        let step = reverse_step(half, size, &process, output, reverse, clip);
                        step.check(t);
                        if reverse == Reverse::Heun && t + 1 < process.steps() {
                            step.check(process.steps() + t);
                        }
                    }
                }
            }
        }
    }
}

/// A prediction that is no number is not clipped to one: it is seen in the picture and in x_0.
#[test]
fn steps_keep_what_is_no_number() {
    for (output, reverse) in outputs().zip(REVERSES.into_iter().cycle()) {
        let step = reverse_step(false, [5, 7, 3], &processes()[2], output, reverse, true);
        let (device, id) = run(gpu(), &step.g, |d, id| {
            step.write(7, d, id);
            let mut out = step.out();
            out[0] = f32::NAN;
            write(d, id, step.op.out, &out);
        });
        for v in [Some(step.op.x), step.op.x_0].into_iter().flatten() {
            let x = read(&device, id, v);
            assert!(x[0].is_nan() && x[1..].iter().all(|x| x.is_finite()), "{output:?} {reverse:?}");
        }
    }
}

/// Solvers of second order read one more prediction and write it: 8 bytes more.
#[test]
fn solvers_move_what_they_must() {
    let output = Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange };
    let step = reverse_step(true, [32, 32, 3], &processes()[0], output, Reverse::DpmSolver, true);
    let (launches, moved) = traffic(&step.g, |d, id| step.write(500, d, id));
    let elements = step.g.shape(step.op.x).len() as f64;
    assert_eq!(launches.len(), 1);
    assert!(moved <= 1.05 * 22.0 * elements, "{moved} bytes for {elements} elements");
    same_bits(&step.g, &outputs_of(&step.g), |d, id| step.write(500, d, id));
}

/// 14 bytes per element with learned variance and the bf16 copy.
#[test]
fn p_sample_moves_what_it_must() {
    let output = Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange };
    let step = reverse_step(true, [32, 32, 3], &processes()[0], output, Reverse::Ancestral, true);
    let (launches, moved) = traffic(&step.g, |d, id| step.write(500, d, id));
    let elements = step.g.shape(step.op.x).len() as f64;
    assert_eq!(launches.len(), 1);
    assert!(moved <= 1.05 * 14.0 * elements, "{moved} bytes for {elements} elements");
    same_bits(&step.g, &outputs_of(&step.g), |d, id| step.write(500, d, id));
}
