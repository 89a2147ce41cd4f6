//! `iddpm sample`: pictures from a checkpoint, as a grid, as files and as `.npz`.

use super::flags::{BOOL, ModelFlags};
use super::frames::FrameFlags;
use super::images;
use super::latents::{LatentFlags, Start};
use super::model::Model;
use super::parts::Parts;
use super::walks::{self, Walks};
use super::{Global, create_folder};
use crate::config::{Config, DataConfig};
use crate::data::low_res::LowRes;
use crate::data::{self, DataSpec, Dataset};
use crate::error::{Error, Result};
use crate::grid::{self, ToByte};
use crate::npz::{self, Array};
use crate::ops::p_sample::Reverse;
use crate::sampler::{SampleSettings, Sampler};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// Largest number of pictures that also become single files without being asked.
const FILES: usize = 1000;
/// Pictures, if no number is asked for.
const PICTURES: u64 = 64;
/// Pictures in a grid.
const GRID: usize = 256;

/// Flags of `iddpm sample`. The flags of the network are not needed; those given must agree with the checkpoint.
#[derive(Args, Clone, Debug)]
pub struct SampleArgs {
    /// Checkpoint, or a run's folder for its newest one
    #[arg(long, value_name = "PATH", default_value = "runs/digits")]
    model_path: PathBuf,
    /// Number of pictures; with --interpolate those of a row [default: 64; of --latents all; in a row 8]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    num_samples: Option<u64>,
    /// Pictures made at the same time; the result does not depend on it [default: 16; on a GPU up to 128, as its memory allows]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch_size: Option<u64>,
    /// Steps to use: 250, 10,15,20, ddim50 or logsnr20 [default: those of training]
    #[arg(long)]
    timestep_respacing: Option<String>,
    /// How a picture comes out of noise [default: ancestral]
    #[arg(long, value_enum)]
    sampler: Option<Kind>,
    /// The same as --sampler ddim
    #[arg(long, value_name = BOOL)]
    use_ddim: Option<bool>,
    /// Noise of DDIM, 0 to 1: 0 is none, 1 is as much as ancestral sampling
    #[arg(long)]
    eta: Option<f64>,
    /// Classifier-free guidance of a model trained with --label-dropout: 1 is none, 2 to 4 are usual
    #[arg(long, value_name = "WEIGHT")]
    guidance: Option<f64>,
    /// Bound predicted images by this quantile of their magnitudes and scale them, rather than clip: 0.995
    #[arg(long, value_name = "QUANTILE")]
    dynamic_threshold: Option<f64>,
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
    latents: LatentFlags,
    #[command(flatten)]
    frames: FrameFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// The samplers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Draws every step: the reference's, best with many
    Ancestral,
    /// First order, without noise unless --eta asks for it
    Ddim,
    /// Second order from the prediction before, one call of the network a step: for 10 to 50 steps
    #[value(name = "dpm-solver++", alias = "dpm-solver")]
    DpmSolver,
    /// Second order, two calls of the network a step
    Heun,
}

impl Kind {
    /// What it is called in a sentence.
    fn title(self) -> &'static str {
        match self {
            Kind::Ancestral => "ancestral",
            Kind::Ddim => "DDIM",
            Kind::DpmSolver => "DPM-Solver++",
            Kind::Heun => "Heun",
        }
    }
}

