//! Every setting of a run as plain data: what a checkpoint stores, what the flags fill in.
//!
//! Names and defaults follow the reference's `model_and_diffusion_defaults` and `image_train` unless said otherwise.
//! [`preset`] holds the named configurations, [`validate`] what must hold between the values.

mod choices;
pub mod preset;
pub mod validate;
pub mod weight;

pub use choices::{FirstStep, LossType, MeanType, Precision, Schedule, TimestepSampler, VarType};
pub use weight::LossWeight;

use serde::{Deserialize, Serialize};

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
    /// Channels of one attention head, in place of the numbers of heads.
    #[serde(default)]
    pub num_head_channels: Option<usize>,
    /// Super-resolution: height and width of the small images, which the network sees enlarged beside x.
    #[serde(default)]
    pub low_res: Option<usize>,
    /// Residual blocks change the size, in place of single layers.
    #[serde(default)]
    pub resblock_updown: bool,
    /// The channels of attention are all of q, all of k, all of v, rather than grouped by head.
    #[serde(default)]
    pub use_new_attention_order: bool,
    /// The class table has one row more, the last, which stands for no label: what guidance needs.
    #[serde(default)]
    pub null_class: bool,
    /// Subtracted from the number of frequencies under their exponent: 0 here and in the reference, 1 in google/ddpm-*.
    #[serde(default)]
    pub freq_shift: f64,
    /// A layout of files alone: diffusers keeps the first linear layer of this model with the columns of sines first.
    #[serde(default)]
    pub sine_first: bool,
    /// Added to the variance in every group norm: 1e-5, in google/ddpm-* 1e-6.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Padding before the image where it is halved by a convolution: 1, or 0 with one behind it alone.
    #[serde(default = "one")]
    pub downsample_padding: usize,
}

/// The reference's [`ModelConfig::norm_eps`].
fn norm_eps() -> f64 {
    1e-5
}

/// The reference's [`ModelConfig::downsample_padding`].
fn one() -> usize {
    1
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
            num_head_channels: None,
            low_res: None,
            resblock_updown: false,
            use_new_attention_order: false,
            null_class: false,
            freq_shift: 0.0,
            sine_first: false,
            norm_eps: norm_eps(),
            downsample_padding: one(),
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
    /// Subset of the steps in use: "", "250", "10,15,20", "ddim50", "logsnr20".
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
    /// Weight of the squared error by t.
    #[serde(default)]
    pub loss_weight: LossWeight,
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
            loss_weight: LossWeight::Uniform,
        }
    }
}

/// How the network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimiser steps after which training ends.
    pub steps: u64,
    /// Learning rate of AdamW (beta1 0.9, beta2 0.999, epsilon 1e-8).
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The rate falls linearly to 0 over this many steps; 0 keeps it constant.
    pub lr_anneal_steps: u64,
    /// The rate rises linearly from 0 over this many steps; 0 starts with the full rate.
    pub warmup_steps: u64,
    /// Largest Euclidean norm of the gradients; longer ones are scaled down. 0 is no limit.
    pub grad_clip: f64,
    /// Images per optimiser step.
    pub batch_size: usize,
    /// Images per forward and backward pass; 0 is the whole batch. The mean losses of the parts are summed.
    pub microbatch: usize,
    /// Moving averages of the weights: one per rate.
    pub ema_rates: Vec<f64>,
    /// Choice of t.
    pub schedule_sampler: TimestepSampler,
    /// Half of the images are mirrored left to right, drawn anew at each visit.
    pub flip: bool,
    /// Seed of every random number of the run.
    pub seed: u64,
    /// Residual blocks are computed anew in the backward pass: less memory, the same bits.
    pub recompute: bool,
    /// Probability with which the label of an image is replaced by the null class.
    #[serde(default)]
    pub label_dropout: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            steps: 500_000,
            lr: 1e-4,
            weight_decay: 0.0,
            lr_anneal_steps: 0,
            warmup_steps: 0,
            grad_clip: 0.0,
            batch_size: 32,
            microbatch: 0,
            ema_rates: vec![0.9999],
            schedule_sampler: TimestepSampler::Uniform,
            flip: false,
            seed: 0,
            recompute: false,
            label_dropout: 0.0,
        }
    }
}

impl TrainConfig {
    /// Learning rate of the 0-based `step`: warm-up times linear decay.
    pub fn lr_at(&self, step: u64) -> f64 {
        let ramp = |over: u64, at: u64| if over == 0 { 1.0 } else { (at as f64 / over as f64).min(1.0) };
        let left = if self.lr_anneal_steps == 0 { 1.0 } else { 1.0 - ramp(self.lr_anneal_steps, step) };
        self.lr * ramp(self.warmup_steps, step + 1) * left
    }

    /// Sizes of the parts of a batch: `microbatch` each, the last perhaps fewer.
    pub fn microbatches(&self) -> Vec<usize> {
        let part = if self.microbatch == 0 { self.batch_size } else { self.microbatch.min(self.batch_size) };
        (0..self.batch_size).step_by(part).map(|first| part.min(self.batch_size - first)).collect()
    }
}

