//! The settings that are one of a few.

use serde::{Deserialize, Serialize};

/// Noise schedule of the forward process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// beta from 1e-4 to 0.02, scaled by 1000/T (Ho et al. 2020).
    Linear,
    /// alpha_bar = cos² (Nichol & Dhariwal 2021, eq. 17).
    Cosine,
    /// alpha_bar falls as a sigmoid from -3 to 3 (Jabri et al. 2022).
    Sigmoid,
}

/// What the first half of the network's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MeanType {
    /// The noise eps.
    Epsilon,
    /// The clean image x_0.
    XStart,
    /// The previous image x_{t-1} (the posterior mean).
    PreviousX,
    /// The velocity v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022).
    V,
}

/// Where the variance of p(x_{t-1} | x_t) comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VarType {
    /// beta_tilde.
    FixedSmall,
    /// beta (entry 0: beta_tilde of entry 1).
    FixedLarge,
    /// The second half of the output is the log-variance itself.
    Learned,
    /// The second half interpolates: exp(v log beta + (1-v) log beta_tilde), v = (out+1)/2.
    LearnedRange,
}

/// Training objective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossType {
    /// L_simple, plus the unscaled bound when the variance is learned.
    Mse,
    /// L_simple, plus the bound times T/1000 when the variance is learned: L_hybrid.
    RescaledMse,
    /// The bound term, in bits/dim.
    Kl,
    /// The bound term times T: an estimate of the whole bound, L_vlb.
    RescaledKl,
}

/// The term of the bound at t = 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FirstStep {
    /// The discretised Gaussian log-likelihood (the paper).
    Nll,
    /// The Gaussian KL, as at every other t (simplified teaching code).
    Kl,
}

/// Choice of t in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TimestepSampler {
    /// Every t alike.
    Uniform,
    /// In proportion to the root of the mean squared loss (paper, section 3.3).
    LossSecondMoment,
}

/// Numbers of the network on CUDA: activations and the weights that products read. The processor computes in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// bfloat16, with sums, statistics and master weights in f32.
    #[default]
    Bf16,
    /// f32 throughout: slow, for checking.
    F32,
}

impl Precision {
    /// As the flag has it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Bf16 => "bf16",
            Precision::F32 => "f32",
        }
    }
}
