//! From pictures to the one buffer of a [`Dataset`]: decoding and resizing on all threads, one shape for all,
//! and the memory asked for before it is taken.

use std::{fs::File, io::Read, path::Path, path::PathBuf};

use rayon::prelude::*;

use super::{
    DataSpec, Dataset, Labels, Source,
    decode::{Picture, check_size, decode},
    resize::fit,
};
use crate::error::{Error, Result};

/// Largest encoded image in bytes: the file of a picture, not a film or a disk image with a wrong name.
pub const MAX_FILE: u64 = 1 << 30;

/// Indices of the images kept by `limit`: all, or `limit` evenly spaced ones, so that a set sorted by class keeps
/// every class.
pub fn kept(n: usize, limit: Option<usize>) -> Vec<usize> {
    match limit {
        Some(limit) if limit < n => (0..limit).map(|i| (i as u128 * n as u128 / limit as u128) as usize).collect(),
        _ => (0..n).collect(),
    }
}

/// Memory that can still be used, in bytes, where the system tells: what is free, at most what a container may have.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let free = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    let container = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|t| t.trim().parse().ok());
    Some(container.map_or(free, |limit: u64| free.min(limit)))
}

fn no_room(path: &Path, [n, h, w, c]: [usize; 4], need: u128) -> Error {
    let has = available_memory().map_or(String::new(), |b| format!(", {:.1} MB are available", b as f64 / 1e6));
    Error::data(
        path,
        format!(
            "{n} images of {w}x{h}x{c} need {:.1} MB of memory (n·h·w·c bytes){has}: choose a smaller image \
             size or a limit on the number of images",
            need as f64 / 1e6
        ),
    )
}

/// n·h·w·c, if there is that much memory.
///
/// # Errors
/// [`Error::Data`] naming the need, what is available and the remedy.
pub fn fits(path: &Path, shape: [usize; 4]) -> Result<usize> {
    let need = shape.iter().fold(1u128, |product, &d| product * d as u128);
    let free = available_memory().map_or(u128::MAX, u128::from);
    if need > free || need > isize::MAX as u128 { Err(no_room(path, shape, need)) } else { Ok(need as usize) }
}

/// An empty buffer with room for n·h·w·c bytes.
///
/// # Errors
/// As [`fits`].
pub fn reserve(path: &Path, shape: [usize; 4]) -> Result<Vec<u8>> {
    let need = fits(path, shape)?;
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(need).map_err(|_| no_room(path, shape, need as u128))?;
    Ok(buffer)
}

/// One encoded image on its way into slot `slot` of the set. `path` is shown in errors and read when `bytes` is None.
pub struct Item {
    /// Index in the set.
    pub slot: usize,
    /// The file, or archive/entry.
    pub path: PathBuf,
    /// The encoded image, if it is not the file's content.
    pub bytes: Option<Vec<u8>>,
}

/// A decoded item at its final size, with the (w, h) it came in.
struct Fitted {
    picture: Picture,
    original: (usize, usize),
}

impl Item {
    fn fitted(&self, spec: &DataSpec) -> Result<Fitted> {
        let fail = |what: String| Error::data(&self.path, what);
        let read;
        let bytes = match &self.bytes {
            Some(bytes) => bytes,
            None => {
                read = read_bounded(&self.path)?;
                &read
            }
        };
        let picture = decode(bytes).map_err(fail)?;
        let original = (picture.w, picture.h);
        Ok(Fitted { picture: shape(picture, spec).map_err(fail)?, original })
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path, "read"))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(Error::io(path, "read"))?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(Error::data(path, format!("larger than {} MB: not an image", MAX_FILE >> 20))),
        false => Ok(bytes),
    }
}

/// The channels and the size the spec asks for, if it does.
fn shape(picture: Picture, spec: &DataSpec) -> std::result::Result<Picture, String> {
    let c = spec.channels.unwrap_or(picture.c);
    let picture = picture.with_channels(c);
    match spec.image_size {
        Some(size) => fit(picture, size),
        None => Ok(picture),
    }
}

/// The buffer of a set of encoded images, filled in any order.
pub struct Canvas<'a> {
    spec: &'a DataSpec,
    n: usize,
    first: Option<(PathBuf, [usize; 3])>,
    pixels: Vec<u8>,
    min: (usize, usize),
    max: (usize, usize),
}

impl<'a> Canvas<'a> {
    /// Items decoded at a time: enough to feed the threads, few enough that the pictures in flight stay small.
    pub const CHUNK: usize = 64;

    /// Room for n images, reserved when the first one tells the shape.
    pub fn new(spec: &'a DataSpec, n: usize) -> Self {
        let (min, max) = ((usize::MAX, usize::MAX), (0, 0));
        Canvas { spec, n, first: None, pixels: Vec::new(), min, max }
    }

