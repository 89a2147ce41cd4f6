//! State dicts of the reference (improved-diffusion, guided-diffusion): the network they belong to, and their layouts.
//!
//! Names are ours. Convolutions are (out, in, kh, kw) there and (out, kh, kw, in) here; the 1x1 convolutions of attention
//! are (out, in, 1) there. Numbers of block `level`, with R residual blocks per level and L levels:
//! `input_blocks.{1 + level (R+1) + j}`, `output_blocks.{(L-1-level)(R+1) + i}`.

use super::tensor_file::{Tensor, TensorFile};
use crate::checkpoint::Slot;
use crate::config::{Config, ModelConfig, VarType};
use crate::error::{Error, Result};

/// Whose file it is, by the names of its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Weights of the reference's network, or moving averages of them.
    Weights,
    /// State of AdamW.
    Optimizer,
    /// Weights of a diffusers `UNet2DModel`.
    Diffusers,
}

/// Tells what `file` holds.
///
/// # Errors
/// [`Error::Checkpoint`] for the files of other programs, by name where they are known.
pub fn family(file: &TensorFile) -> Result<Family> {
    let has = |start: &str| file.tensors.keys().any(|k| k.starts_with(start));
    let bad = |what: &str| Err(Error::checkpoint(&file.path, what));
    if has("state.") && file.tensors.keys().any(|k| k.ends_with(".exp_avg")) {
        return Ok(Family::Optimizer);
    }
    if has("input_blocks.") && has("output_blocks.") {
        return Ok(Family::Weights);
    }
    if has("down_blocks.") && has("conv_in.") {
        return Ok(Family::Diffusers);
    }
    match () {
        () if has("model.input_blocks.") => bad("already a checkpoint of this program, which needs no import"),
        () if file.tensors.is_empty() => bad("no tensor in this file"),
        () if has("input_blocks.") => bad("a classifier of guided-diffusion, not a diffusion model: not supported"),
        () if has("model.diffusion_model.") => {
            bad("a latent diffusion model: not supported, its images are not pixels")
        }
        () if has("module.") => {
            bad("the names begin with `module.`: save the state dict of the model inside DataParallel")
        }
        () if has("enc.") || has("ema.enc.") => {
            bad("a network of EDM: its layers are not those of the reference's U-Net")
        }
        () if has("downs.") || has("model.downs.") => {
            bad("a network of denoising-diffusion-pytorch: its layers are not those of the reference's U-Net")
        }
        () => {
            let some: Vec<&str> = file.tensors.keys().take(3).map(String::as_str).collect();
            let n = file.tensors.len();
            let what = format!(
                "not a state dict of improved-diffusion or guided-diffusion: no input_blocks among its {n} tensors ({}, …)",
                some.join(", ")
            );
            bad(&what)
        }
    }
}

/// What the tensors tell of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Deduced {
    /// Channels that go in: those of the images, twice that in super-resolution.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Base width.
    pub model_channels: usize,
    /// Residual blocks per level.
    pub num_res_blocks: usize,
    /// Width of each level, as multiples of the base.
    pub channel_mult: Vec<usize>,
    /// Downsampling factors of the levels with attention.
    pub attention_resolutions: Vec<usize>,
    /// Rows of the class table; whether the last is a null class is not told.
    pub class_rows: Option<usize>,
    /// Time embedding as scale and shift.
    pub use_scale_shift_norm: bool,
    /// Resampling with convolutions.
    pub conv_resample: bool,
    /// Resampling inside residual blocks.
    pub resblock_updown: bool,
}