/// Samples.
///
/// # Errors
/// [`Error::Checkpoint`], [`Error::Config`] for flags that disagree with it, [`Error::Io`].
pub fn main(a: &SampleArgs, g: &Global) -> Result<()> {
    let mut settings = a.settings()?;
    let mut model = Model::open(&a.model_path, &a.model, a.ema_rate, a.timestep_respacing.as_deref(), g)?;
    let config = model.config.clone();
    a.advise(&model.process.timestep_respacing)?;
    let size = [config.model.image_size, config.model.image_size, config.model.in_channels];
    let (base, start) = (a.base(&config)?, a.latents.start(size, a.num_samples)?);
    if let (Some(_), Some(_)) = (&base, &start) {
        return Err(Error::Config("--base-samples and --latents or --interpolate: give one".into()));
    }
    let n = start.as_ref().map_or(a.num_samples.unwrap_or(PICTURES) as usize, |s| s.pictures);
    let labels = a.labels(&config, base.as_ref(), start.as_ref(), n)?;
    settings.batch = walks::batch(a.batch_size, n, &model, &settings)?;
    let sampler = Sampler::new(&mut model.device, &config.model, &model.process, &model.params, &settings)?;
    let mut trajectory = a.frames.trajectory(size, n, sampler.steps())?;
    let out = g.out.clone().unwrap_or_else(|| model.path.with_file_name("samples"));
    create_folder(&out)?;
    model.tell();
    let (steps, calls) = (sampler.steps(), sampler.calls());
    let calls = if calls == steps { String::new() } else { format!(" ({calls} calls of the network)") };
    println!("sampling  {n} pictures, {steps} {} steps{calls}", a.kind()?.title());

    let seed = g.seed.unwrap_or(0);
    let x_t = start.as_ref().map(|s| &s.x[..]);
    let walks = Walks { n, seed, labels: labels.as_deref(), small: base.as_ref().map(LowRes::exactly), start: x_t };
    let mut key = model.key("sample", &walks.key(&settings));
    if trajectory.is_wanted() {
        key += "; frames";
    }
    let (mut parts, mut pixels) = Parts::open::<u8>(&out, &key)?;
    if trajectory.is_wanted() {
        // The way of pictures that are there already would be missing.
        parts.start_over()?;
        pixels.clear();
    }
    let there = n.min(pixels.len() / sampler.picture());
    pixels.truncate(there * sampler.picture());
    walks.run(&mut model.device, &sampler, there, &mut |walk| trajectory.take(walk), &mut |x| {
        let made = grid::to_bytes(x, ToByte::Round);
        parts.append(&made)?;
        pixels.extend(made);
        Ok(())
    })?;
    a.write(&out, &pixels, &config, labels.as_deref(), start.and_then(|s| s.columns))?;
    trajectory.write()?;
    parts.remove()
}

impl SampleArgs {
    fn kind(&self) -> Result<Kind> {
        match (self.sampler, self.use_ddim) {
            (Some(kind), Some(ddim)) if ddim != (kind == Kind::Ddim) => {
                Err(Error::Config(format!("--sampler {} disagrees with --use-ddim {ddim}: leave one out", name(kind))))
            }
            (Some(kind), _) => Ok(kind),
            (None, Some(true)) => Ok(Kind::Ddim),
            (None, None) if self.latents.given() => Ok(Kind::Ddim),
            (None, _) => Ok(Kind::Ancestral),
        }
    }

    /// Tells of a choice of steps that does not suit the sampler.
    fn advise(&self, respacing: &str) -> Result<()> {
        if self.kind()? == Kind::DpmSolver && respacing.trim().parse::<usize>().is_ok() {
            eprintln!(
                "note: dpm-solver++ extrapolates from step to step and is best with even steps of the log-SNR: \
                 --timestep-respacing logsnr{respacing}"
            );
        }
        Ok(())
    }

    fn settings(&self) -> Result<SampleSettings> {
        if let (Some(quantile), Some(false)) = (self.dynamic_threshold, self.clip_denoised) {
            let what = format!("--dynamic-threshold {quantile} bounds predicted images: leave --clip-denoised out");
            return Err(Error::Config(what));
        }
        let settings = SampleSettings {
            reverse: self.reverse()?,
            clip: self.clip_denoised.unwrap_or(true),
            guidance: self.guidance,
            dynamic_threshold: self.dynamic_threshold,
            ..SampleSettings::default()
        };
        settings.validate()?;
        if self.latents.given() && settings.reverse.draws() {
            return Err(Error::Config(format!(
                "--sampler {}{} draws noise on the way, so that its pictures are no function of their latents: use ddim \
                 without --eta, dpm-solver++ or heun",
                name(self.kind()?),
                self.eta.map_or(String::new(), |eta| format!(" --eta {eta}")),
            )));
        }
        Ok(settings)
    }

