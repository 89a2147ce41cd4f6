//! Training images: every set becomes one u8 buffer (n, h, w, c) in memory, with labels if it has them.
//!
//! [`open`] tells the kinds apart by content: a folder of images, MNIST's idx files, CIFAR's binary files, a tar
//! (gzipped or not) of images or of CIFAR's files, an npz of images, or the built-in digits. [`Batches`] walks through
//! a set in a seeded order. Values v become network inputs as v/127.5 - 1; that and flips happen where a batch is used.

mod batches;
mod builtin;
mod cifar;
pub mod decode;
mod folder;
pub mod idx;
mod load;
pub mod low_res;
mod names;
mod npz;
pub mod resize;
mod tar;

use std::{
    collections::HashSet,
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use batches::Batches;
pub use builtin::LICENCE;

use crate::error::{Error, Result};

/// Where labels come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Labels {
    /// The set's own; for images with names: the folder, else the prefix, where these look like classes, else none.
    #[default]
    Auto,
    /// No labels.
    None,
    /// The file name up to the first `_`, as the reference.
    Prefix,
    /// The name of the folder an image lies in.
    Folder,
}

/// Part of a set that comes in a training and a test part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Training images; everything, where the set is not split.
    #[default]
    Train,
    /// Test images; an error where the set is not split.
    Test,
    /// Both, training images first where they are separate files.
    All,
}

/// Which images to load and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// A file or folder, or `builtin` (also `digits`) for the set inside the program.
    pub path: PathBuf,
    /// Side in pixels; None keeps the images as they are, which must then be square and of one size.
    pub image_size: Option<usize>,
    /// 1 (grey) or 3 (RGB); None keeps what the images have.
    pub channels: Option<usize>,
    /// Source of the labels.
    pub labels: Labels,
    /// Training part, test part or both.
    pub split: Split,
    /// At most this many images, evenly spaced over the set.
    pub limit: Option<usize>,
    /// Threads for decoding; None takes all.
    pub threads: Option<usize>,
}

impl DataSpec {
    /// The set at `path` as it is.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        DataSpec {
            path: path.into(),
            image_size: None,
            channels: None,
            labels: Labels::Auto,
            split: Split::Train,
            limit: None,
            threads: None,
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(what));
        match *self {
            DataSpec { image_size: Some(size), .. } if size == 0 || size > decode::MAX_SIDE => {
                refuse(format!("image size {size}: it must lie between 1 and {}", decode::MAX_SIDE))
            }
            DataSpec { channels: Some(c), .. } if c != 1 && c != 3 => {
                refuse(format!("{c} channels: images have 1 (grey) or 3 (RGB)"))
            }
            DataSpec { limit: Some(0), .. } => refuse("limit 0: at least one image is needed".into()),
            DataSpec { threads: Some(0), .. } => refuse("0 threads: at least one is needed".into()),
            _ => Ok(()),
        }
    }
}

impl Default for DataSpec {
    fn default() -> Self {
        DataSpec::new("builtin")
    }
}

/// Where a set came from and what it looked like there.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// "image folder", "idx", "CIFAR", "tar", "npz", "built-in digits".
    pub kind: &'static str,
    /// The path given.
    pub path: PathBuf,
    /// Images of the chosen split before the limit.
    pub found: usize,
    /// Files passed over because they are no images.
    pub skipped: usize,
    /// Smallest width and smallest height before resizing.
    pub min_size: (usize, usize),
    /// Largest width and largest height before resizing.
    pub max_size: (usize, usize),
    /// Names of the first few images, where they have names.
    pub first_names: Vec<String>,
}

/// A set of images in memory.
#[derive(Clone)]
pub struct Dataset {
    /// Images.
    pub n: usize,
    /// Height in pixels.
    pub h: usize,
    /// Width in pixels.
    pub w: usize,
    /// Channels, 1 or 3.
    pub c: usize,
    /// (n, h, w, c), 0 to 255.
    pub pixels: Vec<u8>,
    /// Class of each image, if the set has classes: 0 to `classes.len()` - 1.
    pub labels: Option<Vec<i32>>,
    /// Names of the classes; empty without labels.
    pub classes: Vec<String>,
    /// Where it came from.
    pub source: Source,
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let classes = self.classes.len();
        write!(f, "Dataset {{ {}x{}x{}x{}, {classes} classes, {:?} }}", self.n, self.h, self.w, self.c, self.source)
    }
}

impl Dataset {
    /// Values of one image.
    pub fn image_len(&self) -> usize {
        self.h * self.w * self.c
    }

