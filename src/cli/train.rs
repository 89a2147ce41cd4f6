//! `iddpm train`: from flags, a preset or a checkpoint to a run.

use super::flags::{self, ModelFlags, TrainFlags};
use super::images::{self, DataFlags};
use super::{Global, create_folder, reference};
use crate::bench::ceilings::Ceilings;
use crate::bench::step;
use crate::bench::timing::Effort;
use crate::checkpoint::{self, Checkpoint};
use crate::config::preset::preset;
use crate::config::{Config, ModelConfig, Precision};
use crate::data::{self, Dataset};
use crate::device::Weights;
use crate::error::{Error, Result};
use crate::graph::Target;
use crate::grid::{self, ToByte};
use crate::ops::p_sample::Reverse;
use crate::sampler::{Pictures, SampleSettings, Sampler};
use crate::train::run::{self, Options};
use crate::train::{Trainer, check_data, log};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Steps of the sampler of a preview.
const PREVIEW_STEPS: usize = 50;
/// Pictures of a preview.
const PREVIEW_PICTURES: usize = 16;
/// Pictures of a preview on the emulator.
const EMULATED_PICTURES: usize = 2;

/// Flags of `iddpm train`.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    train: TrainFlags,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    data: DataFlags,
    /// Go on from a checkpoint: a file, a run's folder, or alone the newest one in --out
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "", help_heading = "Run")]
    resume: Option<String>,
    /// The same under the reference's name; empty is a new run
    #[arg(long, value_name = "PATH", hide = true)]
    resume_checkpoint: Option<String>,
    /// Stop after this many minutes, saved
    #[arg(long, value_parser = minutes, help_heading = "Run")]
    minutes: Option<Duration>,
    /// Steps between lines of the log
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Run")]
    log_interval: u64,
    /// Steps between checkpoints [default: 10000, or a fifth of a shorter run]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Run")]
    save_interval: Option<u64>,
    /// Steps between grids of samples; 0: only at the end [default: as --save-interval]
    #[arg(long, help_heading = "Run")]
    sample_interval: Option<u64>,
    /// Checkpoints kept
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Run")]
    keep: u16,
    /// Leave the images on the host and send each batch ahead of its step, as is done with sets that the device has no room for
    #[arg(long, help_heading = "Run")]
    stream_data: bool,
    /// Write event files for TensorBoard beside log.jsonl
    #[arg(long, help_heading = "Run")]
    tensorboard: bool,
    /// Beside each checkpoint also write model*.pt, ema_*.pt, opt*.pt and progress.csv, as the reference does
    #[arg(long, help_heading = "Run")]
    reference_files: bool,
}

/// A time limit in minutes.
fn minutes(text: &str) -> std::result::Result<Duration, String> {
    let time = text.parse().ok().and_then(|m: f64| Duration::try_from_secs_f64(60.0 * m).ok());
    time.ok_or_else(|| format!("--minutes {text}: not a number of minutes"))
}

/// Where a run starts.
struct Start {
    config: Config,
    out: PathBuf,
    checkpoint: Option<Checkpoint>,
}

/// Trains.
///
/// # Errors
/// Whatever the run meets; see [`run::run`].
pub fn main(a: &TrainArgs, g: &Global) -> Result<()> {
    a.model.notes();
    let start = match a.resume_from(g) {
        Some(place) => a.resumed(&place, g)?,
        None => a.fresh(g)?,
    };
    // A device that is not there is told before a long load.
    let device = g.open_device()?;
    let (config, data) = a.with_data(start.config, start.checkpoint.is_none(), g)?;
    let mut trainer = Trainer::open(config, device, data, a.stream_data)?;
    if let Some(checkpoint) = &start.checkpoint {
        trainer.restore(checkpoint)?;
    }
    create_folder(&start.out)?;
    let out = start.out.as_path();
    println!("output    {}\n{}", out.display(), run::describe(&trainer));
    let mut preview = Preview::default();
    let options = Options { floor_s: ceiling(&trainer)?, ..a.options(out, trainer.config.train.steps) };
    run::run(&mut trainer, &options, &mut |t, path| preview.write(t, path))?;
    println!("output    {}", out.display());
    Ok(())
}

