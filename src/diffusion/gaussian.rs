//! The Gaussians of the process: q forward and posterior, p from the network's output. All of one element, in f64.

use crate::config::{MeanType, VarType};
use crate::schedule::Coefs;

/// What the network's output means: which quantity its first half is, where the variance comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Meaning of the first half.
    pub mean_type: MeanType,
    /// Origin of the variance; a learned one doubles the channels.
    pub var_type: VarType,
}

impl Output {
    /// Whether the network's output has a second half.
    pub fn learns_variance(&self) -> bool {
        matches!(self.var_type, VarType::Learned | VarType::LearnedRange)
    }

    /// Channels of the network's output for images of `channels` channels.
    pub fn channels(&self, channels: usize) -> usize {
        if self.learns_variance() { 2 * channels } else { channels }
    }
}

/// p(x_{t-1} | x_t) of one element, and the x_0 it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Mean of x_{t-1}.
    pub mean: f64,
    /// Its variance; with the fixed small variance 0 at t = 0, which is not `exp(log_variance)` there.
    pub variance: f64,
    /// Logarithm of the variance.
    pub log_variance: f64,
    /// Predicted x_0, after `x_0_map`.
    pub x_0: f64,
}

/// The map for x_0 predictions: to [-1, 1], or none.
pub fn clip(on: bool) -> impl Fn(f64) -> f64 + Copy {
    move |x| if on { x.clamp(-1.0, 1.0) } else { x }
}

/// Noised data: `x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps`.   x_t, x_0, eps: one image
pub fn q_sample(c: &Coefs, x_t: &mut [f32], x_0: &[f32], eps: &[f32]) {
    assert!(x_t.len() == x_0.len() && x_0.len() == eps.len(), "q_sample: lengths differ");
    for ((x_t, &x_0), &eps) in x_t.iter_mut().zip(x_0).zip(eps) {
        *x_t = q_sample_value(c, f64::from(x_0), f64::from(eps)) as f32;
    }
}

/// [`q_sample`] of one element.
pub fn q_sample_value(c: &Coefs, x_0: f64, eps: f64) -> f64 {
    c.sqrt_alpha_bar * x_0 + c.sqrt_one_minus_alpha_bar * eps
}

/// Mean, variance and log-variance of q(x_t | x_0): `sqrt(alpha_bar) x_0`, `1 - alpha_bar`, `ln(1 - alpha_bar)`.
pub fn q_mean_variance(c: &Coefs, x_0: f64) -> (f64, f64, f64) {
    (c.sqrt_alpha_bar * x_0, 1.0 - c.alpha_bar, c.log_one_minus_alpha_bar)
}

/// Mean of q(x_{t-1} | x_t, x_0): `coef1 x_0 + coef2 x_t`. Its variance is `beta_tilde`, its log-variance
/// `log_beta_tilde_clipped`.
pub fn q_posterior_mean(c: &Coefs, x_0: f64, x_t: f64) -> f64 {
    c.coef1 * x_0 + c.coef2 * x_t
}

/// `x_0 = sqrt(1/alpha_bar) x_t - sqrt(1/alpha_bar - 1) eps`.
pub fn x_0_from_eps(c: &Coefs, x_t: f64, eps: f64) -> f64 {
    c.sqrt_recip_alpha_bar * x_t - c.sqrt_recipm1_alpha_bar * eps
}

/// `x_0 = x_prev/coef1 - (coef2/coef1) x_t`.
pub fn x_0_from_x_prev(c: &Coefs, x_t: f64, x_prev: f64) -> f64 {
    x_prev / c.coef1 - c.coef2 / c.coef1 * x_t
}

/// `eps = (sqrt(1/alpha_bar) x_t - x_0)/sqrt(1/alpha_bar - 1)`, the inverse of [`x_0_from_eps`].
pub fn eps_from_x_0(c: &Coefs, x_t: f64, x_0: f64) -> f64 {
    (c.sqrt_recip_alpha_bar * x_t - x_0) / c.sqrt_recipm1_alpha_bar
}

/// `x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v`.
pub fn x_0_from_v(c: &Coefs, x_t: f64, v: f64) -> f64 {
    c.sqrt_alpha_bar * x_t - c.sqrt_one_minus_alpha_bar * v
}

