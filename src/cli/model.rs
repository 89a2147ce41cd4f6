//! A trained model on a device, which `sample`, `encode` and `nll` begin with.

use super::parts::checksum;
use super::{Global, flags, import};
use crate::checkpoint::{self, Checkpoint};
use crate::config::{Config, DiffusionConfig};
use crate::device::Device;
use crate::error::Result;
use crate::graph::Region;
use crate::ops::fast::Isa;
use crate::train::{run, slots};
use crate::unet::Params;
use std::path::{Path, PathBuf};

/// See the module.
pub struct Model {
    /// The file it came from.
    pub path: PathBuf,
    /// Every setting.
    pub config: Config,
    /// The process, with the steps that were asked for.
    pub process: DiffusionConfig,
    /// Its tensors.
    pub params: Params,
    /// The device whose parameter region holds the chosen weights.
    pub device: Device,
    /// Steps of training.
    step: u64,
    /// Which weights those are, in words.
    weights: String,
    /// Their checksum.
    checksum: u32,
}

impl Model {
    /// Opens the checkpoint at `path` (a file or a run's folder) with the moving average `rate`: the first of the
    /// configuration if None, the live weights if 0; and with the steps `respacing`: those of training if None. A `.pt` or a folder of
    /// diffusers is brought in as `flags` describe it; with a checkpoint of ours they must agree.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::error::Error::Checkpoint) for a file that cannot be used or a rate that it does not hold,
    /// [`Error::Config`](crate::error::Error::Config) for flags that disagree with it.
    pub fn open(
        path: &Path,
        flags: &flags::ModelFlags,
        rate: Option<f64>,
        respacing: Option<&str>,
        global: &Global,
    ) -> Result<Self> {
        flags.notes();
        let checkpoint = match import::is_foreign(path) {
            true => import::open(path, flags)?,
            false => Checkpoint::open(&checkpoint::find(path)?)?,
        };
        let (config, step) = (checkpoint.progress.config.clone(), checkpoint.progress.step);
        let path = checkpoint.path().to_path_buf();
        let mut asked = config.clone();
        flags.apply(&mut asked)?;
        flags::agree(&path, &config, &asked, &[])?;
        let params = Params::new(&config.model);
        let rate = rate.unwrap_or(if checkpoint.has_averages() { config.train.ema_rates[0] } else { 0.0 });
        let (flat, weights) = if rate == 0.0 {
            (checkpoint.weights(&slots(&params), params.len)?, "live weights".to_string())
        } else {
            let age = run::half_life(rate);
            if step < age {
                eprintln!(
                    "warning: the moving average of rate {rate} is {step} steps old, younger than its half-life of {age} \
                     steps, and still near the random start: train longer, or use --ema-rate 0 for the live weights"
                );
            }
            (checkpoint.ema(rate, &slots(&params), params.len)?, format!("moving average of rate {rate}"))
        };
        let mut device = global.open_device()?;
        device.write_region(Region::Params, &flat)?;
        let mut process = config.diffusion.clone();
        if let Some(steps) = respacing {
            process.timestep_respacing = steps.into();
        }
        let checksum = checksum(&flat);
        Ok(Model { path, config, process, params, device, step, weights, checksum })
    }

    /// Tells which it is.
    pub fn tell(&self) {
        println!("model     {} (step {}, {})", self.path.display(), self.step, self.weights);
    }

    /// All that the results of `command` depend on, for [`super::parts::Parts`]; `more` is what the command adds.
    pub fn key(&self, command: &str, more: &str) -> String {
        let device = match &self.device {
            Device::Cpu(_) => format!("{:?}", Isa::detect()),
            Device::Cuda(_) => self.device.describe(),
        };
        let (version, network, process) = (env!("CARGO_PKG_VERSION"), &self.config.model, &self.process);
        format!("iddpm {version} {command}: {more}; weights {:08x}; {device}; {network:?}; {process:?}", self.checksum)
    }
}
