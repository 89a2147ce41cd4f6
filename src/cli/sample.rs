//! `iddpm sample`: pictures from a checkpoint, as a grid, as files and as `.npz`.

use super::flags::{self, BOOL, ModelFlags};
use super::frames::FrameFlags;
use super::images;
use super::progress::Progress;
use super::{Global, create_folder, open_model};
use crate::config::{Config, DataConfig};
use crate::data::low_res::LowRes;
use crate::data::{self, DataSpec, Dataset};
use crate::error::{Error, Result};
use crate::grid::{self, ToByte};
use crate::npz::{self, Array};
use crate::ops::p_sample::Reverse;
use crate::sampler::{Pictures, SampleSettings, Sampler, Walk};
use clap::Args;
use std::path::PathBuf;

/// Largest number of pictures that also become single files without being asked.
const FILES: usize = 1000;
/// Pictures in a grid.
const GRID: usize = 256;

/// Flags of `iddpm sample`. The flags of the network are not needed; those given must agree with the checkpoint.
#[derive(Args, Clone, Debug)]
pub struct SampleArgs {
    /// Checkpoint, or a run's folder for its newest one
    #[arg(long, value_name = "PATH", default_value = "runs/digits")]
    model_path: PathBuf,
    /// Number of pictures
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    num_samples: u64,
    /// Pictures made at the same time; the result does not depend on it
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch_size: u64,
    /// Steps to use: 250, 10,15,20 or ddim50 [default: those of training]
    #[arg(long)]
    timestep_respacing: Option<String>,
    /// DDIM rather than ancestral sampling
    #[arg(long, value_name = BOOL)]
    use_ddim: Option<bool>,
    /// Noise of DDIM: 0 is none, 1 is as much as ancestral sampling
    #[arg(long)]
    eta: Option<f64>,
    /// Clip predicted images to the range of pixels [default: True]
    #[arg(long, value_name = BOOL)]
    clip_denoised: Option<bool>,
    /// Classes to draw, by number or name, in turn: 3,5 [default: all]
    #[arg(long, value_delimiter = ',')]
    labels: Option<Vec<String>>,
    /// Super-resolution: small images to enlarge, an .npz (arr_0, labels in arr_1) or a folder
    #[arg(long, value_name = "PATH")]
    base_samples: Option<PathBuf>,
    /// Moving average to sample from; 0: the live weights [default: the first]
    #[arg(long, value_name = "RATE")]
    ema_rate: Option<f64>,
    /// Also write each picture as a file [default: True up to 1000]
    #[arg(long, value_name = BOOL)]
    files: Option<bool>,
    #[command(flatten)]
    frames: FrameFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// Samples.
///
/// # Errors
/// [`Error::Checkpoint`], [`Error::Config`] for flags that disagree with it, [`Error::Io`].
pub fn main(a: &SampleArgs, g: &Global) -> Result<()> {
    a.model.notes();
    let mut model = open_model(&a.model_path, &a.model, a.ema_rate, g)?;
    let config = model.checkpoint.progress.config.clone();
    let path = model.checkpoint.path().to_path_buf();
    let mut asked = config.clone();
    a.model.apply(&mut asked)?;
    flags::agree(&path, &config, &asked, &[])?;
    let mut process = config.diffusion.clone();
    if let Some(steps) = &a.timestep_respacing {
        process.timestep_respacing.clone_from(steps);
    }
    let base = a.base(&config)?;
    let labels = a.labels(&config, base.as_ref())?;
    let batch = a.batch_size.min(a.num_samples) as usize;
    let settings = SampleSettings { reverse: a.reverse()?, clip: a.clip_denoised.unwrap_or(true), batch };
    let sampler = Sampler::new(&mut model.device, &config.model, &process, &model.params, &settings)?;
    let size = [config.model.image_size, config.model.image_size, config.model.in_channels];
    let mut trajectory = a.frames.trajectory(size, a.num_samples as usize, sampler.steps())?;
    let out = g.out.clone().unwrap_or_else(|| path.with_file_name("samples"));
    create_folder(&out)?;
    println!("model     {} (step {}, {})", path.display(), model.checkpoint.progress.step, model.weights);
    println!("sampling  {} pictures, {} {} steps", a.num_samples, sampler.steps(), a.kind());

    let seed = g.seed.unwrap_or(0);
    let seeds: Vec<u64> = (0..a.num_samples).map(|i| seed.wrapping_add(i)).collect();
    let mut progress = Progress::new("steps");
    let pictures = Pictures { seeds: &seeds, labels: labels.as_deref() };
    let each = &mut |walk: &Walk| {
        progress.at(walk.done, walk.total);
        trajectory.take(walk)
    };
    let x = match &base {
        Some(set) => sampler.enlarge(&mut model.device, pictures, &LowRes::exactly(set), each)?,
        None => sampler.run(&mut model.device, pictures, each)?,
    };
    let seconds = progress.finish();
    println!("time      {seconds:.1} s, {:.2} pictures/s", a.num_samples as f64 / seconds);
    a.write(&out, &x, &config, labels.as_deref())?;
    trajectory.write()
}

impl SampleArgs {
    fn reverse(&self) -> Result<Reverse> {
        match (self.use_ddim.unwrap_or(false), self.eta) {
            (false, Some(eta)) => Err(Error::Config(format!("--eta {eta} needs --use-ddim"))),
            (true, Some(eta)) if !(0.0..=1.0).contains(&eta) => {
                Err(Error::Config(format!("--eta {eta}: must lie between 0 and 1")))
            }
            (true, eta) => Ok(Reverse::Ddim(eta.unwrap_or(0.0))),
            (false, None) => Ok(Reverse::Ancestral),
        }
    }

