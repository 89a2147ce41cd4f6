//! hybrid_loss and vb_terms against the f64 specification, for every objective.

use super::*;
use iddpm::config::{FirstStep, LossType, LossWeight};
use iddpm::diffusion::gaussian::{self, q_sample_value};
use iddpm::diffusion::loss::bound_term;
use iddpm::diffusion::{Objective, bound_terms, clip, loss_and_grad};
use iddpm::ops::hybrid_loss::{HybridLoss, LossVals};
use iddpm::ops::vb_terms::VbTerms;
use iddpm::schedule::Coefs;
use std::f64::consts::LN_2;

const LOSSES: [LossType; 4] = [LossType::Mse, LossType::RescaledMse, LossType::Kl, LossType::RescaledKl];

/// Which noise a plan takes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Eps {
    Drawn,
    PerImage,
    /// Stored in the type of the network's output.
    Stored,
}

/// A plan of the loss, or of the terms of the bound, of a batch.
struct Rig {
    g: Graph,
    batch: Batch,
    objective: Objective,
    process: Arc<Process>,
    noise: Noise,
    out: Val,
    weight: Val,
    d_out: Option<Val>,
    terms: [Val; 3],
}

fn rig(
    half: bool,
    size: [usize; 3],
    objective: Objective,
    process: &Arc<Process>,
    eps: Eps,
    clipped: Option<bool>,
) -> Rig {
    let mut g = Graph::new();
    let batch = Batch::record(&mut g, size, &steps_of(process), eps == Eps::Drawn);
    let dtype = if half { DType::Bf16 } else { DType::F32 };
    let s = Shape { c: objective.output.channels(size[2]), ..batch.shape };
    let rows = Shape::rows(s.n, 1);
    let out = g.fixed("out", s, dtype, Region::Inputs);
    let weight = g.fixed("weight", rows, DType::F32, Region::Inputs);
    let noise = match eps {
        Eps::Drawn => Noise::Drawn,
        Eps::PerImage => Noise::PerImage,
        Eps::Stored => Noise::Stored(g.fixed("eps", batch.shape, dtype, Region::Inputs)),
    };
    let terms = ["a", "b", "c"].map(|name| g.fixed(name, rows, DType::F32, Region::State));
    let (images, t, shared) = (batch.images.clone(), batch.t, process.clone());
    let d_out = clipped.is_none().then(|| g.fixed("d_out", s, dtype, Region::State));
    match (d_out, clipped) {
        (Some(d_out), _) => {
            let terms = LossVals { loss: terms[0], mse: terms[1], vb: terms[2] };
            g.push(HybridLoss { d_out, terms, out, images, noise, t, weight, objective, process: shared });
        }
        (None, clipped) => {
            let ([vb, x_0_mse, eps_mse], clip) = (terms, clipped == Some(true));
            g.push(VbTerms { vb, x_0_mse, eps_mse, out, images, noise, t, objective, clip, process: shared });
        }
    }
    Rig { g, batch, objective, process: process.clone(), noise, out, weight, d_out, terms }
}

const WEIGHTS: [f32; 4] = [1.0, 0.25, 3.0, 0.7];

impl Rig {
    fn eps(&self) -> Vec<f32> {
        match self.noise {
            Noise::Stored(_) => round(&normals(self.batch.shape.len(), 6)),
            noise => self.batch.eps(noise),
        }
    }

    fn coefs(&self) -> [Coefs; 4] {
        steps_of(&self.process).map(|t| self.process.at(t))
    }

    /// A network's output: near its target by every distance from a hundredth of a bin to far off; log-variances around the
    /// posterior's and up to exp(±20) of it.
    fn out(&self) -> Vec<f32> {
        let (s, c, coefs) = (self.g.shape(self.out), self.batch.shape.c, self.coefs());
        let (x_0, eps, noise) = (self.batch.x_0(), self.eps(), normals(s.len(), 8));
        let Output { mean_type, var_type } = self.objective.output;
        let at = |o: usize| {
            let (pixel, k, n) = (o / s.c, o % s.c, o / (s.len() / s.n));
            let spread = [1.0, 0.1, 0.01, 3.0, 1e-4][(pixel * 7 + k) % 5];
            let x = f64::from(noise[o]);
            if k >= c {
                let log1 = coefs[n].log_beta_tilde_clipped;
                let far = if (pixel * 3 + k) % 11 == 0 { 5.0 } else { 1.0 };
                return if var_type == VarType::Learned { log1 + 2.0 * far * x } else { 1.5 * far * x };
            }
            let (x_0, eps) = (f64::from(x_0[pixel * c + k]), f64::from(eps[pixel * c + k]));
            let target = gaussian::target(&coefs[n], mean_type, x_0, q_sample_value(&coefs[n], x_0, eps), eps);
            target + spread * x
        };
        let out: Vec<f32> = (0..s.len()).map(|o| at(o) as f32).collect();
        if self.g[self.out].dtype == DType::Bf16 { round(&out) } else { out }
    }

