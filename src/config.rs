//! Every setting of a run as plain data: what a checkpoint stores, what the flags fill in.
//!
//! Names and defaults follow the reference's `model_and_diffusion_defaults` unless said otherwise.

use serde::{Deserialize, Serialize};

/// Noise schedule of the forward process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// beta from 1e-4 to 0.02, scaled by 1000/T (Ho et al. 2020).
    Linear,
    /// alpha_bar = cos² (Nichol & Dhariwal 2021, eq. 17).
    Cosine,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FirstStep {
    /// The discretised Gaussian log-likelihood (the paper).
    Nll,
    /// The Gaussian KL, as at every other t (simplified teaching code).
    Kl,
}

/// Choice of t in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimestepSampler {
    /// Every t alike.
    Uniform,
    /// In proportion to the root of the mean squared loss (paper, section 3.3).
    LossSecondMoment,
}

/// The network (`UNetModel` of the reference).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Height and width of the images, in pixels.
    pub image_size: usize,
    /// Channels of the images: 1, 3, …
    pub in_channels: usize,
    /// Channels of the network's output: `in_channels`, or twice that when the variance is learned.
    pub out_channels: usize,
    /// Base width of the network.
    pub model_channels: usize,
    /// Residual blocks per level.
    pub num_res_blocks: usize,
    /// Width of each level, as a multiple of `model_channels`.
    pub channel_mult: Vec<usize>,
    /// Downsampling factors at which attention runs (the flag of the same name gives image sizes).
    pub attention_resolutions: Vec<usize>,
    /// Dropout probability.
    pub dropout: f32,
    /// Number of classes, if the model is class-conditional.
    pub num_classes: Option<usize>,
    /// Attention heads.
    pub num_heads: usize,
    /// Attention heads of the output blocks (the reference's -1 is written as `num_heads` here).
    pub num_heads_upsample: usize,
    /// Time embedding as scale and shift of the second norm, rather than added before it.
    pub use_scale_shift_norm: bool,
    /// Learned resampling; otherwise average pool down and plain nearest up.
    pub conv_resample: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            image_size: 64,
            in_channels: 3,
            out_channels: 3,
            model_channels: 128,
            num_res_blocks: 2,
            channel_mult: vec![1, 2, 3, 4],
            attention_resolutions: vec![4, 8],
            dropout: 0.0,
            num_classes: None,
            num_heads: 4,
            num_heads_upsample: 4,
            use_scale_shift_norm: true,
            conv_resample: true,
        }
    }
}

/// The diffusion process and its objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiffusionConfig {
    /// T, the number of steps of the process.
    pub diffusion_steps: usize,
    /// Noise schedule.
    pub noise_schedule: Schedule,
    /// Subset of the steps in use: "", "250", "10,15,20", "ddim50".
    pub timestep_respacing: String,
    /// What the network predicts.
    pub mean_type: MeanType,
    /// Variance of the reverse step.
    pub var_type: VarType,
    /// Objective.
    pub loss_type: LossType,
    /// The network is told t·1000/T rather than t.
    pub rescale_timesteps: bool,
    /// Term of the bound at t = 0.
    pub vb_first_step: FirstStep,
}

impl Default for DiffusionConfig {
    fn default() -> Self {
        DiffusionConfig {
            diffusion_steps: 1000,
            noise_schedule: Schedule::Linear,
            timestep_respacing: String::new(),
            mean_type: MeanType::Epsilon,
            var_type: VarType::FixedLarge,
            loss_type: LossType::RescaledMse,
            rescale_timesteps: true,
            vb_first_step: FirstStep::Nll,
        }
    }
}
