//! Folders of diffusers: `config.json`, the weights of a `UNet2DModel`, and perhaps a scheduler's settings.
//!
//! The network is the reference's under other names, with q, k and v in three tensors whose heads lie inside:
//! row h·d + c of q is row h·3d + c of our qkv (row h·d + c in the new order). Where the time embedding there begins with
//! the sines, the columns of the matrix that takes it are exchanged.

use super::reference::{check_tensor, read, reference_dims};
use super::tensor_file::TensorFile;
use crate::checkpoint::Slot;
use crate::config::{DiffusionConfig, MeanType, ModelConfig, Schedule, VarType};
use crate::error::{Error, Result};
use crate::schedule::sigmoid_betas;
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
        let model = network(&json(&config)?).map_err(|e| Error::checkpoint(&config, e))?;
        let places = ["scheduler/scheduler_config.json", "scheduler_config.json"].map(|n| folder.join(n));
        let diffusion = match places.iter().find(|p| p.is_file()) {
            Some(path) => Some(process(&json(path)?, &model).map_err(|e| Error::checkpoint(path, e))?),
            None => None,
        };
        Ok(Folder { weights, model, diffusion })
    }
}

fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
    serde_json::from_str(&text).map_err(|e| Error::checkpoint(path, format!("damaged JSON: {e}")))
}

/// The fields of `config` with the defaults of diffusers, each an error if it is of another type.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn field(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }
    fn count(&self, name: &str, default: usize) -> std::result::Result<usize, String> {
        let Some(v) = self.field(name) else { return Ok(default) };
        let number = v.as_u64().filter(|&n| n <= 1 << 20).map(|n| n as usize);
        number.ok_or_else(|| format!("{name}: expected a number, found {v}"))
    }
    fn number(&self, name: &str, default: f64) -> std::result::Result<f64, String> {
        let Some(v) = self.field(name) else { return Ok(default) };
        v.as_f64().ok_or_else(|| format!("{name}: expected a number, found {v}"))
    }
    fn text(&self, name: &str, default: &str) -> std::result::Result<String, String> {
        let Some(v) = self.field(name) else { return Ok(default.into()) };
        v.as_str().map(String::from).ok_or_else(|| format!("{name}: expected a text, found {v}"))
    }
    fn truth(&self, name: &str, default: bool) -> std::result::Result<bool, String> {
        let Some(v) = self.field(name) else { return Ok(default) };
        v.as_bool().ok_or_else(|| format!("{name}: expected true or false, found {v}"))
    }
    fn list(&self, name: &str) -> std::result::Result<Vec<Value>, String> {
        let list = self.field(name).and_then(Value::as_array).filter(|l| (1..=10).contains(&l.len()));
        list.cloned().ok_or_else(|| format!("{name}: expected a list of 1 to 10 entries"))
    }
    /// The network here has `only` for `name`, which diffusers leaves at `default` if it is not given.
    fn only(&self, name: &str, only: Value, default: Value) -> std::result::Result<(), String> {
        let found = self.field(name).unwrap_or(&default);
        let same = *found == only || (found.is_number() && found.as_f64() == only.as_f64());
        if same { Ok(()) } else { Err(format!("{name} is {found}: only {only} is supported")) }
    }
}

