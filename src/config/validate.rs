//! What must hold between the values of a configuration, said with both values and the way out.

use super::{Config, DiffusionConfig, LossType, LossWeight, ModelConfig, Schedule, TrainConfig};
use crate::error::{Error, Result};

fn check(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Config(what())) }
}

/// `--flag value: not within low..=high`.
fn within<T: PartialOrd + std::fmt::Display>(flag: &str, value: T, low: T, high: T) -> Result<()> {
    check(value >= low && value <= high, || format!("--{flag} {value}: must lie between {low} and {high}"))
}

impl Config {
    /// Checks every setting and how they fit together.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the values and the way out.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.diffusion.validate()?;
        self.train.validate()?;
        check(!(self.train.flip && self.model.low_res.is_some()), || {
            "--flip would mirror the large images and not the small ones of --small-size: leave it out".into()
        })?;
        check(self.train.label_dropout == 0.0 || self.model.null_class, || {
            let p = self.train.label_dropout;
            format!("--label-dropout {p} replaces labels by a null class, which --null-class False leaves out")
        })?;
        let halves = if self.diffusion.learns_variance() { 2 } else { 1 };
        let (have, need) = (self.model.out_channels, halves * self.model.in_channels);
        check(have == need, || {
            let variance = if halves == 2 { "a learned" } else { "a fixed" };
            format!("the network has {have} output channels, but {variance} variance needs {need}: see --learn-sigma")
        })
    }
}

impl ModelConfig {
    /// Checks that the network can be built.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the values and the way out.
    pub fn validate(&self) -> Result<()> {
        within("image-size", self.image_size, 4, 1024)?;
        within("channels", self.in_channels, 1, 64)?;
        within("num-channels", self.model_channels, 32, 8192)?;
        within("num-res-blocks", self.num_res_blocks, 1, 64)?;
        within("channel-mult: number of levels", self.channel_mult.len(), 1, 10)?;
        within("dropout", self.dropout, 0.0, 0.99)?;
        within("freq-shift", self.freq_shift, 0.0, 1.0)?;
        within("norm-eps", self.norm_eps, 1e-12, 0.1)?;
        within("downsample-padding", self.downsample_padding, 0, 1)?;
        if let Some(small) = self.low_res {
            within("small-size", small, 1, self.image_size)?;
            check(self.image_size.is_multiple_of(small), || {
                format!("--small-size {small} does not divide the size {} of the large images", self.image_size)
            })?;
        }
        for &m in &self.channel_mult {
            within("channel-mult", m, 1, 64)?;
            let c = m * self.model_channels;
            check(c.is_multiple_of(32), || {
                format!(
                    "--num-channels {} times {m} is {c} channels, which do not divide into the 32 groups of \
                         group normalisation: use a multiple of 32",
                    self.model_channels
                )
            })?;
        }
        let levels = self.channel_mult.len();
        let factor = 1 << (levels - 1);
        check(self.image_size.is_multiple_of(factor), || {
            format!(
                "--image-size {} does not divide by {factor}, as {levels} levels need: use {} or fewer levels \
                     in --channel-mult",
                self.image_size,
                self.image_size.next_multiple_of(factor)
            )
        })?;
        self.validate_attention()?;
        check(self.num_classes.is_none_or(|n| n >= 1), || "--class-cond needs images with labels".into())?;
        self.num_classes.map_or(Ok(()), |n| within("class-cond: number of classes", n, 1, 1 << 20))
    }

    /// Size of the image at each level of the network, from the first.
    pub fn level_sizes(&self) -> Vec<usize> {
        (0..self.channel_mult.len()).map(|level| self.image_size >> level).collect()
    }

    /// The error for attention at an image size that is none of [`Self::level_sizes`].
    pub fn no_such_level(&self, size: usize) -> Error {
        let sizes: Vec<_> = self.level_sizes().iter().map(usize::to_string).collect();
        Error::Config(format!(
            "--attention-resolutions {size}: no level of the network has that size; there are {}",
            sizes.join(", ")
        ))
    }

    fn validate_attention(&self) -> Result<()> {
        let levels: Vec<usize> = (0..self.channel_mult.len()).map(|l| 1 << l).collect();
        for f in &self.attention_resolutions {
            check(levels.contains(f), || self.no_such_level(self.image_size / (*f).max(1)).to_string())?;
        }
        within("num-heads", self.num_heads, 1, 1024)?;
        within("num-heads-upsample", self.num_heads_upsample, 1, 1024)?;
        let last = self.channel_mult.len() - 1;
        let at = levels.iter().enumerate().filter(|(_, l)| self.attention_resolutions.contains(l)).map(|(i, _)| i);
        for level in at.chain([last]) {
            let c = self.channel_mult[level] * self.model_channels;
            if let Some(width) = self.num_head_channels {
                within("num-head-channels", width, 1, 8192)?;
                check(c.is_multiple_of(width), || {
                    format!("--num-head-channels {width} does not divide the {c} channels of level {level}")
                })?;
                continue;
            }
            for (flag, heads) in [("num-heads", self.num_heads), ("num-heads-upsample", self.num_heads_upsample)] {
                check(c.is_multiple_of(heads), || {
                    format!("--{flag} {heads} does not divide the {c} channels of level {level}: use a divisor of {c}")
                })?;
            }
        }
        Ok(())
    }
}

