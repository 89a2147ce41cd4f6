//! Losses, their gradients and the likelihoods they are made of.

use std::f64::consts::LN_2;

use iddpm::config::{FirstStep, LossType, LossWeight, MeanType, Schedule, VarType};
use iddpm::diffusion::gaussian::{self, q_sample_value};
use iddpm::diffusion::likelihood::{log_likelihood, normal_cdf, normal_kl};
use iddpm::diffusion::loss::bound_term;
use iddpm::diffusion::{Objective, Output, bound_terms, clip, loss_and_grad, prior_bpd};
use iddpm::schedule::{Coefs, Process};
use proptest::prelude::*;

use super::processes;

const MEANS: [MeanType; 4] = [MeanType::Epsilon, MeanType::XStart, MeanType::PreviousX, MeanType::V];
const VARIANCES: [VarType; 4] = [VarType::FixedSmall, VarType::FixedLarge, VarType::Learned, VarType::LearnedRange];
const LOSSES: [LossType; 4] = [LossType::Mse, LossType::RescaledMse, LossType::Kl, LossType::RescaledKl];

/// A network that knows the noise gives p(x_{t-1} | x_t) = q(x_{t-1} | x_t, x_0): every KL term is 0, every mse is 0.
#[test]
fn a_perfect_network_has_no_loss() {
    for p in processes() {
        for mean_type in MEANS {
            for t in [1, p.steps() - 1] {
                let c = p.at(t);
                let (x_0, eps) = (0.25f32, -0.5f32);
                let x_t = q_sample_value(&c, x_0.into(), eps.into());
                let out = gaussian::target(&c, mean_type, x_0.into(), x_t, eps.into());
                let objective = objective(mean_type, VarType::FixedSmall, LossType::Kl, FirstStep::Nll);
                let (term, predicted) = bound_term(&objective, &c, x_0.into(), x_t, (out, f64::NAN), |x| x);
                let amplified = 1e-12 * (1.0 + c.sqrt_recip_alpha_bar + 1.0 / c.coef1);
                assert!(
                    term.value.abs() <= amplified * amplified / c.beta_tilde + 1e-12,
                    "{mean_type:?} t = {t}: {term:?}"
                );
                assert!((predicted - 0.25).abs() <= amplified / c.sqrt_one_minus_alpha_bar);
            }
        }
    }
}

/// Whatever is predicted, min-SNR is one weight of the squared error of x_0: that of the same prediction said in other words.
#[test]
fn min_snr_weighs_the_error_of_x_0() {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
    for p in processes() {
        for t in (0..p.steps()).step_by(p.steps().div_ceil(40)) {
            let c = p.at(t);
            let snr = c.alpha_bar / (1.0 - c.alpha_bar);
            let (x_0, eps, off) = (0.3, -1.2, 1e-3);
            let x_t = q_sample_value(&c, x_0, eps);
            for gamma in [0.01, 5.0, 1e9] {
                for mean_type in MEANS {
                    let o = Objective {
                        weight: LossWeight::MinSnr(gamma),
                        ..objective(mean_type, VarType::FixedLarge, LossType::Mse, FirstStep::Nll)
                    };
                    let out = gaussian::target(&c, mean_type, x_0, x_t, eps) + off;
                    // The prediction is linear in the output: a difference of 1 away from rounding.
                    let slope = gaussian::predict_x_0(&c, mean_type, 0.0, 1.0);
                    let weighted = o.weight(&c) * off * off;
                    assert!(close(weighted, snr.min(gamma) * (slope * off).powi(2)), "{mean_type:?} t = {t} {gamma}");
                    let mut d = [f32::NAN];
                    let (x_0, eps, out) = (x_0 as f32, eps as f32, out as f32);
                    let terms = loss_and_grad(&o, &c, 1, 1.0, &mut d, &[x_0], &[eps], &[out]);
                    assert!(close(terms.loss, o.weight(&c) * terms.mse), "{mean_type:?} t = {t}");
                }
            }
        }
    }
    // Where nothing of the image is left the noise keeps its weight of 1, the others fade out.
    let end = Process::new(Schedule::Linear, 20).unwrap().at(19);
    let at = |mean_type| {
        let o = objective(mean_type, VarType::FixedLarge, LossType::Mse, FirstStep::Nll);
        Objective { weight: LossWeight::MinSnr(5.0), ..o }.weight(&end)
    };
    assert_eq!([MeanType::Epsilon, MeanType::XStart, MeanType::V].map(at), [1.0, 0.0, 0.0]);
}

