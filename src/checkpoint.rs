//! One file per checkpoint, in the safetensors format: everything a run needs to sample from it or to go on.
//!
//! ```text
//! model.<name>          weights, f32, named as in the reference's state dict; convolutions (out, kh, kw, in)
//! ema.<rate>.<name>     each moving average
//! adam_m.<name> adam_v.<name>   moments of the optimiser
//! state.<name>          what else survives from step to step: the loss history, the last t and losses
//! __metadata__          format version, program, step, images seen, position in the data, configuration as JSON
//! ```
//!
//! The weights lie in flat regions in memory ([`Slot`] gives each tensor its place); gaps between them are not stored.
//! A file is written under a temporary name in the same folder, synced and renamed, so that the old one stays whole
//! until the new one is. Reading maps the file and checks every name, type and size before anything is copied.

mod damage;
mod folder;

pub use folder::{clear, file_name, find, list, prune, replace};

use crate::config::Config;
use crate::error::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Version of the layout above, and the metadata field that says it.
const FORMAT: u32 = 1;
const FORMAT_KEY: &str = "iddpm_format";

/// Name, size and place in the flat region of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Slot<'a> {
    /// Name in the reference's state dict.
    pub name: &'a str,
    /// Size.
    pub dims: &'a [usize],
    /// First element in the region.
    pub offset: usize,
}

impl Slot<'_> {
    fn len(&self) -> usize {
        self.dims.iter().product()
    }
}

/// How far a run has come, and what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Images trained on.
    pub images: u64,
    /// Images drawn from the data set, over all epochs.
    pub position: u64,
    /// Every setting.
    pub config: Config,
}

/// A value that survives from step to step, as bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct StateValue {
    /// Name.
    pub name: String,
    /// Whether the bytes are i32 rather than f32.
    pub integers: bool,
    /// The bytes, 4 per element.
    pub bytes: Vec<u8>,
}

/// Everything that is saved. The regions are flat, with gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// How far the run has come.
    pub progress: Progress,
    /// Weights.
    pub params: Vec<f32>,
    /// Moving averages, one after the other, in the order of the configuration's rates.
    pub ema: Vec<f32>,
    /// First moments.
    pub adam_m: Vec<f32>,
    /// Second moments.
    pub adam_v: Vec<f32>,
    /// The rest.
    pub state: Vec<StateValue>,
}

/// One tensor on its way into a file.
struct Tensor<'a> {
    integers: bool,
    dims: Vec<usize>,
    bytes: &'a [u8],
}

/// Elements on their way into a file.
struct Elements(Vec<f32>);