impl DiffusionConfig {
    /// Checks the process; respacing is checked where it is expanded.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag and the values.
    pub fn validate(&self) -> Result<()> {
        within("diffusion-steps", self.diffusion_steps, 2, 1_000_000)?;
        // beta ends at 0.02·1000/T, which must stay below 1.
        check(self.noise_schedule != Schedule::Linear || self.diffusion_steps > 20, || {
            let t = self.diffusion_steps;
            format!("--diffusion-steps {t}: the linear schedule needs at least 21; use --noise-schedule cosine")
        })?;
        let weighted = match self.loss_weight {
            LossWeight::Uniform => return Ok(()),
            LossWeight::MinSnr(gamma) => gamma,
        };
        within("loss-weight min-snr", weighted, 1e-6, 1e6)?;
        check(matches!(self.loss_type, LossType::Mse | LossType::RescaledMse), || {
            format!(
                "--loss-weight {} weighs the squared error, which --use-kl has not: leave one out",
                self.loss_weight
            )
        })
    }
}

impl TrainConfig {
    /// Checks the settings of the optimiser and the batch.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the values and the way out.
    pub fn validate(&self) -> Result<()> {
        within("batch-size", self.batch_size, 1, 65_536)?;
        within("microbatch", self.microbatch, 0, self.batch_size)?;
        within("label-dropout", self.label_dropout, 0.0, 0.99)?;
        within("steps", self.steps, 1, u64::from(u32::MAX))?;
        within("lr", self.lr, 0.0, 10.0)?;
        within("weight-decay", self.weight_decay, 0.0, 10.0)?;
        within("grad-clip", self.grad_clip, 0.0, 1e12)?;
        within("ema-rate: number of rates", self.ema_rates.len(), 1, 8)?;
        for (i, &rate) in self.ema_rates.iter().enumerate() {
            within("ema-rate", rate, 0.0, 0.999_999_9)?;
            check(!self.ema_rates[..i].contains(&rate), || format!("--ema-rate: {rate} is given twice"))?;
        }
        check(self.lr_anneal_steps == 0 || self.lr_anneal_steps >= self.steps, || {
            format!(
                "--steps {} goes on after the learning rate has reached 0 at --lr-anneal-steps {}: make them equal",
                self.steps, self.lr_anneal_steps
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::preset::PRESETS;
    use crate::config::{Config, LossType, LossWeight};

    #[test]
    fn presets_are_valid_and_survive_json() {
        for p in &PRESETS {
            let c = (p.build)();
            c.validate().unwrap_or_else(|e| panic!("{}: {e}", p.name));
            assert_eq!(c, serde_json::from_str(&serde_json::to_string(&c).unwrap()).unwrap(), "{}", p.name);
        }
    }

    /// Sets one thing wrong in the defaults and returns the message.
    fn message(change: impl FnOnce(&mut Config)) -> String {
        let mut c = Config::default();
        change(&mut c);
        c.validate().unwrap_err().to_string()
    }

    #[test]
    fn messages_name_both_values() {
        let cases = [
            (message(|c| c.model.image_size = 60), vec!["60", "8", "64"]),
            (message(|c| c.model.model_channels = 100), vec!["100", "32"]),
            (message(|c| c.model.num_heads = 7), vec!["--num-heads 7", "384"]),
            (message(|c| c.model.attention_resolutions = vec![16]), vec!["4", "64, 32, 16, 8"]),
            (message(|c| c.diffusion.diffusion_steps = 1), vec!["--diffusion-steps 1"]),
            (message(|c| c.diffusion.diffusion_steps = 20), vec!["--diffusion-steps 20", "21", "cosine"]),
            (
                message(|c| {
                    (c.diffusion.loss_weight, c.diffusion.loss_type) = (LossWeight::MinSnr(5.0), LossType::RescaledKl);
                }),
                vec!["--loss-weight min-snr:5", "--use-kl"],
            ),
            (message(|c| c.diffusion.loss_weight = LossWeight::MinSnr(-1.0)), vec!["--loss-weight min-snr -1"]),
            (message(|c| c.model.out_channels = 6), vec!["6", "3", "--learn-sigma"]),
            (message(|c| c.train.lr = f64::NAN), vec!["--lr NaN"]),
            (message(|c| c.train.lr_anneal_steps = 10), vec!["500000", "10"]),
            (message(|c| c.train.ema_rates = vec![0.9, 0.9]), vec!["0.9", "twice"]),
            (message(|c| c.train.label_dropout = 0.1), vec!["--label-dropout 0.1", "--null-class"]),
            (message(|c| c.train.microbatch = 33), vec!["--microbatch 33", "32"]),
        ];
        for (text, parts) in cases {
            parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
        }
    }

    #[test]
    fn learning_rate_warms_up_and_falls() {
        let mut t = Config::default().train;
        (t.lr, t.warmup_steps, t.lr_anneal_steps) = (1.0, 4, 10);
        assert_eq!([t.lr_at(0), t.lr_at(3), t.lr_at(5), t.lr_at(10)], [0.25, 0.7, 0.5, 0.0]);
        (t.batch_size, t.microbatch) = (10, 4);
        assert_eq!(t.microbatches(), [4, 4, 2]);
    }
}