    fn write(&self, d: &mut Device, id: PlanId) {
        self.batch.write(d, id);
        write(d, id, self.out, &self.out());
        write(d, id, self.weight, &WEIGHTS);
        if let Noise::Stored(v) = self.noise {
            write(d, id, v, &self.eps());
        }
    }

    fn what(&self) -> String {
        let half = self.g[self.out].dtype == DType::Bf16;
        format!("{:?} T {} {} half {half} {:?}", self.objective, self.process.steps(), self.batch.shape, self.noise)
    }

    /// Runs it and gives image by image: its number, coefficients, x_0, eps, out.
    fn each(&self, mut f: impl FnMut(usize, &Coefs, [&[f32]; 3])) {
        let (x_0, eps, out) = (self.batch.x_0(), self.eps(), self.out());
        let (size, out_size) = (self.batch.size(), self.g.shape(self.out).len() / 4);
        for (n, c) in self.coefs().iter().enumerate() {
            f(n, c, [&x_0[n * size..][..size], &eps[n * size..][..size], &out[n * out_size..][..out_size]]);
        }
    }

    /// The loss of each image to 1e-5, its gradient to 1e-5 of the larger of its two parts.
    fn check_loss(&self) {
        let (device, id) = run(gpu(), &self.g, |d, id| self.write(d, id));
        let terms = self.terms.map(|v| read(&device, id, v));
        let (d_out, channels) = (read(&device, id, self.d_out.unwrap()), self.batch.shape.c);
        let half = self.g[self.out].dtype == DType::Bf16;
        self.each(|n, c, [x_0, eps, out]| {
            let mut want_d = vec![f32::NAN; out.len()];
            let scale = f64::from(WEIGHTS[n]) / 4.0;
            let want = loss_and_grad(&self.objective, c, channels, scale, &mut want_d, x_0, eps, out);
            for (got, want) in terms.iter().zip([want.loss, want.mse, want.vb_bpd]) {
                let off = (f64::from(got[n]) - want).abs();
                assert!(off <= 1e-5 * want.abs() + 1e-20, "{} t = {}: {} {want}", self.what(), c.t, got[n]);
            }
            let stride = self.objective.output.channels(channels);
            // Where out is its target, and in the tails of the bins, the specification's differences keep f64 noise, below 1e-11 of a gradient of size 1.
            let unit =
                2.0 * self.objective.mse_scale() * self.objective.weight(c) + self.objective.vb_scale(c.steps) / LN_2;
            let noise = unit * scale.abs() / x_0.len() as f64 * 1e-11;
            for (o, &want) in want_d.iter().enumerate() {
                let got = d_out[n * out.len() + o];
                let parts = self.parts(c, scale / x_0.len() as f64, x_0, eps, out, o / stride, o % stride);
                let allowed = 1e-5 * parts.max(f64::from(want.abs()))
                    + f64::from(want.abs()) * if half { 1.0 / 256.0 } else { 0.0 };
                let off = f64::from((got - want).abs());
                assert!(
                    off <= allowed + noise + 1e-38,
                    "{} t = {} output {o}: {got} {want}, parts {parts}",
                    self.what(),
                    c.t
                );
            }
        });
    }

