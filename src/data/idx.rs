//! MNIST's idx files: big-endian header `00 00 08 d`, d sizes of 32 bits, then bytes; d = 3 for images (n, h, w),
//! d = 1 for labels (n). Gzipped or not. Labels are looked for beside the images, under the name with
//! `images` → `labels` and `idx3` → `idx1`.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    DataSpec, Dataset, Labels, Source, Split,
    decode::check_size,
    load::{Raw, fits},
    reader,
};
use crate::error::{Error, Result};

/// A file of images and, if there is one, the file of their labels.
pub struct Pair {
    images: PathBuf,
    labels: Option<PathBuf>,
}

impl Pair {
    /// The images at `path` with the labels found beside them.
    pub fn beside(path: &Path) -> Pair {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = name.strip_suffix(".gz").unwrap_or(&name).replace("images", "labels").replace("idx3", "idx1");
        let candidates = [plain.clone(), format!("{plain}.gz")].map(|n| path.with_file_name(n));
        let labels = candidates.into_iter().find(|p| p != path && p.is_file());
        Pair { images: path.into(), labels }
    }
}

/// True for the name of a test file.
pub fn is_test(name: &str) -> bool {
    name.contains("t10k") || name.contains("test")
}

/// The idx files of a folder that belong to the spec's split; None if there are no idx files in it.
///
/// # Errors
/// [`Error::Data`] when a split is missing or there are several candidates for it.
pub fn in_folder(spec: &DataSpec) -> Result<Option<Vec<Pair>>> {
    let entries = std::fs::read_dir(&spec.path).map_err(Error::io(&spec.path, "read"))?;
    let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|n| n.contains("images") && n.contains("idx3"));
    names.sort();
    let unpacked = names.clone();
    names.retain(|n| !n.strip_suffix(".gz").is_some_and(|n| unpacked.iter().any(|u| u == n)));
    if names.is_empty() {
        return Ok(None);
    }
    let part = |test: bool| match names.iter().filter(|n| is_test(n) == test).collect::<Vec<_>>()[..] {
        [name] => Ok(Pair::beside(&spec.path.join(name))),
        [] => {
            Err(Error::data(&spec.path, format!("no {} images among {names:?}", if test { "test" } else { "train" })))
        }
        ref several => Err(Error::data(&spec.path, format!("several idx files fit, {several:?}: give one of them"))),
    };
    match spec.split {
        Split::Train => Ok(Some(vec![part(false)?])),
        Split::Test => Ok(Some(vec![part(true)?])),
        Split::All => Ok(Some(vec![part(false)?, part(true)?])),
    }
}

/// Loads the images, and the labels where every part has them.
pub fn open(spec: &DataSpec, parts: &[Pair]) -> Result<Dataset> {
    let mut whole: Option<Images> = None;
    let mut labels = Some(Vec::new());
    for part in parts {
        let images = images(&part.images, reader(&part.images)?)?;
        let one = match &part.labels {
            Some(path) if spec.labels != Labels::None => Some(labels_of(path, images.shape[0])?),
            _ => None,
        };
        labels = labels.zip(one).map(|(mut all, one)| {
            all.extend(one);
            all
        });
        whole = Some(match whole {
            None => images,
            Some(first) => first.join(images, &part.images)?,
        });
    }
    let Images { shape: [n, h, w], pixels } = whole.expect("at least one part");
    let source = Source { kind: "idx", path: spec.path.clone(), ..Source::default() };
    with_labels([n, h, w], pixels, labels).into_dataset(spec, source)
}

/// A raw set with classes named by their numbers, 0 to the largest label.
pub fn with_labels([n, h, w]: [usize; 3], pixels: Vec<u8>, labels: Option<Vec<u8>>) -> Raw {
    let top = labels.iter().flatten().max().copied();
    let classes = top.map_or(Vec::new(), |top| (0..=top).map(|class| class.to_string()).collect());
    let labels = labels.map(|l| l.into_iter().map(i32::from).collect());
    Raw { shape: [n, h, w, 1], pixels, labels, classes }
}

/// The content of a file of images: (n, h, w).
pub struct Images {
    /// n, h, w.
    pub shape: [usize; 3],
    /// The values.
    pub pixels: Vec<u8>,
}

impl Images {
    fn join(mut self, other: Images, path: &Path) -> Result<Images> {
        let ([n, h, w], [m, h2, w2]) = (self.shape, other.shape);
        if (h, w) != (h2, w2) {
            return Err(Error::data(path, format!("its images are {w2}x{h2}, the other part's {w}x{h}")));
        }
        self.pixels.extend(other.pixels);
        Ok(Images { shape: [n + m, h, w], ..self })
    }
}

/// Reads a file of images.
///
/// # Errors
/// [`Error::Data`]: not such a file, absurd sizes, more bytes than memory, or fewer bytes than the header says.
pub fn images(path: &Path, mut from: impl Read) -> Result<Images> {
    let [n, h, w] = header::<3>(path, &mut from, "images")?;
    check_size(w, h).map_err(|what| Error::data(path, what))?;
    let pixels = body(path, from, fits(path, [n, h, w, 1])?)?;
    Ok(Images { shape: [n, h, w], pixels })
}

/// Reads a file of labels.
///
/// # Errors
/// [`Error::Data`]: not such a file, or fewer bytes than the header says.
pub fn labels(path: &Path, mut from: impl Read) -> Result<Vec<u8>> {
    let [n] = header::<1>(path, &mut from, "labels")?;
    body(path, from, n)
}

fn labels_of(path: &Path, n: usize) -> Result<Vec<u8>> {
    let labels = labels(path, reader(path)?)?;
    match labels.len() == n {
        true => Ok(labels),
        false => Err(Error::data(path, format!("{} labels for {n} images: they do not belong together", labels.len()))),
    }
}

fn header<const D: usize>(path: &Path, from: &mut impl Read, what: &str) -> Result<[usize; D]> {
    let mut word = || {
        let mut bytes = [0; 4];
        let read = from.read_exact(&mut bytes);
        read.map(|()| bytes).map_err(|e| Error::data(path, format!("damaged or truncated idx header: {e}")))
    };
    let magic = word()?;
    if magic != [0, 0, 8, D as u8] {
        return Err(Error::data(
            path,
            format!("no idx file of {what}: it begins {magic:02x?}, not [00, 00, 08, {D:02}]"),
        ));
    }
    let mut sizes = [0; D];
    for size in &mut sizes {
        *size = u32::from_be_bytes(word()?) as usize;
    }
    Ok(sizes)
}

/// Memory taken before the first byte is read; a header may state any number of images.
const FIRST: usize = 64 << 20;

fn body(path: &Path, from: impl Read, len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len.min(FIRST));
    let read = from.take(len as u64).read_to_end(&mut bytes);
    let got = bytes.len();
    match read {
        Err(e) => Err(Error::data(path, format!("damaged after {got} of {len} bytes: {e}"))),
        Ok(_) if got < len => Err(Error::data(path, format!("truncated: {got} of the {len} bytes its header states"))),
        Ok(_) => Ok(bytes),
    }
}
