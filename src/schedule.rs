//! The forward process: betas, every table derived from them, and respacing to a subset of the steps.
//!
//! ```text
//! q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)        alpha_bar_t  = Π_{s<=t} (1 - beta_s)
//! q(x_t | x_0)     = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t)  beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
//! q(x_{t-1} | x_t, x_0) = N(coef1_t x_0 + coef2_t x_t, beta_tilde_t)
//! ```
//!
//! (Ho et al. 2020, eq. 4, 6 and 7; Nichol & Dhariwal 2021, eq. 9, 10 and 17.) Tables are f64 with T entries; index 0 is the
//! paper's t = 1. The reference rounds an entry to f32 when it picks it for a batch and computes in f32 from there; here
//! everything stays f64.

use std::collections::BTreeSet;
use std::f64::consts::FRAC_PI_2;

use crate::config::{DiffusionConfig, Schedule};
use crate::error::{Error, Result};

/// Linear betas: T evenly spaced values from `1e-4·1000/T` to `0.02·1000/T` inclusive.
///
/// Below T = 20 the last ones exceed 1, which [`Process::new`] refuses.
pub fn linear_betas(steps: usize) -> Vec<f64> {
    let scale = 1000.0 / steps as f64;
    let (first, last) = (scale * 0.0001, scale * 0.02);
    let stride = (last - first) / (steps.max(2) - 1) as f64;
    (0..steps).map(|i| if i > 0 && i + 1 == steps { last } else { first + i as f64 * stride }).collect()
}

/// Cosine betas: `1 - f((i + 1)/T)/f(i/T)`, at most 0.999, with `f(u) = cos²((u + 0.008)/1.008·π/2)`
/// (Nichol & Dhariwal 2021, eq. 17).
pub fn cosine_betas(steps: usize) -> Vec<f64> {
    let f = |i: usize| ((i as f64 / steps as f64 + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
    (0..steps).map(|i| (1.0 - f(i + 1) / f(i)).min(0.999)).collect()
}

/// Sigmoid betas: `1 - a((i + 1)/T)/a(i/T)`, at most 0.999, with `a(u) = (s(3) - s(6u - 3))/(s(3) - s(-3))` and the
/// logistic `s(x) = 1/(1 + exp(-x))`: start -3, end 3, tau 1 (Jabri et al. 2022).
pub fn sigmoid_betas(steps: usize) -> Vec<f64> {
    const START: f64 = -3.0;
    const END: f64 = 3.0;
    let s = |x: f64| 1.0 / (1.0 + (-x).exp());
    let alpha_bar = |i: usize| {
        let x = START + (END - START) * (i as f64 / steps as f64);
        (s(END) - s(x)) / (s(END) - s(START))
    };
    (0..steps).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999)).collect()
}

/// A forward process with every table the reference derives from its betas.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    /// `beta_t`.
    pub beta: Vec<f64>,
    /// `alpha_bar_t`; 0 at the end of a linear schedule of 20 steps.
    pub alpha_bar: Vec<f64>,
    /// `alpha_bar_{t-1}`, 1 at t = 0.
    pub alpha_bar_prev: Vec<f64>,
    /// `alpha_bar_{t+1}`, 0 at t = T - 1.
    pub alpha_bar_next: Vec<f64>,
    /// `sqrt(alpha_bar_t)`.
    pub sqrt_alpha_bar: Vec<f64>,
    /// `sqrt(1 - alpha_bar_t)`.
    pub sqrt_one_minus_alpha_bar: Vec<f64>,
    /// `ln(1 - alpha_bar_t)`.
    pub log_one_minus_alpha_bar: Vec<f64>,
    /// `sqrt(1/alpha_bar_t)`, infinite where `alpha_bar_t` is 0.
    pub sqrt_recip_alpha_bar: Vec<f64>,
    /// `sqrt(1/alpha_bar_t - 1)`, infinite where `alpha_bar_t` is 0.
    pub sqrt_recipm1_alpha_bar: Vec<f64>,
    /// `beta_tilde_t`, the posterior variance; 0 at t = 0.
    pub beta_tilde: Vec<f64>,
    /// `ln beta_tilde_t`, the entry of index 1 also at index 0.
    pub log_beta_tilde_clipped: Vec<f64>,
    /// Factor of x_0 in the posterior mean: `beta_t sqrt(alpha_bar_{t-1})/(1 - alpha_bar_t)`.
    pub coef1: Vec<f64>,
    /// Factor of x_t in the posterior mean: `(1 - alpha_bar_{t-1}) sqrt(1 - beta_t)/(1 - alpha_bar_t)`.
    pub coef2: Vec<f64>,
    /// The step of the original process that each step stands for.
    pub timestep_map: Vec<usize>,
    /// T of the original process.
    pub original_steps: usize,
}

