//! Writing a model for other programs: the reference's state dict as `.pt` or `.safetensors`, or a folder for diffusers.
//!
//! A `.pt` is what `torch.save` writes: a zip archive of stored entries with a pickle of protocol 2 that builds an
//! OrderedDict of tensors. Files in the safetensors format also carry the whole configuration (`iddpm_config`), so that
//! they can be imported again without a flag.

use super::diffusers;
use super::reference::{reference_dims, to_reference};
use crate::checkpoint::{Slot, replace};
use crate::config::{Config, ModelConfig};
use crate::error::{Error, Result};
use serde_json::json;
use std::io::{self, Write};
use std::path::Path;

/// Metadata field of the configuration.
pub const CONFIG_KEY: &str = "iddpm_config";
/// Elements of a `.pt` archive start at multiples of this, so that they can be mapped.
const ALIGN: usize = 64;

/// A model to be written: its tensors lie at `slots` of `flat`.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    /// Every setting.
    pub config: &'a Config,
    /// Name, size and place of each tensor, in registration order.
    pub slots: &'a [Slot<'a>],
    /// The weights.
    pub flat: &'a [f32],
}

impl Model<'_> {
    fn values(&self, slot: &Slot) -> &[f32] {
        &self.flat[slot.offset..slot.offset + slot.dims.iter().product::<usize>()]
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    move |e| Error::io(path, "write")(e)
}

/// Writes `m` to `path`: a state dict for the endings `.pt`, `.pth` and `.safetensors`, else a new folder for diffusers.
///
/// # Errors
/// [`Error::Config`] for a network that the format cannot hold, [`Error::Io`]; nothing is left at `path` then.
pub fn write(path: &Path, m: &Model) -> Result<()> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("pt" | "pth") => write_pt(path, m),
        Some("safetensors") => {
            let tensors = m.slots.iter().map(|s| {
                let values = to_reference(m.values(s), s.dims);
                (s.name.to_string(), reference_dims(s), values)
            });
            write_safetensors(path, m.config, &tensors.collect::<Vec<_>>())
        }
        None => write_folder(path, m),
        Some(other) => Err(Error::Config(format!(
            "{}: unknown ending .{other}; use .pt or .safetensors for a state dict, or none for a diffusers folder",
            path.display()
        ))),
    }
}

/// A tensor to be written: name, size, elements.
type Tensor = (String, Vec<usize>, Vec<f32>);

