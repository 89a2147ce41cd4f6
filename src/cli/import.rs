//! `iddpm import`: a model of improved-diffusion, guided-diffusion or diffusers becomes a checkpoint of this program.
//!
//! The shape of the network is read off the tensors. What no tensor tells (heads, schedule, T, …) comes from a preset
//! or from flags and is stored; a missing one is an error that lists the choices. Before anything is written, one
//! noised batch runs through the network.

use super::flags::ModelFlags;
use super::{Global, create_folder, import_check};
use crate::checkpoint::{self, Checkpoint, Progress};
use crate::config::Config;
use crate::config::preset::{self, PRESETS};
use crate::error::{Error, Result};
use crate::import::optimizer::{self, Moment};
use crate::import::reference::{Family, family};
use crate::import::{Source, tensor_file::TensorFile};
use crate::train::slots;
use crate::unet::Params;
use clap::Args;
use std::path::{Path, PathBuf};

/// Flags of `iddpm import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// model*.pt, with ema_*.pt and opt*.pt beside it if wanted; or a .safetensors state dict; or a diffusers folder
    #[arg(required = true, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Checkpoint to write, or a folder with / at its end for a run to go on with [default: the name of the first file
    /// with .safetensors, in --out or here]
    #[arg(long, value_name = "PATH")]
    to: Option<PathBuf>,
    /// Configuration that the model was trained with: cifar10, imagenet64, …; the flags below change it
    #[arg(long)]
    preset: Option<String>,
    /// Take weights that were rounded to half precision
    #[arg(long)]
    allow_half: bool,
    /// Images to check the weights on: tells a wrong order of the attention's channels
    #[arg(long, value_name = "PATH")]
    check_images: Option<PathBuf>,
    #[command(flatten)]
    model: ModelFlags,
}

/// The files by what they hold.
struct Inputs {
    model: Source,
    averages: Vec<(f64, Source)>,
    optimizer: Option<TensorFile>,
}

/// Imports.
///
/// # Errors
/// [`Error::Checkpoint`] for files that cannot be used, [`Error::Config`] for settings that are missing or do not fit
/// them, [`Error::Io`]. Nothing is written then.
pub fn main(a: &ImportArgs, g: &Global) -> Result<()> {
    a.destination(g, None)?;
    let inputs = Inputs::open(&a.files)?;
    let mut config = a.config(&inputs.model)?;
    if !inputs.averages.is_empty() {
        config.train.ema_rates = inputs.averages.iter().map(|(rate, _)| *rate).collect();
    }
    config.validate()?;
    let params = Params::new(&config.model);
    let step = inputs.check(&config, &params, a.allow_half)?;
    println!("source    {}", inputs.describe(&params));
    println!(
        "network   {}",
        describe(&config, &["image-size", "channels", "num-channels", "channel-mult", "num-res-blocks"])
    );
    println!(
        "          {}",
        describe(&config, &["attention-resolutions", "num-heads", "num-head-channels", "class-cond"])
    );
    println!(
        "process   {}",
        describe(&config, &["diffusion-steps", "noise-schedule", "learn-sigma", "rescale-timesteps"])
    );
    let check = import_check::Check { config: &config, params: &params, images: a.check_images.as_deref() };
    println!("check     {}", check.run(g.open_device()?, |i| inputs.read(&config, &params, "model", i))?);
    let to = a.destination(g, Some(step))?;
    inputs.save(&to, config, &params, step)?;
    println!("written   {}", to.display());
    println!("          sample from it with: iddpm sample --model-path {}", to.display());
    Ok(())
}

/// Whether `path` is a file of another program by its name: a `.pt`, or a folder of diffusers.
pub fn is_foreign(path: &Path) -> bool {
    let ending = path.extension().is_some_and(|e| e == "pt" || e == "pth");
    ending || ["config.json", "unet/config.json"].iter().any(|name| path.join(name).is_file())
}

/// The model of another program at `path`, without writing anything; `flags` tell what it does not.
///
/// # Errors
/// Those of [`main`].
pub fn open(path: &Path, flags: &ModelFlags) -> Result<Checkpoint> {
    let files = vec![path.to_path_buf()];
    let inputs = Inputs::open(&files)?;
    let a = ImportArgs { files, to: None, preset: None, allow_half: false, check_images: None, model: flags.clone() };
    let config = a.config(&inputs.model)?;
    config.validate()?;
    let params = Params::new(&config.model);
    inputs.check(&config, &params, false)?;
    let progress = Progress { step: 0, images: 0, position: 0, config: config.clone() };
    Checkpoint::in_memory(path, progress, &["model".into()], &slots(&params), |family, i| {
        inputs.read(&config, &params, family, i)
    })
}

