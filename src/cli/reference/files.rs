//! Results under the reference's names: `modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt`, `optNNNNNN.pt`, `progress.csv` beside a
//! checkpoint, and the terms of the bound as `vb_terms.npz`, `mse_terms.npz`, `xstart_mse_terms.npz`.

use crate::checkpoint::Checkpoint;
use crate::cli::create_folder;
use crate::config::{Config, LossType};
use crate::error::{Error, Result};
use crate::import::{export, export::Model, optimizer};
use crate::nll::NllReport;
use crate::npz::{self, Array, Values};
use crate::train::slots;
use crate::unet::Params;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Writes what the reference would have saved beside the checkpoint at `path`: weights, averages, the optimiser's state, the log.
/// The `.pt` files go to `DIFFUSION_BLOB_LOGDIR` if that is set.
///
/// # Errors
/// [`Error::Io`] when the disk refuses, [`Error::Config`] for a network too large for a `.pt`.
pub fn write(path: &Path) -> Result<()> {
    let beside = path.parent().map(Path::to_path_buf).unwrap_or_default();
    let blobs = std::env::var_os("DIFFUSION_BLOB_LOGDIR").filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = blobs.unwrap_or_else(|| beside.clone());
    create_folder(&folder)?;
    let c = Checkpoint::open(path)?;
    let (config, step) = (&c.progress.config, c.progress.step);
    let params = Params::new(&config.model);
    let slots = slots(&params);
    let model =
        |name: String, flat: Vec<f32>| export::write(&folder.join(name), &Model { config, slots: &slots, flat: &flat });
    model(format!("model{step:06}.pt"), c.weights(&slots, params.len)?)?;
    for &rate in &config.train.ema_rates {
        model(format!("ema_{rate}_{step:06}.pt"), c.ema(rate, &slots, params.len)?)?;
    }
    let moments = c.moments(&slots, params.len)?;
    optimizer::write(&folder.join(format!("opt{step:06}.pt")), &slots, &moments, step, &config.train)?;
    let log = beside.join("log.jsonl");
    let text = std::fs::read_to_string(&log).map_err(Error::io(&log, "read"))?;
    let csv = beside.join("progress.csv");
    std::fs::write(&csv, progress(&text, config)).map_err(Error::io(&csv, "write"))
}

/// The log as the reference's table: a column per name, in the order of names, empty where a line lacks one.
fn progress(log: &str, config: &Config) -> String {
    let lines: Vec<Map<String, Value>> = log.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let rows: Vec<Map<String, Value>> = lines.iter().map(|l| row(l, config)).collect();
    let names: BTreeSet<&String> = rows.iter().flat_map(|r| r.keys()).collect();
    let mut text = names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(",") + "\n";
    for row in &rows {
        let cell = |n: &&String| row.get(*n).map_or(String::new(), Value::to_string);
        text += &(names.iter().map(cell).collect::<Vec<_>>().join(",") + "\n");
    }
    text
}

/// A line of the log under the reference's names. Its `vb` is the weighted term of the loss, ours the term times T.
fn row(line: &Map<String, Value>, config: &Config) -> Map<String, Value> {
    let d = &config.diffusion;
    let vb = match d.loss_type {
        LossType::RescaledMse => Some(1e-3),
        LossType::Mse => Some(1.0 / d.diffusion_steps as f64),
        LossType::Kl | LossType::RescaledKl => None,
    };
    let hybrid = d.learns_variance();
    let one = |(name, value): (&String, &Value)| {
        let (base, quarter) =
            name.rsplit_once("_q").map_or((name.as_str(), String::new()), |(b, q)| (b, format!("_q{q}")));
        match base {
            "step" | "grad_norm" | "loss" => Some((name.clone(), value.clone())),
            "images" => Some(("samples".into(), value.clone())),
            "mse" if vb.is_some() => Some((name.clone(), value.clone())),
            "vb_bpd" if hybrid => Some((format!("vb{quarter}"), (value.as_f64()? * vb?).into())),
            _ => None,
        }
    };
    line.iter().filter_map(one).collect()
}

/// Writes the terms of the bound into `folder`: one f32 per step, from the noisiest down to t = 0, means over the images.
/// Returns the paths.
///
/// # Errors
/// [`Error::Io`] when the disk refuses.
pub fn write_terms(folder: &Path, r: &NllReport) -> Result<Vec<PathBuf>> {
    let files = [("vb", &r.vb_bpd), ("mse", &r.eps_mse), ("xstart_mse", &r.x_0_mse)];
    let one = |(name, terms): (&str, &Vec<f64>)| {
        let path = folder.join(format!("{name}_terms.npz"));
        let values: Vec<f32> = terms.iter().rev().map(|x| *x as f32).collect();
        let array = Array { shape: vec![values.len()], values: Values::F32(values) };
        npz::write(&path, &[("arr_0", &array)]).map(|()| path)
    };
    files.into_iter().map(one).collect()
}
