//! The zip container as `torch.save` writes it: entries stored without compression, found through the central directory.
//!
//! Only places are read, never copied: an entry is a range of the file. Compressed, encrypted, split and overlapping
//! entries are refused, so that no archive can hold more than its own size.

use std::collections::HashMap;
use std::ops::Range;

/// What went wrong, without the file name.
type Result<T> = std::result::Result<T, String>;

const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const END_LEN: usize = 22;
/// The end record may be followed by a comment of at most this length.
const MAX_COMMENT: usize = u16::MAX as usize;

/// One file of the archive.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Where its bytes lie.
    pub range: Range<usize>,
    /// Checksum of the bytes; 0 if the writer was told not to compute it.
    pub crc: u32,
}

/// The files of an archive by name.
pub type Entries = HashMap<String, Entry>;

/// Little-endian fields of a record, in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("truncated zip record")?;
        self.0 = rest;
        Ok(head)
    }
    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.take(2)?.try_into().expect("2 bytes")))
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }
}

/// The bytes from `at`, which must begin with `signature`; the signature is passed over.
fn record<'a>(bytes: &'a [u8], at: u64, signature: [u8; 4], what: &str) -> Result<Fields<'a>> {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    match rest.strip_prefix(&signature) {
        Some(rest) => Ok(Fields(rest)),
        None => Err(format!("damaged zip archive: no {what} at byte {at} of {}", bytes.len())),
    }
}

/// Number of entries, and place and length of the directory that lists them.
fn directory(bytes: &[u8]) -> Result<(u64, u64, u64)> {
    let first = bytes.len().saturating_sub(END_LEN + MAX_COMMENT);
    let tail = &bytes[first..];
    let found = tail.windows(END_LEN).rposition(|w| w.starts_with(&END));
    let at = first + found.ok_or("truncated zip archive: it has no end record; copy or download the file again")?;
    let mut f = record(bytes, at as u64, END, "end record")?;
    let (disk, directory_disk) = (f.u16()?, f.u16()?);
    let (_, count) = (f.u16()?, f.u16()?);
    let (len, offset) = (f.u32()?, f.u32()?);
    let saturated = count == u16::MAX || len == u32::MAX || offset == u32::MAX;
    let locator = at.checked_sub(20).filter(|&l| bytes[l..].starts_with(&LOCATOR_64));
    if let Some(locator) = locator.filter(|_| saturated) {
        let mut f = record(bytes, locator as u64, LOCATOR_64, "zip64 locator")?;
        f.take(4)?;
        let mut f = record(bytes, f.u64()?, END_64, "zip64 end record")?;
        f.take(20)?;
        let (_, count) = (f.u64()?, f.u64()?);
        let (len, offset) = (f.u64()?, f.u64()?);
        return Ok((count, offset, len));
    }
    if disk != 0 || directory_disk != 0 {
        return Err("a zip archive split over several files".into());
    }
    Ok((u64::from(count), u64::from(offset), u64::from(len)))
}

/// An entry of the directory: name, place of its local header, length, checksum.
fn entry(f: &mut Fields) -> Result<(String, u64, u64, u32)> {
    if f.take(4)? != ENTRY {
        return Err("damaged zip archive: an entry of the directory has no signature".into());
    }
    f.take(4)?;
    let (flags, method) = (f.u16()?, f.u16()?);
    f.take(4)?;
    let crc = f.u32()?;
    let (packed, len) = (f.u32()?, f.u32()?);
    let (name, extra, comment) = (f.u16()?, f.u16()?, f.u16()?);
    f.take(8)?;
    let local = f.u32()?;
    let name = String::from_utf8_lossy(f.take(name.into())?).into_owned();
    let extra = f.take(extra.into())?;
    f.take(comment.into())?;
    if flags & 1 != 0 {
        return Err(format!("zip entry {name:?} is encrypted"));
    }
    if method != 0 {
        let what = "is compressed, which torch.save never does: unpack the archive and zip it with `zip -0`";
        return Err(format!("zip entry {name:?} (method {method}) {what}"));
    }
    let [len, packed, local] = wide(extra, [len, packed, local]).map_err(|e| format!("zip entry {name:?}: {e}"))?;
    if len != packed {
        return Err(format!("zip entry {name:?} is stored, yet has {packed} bytes for {len}"));
    }
    Ok((name, local, len, crc))
}

/// Length, stored length and place, with the values of the zip64 field in place of those that did not fit.
fn wide(extra: &[u8], narrow: [u32; 3]) -> Result<[u64; 3]> {
    let mut f = Fields(extra);
    let mut zip64 = Fields(&[]);
    while f.0.len() >= 4 {
        let (id, len) = (f.u16()?, f.u16()?);
        let body = f.take(len.into())?;
        if id == 1 {
            zip64 = Fields(body);
        }
    }
    let mut out = [0; 3];
    for (out, narrow) in out.iter_mut().zip(narrow) {
        *out = if narrow == u32::MAX { zip64.u64()? } else { narrow.into() };
    }
    Ok(out)
}

/// Lists the archive `bytes`.
///
/// # Errors
/// What is damaged or not supported, and where.
pub fn entries(bytes: &[u8]) -> Result<Entries> {
    let (count, offset, len) = directory(bytes)?;
    let end = offset.checked_add(len).filter(|&e| e <= bytes.len() as u64);
    let end = end.ok_or_else(|| {
        format!("damaged zip archive: {len} bytes of directory at byte {offset}, the file has {}", bytes.len())
    })?;
    let mut f = Fields(&bytes[offset as usize..end as usize]);
    let mut found = Entries::new();
    let mut places = Vec::new();
    for _ in 0..count {
        let (name, local, len, crc) = entry(&mut f)?;
        let mut header = record(bytes, local, LOCAL, "local header")?;
        header.take(22)?;
        let skip = u64::from(header.u16()?) + u64::from(header.u16()?);
        let start = local + 30 + skip;
        let end = start.checked_add(len).filter(|&e| e <= offset);
        let Some(end) = end else {
            return Err(format!("zip entry {name:?}: {len} bytes at byte {start} end beyond the data"));
        };
        places.push((local, end));
        let e = Entry { range: start as usize..end as usize, crc };
        if found.insert(name.clone(), e).is_some() {
            return Err(format!("zip entry {name:?} is there twice"));
        }
    }
    places.sort_unstable();
    match places.windows(2).find(|w| w[1].0 < w[0].1) {
        Some(w) => Err(format!("damaged zip archive: entries overlap at byte {}", w[1].0)),
        None => Ok(found),
    }
}

/// Whether the bytes of `e` are those that were written.
pub fn intact(bytes: &[u8], e: &Entry) -> bool {
    let mut crc = flate2::Crc::new();
    crc.update(&bytes[e.range.clone()]);
    e.crc == 0 || crc.sum() == e.crc
}