impl AsRef<[u8]> for Elements {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Name, whether it holds integers, and size of a tensor in the header.
type Entry<'a> = (&'a str, bool, &'a [usize]);

/// Prefix of the tensors of the moving average of this rate.
pub fn ema_prefix(rate: f64) -> String {
    format!("ema.{rate}")
}

/// Writes `snapshot` to `path`, replacing what is there only when the new file is complete and on the disk.
/// Equal snapshots are equal files.
///
/// # Errors
/// [`Error::Io`] when the disk is full or refuses; `path` is then as it was.
pub fn save(path: &Path, snapshot: &Snapshot, slots: &[Slot]) -> Result<()> {
    let rates = &snapshot.progress.config.train.ema_rates;
    let len = snapshot.params.len();
    assert_eq!(snapshot.ema.len(), len * rates.len(), "one moving average per rate");
    let mut regions = vec![
        ("model".to_string(), &snapshot.params[..]),
        ("adam_m".to_string(), &snapshot.adam_m[..]),
        ("adam_v".to_string(), &snapshot.adam_v[..]),
    ];
    regions.extend(rates.iter().zip(snapshot.ema.chunks_exact(len)).map(|(r, e)| (ema_prefix(*r), e)));
    let mut tensors = BTreeMap::new();
    for (prefix, region) in &regions {
        for s in slots {
            let bytes = bytemuck::cast_slice(&region[s.offset..s.offset + s.len()]);
            tensors.insert(format!("{prefix}.{}", s.name), Tensor { integers: false, dims: s.dims.to_vec(), bytes });
        }
    }
    for v in &snapshot.state {
        let tensor = Tensor { integers: v.integers, dims: vec![v.bytes.len() / 4], bytes: &v.bytes };
        tensors.insert(format!("state.{}", v.name), tensor);
    }
    let entries = tensors.iter().map(|(name, t)| (name.as_str(), t.integers, t.dims.as_slice()));
    let header = header(&snapshot.progress, entries);
    write_whole(path, &header, tensors.values().map(|t| Ok(t.bytes)))
}

/// Writes a file of the tensors `families` × `slots` alone, each made by `read(family, slot number)` when its turn
/// comes, so that a model need not fit into memory twice. Families are `model`, `ema.<rate>`, `adam_m` and `adam_v`.
///
/// # Errors
/// Those of `read` and of [`save`]; `path` is then as it was.
pub fn save_parts(
    path: &Path,
    progress: &Progress,
    families: &[String],
    slots: &[Slot],
    mut read: impl FnMut(&str, usize) -> Result<Vec<f32>>,
) -> Result<()> {
    let parts = parts(families, slots);
    let header = header(progress, parts.iter().map(|(name, _, i)| (name.as_str(), false, slots[*i].dims)));
    let tensors = parts.iter().map(|&(_, family, i)| {
        let values = read(family, i)?;
        assert_eq!(values.len(), slots[i].len(), "elements of {}", slots[i].name);
        Ok(Elements(values))
    });
    write_whole(path, &header, tensors)
}

/// Name, family and slot of every tensor, in the order of names.
fn parts<'a>(families: &'a [String], slots: &[Slot]) -> Vec<(String, &'a str, usize)> {
    let mut parts = Vec::with_capacity(families.len() * slots.len());
    for family in families {
        parts.extend(slots.iter().enumerate().map(|(i, s)| (format!("{family}.{}", s.name), family.as_str(), i)));
    }
    parts.sort();
    parts
}

