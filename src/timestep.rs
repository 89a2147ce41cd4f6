//! Choice of t in training: uniform, or by the size of recent losses (Nichol & Dhariwal 2021, section 3.3).
//!
//! ```text
//! w_t = sqrt(mean of the last 10 squared losses of t),   p_t = (1 - u) w_t/Σw + u/T,   u = 0.001
//! ```
//!
//! A loss drawn at t is weighted by `1/(T p_t)`, so its mean stays the loss under the uniform choice. Until every t has its
//! 10 losses all t are alike and all weights 1. Losses enter the history before they are weighted.
//!
//! Sums run in index order in f64, so that a port of the same sums draws the same integers.

use crate::config::TimestepSampler;
use crate::error::{Error, Result};
use crate::rng::{self, op};

/// Losses kept of each t.
pub const HISTORY: usize = 10;
/// Part of the probability that is spread evenly.
pub const UNIFORM_PROB: f64 = 0.001;

/// A distribution over `0..steps`.
#[derive(Clone, Debug, PartialEq)]
pub enum TimestepDist {
    /// Every t alike.
    Uniform {
        /// T.
        steps: usize,
    },
    /// In proportion to the root of the mean squared loss.
    LossSecondMoment(LossHistory),
}

/// The last losses of every t.
#[derive(Clone, Debug, PartialEq)]
pub struct LossHistory {
    /// Losses kept of each t.
    per_step: usize,
    /// Part of the probability that is spread evenly.
    uniform_prob: f64,
    /// (T, per_step), oldest first; the first `counts[t]` of a row are filled.
    losses: Vec<f32>,
    /// Losses seen of each t, at most `per_step`.
    counts: Vec<u32>,
}

impl TimestepDist {
    /// The distribution a configuration names, over `steps` steps, with an empty history.
    pub fn new(sampler: TimestepSampler, steps: usize) -> Self {
        match sampler {
            TimestepSampler::Uniform => TimestepDist::Uniform { steps },
            TimestepSampler::LossSecondMoment => {
                TimestepDist::LossSecondMoment(LossHistory::new(steps, HISTORY, UNIFORM_PROB))
            }
        }
    }

    /// T.
    pub fn steps(&self) -> usize {
        match self {
            TimestepDist::Uniform { steps } => *steps,
            TimestepDist::LossSecondMoment(history) => history.counts.len(),
        }
    }

    /// Unnormalised weights: all 1, or after the warm-up those of the losses, which sum to 1.
    pub fn weights(&self) -> Vec<f64> {
        match self {
            TimestepDist::Uniform { steps } => vec![1.0; *steps],
            TimestepDist::LossSecondMoment(history) => history.weights(),
        }
    }

    /// Probability of each t.
    pub fn probabilities(&self) -> Vec<f64> {
        let mut p = self.weights();
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        p
    }

    /// The timestep of each `u` in [0, 1): the first whose cumulative probability exceeds u; and its importance weight `1/(T p_t)`.
    pub fn pick(&self, u: &[f64]) -> Vec<(usize, f32)> {
        let steps = self.steps();
        if let TimestepDist::Uniform { .. } = self {
            return u.iter().map(|&u| (pick_uniform(u, steps), 1.0)).collect();
        }
        let weights = self.weights();
        let mut cumulative = vec![0.0; steps];
        accumulate(&weights, &mut cumulative);
        u.iter().map(|&u| pick_weighted(u, &weights, &cumulative)).collect()
    }

    /// Timesteps and importance weights of a batch: [`TimestepDist::pick`] of `word·2^-32`, where word is element 0 of Philox
    /// image `first_image + i`, step `step`, op [`op::TIMESTEP`].
    pub fn draw(&self, batch: usize, seed: u64, step: u32, first_image: u32) -> Vec<(usize, f32)> {
        let u: Vec<f64> = (0..batch as u32).map(|i| uniform(seed, step, first_image + i)).collect();
        self.pick(&u)
    }

    /// Takes the unweighted losses of a batch into the history, one after the other; a t may repeat.
    pub fn update(&mut self, t: &[usize], losses: &[f32]) {
        assert_eq!(t.len(), losses.len(), "timestep update: lengths differ");
        if let TimestepDist::LossSecondMoment(history) = self {
            t.iter().zip(losses).for_each(|(&t, &loss)| history.push(t, loss));
        }
    }

    /// The history, if this distribution has one: what a checkpoint stores.
    pub fn history(&self) -> Option<&LossHistory> {
        match self {
            TimestepDist::Uniform { .. } => None,
            TimestepDist::LossSecondMoment(history) => Some(history),
        }
    }