/// The entries of a [`Process`] at one t: all that a formula of one step needs. Names as there.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Coefs {
    /// The step; 0 is the least noisy one.
    pub t: usize,
    /// T of the process in use (after respacing).
    pub steps: usize,
    pub beta: f64,
    pub alpha_bar: f64,
    pub alpha_bar_prev: f64,
    pub alpha_bar_next: f64,
    pub sqrt_alpha_bar: f64,
    pub sqrt_one_minus_alpha_bar: f64,
    pub log_one_minus_alpha_bar: f64,
    pub sqrt_recip_alpha_bar: f64,
    pub sqrt_recipm1_alpha_bar: f64,
    pub beta_tilde: f64,
    pub log_beta_tilde_clipped: f64,
    pub coef1: f64,
    pub coef2: f64,
    /// `ln beta_t`, the upper end of a learned range.
    pub log_beta: f64,
    /// The fixed large variance: `beta_t`, but `beta_tilde_1` at t = 0.
    pub beta_large: f64,
    /// Its logarithm.
    pub log_beta_large: f64,
}

impl Process {
    /// The process of a configuration: its schedule, respaced. No respacing is the identity spacing, as in the
    /// reference: betas are computed again from `alpha_bar`, with rounding differences.
    ///
    /// # Errors
    /// [`Error::Config`] for too few steps and for a respacing that cannot be.
    pub fn from_config(config: &DiffusionConfig) -> Result<Self> {
        let base = Self::new(config.noise_schedule, config.diffusion_steps)?;
        let spec = config.timestep_respacing.trim();
        if spec.is_empty() {
            return base.respace(&(0..base.steps()).collect::<Vec<_>>());
        }
        match spec.strip_prefix("logsnr") {
            Some(count) => base.respace(&base.log_snr_steps(spec_number(spec, count)?)?),
            None => base.respace(&space_timesteps(base.steps(), spec)?),
        }
    }

    /// The `count` steps, ascending, the first and the last among them, whose log-SNR `ln(alpha_bar/(1 - alpha_bar))` is nearest to
    /// even spacing; where two would be the same step, the next ones are taken.
    ///
    /// # Errors
    /// [`Error::Config`] for fewer than 2 steps or more than there are.
    pub fn log_snr_steps(&self, count: usize) -> Result<Vec<usize>> {
        let steps = self.steps();
        if !(2..=steps).contains(&count) {
            return Err(Error::Config(format!(
                "timestep_respacing \"logsnr{count}\": between 2 and the {steps} steps of the process can be kept"
            )));
        }
        let log_snr: Vec<f64> = self.alpha_bar.iter().map(|a| (a / (1.0 - a)).ln()).collect();
        let (first, last) = (log_snr[0], log_snr[steps - 1].max(-1e3));
        let nearest = |x: f64| {
            let above = log_snr.partition_point(|&y| y > x).clamp(1, steps - 1);
            if log_snr[above - 1] - x < x - log_snr[above] { above - 1 } else { above }
        };
        let mut kept: Vec<usize> =
            (0..count).map(|i| nearest(first + (last - first) * i as f64 / (count - 1) as f64)).collect();
        for i in 1..count {
            kept[i] = kept[i].max(kept[i - 1] + 1);
        }
        for (i, t) in kept.iter_mut().enumerate() {
            *t = (*t).min(steps - count + i);
        }
        Ok(kept)
    }

