//! A tar archive, gzipped or not, of images or of CIFAR's binary files. Read twice: once for the names, which fix the
//! order, the labels and the number of images; once for the images, each decoded into its place.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use super::{
    DataSpec, Dataset, Source, cifar,
    load::{Canvas, Item, MAX_FILE, kept},
    names, reader,
};
use crate::error::{Error, Result};

/// Encoded bytes collected before they are decoded.
const BATCH_BYTES: usize = 64 << 20;
/// Images collected before they are decoded.
const BATCH_IMAGES: usize = 16 * Canvas::CHUNK;

/// Loads the images of the archive.
pub fn open(spec: &DataSpec) -> Result<Dataset> {
    let path = &spec.path;
    let (mut names, mut skipped, mut is_cifar) = (Vec::new(), 0, false);
    visit(path, |name, _| {
        is_cifar |= cifar::is_part(last(name));
        match names::is_image(name) {
            true => names.push(name.to_string()),
            false => skipped += 1,
        }
        Ok(())
    })?;
    if names.is_empty() && is_cifar {
        return open_cifar(spec);
    }
    names.sort_by(|a, b| names::order(a, b));
    names.dedup();
    if names.is_empty() {
        return Err(Error::data(path, format!("no .jpg, .jpeg, .png, .gif or .webp among its {skipped} files")));
    }
    let split_depth = names::keep_split(&mut names, spec.split, path)?;
    let found = names.len();
    let names: Vec<String> = kept(found, spec.limit).into_iter().map(|i| names[i].clone()).collect();
    let (labels, classes) = names::classes(&names, spec.labels, split_depth, path)?;
    let canvas = fill(spec, &names)?;
    let first_names = names.into_iter().take(5).collect();
    let source = Source { kind: "tar", path: path.clone(), found, skipped, first_names, ..Source::default() };
    Ok(canvas.finish(labels, classes, source))
}

/// The second pass: decodes the named entries into their slots.
fn fill<'a>(spec: &'a DataSpec, names: &[String]) -> Result<Canvas<'a>> {
    let path = &spec.path;
    let slots: HashMap<&str, usize> = names.iter().enumerate().map(|(slot, name)| (name.as_str(), slot)).collect();
    let mut canvas = Canvas::new(spec, names.len());
    let mut items = Vec::new();
    let mut held = 0;
    visit(path, |name, content| {
        let Some(&slot) = slots.get(name) else { return Ok(()) };
        let bytes = content.bytes(path)?;
        held += bytes.len();
        items.push(Item { slot, path: path.join(name), bytes: Some(bytes) });
        if items.len() >= BATCH_IMAGES || held >= BATCH_BYTES {
            canvas.place(&items)?;
            items.clear();
            held = 0;
        }
        Ok(())
    })?;
    canvas.place(&items)?;
    Ok(canvas)
}

fn open_cifar(spec: &DataSpec) -> Result<Dataset> {
    let path = &spec.path;
    let (mut parts, mut classes) = (Vec::new(), String::new());
    visit(path, |name, content| {
        if cifar::is_part(last(name)) && cifar::belongs(Path::new(name), spec.split) {
            parts.push(cifar::Part { path: path.join(name), bytes: content.bytes(path)? });
        } else if cifar::is_names(last(name)) {
            classes = String::from_utf8_lossy(&content.bytes(path)?).into_owned();
        }
        Ok(())
    })?;
    parts.sort_by(|a, b| a.path.cmp(&b.path));
    cifar::join(spec, &parts, &classes, "CIFAR in tar")
}

fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The content of an entry, not yet read.
struct Content<'a> {
    name: &'a str,
    size: u64,
    from: &'a mut dyn Read,
}

impl Content<'_> {
    fn bytes(self, archive: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.from.take(MAX_FILE + 1).read_to_end(&mut bytes);
        let path = archive.join(self.name);
        match read {
            Err(e) => Err(Error::data(path, format!("damaged or truncated archive: {e}"))),
            Ok(_) if (bytes.len() as u64) < self.size.min(MAX_FILE) => {
                let what = format!("damaged or truncated archive: {} of {} bytes", bytes.len(), self.size);
                Err(Error::data(path, what))
            }
            Ok(_) if bytes.len() as u64 > MAX_FILE => {
                Err(Error::data(path, format!("larger than {} MB: not an image", MAX_FILE >> 20)))
            }
            Ok(_) => Ok(bytes),
        }
    }
}

/// Calls `f` with the name and the content of every file in the archive, in its order.
fn visit(path: &Path, f: impl FnMut(&str, Content) -> Result<()>) -> Result<()> {
    let mut magic = [0; 2];
    let mut file = File::open(path).map_err(Error::io(path, "read"))?;
    file.read_exact(&mut magic).map_err(Error::io(path, "read"))?;
    let damaged = |e| Error::data(path, format!("damaged or truncated archive: {e}"));
    if magic == [0x1F, 0x8B] {
        let mut archive = tar::Archive::new(reader(path)?);
        each(path, archive.entries().map_err(damaged)?, f)
    } else {
        let file = File::open(path).map_err(Error::io(path, "read"))?;
        let mut archive = tar::Archive::new(BufReader::new(file));
        each(path, archive.entries_with_seek().map_err(damaged)?, f)
    }
}

fn each<R: Read>(path: &Path, entries: tar::Entries<R>, mut f: impl FnMut(&str, Content) -> Result<()>) -> Result<()> {
    for (seen, entry) in entries.enumerate() {
        let damaged = |e| Error::data(path, format!("damaged or truncated archive after {seen} entries: {e}"));
        let mut entry = entry.map_err(damaged)?;
        if entry.header().entry_type().is_file() {
            let bytes = entry.path_bytes().into_owned();
            let name = String::from_utf8_lossy(&bytes);
            let name = name.strip_prefix("./").unwrap_or(&name);
            f(name, Content { name, size: entry.size(), from: &mut entry })?;
        }
    }
    Ok(())
}