#[test]
fn prior_term_is_small_and_positive() {
    let p = Process::new(Schedule::Cosine, 1000).unwrap();
    let bpd = prior_bpd(&p, &[-1.0, 1.0, 0.5, 0.0]);
    assert!(bpd > 0.0 && bpd < 1e-4, "{bpd}");
}

fn objective(mean_type: MeanType, var_type: VarType, loss_type: LossType, first_step: FirstStep) -> Objective {
    Objective { output: Output { mean_type, var_type }, loss_type, first_step, weight: LossWeight::Uniform }
}

/// Every objective there is; those with a squared error with both kinds of weight.
fn objectives() -> impl Iterator<Item = Objective> {
    let plain = MEANS.into_iter().flat_map(|mean| {
        VARIANCES.into_iter().flat_map(move |var| {
            LOSSES.into_iter().flat_map(move |loss| {
                [FirstStep::Nll, FirstStep::Kl].into_iter().map(move |first| objective(mean, var, loss, first))
            })
        })
    });
    plain.flat_map(|o| {
        let weighted = (o.mse_scale() != 0.0).then_some(Objective { weight: LossWeight::MinSnr(2.0), ..o });
        [o].into_iter().chain(weighted)
    })
}

/// Loss of one element as the definition says it, in f64: (mse part, bound part), each with its factor.
fn loss_parts(o: &Objective, c: &Coefs, x: [f64; 3], out: (f64, f64)) -> (f64, f64) {
    let [x_0, x_t, eps] = x;
    let error = out.0 - gaussian::target(c, o.output.mean_type, x_0, x_t, eps);
    let vb_scale = o.vb_scale(c.steps);
    let vb = if vb_scale == 0.0 { 0.0 } else { vb_scale * bound_term(o, c, x_0, x_t, out, |x| x).0.value / LN_2 };
    (o.mse_scale() * o.weight(c) * error * error, vb)
}

/// Derivative of `f` at `x`: two central differences and Richardson's step, so the error is O(h⁴) of a smooth f.
fn derivative(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    let central = |h: f64| (f(x + h) - f(x - h)) / (2.0 * h);
    let h = 2e-4 * x.abs().max(1.0);
    (4.0 * central(h / 2.0) - central(h)) / 3.0
}

