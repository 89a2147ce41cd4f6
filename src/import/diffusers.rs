//! Folders of diffusers: `config.json`, the weights of a `UNet2DModel`, and perhaps a scheduler's settings.
//!
//! The network is the reference's under other names, with q, k and v in three tensors whose heads lie inside:
//! row h·d + c of q is row h·3d + c of our qkv (row h·d + c in the new order). Where the time embedding there begins with
//! the sines, the columns of the matrix that takes it are exchanged.

mod config;

pub use config::{scheduler_config, unet_config};

use super::reference::{check_tensor, read, reference_dims};
use super::tensor_file::TensorFile;
use crate::checkpoint::Slot;
use crate::config::{DiffusionConfig, ModelConfig};
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Names of the weights in a folder, in order of preference.
const WEIGHTS: [&str; 2] = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"];

/// What diffusers calls a tensor of ours.
#[derive(Clone, Debug, PartialEq)]
pub enum Their {
    /// One tensor.
    One(String),
    /// q, k and v.
    Three([String; 3]),
}

/// Place and settings of a model in a folder.
pub struct Folder {
    /// The weights.
    pub weights: PathBuf,
    /// The network.
    pub model: ModelConfig,
    /// The process, as far as a scheduler's settings tell it.
    pub diffusion: Option<DiffusionConfig>,
}

impl Folder {
    /// Reads the settings in `folder` or in its subfolder `unet`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the setting that the network here does not have.
    pub fn open(folder: &Path) -> Result<Self> {
        let unet = [folder.join("unet"), folder.to_path_buf()].into_iter().find(|f| f.join("config.json").is_file());
        let missing = |what| Error::checkpoint(folder, format!("no {what} in this folder: not a diffusers model"));
        let unet = unet.ok_or_else(|| missing("config.json"))?;
        let weights = WEIGHTS.iter().map(|n| unet.join(n)).find(|p| p.is_file());
        let weights = weights.ok_or_else(|| missing(WEIGHTS[0]))?;
        let config = unet.join("config.json");
        let model = config::network(&json(&config)?).map_err(|e| Error::checkpoint(&config, e))?;
        let places = ["scheduler/scheduler_config.json", "scheduler_config.json"].map(|n| folder.join(n));
        let diffusion = match places.iter().find(|p| p.is_file()) {
            Some(path) => Some(config::process(&json(path)?, &model).map_err(|e| Error::checkpoint(path, e))?),
            None => None,
        };
        Ok(Folder { weights, model, diffusion })
    }
}

fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
    serde_json::from_str(&text).map_err(|e| Error::checkpoint(path, format!("damaged JSON: {e}")))
}

/// What diffusers calls the tensor `name` of the network `m`.
pub fn their_name(m: &ModelConfig, name: &str) -> Option<Their> {
    let (layer, what) = name.rsplit_once('.')?;
    let one = |layer: String| Some(Their::One(format!("{layer}.{what}")));
    match layer {
        "time_embed.0" => return one("time_embedding.linear_1".into()),
        "time_embed.2" => return one("time_embedding.linear_2".into()),
        "label_emb" => return one("class_embedding".into()),
        "input_blocks.0.0" => return one("conv_in".into()),
        "out.0" => return one("conv_norm_out".into()),
        "out.2" => return one("conv_out".into()),
        _ => {}
    }
    let per_level = m.num_res_blocks + 1;
    let (part, rest) = layer.split_once('.')?;
    let (block, attention, resize, inner) = match part {
        "middle_block" => {
            let (at, inner) = rest.split_once('.')?;
            (
                format!("mid_block.resnets.{}", if at == "0" { 0 } else { 1 }),
                "mid_block.attentions.0".into(),
                String::new(),
                inner,
            )
        }
        _ => {
            let (number, rest) = rest.split_once('.')?;
            let (_, inner) = rest.split_once('.')?;
            let at: usize = number.parse().ok()?;
            let (side, at, sampler) = if part == "input_blocks" {
                ("down", at.checked_sub(1)?, "downsamplers")
            } else {
                ("up", at, "upsamplers")
            };
            let (level, i) = (at / per_level, at % per_level);
            let under = |what: &str, i: usize| format!("{side}_blocks.{level}.{what}.{i}");
            (under("resnets", i), under("attentions", i), under(sampler, 0), inner)
        }
    };
    match inner {
        "in_layers.0" => one(format!("{block}.norm1")),
        "in_layers.2" => one(format!("{block}.conv1")),
        "emb_layers.1" => one(format!("{block}.time_emb_proj")),
        "out_layers.0" => one(format!("{block}.norm2")),
        "out_layers.3" => one(format!("{block}.conv2")),
        "skip_connection" => one(format!("{block}.conv_shortcut")),
        "op" | "conv" => one(format!("{resize}.conv")),
        "norm" => one(format!("{attention}.group_norm")),
        "qkv" => Some(Their::Three(["q", "k", "v"].map(|p| format!("{attention}.to_{p}.{what}")))),
        "proj_out" => one(format!("{attention}.to_out.0")),
        _ => None,
    }
}

