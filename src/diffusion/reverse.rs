//! One step of a sampler on one image: ancestral, DDIM, DDIM backwards, DPM-Solver++ (2M) and Heun.
//!
//! ```text
//! p_sample       x_{t-1} = mean + [t > 0] exp(½ log_variance) noise
//! ddim           x_{t-1} = sqrt(ab₋) x_0 + sqrt(1 - ab₋ - σ²) eps + [t > 0] σ noise
//!                σ = eta sqrt((1 - ab₋)/(1 - ab)) sqrt(1 - ab/ab₋),   ab = alpha_bar_t, ab₋ = alpha_bar_{t-1}
//! ddim_reverse   x_{t+1} = sqrt(ab₊) x_0 + sqrt(1 - ab₊) eps,          ab₊ = alpha_bar_{t+1}, 0 after the last step
//! second_order   x_next  = a x_0 + b x_0' + c x_t,                     x_0' the prediction one network call before
//! ```
//!
//! (Ho et al. 2020, algorithm 2; Song et al. 2021, eq. 12 and 16.) With `α = sqrt(ab)`, `s = sqrt(1 - ab)`, `λ = ln(α/s)`:
//!
//! - **DPM-Solver++ (2M)** (Lu et al. 2022, algorithm 2): `x_{t-1} = (s₋/s) x_t + (α₋ - α s₋/s) D`, that is DDIM with `D = (1 + k) x_0 - k x_0'`
//!   in place of x_0, `k = (λ₋ - λ)/(2(λ - λ₊))`. Steps from or to an infinite λ, the first and the last among them, have k = 0.
//! - **Heun** (Karras et al. 2022, algorithm 1 without noise) in `x/α` over `s/α`: DDIM from t to t - 1, another network call there, and the
//!   step again with the mean of the two slopes. As slope and x_0 prediction determine each other this is
//!   `x_t + α/2 (1 - (s₊/α₊)/(s/α)) (x_0' - x_0)` of the x_t that DDIM gave: [`heun_coefs`] at t - 1. Where `s/α` falls by more than
//!   [`LARGEST_HEUN_STEP`] at once DDIM's result stays.
//!
//! eps is derived again from the mapped x_0. Results go to `x_next` and
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
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |i, _, _, p| {
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
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |i, x_t, _, p| {
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
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |_, x_t, _, p| {
        keep * p.x_0 + eps_scale * gaussian::eps_from_x_0(c, x_t, p.x_0)
    });
}

/// Factors of x_0, eps and noise in a DDIM step: `sqrt(ab₋)`, `sqrt(1 - ab₋ - σ²)`, `σ`; eta within 0 and 1, above which the root may
/// have no value.
pub fn ddim_coefs(c: &Coefs, eta: f64) -> (f64, f64, f64) {
    let prev = c.alpha_bar_prev;
    let sigma = eta * ((1.0 - prev) / (1.0 - c.alpha_bar)).sqrt() * (1.0 - c.alpha_bar / prev).sqrt();
    (prev.sqrt(), (1.0 - prev - sigma * sigma).sqrt(), sigma)
}

/// One step of a sampler of second order; `x_0` holds the prediction of the call before and takes the new one.
///
/// `[a, b, c]` are the factors of the new prediction, the one before and x_t. Where b is 0 the one before is not looked at.
#[allow(clippy::too_many_arguments)]
pub fn second_order(
    output: Output,
    c: &Coefs,
    channels: usize,
    [new, last, keep]: [f64; 3],
    x_0_map: impl Fn(f64) -> f64 + Copy,
    x_next: &mut [f32],
    x_0: &mut [f32],
    x_t: &[f32],
    out: &[f32],
) {
    step(output, c, channels, x_0_map, x_next, x_0, x_t, out, |_, x_t, before, p| {
        let before = if last == 0.0 { 0.0 } else { last * f64::from(before) };
        new * p.x_0 + before + keep * x_t
    });
}

/// Factors of x_0, of the prediction before and of x_t in a step of DPM-Solver++ (2M).
pub fn dpm_solver_coefs(c: &Coefs) -> [f64; 3] {
    let lambda = |alpha_bar: f64| 0.5 * (alpha_bar / (1.0 - alpha_bar)).ln();
    let [before, here, next] = [c.alpha_bar_next, c.alpha_bar, c.alpha_bar_prev].map(lambda);
    let k = (next - here) / (2.0 * (here - before));
    let k = if k.is_finite() { k } else { 0.0 };
    let [x_0, x_t] = over_x_0(c, c.alpha_bar_prev.sqrt(), (1.0 - c.alpha_bar_prev).sqrt());
    [x_0 * (1.0 + k), -x_0 * k, x_t]
}

/// Largest factor by which `s/α` may fall in a step that Heun corrects. A cosine schedule ends with a factor above 30, and few even
/// steps of any schedule with one near 20,000 or 40: a line through the two slopes says nothing there, and the correction would
/// outweigh the picture.
pub const LARGEST_HEUN_STEP: f64 = 5.0;

/// Factors of x_0, of the prediction before and of x_t in Heun's second half: x_t is DDIM's result from t + 1, the prediction before its.
pub fn heun_coefs(c: &Coefs) -> [f64; 3] {
    let fall = (1.0 / c.alpha_bar_next - 1.0).sqrt() / c.sqrt_recipm1_alpha_bar;
    let slope = if fall <= LARGEST_HEUN_STEP { 0.5 * c.sqrt_alpha_bar * (1.0 - fall) } else { 0.0 };
    [-slope, slope, 1.0]
}

/// `keep x_0 + eps_scale eps`, eps from x_0 and x_t, as factors of x_0 and x_t.
pub fn over_x_0(c: &Coefs, keep: f64, eps_scale: f64) -> [f64; 2] {
    let per_x_0 = eps_scale / c.sqrt_recipm1_alpha_bar;
    [keep - per_x_0, per_x_0 * c.sqrt_recip_alpha_bar]
}

/// The loop of every sampler: predicts each element and gives `(index, x_t, what x_0 held, prediction)` to `next`.
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
    next: impl Fn(usize, f64, f32, &Prediction) -> f64,
) {
    let stride = output.channels(channels);
    assert!(x_next.len() == x_t.len() && x_0.len() == x_t.len(), "reverse step: lengths differ");
    assert!(out.len() * channels == x_t.len() * stride, "reverse step: {channels} channels");
    for i in 0..x_t.len() {
        let o = i / channels * stride + i % channels;
        let out_var = if stride > channels { f64::from(out[o + channels]) } else { 0.0 };
        let x = f64::from(x_t[i]);
        let p = gaussian::p_mean_variance(c, output, x, (f64::from(out[o]), out_var), x_0_map);
        x_next[i] = next(i, x, x_0[i], &p) as f32;
        x_0[i] = p.x_0 as f32;
    }
}
