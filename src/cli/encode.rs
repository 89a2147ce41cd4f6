//! `iddpm encode`: images to the noise they come from, by DDIM backwards; `iddpm sample --latents` makes the images of it again.

use super::flags::{BOOL, ModelFlags};
use super::images::DataFlags;
use super::latents;
use super::model::Model;
use super::parts::Parts;
use super::walks::{self, Walks};
use super::{Global, create_folder};
use crate::data;
use crate::diffusion::to_unit;
use crate::error::Result;
use crate::ops::p_sample::Reverse;
use crate::sampler::{SampleSettings, Sampler};
use crate::train::check_data;
use clap::Args;
use std::path::PathBuf;

/// Flags of `iddpm encode`. The flags of the network are not needed; those given must agree with the checkpoint.
#[derive(Args, Clone, Debug)]
pub struct EncodeArgs {
    /// Checkpoint, or a run's folder for its newest one
    #[arg(long, value_name = "PATH", default_value = "runs/digits")]
    model_path: PathBuf,
    /// Number of images, evenly spaced over the set [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    num_samples: Option<u32>,
    /// Images encoded at the same time; the result does not depend on it [default: 16; on a GPU up to 128, as its memory allows]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch_size: Option<u64>,
    /// Steps to use: 250, 10,15,20, ddim50 or logsnr20 [default: those of training]
    #[arg(long)]
    timestep_respacing: Option<String>,
    /// Clip predicted images to the range of pixels [default: True]
    #[arg(long, value_name = BOOL)]
    clip_denoised: Option<bool>,
    /// Guidance as in sampling; to meet the image again sample with the same
    #[arg(long, value_name = "WEIGHT")]
    guidance: Option<f64>,
    /// Moving average to encode with; 0: the live weights [default: the first]
    #[arg(long, value_name = "RATE")]
    ema_rate: Option<f64>,
    #[command(flatten)]
    data: DataFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// Encodes.
///
/// # Errors
/// [`Error::Checkpoint`], [`Error::Config`] for flags that disagree with it, [`Error::Data`], [`Error::Io`].
pub fn main(a: &EncodeArgs, g: &Global) -> Result<()> {
    let mut settings = SampleSettings {
        reverse: Reverse::DdimReverse,
        clip: a.clip_denoised.unwrap_or(true),
        guidance: a.guidance,
        ..SampleSettings::default()
    };
    settings.validate()?;
    let mut model = Model::open(&a.model_path, &a.model, a.ema_rate, a.timestep_respacing.as_deref(), g)?;
    let config = model.config.clone();
    let mut spec = a.data.spec(&config.data, g.threads)?;
    (spec.image_size, spec.channels) = (Some(config.model.image_size), Some(config.model.in_channels));
    spec.limit = a.num_samples.map(|n| n as usize).or(spec.limit);
    let data = data::open(&spec)?;
    check_data(&config, &data)?;
    settings.batch = walks::batch(a.batch_size, data.n, &model, &settings)?;
    let sampler = Sampler::new(&mut model.device, &config.model, &model.process, &model.params, &settings)?;
    model.tell();
    println!("data      {}: {} of {} images", spec.path.display(), data.n, data.source.found);
    println!("encoding  {} steps of DDIM backwards", sampler.steps());

    let labels = data.labels.as_deref().filter(|_| config.model.num_classes.is_some());
    let x: Vec<f32> = data.pixels.iter().map(|&b| to_unit(b)).collect();
    let out = g.out.clone().unwrap_or_else(|| model.path.with_file_name("latents"));
    create_folder(&out)?;
    let walks = Walks { n: data.n, seed: 0, labels, small: None, start: Some(&x) };
    let (mut parts, mut x_t) = Parts::open::<f32>(&out, &model.key("encode", &walks.key(&settings)))?;
    let there = x_t.len() / sampler.picture();
    walks.run(&mut model.device, &sampler, there, &mut |_| Ok(()), &mut |x| {
        x_t.extend(x);
        parts.append(x)
    })?;
    let (mean, deviation) = moments(&x_t);
    println!("latents   mean {mean:.3}, deviation {deviation:.3}; pictures are drawn from mean 0, deviation 1");
    let [h, w, c] = [data.h, data.w, data.c];
    let file = out.join(format!("latents_{}x{h}x{w}x{c}.npz", data.n));
    latents::write(&file, x_t, [h, w, c], labels)?;
    println!("written   {}", file.display());
    parts.remove()
}

/// Mean and standard deviation.
fn moments(x: &[f32]) -> (f64, f64) {
    let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|&x| f(f64::from(x))).sum::<f64>() / x.len() as f64;
    let mean = mean_of(&|x| x);
    (mean, mean_of(&|x| (x - mean).powi(2)).sqrt())
}