    /// The original process of `steps` steps.
    ///
    /// # Errors
    /// [`Error::Config`] below 2 steps, and below 20 linear steps, whose betas exceed 1.
    pub fn new(schedule: Schedule, steps: usize) -> Result<Self> {
        let beta = match schedule {
            Schedule::Linear => linear_betas(steps),
            Schedule::Cosine => cosine_betas(steps),
            Schedule::Sigmoid => sigmoid_betas(steps),
        };
        if let Some(i) = beta.iter().position(|&b| b > 1.0) {
            return Err(Error::Config(format!(
                "diffusion_steps = {steps}: beta[{i}] of the linear schedule is {:.3}, above 1; \
                 use 20 steps or more, or the cosine schedule",
                beta[i]
            )));
        }
        Self::from_betas(beta, (0..steps).collect(), steps)
    }

    /// The process that visits only the steps `kept` of this one, ascending: `beta_i = 1 - alpha_bar[kept_i]/alpha_bar[kept_{i-1}]`.
    ///
    /// # Errors
    /// [`Error::Config`] when fewer than 2 steps are kept.
    pub fn respace(&self, kept: &[usize]) -> Result<Self> {
        assert!(kept.is_sorted_by(|a, b| a < b), "kept steps must ascend");
        let mut last = 1.0;
        let mut beta = Vec::with_capacity(kept.len());
        for &i in kept {
            beta.push(1.0 - self.alpha_bar[i] / last);
            last = self.alpha_bar[i];
        }
        let map = kept.iter().map(|&i| self.timestep_map[i]).collect();
        Self::from_betas(beta, map, self.original_steps)
    }

    fn from_betas(beta: Vec<f64>, timestep_map: Vec<usize>, original_steps: usize) -> Result<Self> {
        if beta.len() < 2 {
            return Err(Error::Config(format!(
                "a process of {} of {original_steps} steps cannot be built: the variance of the first step repeats \
                 that of the second; keep 2 steps or more",
                beta.len()
            )));
        }
        let mut product = 1.0;
        let alpha_bar: Vec<f64> = beta
            .iter()
            .map(|b| {
                product *= 1.0 - b;
                product
            })
            .collect();
        let alpha_bar_prev = [&[1.0], &alpha_bar[..alpha_bar.len() - 1]].concat();
        let alpha_bar_next = [&alpha_bar[1..], &[0.0]].concat();
        let over = |f: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..beta.len()).map(f).collect() };
        let beta_tilde = over(&|t| beta[t] * (1.0 - alpha_bar_prev[t]) / (1.0 - alpha_bar[t]));
        Ok(Process {
            sqrt_alpha_bar: over(&|t| alpha_bar[t].sqrt()),
            sqrt_one_minus_alpha_bar: over(&|t| (1.0 - alpha_bar[t]).sqrt()),
            log_one_minus_alpha_bar: over(&|t| (1.0 - alpha_bar[t]).ln()),
            sqrt_recip_alpha_bar: over(&|t| (1.0 / alpha_bar[t]).sqrt()),
            sqrt_recipm1_alpha_bar: over(&|t| (1.0 / alpha_bar[t] - 1.0).sqrt()),
            log_beta_tilde_clipped: over(&|t| beta_tilde[t.max(1)].ln()),
            coef1: over(&|t| beta[t] * alpha_bar_prev[t].sqrt() / (1.0 - alpha_bar[t])),
            coef2: over(&|t| (1.0 - alpha_bar_prev[t]) * (1.0 - beta[t]).sqrt() / (1.0 - alpha_bar[t])),
            beta_tilde,
            alpha_bar,
            alpha_bar_prev,
            alpha_bar_next,
            beta,
            timestep_map,
            original_steps,
        })
    }

    /// T, the number of steps in use.
    pub fn steps(&self) -> usize {
        self.beta.len()
    }

    /// The tables at `t`.
    pub fn at(&self, t: usize) -> Coefs {
        assert!(t < self.steps(), "step {t} of {}", self.steps());
        let beta_large = if t == 0 { self.beta_tilde[1] } else { self.beta[t] };
        Coefs {
            t,
            steps: self.steps(),
            beta: self.beta[t],
            alpha_bar: self.alpha_bar[t],
            alpha_bar_prev: self.alpha_bar_prev[t],
            alpha_bar_next: self.alpha_bar_next[t],
            sqrt_alpha_bar: self.sqrt_alpha_bar[t],
            sqrt_one_minus_alpha_bar: self.sqrt_one_minus_alpha_bar[t],
            log_one_minus_alpha_bar: self.log_one_minus_alpha_bar[t],
            sqrt_recip_alpha_bar: self.sqrt_recip_alpha_bar[t],
            sqrt_recipm1_alpha_bar: self.sqrt_recipm1_alpha_bar[t],
            beta_tilde: self.beta_tilde[t],
            log_beta_tilde_clipped: self.log_beta_tilde_clipped[t],
            coef1: self.coef1[t],
            coef2: self.coef2[t],
            log_beta: self.beta[t].ln(),
            beta_large,
            log_beta_large: beta_large.ln(),
        }
    }

    /// The time the network is told at step `t`: the original step, or with `rescale` that times 1000/T of the original process.
    pub fn time_value(&self, t: usize, rescale: bool) -> f32 {
        let original = self.timestep_map[t] as f32;
        if rescale { original * (1000.0 / self.original_steps as f64) as f32 } else { original }
    }
}