    /// Image i: (h, w, c).
    pub fn image(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.image_len()..][..self.image_len()]
    }

    /// Copies the images at `indices` into `out`: (indices.len(), h, w, c).
    pub fn gather(&self, indices: &[u32], out: &mut [u8]) {
        assert!(out.len() == indices.len() * self.image_len(), "gather: {} bytes for {}", out.len(), indices.len());
        for (out, &i) in out.chunks_exact_mut(self.image_len()).zip(indices) {
            out.copy_from_slice(self.image(i as usize));
        }
    }

    /// A seeded walk through the set in batches, from `position` images drawn.
    ///
    /// # Errors
    /// [`Error::Data`] when the set has fewer images than a batch, naming both numbers.
    pub fn batches(&self, batch: usize, seed: u64, position: u64) -> Result<Batches> {
        match batch {
            0 => Err(Error::Config("batch size 0: at least one image per batch is needed".into())),
            _ if batch > self.n => Err(Error::data(
                &self.source.path,
                format!("{} images are fewer than one batch of {batch}: give a batch size of at most {0}", self.n),
            )),
            _ => Ok(Batches::new(self.n, batch, seed, position)),
        }
    }

    /// A number that changes when a pixel, a label or the order changes, so that a resumed run can tell that its data
    /// are still the same. It is the same on every machine and in every version.
    pub fn fingerprint(&self) -> u64 {
        let mix = |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b));
        let sizes = [self.n, self.h, self.w, self.c].into_iter().map(|d| d as u64);
        let labels = self.labels.iter().flatten().map(|&l| l as u64);
        sizes.chain(labels).chain(self.pixels.chunks(8).map(word)).fold(0, mix)
    }

    /// Images that equal an earlier image of the set in every pixel.
    pub fn duplicates(&self) -> usize {
        self.n - self.pixels.chunks_exact(self.image_len()).collect::<HashSet<_>>().len()
    }
}

/// Loads a set of images into memory.
///
/// # Errors
/// [`Error::Config`] for a spec that fits no set, [`Error::Data`] or [`Error::Io`] for what is missing, empty, unreadable,
/// damaged, of mixed sizes, without the labels asked for, or larger than memory; always with the path and the remedy.
pub fn open(spec: &DataSpec) -> Result<Dataset> {
    spec.check()?;
    let Some(threads) = spec.threads else { return open_any(spec) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::Config(format!("{threads} threads cannot be started: {e}")))?.install(|| open_any(spec))
}

fn open_any(spec: &DataSpec) -> Result<Dataset> {
    let path = &spec.path;
    if builtin::is_name(path) {
        return builtin::open(spec);
    }
    let about = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::data(
            path,
            "no such file or folder: give a folder of images, MNIST's idx files, CIFAR's .bin files, a .tar(.gz), an \
             .npz, or `builtin`",
        ),
        _ => Error::io(path, "read")(e),
    })?;
    if about.is_dir() {
        match (idx::in_folder(spec)?, cifar::in_folder(path)?) {
            (Some(found), _) => idx::open(spec, &found),
            (None, Some(files)) => cifar::open(spec, files),
            (None, None) => folder::open(spec),
        }
    } else {
        open_file(spec)
    }
}

fn open_file(spec: &DataSpec) -> Result<Dataset> {
    let path = &spec.path;
    let start = beginning(path)?;
    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let single = |is_test: bool| match spec.split == Split::Test && !is_test {
        true => Err(Error::data(path, "there is no test split in this file, going by its name")),
        false => Ok(()),
    };
    match start.get(..4) {
        Some([0, 0, 8, _]) => {
            single(idx::is_test(&name))?;
            idx::open(spec, &[idx::Pair::beside(path)])
        }
        Some(b"PK\x03\x04") => match zipped(&start) {
            Some(name) if !name.ends_with(".npy") => Err(Error::data(
                path,
                format!(
                    "{name} is no array of an .npz: of a zip of images give the folder that it is unpacked to, or make it a .tar"
                ),
            )),
            _ => npz::open(spec),
        },
        _ if start.get(257..262) == Some(b"ustar") => tar::open(spec),
        _ if name.ends_with(".bin") => {
            single(cifar::is_test(&name))?;
            cifar::open(spec, vec![path.clone()])
        }
        _ if names::is_image(&name) => {
            Err(Error::data(path, "a single image is no training set: give the folder it lies in"))
        }
        _ => Err(Error::data(
            path,
            "not a set of images: neither idx, CIFAR .bin, .tar, .tar.gz nor .npz (by its content)",
        )),
    }
}

/// Name of the first file of the zip archive that begins with `start`.
fn zipped(start: &[u8]) -> Option<String> {
    let length = u16::from_le_bytes(*start.get(26..)?.first_chunk()?);
    start.get(30..30 + usize::from(length)).map(|name| String::from_utf8_lossy(name).into_owned())
}

/// A file as a stream, unpacked if it is gzip.
fn reader(path: &Path) -> Result<Box<dyn Read>> {
    let open = || File::open(path).map_err(Error::io(path, "read"));
    let mut magic = Vec::new();
    open()?.take(2).read_to_end(&mut magic).map_err(Error::io(path, "read"))?;
    let file = BufReader::with_capacity(1 << 20, open()?);
    Ok(match magic[..] {
        [0x1F, 0x8B] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        _ => Box::new(file),
    })
}

/// The first 512 bytes of a file, or fewer, unpacked if it is gzip.
fn beginning(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    reader(path)?.take(512).read_to_end(&mut start).map_err(|e| Error::data(path, format!("cannot unpack it: {e}")))?;
    Ok(start)
}