/// Length and JSON text of the header: metadata, then each tensor with its place, in the order of names.
fn header<'a>(progress: &Progress, tensors: impl Iterator<Item = Entry<'a>>) -> Vec<u8> {
    let metadata = json!({
        FORMAT_KEY: FORMAT.to_string(),
        "program": concat!("iddpm ", env!("CARGO_PKG_VERSION")),
        "layout": "little-endian; convolution weights (out, kh, kw, in)",
        "step": progress.step.to_string(),
        "images": progress.images.to_string(),
        "position": progress.position.to_string(),
        "config": json!(progress.config).to_string(),
    });
    let mut fields = serde_json::Map::from_iter([("__metadata__".to_string(), metadata)]);
    let mut at = 0;
    for (name, integers, dims) in tensors {
        let (dtype, end) = (if integers { "I32" } else { "F32" }, at + 4 * dims.iter().product::<usize>());
        fields.insert(name.into(), json!({ "dtype": dtype, "shape": dims, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = serde_json::Value::Object(fields).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

fn write_whole<B: AsRef<[u8]>>(path: &Path, header: &[u8], tensors: impl Iterator<Item = Result<B>>) -> Result<()> {
    replace(path, |out| {
        out.write_all(header).map_err(Error::io(path, "write"))?;
        for bytes in tensors {
            out.write_all(bytes?.as_ref()).map_err(Error::io(path, "write"))?;
        }
        Ok(())
    })
}

/// A checkpoint that has been opened: mapped, its header read, its tensors not yet looked at.
pub struct Checkpoint {
    path: PathBuf,
    map: memmap2::Mmap,
    /// How far the run had come, and its configuration.
    pub progress: Progress,
}

impl Checkpoint {
    /// What [`save_parts`] would write, in memory instead of a file; `path` stands for it in messages.
    ///
    /// # Errors
    /// Those of `read`; [`Error::Io`] without memory.
    pub fn in_memory(
        path: &Path,
        progress: Progress,
        families: &[String],
        slots: &[Slot],
        mut read: impl FnMut(&str, usize) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let parts = parts(families, slots);
        let header = header(&progress, parts.iter().map(|(name, _, i)| (name.as_str(), false, slots[*i].dims)));
        let len = header.len() + parts.iter().map(|(.., i)| 4 * slots[*i].len()).sum::<usize>();
        let mut map = memmap2::MmapMut::map_anon(len).map_err(Error::io(path, "find memory for"))?;
        map[..header.len()].copy_from_slice(&header);
        let mut rest = &mut map[header.len()..];
        for &(_, family, i) in &parts {
            let (place, after) = rest.split_at_mut(4 * slots[i].len());
            place.copy_from_slice(bytemuck::cast_slice(&read(family, i)?));
            rest = after;
        }
        let map = map.make_read_only().map_err(Error::io(path, "read"))?;
        Ok(Checkpoint { path: path.into(), map, progress })
    }

    /// Opens the file at `path`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a damaged, truncated or foreign file or one of another version; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "read"))?;
        // SAFETY: mapped for reading; a checkpoint is never changed in place, only replaced by rename.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path, "read"))?;
        let progress = parse(&map).map_err(|what| Error::checkpoint(path, what))?;
        Ok(Checkpoint { path: path.into(), map, progress })
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weights being trained, as a flat region of `len` elements.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor, what was expected and what was found.
    pub fn weights(&self, slots: &[Slot], len: usize) -> Result<Vec<f32>> {
        self.region("model", slots, len)
    }

    /// The moving average of `rate`, as a flat region.
    ///
    /// # Errors
    /// As [`Self::weights`]; also for a rate that was not averaged.
    pub fn ema(&self, rate: f64, slots: &[Slot], len: usize) -> Result<Vec<f32>> {
        let rates = &self.progress.config.train.ema_rates;
        if !rates.contains(&rate) {
            let have: Vec<_> = rates.iter().map(f64::to_string).collect();
            return Err(Error::checkpoint(
                &self.path,
                format!("no moving average of rate {rate}; there are {}", have.join(", ")),
            ));
        }
        self.region(&ema_prefix(rate), slots, len)
    }

    /// The first and the second moments of AdamW, as flat regions.
    ///
    /// # Errors
    /// As [`Self::weights`].
    pub fn moments(&self, slots: &[Slot], len: usize) -> Result<[Vec<f32>; 2]> {
        Ok([self.region("adam_m", slots, len)?, self.region("adam_v", slots, len)?])
    }

    /// Whether the file holds moving averages beside the weights; an imported one may hold the weights alone.
    pub fn has_averages(&self) -> bool {
        self.holds("ema.")
    }

    fn holds(&self, prefix: &str) -> bool {
        SafeTensors::read_metadata(&self.map).is_ok_and(|(_, m)| m.offset_keys().iter().any(|k| k.starts_with(prefix)))
    }

    /// Whether the model was imported and has not been trained since: it may lack averages, moments and state.
    pub fn imported(&self) -> bool {
        self.progress.config.data.images == 0
    }

    /// Everything, to go on training. `state` lists the names, types and lengths that the run expects. What an imported
    /// file lacks is as in a new run: averages equal to the weights, moments and state 0.
    ///
    /// # Errors
    /// As [`Self::weights`].
    pub fn snapshot(&self, slots: &[Slot], len: usize, state: &[(String, bool, usize)]) -> Result<Snapshot> {
        let rates = &self.progress.config.train.ema_rates;
        let lacks = |prefix: &str| self.imported() && !self.holds(prefix);
        let (no_averages, no_moments, no_state) = (lacks("ema."), lacks("adam_"), lacks("state."));
        let average = |r: &f64| self.region(&if no_averages { "model".into() } else { ema_prefix(*r) }, slots, len);
        let averages = rates.iter().map(average).collect::<Result<Vec<_>>>()?;
        let moment = |name| if no_moments { Ok(vec![0.0; len]) } else { self.region(name, slots, len) };
        let tensors = self.tensors()?;
        let values = state.iter().map(|(name, integers, n)| {
            if no_state {
                return Ok(StateValue { name: name.clone(), integers: *integers, bytes: vec![0; 4 * n] });
            }
            let dtype = if *integers { Dtype::I32 } else { Dtype::F32 };
            let bytes = self.tensor(&tensors, &format!("state.{name}"), dtype, &[*n])?.to_vec();
            Ok(StateValue { name: name.clone(), integers: *integers, bytes })
        });
        Ok(Snapshot {
            progress: self.progress.clone(),
            params: self.region("model", slots, len)?,
            ema: averages.concat(),
            adam_m: moment("adam_m")?,
            adam_v: moment("adam_v")?,
            state: values.collect::<Result<_>>()?,
        })
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.map).map_err(|e| Error::checkpoint(&self.path, format!("damaged: {e}")))
    }

    fn region(&self, prefix: &str, slots: &[Slot], len: usize) -> Result<Vec<f32>> {
        let tensors = self.tensors()?;
        let bytes = |s: &Slot| self.tensor(&tensors, &format!("{prefix}.{}", s.name), Dtype::F32, s.dims);
        // All of them before memory is taken: a damaged configuration may ask for any amount.
        let found = slots.iter().map(bytes).collect::<Result<Vec<_>>>()?;
        let mut flat = vec![0.0f32; len];
        for (s, bytes) in slots.iter().zip(found) {
            let out = &mut flat[s.offset..s.offset + s.len()];
            bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes);
            if let Some(bad) = out.iter().find(|x| !x.is_finite()) {
                return Err(Error::checkpoint(
                    &self.path,
                    format!("{prefix}.{} holds {bad}: use an older one", s.name),
                ));
            }
        }
        Ok(flat)
    }

    fn tensor<'a>(&self, all: &SafeTensors<'a>, name: &str, dtype: Dtype, dims: &[usize]) -> Result<&'a [u8]> {
        let bad = |what: String| Error::checkpoint(&self.path, what);
        let t: TensorView<'a> =
            all.tensor(name).map_err(|_| bad(format!("no tensor {name}, which the model needs")))?;
        if t.dtype() != dtype || t.shape() != dims {
            let (found, shape) = (t.dtype(), t.shape());
            return Err(bad(format!("tensor {name}: expected {dtype:?} {dims:?}, found {found:?} {shape:?}")));
        }
        Ok(t.data())
    }
}

/// What the bytes of a checkpoint say of its run; its tensors are not looked at.
///
/// # Errors
/// What is damaged, missing or of another program or version, in words.
pub fn parse(bytes: &[u8]) -> std::result::Result<Progress, String> {
    damage::check_length(bytes)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| format!("damaged header: {e}"))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let Some(format) = metadata.get(FORMAT_KEY) else { return Err(damage::foreign(&header.offset_keys())) };
    if *format != FORMAT.to_string() {
        return Err(format!("checkpoint format {format}, this program reads {FORMAT}: use the version that wrote it"));
    }
    let progress = read_progress(&metadata)?;
    let impossible = |e| format!("damaged metadata: impossible configuration: {e}");
    progress.config.validate().map_err(impossible)?;
    Ok(progress)
}

/// The metadata as numbers and a configuration.
fn read_progress(metadata: &HashMap<String, String>) -> std::result::Result<Progress, String> {
    let field = |name| metadata.get(name).ok_or_else(|| format!("damaged metadata: no field `{name}`"));
    let number = |name| {
        let text = field(name)?;
        u64::from_str(text).map_err(|_| format!("damaged metadata: field `{name}` is {text:?}, not a number"))
    };
    let config =
        serde_json::from_str(field("config")?).map_err(|e| format!("damaged metadata: field `config`: {e}"))?;
    Ok(Progress { step: number("step")?, images: number("images")?, position: number("position")?, config })
}

#[cfg(test)]
mod tests;
