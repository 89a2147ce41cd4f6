//! One step of a sampler on one image: ancestral, DDIM, and DDIM backwards.
//!
//! ```text
//! p_sample       x_{t-1} = mean + [t > 0] exp(½ log_variance) noise
//! ddim           x_{t-1} = sqrt(ab₋) x_0 + sqrt(1 - ab₋ - σ²) eps + [t > 0] σ noise
//!                σ = eta sqrt((1 - ab₋)/(1 - ab)) sqrt(1 - ab/ab₋),   ab = alpha_bar_t, ab₋ = alpha_bar_{t-1}
//! ddim_reverse   x_{t+1} = sqrt(ab₊) x_0 + sqrt(1 - ab₊) eps,          ab₊ = alpha_bar_{t+1}, 0 after the last step
//! ```
//!
//! (Ho et al. 2020, algorithm 2; Song et al. 2021, eq. 12 and 16.) eps is derived again from the mapped x_0. Results go to `x_next` and
//! `x_0`; x_t, noise, x_next, x_0: (pixels, C), out: (pixels, C or 2C). `x_0_map` is [`super::clip`] or another map of x_0.

use super::gaussian::{self, Output, Prediction};
use crate::schedule::Coefs;

/// One ancestral step.
#[allow(clippy::too_many_arguments)]
pub fn p_sample(
    output: Output,
    c: &Coefs,
    channels: usize,
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_next: &mut [f32],
    x_0: &mut [f32],
    x_t: &[f32],
    out: &[f32],
    noise: &[f32],
) {
    assert_eq!(noise.len(), x_t.len(), "p_sample: noise");
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |i, _, p| {
        let noise = if c.t > 0 { f64::from(noise[i]) } else { 0.0 };
        p.mean + (0.5 * p.log_variance).exp() * noise
    });
}

/// One DDIM step; `eta` = 0 is deterministic, 1 has the variance of the posterior.
#[allow(clippy::too_many_arguments)]
pub fn ddim(
    output: Output,
    c: &Coefs,
    channels: usize,
    eta: f64,
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_next: &mut [f32],
    x_0: &mut [f32],
    x_t: &[f32],
    out: &[f32],
    noise: &[f32],
) {
    assert_eq!(noise.len(), x_t.len(), "ddim: noise");
    let (keep, eps_scale, sigma) = ddim_coefs(c, eta);
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |i, x_t, p| {
        let noise = if c.t > 0 { f64::from(noise[i]) } else { 0.0 };
        keep * p.x_0 + eps_scale * gaussian::eps_from_x_0(c, x_t, p.x_0) + sigma * noise
    });
}

/// One DDIM step backwards, from x_t to x_{t+1}, as it must be with eta = 0.
#[allow(clippy::too_many_arguments)]
pub fn ddim_reverse(
    output: Output,
    c: &Coefs,
    channels: usize,
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_next: &mut [f32],
    x_0: &mut [f32],
    x_t: &[f32],
    out: &[f32],
) {
    let (keep, eps_scale) = (c.alpha_bar_next.sqrt(), (1.0 - c.alpha_bar_next).sqrt());
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |_, x_t, p| {
        keep * p.x_0 + eps_scale * gaussian::eps_from_x_0(c, x_t, p.x_0)
    });
}

/// Factors of x_0, eps and noise in a DDIM step: `sqrt(ab₋)`, `sqrt(1 - ab₋ - σ²)`, `σ`.
pub fn ddim_coefs(c: &Coefs, eta: f64) -> (f64, f64, f64) {
    let prev = c.alpha_bar_prev;
    let sigma = eta * ((1.0 - prev) / (1.0 - c.alpha_bar)).sqrt() * (1.0 - c.alpha_bar / prev).sqrt();
    (prev.sqrt(), (1.0 - prev - sigma * sigma).sqrt(), sigma)
}

/// The loop of every sampler: predicts each element and gives `(index, x_t, prediction)` to `next`.
#[allow(clippy::too_many_arguments)]
fn step(
    output: Output,
    c: &Coefs,
    channels: usize,
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_next: &mut [f32],
    x_0: &mut [f32],
    x_t: &[f32],
    out: &[f32],
    next: impl Fn(usize, f64, &Prediction) -> f64,
) {
    let stride = output.channels(channels);
    assert!(x_next.len() == x_t.len() && x_0.len() == x_t.len(), "reverse step: lengths differ");
    assert!(out.len() * channels == x_t.len() * stride, "reverse step: {channels} channels");
    for i in 0..x_t.len() {
        let o = i / channels * stride + i % channels;
        let out_var = if stride > channels { f64::from(out[o + channels]) } else { 0.0 };
        let x = f64::from(x_t[i]);
        let p = gaussian::p_mean_variance(c, output, x, (f64::from(out[o]), out_var), x_0_map);
        x_next[i] = next(i, x, &p) as f32;
        x_0[i] = p.x_0 as f32;
    }
}
