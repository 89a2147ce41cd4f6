//! A folder of images, searched recursively, in the reference's order (`names.rs`).

use std::path::{Path, PathBuf};

use super::{
    DataSpec, Dataset, Source,
    load::{Canvas, Item, kept},
    names,
};
use crate::error::{Error, Result};

/// Loads every image below the spec's folder.
pub fn open(spec: &DataSpec) -> Result<Dataset> {
    let root = &spec.path;
    let mut names = Vec::new();
    let mut others = Vec::new();
    list(root, "", &mut Vec::new(), &mut names, &mut others)?;
    if names.is_empty() {
        return Err(empty(root, &others));
    }
    let split_depth = names::keep_split(&mut names, spec.split, root)?;
    let found = names.len();
    let names: Vec<String> = kept(found, spec.limit).into_iter().map(|i| names[i].clone()).collect();
    let (labels, classes) = names::classes(&names, spec.labels, split_depth, root)?;
    let mut canvas = Canvas::new(spec, names.len());
    for (i, chunk) in names.chunks(Canvas::CHUNK).enumerate() {
        let item =
            |(j, name): (usize, &String)| Item { slot: i * Canvas::CHUNK + j, path: root.join(name), bytes: None };
        canvas.place(&chunk.iter().enumerate().map(item).collect::<Vec<_>>())?;
    }
    let source = Source {
        kind: "image folder",
        path: root.clone(),
        found,
        skipped: others.len(),
        first_names: names.into_iter().take(5).collect(),
        ..Source::default()
    };
    Ok(canvas.finish(labels, classes, source))
}

/// Collects the relative paths of images and of other files below `root/prefix`; `above` are the real paths of the
/// folders being listed.
fn list(
    root: &Path,
    prefix: &str,
    above: &mut Vec<PathBuf>,
    names: &mut Vec<String>,
    others: &mut Vec<String>,
) -> Result<()> {
    let folder = root.join(prefix);
    let real = folder.canonicalize().map_err(Error::io(&folder, "read"))?;
    if above.contains(&real) {
        return Err(Error::data(&folder, "a link that points back to a folder above it: remove it"));
    }
    above.push(real);
    let entries = std::fs::read_dir(&folder).map_err(Error::io(&folder, "read"))?;
    let mut entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(Error::io(&folder, "read"))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path: PathBuf = entry.path();
        let file = entry.file_name();
        let Some(file) = file.to_str() else {
            return Err(Error::data(&path, "its name is no UTF-8: rename it"));
        };
        let name = if prefix.is_empty() { file.to_string() } else { format!("{prefix}/{file}") };
        match path.is_dir() {
            true => list(root, &name, above, names, others)?,
            false if names::is_image(&name) => names.push(name),
            false => others.push(name),
        }
    }
    above.pop();
    Ok(())
}

fn empty(root: &Path, others: &[String]) -> Error {
    let searched = "no images: searched it and its subfolders for .jpg, .jpeg, .png, .gif and .webp";
    match others {
        [] => Error::data(root, format!("{searched}, there are no files at all")),
        [first, ..] => Error::data(root, format!("{searched}, found {} other files, such as {first}", others.len())),
    }
}