    /// Takes up a stored history: `losses` (T, [`HISTORY`]) and `counts` (T).
    ///
    /// # Errors
    /// [`Error::Config`] when this distribution has none, and when sizes or counts do not fit it.
    pub fn restore(&mut self, losses: Vec<f32>, counts: Vec<u32>) -> Result<()> {
        let TimestepDist::LossSecondMoment(history) = self else {
            return Err(Error::Config(
                "a loss history is stored but timesteps are drawn uniformly; use the loss-second-moment sampler".into(),
            ));
        };
        let (steps, per_step) = (history.counts.len(), history.per_step);
        if counts.len() != steps || losses.len() != steps * per_step {
            return Err(Error::Config(format!(
                "the stored loss history has {} losses and {} counts, {steps} steps need {} and {steps}; \
                 resume with the number of steps it was made with",
                losses.len(),
                counts.len(),
                steps * per_step
            )));
        }
        if let Some(t) = counts.iter().position(|&n| n as usize > per_step) {
            return Err(Error::Config(format!(
                "the stored loss history counts {} losses at t = {t}, at most {per_step} are kept; the checkpoint is damaged",
                counts[t]
            )));
        }
        (history.losses, history.counts) = (losses, counts);
        Ok(())
    }
}

impl LossHistory {
    /// An empty history.
    pub fn new(steps: usize, per_step: usize, uniform_prob: f64) -> Self {
        LossHistory { per_step, uniform_prob, losses: vec![0.0; steps * per_step], counts: vec![0; steps] }
    }

    /// Losses (T, per_step), oldest first; unfilled places are 0.
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    /// Number of filled places of each t.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// Whether every t has its full history.
    pub fn is_warm(&self) -> bool {
        self.counts.iter().all(|&n| n as usize == self.per_step)
    }

    fn push(&mut self, t: usize, loss: f32) {
        push(&mut self.losses, &mut self.counts, t, loss);
    }

    fn weights(&self) -> Vec<f64> {
        let mut w = vec![0.0; self.counts.len()];
        weights(&self.losses, &self.counts, self.uniform_prob, &mut w);
        w
    }
}

/// The number in [0, 1) that draws the timestep of one image.
pub fn uniform(seed: u64, step: u32, image: u32) -> f64 {
    f64::from(rng::philox([0, image, step, op::TIMESTEP], seed)[0]) / 4_294_967_296.0
}

/// The timestep of `u` in [0, 1) when every t is alike.
pub fn pick_uniform(u: f64, steps: usize) -> usize {
    ((u * steps as f64) as usize).min(steps - 1)
}

/// Cumulative sums of `weights`, in index order.
pub fn accumulate(weights: &[f64], cumulative: &mut [f64]) {
    let mut total = 0.0;
    for (c, w) in cumulative.iter_mut().zip(weights) {
        total += w;
        *c = total;
    }
}

/// The timestep of `u` in [0, 1) and its importance weight `1/(T p_t)`, `p = weights/Σ weights`.
pub fn pick_weighted(u: f64, weights: &[f64], cumulative: &[f64]) -> (usize, f32) {
    let steps = weights.len();
    let total = cumulative[steps - 1];
    let t = cumulative.partition_point(|&c| c / total <= u).min(steps - 1);
    (t, (total / (steps as f64 * weights[t])) as f32)
}

/// Takes one loss into the history of `t`: `losses` (T, kept), oldest first, `counts` (T).
pub fn push(losses: &mut [f32], counts: &mut [u32], t: usize, loss: f32) {
    let kept = losses.len() / counts.len();
    let row = &mut losses[t * kept..(t + 1) * kept];
    let filled = counts[t] as usize;
    if filled == kept {
        row.rotate_left(1);
        row[kept - 1] = loss;
    } else {
        row[filled] = loss;
        counts[t] += 1;
    }
}

/// Weights of a history: all 1 until every t has its full history, then by the module's formula, with sum 1.
pub fn weights(losses: &[f32], counts: &[u32], uniform_prob: f64, w: &mut [f64]) {
    let (steps, kept) = (counts.len(), losses.len() / counts.len());
    if counts.iter().any(|&n| (n as usize) < kept) {
        return w.fill(1.0);
    }
    for (w, row) in w.iter_mut().zip(losses.chunks_exact(kept)) {
        let square: f64 = row.iter().map(|&l| f64::from(l) * f64::from(l)).sum();
        *w = (square / kept as f64).sqrt();
    }
    let sum: f64 = w.iter().sum();
    w.iter_mut().for_each(|w| *w = *w / sum * (1.0 - uniform_prob) + uniform_prob / steps as f64);
}
