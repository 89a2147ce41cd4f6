//! The flags of the reference's scripts: names, kinds, defaults, and argparse's ways of writing them.
//!
//! `--name value` and `--name=value`; an unambiguous beginning of a name stands for it; the last of several counts; booleans
//! take a value (yes true t y 1, no false f n 0, in any case). Here a boolean alone means True, and dashes in a name
//! are underscores.

use crate::cli::flags::boolean;
use crate::error::{Error, Result};
use clap::{Arg, ArgMatches, builder::ValueParser, parser::ValueSource, value_parser};
use std::ffi::OsString;

/// What a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A boolean.
    Bool,
    /// A whole number.
    Int,
    /// A number.
    Float,
    /// A text; lists are texts with commas.
    Text,
}

/// A flag of a script.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Name, with underscores.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Value without the flag, as it would be written.
    pub default: &'static str,
    /// Meaning, in a line.
    pub about: &'static str,
}

const fn flag(name: &'static str, kind: Kind, default: &'static str, about: &'static str) -> Flag {
    Flag { name, kind, default, about }
}

use Kind::{Bool, Float, Int, Text};

/// Network and process: `model_and_diffusion_defaults` of the reference but for the sizes.
pub const MODEL: &[Flag] = &[
    flag("num_channels", Int, "128", "Base width of the network"),
    flag("num_res_blocks", Int, "2", "Residual blocks per level"),
    flag("num_heads", Int, "4", "Attention heads"),
    flag("num_heads_upsample", Int, "-1", "Attention heads on the way up; -1: as num_heads"),
    flag("attention_resolutions", Text, "16,8", "Image sizes at which attention runs"),
    flag("dropout", Float, "0.0", "Dropout probability"),
    flag("learn_sigma", Bool, "False", "Learn the variance of the reverse step"),
    flag("class_cond", Bool, "False", "Condition on the class label"),
    flag("diffusion_steps", Int, "1000", "Steps T of the process"),
    flag("noise_schedule", Text, "linear", "linear or cosine"),
    flag("timestep_respacing", Text, "", "Steps to use: 250, 10,15,20 or ddim50"),
    flag("use_kl", Bool, "False", "Objective L_vlb, the bound alone"),
    flag("predict_xstart", Bool, "False", "Predict the clean image rather than the noise"),
    flag("rescale_timesteps", Bool, "True", "The network sees t*1000/T rather than t"),
    flag("rescale_learned_sigmas", Bool, "True", "Weigh the bound by T/1000 in the hybrid objective"),
    flag("use_checkpoint", Bool, "False", "Compute residual blocks anew in the backward pass"),
    flag("use_scale_shift_norm", Bool, "True", "Time embedding as scale and shift of a norm"),
];

/// What the `image_*` scripts have beside [`MODEL`].
pub const IMAGE: &[Flag] = &[
    flag("image_size", Int, "64", "Height and width of the images"),
    flag("sigma_small", Bool, "False", "Fixed variance: beta_tilde rather than beta"),
];

/// What the `super_res_*` scripts have beside [`MODEL`].
pub const SUPER_RES: &[Flag] = &[
    flag("large_size", Int, "256", "Height and width of the large images"),
    flag("small_size", Int, "64", "Height and width of the small images"),
];

/// The scripts that train.
pub const TRAIN: &[Flag] = &[
    flag("data_dir", Text, "", "Folder of images"),
    flag("schedule_sampler", Text, "uniform", "Choice of t: uniform or loss-second-moment"),
    flag("lr", Float, "1e-4", "Learning rate"),
    flag("weight_decay", Float, "0.0", "Decoupled weight decay"),
    flag("lr_anneal_steps", Int, "0", "Let the rate fall to 0 over this many steps and stop there; 0: constant rate"),
    flag("batch_size", Int, "1", "Images per step"),
    flag("microbatch", Int, "-1", "Images per pass; -1: the whole batch"),
    flag("ema_rate", Text, "0.9999", "Rates of the moving averages, with commas"),
    flag("log_interval", Int, "10", "Steps between lines of the log"),
    flag("save_interval", Int, "10000", "Steps between checkpoints"),
    flag("resume_checkpoint", Text, "", "modelNNNNNN.pt to go on from, or a checkpoint of this program"),
    flag("use_fp16", Bool, "False", "Without effect here"),
    flag("fp16_scale_growth", Float, "1e-3", "Without effect here"),
];