/// Variance and log-variance of p(x_{t-1} | x_t). `out_var` is read with a learned variance only:
///
/// ```text
/// fixed small     beta_tilde (log: clipped)        learned         exp(out_var)
/// fixed large     beta (beta_tilde_1 at t = 0)     learned range   exp(f ln beta + (1 - f) ln beta_tilde), f = (out_var + 1)/2
/// ```
pub fn variance(c: &Coefs, var_type: VarType, out_var: f64) -> (f64, f64) {
    match var_type {
        VarType::FixedSmall => (c.beta_tilde, c.log_beta_tilde_clipped),
        VarType::FixedLarge => (c.beta_large, c.log_beta_large),
        VarType::Learned | VarType::LearnedRange => {
            let log_variance = log_variance(c, var_type, out_var);
            (log_variance.exp(), log_variance)
        }
    }
}

/// The log-variance of [`variance`] alone.
#[inline]
pub fn log_variance(c: &Coefs, var_type: VarType, out_var: f64) -> f64 {
    match var_type {
        VarType::FixedSmall => c.log_beta_tilde_clipped,
        VarType::FixedLarge => c.log_beta_large,
        VarType::Learned => out_var,
        VarType::LearnedRange => {
            let f = (out_var + 1.0) / 2.0;
            f * c.log_beta + (1.0 - f) * c.log_beta_tilde_clipped
        }
    }
}

/// Derivative of [`log_variance`] with respect to `out_var`.
pub fn d_log_variance(c: &Coefs, var_type: VarType) -> f64 {
    match var_type {
        VarType::FixedSmall | VarType::FixedLarge => 0.0,
        VarType::Learned => 1.0,
        VarType::LearnedRange => 0.5 * (c.log_beta - c.log_beta_tilde_clipped),
    }
}

/// Predicted x_0 of a network output, before any map.
#[inline]
pub fn predict_x_0(c: &Coefs, mean_type: MeanType, x_t: f64, out_mean: f64) -> f64 {
    match mean_type {
        MeanType::Epsilon => x_0_from_eps(c, x_t, out_mean),
        MeanType::XStart => out_mean,
        MeanType::PreviousX => x_0_from_x_prev(c, x_t, out_mean),
        MeanType::V => x_0_from_v(c, x_t, out_mean),
    }
}

/// Mean of p(x_{t-1} | x_t) and the mapped x_0: the posterior mean of that x_0, but the raw output where that is x_{t-1} itself.
#[inline]
pub fn p_mean(c: &Coefs, mean_type: MeanType, x_t: f64, out_mean: f64, x_0_map: impl Fn(f64) -> f64) -> (f64, f64) {
    let x_0 = x_0_map(predict_x_0(c, mean_type, x_t, out_mean));
    match mean_type {
        MeanType::PreviousX => (out_mean, x_0),
        MeanType::Epsilon | MeanType::XStart | MeanType::V => (q_posterior_mean(c, x_0, x_t), x_0),
    }
}

/// Derivative of the unmapped [`p_mean`] with respect to the network's output.
pub fn d_p_mean(c: &Coefs, mean_type: MeanType) -> f64 {
    match mean_type {
        MeanType::Epsilon => -c.coef1 * c.sqrt_recipm1_alpha_bar,
        MeanType::XStart => c.coef1,
        MeanType::PreviousX => 1.0,
        MeanType::V => -c.coef1 * c.sqrt_one_minus_alpha_bar,
    }
}

/// p(x_{t-1} | x_t) of a network output `(out_mean, out_var)`; `x_0_map` (see [`clip`]) acts on the x_0 prediction first.
pub fn p_mean_variance(
    c: &Coefs,
    output: Output,
    x_t: f64,
    (out_mean, out_var): (f64, f64),
    x_0_map: impl Fn(f64) -> f64,
) -> Prediction {
    let (variance, log_variance) = variance(c, output.var_type, out_var);
    let (mean, x_0) = p_mean(c, output.mean_type, x_t, out_mean, x_0_map);
    Prediction { mean, variance, log_variance, x_0 }
}

/// What the network should say at an element: eps, x_0, the posterior mean, or `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`.
#[inline]
pub fn target(c: &Coefs, mean_type: MeanType, x_0: f64, x_t: f64, eps: f64) -> f64 {
    match mean_type {
        MeanType::Epsilon => eps,
        MeanType::XStart => x_0,
        MeanType::PreviousX => q_posterior_mean(c, x_0, x_t),
        MeanType::V => c.sqrt_alpha_bar * eps - c.sqrt_one_minus_alpha_bar * x_0,
    }
}
