//! CIFAR's binary files: records of one label (CIFAR-10) or a coarse and a fine label (CIFAR-100) and 3072 values,
//! channel by channel (3, 32, 32). Here they become (32, 32, 3); CIFAR-100's class is the fine one. Class names come from
//! `batches.meta.txt` or `fine_label_names.txt` beside the files.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    DataSpec, Dataset, Source, Split,
    load::{Raw, reserve},
    reader,
};
use crate::error::{Error, Result};

const SIDE: usize = 32;
const VALUES: usize = 3 * SIDE * SIDE;
/// Upper bound of a file: ten times CIFAR-100's training file.
const MAX_FILE: u64 = 10 * 50_000 * (VALUES as u64 + 2);

/// True for the names under which CIFAR's images are distributed.
pub fn is_part(name: &str) -> bool {
    let numbered = name.strip_prefix("data_batch_").and_then(|n| n.strip_suffix(".bin"));
    numbered.is_some_and(|n| n.parse::<u8>().is_ok()) || ["test_batch.bin", "train.bin", "test.bin"].contains(&name)
}

/// True for the names of the lists of classes.
pub fn is_names(name: &str) -> bool {
    name == "batches.meta.txt" || name == "fine_label_names.txt"
}

/// CIFAR's files in a folder, sorted; None if there are none.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read.
pub fn in_folder(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let entries = std::fs::read_dir(path).map_err(Error::io(path, "read"))?;
    let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut files: Vec<_> = names.filter(|n| is_part(n)).map(|n| path.join(n)).collect();
    files.sort();
    Ok((!files.is_empty()).then_some(files))
}

/// One file as it lies on the disk or in an archive.
pub struct Part {
    /// Shown in errors; its last component tells train from test.
    pub path: PathBuf,
    /// The records.
    pub bytes: Vec<u8>,
}

/// Loads the files of the spec's split.
pub fn open(spec: &DataSpec, files: Vec<PathBuf>) -> Result<Dataset> {
    let read = |path: PathBuf| {
        let mut bytes = Vec::new();
        let read = reader(&path)?.take(MAX_FILE + 1).read_to_end(&mut bytes);
        read.map_err(|e| Error::data(&path, format!("damaged: {e}")))?;
        Ok(Part { path, bytes })
    };
    let given = files.len() == 1 && files[0] == spec.path;
    let files = files.into_iter().filter(|p| given || belongs(p, spec.split));
    let parts = files.map(read).collect::<Result<Vec<_>>>()?;
    let folder = if spec.path.is_dir() { Some(spec.path.as_path()) } else { spec.path.parent() };
    let lists = ["batches.meta.txt", "fine_label_names.txt"];
    let names = folder.and_then(|f| lists.iter().find_map(|name| std::fs::read_to_string(f.join(name)).ok()));
    join(spec, &parts, &names.unwrap_or_default(), "CIFAR")
}

/// True for the name of a test file.
pub fn is_test(name: &str) -> bool {
    name.starts_with("test")
}

/// Whether a file is of the split; a file of neither name belongs to the training part.
pub fn belongs(path: &Path, split: Split) -> bool {
    let test = path.file_name().is_some_and(|n| is_test(&n.to_string_lossy()));
    match split {
        Split::Train => !test,
        Split::Test => test,
        Split::All => true,
    }
}

/// One set from the files; `names` is the text of the list of classes, one per line, or empty.
pub fn join(spec: &DataSpec, parts: &[Part], names: &str, kind: &'static str) -> Result<Dataset> {
    if parts.is_empty() {
        let missing = if spec.split == Split::Test { "test" } else { "training" };
        return Err(Error::data(&spec.path, format!("there is no {missing} file of CIFAR in it")));
    }
    let label_bytes = parts.iter().map(label_bytes).collect::<Result<Vec<_>>>()?;
    if let Some(i) = label_bytes.iter().position(|l| *l != label_bytes[0]) {
        let what = format!("{} is CIFAR-10, {} CIFAR-100", parts[0].path.display(), parts[i].path.display());
        return Err(Error::data(&spec.path, format!("two kinds of files: {what} (or the other way round)")));
    }
    let record = label_bytes[0] + VALUES;
    let n = parts.iter().map(|p| p.bytes.len() / record).sum();
    let mut pixels = reserve(&spec.path, [n, SIDE, SIDE, 3])?;
    let mut labels = Vec::with_capacity(n);
    for record in parts.iter().flat_map(|p| p.bytes.chunks_exact(record)) {
        let (label, values) = record.split_at(label_bytes[0]);
        labels.push(i32::from(label[label.len() - 1]));
        pixels.extend((0..SIDE * SIDE).flat_map(|i| [values[i], values[SIDE * SIDE + i], values[2 * SIDE * SIDE + i]]));
    }
    let classes = class_names(names, if label_bytes[0] == 1 { 10 } else { 100 });
    let source = Source { kind, path: spec.path.clone(), ..Source::default() };
    Raw { shape: [n, SIDE, SIDE, 3], pixels, labels: Some(labels), classes }.into_dataset(spec, source)
}

/// Label bytes per record, 1 or 2, from the file's size and from the labels being in range.
fn label_bytes(part: &Part) -> Result<usize> {
    let len = part.bytes.len();
    let fits = |labels: usize, classes: u8| {
        len > 0
            && len.is_multiple_of(labels + VALUES)
            && part.bytes.chunks_exact(labels + VALUES).all(|r| r[labels - 1] < classes)
    };
    match (fits(1, 10), fits(2, 100)) {
        (true, _) => Ok(1),
        (false, true) => Ok(2),
        (false, false) => Err(Error::data(
            &part.path,
            format!(
                "no CIFAR file, or truncated: {len} bytes are no whole number of records of 3073 (CIFAR-10, labels \
                 below 10) or 3074 bytes (CIFAR-100, labels below 100)"
            ),
        )),
    }
}

fn class_names(text: &str, classes: usize) -> Vec<String> {
    let named: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    if named.len() == classes { named } else { (0..classes).map(|class| class.to_string()).collect() }
}