    /// Decodes the items in parallel and puts each into its slot.
    ///
    /// # Errors
    /// The error of the first item that has one: unreadable, damaged, or of another shape than the first image.
    pub fn place(&mut self, items: &[Item]) -> Result<()> {
        for chunk in items.chunks(Self::CHUNK) {
            let fitted: Vec<_> = chunk.par_iter().map(|item| item.fitted(self.spec)).collect();
            for (item, fitted) in chunk.iter().zip(fitted) {
                self.put(item, fitted?)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, item: &Item, Fitted { picture, original: (w, h) }: Fitted) -> Result<()> {
        let shape = [picture.h, picture.w, picture.c];
        let len = picture.pixels.len();
        match &self.first {
            None => {
                square(&item.path, shape)?;
                self.pixels = reserve(&self.spec.path, [self.n, shape[0], shape[1], shape[2]])?;
                self.pixels.resize(self.n * len, 0);
                self.first = Some((item.path.clone(), shape));
            }
            Some((path, first)) if *first != shape => return Err(mixed(&self.spec.path, path, *first, item, shape)),
            Some(_) => {}
        }
        self.min = (self.min.0.min(w), self.min.1.min(h));
        self.max = (self.max.0.max(w), self.max.1.max(h));
        self.pixels[item.slot * len..][..len].copy_from_slice(&picture.pixels);
        Ok(())
    }

    /// The finished set, with the sizes seen noted in `source`.
    pub fn finish(self, labels: Option<Vec<i32>>, classes: Vec<String>, source: Source) -> Dataset {
        let (_, [h, w, c]) = self.first.expect("a canvas is finished after its images were placed");
        let source = Source { min_size: self.min, max_size: self.max, ..source };
        Dataset { n: self.n, h, w, c, pixels: self.pixels, labels, classes, source }
    }
}

fn square(path: &Path, [h, w, _]: [usize; 3]) -> Result<()> {
    match h == w {
        true => Ok(()),
        false => Err(Error::data(
            path,
            format!(
                "{w}x{h} pixels, but images must be square: give --image-size (such as {}) to scale the shorter side \
                 to it and cut the middle",
                h.min(w).next_power_of_two().min(64)
            ),
        )),
    }
}

/// Two images of one set disagree in size or channels.
fn mixed(root: &Path, path: &Path, first: [usize; 3], item: &Item, shape: [usize; 3]) -> Error {
    let kind = |c: usize| if c == 1 { "grey" } else { "colour" };
    let what = if first[2] != shape[2] {
        let (a, b) = (kind(first[2]), kind(shape[2]));
        format!("{} is {a}, {} is {b}: give --channels 1 or 3 to convert all", path.display(), item.path.display())
    } else {
        format!(
            "{} is {}x{}, {} is {}x{}: give --image-size to bring all to one",
            path.display(),
            first[1],
            first[0],
            item.path.display(),
            shape[1],
            shape[0]
        )
    };
    Error::data(root, format!("images differ: {what}"))
}

/// A set that comes as one array of pixels: (n, h, w, c).
pub struct Raw {
    /// n, h, w, c.
    pub shape: [usize; 4],
    /// The values.
    pub pixels: Vec<u8>,
    /// One label per image.
    pub labels: Option<Vec<i32>>,
    /// Names of the labels 0, 1, …
    pub classes: Vec<String>,
}

impl Raw {
    /// The set with the spec's limit, channels, size and wish for labels applied.
    ///
    /// # Errors
    /// [`Error::Data`] for an empty set, absurd or oblong sizes, or too little memory.
    pub fn into_dataset(mut self, spec: &DataSpec, source: Source) -> Result<Dataset> {
        let [n, h, w, c] = self.shape;
        assert!(self.pixels.len() == n * h * w * c, "raw set: {} bytes for {:?}", self.pixels.len(), self.shape);
        if n == 0 {
            return Err(Error::data(&spec.path, "there are no images in it"));
        }
        check_size(w, h).map_err(|what| Error::data(&spec.path, what))?;
        if matches!(spec.labels, Labels::Prefix | Labels::Folder) {
            let what = "labels by prefix or folder need images with names; this set has labels of its own or none";
            return Err(Error::data(&spec.path, what));
        }
        let keep = kept(n, spec.limit);
        self.labels = self.labels.map(|l| keep.iter().map(|&i| l[i]).collect());
        if spec.labels == Labels::None {
            (self.labels, self.classes) = (None, Vec::new());
        }
        let out_c = spec.channels.unwrap_or(c);
        let (out_h, out_w) = spec.image_size.map_or((h, w), |size| (size, size));
        square(&spec.path, [out_h, out_w, out_c])?;
        let source = Source { found: n, min_size: (w, h), max_size: (w, h), ..source };
        let dataset = |pixels, labels, classes| Dataset {
            n: keep.len(),
            h: out_h,
            w: out_w,
            c: out_c,
            pixels,
            labels,
            classes,
            source,
        };
        if keep.len() == n && [out_h, out_w, out_c] == [h, w, c] {
            return Ok(dataset(self.pixels, self.labels, self.classes));
        }
        let mut pixels = reserve(&spec.path, [keep.len(), out_h, out_w, out_c])?;
        for chunk in keep.chunks(1024) {
            let one = |&i: &usize| {
                let pixels = self.pixels[i * h * w * c..][..h * w * c].to_vec();
                shape(Picture { h, w, c, pixels }, spec).map_err(|what| Error::data(&spec.path, what))
            };
            for picture in chunk.par_iter().map(one).collect::<Vec<_>>() {
                pixels.extend(picture?.pixels);
            }
        }
        Ok(dataset(pixels, self.labels, self.classes))
    }
}