fn write_safetensors(path: &Path, config: &Config, tensors: &[Tensor]) -> Result<()> {
    let metadata = json!({ "format": "pt", CONFIG_KEY: json!(config).to_string() });
    let mut fields = serde_json::Map::from_iter([("__metadata__".to_string(), metadata)]);
    let mut at = 0;
    for (name, dims, values) in tensors {
        let end = at + 4 * values.len();
        fields.insert(name.clone(), json!({ "dtype": "F32", "shape": dims, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = serde_json::Value::Object(fields).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    replace(path, |out| {
        let mut all = || {
            out.write_all(&(text.len() as u64).to_le_bytes())?;
            out.write_all(&text)?;
            tensors.iter().try_for_each(|(.., values)| out.write_all(bytemuck::cast_slice(values)))
        };
        all().map_err(failed(path))
    })
}

/// `config.json`, the weights and the scheduler's settings, as `UNet2DModel.from_pretrained` reads them.
fn write_folder(path: &Path, m: &Model) -> Result<()> {
    let unet = diffusers::unet_config(&m.config.model)?;
    if std::fs::read_dir(path).is_ok_and(|mut d| d.next().is_some()) || path.is_file() {
        return Err(Error::Config(format!("{}: already there and not empty: choose another place", path.display())));
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new().prefix(".saving-").tempdir_in(parent).map_err(failed(path))?;
    let folder = temporary.path();
    let text = |name: &str, value: &serde_json::Value| {
        let text = serde_json::to_string_pretty(value).expect("settings are JSON");
        std::fs::write(folder.join(name), text).map_err(failed(path))
    };
    text("config.json", &unet)?;
    text("scheduler_config.json", &diffusers::scheduler_config(&m.config.diffusion))?;
    let index = json!({
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    text("model_index.json", &index)?;
    let tensors = m.slots.iter().flat_map(|s| diffusers::write_slot(&m.config.model, s, m.values(s)));
    let weights = folder.join("diffusion_pytorch_model.safetensors");
    write_safetensors(&weights, m.config, &tensors.collect::<Vec<_>>())?;
    let folder = temporary.keep();
    std::fs::rename(&folder, path).map_err(|e| {
        // The first error is the one to report.
        let _ = std::fs::remove_dir_all(&folder);
        failed(path)(e)
    })
}

fn write_pt(path: &Path, m: &Model) -> Result<()> {
    plain(m.config).map_err(|what| Error::Config(format!("{}: {what}", path.display())))?;
    let sizes: Vec<usize> = m.slots.iter().map(|s| m.values(s).len()).collect();
    write_archive(path, &state_dict(m.slots), &sizes, &|i| to_reference(m.values(&m.slots[i]), m.slots[i].dims))
}

/// The reference computes what the network of `config` does; its state dict has no place to say otherwise.
fn plain(config: &Config) -> std::result::Result<(), String> {
    let ours = ModelConfig { sine_first: false, ..config.model.clone() };
    let d = ModelConfig::default();
    let theirs = ModelConfig { freq_shift: d.freq_shift, norm_eps: d.norm_eps, downsample_padding: 1, ..ours.clone() };
    if ours == theirs {
        return Ok(());
    }
    Err(format!(
        "the reference's network has freq-shift 0, norm-eps 1e-5 and downsample-padding 1, this one {}, {} and {}: export \
         to a diffusers folder or to .safetensors",
        ours.freq_shift, ours.norm_eps, ours.downsample_padding
    ))
}

/// Writes the archive of `torch.save`: the program `pickle`, and storage i as `values(i)` gives it, one per slot.
///
/// # Errors
/// [`Error::Config`] for more than such an archive holds, [`Error::Io`]; nothing is left at `path` then.
pub(super) fn write_archive(
    path: &Path,
    pickle: &Pickle,
    sizes: &[usize],
    values: &dyn Fn(usize) -> Vec<f32>,
) -> Result<()> {
    let bytes: usize = sizes.iter().map(|n| 4 * n + 1024).sum();
    if u32::try_from(bytes).is_err() || sizes.len() > usize::from(u16::MAX) - 4 {
        let what = format!("{}: {bytes} bytes are too many for a .pt here: export to .safetensors", path.display());
        return Err(Error::Config(what));
    }
    replace(path, |out| {
        let mut zip = ZipWriter { out, at: 0, directory: Vec::new(), count: 0 };
        let mut all = || {
            zip.entry("archive/data.pkl", &pickle.0)?;
            zip.entry("archive/byteorder", b"little")?;
            for i in 0..sizes.len() {
                zip.entry(&format!("archive/data/{i}"), bytemuck::cast_slice(&values(i)))?;
            }
            zip.entry("archive/version", b"3\n")?;
            zip.finish()
        };
        all().map_err(failed(path))
    })
}

/// The state dict: an OrderedDict of tensors, storage i for slot i.
fn state_dict(slots: &[Slot]) -> Pickle {
    let mut p = Pickle(b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec());
    for (i, s) in slots.iter().enumerate() {
        p.text(s.name);
        p.tensor(i, &reference_dims(s));
    }
    p.0.extend_from_slice(b"u.");
    p
}

/// A program for the unpickler, protocol 2.
pub(super) struct Pickle(pub Vec<u8>);

impl Pickle {
    pub(super) fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
    }

    pub(super) fn number(&mut self, n: usize) {
        self.0.push(b'J');
        self.0.extend_from_slice(&i32::try_from(n).expect("fewer than 2^31 elements").to_le_bytes());
    }

    pub(super) fn float(&mut self, x: f64) {
        self.0.push(b'G');
        self.0.extend_from_slice(&x.to_be_bytes());
    }

    /// `torch._utils._rebuild_tensor_v2` of the whole storage `key`, contiguous.
    pub(super) fn tensor(&mut self, key: usize, dims: &[usize]) {
        self.0.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.0.extend_from_slice(b"ctorch\nFloatStorage\n");
        self.text(&key.to_string());
        self.text("cpu");
        self.number(dims.iter().product());
        self.0.extend_from_slice(b"tQ");
        self.number(0);
        let strides: Vec<usize> = (0..dims.len()).map(|d| dims[d + 1..].iter().product()).collect();
        for sizes in [dims, &strides] {
            self.0.push(b'(');
            sizes.iter().for_each(|&n| self.number(n));
            self.0.push(b't');
        }
        self.0.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtR");
    }
}

/// A zip archive of stored entries.
struct ZipWriter<W> {
    out: W,
    at: usize,
    directory: Vec<u8>,
    count: u16,
}

impl<W: Write> ZipWriter<W> {
    fn entry(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        // An extra field of zeros moves the elements to an aligned place, as PyTorch does.
        let end = self.at + 30 + name.len() + 4;
        let padding = end.next_multiple_of(ALIGN) - end;
        let extra = [b"FB", &(padding as u16).to_le_bytes()[..], &vec![0; padding]].concat();
        // Version 2.0, UTF-8 names, stored, 1980-01-01.
        let mut common = [20u16, 1 << 11, 0, 0, 0x21].map(u16::to_le_bytes).concat();
        for value in [crc.sum(), bytes.len() as u32, bytes.len() as u32] {
            common.extend_from_slice(&value.to_le_bytes());
        }
        common.extend_from_slice(&(name.len() as u16).to_le_bytes());
        let local = [b"PK\x03\x04", &common[..], &(extra.len() as u16).to_le_bytes(), name.as_bytes(), &extra].concat();
        self.directory.extend_from_slice(b"PK\x01\x02\x14\x00");
        self.directory.extend_from_slice(&common);
        // No extra field, no comment, disk 0, no attributes.
        self.directory.extend_from_slice(&[0; 12]);
        self.directory.extend_from_slice(&(self.at as u32).to_le_bytes());
        self.directory.extend_from_slice(name.as_bytes());
        self.out.write_all(&local)?;
        self.out.write_all(bytes)?;
        self.at += local.len() + bytes.len();
        self.count += 1;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.out.write_all(&self.directory)?;
        let count = self.count.to_le_bytes();
        let (len, at) = ((self.directory.len() as u32).to_le_bytes(), (self.at as u32).to_le_bytes());
        self.out.write_all(&[b"PK\x05\x06\0\0\0\0", &count[..], &count, &len, &at, &[0; 2]].concat())
    }
}