    fn kind(&self) -> &'static str {
        if self.use_ddim == Some(true) { "DDIM" } else { "ancestral" }
    }

    /// The small images to enlarge, at the size of the model.
    fn base(&self, config: &Config) -> Result<Option<Dataset>> {
        match (&self.base_samples, config.model.low_res) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::Config("--base-samples: the model is not one of super-resolution".into())),
            (None, Some(_)) => {
                Err(Error::Config("a model of super-resolution needs small images: give --base-samples".into()))
            }
            (Some(path), Some(small)) => {
                let mut spec = DataSpec::new(path);
                (spec.image_size, spec.channels) = (Some(small), Some(config.model.in_channels));
                Ok(Some(data::open(&spec)?))
            }
        }
    }

    /// Class of each picture: those asked for in turn, those of the small images, or all classes in turn.
    fn labels(&self, config: &Config, base: Option<&Dataset>) -> Result<Option<Vec<i32>>> {
        let Some(classes) = config.model.num_classes else {
            return match &self.labels {
                None => Ok(None),
                Some(_) => Err(Error::Config("--labels: the model was trained without --class-cond".into())),
            };
        };
        let of_base = base.and_then(|set| set.labels.clone());
        let asked = match &self.labels {
            None if of_base.is_some() => of_base.unwrap_or_default(),
            None => (0..classes as i32).collect::<Vec<_>>(),
            Some(words) => words.iter().map(|w| class(w, classes, &config.data)).collect::<Result<_>>()?,
        };
        Ok(Some((0..self.num_samples as usize).map(|i| asked[i % asked.len()]).collect()))
    }

    fn write(&self, out: &std::path::Path, x: &[f32], config: &Config, labels: Option<&[i32]>) -> Result<()> {
        if let Some(bad) = x.iter().find(|x| !x.is_finite()) {
            return Err(Error::NonFinite(format!(
                "a picture holds {bad}: the weights are damaged, use an older checkpoint"
            )));
        }
        let size = [config.model.image_size, config.model.image_size, config.model.in_channels];
        let bytes = grid::to_bytes(x, ToByte::Round);
        let [h, w, c] = size;
        let n = bytes.len() / (h * w * c);
        let npz = out.join(format!("samples_{n}x{h}x{w}x{c}.npz"));
        let (pixels, classes) = (Array::images([n, h, w, c], bytes.clone()), labels.map(Array::labels));
        let arrays: Vec<_> = [("arr_0", &pixels)].into_iter().chain(classes.as_ref().map(|l| ("arr_1", l))).collect();
        npz::write(&npz, &arrays)?;
        println!("colour    {}", images::brightness(&bytes, &config.data));
        println!("written   {}", npz.display());
        if c == 1 || c == 3 {
            let shown = &bytes[..n.min(GRID) * h * w * c];
            let images = grid::Images::new(size, shown);
            let path = out.join("grid.png");
            images.write_grid(&path, images.visible_scale())?;
            println!("          {}", path.display());
            if self.files.unwrap_or(n <= FILES) {
                let folder = out.join("images");
                grid::Images::new(size, &bytes).write_each(&folder, 0)?;
                println!("          {}/000000.png ...", folder.display());
            }
        }
        Ok(())
    }
}

/// The number of the class called `word`, or written as a number.
fn class(word: &str, classes: usize, data: &DataConfig) -> Result<i32> {
    let by_name = data.classes.iter().position(|c| c == word);
    let label = by_name.or_else(|| word.parse().ok()).filter(|&l| l < classes);
    label.map(|l| l as i32).ok_or_else(|| {
        let names = if data.classes.len() <= 20 { format!(": {}", data.classes.join(", ")) } else { String::new() };
        Error::Config(format!("--labels {word}: the model has classes 0 to {}{names}", classes - 1))
    })
}
