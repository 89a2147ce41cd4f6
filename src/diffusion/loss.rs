//! Training losses of one image with their gradient, and the terms of the variational bound.
//!
//! ```text
//! mse                w mean (target - out)²               + L_vb             where the variance is learned
//! rescaled_mse       w mean (target - out)²               + (T/1000) L_vb    where the variance is learned
//! kl, rescaled_kl    L_vb,   T·L_vb
//! L_vb               mean KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / ln 2,   at t = 0  -mean log p(x_0 | x_1) / ln 2
//! ```
//!
//! The weight w is 1, or min-SNR's: with `SNR = ab/(1 - ab)`, ab = alpha_bar_t, `min(SNR, gamma)` on the squared error of x_0. The error
//! of another prediction is a multiple of that of x_0, so that
//!
//! ```text
//! x_0      w = min(SNR, gamma)             eps      w = min(1, gamma/SNR)
//! v        w = min(ab, gamma (1 - ab))     x_prev   w = min(SNR, gamma)/coef1²
//! ```
//!
//! In the mse losses L_vb does not reach the mean half of the output: that half learns from the mse alone, the variance half
//! from L_vb alone. In the kl losses both halves learn from L_vb. Predictions of x_0 are never clipped in training.

use std::f64::consts::LN_2;

use super::gaussian::{self, Output};
use super::likelihood::{Term, log_likelihood, normal_kl};
use crate::config::{DiffusionConfig, FirstStep, LossType, LossWeight, MeanType};
use crate::schedule::{Coefs, Process};

/// What is trained: the meaning of the output, the loss, the term at t = 0, the weight of the squared error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Meaning of the network's output.
    pub output: Output,
    /// The loss.
    pub loss_type: LossType,
    /// The term of the bound at t = 0.
    pub first_step: FirstStep,
    /// Weight of the squared error by t.
    pub weight: LossWeight,
}

impl Objective {
    /// The objective of a configuration.
    pub fn from_config(config: &DiffusionConfig) -> Self {
        Objective {
            output: Output { mean_type: config.mean_type, var_type: config.var_type },
            loss_type: config.loss_type,
            first_step: config.vb_first_step,
            weight: config.loss_weight,
        }
    }

    /// Factor of the mse in the loss.
    pub fn mse_scale(&self) -> f64 {
        match self.loss_type {
            LossType::Mse | LossType::RescaledMse => 1.0,
            LossType::Kl | LossType::RescaledKl => 0.0,
        }
    }

    /// Weight of the mse at one t, beside [`Self::mse_scale`].
    pub fn weight(&self, c: &Coefs) -> f64 {
        let LossWeight::MinSnr(gamma) = self.weight else { return 1.0 };
        let snr = c.alpha_bar / (1.0 - c.alpha_bar);
        match self.output.mean_type {
            MeanType::Epsilon => (gamma / snr).min(1.0),
            MeanType::XStart => snr.min(gamma),
            MeanType::PreviousX => snr.min(gamma) / (c.coef1 * c.coef1),
            MeanType::V => c.alpha_bar.min(gamma * (1.0 - c.alpha_bar)),
        }
    }

    /// Factor of the bound term (in bits/dim) in the loss of a process of `steps` steps; 0 where it is not part of it.
    pub fn vb_scale(&self, steps: usize) -> f64 {
        match self.loss_type {
            LossType::Mse | LossType::RescaledMse if !self.output.learns_variance() => 0.0,
            LossType::Mse | LossType::Kl => 1.0,
            LossType::RescaledMse => steps as f64 / 1000.0,
            LossType::RescaledKl => steps as f64,
        }
    }
}

/// The loss of one image and its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// What is minimised: `mse_scale·weight·mse + vb_scale·vb_bpd`.
    pub loss: f64,
    /// Mean of `(target - out)²`.
    pub mse: f64,
    /// The bound term in bits/dim, unscaled; 0 where the loss has no such part.
    pub vb_bpd: f64,
}