/// All objectives, at the first two, a middle and the last step, at edge pixels, with small and extreme variances.
#[test]
fn gradients_match_central_differences() {
    let process = Process::new(Schedule::Cosine, 50).unwrap();
    let scale = 0.7;
    let mut checked = 0;
    for o in objectives() {
        for t in [0, 1, 25, 49] {
            let c = process.at(t);
            for x_0 in [-1.0f32, -0.9995, -0.5, 0.2, 0.9995, 1.0] {
                for (off, out_var) in
                    [(0.0f32, 0.0f32), (0.01, -1.0), (-0.02, 1.0), (0.3, 6.0), (0.001, -4.0), (0.1, -14.0)]
                {
                    let eps = 0.6f32;
                    let x_t = q_sample_value(&c, x_0.into(), eps.into());
                    let x = [x_0.into(), x_t, eps.into()];
                    let out_mean = gaussian::target(&c, o.output.mean_type, x[0], x[1], x[2]) as f32 + off;
                    let learned = o.output.learns_variance();
                    let (out, mut d) = (if learned { vec![out_mean, out_var] } else { vec![out_mean] }, [f32::NAN; 2]);
                    let d = &mut d[..out.len()];
                    let terms = loss_and_grad(&o, &c, 1, scale, d, &[x_0], &[eps], &out);
                    let at = |mean: f64, var: f64| loss_parts(&o, &c, x, (mean, var));
                    let (mean, var) = (f64::from(out_mean), f64::from(out_var));
                    let total = at(mean, var).0 + at(mean, var).1;
                    assert!((terms.loss - total).abs() <= 1e-12 * total.abs(), "{o:?} t = {t}: {terms:?}, {total}");
                    // The mse losses do not send the bound's gradient to the mean half.
                    let bound_to_mean = o.mse_scale() == 0.0;
                    let d_mean =
                        derivative(|m| at(m, var).0 + if bound_to_mean { at(m, var).1 } else { 0.0 }, mean) * scale;
                    let d_var = derivative(|v| at(mean, v).1, var) * scale;
                    for (got, truth) in d.iter().zip([d_mean, d_var]) {
                        // Differences of f64 lose about total·1e-16/h; f32 results 6e-8 of themselves; the difference of
                        // two cdf values has an error near 1e-16, which 1/probability = 2^bits and 1/h magnify.
                        let bits = if t == 0 { terms.vb_bpd.max(0.0) } else { 0.0 };
                        let cancellation = 4e-12 * bits.exp2() * o.vb_scale(c.steps);
                        let allowed = 1e-5 * truth.abs() + 1e-10 * total.abs() + 1e-9 + cancellation;
                        assert!(
                            (f64::from(*got) - truth).abs() <= allowed,
                            "{o:?} t = {t} x_0 = {x_0} out = {out:?}: got {d:?}, differences say {d_mean} {d_var}"
                        );
                        checked += 1;
                    }
                }
            }
        }
    }
    assert!(checked > 15_000, "{checked}");
}

/// A pixel's mean and variance parameters are C apart; the loss of an image is the mean over its elements.
#[test]
fn an_image_is_the_mean_of_its_elements() {
    let process = Process::new(Schedule::Linear, 100).unwrap();
    let (pixels, channels) = (5, 3);
    for o in objectives() {
        for t in [0, 40] {
            let c = process.at(t);
            let stride = o.output.channels(channels);
            let value = |i: usize, k: u32| ((i as u32 * 7919 + k * 104_729) % 1000) as f32 / 500.0 - 1.0;
            let column = |k: u32, n: usize| (0..n).map(|i| value(i, k)).collect::<Vec<f32>>();
            let n = pixels * channels;
            let (x_0, eps, out) = (column(1, n), column(3, n), column(4, pixels * stride));
            let mut d = vec![f32::NAN; out.len()];
            let terms = loss_and_grad(&o, &c, channels, 1.0, &mut d, &x_0, &eps, &out);
            let bound = bound_terms(&o, &c, channels, clip(false), &x_0, &eps, &out);
            let (mut loss, mut vb) = (0.0, 0.0);
            for i in 0..n {
                let first = i / channels * stride + i % channels;
                let places: Vec<usize> = (first..pixels * stride).step_by(channels).take(stride / channels).collect();
                let own: Vec<f32> = places.iter().map(|&p| out[p]).collect();
                let mut own_d = vec![f32::NAN; own.len()];
                let one = |x: &[f32]| [x[i]];
                let (x_0, eps) = (one(&x_0), one(&eps));
                loss += loss_and_grad(&o, &c, 1, 1.0, &mut own_d, &x_0, &eps, &own).loss / n as f64;
                vb += bound_terms(&o, &c, 1, clip(false), &x_0, &eps, &own).vb_bpd / n as f64;
                for (&p, own_d) in places.iter().zip(&own_d) {
                    let expected = own_d / n as f32;
                    assert!((d[p] - expected).abs() <= 3e-7 * expected.abs(), "{o:?}: {} {expected}", d[p]);
                }
            }
            assert!((terms.loss - loss).abs() <= 1e-12 * loss.abs().max(1.0), "{o:?}");
            assert!((bound.vb_bpd - vb).abs() <= 1e-12 * vb.abs().max(1.0), "{o:?}");
        }
    }
}

