//! Named configurations: the models of the reference's README, and two that train on a laptop.
//!
//! Values not written here are the reference's defaults. `steps` is the length of the published run where there is one.

use super::{Config, LossType, Schedule, TimestepSampler, VarType};
use crate::error::{Error, Result};

/// A named configuration.
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// The settings.
    pub build: fn() -> Config,
}

/// Every preset, in the order of the help text.
pub const PRESETS: [Preset; 13] = [
    Preset { name: "digits", about: "built-in 16x16 handwritten digits: minutes on a laptop", build: digits },
    Preset { name: "mnist", about: "28x28 handwritten digits from the idx files", build: mnist },
    Preset { name: "cifar10", about: "32x32, L_hybrid, 500K steps", build: cifar10 },
    Preset { name: "cifar10-vlb", about: "32x32, L_vlb with importance-sampled t", build: || vlb(cifar10()) },
    Preset { name: "imagenet64", about: "64x64, L_hybrid, 1.5M steps", build: imagenet64 },
    Preset { name: "imagenet64-vlb", about: "64x64, L_vlb with importance-sampled t", build: || vlb(imagenet64()) },
    Preset { name: "imagenet64-cond", about: "64x64, class-conditional, 270M parameters", build: imagenet64_cond },
    Preset { name: "lsun256", about: "256x256, 1.2M steps of batch 128", build: lsun256 },
    Preset { name: "lsun256-bs64", about: "256x256, 2.4M steps of batch 64", build: lsun256_bs64 },
    Preset { name: "upsample", about: "64x64 to 256x256, class-conditional, 280M parameters", build: upsample },
    Preset { name: "guided64", about: "guided-diffusion's 64x64 class-conditional model", build: guided64 },
    Preset { name: "guided-cifar10", about: "guided-diffusion's network at 32x32", build: guided_cifar10 },
    Preset { name: "reference", about: "the reference's defaults, for its own command lines", build: Config::default },
];

/// The configuration called `name`.
///
/// # Errors
/// [`Error::Config`] for a name that is none of [`PRESETS`]; it lists them.
pub fn preset(name: &str) -> Result<Config> {
    let found = PRESETS.iter().find(|p| p.name == name);
    found.map(|p| (p.build)()).ok_or_else(|| {
        let names: Vec<_> = PRESETS.iter().map(|p| p.name).collect();
        Error::Config(format!("--preset {name}: no such preset; there are {}", names.join(", ")))
    })
}

/// Widths of the levels for an image size, where the reference fixes them.
pub fn channel_mult(image_size: usize) -> Option<Vec<usize>> {
    match image_size {
        16 | 28 => Some(vec![1, 2, 2]),
        32 => Some(vec![1, 2, 2, 2]),
        64 => Some(vec![1, 2, 3, 4]),
        128 => Some(vec![1, 1, 2, 3, 4]),
        256 => Some(vec![1, 1, 2, 2, 4, 4]),
        _ => None,
    }
}

fn learn_sigma(c: &mut Config) {
    c.diffusion.var_type = VarType::LearnedRange;
    c.model.out_channels = 2 * c.model.in_channels;
}

fn vlb(mut c: Config) -> Config {
    c.diffusion.loss_type = LossType::RescaledKl;
    c.train.schedule_sampler = TimestepSampler::LossSecondMoment;
    c
}

fn digits() -> Config {
    let mut c = Config::default();
    c.model.image_size = 16;
    c.model.in_channels = 1;
    c.model.model_channels = 32;
    c.model.num_res_blocks = 1;
    c.model.channel_mult = vec![1, 2];
    c.model.attention_resolutions = vec![2];
    learn_sigma(&mut c);
    c.diffusion.noise_schedule = Schedule::Cosine;
    c.train.steps = 3000;
    c.train.lr = 1e-3;
    c.train.warmup_steps = 100;
    c.train.grad_clip = 1.0;
    c.train.batch_size = 32;
    c.train.ema_rates = vec![0.995];
    c
}

fn mnist() -> Config {
    let mut c = digits();
    c.model.image_size = 28;
    c.model.channel_mult = vec![1, 2, 2];
    c.model.attention_resolutions = vec![4];
    c.train.steps = 20_000;
    c.train.lr = 5e-4;
    c.train.ema_rates = vec![0.999];
    c
}

fn cifar10() -> Config {
    let mut c = Config::default();
    c.model.image_size = 32;
    c.model.num_res_blocks = 3;
    c.model.channel_mult = vec![1, 2, 2, 2];
    c.model.attention_resolutions = vec![2, 4];
    c.model.dropout = 0.3;
    learn_sigma(&mut c);
    c.diffusion.diffusion_steps = 4000;
    c.diffusion.noise_schedule = Schedule::Cosine;
    c.train.batch_size = 128;
    c
}

fn imagenet64() -> Config {
    let mut c = cifar10();
    c.model.image_size = 64;
    c.model.channel_mult = vec![1, 2, 3, 4];
    c.model.attention_resolutions = vec![4, 8];
    c.model.dropout = 0.0;
    c.train.steps = 1_500_000;
    c
}

fn imagenet64_cond() -> Config {
    let mut c = imagenet64();
    c.model.model_channels = 192;
    c.model.num_classes = Some(1000);
    c.diffusion.loss_type = LossType::Mse;
    c.diffusion.rescale_timesteps = false;
    c.train.lr = 3e-4;
    c.train.batch_size = 2048;
    c.train.steps = 250_000;
    c
}

fn upsample() -> Config {
    let mut c = imagenet64_cond();
    c.model.image_size = 256;
    c.model.low_res = Some(64);
    c.model.num_res_blocks = 2;
    c.model.channel_mult = vec![1, 1, 2, 2, 4, 4];
    c.model.attention_resolutions = vec![16, 32];
    c.diffusion.noise_schedule = Schedule::Linear;
    c.train.batch_size = 256;
    c.train.steps = 500_000;
    c
}

/// `64x64_diffusion.pt` of guided-diffusion.
fn guided64() -> Config {
    let mut c = imagenet64_cond();
    c.model.attention_resolutions = vec![2, 4, 8];
    c.model.dropout = 0.1;
    c.model.num_head_channels = Some(64);
    c.model.resblock_updown = true;
    c.model.use_new_attention_order = true;
    c.diffusion.diffusion_steps = 1000;
    c
}

/// The network of guided-diffusion as later work trained it on CIFAR-10.
fn guided_cifar10() -> Config {
    let mut c = cifar10();
    c.model.num_head_channels = Some(32);
    c.model.resblock_updown = true;
    c.model.use_new_attention_order = true;
    c.diffusion.diffusion_steps = 1000;
    c.diffusion.rescale_timesteps = false;
    c.train.schedule_sampler = TimestepSampler::LossSecondMoment;
    c
}

fn lsun256() -> Config {
    let mut c = Config::default();
    c.model.image_size = 256;
    c.model.channel_mult = vec![1, 1, 2, 2, 4, 4];
    c.model.attention_resolutions = vec![16];
    c.model.num_heads = 1;
    c.model.num_heads_upsample = 1;
    c.model.use_scale_shift_norm = false;
    learn_sigma(&mut c);
    c.diffusion.loss_type = LossType::Mse;
    c.diffusion.rescale_timesteps = false;
    c.train.batch_size = 128;
    c.train.steps = 1_200_000;
    c
}

fn lsun256_bs64() -> Config {
    let mut c = lsun256();
    c.train.lr = 2e-5;
    c.train.batch_size = 64;
    c.train.steps = 2_400_000;
    c
}
