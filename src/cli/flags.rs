//! Flags that describe a configuration: the network and the process, shared by every command, and training.
//!
//! For a new run they change a preset; for a checkpoint they must agree with what it holds. Names are those of the
//! reference; [`super::normalise`] lets them be written with dashes or underscores.

use crate::config::{Config, FirstStep, LossType, LossWeight, MeanType, Schedule, TimestepSampler, VarType, preset};
use crate::error::{Error, Result};
use std::path::Path;

/// Every `Option<bool>` flag is marked by this value name; [`super::command`] gives them [`boolean`] as parser.
pub const BOOL: &str = "BOOL";

/// `yes true t y 1` and `no false f n 0` in any case, as the reference's flags take them.
///
/// # Errors
/// A text that is neither; clap prints it with the flag.
pub fn boolean(text: &str) -> std::result::Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "t" | "y" | "1" => Ok(true),
        "no" | "false" | "f" | "n" | "0" => Ok(false),
        _ => Err("use True or False (also yes, t, y, 1; no, f, n, 0)".into()),
    }
}

/// The network and the diffusion process.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct ModelFlags {
    /// Height and width of the images
    #[arg(long, visible_alias = "large-size", help_heading = "Network")]
    pub image_size: Option<usize>,
    /// Super-resolution: height and width of the small images that the network enlarges; -1: none
    #[arg(long, help_heading = "Network")]
    pub small_size: Option<i64>,
    /// Channels of the images [default: those of the data]
    #[arg(long, help_heading = "Network")]
    pub channels: Option<usize>,
    /// Base width of the network, a multiple of 32
    #[arg(long, help_heading = "Network")]
    pub num_channels: Option<usize>,
    /// Residual blocks per level
    #[arg(long, help_heading = "Network")]
    pub num_res_blocks: Option<usize>,
    /// Width of each level as multiples of --num-channels: 1,2,2,2
    #[arg(long, value_delimiter = ',', help_heading = "Network")]
    pub channel_mult: Option<Vec<usize>>,
    /// Image sizes at which attention runs: 16,8
    #[arg(long, value_delimiter = ',', help_heading = "Network")]
    pub attention_resolutions: Option<Vec<usize>>,
    /// Attention heads
    #[arg(long, help_heading = "Network")]
    pub num_heads: Option<usize>,
    /// Attention heads on the way up; -1 is --num-heads
    #[arg(long, help_heading = "Network")]
    pub num_heads_upsample: Option<i64>,
    /// Channels of one attention head, in place of --num-heads; -1: not used
    #[arg(long, help_heading = "Network")]
    pub num_head_channels: Option<i64>,
    /// The channels of attention are all of q, all of k, all of v, rather than grouped by head
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub use_new_attention_order: Option<bool>,
    /// Residual blocks change the size of the image, rather than single layers
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub resblock_updown: Option<bool>,
    /// Dropout probability
    #[arg(long, help_heading = "Network")]
    pub dropout: Option<f32>,
    /// Condition on the class label
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub class_cond: Option<bool>,
    /// The class table has one more row that stands for no label, as --label-dropout trains it and --guidance needs it
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub null_class: Option<bool>,
    /// Time embedding as scale and shift of a norm, rather than added
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub use_scale_shift_norm: Option<bool>,
    /// Learned resampling, rather than average pooling and plain enlargement
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub conv_resample: Option<bool>,
    /// Subtracted from the number of frequencies of the time embedding under their exponent; google/ddpm-*: 1
    #[arg(long, help_heading = "Network")]
    pub freq_shift: Option<f64>,
    /// Added to the variance in group norms; google/ddpm-*: 1e-6
    #[arg(long, help_heading = "Network")]
    pub norm_eps: Option<f64>,
    /// Padding before the image where a convolution halves it, 1 or 0; google/ddpm-*: 0
    #[arg(long, help_heading = "Network")]
    pub downsample_padding: Option<usize>,
    /// Learn the variance of the reverse step
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub learn_sigma: Option<bool>,
    /// Fixed variance: beta_tilde rather than beta
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub sigma_small: Option<bool>,
    /// Steps T of the process
    #[arg(long, help_heading = "Diffusion")]
    pub diffusion_steps: Option<usize>,
    /// Noise schedule
    #[arg(long, value_enum, help_heading = "Diffusion")]
    pub noise_schedule: Option<Schedule>,
    /// Objective L_vlb, the bound alone
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub use_kl: Option<bool>,
    /// Predict the clean image rather than the noise
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub predict_xstart: Option<bool>,
    /// Predict the velocity v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 rather than the noise
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub predict_v: Option<bool>,
    /// The network sees t·1000/T rather than t
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub rescale_timesteps: Option<bool>,
    /// Weigh the bound by T/1000 in the hybrid objective
    #[arg(long, value_name = BOOL, help_heading = "Diffusion")]
    pub rescale_learned_sigmas: Option<bool>,
    /// Term of the bound at the last step
    #[arg(long, value_enum, help_heading = "Diffusion")]
    pub vb_first_step: Option<FirstStep>,
    /// Weight of the squared error by timestep: uniform, or min-snr:5
    #[arg(long, value_name = "WEIGHT", help_heading = "Diffusion")]
    pub loss_weight: Option<LossWeight>,
    /// Accepted for the reference's command lines; the CPU computes in f32
    #[arg(long, value_name = BOOL, hide = true)]
    pub use_fp16: Option<bool>,
    /// Compute residual blocks anew in the backward pass: less memory, more work, the same bits
    #[arg(long, value_name = BOOL, help_heading = "Network")]
    pub use_checkpoint: Option<bool>,
}