/// Least seconds of a step in bf16 on a GPU: each op at the rates of products and of copies that are measured now. None elsewhere.
fn ceiling(t: &Trainer) -> Result<Option<f64>> {
    let graph = &t.plan().graph;
    if t.device.is_emulated() || graph.target != Target::Cuda(Precision::Bf16) {
        return Ok(None);
    }
    let c = Ceilings::measure(&t.device, &Effort::default())?;
    let floor = step::floor(graph, &c);
    println!(
        "ceiling   {:.2} ms per step, {:.0} images/s: {:.0} TFLOP/s ({}), {:.2} TB/s copied, measured now",
        1e3 * floor,
        t.config.train.batch_size as f64 / floor,
        c.gflops / 1e3,
        c.instructions,
        c.gb_s / 1e3
    );
    Ok(Some(floor))
}

/// Trains a model of super-resolution.
///
/// # Errors
/// [`Error::Config`] without a size of the small images; those of [`main`].
pub fn super_res(a: &TrainArgs, g: &Global) -> Result<()> {
    let told = a.model.small_size.is_some() || a.train.preset.as_deref() == Some("upsample");
    if !told && a.resume_from(g).is_none() {
        return Err(Error::Config("super-res train needs --small-size, or --preset upsample".into()));
    }
    main(a, g)
}

/// Tells mistakes in the settings before a long load; the classes are not known yet.
fn check_settings(config: &Config) -> Result<()> {
    let model = ModelConfig { num_classes: None, ..config.model.clone() };
    Config { model, ..config.clone() }.validate()
}

impl TrainArgs {
    /// The place of the checkpoint to go on from, if one was asked for.
    fn resume_from(&self, g: &Global) -> Option<PathBuf> {
        let given = |p: &Option<String>| p.as_ref().filter(|p| !p.is_empty()).map(PathBuf::from);
        let alone = || self.resume.as_ref().map(|_| self.folder(g));
        given(&self.resume).or_else(|| given(&self.resume_checkpoint)).or_else(alone)
    }

    fn preset_name(&self) -> &str {
        let default = if self.data.data_dir.is_some() { "reference" } else { "digits" };
        self.train.preset.as_deref().unwrap_or(default)
    }

    fn folder(&self, g: &Global) -> PathBuf {
        g.out.clone().unwrap_or_else(|| Path::new("runs").join(self.preset_name()))
    }

    /// A new run: a preset changed by the flags, in a folder that holds none yet.
    fn fresh(&self, g: &Global) -> Result<Start> {
        let name = self.preset_name();
        let mut config = preset(name)?;
        if name != "digits" && self.data.data_dir.is_none() {
            return Err(Error::Config(format!("--preset {name} needs images: give --data-dir")));
        }
        self.train.apply(g.seed, &mut config);
        self.model.apply(&mut config)?;
        check_settings(&config)?;
        let out = self.folder(g);
        let (log, newest) = (out.join("log.jsonl"), checkpoint::list(&out).pop());
        let held = match newest {
            Some((step, _)) => format!("a run (step {step}): --resume goes on with it, --out DIR starts another"),
            None if log.exists() => {
                let log = log.display();
                format!("the log of a run without a checkpoint: remove {log} to start over, or give another --out")
            }
            None => return Ok(Start { config, out, checkpoint: None }),
        };
        Err(Error::Config(format!("{} already holds {held}", out.display())))
    }

    /// The run whose checkpoint lies at `place`; flags may lengthen it and fit it to the memory of a device. How an imported
    /// model goes on is free.
    fn resumed(&self, place: &Path, g: &Global) -> Result<Start> {
        let path = checkpoint::find(place)?;
        let checkpoint = Checkpoint::open(&path)?;
        let mut config = checkpoint.progress.config.clone();
        let mut asked = match &self.train.preset {
            None => config.clone(),
            Some(name) => {
                let mut asked = preset(name)?;
                asked.data = config.data.clone();
                asked.model.in_channels = config.model.in_channels;
                asked
            }
        };
        self.train.apply(g.seed, &mut asked);
        self.model.apply(&mut asked)?;
        if checkpoint.imported() {
            config.train = asked.train.clone();
        }
        flags::agree(&path, &config, &asked, &["steps", "microbatch"])?;
        config.train.steps = self.train.steps.unwrap_or(config.train.steps);
        let parts = [&config, &asked].map(|c| c.train.microbatches()[0]);
        if parts[0] != parts[1] {
            let [had, has] = parts;
            eprintln!(
                "note: {has} images per pass, where the run had {had}: the same training, rounded otherwise from here on"
            );
            config.train.microbatch = asked.train.microbatch;
        }
        check_settings(&config)?;
        config.train.recompute = asked.train.recompute;
        let out = g.out.clone().or_else(|| path.parent().map(Path::to_path_buf)).unwrap_or_default();
        Ok(Start { config, out, checkpoint: Some(checkpoint) })
    }

