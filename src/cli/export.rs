//! `iddpm export`: a checkpoint as a state dict of the reference, or as a folder for diffusers.

use super::Global;
use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::import::export::{self, Model};
use crate::train::slots;
use crate::unet::Params;
use clap::Args;
use std::path::PathBuf;

/// Flags of `iddpm export`.
#[derive(Args, Clone, Debug)]
pub struct ExportArgs {
    /// Checkpoint, or a run's folder for its newest one
    #[arg(value_name = "PATH")]
    checkpoint: PathBuf,
    /// What to write: a file ending in .pt or .safetensors is a state dict, another name a diffusers folder
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Moving average to export; 0: the live weights [default: the first, or the weights if there is none]
    #[arg(long, value_name = "RATE")]
    ema_rate: Option<f64>,
}

/// Exports.
///
/// # Errors
/// [`Error::Checkpoint`], [`Error::Config`] for a network that the format cannot hold, [`Error::Io`].
pub fn main(a: &ExportArgs, _: &Global) -> Result<()> {
    if a.to.is_file() {
        return Err(Error::Config(format!("{}: already there: choose another name", a.to.display())));
    }
    let c = Checkpoint::open(&checkpoint::find(&a.checkpoint)?)?;
    let config = &c.progress.config;
    let params = Params::new(&config.model);
    let slots = slots(&params);
    let first = if c.has_averages() { config.train.ema_rates[0] } else { 0.0 };
    let rate = a.ema_rate.unwrap_or(first);
    let (flat, what) = match rate {
        0.0 => (c.weights(&slots, params.len)?, "live weights".to_string()),
        _ => (c.ema(rate, &slots, params.len)?, format!("moving average of rate {rate}")),
    };
    export::write(&a.to, &Model { config, slots: &slots, flat: &flat })?;
    println!("model     {} (step {}, {what})", c.path().display(), c.progress.step);
    println!("written   {}", a.to.display());
    if a.to.is_dir() && config.diffusion.rescale_timesteps && config.diffusion.diffusion_steps != 1000 {
        let factor = 1000.0 / config.diffusion.diffusion_steps as f64;
        println!(
            "note: this network was told t·{factor} rather than t; multiply the timesteps given to the UNet2DModel by it"
        );
    }
    Ok(())
}
