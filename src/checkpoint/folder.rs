//! Checkpoints as files of a run's folder: their names, the newest, those too old, and how one is replaced.

use crate::error::{Error, Result};
use crate::grid;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Beginning of the name of a file that is being written.
const TEMPORARY: &str = ".saving-";

/// Lets `fill` write a temporary file beside `path`, syncs it, renames it to `path` and syncs the folder.
///
/// # Errors
/// Those of `fill`; [`Error::Io`] when the disk is full or refuses. `path` is then as it was.
pub fn replace(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As readable as any other new file, rather than for its owner alone.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let prefix = format!("{TEMPORARY}{}-", path.file_name().unwrap_or_default().to_string_lossy());
    let temporary = tempfile::Builder::new().prefix(&prefix).permissions(mode).tempfile_in(folder);
    // The kind alone: the name of the temporary file would tell nobody anything.
    let file = temporary.map_err(|e| Error::io(path, "create")(e.kind().into()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file());
    fill(&mut out)?;
    out.flush().and_then(|()| file.as_file().sync_all()).map_err(Error::io(path, "write"))?;
    drop(out);
    file.persist(path).map_err(|e| Error::io(path, "replace")(e.error))?;
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(path, "write"))
}

/// File name of the checkpoint after `step` steps.
pub fn file_name(step: u64) -> String {
    format!("checkpoint-{step:08}.safetensors")
}

/// Checkpoints in `folder` with their steps, oldest first; none if there is no such folder.
pub fn list(folder: &Path) -> Vec<(u64, PathBuf)> {
    let step =
        |p: &Path| p.file_name()?.to_str()?.strip_prefix("checkpoint-")?.strip_suffix(".safetensors")?.parse().ok();
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|e| Some((step(&e.path())?, e.path()))).collect();
    found.sort();
    found
}

/// Removes what a killed run left half-written in `folder`: checkpoints, exported models, pictures.
///
/// # Errors
/// [`Error::Io`] when a file cannot be removed.
pub fn clear(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let half = |name: &str| [TEMPORARY, grid::TEMPORARY].iter().any(|beginning| name.starts_with(beginning));
    let halves = entries.map(|e| e.path()).filter(|p| p.is_file());
    for path in halves.filter(|p| p.file_name().is_some_and(|n| half(&n.to_string_lossy()))) {
        std::fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
    }
    Ok(())
}

/// Removes all but the newest `keep` checkpoints of `folder`.
///
/// # Errors
/// [`Error::Io`] when a file cannot be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let mut old = list(folder).into_iter().rev().skip(keep.max(1));
    old.try_for_each(|(_, path)| std::fs::remove_file(&path).map_err(Error::io(&path, "remove")))
}

/// The checkpoint that `path` means: the file itself, or the newest one of a folder.
///
/// # Errors
/// [`Error::Checkpoint`] when there is none, saying what to do.
pub fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        let hint = "no such checkpoint: run `iddpm train` first, or give a .safetensors file or the folder of a run";
        return if path.exists() { Ok(path.into()) } else { Err(Error::checkpoint(path, hint)) };
    }
    let newest = list(path).pop().map(|(_, p)| p);
    newest.ok_or_else(|| Error::checkpoint(path, "no checkpoint in this folder: train first, or give another folder"))
}