/// The scripts that sample.
pub const SAMPLE: &[Flag] = &[
    flag("clip_denoised", Bool, "True", "Clip predicted images to the range of pixels"),
    flag("num_samples", Int, "10000", "Number of pictures"),
    flag("batch_size", Int, "16", "Pictures made at the same time"),
    flag("use_ddim", Bool, "False", "DDIM rather than ancestral sampling"),
    flag("model_path", Text, "", "A .pt of the reference, or a checkpoint of this program"),
];

/// `super_res_sample` beside [`SAMPLE`].
pub const BASE: &[Flag] = &[flag("base_samples", Text, "", "The small images, an .npz with arr_0 (labels in arr_1)")];

/// `image_nll`.
pub const NLL: &[Flag] = &[
    flag("data_dir", Text, "", "Folder of images"),
    flag("clip_denoised", Bool, "True", "Clip predicted images to the range of pixels"),
    flag("num_samples", Int, "1000", "Number of images"),
    flag("batch_size", Int, "1", "Terms evaluated at the same time"),
    flag("model_path", Text, "", "A .pt of the reference, or a checkpoint of this program"),
];

/// What no tensor of a `.pt` tells: given with its default too when such a file is opened.
pub const UNTOLD: [&str; 8] = [
    "image_size",
    "large_size",
    "small_size",
    "num_heads",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
    "rescale_learned_sigmas",
];

impl Flag {
    /// The flag in clap's terms.
    pub fn arg(&self) -> Arg {
        let parser: ValueParser = match self.kind {
            Kind::Bool => ValueParser::new(boolean),
            Kind::Int => value_parser!(i64).into(),
            Kind::Float => value_parser!(f64).into(),
            Kind::Text => value_parser!(String),
        };
        let name = match self.kind {
            Kind::Bool => "BOOL",
            Kind::Int => "N",
            Kind::Float => "X",
            Kind::Text => "TEXT",
        };
        let arg = Arg::new(self.name).long(self.name).value_name(name).help(self.about).value_parser(parser);
        let arg = arg.default_value(self.default).allow_negative_numbers(true).help_heading("Flags of the reference");
        match self.kind {
            Kind::Bool => arg.num_args(0..=1).default_missing_value("True"),
            _ => arg,
        }
    }

    /// Its value as it was written.
    pub fn value(&self, m: &ArgMatches) -> String {
        let mut values = m.get_raw(self.name).into_iter().flatten();
        values.next_back().map_or(String::new(), |v| v.to_string_lossy().into_owned())
    }

    /// Whether it was written.
    pub fn given(&self, m: &ArgMatches) -> bool {
        m.value_source(self.name) == Some(ValueSource::CommandLine)
    }
}

/// Writes every flag of `args` out in full: `--num_s=3` as `--num_samples=3`. `ours` are further flags that are known.
///
/// # Errors
/// [`Error::Config`] for a beginning that several flags have, naming them.
pub fn spell_out(args: Vec<OsString>, flags: &[Flag], ours: &[&str]) -> Result<Vec<OsString>> {
    let mut over = false;
    let one = |arg: OsString| {
        over |= arg == "--";
        match arg.to_str().and_then(|a| a.strip_prefix("--")).filter(|a| !over && !a.is_empty()) {
            Some(text) => {
                let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                Ok(format!("--{}{value}", full_name(&name.replace('-', "_"), flags, ours)?).into())
            }
            None => Ok(arg),
        }
    };
    args.into_iter().map(one).collect()
}

/// The flag that `name` is or begins; itself if there is none.
fn full_name(name: &str, flags: &[Flag], ours: &[&str]) -> Result<String> {
    let theirs: Vec<&str> = flags.iter().map(|f| f.name).collect();
    if theirs.contains(&name) || ours.contains(&name) {
        return Ok(name.into());
    }
    let beginning = |names: &[&'static str]| names.iter().copied().filter(|n| n.starts_with(name)).collect::<Vec<_>>();
    let found = match beginning(&theirs) {
        none if none.is_empty() => ours.iter().copied().filter(|n| n.starts_with(name)).collect(),
        found => found,
    };
    match found[..] {
        [] => Ok(name.into()),
        [one] => Ok(one.into()),
        _ => Err(Error::Config(format!("--{name} is short for several flags: --{}", found.join(", --")))),
    }
}
