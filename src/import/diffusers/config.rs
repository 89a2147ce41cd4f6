//! The settings of diffusers, read and written: `config.json` of a network, `scheduler_config.json` of its process.

use super::heads;
use crate::config::{DiffusionConfig, MeanType, ModelConfig, Schedule, VarType};
use crate::error::{Error, Result};
use crate::schedule::sigmoid_betas;
use serde_json::Value;

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
///
/// # Errors
/// The field that the network here does not have, with what was found.
pub fn network(config: &Value) -> std::result::Result<ModelConfig, String> {
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
///
/// # Errors
/// The field that names no process of ours, with what was found.
pub fn process(config: &Value, model: &ModelConfig) -> std::result::Result<DiffusionConfig, String> {
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
