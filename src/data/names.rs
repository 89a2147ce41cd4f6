//! What the relative path of an image says: its place in the order, its split, its class.
//!
//! Order and prefix classes are the reference's: each folder's entries sorted by name, subfolders in their place;
//! class = the file name up to the first `_`, numbered in sorted order.

use std::{cmp::Ordering, collections::BTreeSet, path::Path};

use super::{Labels, Split};
use crate::error::{Error, Result};

/// Extensions of images: the reference's, and webp. The content decides how a file is decoded.
pub const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "gif", "webp"];

/// True for `a/b/name.png` and the like. `._name.png` is a resource fork of macOS, never an image.
pub fn is_image(name: &str) -> bool {
    let file = file_name(name);
    let extension = file.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase());
    !file.starts_with("._") && extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

/// The reference's order of two relative paths: component by component.
pub fn order(a: &str, b: &str) -> Ordering {
    a.split('/').cmp(b.split('/'))
}

fn file_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn folders(name: &str) -> Vec<&str> {
    let mut parts: Vec<_> = name.split('/').collect();
    parts.pop();
    parts
}

/// Depth of the folder that names the split: the first depth at which both `train` and `test` occur, all folders above
/// being the same for every image.
fn split_depth(names: &[String]) -> Option<usize> {
    let first = folders(names.first()?);
    let common = |d: usize| names.iter().all(|n| folders(n).get(d) == first.get(d));
    let depth = (0..=first.len()).find(|&d| !common(d))?;
    let has = |split: &str| names.iter().any(|n| folders(n).get(depth) == Some(&split));
    (has("train") && has("test")).then_some(depth)
}

/// Keeps the images of a split: those below `train/` or below `test/` where both folders exist, otherwise all.
/// Returns the depth of that folder, if there is one.
///
/// # Errors
/// [`Error::Data`] when the test split is asked for and there is none.
pub fn keep_split(names: &mut Vec<String>, split: Split, path: &Path) -> Result<Option<usize>> {
    let depth = split_depth(names);
    match (depth, split) {
        (None, Split::Test) => Err(Error::data(
            path,
            "there is no test split: a folder or archive is split when it holds both `train/` and `test/`",
        )),
        (Some(depth), Split::Train | Split::Test) => {
            let wanted = if split == Split::Train { "train" } else { "test" };
            names.retain(|n| folders(n).get(depth) == Some(&wanted));
            Ok(Some(depth))
        }
        _ => Ok(depth),
    }
}

/// Class of every image and the names of the classes; (None, []) without labels. Auto takes the folder if the images lie in
/// at least two, else the prefix if every name has one and there are at least two classes of two images on average,
/// else nothing. `split_depth` is what [`keep_split`] returned: that folder is no class.
///
/// # Errors
/// [`Error::Data`] naming the first image whose path does not hold the label asked for.
pub fn classes(
    names: &[String],
    policy: Labels,
    split_depth: Option<usize>,
    path: &Path,
) -> Result<(Option<Vec<i32>>, Vec<String>)> {
    let prefix = |n| file_name(n).split_once('_').map(|(class, _)| class).filter(|class| !class.is_empty());
    let by_prefix: Vec<_> = names.iter().map(|n| prefix(n)).collect();
    let by_folder: Vec<_> = names.iter().map(|n| class_folder(n, split_depth)).collect();
    let distinct = |found: &[Option<&str>]| found.iter().collect::<BTreeSet<_>>().len();
    match policy {
        Labels::None => Ok((None, Vec::new())),
        Labels::Prefix => number(names, &by_prefix, path, "no `_` in its name, so there is no class prefix before it"),
        Labels::Folder => number(names, &by_folder, path, "it lies in no subfolder that could name its class"),
        Labels::Auto if !by_folder.contains(&None) && distinct(&by_folder) > 1 => number(names, &by_folder, path, ""),
        Labels::Auto if !by_prefix.contains(&None) && (2..=names.len() / 2).contains(&distinct(&by_prefix)) => {
            number(names, &by_prefix, path, "")
        }
        Labels::Auto => Ok((None, Vec::new())),
    }
}

fn class_folder(name: &str, split_depth: Option<usize>) -> Option<&str> {
    let folders = folders(name);
    folders.get(split_depth.map_or(0, |d| d + 1)..)?.last().copied()
}

fn number(
    names: &[String],
    found: &[Option<&str>],
    path: &Path,
    missing: &str,
) -> Result<(Option<Vec<i32>>, Vec<String>)> {
    if let Some(i) = found.iter().position(Option::is_none) {
        let remedy = "choose another source of labels (prefix, folder) or none";
        return Err(Error::data(path.join(&names[i]), format!("{missing}: {remedy}")));
    }
    let sorted: Vec<&str> = found.iter().flatten().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let index = |class: &&str| sorted.partition_point(|s| s < class) as i32;
    Ok((Some(found.iter().flatten().map(index).collect()), sorted.iter().map(|s| s.to_string()).collect()))
}