/// The same name in files of before 2023.
fn old_name(name: &str) -> String {
    let pairs = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    pairs.iter().fold(name.into(), |name, (new, old)| name.replace(new, old))
}

/// Heads of the attention whose qkv has `c` channels in each part.
fn heads(m: &ModelConfig, slot: &str, c: usize) -> usize {
    let plain = if slot.starts_with("output_blocks") { m.num_heads_upsample } else { m.num_heads };
    m.num_head_channels.map_or(plain, |d| c / d)
}

/// Row of our qkv that holds row `row` of part `part` (q, k, v), of `c` rows.
fn qkv_row(m: &ModelConfig, slot: &str, c: usize, part: usize, row: usize) -> usize {
    if m.use_new_attention_order {
        return part * c + row;
    }
    let d = c / heads(m, slot, c);
    (row / d * 3 + part) * d + row % d
}

/// The names of `file` that make up `slot`, as the file has them.
fn parts(file: &TensorFile, m: &ModelConfig, slot: &Slot) -> Vec<String> {
    let names = match their_name(m, slot.name) {
        Some(Their::One(name)) => vec![name],
        Some(Their::Three(names)) => names.to_vec(),
        None => vec![slot.name.to_string()],
    };
    let known = |n: String| {
        if file.tensors.contains_key(&n) {
            n
        } else {
            Some(old_name(&n)).filter(|o| file.tensors.contains_key(o)).unwrap_or(n)
        }
    };
    names.into_iter().map(known).collect()
}

/// Checks that `file` holds exactly the network `m`.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensor, what was expected and what was found.
pub fn check_names(file: &TensorFile, m: &ModelConfig, slots: &[Slot], half: bool) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for slot in slots {
        let names = parts(file, m, slot);
        for name in &names {
            let t = file.get(name)?;
            let mut dims = reference_dims(slot);
            dims[0] /= names.len();
            if dims.len() == 3 {
                dims.truncate(t.dims.len().clamp(2, 3)); // attention in old files is a convolution
            }
            check_tensor(file, name, t, &dims, half)?;
            seen.insert(name.clone());
        }
    }
    match file.tensors.keys().find(|n| !seen.contains(*n)) {
        Some(extra) => Err(Error::checkpoint(&file.path, format!("{extra} is no part of the network of config.json"))),
        None => Ok(()),
    }
}

/// The elements of `slot` in our order.
///
/// # Errors
/// Those of [`read`].
pub fn read_slot(file: &TensorFile, m: &ModelConfig, slot: &Slot) -> Result<Vec<f32>> {
    let names = parts(file, m, slot);
    let values = names.iter().map(|n| read(file, n, file.get(n)?)).collect::<Result<Vec<_>>>()?;
    let [_, _, _] = values[..] else {
        let mut values = values.concat();
        if swaps_waves(m, slot) {
            swap_halves(&mut values, slot.dims[1]);
        }
        return Ok(values);
    };
    let c = slot.dims[0] / 3;
    let width = values[0].len() / c;
    let mut out = vec![0.0; 3 * values[0].len()];
    for (part, values) in values.iter().enumerate() {
        for (row, values) in values.chunks_exact(width).enumerate() {
            let at = qkv_row(m, slot.name, c, part, row) * width;
            out[at..at + width].copy_from_slice(values);
        }
    }
    Ok(out)
}

/// Whether `slot` is the matrix that takes cosines first here and sines first there.
fn swaps_waves(m: &ModelConfig, slot: &Slot) -> bool {
    m.sine_first && slot.name == "time_embed.0.weight"
}

/// Exchanges the two halves of every row of `columns` values.
fn swap_halves(values: &mut [f32], columns: usize) {
    for row in values.chunks_exact_mut(columns) {
        let (first, second) = row.split_at_mut(columns / 2);
        first.swap_with_slice(&mut second[..columns / 2]);
    }
}

/// The tensors of diffusers that hold `values` of `slot` (in our order): name, size, elements.
pub fn write_slot(m: &ModelConfig, slot: &Slot, values: &[f32]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut dims = reference_dims(slot);
    if dims.len() == 3 {
        dims.pop();
    }
    match their_name(m, slot.name).expect("every tensor of the network has a name") {
        Their::One(name) => {
            let mut values = super::reference::to_reference(values, slot.dims);
            if swaps_waves(m, slot) {
                swap_halves(&mut values, slot.dims[1]);
            }
            vec![(name, dims, values)]
        }
        Their::Three(names) => {
            let c = slot.dims[0] / 3;
            let width = values.len() / (3 * c);
            dims[0] = c;
            let row = |part, row| &values[qkv_row(m, slot.name, c, part, row) * width..][..width];
            let part = |(part, name)| (name, dims.clone(), (0..c).flat_map(|r| row(part, r)).copied().collect());
            names.into_iter().enumerate().map(part).collect()
        }
    }
}