/// The optimiser, the batch and what is drawn at random.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TrainFlags {
    /// Named configuration that the other flags change: digits, mnist, cifar10, cifar10-vlb, imagenet64,
    /// imagenet64-vlb, imagenet64-cond, lsun256, lsun256-bs64, upsample, guided64, guided-cifar10, reference [default: digits; reference with --data-dir]
    #[arg(long)]
    pub preset: Option<String>,
    /// Optimiser steps after which training ends [default: of the preset]
    #[arg(long, help_heading = "Training")]
    pub steps: Option<u64>,
    /// Learning rate
    #[arg(long, help_heading = "Training")]
    pub lr: Option<f64>,
    /// Decoupled weight decay
    #[arg(long, help_heading = "Training")]
    pub weight_decay: Option<f64>,
    /// Let the rate fall to 0 over this many steps and stop there; 0: constant rate
    #[arg(long, help_heading = "Training")]
    pub lr_anneal_steps: Option<u64>,
    /// Let the rate rise over this many steps; 0: at once
    #[arg(long, help_heading = "Training")]
    pub warmup_steps: Option<u64>,
    /// Largest norm of the gradients; 0: no limit
    #[arg(long, help_heading = "Training")]
    pub grad_clip: Option<f64>,
    /// Images per step
    #[arg(long, help_heading = "Training")]
    pub batch_size: Option<usize>,
    /// Images per pass, to save memory; -1: the whole batch
    #[arg(long, help_heading = "Training")]
    pub microbatch: Option<i64>,
    /// Rates of the moving averages of the weights: 0.9999,0.99
    #[arg(long, value_delimiter = ',', help_heading = "Training")]
    pub ema_rate: Option<Vec<f64>>,
    /// Choice of t
    #[arg(long, value_enum, help_heading = "Training")]
    pub schedule_sampler: Option<TimestepSampler>,
    /// Part of the labels that is replaced by the null class, for --guidance when sampling: 0.1
    #[arg(long, value_name = "P", help_heading = "Training")]
    pub label_dropout: Option<f64>,
    /// Mirror half of the images
    #[arg(long, value_name = BOOL, help_heading = "Training")]
    pub flip: Option<bool>,
    /// Use part of the steps: 250, 10,15,20, ddim50 or logsnr20
    #[arg(long, help_heading = "Diffusion")]
    pub timestep_respacing: Option<String>,
    /// Accepted for the reference's command lines; there is no loss scale in f32
    #[arg(long, hide = true)]
    pub fp16_scale_growth: Option<f64>,
}