    /// The larger of the two parts that a gradient of the variance half is the difference of: `1 - exp(-u)` and `d² exp(-u)`, or at t = 0
    /// those of the two ends of the bin. For the mean half, one product in the KL, the noise of the specification over 1e-5.
    #[allow(clippy::too_many_arguments)]
    fn parts(&self, c: &Coefs, scale: f64, x_0: &[f32], eps: &[f32], out: &[f32], pixel: usize, k: usize) -> f64 {
        let channels = self.batch.shape.c;
        let (stride, o) = (self.objective.output.channels(channels), k % channels);
        let (x_0, eps) = (f64::from(x_0[pixel * channels + o]), f64::from(eps[pixel * channels + o]));
        let out_mean = f64::from(out[pixel * stride + o]);
        let out_var = if stride > channels { f64::from(out[pixel * stride + channels + o]) } else { 0.0 };
        let Output { mean_type, var_type } = self.objective.output;
        let x_t = q_sample_value(c, x_0, eps);
        let (mean, _) = gaussian::p_mean(c, mean_type, x_t, out_mean, |x| x);
        let log_variance = gaussian::log_variance(c, var_type, out_var);
        let vb_scale = scale * self.objective.vb_scale(c.steps) / LN_2;
        let nll = c.t == 0 && self.objective.first_step == FirstStep::Nll;
        let (d_mean, d_log) = if nll {
            let inverse = (-0.5 * log_variance).exp();
            let ends = [1.0, -1.0].map(|e| {
                let u = inverse * (x_0 - mean + e / 255.0);
                (u, iddpm::diffusion::likelihood::normal_cdf(u).1)
            });
            let term = bound_term(&self.objective, c, x_0, x_t, (out_mean, out_var), |x| x).0;
            let probability = (-term.value).exp();
            // A probability is the difference of two of f64: good to 1e-15, which counts where it is small itself.
            let coarse = 1.0 + 1e-10 / probability;
            let sum = |f: &dyn Fn((f64, f64)) -> f64| {
                coarse * ends.iter().map(|&e| f(e)).filter(|x| x.is_finite()).sum::<f64>()
            };
            (sum(&|(_, slope)| slope * inverse) / probability, sum(&|(u, slope)| (u * slope).abs()) / probability)
        } else {
            let u = log_variance - c.log_beta_tilde_clipped;
            let d = mean - gaussian::q_posterior_mean(c, x_0, x_t);
            // Where out is its target, the specification's difference of means keeps f64 noise below 1e-12, from sqrt(1 - alpha_bar).
            (1e-7 * (-log_variance).exp(), 0.5 * (-u).exp_m1().abs() + 0.5 * d * d * (-log_variance).exp())
        };
        let to_mean = if self.objective.mse_scale() == 0.0 { gaussian::d_p_mean(c, mean_type).abs() } else { 0.0 };
        vb_scale * if k < channels { to_mean * d_mean } else { gaussian::d_log_variance(c, var_type) * d_log }
    }

    fn check_terms(&self, clipped: bool) {
        let (device, id) = run(gpu(), &self.g, |d, id| self.write(d, id));
        let terms = self.terms.map(|v| read(&device, id, v));
        self.each(|n, c, [x_0, eps, out]| {
            let want = bound_terms(&self.objective, c, self.batch.shape.c, clip(clipped), x_0, eps, out);
            for (got, want) in terms.iter().zip([want.vb_bpd, want.x_0_mse, want.eps_mse]) {
                let off = (f64::from(got[n]) - want).abs();
                // A lone pixel that is its target exactly has f64 noise for a square in the specification.
                assert!(
                    off <= 1e-5 * want.abs() + 1e-20,
                    "{} clip {clipped} t = {}: {} {want}",
                    self.what(),
                    c.t,
                    got[n]
                );
            }
        });
    }
}

fn objectives() -> impl Iterator<Item = Objective> {
    outputs().flat_map(|output| {
        LOSSES.into_iter().flat_map(move |loss_type| {
            [FirstStep::Nll, FirstStep::Kl].map(|first_step| Objective {
                output,
                loss_type,
                first_step,
                weight: LossWeight::Uniform,
            })
        })
    })
}

#[test]
fn hybrid_loss_matches_the_specification() {
    for (p, process) in processes().iter().enumerate() {
        for (k, objective) in objectives().enumerate() {
            // All objectives at one size, all sizes and sources of noise among them.
            let (size, eps) = (SIZES[(k + p) % 4], [Eps::Drawn, Eps::PerImage, Eps::Stored][(k / 4 + p) % 3]);
            for half in [false, true] {
                rig(half, size, objective, process, eps, None).check_loss();
            }
        }
    }
}

/// Weights of the squared error at the ends of the process and on both sides of their bend.
#[test]
fn weighted_losses_match_the_specification() {
    for process in processes() {
        for output in outputs().filter(|o| matches!(o.var_type, VarType::FixedLarge | VarType::LearnedRange)) {
            for gamma in [0.5, 5.0] {
                let objective = Objective { output, weight: LossWeight::MinSnr(gamma), ..HYBRID };
                rig(false, [5, 7, 3], objective, &process, Eps::Drawn, None).check_loss();
            }
        }
    }
}