/// The network of a `config.json`.
fn network(config: &Value) -> std::result::Result<ModelConfig, String> {
    let f = Fields(config);
    f.only("_class_name", "UNet2DModel".into(), "none".into())?;
    f.only("center_input_sample", false.into(), false.into())?;
    f.only("time_embedding_type", "positional".into(), "positional".into())?;
    f.only("act_fn", "silu".into(), "silu".into())?;
    f.only("norm_num_groups", 32.into(), 32.into())?;
    f.only("mid_block_scale_factor", 1.into(), 1.into())?;
    f.only("downsample_type", "conv".into(), "conv".into())?;
    f.only("upsample_type", "conv".into(), "conv".into())?;
    f.only("add_attention", true.into(), true.into())?;
    f.only("class_embed_type", Value::Null, Value::Null)?;
    let widths = f.list("block_out_channels")?;
    let widths = widths.iter().map(|v| v.as_u64().filter(|&c| c > 0 && c <= 1 << 16).map(|c| c as usize));
    let widths: Vec<usize> = widths.collect::<Option<_>>().ok_or("block_out_channels: expected numbers")?;
    if let Some(c) = widths.iter().find(|&c| c % widths[0] != 0) {
        return Err(format!("block_out_channels: {c} is no multiple of the first width {}: not supported", widths[0]));
    }
    let (freq_shift, downsample_padding) = (f.number("freq_shift", 0.0)?, f.count("downsample_padding", 1)?);
    if !(0.0..=1.0).contains(&freq_shift) || downsample_padding > 1 {
        return Err(format!(
            "freq_shift {freq_shift}, downsample_padding {downsample_padding}: only 0 and 1 are supported"
        ));
    }
    let attention = attention_levels(&f, widths.len())?;
    let scale_shift = match f.text("resnet_time_scale_shift", "default")?.as_str() {
        "default" => false,
        "scale_shift" => true,
        other => return Err(format!("resnet_time_scale_shift is {other:?}: only \"default\" and \"scale_shift\"")),
    };
    if scale_shift {
        f.only("attn_norm_num_groups", 32.into(), Value::Null)?;
    }
    // diffusers reads an absent width as 8, null as one head.
    let head_channels = match config.get("attention_head_dim") {
        Some(Value::Null) => None,
        _ => Some(f.count("attention_head_dim", 8)?),
    };
    Ok(ModelConfig {
        image_size: f.count("sample_size", 0)?,
        in_channels: f.count("in_channels", 3)?,
        out_channels: f.count("out_channels", 3)?,
        model_channels: widths[0],
        num_res_blocks: f.count("layers_per_block", 2)?,
        channel_mult: widths.iter().map(|c| c / widths[0]).collect(),
        attention_resolutions: attention.into_iter().map(|level| 1 << level).collect(),
        dropout: f.number("dropout", 0.0)? as f32,
        num_classes: f.field("num_class_embeds").map(|_| f.count("num_class_embeds", 0)).transpose()?,
        num_heads: 1,
        num_heads_upsample: 1,
        use_scale_shift_norm: scale_shift,
        num_head_channels: head_channels,
        freq_shift,
        sine_first: !f.truth("flip_sin_to_cos", true)?,
        norm_eps: f.number("norm_eps", 1e-5)?,
        downsample_padding,
        ..ModelConfig::default()
    })
}

/// Levels whose blocks have attention, the same on the way down and up.
fn attention_levels(f: &Fields, levels: usize) -> std::result::Result<Vec<usize>, String> {
    let kinds = |name: &str, attention: &str, plain: &str| -> std::result::Result<Vec<bool>, String> {
        let kind = |v: &Value| match v.as_str() {
            Some(k) if k == attention => Ok(true),
            Some(k) if k == plain => Ok(false),
            _ => Err(format!("{name}: block {v} is unknown; only {plain} and {attention} are supported")),
        };
        f.list(name)?.iter().map(kind).collect()
    };
    let down = kinds("down_block_types", "AttnDownBlock2D", "DownBlock2D")?;
    let mut up = kinds("up_block_types", "AttnUpBlock2D", "UpBlock2D")?;
    up.reverse();
    if down != up || down.len() != levels {
        return Err(format!(
            "down_block_types and up_block_types do not mirror each other over {levels} levels: not supported"
        ));
    }
    Ok((0..levels).filter(|&l| down[l]).collect())
}

/// The process of a scheduler's settings.
fn process(config: &Value, model: &ModelConfig) -> std::result::Result<DiffusionConfig, String> {
    let f = Fields(config);
    let diffusion_steps = f.count("num_train_timesteps", 1000)?;
    let listed = f.field("trained_betas").map(|betas| written_out(betas, diffusion_steps)).transpose()?;
    let named = f.text("beta_schedule", "linear")?;
    let noise_schedule = match (listed, named.as_str()) {
        (Some(schedule), _) => schedule,
        (None, "linear") => {
            let scale = 1000.0 / diffusion_steps as f64;
            let (start, end) = (f.number("beta_start", 1e-4)?, f.number("beta_end", 0.02)?);
            if (start - scale * 1e-4).abs() > 1e-9 || (end - scale * 0.02).abs() > 1e-7 {
                return Err(format!(
                    "beta_start {start}, beta_end {end}: only {} and {} are supported with {diffusion_steps} steps",
                    scale * 1e-4,
                    scale * 0.02
                ));
            }
            Schedule::Linear
        }
        (None, "squaredcos_cap_v2") => Schedule::Cosine,
        (None, other) => return Err(format!("beta_schedule {other:?}: only \"linear\" and \"squaredcos_cap_v2\"")),
    };
    let mean_type = match f.text("prediction_type", "epsilon")?.as_str() {
        "epsilon" => MeanType::Epsilon,
        "sample" => MeanType::XStart,
        "v_prediction" => MeanType::V,
        other => return Err(format!("prediction_type {other:?}: only \"epsilon\", \"sample\" and \"v_prediction\"")),
    };
    let var_type = match f.text("variance_type", "fixed_small")?.as_str() {
        _ if model.out_channels == 2 * model.in_channels => VarType::LearnedRange,
        "fixed_small" | "fixed_small_log" => VarType::FixedSmall,
        "fixed_large" | "fixed_large_log" => VarType::FixedLarge,
        "learned_range" => VarType::LearnedRange,
        other => return Err(format!("variance_type {other:?}: not supported with {} outputs", model.out_channels)),
    };
    let rescale_timesteps = false;
    Ok(DiffusionConfig {
        diffusion_steps,
        noise_schedule,
        mean_type,
        var_type,
        rescale_timesteps,
        ..DiffusionConfig::default()
    })
}