    /// Loads the images and fills in what depends on them: the record; for a new run also channels and classes.
    fn with_data(&self, mut config: Config, new: bool, g: &Global) -> Result<(Config, Dataset)> {
        if !new && config.data.source.is_empty() && self.data.data_dir.is_none() {
            return Err(Error::Config("an imported model knows no images to go on with: give --data-dir".into()));
        }
        let mut spec = self.data.spec(&config.data, g.threads)?;
        spec.image_size = Some(config.model.image_size);
        spec.channels = if new { self.model.channels } else { Some(config.model.in_channels) };
        let data = data::open(&spec)?;
        if new {
            config.model.in_channels = data.c;
            config.model.out_channels = data.c * if config.diffusion.learns_variance() { 2 } else { 1 };
            config.model.num_classes = config.model.num_classes.map(|_| data.classes.len());
        }
        config.data = images::record_data(&spec, &data);
        check_data(&config, &data)?;
        Ok((config, data))
    }

    fn options(&self, out: &Path, steps: u64) -> Options {
        let save_interval = self.save_interval.unwrap_or(steps.div_ceil(5).min(10_000));
        Options {
            out: out.into(),
            log_interval: self.log_interval,
            save_interval,
            sample_interval: self.sample_interval.unwrap_or(save_interval),
            keep: self.keep.into(),
            tensorboard: self.tensorboard,
            time_limit: self.minutes,
            floor_s: None,
            saved: self.reference_files.then_some(reference::files::write),
        }
    }
}

/// Grids of samples during training: DDIM with few steps, the same seeds every time.
#[derive(Default)]
struct Preview(Option<Sampler>);

impl Preview {
    /// Writes a grid to `path`; returns what it is and how its brightness compares with the data.
    fn write(&mut self, t: &mut Trainer, path: &Path) -> Result<String> {
        let began = Instant::now();
        let c = t.config.clone();
        let count = if t.device.is_emulated() { EMULATED_PICTURES } else { PREVIEW_PICTURES };
        let sampler = match &mut self.0 {
            Some(sampler) => sampler,
            none => {
                let mut process = c.diffusion.clone();
                if t.process_steps() > PREVIEW_STEPS {
                    process.timestep_respacing = PREVIEW_STEPS.to_string();
                }
                let settings =
                    SampleSettings { reverse: Reverse::Ddim(0.0), batch: count, ..SampleSettings::default() };
                match Sampler::new(&mut t.device, &c.model, &process, &t.params, &settings) {
                    Ok(sampler) => none.insert(sampler),
                    // Training goes on where there is no memory left for pictures.
                    Err(e @ Error::Device(_)) => return Ok(format!("samples   none: {e}")),
                    Err(e) => return Err(e),
                }
            }
        };
        let average = run::ready_average(&c.train.ema_rates, t.step);
        t.device.set_weights(sampler.id(), average.map_or(Weights::Live, Weights::Ema));
        let seeds: Vec<u64> = (0..count as u64).map(|i| c.train.seed.wrapping_add(i)).collect();
        let labels = c.model.num_classes.map(|n| (0..count).map(|i| (i % n) as i32).collect::<Vec<_>>());
        let pictures = Pictures { first: 0, seeds: &seeds, labels: labels.as_deref() };
        let x = match &t.low_res {
            Some(small) => sampler.enlarge(&mut t.device, pictures, small, &mut |_| Ok(()))?,
            None => sampler.run(&mut t.device, pictures, &mut |_| Ok(()))?,
        };
        let bytes = grid::to_bytes(&x, ToByte::Round);
        let images = grid::Images::new([c.model.image_size, c.model.image_size, c.model.in_channels], &bytes);
        images.write_grid(path, images.visible_scale())?;
        let weights = average.map_or("live weights, the averages are younger than their half-life".into(), |i| {
            format!("average of rate {}", c.train.ema_rates[i])
        });
        Ok(format!(
            "samples   {} ({} DDIM steps, {weights}, {})\n          {}",
            path.display(),
            sampler.steps(),
            log::duration(began.elapsed().as_secs_f64()),
            images::brightness(&bytes, c.model.in_channels, &c.data)
        ))
    }
}