#[test]
fn vb_terms_match_the_specification() {
    for (p, process) in processes().iter().enumerate() {
        for (k, objective) in objectives().filter(|o| o.loss_type == LossType::Kl).enumerate() {
            let (size, eps) = (SIZES[(k + p) % 4], [Eps::Drawn, Eps::PerImage, Eps::Stored][(k / 4 + p) % 3]);
            for half in [false, true] {
                for clipped in [false, true] {
                    rig(half, size, objective, process, eps, Some(clipped)).check_terms(clipped);
                }
            }
        }
    }
}

/// What the network could not say is not clipped to something that it might have said.
#[test]
fn terms_of_an_output_that_is_no_number_are_none() {
    for output in outputs() {
        for half in [false, true] {
            let objective = Objective { output, loss_type: LossType::Kl, ..HYBRID };
            let r = rig(half, [5, 7, 3], objective, &processes()[2], Eps::Drawn, Some(true));
            let (device, id) = run(gpu(), &r.g, |d, id| {
                r.write(d, id);
                let mut out = r.out();
                let image = out.len() / 4;
                out.iter_mut().step_by(image).for_each(|x| *x = f32::NAN);
                write(d, id, r.out, &out);
            });
            for v in r.terms {
                let terms = read(&device, id, v);
                assert!(terms.iter().all(|x| x.is_nan()), "{output:?} half {half}: {terms:?}");
            }
        }
    }
}

const HYBRID: Objective = Objective {
    output: Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange },
    loss_type: LossType::RescaledMse,
    first_step: FirstStep::Nll,
    weight: LossWeight::Uniform,
};

/// 9 bytes per element with drawn noise, 11 with stored: x_t is not needed.
#[test]
fn hybrid_loss_moves_what_it_must() {
    for (eps, each) in [(Eps::Drawn, 9.0), (Eps::Stored, 11.0)] {
        for size in [[32, 32, 3], [64, 64, 3]] {
            let r = rig(true, size, HYBRID, &processes()[0], eps, None);
            let (launches, moved) = traffic(&r.g, |d, id| r.write(d, id));
            assert_eq!(launches.len(), 1);
            let elements = r.batch.shape.len() as f64;
            assert!(moved <= 1.05 * each * elements, "{moved} bytes for {elements} elements");
        }
    }
}

#[test]
fn the_bound_has_the_same_bits_on_any_grid() {
    for clipped in [None, Some(true)] {
        for half in [false, true] {
            let r = rig(half, [48, 64, 1], HYBRID, &processes()[0], Eps::Drawn, clipped);
            same_bits(&r.g, &outputs_of(&r.g), |d, id| r.write(d, id));
        }
    }
}

#[test]
fn vb_terms_move_what_they_must() {
    let r = rig(true, [32, 32, 3], HYBRID, &processes()[0], Eps::PerImage, Some(true));
    let (launches, moved) = traffic(&r.g, |d, id| r.write(d, id));
    assert_eq!(launches.len(), 1);
    assert!(moved <= 1.05 * 5.0 * r.batch.shape.len() as f64, "{moved} bytes");
}

/// Central differences of the kernel's own loss in f32, with importance weights, at steps whose loss is a few bits.
#[test]
fn gradients_match_central_differences() {
    let objective = Objective { loss_type: LossType::Kl, ..HYBRID };
    let r = rig(false, [2, 2, 1], objective, &processes()[2], Eps::Drawn, None);
    let (mut device, id) = run(gpu(), &r.g, |d, id| r.write(d, id));
    // Every variance near the posterior's and every mean a little off: a smooth function.
    let base: Vec<f32> = r.batch.eps(Noise::Drawn).iter().flat_map(|&e| [e + 0.05, 0.2]).collect();
    let total = |out: &[f32], device: &mut Device| -> f64 {
        write(device, id, r.out, out);
        device.run(id).unwrap();
        let loss = read(device, id, r.terms[0]);
        loss.iter().zip(WEIGHTS).map(|(&l, w)| f64::from(l) * f64::from(w) / 4.0).sum()
    };
    total(&base, &mut device);
    let gradient = read(&device, id, r.d_out.unwrap());
    for (o, &d) in gradient.iter().enumerate() {
        let mut at = |h: f32| {
            let mut out = base.clone();
            out[o] += h;
            (total(&out, &mut device), f64::from(out[o]))
        };
        let h = 0.01;
        let ((above, x_above), (below, x_below)) = (at(h), at(-h));
        let slope = (above - below) / (x_above - x_below);
        // h² of the third derivative, and 1e-7 of the loss over 2h.
        let allowed = 2e-2 * slope.abs() + 1e-5 * above.abs();
        assert!((f64::from(d) - slope).abs() <= allowed, "output {o}: {d}, differences say {slope}");
    }
}