impl ModelFlags {
    /// Changes `c` to what the flags say.
    ///
    /// # Errors
    /// [`Error::Config`] for an attention size that no level of the network has.
    pub fn apply(&self, c: &mut Config) -> Result<()> {
        let m = &mut c.model;
        let pixels: Vec<usize> = m.attention_resolutions.iter().map(|f| m.image_size / f).collect();
        if let Some(size) = self.image_size.filter(|&s| s != m.image_size) {
            m.image_size = size;
            m.channel_mult = preset::channel_mult(size).unwrap_or_else(|| m.channel_mult.clone());
        }
        set(&mut m.channel_mult, &self.channel_mult);
        let factor = |size: &usize| m.level_sizes().iter().position(|s| s == size).map(|level| 1 << level);
        m.attention_resolutions = match &self.attention_resolutions {
            Some(sizes) => sizes.iter().map(|s| factor(s).ok_or_else(|| m.no_such_level(*s))).collect::<Result<_>>()?,
            None => pixels.iter().filter_map(factor).collect(),
        };
        m.attention_resolutions.sort_unstable();
        if let Some(size) = self.small_size {
            m.low_res = usize::try_from(size).ok();
        }
        set(&mut m.in_channels, &self.channels);
        set(&mut m.model_channels, &self.num_channels);
        set(&mut m.num_res_blocks, &self.num_res_blocks);
        let tied = m.num_heads == m.num_heads_upsample;
        set(&mut m.num_heads, &self.num_heads);
        match self.num_heads_upsample {
            Some(heads) => m.num_heads_upsample = usize::try_from(heads).unwrap_or(m.num_heads),
            None if tied => m.num_heads_upsample = m.num_heads,
            None => {}
        }
        if let Some(channels) = self.num_head_channels {
            m.num_head_channels = usize::try_from(channels).ok();
        }
        set(&mut m.use_new_attention_order, &self.use_new_attention_order);
        set(&mut m.resblock_updown, &self.resblock_updown);
        set(&mut m.dropout, &self.dropout);
        set(&mut m.use_scale_shift_norm, &self.use_scale_shift_norm);
        set(&mut m.conv_resample, &self.conv_resample);
        set(&mut m.freq_shift, &self.freq_shift);
        set(&mut m.norm_eps, &self.norm_eps);
        set(&mut m.downsample_padding, &self.downsample_padding);
        match self.class_cond {
            Some(true) => m.num_classes = m.num_classes.or(Some(c.data.classes.len())),
            Some(false) => (m.num_classes, m.null_class) = (None, false),
            None => {}
        }
        set(&mut m.null_class, &self.null_class);
        if m.null_class && m.num_classes.is_none() {
            let what =
                "a null class (--null-class, --label-dropout) needs a model with classes: give --class-cond True";
            return Err(Error::Config(what.into()));
        }
        set(&mut c.train.recompute, &self.use_checkpoint);
        self.apply_diffusion(c)?;
        c.model.out_channels = c.model.in_channels * if c.diffusion.learns_variance() { 2 } else { 1 };
        Ok(())
    }

    /// The objective and the variance follow from several flags together, as in the reference.
    fn apply_diffusion(&self, c: &mut Config) -> Result<()> {
        let d = &mut c.diffusion;
        set(&mut d.diffusion_steps, &self.diffusion_steps);
        set(&mut d.noise_schedule, &self.noise_schedule);
        set(&mut d.rescale_timesteps, &self.rescale_timesteps);
        set(&mut d.vb_first_step, &self.vb_first_step);
        set(&mut d.loss_weight, &self.loss_weight);
        d.mean_type = self.mean_type(d.mean_type)?;
        let small = self.sigma_small.unwrap_or(d.var_type == VarType::FixedSmall);
        d.var_type = match (self.learn_sigma.unwrap_or(d.learns_variance()), small) {
            (true, _) => VarType::LearnedRange,
            (false, true) => VarType::FixedSmall,
            (false, false) => VarType::FixedLarge,
        };
        let kl = matches!(d.loss_type, LossType::Kl | LossType::RescaledKl);
        let rescale = self.rescale_learned_sigmas.unwrap_or(d.loss_type != LossType::Mse);
        d.loss_type = match (self.use_kl.unwrap_or(kl), rescale) {
            (true, _) => LossType::RescaledKl,
            (false, true) => LossType::RescaledMse,
            (false, false) => LossType::Mse,
        };
        Ok(())
    }

    /// What the network predicts, if without these flags it is `now`; a False takes back only its own prediction.
    fn mean_type(&self, now: MeanType) -> Result<MeanType> {
        match (self.predict_xstart, self.predict_v) {
            (Some(true), Some(true)) => {
                Err(Error::Config("--predict-xstart and --predict-v: a network predicts one of them".into()))
            }
            (Some(true), _) => Ok(MeanType::XStart),
            (_, Some(true)) => Ok(MeanType::V),
            (Some(false), _) if now != MeanType::V => Ok(MeanType::Epsilon),
            (_, Some(false)) if now == MeanType::V => Ok(MeanType::Epsilon),
            _ => Ok(now),
        }
    }