/// A few settings as `flag value`.
fn describe(config: &Config, flags: &[&str]) -> String {
    let settings = config.settings();
    let found = flags.iter().filter_map(|f| settings.iter().find(|(name, _)| name == f));
    found.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

impl ImportArgs {
    /// Where the checkpoint goes, once the number of its steps is known if it goes into the folder of a run.
    fn destination(&self, g: &Global, step: Option<u64>) -> Result<PathBuf> {
        if let Some(folder) = self.to.as_ref().filter(|to| to.to_string_lossy().ends_with('/')) {
            if !checkpoint::list(folder).is_empty() {
                let what = format!("{}: holds a run already: choose another folder", folder.display());
                return Err(Error::Config(what));
            }
            let Some(step) = step else { return Ok(folder.clone()) };
            create_folder(folder)?;
            return Ok(folder.join(checkpoint::file_name(step)));
        }
        let name = || {
            let stem = self.files[0].file_stem().unwrap_or_default().to_string_lossy().into_owned();
            g.out.clone().unwrap_or_default().join(format!("{stem}.safetensors"))
        };
        let to = self.to.clone().unwrap_or_else(name);
        match to.exists() {
            true => Err(Error::Config(format!("{}: already there: choose another place with --to", to.display()))),
            false => Ok(to),
        }
    }

    /// What the file tells, what the preset and the flags add; an error if they disagree or if something is missing.
    fn config(&self, source: &Source) -> Result<Config> {
        let mut c = match &self.preset {
            Some(name) => preset::preset(name)?,
            None => Config::default(),
        };
        if let (None, Some(size)) = (&self.preset, self.model.image_size) {
            c.model.image_size = size;
        }
        if let Some(size) = self.model.small_size {
            c.model.low_res = usize::try_from(size).ok();
        }
        c.model.null_class = self.model.null_class == Some(true);
        if self.preset.is_none() {
            source.apply(&mut c);
        }
        self.require(source)?;
        if c.model.low_res.is_none() && self.model.channels.is_none() && matches!(c.model.in_channels, 2 | 6) {
            let c = c.model.in_channels;
            return Err(Error::Config(format!(
                "the network of {} takes {c} channels: with super-resolution give --small-size and --image-size \
                 (or --preset upsample), with images of {c} channels --channels {c}",
                source.file.path.display()
            )));
        }
        let before = c.clone();
        self.model.apply(&mut c)?;
        let mut found = c.clone();
        source.apply(&mut found);
        let asked = before.settings().into_iter().zip(c.settings());
        for (((flag, unflagged), (_, want)), (_, have)) in asked.zip(found.settings()) {
            if have != want {
                let path = source.file.path.display();
                let origin = match &self.preset {
                    Some(name) if unflagged == want => format!("--preset {name} has {flag} {want}"),
                    _ => format!("--{flag} {want} was asked for"),
                };
                return Err(Error::Config(format!(
                    "{origin}, but the tensors of {path} say {flag} {have}{}",
                    fitting(source)
                )));
            }
        }
        Ok(found)
    }

    /// Every setting that the file does not tell is given.
    fn require(&self, source: &Source) -> Result<()> {
        let f = &self.model;
        let given = |flag: &str| match flag {
            "image-size" => f.image_size.is_some(),
            "num-heads" => f.num_heads.is_some() || f.num_head_channels.is_some(),
            "diffusion-steps" => f.diffusion_steps.is_some(),
            "noise-schedule" => f.noise_schedule.is_some(),
            _ => f.rescale_timesteps.is_some(),
        };
        let missing: Vec<String> = source.untold().iter().filter(|n| !given(n)).map(|n| format!("--{n}")).collect();
        if self.preset.is_some() || missing.is_empty() {
            return Ok(());
        }
        Err(Error::Config(format!(
            "{} does not tell everything about its model: give a --preset, or {}{}",
            source.file.path.display(),
            missing.join(" "),
            fitting(source)
        )))
    }
}

/// The presets whose network has the tensors of the file.
fn fitting(source: &Source) -> String {
    let names: Vec<&str> = PRESETS.iter().filter(|p| source.fits(&(p.build)().model)).map(|p| p.name).collect();
    match names.is_empty() {
        true => "; no preset has a network of these tensors".into(),
        false => format!("; presets with these tensors: {}", names.join(", ")),
    }
}

/// The rate in `ema_<rate>_<step>.pt`.
fn rate_of(path: &Path) -> Option<f64> {
    path.file_name()?.to_str()?.strip_prefix("ema_")?.split('_').next()?.parse().ok()
}

impl Inputs {
    fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut weights: Vec<(Option<f64>, Source)> = Vec::new();
        let mut optimizer = None;
        for path in paths {
            if path.is_dir() {
                weights.push((None, Source::open(path)?));
                continue;
            }
            let file = TensorFile::open(path)?;
            match family(&file)? {
                Family::Optimizer if optimizer.is_some() => {
                    return Err(Error::checkpoint(path, "a second optimiser state: give one"));
                }
                Family::Optimizer => optimizer = Some(file),
                _ => weights.push((rate_of(path), Source::of(file)?)),
            }
        }
        // An average alone is a model of its own.
        if let [(rate @ Some(_), _)] = &mut weights[..] {
            *rate = None;
        }
        let (models, averages): (Vec<_>, Vec<_>) = weights.into_iter().partition(|(rate, _)| rate.is_none());
        let paths: Vec<String> = models.iter().map(|(_, s)| s.file.path.display().to_string()).collect();
        let mut models = models.into_iter().map(|(_, s)| s);
        let (Some(model), None) = (models.next(), models.next()) else {
            let found = if paths.is_empty() { "none".to_string() } else { paths.join(", ") };
            return Err(Error::Config(format!(
                "one file of weights is needed, found {found} (moving averages are told by names such as \
                 ema_0.9999_500000.pt, optimiser states by what is in them)"
            )));
        };
        let averages = averages.into_iter().filter_map(|(rate, s)| Some((rate?, s))).collect();
        Ok(Inputs { model, averages, optimizer })
    }

    /// Checks every file against the tensors of the model; the number of steps of the optimiser.
    fn check(&self, config: &Config, params: &Params, half: bool) -> Result<u64> {
        let slots = slots(params);
        self.model.check(&config.model, &slots, half)?;
        for (_, average) in &self.averages {
            average.check(&config.model, &slots, half)?;
        }
        let Some(file) = &self.optimizer else { return Ok(0) };
        if config.train.schedule_sampler != crate::config::TimestepSampler::Uniform {
            let what = "the optimiser cannot go on without the loss history of loss-second-moment, which no file holds: \
                        leave it out, or use a preset with uniform t";
            return Err(Error::checkpoint(&file.path, what));
        }
        optimizer::check(file, &slots)
    }

    fn describe(&self, params: &Params) -> String {
        let mut parts = vec![format!(
            "{}: {} tensors, {} parameters",
            self.model.file.path.display(),
            params.list.len(),
            params.count()
        )];
        parts.extend(self.averages.iter().map(|(rate, _)| format!("moving average of rate {rate}")));
        parts.extend(self.optimizer.as_ref().map(|_| "state of AdamW".to_string()));
        parts.join("; ")
    }

    /// Tensor `i` of `family`.
    fn read(&self, config: &Config, params: &Params, family: &str, i: usize) -> Result<Vec<f32>> {
        let slots = slots(params);
        let average = |rate: &f64| checkpoint::ema_prefix(*rate) == family;
        let (file, values) = match (family, &self.optimizer) {
            ("adam_m", Some(file)) => (file, optimizer::moment(file, i, Moment::First)),
            ("adam_v", Some(file)) => (file, optimizer::moment(file, i, Moment::Second)),
            _ => {
                let found = self.averages.iter().find(|(rate, _)| average(rate));
                let source = found.map_or(&self.model, |(_, s)| s);
                (&source.file, source.read(&config.model, &slots[i]))
            }
        };
        file.release();
        values
    }

    fn save(&self, to: &Path, config: Config, params: &Params, step: u64) -> Result<()> {
        let mut families = vec!["model".to_string()];
        families.extend(self.averages.iter().map(|(rate, _)| checkpoint::ema_prefix(*rate)));
        if self.optimizer.is_some() {
            families.extend(["adam_m".to_string(), "adam_v".to_string()]);
        }
        let images = step * config.train.batch_size as u64;
        let progress = Progress { step, images, position: images, config };
        checkpoint::save_parts(to, &progress, &families, &slots(params), |family, i| {
            self.read(&progress.config, params, family, i)
        })
    }
}