/// Where the bound has its Gaussian form at t = 0 too, both ends of the range are the clipped posterior's neighbours and finite.
#[test]
fn first_step_kl_replaces_the_likelihood_only_at_zero() {
    let process = Process::new(Schedule::Cosine, 100).unwrap();
    let value = |first_step, t: usize| {
        let o = objective(MeanType::Epsilon, VarType::LearnedRange, LossType::Kl, first_step);
        let c = process.at(t);
        bound_term(&o, &c, 0.1, q_sample_value(&c, 0.1, 0.4), (0.5, 0.2), |x| x).0
    };
    assert_eq!(value(FirstStep::Kl, 5), value(FirstStep::Nll, 5));
    let c = process.at(0);
    let x_t = q_sample_value(&c, 0.1, 0.4);
    let mean = gaussian::p_mean(&c, MeanType::Epsilon, x_t, 0.5, |x| x).0;
    let log_variance = gaussian::log_variance(&c, VarType::LearnedRange, 0.2);
    let kl = normal_kl(gaussian::q_posterior_mean(&c, 0.1, x_t), c.log_beta_tilde_clipped, mean, log_variance);
    assert_eq!(value(FirstStep::Kl, 0), kl);
    assert_ne!(value(FirstStep::Nll, 0), kl);
}

/// No variance, however extreme, may turn into NaN.
#[test]
fn extreme_log_variances_stay_finite() {
    for log_scale in [-500.0, -88.0, -20.0, 0.0, 20.0, 88.0, 500.0] {
        for (x, mean) in [(-1.0, -1.0), (-1.0, 3.0), (0.5, 0.5), (0.5, 0.5 + 1.0 / 255.0), (1.0, 1.0), (1.0, -50.0)] {
            let term = log_likelihood(x, mean, log_scale);
            let finite = term.value.is_finite() && term.d_mean.is_finite() && term.d_log.is_finite();
            assert!(finite && term.value <= 1e-12, "{x} {mean} {log_scale}: {term:?}");
        }
    }
    // A probability below the clamp has no slope.
    let clamped = log_likelihood(0.5, 3.0, -4.0);
    assert_eq!((clamped.value, clamped.d_mean, clamped.d_log), (1e-12f64.ln(), 0.0, 0.0));
    for x in [0.0, 10.0, 1e20, 1e200, f64::INFINITY] {
        let ((above, slope), (below, _)) = (normal_cdf(x), normal_cdf(-x));
        assert!((above + below - 1.0).abs() <= 1e-15 && slope.is_finite(), "{x}");
    }
}

proptest! {
    #[test]
    fn kl_is_positive_and_zero_at_equality(
        mean1 in -5.0..5.0f64, log1 in -20.0..20.0f64, mean2 in -5.0..5.0f64, log2 in -20.0..20.0f64,
    ) {
        prop_assert!(normal_kl(mean1, log1, mean2, log2).value >= 0.0);
        let same = normal_kl(mean1, log1, mean1, log1);
        prop_assert_eq!((same.value, same.d_mean, same.d_log.abs()), (0.0, 0.0, 0.0));
    }

    /// Neighbouring bins share their edges, so all that may be missing is what the clamp adds to empty bins.
    #[test]
    fn bin_probabilities_sum_to_one(mean in -2.0..2.0f64, log_scale in -9.0..3.0f64) {
        let sum: f64 = (0..256).map(|b| log_likelihood(f64::from(b) / 127.5 - 1.0, mean, log_scale).value.exp()).sum();
        prop_assert!((sum - 1.0).abs() <= 256.0 * 1e-12 + 1e-11, "{}", sum);
    }
}