/// Loss of one image and the gradient of `scale·loss` with respect to the network's output; the gradient of a weighted batch mean has
/// `scale = weight/batch`. x_t is made of x_0 and eps in f64.   d_out, out: (pixels, C or 2C)   x_0, eps: (pixels, C)
#[allow(clippy::too_many_arguments)]
pub fn loss_and_grad(
    objective: &Objective,
    c: &Coefs,
    channels: usize,
    scale: f64,
    d_out: &mut [f32],
    x_0: &[f32],
    eps: &[f32],
    out: &[f32],
) -> Terms {
    let output = objective.output;
    assert!(x_0.len() == eps.len() && d_out.len() == out.len(), "loss: lengths differ");
    assert!(
        !x_0.is_empty() && out.len() * channels == x_0.len() * output.channels(channels),
        "loss: {channels} channels"
    );
    let n = x_0.len() as f64;
    let (mse_scale, vb_scale) = (objective.mse_scale() * objective.weight(c), objective.vb_scale(c.steps));
    // Derivative of the bound with respect to the two halves; the mean is detached where the mse trains it.
    let d_mean =
        if objective.mse_scale() == 0.0 { vb_scale / LN_2 * gaussian::d_p_mean(c, output.mean_type) } else { 0.0 };
    let d_log = vb_scale / LN_2 * gaussian::d_log_variance(c, output.var_type);
    let (mut mse, mut vb_nats) = (0.0, 0.0);
    for (pixel, (o, d)) in
        out.chunks_exact(output.channels(channels)).zip(d_out.chunks_exact_mut(output.channels(channels))).enumerate()
    {
        for k in 0..channels {
            let i = pixel * channels + k;
            let (x_0, eps) = (f64::from(x_0[i]), f64::from(eps[i]));
            let x_t = gaussian::q_sample_value(c, x_0, eps);
            let out_mean = f64::from(o[k]);
            let out_var = o.get(channels + k).map_or(0.0, |&v| f64::from(v));
            let error = out_mean - gaussian::target(c, output.mean_type, x_0, x_t, eps);
            mse += error * error;
            let mut d_first = mse_scale * 2.0 * error;
            if vb_scale != 0.0 {
                let term = bound_term(objective, c, x_0, x_t, (out_mean, out_var), |x| x).0;
                vb_nats += term.value;
                d_first += d_mean * term.d_mean;
                if let Some(d) = d.get_mut(channels + k) {
                    *d = (scale / n * d_log * term.d_log) as f32;
                }
            }
            d[k] = (scale / n * d_first) as f32;
        }
    }
    let (mse, vb_bpd) = (mse / n, vb_nats / n / LN_2);
    Terms { loss: mse_scale * mse + vb_scale * vb_bpd, mse, vb_bpd }
}

/// Term of the bound of one element in nats, with derivatives with respect to mean and log-variance of p, and the mapped x_0.
#[inline]
pub fn bound_term(
    objective: &Objective,
    c: &Coefs,
    x_0: f64,
    x_t: f64,
    (out_mean, out_var): (f64, f64),
    x_0_map: impl Fn(f64) -> f64,
) -> (Term, f64) {
    let Output { mean_type, var_type } = objective.output;
    let (mean, predicted) = gaussian::p_mean(c, mean_type, x_t, out_mean, x_0_map);
    let log_variance = gaussian::log_variance(c, var_type, out_var);
    let term = if c.t == 0 && objective.first_step == FirstStep::Nll {
        let log_p = log_likelihood(x_0, mean, 0.5 * log_variance);
        Term { value: -log_p.value, d_mean: -log_p.d_mean, d_log: -0.5 * log_p.d_log }
    } else {
        normal_kl(gaussian::q_posterior_mean(c, x_0, x_t), c.log_beta_tilde_clipped, mean, log_variance)
    };
    (term, predicted)
}

/// What the bits/dim evaluation reports of one image at one t.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BoundTerms {
    /// The term of the bound in bits/dim: decoder likelihood at t = 0, KL otherwise.
    pub vb_bpd: f64,
    /// Mean of `(predicted x_0 - x_0)²`.
    pub x_0_mse: f64,
    /// Mean of `(eps' - eps)²`, eps' derived again from the mapped x_0 prediction.
    pub eps_mse: f64,
}

/// The terms of the bound of one image at one t; `x_0_map` is [`gaussian::clip`] of the reference's `clip_denoised`.
///
/// x_t is made of x_0 and eps in f64.   x_0, eps: (pixels, C)   out: (pixels, C or 2C)
#[allow(clippy::too_many_arguments)]
pub fn bound_terms(
    objective: &Objective,
    c: &Coefs,
    channels: usize,
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_0: &[f32],
    eps: &[f32],
    out: &[f32],
) -> BoundTerms {
    let stride = objective.output.channels(channels);
    assert_eq!(x_0.len(), eps.len(), "bound: lengths differ");
    assert!(!x_0.is_empty() && out.len() * channels == x_0.len() * stride, "bound: {channels} channels");
    let mut sums = BoundTerms::default();
    for i in 0..x_0.len() {
        let o = i / channels * stride + i % channels;
        let out_var = if stride > channels { f64::from(out[o + channels]) } else { 0.0 };
        let (x_0, eps) = (f64::from(x_0[i]), f64::from(eps[i]));
        let x_t = gaussian::q_sample_value(c, x_0, eps);
        let (term, predicted) = bound_term(objective, c, x_0, x_t, (f64::from(out[o]), out_var), x_0_map);
        sums.vb_bpd += term.value;
        sums.x_0_mse += (predicted - x_0).powi(2);
        sums.eps_mse += (gaussian::eps_from_x_0(c, x_t, predicted) - eps).powi(2);
    }
    let n = x_0.len() as f64;
    BoundTerms { vb_bpd: sums.vb_bpd / n / LN_2, x_0_mse: sums.x_0_mse / n, eps_mse: sums.eps_mse / n }
}

/// The prior term of one image in bits/dim: mean KL(q(x_T | x_0) || N(0, 1)) / ln 2.
pub fn prior_bpd(process: &Process, x_0: &[f32]) -> f64 {
    let last = process.at(process.steps() - 1);
    let sum: f64 = x_0
        .iter()
        .map(|&x_0| {
            let (mean, _, log_variance) = gaussian::q_mean_variance(&last, f64::from(x_0));
            normal_kl(mean, log_variance, 0.0, 0.0).value
        })
        .sum();
    sum / x_0.len() as f64 / LN_2
}