    /// What is accepted without an effect, said once.
    pub fn notes(&self) {
        if self.use_fp16 == Some(true) {
            eprintln!(
                "note: --use-fp16 has no effect: a GPU computes in bf16 with sums in f32, or as --precision says, the CPU in f32"
            );
        }
    }
}

impl TrainFlags {
    /// Changes the training settings of `c` to what the flags say.
    pub fn apply(&self, seed: Option<u64>, c: &mut Config) {
        let t = &mut c.train;
        set(&mut t.lr, &self.lr);
        set(&mut t.weight_decay, &self.weight_decay);
        set(&mut t.lr_anneal_steps, &self.lr_anneal_steps);
        // The reference ends where the rate reaches 0; --steps may end earlier.
        if let Some(end) = self.lr_anneal_steps.filter(|&n| n > 0) {
            t.steps = end;
        }
        set(&mut t.steps, &self.steps);
        set(&mut t.warmup_steps, &self.warmup_steps);
        set(&mut t.grad_clip, &self.grad_clip);
        set(&mut t.batch_size, &self.batch_size);
        if let Some(n) = self.microbatch {
            t.microbatch = usize::try_from(n).unwrap_or(0);
        }
        set(&mut t.ema_rates, &self.ema_rate);
        set(&mut t.schedule_sampler, &self.schedule_sampler);
        set(&mut t.flip, &self.flip);
        set(&mut t.label_dropout, &self.label_dropout);
        set(&mut t.seed, &seed);
        set(&mut c.diffusion.timestep_respacing, &self.timestep_respacing);
        c.model.null_class |= self.label_dropout.is_some_and(|p| p > 0.0);
    }
}

/// Overwrites `field` where the flag was given.
pub fn set<T: Clone>(field: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        field.clone_from(value);
    }
}

/// Holds what the flags ask (`asked`: the recorded configuration changed by them) against what `path` records.
///
/// # Errors
/// [`Error::Config`] naming the first flag that disagrees and both values. `free` flags may differ.
pub fn agree(path: &Path, recorded: &Config, asked: &Config, free: &[&str]) -> Result<()> {
    for ((flag, have), (_, want)) in recorded.settings().into_iter().zip(asked.settings()) {
        if have != want && !free.contains(&flag) {
            let path = path.display();
            return Err(Error::Config(format!(
                "--{flag} {want} disagrees with {path}, which has {flag} {have}: leave the flag out"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objective_and_variance_follow_the_reference() {
        let build = |f: ModelFlags| {
            let mut c = Config::default();
            f.apply(&mut c).unwrap();
            (c.diffusion.var_type, c.diffusion.loss_type, c.model.out_channels)
        };
        let none = ModelFlags::default();
        assert_eq!(build(none.clone()), (VarType::FixedLarge, LossType::RescaledMse, 3));
        let learned = ModelFlags { learn_sigma: Some(true), sigma_small: Some(true), ..none.clone() };
        assert_eq!(build(learned), (VarType::LearnedRange, LossType::RescaledMse, 6));
        let small = ModelFlags { sigma_small: Some(true), rescale_learned_sigmas: Some(false), ..none.clone() };
        assert_eq!(build(small), (VarType::FixedSmall, LossType::Mse, 3));
        let kl = ModelFlags { use_kl: Some(true), rescale_learned_sigmas: Some(true), ..none };
        assert_eq!(build(kl), (VarType::FixedLarge, LossType::RescaledKl, 3));
    }

    #[test]
    fn attention_is_given_in_pixels() {
        let mut c = Config::default();
        ModelFlags { image_size: Some(32), ..Default::default() }.apply(&mut c).unwrap();
        assert_eq!(
            (c.model.channel_mult.as_slice(), c.model.attention_resolutions.as_slice()),
            (&[1, 2, 2, 2][..], &[2, 4][..])
        );
        ModelFlags { attention_resolutions: Some(vec![4]), ..Default::default() }.apply(&mut c).unwrap();
        assert_eq!(c.model.attention_resolutions, [8]);
    }

    #[test]
    fn disagreement_names_flag_and_values() {
        let recorded = Config::default();
        let mut asked = recorded.clone();
        ModelFlags { diffusion_steps: Some(50), ..Default::default() }.apply(&mut asked).unwrap();
        let text = agree(Path::new("m.safetensors"), &recorded, &asked, &[]).unwrap_err().to_string();
        assert!(["--diffusion-steps 50", "m.safetensors", "1000"].iter().all(|p| text.contains(p)), "{text}");
        assert!(agree(Path::new("m"), &recorded, &asked, &["diffusion-steps"]).is_ok());
    }
}