/// The steps that a respacing keeps of `0..steps`, ascending.
///
/// - `"250"`, `"10,15,20"`: as many sections of equal size (the first `steps % sections` one longer), each with so many
///   steps: a position that starts at the section's first step, grows by `(size - 1)/(count - 1)` and is rounded half to
///   even. The position is accumulated, not multiplied, as in the reference: for some counts the two differ.
/// - `"ddim50"`: the smallest stride whose multiples below `steps` are exactly so many.
///
/// # Errors
/// [`Error::Config`] for text that is neither, more steps than a section has, and a count no stride gives; it names the
/// nearest possible one.
pub fn space_timesteps(steps: usize, spec: &str) -> Result<Vec<usize>> {
    let number = |text: &str| spec_number(spec, text);
    if let Some(count) = spec.strip_prefix("ddim") {
        return strided(steps, number(count)?);
    }
    let counts = spec.split(',').map(number).collect::<Result<Vec<_>>>()?;
    let mut kept = BTreeSet::new();
    let mut start = 0;
    for (i, &count) in counts.iter().enumerate() {
        let size = steps / counts.len() + usize::from(i < steps % counts.len());
        if count > size {
            return Err(Error::Config(format!(
                "timestep_respacing \"{spec}\": section {i} asks for {count} steps but has {size} of the {steps}; \
                 use at most {size}"
            )));
        }
        let stride = if count > 1 { (size - 1) as f64 / (count - 1) as f64 } else { 1.0 };
        let mut position = 0.0f64;
        for _ in 0..count {
            kept.insert(start + position.round_ties_even() as usize);
            position += stride;
        }
        start += size;
    }
    Ok(kept.into_iter().collect())
}

/// The number of steps `text` of the respacing `spec`.
fn spec_number(spec: &str, text: &str) -> Result<usize> {
    text.trim().parse().map_err(|_| {
        Error::Config(format!(
            "timestep_respacing \"{spec}\": \"{text}\" is not a number of steps; \
             write \"250\", \"10,15,20\", \"ddim50\" or \"logsnr20\""
        ))
    })
}

fn strided(steps: usize, count: usize) -> Result<Vec<usize>> {
    let strides = 1..steps;
    if let Some(stride) = strides.clone().find(|&stride| steps.div_ceil(stride) == count) {
        return Ok((0..steps).step_by(stride).collect());
    }
    let nearest = strides.map(|stride| steps.div_ceil(stride)).min_by_key(|n| n.abs_diff(count)).unwrap_or(steps);
    Err(Error::Config(format!(
        "timestep_respacing \"ddim{count}\": no integer stride through {steps} steps visits exactly {count}; \
         the nearest that exists is \"ddim{nearest}\", or use \"{count}\" for uneven spacing"
    )))
}