    fn reverse(&self) -> Result<Reverse> {
        match (self.kind()?, self.eta) {
            (Kind::Ddim, eta) => Ok(Reverse::Ddim(eta.unwrap_or(0.0))),
            (kind, Some(eta)) => {
                Err(Error::Config(format!("--eta {eta} needs --sampler ddim or --use-ddim: {} has none", name(kind))))
            }
            (Kind::Ancestral, None) => Ok(Reverse::Ancestral),
            (Kind::DpmSolver, None) => Ok(Reverse::DpmSolver),
            (Kind::Heun, None) => Ok(Reverse::Heun),
        }
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

    /// Class of each of `n` pictures: those asked for in turn, those of the latents or of the small images, or all classes in turn;
    /// the pictures of a row of --interpolate share one.
    fn labels(
        &self,
        config: &Config,
        base: Option<&Dataset>,
        start: Option<&Start>,
        n: usize,
    ) -> Result<Option<Vec<i32>>> {
        let Some(classes) = config.model.num_classes else {
            return match &self.labels {
                None => Ok(None),
                Some(_) => Err(Error::Config("--labels: the model was trained without --class-cond".into())),
            };
        };
        let known = start.and_then(|s| s.labels.clone()).or_else(|| base.and_then(|set| set.labels.clone()));
        let asked = match (&self.labels, known) {
            (None, Some(known)) if start.is_some() => return Ok(Some(known)),
            (None, Some(known)) => known,
            (None, None) => (0..classes as i32).collect::<Vec<_>>(),
            (Some(words), _) => words.iter().map(|w| class(w, classes, &config.data)).collect::<Result<_>>()?,
        };
        let columns = start.and_then(|s| s.columns).unwrap_or(1);
        Ok(Some((0..n).map(|i| asked[i / columns % asked.len()]).collect()))
    }

    /// Writes the pictures; those of --interpolate in rows of `columns`.
    fn write(
        &self,
        out: &Path,
        bytes: &[u8],
        config: &Config,
        labels: Option<&[i32]>,
        columns: Option<usize>,
    ) -> Result<()> {
        let size = [config.model.image_size, config.model.image_size, config.model.in_channels];
        let [h, w, c] = size;
        let n = bytes.len() / (h * w * c);
        let npz = out.join(format!("samples_{n}x{h}x{w}x{c}.npz"));
        let (pixels, classes) = (Array::images([n, h, w, c], bytes.to_vec()), labels.map(Array::labels));
        let arrays: Vec<_> = [("arr_0", &pixels)].into_iter().chain(classes.as_ref().map(|l| ("arr_1", l))).collect();
        npz::write(&npz, &arrays)?;
        println!("colour    {}", images::brightness(bytes, c, &config.data));
        println!("written   {}", npz.display());
        if c == 1 || c == 3 {
            let shown = grid::Images::new(size, &bytes[..if columns.is_some() { n } else { n.min(GRID) } * h * w * c]);
            let path = out.join(if columns.is_some() { "interpolation.png" } else { "grid.png" });
            match columns {
                Some(columns) => shown.write_table(&path, columns, shown.visible_scale())?,
                None => shown.write_grid(&path, shown.visible_scale())?,
            }
            println!("          {}", path.display());
            if self.files.unwrap_or(n <= FILES) {
                let folder = out.join("images");
                let removed = grid::Images::new(size, bytes).write_all(&folder)?;
                let before =
                    if removed > 0 { format!(" ({removed} more of an earlier run removed)") } else { String::new() };
                println!("          {}/000000.png ...{before}", folder.display());
            }
        }
        Ok(())
    }
}

/// The name of a sampler on the command line.
fn name(kind: Kind) -> String {
    kind.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
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