/// The images a model was trained on, as a checkpoint records them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataConfig {
    /// Path of the images, or the name of a built-in set.
    pub source: String,
    /// Where the labels came from, as the flag spells it.
    pub labels: String,
    /// Which part of the set, as the flag spells it.
    pub split: String,
    /// Largest number of images taken from it.
    pub limit: Option<usize>,
    /// Number of images.
    pub images: usize,
    /// Names of the classes in the order of their labels; empty without labels.
    pub classes: Vec<String>,
    /// Hash of all pixels and labels: another set of images cannot pass for this one.
    pub fingerprint: u64,
    /// Mean of each channel, 0 to 255.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, 0 to 255.
    pub std: Vec<f64>,
}

/// Everything that decides what a run computes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network.
    pub model: ModelConfig,
    /// The diffusion process and its objective.
    pub diffusion: DiffusionConfig,
    /// How the network is trained.
    pub train: TrainConfig,
    /// What it is trained on.
    pub data: DataConfig,
}

impl Config {
    /// Every setting that a result depends on, as its flag spells it: for the head of a run and for comparing two
    /// configurations.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let (m, d, t) = (&self.model, &self.diffusion, &self.train);
        let pixels: Vec<usize> = m.attention_resolutions.iter().map(|f| m.image_size / f).collect();
        vec![
            ("image-size", m.image_size.to_string()),
            ("small-size", m.low_res.map_or("-1".into(), |s| s.to_string())),
            ("channels", m.in_channels.to_string()),
            ("num-channels", m.model_channels.to_string()),
            ("num-res-blocks", m.num_res_blocks.to_string()),
            ("channel-mult", list(&m.channel_mult)),
            ("attention-resolutions", list(&pixels)),
            ("num-heads", m.num_heads.to_string()),
            ("num-heads-upsample", m.num_heads_upsample.to_string()),
            ("dropout", m.dropout.to_string()),
            ("class-cond", m.num_classes.is_some().to_string()),
            ("null-class", m.null_class.to_string()),
            ("use-scale-shift-norm", m.use_scale_shift_norm.to_string()),
            ("conv-resample", m.conv_resample.to_string()),
            ("num-head-channels", m.num_head_channels.map_or("-1".into(), |c| c.to_string())),
            ("resblock-updown", m.resblock_updown.to_string()),
            ("use-new-attention-order", m.use_new_attention_order.to_string()),
            ("freq-shift", m.freq_shift.to_string()),
            ("norm-eps", m.norm_eps.to_string()),
            ("downsample-padding", m.downsample_padding.to_string()),
            ("learn-sigma", d.learns_variance().to_string()),
            ("sigma-small", (d.var_type == VarType::FixedSmall).to_string()),
            ("diffusion-steps", d.diffusion_steps.to_string()),
            ("noise-schedule", name(&d.noise_schedule)),
            ("predict-xstart", (d.mean_type == MeanType::XStart).to_string()),
            ("predict-v", (d.mean_type == MeanType::V).to_string()),
            ("use-kl", matches!(d.loss_type, LossType::Kl | LossType::RescaledKl).to_string()),
            ("rescale-learned-sigmas", (d.loss_type == LossType::RescaledMse).to_string()),
            ("rescale-timesteps", d.rescale_timesteps.to_string()),
            ("vb-first-step", name(&d.vb_first_step)),
            ("loss-weight", d.loss_weight.to_string()),
            ("schedule-sampler", name(&t.schedule_sampler)),
            ("steps", t.steps.to_string()),
            ("lr", t.lr.to_string()),
            ("weight-decay", t.weight_decay.to_string()),
            ("lr-anneal-steps", t.lr_anneal_steps.to_string()),
            ("warmup-steps", t.warmup_steps.to_string()),
            ("grad-clip", t.grad_clip.to_string()),
            ("batch-size", t.batch_size.to_string()),
            ("microbatch", t.microbatch.to_string()),
            ("ema-rate", list(&t.ema_rates)),
            ("flip", t.flip.to_string()),
            ("label-dropout", t.label_dropout.to_string()),
            ("seed", t.seed.to_string()),
        ]
    }
}

impl ModelConfig {
    /// Channels that the first convolution takes: those of x, and of the enlarged small image.
    pub fn input_channels(&self) -> usize {
        if self.low_res.is_some() { 2 * self.in_channels } else { self.in_channels }
    }

    /// Rows of the class table: the classes, and the null class if there is one.
    pub fn class_rows(&self) -> Option<usize> {
        self.num_classes.map(|n| n + usize::from(self.null_class))
    }

    /// The label that stands for none: the row after those of the classes.
    pub fn null_label(&self) -> Option<i32> {
        self.num_classes.filter(|_| self.null_class).map(|n| n as i32)
    }
}

impl DiffusionConfig {
    /// Whether the network's output has a second half for the variance.
    pub fn learns_variance(&self) -> bool {
        matches!(self.var_type, VarType::Learned | VarType::LearnedRange)
    }
}

/// "1,2,4".
fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// The name of a choice, as on the command line.
fn name(choice: &impl clap::ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}