/// The schedule whose betas a scheduler lists: the sigmoid one, which diffusers knows no name for.
fn written_out(betas: &Value, steps: usize) -> std::result::Result<Schedule, String> {
    let betas: Vec<f64> = betas.as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let sigmoid = sigmoid_betas(steps);
    // Other programs may have kept them as f32.
    let same = betas.len() == steps && betas.iter().zip(&sigmoid).all(|(a, b)| (a - b).abs() <= 1e-6 * b);
    if same { Ok(Schedule::Sigmoid) } else { Err("trained_betas: only those of the sigmoid schedule".into()) }
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

/// The `config.json` of the network.
///
/// # Errors
/// [`Error::Config`] naming what a `UNet2DModel` cannot express.
pub fn unet_config(m: &ModelConfig) -> Result<Value> {
    let refuse = |what: String| Err(Error::Config(format!("diffusers' UNet2DModel cannot hold this network: {what}")));
    if m.resblock_updown {
        return refuse("resblock-updown".into());
    }
    if !m.conv_resample {
        return refuse("conv-resample False".into());
    }
    let levels = m.channel_mult.len();
    let attention: Vec<bool> = (0..levels).map(|l| m.attention_resolutions.contains(&(1 << l))).collect();
    let widths: Vec<usize> = m.channel_mult.iter().map(|k| k * m.model_channels).collect();
    let mut head_dims: Vec<usize> = Vec::new();
    for (l, &c) in widths.iter().enumerate().filter(|(l, _)| attention[*l] || l + 1 == levels) {
        head_dims.push(c / heads(m, "input_blocks", c));
        if attention[l] {
            head_dims.push(c / heads(m, "output_blocks", c));
        }
    }
    let one_head = m.num_head_channels.is_none() && m.num_heads == 1 && m.num_heads_upsample == 1;
    if !one_head && head_dims.iter().any(|&d| d != head_dims[0]) {
        head_dims.dedup();
        return refuse(format!("its attention heads have several widths ({head_dims:?}), there is one for all there"));
    }
    let kinds = |plain: &str| -> Vec<String> {
        attention.iter().map(|&a| if a { format!("Attn{plain}") } else { plain.to_string() }).collect()
    };
    let mut up = kinds("UpBlock2D");
    up.reverse();
    Ok(serde_json::json!({
        "_class_name": "UNet2DModel",
        "sample_size": m.image_size,
        "in_channels": m.input_channels(),
        "out_channels": m.out_channels,
        "center_input_sample": false,
        "time_embedding_type": "positional",
        "freq_shift": m.freq_shift,
        "flip_sin_to_cos": !m.sine_first,
        "down_block_types": kinds("DownBlock2D"),
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": m.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": m.downsample_padding,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "dropout": m.dropout,
        "act_fn": "silu",
        "attention_head_dim": (!one_head).then_some(head_dims[0]),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": m.norm_eps,
        "resnet_time_scale_shift": if m.use_scale_shift_norm { "scale_shift" } else { "default" },
        "num_class_embeds": m.class_rows(),
        "add_attention": true,
    }))
}

/// The settings of a `DDPMScheduler`.
pub fn scheduler_config(d: &DiffusionConfig) -> Value {
    let scale = 1000.0 / d.diffusion_steps as f64;
    serde_json::json!({
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": d.diffusion_steps,
        "beta_schedule": if d.noise_schedule == Schedule::Cosine { "squaredcos_cap_v2" } else { "linear" },
        // What diffusers calls sigmoid is another schedule, so this one is written out; it goes before the name.
        "trained_betas": (d.noise_schedule == Schedule::Sigmoid).then(|| sigmoid_betas(d.diffusion_steps)),
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "prediction_type": match d.mean_type {
            MeanType::XStart => "sample",
            MeanType::V => "v_prediction",
            MeanType::Epsilon | MeanType::PreviousX => "epsilon",
        },
        "variance_type": match d.var_type {
            VarType::FixedSmall => "fixed_small",
            VarType::FixedLarge => "fixed_large",
            VarType::Learned => "learned",
            VarType::LearnedRange => "learned_range",
        },
        "clip_sample": true,
    })
}