impl Deduced {
    /// Reads the shape of the network off the names and sizes of `file`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor that is missing or does not fit.
    pub fn new(file: &TensorFile) -> Result<Self> {
        let bad = |what: String| Error::checkpoint(&file.path, what);
        let dims = |name: &str, n: usize| -> Result<&[usize]> {
            let t = file.get(name)?;
            if t.dims.len() != n {
                return Err(bad(format!("{name}: expected {n} dimensions, found {:?}", t.dims)));
            }
            Ok(&t.dims)
        };
        let has = |name: &str| file.tensors.contains_key(name);
        let base = dims("time_embed.0.weight", 2)?[1];
        let blocks = |part: &str| -> Vec<usize> {
            let number = |k: &String| k.strip_prefix(part)?.split('.').next()?.parse().ok();
            let mut numbers: Vec<usize> = file.tensors.keys().filter_map(number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let (input, output) = (blocks("input_blocks."), blocks("output_blocks."));
        let total = output.last().map_or(0, |n| n + 1);
        let convs = input.iter().filter(|i| has(&format!("input_blocks.{i}.0.op.weight"))).count();
        let second = |i: &&usize, at: usize| has(&format!("output_blocks.{i}.{at}.in_layers.0.weight"));
        let enlarging = output.iter().filter(|i| second(i, 1) || second(i, 2)).count();
        let downs = if convs + enlarging > 0 { convs.max(enlarging) } else { total.saturating_sub(input.len()) };
        let levels = downs + 1;
        if base == 0 || total == 0 || total % levels != 0 || total > 4096 {
            return Err(bad(format!("{total} output blocks do not divide into {levels} levels")));
        }
        let per_level = total / levels;
        let mut d = Deduced {
            in_channels: dims("input_blocks.0.0.weight", 4)?[1],
            out_channels: dims("out.2.weight", 4)?[0],
            model_channels: base,
            num_res_blocks: per_level.saturating_sub(1),
            channel_mult: vec![],
            attention_resolutions: vec![],
            class_rows: if has("label_emb.weight") { Some(dims("label_emb.weight", 2)?[0]) } else { None },
            use_scale_shift_norm: false,
            conv_resample: convs > 0 || enlarging > 0 || levels == 1,
            resblock_updown: enlarging > 0,
        };
        for level in 0..levels {
            let block = format!("input_blocks.{}", 1 + level * per_level);
            let name = format!("{block}.0.out_layers.3.weight");
            let c = dims(&name, 4)?[0];
            if c % base != 0 || c == 0 {
                return Err(bad(format!(
                    "{name}: {c} channels are no multiple of the base width {base}: not supported"
                )));
            }
            d.channel_mult.push(c / base);
            if has(&format!("{block}.1.qkv.weight")) {
                d.attention_resolutions.push(1 << level.min(31));
            }
            d.use_scale_shift_norm = dims(&format!("{block}.0.emb_layers.1.weight"), 2)?[0] == 2 * c;
        }
        Ok(d)
    }

    /// Makes `c` the network of the file. What is not in the file is left as it is, super-resolution included.
    pub fn apply(&self, c: &mut Config) {
        let m = &mut c.model;
        m.in_channels = self.in_channels / if m.low_res.is_some() { 2 } else { 1 };
        m.out_channels = self.out_channels;
        m.model_channels = self.model_channels;
        m.num_res_blocks = self.num_res_blocks;
        m.channel_mult = self.channel_mult.clone();
        m.attention_resolutions = self.attention_resolutions.clone();
        m.null_class &= self.class_rows.is_some_and(|rows| rows > 1);
        m.num_classes = self.class_rows.map(|rows| rows - usize::from(m.null_class));
        m.use_scale_shift_norm = self.use_scale_shift_norm;
        m.conv_resample = self.conv_resample;
        m.resblock_updown = self.resblock_updown;
        let learned = self.out_channels == 2 * m.in_channels;
        match (learned, c.diffusion.learns_variance()) {
            (true, false) => c.diffusion.var_type = VarType::LearnedRange,
            (false, true) => c.diffusion.var_type = VarType::FixedLarge,
            _ => {}
        }
    }

    /// Whether `m` is this network but for what the tensors do not tell.
    pub fn fits(&self, m: &ModelConfig) -> bool {
        let mut c = Config { model: m.clone(), ..Config::default() };
        self.apply(&mut c);
        c.model == *m
    }
}

/// Size in the reference's state dict of a tensor of ours.
pub fn reference_dims(slot: &Slot) -> Vec<usize> {
    match *slot.dims {
        [o, 1, 1, i] if is_conv_1d(slot.name) => vec![o, i, 1],
        [o, h, w, i] => vec![o, i, h, w],
        ref other => other.to_vec(),
    }
}

/// The convolutions of attention run over one dimension there.
fn is_conv_1d(name: &str) -> bool {
    name.ends_with(".qkv.weight") || name.ends_with(".proj_out.weight")
}

/// `t` in the order of its elements here.
pub fn to_ours(t: &Tensor) -> Tensor {
    match t.dims.len() {
        4 => t.permuted(&[0, 2, 3, 1]),
        3 => t.permuted(&[0, 2, 1]),
        _ => t.clone(),
    }
}

/// Elements of a tensor of ours in the order of the reference.
pub fn to_reference(values: &[f32], dims: &[usize]) -> Vec<f32> {
    let &[o, h, w, i] = dims else { return values.to_vec() };
    let taps = h * w;
    assert_eq!(values.len(), o * taps * i, "elements of {dims:?}");
    let mut out = Vec::with_capacity(values.len());
    for filter in values.chunks_exact((taps * i).max(1)) {
        out.extend((0..i).flat_map(|c| filter[c..].iter().step_by(i).copied()));
    }
    out
}

/// Checks that `file` holds exactly the tensors of `slots`, in the reference's sizes.
///
/// # Errors
/// [`Error::Checkpoint`] naming what is missing, left over, or of another size or type.
pub fn check_names(file: &TensorFile, slots: &[Slot], half: bool) -> Result<()> {
    let known: std::collections::HashSet<&str> = slots.iter().map(|s| s.name).collect();
    let missing: Vec<&str> = slots.iter().map(|s| s.name).filter(|n| !file.tensors.contains_key(*n)).collect();
    let extra: Vec<&str> = file.tensors.keys().map(String::as_str).filter(|n| !known.contains(n)).collect();
    if !missing.is_empty() || !extra.is_empty() {
        let some = |names: &[&str]| match names {
            [] => "none".to_string(),
            [a, b, c, _, ..] => format!("{} ({a}, {b}, {c}, …)", names.len()),
            _ => format!("{} ({})", names.len(), names.join(", ")),
        };
        return Err(Error::checkpoint(
            &file.path,
            format!(
                "the tensors are not those of the model: missing {}; not part of it {}",
                some(&missing),
                some(&extra)
            ),
        ));
    }
    slots.iter().try_for_each(|s| check_tensor(file, s.name, file.get(s.name)?, &reference_dims(s), half))
}

/// Checks size and type of one tensor.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensor, what was expected and what was found.
pub fn check_tensor(file: &TensorFile, name: &str, t: &Tensor, dims: &[usize], half: bool) -> Result<()> {
    use super::pickle::Dtype;
    let bad = |what: String| Err(Error::checkpoint(&file.path, what));
    if t.dims != dims {
        return bad(format!("{name}: expected size {dims:?}, found {:?}", t.dims));
    }
    match t.dtype {
        Dtype::F32 => Ok(()),
        Dtype::F16 | Dtype::Bf16 if half => Ok(()),
        Dtype::F16 | Dtype::Bf16 => bad(format!(
            "{name}: expected float32, found {}: the weights were rounded; --allow-half takes them as they are",
            t.dtype.name()
        )),
        other => bad(format!("{name}: expected float32, found {}", other.name())),
    }
}

/// The elements of `t` in our order.
///
/// # Errors
/// [`Error::Checkpoint`] for a NaN, an infinity, or elements that are no floats.
pub fn read(file: &TensorFile, name: &str, t: &Tensor) -> Result<Vec<f32>> {
    let bad = |what: String| Error::checkpoint(&file.path, what);
    let values = file.f32s(&to_ours(t)).ok_or_else(|| bad(format!("{name}: {} is no float", t.dtype.name())))?;
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(bad(format!("{name} holds {x}: the file is damaged or the run that wrote it had diverged"))),
        None => Ok(values),
    }
}
