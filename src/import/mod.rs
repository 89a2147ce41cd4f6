//! The field's checkpoints: reading what improved-diffusion, guided-diffusion and diffusers wrote, and writing it again.
//!
//! [`tensor_file`] reads a file of named tensors without running anything in it ([`pickle`], [`zip`]); [`mod@reference`] and
//! [`diffusers`] know the names and layouts; [`Source`] joins them: what a file tells of its model, and its tensors in
//! our order. [`export`] is the way back.

pub mod diffusers;
pub mod export;
pub mod optimizer;
pub mod pickle;
pub mod reference;
pub mod tensor_file;
pub mod zip;

use crate::checkpoint::Slot;
use crate::config::{Config, DiffusionConfig, ModelConfig, VarType};
use crate::error::{Error, Result};
use reference::{Deduced, Family};
use std::path::Path;
use tensor_file::TensorFile;

/// Weights of another program, and what is known of their model.
pub struct Source {
    /// The tensors.
    pub file: TensorFile,
    /// Named as diffusers does.
    diffusers: bool,
    known: Known,
}

/// What a file tells of its model.
#[expect(clippy::large_enum_variant, reason = "there is one of them")]
enum Known {
    /// What the sizes of the tensors tell.
    Shape(Deduced),
    /// The network, and the process if there are settings of a scheduler.
    Settings(ModelConfig, Option<DiffusionConfig>),
    /// Everything: an export of this program.
    Whole(Config),
}

impl Source {
    /// Opens a state dict, or a folder of diffusers.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for what cannot be read or is of another kind.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let folder = diffusers::Folder::open(path)?;
            let file = TensorFile::open(&folder.weights)?;
            let known = match whole(&file)? {
                Some(config) => Known::Whole(config),
                None => Known::Settings(folder.model, folder.diffusion),
            };
            return Ok(Source { file, diffusers: true, known });
        }
        Self::of(TensorFile::open(path)?)
    }

    /// The weights in `file`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it holds something else.
    pub fn of(file: TensorFile) -> Result<Self> {
        match reference::family(&file)? {
            Family::Weights => {}
            Family::Optimizer => {
                let what = "the state of an optimiser, not a model: give the model*.pt or ema_*.pt beside it too";
                return Err(Error::checkpoint(&file.path, what));
            }
            Family::Diffusers => {
                let what = "weights of diffusers: give the folder, whose config.json describes the network";
                return Err(Error::checkpoint(&file.path, what));
            }
        }
        let known = match whole(&file)? {
            Some(config) => Known::Whole(config),
            None => Known::Shape(Deduced::new(&file)?),
        };
        Ok(Source { file, diffusers: false, known })
    }

    /// Sets everything in `c` that the file tells.
    pub fn apply(&self, c: &mut Config) {
        match &self.known {
            Known::Shape(d) => d.apply(c),
            Known::Whole(config) => *c = config.clone(),
            Known::Settings(model, diffusion) => {
                let image_size = if model.image_size == 0 { c.model.image_size } else { model.image_size };
                let null_class = c.model.null_class && model.num_classes.is_some_and(|rows| rows > 1);
                let num_classes = model.num_classes.map(|rows| rows - usize::from(null_class));
                let low_res = c.model.low_res;
                let in_channels = model.in_channels / if low_res.is_some() { 2 } else { 1 };
                c.model = ModelConfig { image_size, null_class, num_classes, low_res, in_channels, ..model.clone() };
                if let Some(d) = diffusion {
                    c.diffusion = DiffusionConfig { loss_type: c.diffusion.loss_type, ..d.clone() };
                }
                if model.out_channels == 2 * in_channels {
                    c.diffusion.var_type = VarType::LearnedRange;
                }
            }
        }
    }

    /// Flags of the settings that the file does not tell and without which the model gives wrong pictures.
    pub fn untold(&self) -> &'static [&'static str] {
        match &self.known {
            Known::Shape(_) => &["image-size", "num-heads", "diffusion-steps", "noise-schedule", "rescale-timesteps"],
            Known::Settings(m, None) if m.image_size == 0 => &["image-size", "diffusion-steps", "noise-schedule"],
            Known::Settings(_, None) => &["diffusion-steps", "noise-schedule"],
            Known::Settings(m, _) if m.image_size == 0 => &["image-size"],
            Known::Settings(..) | Known::Whole(_) => &[],
        }
    }

    /// Whether `m` is the network of the file, as far as that tells.
    pub fn fits(&self, m: &ModelConfig) -> bool {
        match &self.known {
            Known::Shape(d) => d.fits(m),
            Known::Settings(..) => {
                let mut c = Config { model: m.clone(), ..Config::default() };
                self.apply(&mut c);
                c.model == *m
            }
            Known::Whole(Config { model, .. }) => model == m,
        }
    }

    /// Checks that the file holds exactly the tensors of `m`, which are `slots`; with `half`, in half precision too.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor, what was expected and what was found.
    pub fn check(&self, m: &ModelConfig, slots: &[Slot], half: bool) -> Result<()> {
        match self.diffusers {
            true => diffusers::check_names(&self.file, m, slots, half),
            false => reference::check_names(&self.file, slots, half),
        }
    }

    /// The elements of `slot` in our order, after [`Self::check`].
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a NaN or an infinity, naming the tensor.
    pub fn read(&self, m: &ModelConfig, slot: &Slot) -> Result<Vec<f32>> {
        match self.diffusers {
            true => diffusers::read_slot(&self.file, m, slot),
            false => reference::read(&self.file, slot.name, self.file.get(slot.name)?),
        }
    }
}

/// The configuration that an export of this program carries.
fn whole(file: &TensorFile) -> Result<Option<Config>> {
    let Some(text) = file.metadata.get(export::CONFIG_KEY) else { return Ok(None) };
    let bad =
        |e: String| Error::checkpoint(&file.path, format!("damaged metadata: field `{}`: {e}", export::CONFIG_KEY));
    let config: Config = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    config.validate().map_err(|e| bad(e.to_string()))?;
    Ok(Some(config))
}
