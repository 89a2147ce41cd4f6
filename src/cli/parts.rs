//! Work kept while it is done: `sample`, `encode` and `nll` append what is finished to a file, and the same command goes on
//! where a run was ended.
//!
//! The file lies beside the results under a name made of the key, a text of all that the results depend on, and is removed
//! when these are written. It holds the key in a line, then chunks: length and checksum (u32 each), bytes. What a kill
//! has cut off is dropped.

use crate::error::{Error, Result};
use crate::grid::hold;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// What the names of the files begin and end with.
const NAME: (&str, &str) = ("partial-", ".bin");

/// An open file of finished work.
pub struct Parts {
    path: PathBuf,
    file: File,
    key: String,
    /// Whether anything is kept.
    any: bool,
}

impl Parts {
    /// Opens the file of the work `key` in `folder`, or makes it; also returns the values that are kept in it.
    ///
    /// Tells of files that other commands have left in the folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] while another process does the same work.
    pub fn open<T: bytemuck::AnyBitPattern>(folder: &Path, key: &str) -> Result<(Self, Vec<T>)> {
        let name = format!("{}{:08x}{}", NAME.0, checksum(key.as_bytes()), NAME.1);
        note_others(folder, &name);
        let path = folder.join(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::io(&path, "write"))?;
        hold(&file, &path, "is at the same work")?;
        let mut parts = Parts { path, file, key: key.replace('\n', " "), any: false };
        let (kept, end) = parts.read().map_err(Error::io(&parts.path, "read"))?;
        if end == 0 {
            parts.start_over()?;
        } else {
            parts.cut(end).map_err(Error::io(&parts.path, "write"))?;
            parts.any = !kept.is_empty();
        }
        let values = kept.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
        Ok((parts, values))
    }

    /// The bytes of whole chunks, and where they end; 0 if the file is not of this work.
    fn read(&mut self) -> std::io::Result<(Vec<u8>, u64)> {
        let mut from = BufReader::new(&self.file);
        let (mut line, mut kept) = (Vec::new(), Vec::new());
        from.by_ref().take(self.key.len() as u64 + 1).read_until(b'\n', &mut line)?;
        if line.strip_suffix(b"\n") != Some(self.key.as_bytes()) {
            return Ok((kept, 0));
        }
        let mut end = line.len() as u64;
        let mut head = [0; 8];
        while from.read_exact(&mut head).is_ok() {
            let [length, sum] = bytemuck::cast::<_, [[u8; 4]; 2]>(head).map(u32::from_le_bytes);
            let before = kept.len();
            let read = from.by_ref().take(u64::from(length)).read_to_end(&mut kept)?;
            if read != length as usize || checksum(&kept[before..]) != sum {
                kept.truncate(before);
                break;
            }
            end += (head.len() + read) as u64;
        }
        Ok((kept, end))
    }

    fn cut(&mut self, end: u64) -> std::io::Result<()> {
        self.file.set_len(end)?;
        self.file.seek(std::io::SeekFrom::Start(end)).map(drop)
    }

    /// Drops what is kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start_over(&mut self) -> Result<()> {
        self.any = false;
        let mut write = || {
            self.cut(0)?;
            self.file.write_all(format!("{}\n", self.key).as_bytes())
        };
        write().map_err(Error::io(&self.path, "write"))
    }

    /// Keeps `values` too.
    ///
    /// # Errors
    /// [`Error::Io`]; what was kept before stays.
    pub fn append<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let length = u32::try_from(bytes.len()).expect("a batch is smaller than 4 GiB");
        let head = [length, checksum(bytes)].map(u32::to_le_bytes);
        let chunk = [head.as_flattened(), bytes].concat();
        self.any = true;
        self.file.write_all(&chunk).map_err(Error::io(&self.path, "write"))
    }

    /// Removes the file, as its work is done and written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(mut self) -> Result<()> {
        self.any = true;
        std::fs::remove_file(&self.path).map_err(Error::io(&self.path, "remove"))
    }
}

impl Drop for Parts {
    /// A run that fails before anything is finished leaves no file.
    fn drop(&mut self) {
        if !self.any {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// CRC-32 of values, as of a zip entry.
pub fn checksum<T: bytemuck::NoUninit>(values: &[T]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytemuck::cast_slice(values));
    crc.sum()
}

/// Tells of files other than `name` in `folder`.
fn note_others(folder: &Path, name: &str) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for other in entries.filter_map(|e| e.file_name().into_string().ok()) {
        if other != name && other.starts_with(NAME.0) && other.ends_with(NAME.1) {
            let path = folder.join(other);
            eprintln!(
                "note: {} is unfinished work of another command: the same command goes on with it, or remove it",
                path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, key: &str) -> (Parts, Vec<u8>) {
        Parts::open(folder, key).unwrap()
    }

    #[test]
    fn chunks_come_back_until_they_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (mut parts, kept) = open(folder.path(), "a\nb");
        assert!(kept.is_empty());
        parts.append(b"one").unwrap();
        assert!(Parts::open::<u8>(folder.path(), "a\nb").is_err(), "two processes at the same work");
        drop(parts);
        let (mut parts, kept) = open(folder.path(), "a\nb");
        assert_eq!(kept, b"one");
        parts.append(b"").unwrap();
        parts.append(b"two").unwrap();
        drop(parts);
        assert!(open(folder.path(), "another").1.is_empty());
        let (parts, kept) = open(folder.path(), "a\nb");
        assert_eq!(kept, b"onetwo");
        parts.remove().unwrap();
        assert!(open(folder.path(), "a\nb").1.is_empty());
    }

    #[test]
    fn work_can_be_started_over() {
        let folder = tempfile::tempdir().unwrap();
        let (mut parts, _) = open(folder.path(), "key");
        parts.append(b"old").unwrap();
        parts.start_over().unwrap();
        parts.append(b"new").unwrap();
        drop(parts);
        assert_eq!(open(folder.path(), "key").1, b"new");
        let (mut numbers, none) = Parts::open::<f32>(folder.path(), "numbers").unwrap();
        assert!(none.is_empty());
        numbers.append(&[1.5f32, -2.0]).unwrap();
        drop(numbers);
        assert_eq!(Parts::open::<f32>(folder.path(), "numbers").unwrap().1, [1.5, -2.0]);
    }

    /// Cut anywhere, or with any byte changed, the file gives a beginning of what was kept, and can be added to.
    #[test]
    fn damage_costs_the_chunks_from_there_on() {
        let folder = tempfile::tempdir().unwrap();
        let (mut parts, _) = open(folder.path(), "key");
        for chunk in [b"first".as_slice(), b"second", b"third"] {
            parts.append(chunk).unwrap();
        }
        let path = parts.path.clone();
        drop(parts);
        let whole = std::fs::read(&path).unwrap();
        let beginnings = [b"".as_slice(), b"first", b"firstsecond", b"firstsecondthird"];
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            for (damaged, missing) in [(&whole[..at], 1), (&changed, 0)] {
                std::fs::write(&path, damaged).unwrap();
                let (mut parts, kept) = open(folder.path(), "key");
                assert!(beginnings[..3].contains(&&kept[..]), "byte {at}, {missing}: {kept:?}");
                parts.append(b"more").unwrap();
                drop(parts);
                assert_eq!(open(folder.path(), "key").1, [&kept[..], b"more"].concat());
            }
        }
    }
}
