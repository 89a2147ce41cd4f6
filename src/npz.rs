//! NumPy's `.npz`: a zip archive of `.npy` arrays, written as `numpy.load` reads them and read as `numpy.savez` and
//! `savez_compressed` write them.
//!
//! A `.npy` is `\x93NUMPY`, version, header length, a Python dict (`descr`, `fortran_order`, `shape`) padded to 64 bytes,
//! then the values. Entries are written stored, with zip64 sizes and offsets, so that any number of samples fits.
//! Sample files hold `arr_0`, uint8 images (n, h, w, c), and `arr_1`, int64 labels (n).

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
};

use flate2::{Crc, read::DeflateDecoder};

use crate::error::{Error, Result};

/// An array of one of the types this project exchanges, C order.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Sizes, slowest axis first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The values.
    pub values: Values,
}

/// Values of an [`Array`].
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// uint8.
    U8(Vec<u8>),
    /// int64; int32 files are widened.
    I64(Vec<i64>),
    /// float32.
    F32(Vec<f32>),
    /// float64.
    F64(Vec<f64>),
}

impl Values {
    /// Name of the type in NumPy.
    pub fn dtype(&self) -> &'static str {
        match self {
            Values::U8(_) => "uint8",
            Values::I64(_) => "int64",
            Values::F32(_) => "float32",
            Values::F64(_) => "float64",
        }
    }
}

impl Array {
    /// A one-dimensional float64 array.
    pub fn from_f64(values: Vec<f64>) -> Self {
        Array { shape: vec![values.len()], values: Values::F64(values) }
    }

    /// uint8 images (n, h, w, c).
    pub fn images(shape: [usize; 4], values: Vec<u8>) -> Self {
        assert!(values.len() == shape.iter().product::<usize>(), "npz: {} bytes for {shape:?}", values.len());
        Array { shape: shape.to_vec(), values: Values::U8(values) }
    }

    /// int64 labels (n).
    pub fn labels(labels: &[i32]) -> Self {
        Array { shape: vec![labels.len()], values: Values::I64(labels.iter().map(|&l| i64::from(l)).collect()) }
    }

    fn bytes(&self) -> &[u8] {
        match &self.values {
            Values::U8(v) => v,
            Values::I64(v) => bytemuck::cast_slice(v),
            Values::F32(v) => bytemuck::cast_slice(v),
            Values::F64(v) => bytemuck::cast_slice(v),
        }
    }

    /// Magic, version 1.0 and header: a multiple of 64 bytes.
    fn header(&self) -> Vec<u8> {
        let descr = match self.values {
            Values::U8(_) => "|u1",
            Values::I64(_) => "<i8",
            Values::F32(_) => "<f4",
            Values::F64(_) => "<f8",
        };
        let shape: String = self.shape.iter().map(|d| format!("{d}, ")).collect();
        let shape = if self.shape.len() == 1 { shape.trim_end() } else { shape.trim_end_matches(", ") };
        let mut dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
        let padding = 63 - (10 + dict.len()) % 64;
        dict.push_str(&" ".repeat(padding));
        dict.push('\n');
        [b"\x93NUMPY\x01\x00".as_slice(), &(dict.len() as u16).to_le_bytes(), dict.as_bytes()].concat()
    }
}

// ---- writing ----

/// Writes the arrays under their names; the file appears complete or not at all.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be written.
pub fn write(path: &Path, arrays: &[(&str, &Array)]) -> Result<()> {
    crate::grid::atomically(path, |file| {
        let mut out = BufWriter::new(file);
        write_zip(&mut out, arrays)?;
        out.flush()
    })
}

/// What the central directory repeats of an entry.
struct Written {
    name: String,
    crc: u32,
    size: u64,
    offset: u64,
}

fn write_zip(out: &mut impl Write, arrays: &[(&str, &Array)]) -> std::io::Result<()> {
    let mut at = 0u64;
    let mut written = Vec::new();
    for (name, array) in arrays {
        let (header, values) = (array.header(), array.bytes());
        let mut crc = Crc::new();
        crc.update(&header);
        crc.update(values);
        let size = (header.len() + values.len()) as u64;
        let entry = Written { name: format!("{name}.npy"), crc: crc.sum(), size, offset: at };
        let local = entry.local();
        for part in [&local[..], &header, values] {
            out.write_all(part)?;
        }
        at += local.len() as u64 + size;
        written.push(entry);
    }
    let directory: Vec<u8> = written.iter().flat_map(Written::central).collect();
    out.write_all(&directory)?;
    out.write_all(&end_of_directory(written.len() as u64, directory.len() as u64, at))
}

/// Version needed for zip64, no flags, stored, 1980-01-01 00:00.
const FIXED: [u8; 10] = [45, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];

impl Written {
    fn local(&self) -> Vec<u8> {
        let sizes = [self.size.to_le_bytes(), self.size.to_le_bytes()].concat();
        let extra = [&[1, 0, 16, 0][..], &sizes].concat();
        let names = [(self.name.len() as u16).to_le_bytes(), (extra.len() as u16).to_le_bytes()].concat();
        let parts: [&[u8]; 7] =
            [b"PK\x03\x04", &FIXED, &self.crc.to_le_bytes(), &[0xFF; 8], &names, self.name.as_bytes(), &extra];
        parts.concat()
    }

    fn central(&self) -> Vec<u8> {
        let values = [self.size, self.size, self.offset].map(u64::to_le_bytes).concat();
        let extra = [&[1, 0, 24, 0][..], &values].concat();
        let names = [(self.name.len() as u16).to_le_bytes(), (extra.len() as u16).to_le_bytes()].concat();
        let parts: [&[u8]; 10] = [
            b"PK\x01\x02",
            &[45, 0],
            &FIXED,
            &self.crc.to_le_bytes(),
            &[0xFF; 8],
            &names,
            &[0; 10],
            &[0xFF; 4],
            self.name.as_bytes(),
            &extra,
        ];
        parts.concat()
    }
}

/// The zip64 end record, its locator and the classic end record.
fn end_of_directory(entries: u64, len: u64, offset: u64) -> Vec<u8> {
    let mut end = [b"PK\x06\x06".as_slice(), &44u64.to_le_bytes(), &[45, 0, 45, 0], &[0; 8]].concat();
    end.extend([entries, entries, len, offset].map(u64::to_le_bytes).as_flattened());
    end.extend([b"PK\x06\x07".as_slice(), &[0; 4], &(offset + len).to_le_bytes(), &[1, 0, 0, 0]].concat());
    end.extend([b"PK\x05\x06".as_slice(), &[0; 4], &[0xFF; 12], &[0, 0]].concat());
    end
}

// ---- reading ----

/// Reads every array of the file, in its order, under its name without `.npy`.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Data`] for a damaged file or another dtype or order than named above.
pub fn read(path: &Path) -> Result<Vec<(String, Array)>> {
    let file = File::open(path).map_err(Error::io(path, "read"))?;
    read_from(path, BufReader::new(file))
}

/// [`read`] from any source; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn read_from(path: &Path, mut from: impl Read + Seek) -> Result<Vec<(String, Array)>> {
    let fail = |what: String| Error::data(path, format!("not a readable npz: {what}"));
    let entries = directory(&mut from).map_err(fail)?;
    let mut arrays = Vec::new();
    for entry in entries {
        let array = entry_array(&mut from, &entry).map_err(|what| fail(format!("{}: {what}", entry.name)))?;
        arrays.push((entry.name.strip_suffix(".npy").unwrap_or(&entry.name).to_string(), array));
    }
    Ok(arrays)
}

/// One line of the central directory.
struct Entry {
    name: String,
    method: u16,
    crc: u32,
    packed: u64,
    size: u64,
    offset: u64,
}

type Words<T> = std::result::Result<T, String>;

/// Largest accepted central directory: a few thousand arrays.
const MAX_DIRECTORY: u64 = 1 << 20;

fn words(e: std::io::Error) -> String {
    e.to_string()
}

/// `len` bytes at `offset`.
fn at(from: &mut (impl Read + Seek), offset: u64, len: u64) -> Words<Vec<u8>> {
    from.seek(SeekFrom::Start(offset)).map_err(words)?;
    let mut bytes = Vec::new();
    from.take(len).read_to_end(&mut bytes).map_err(words)?;
    if (bytes.len() as u64) < len {
        return Err(format!("truncated: {len} bytes due at {offset}, {} there", bytes.len()));
    }
    Ok(bytes)
}

fn u16_at(bytes: &[u8], i: usize) -> Words<u16> {
    let field = bytes.get(i..).and_then(<[u8]>::first_chunk);
    field.map(|b| u16::from_le_bytes(*b)).ok_or_else(|| "a record is cut short".into())
}

fn u32_at(bytes: &[u8], i: usize) -> Words<u32> {
    let field = bytes.get(i..).and_then(<[u8]>::first_chunk);
    field.map(|b| u32::from_le_bytes(*b)).ok_or_else(|| "a record is cut short".into())
}

fn u64_at(bytes: &[u8], i: usize) -> Words<u64> {
    let field = bytes.get(i..).and_then(<[u8]>::first_chunk);
    field.map(|b| u64::from_le_bytes(*b)).ok_or_else(|| "a record is cut short".into())
}

fn directory(from: &mut (impl Read + Seek)) -> Words<Vec<Entry>> {
    let len = from.seek(SeekFrom::End(0)).map_err(words)?;
    let tail_at = len.saturating_sub(65_557);
    let tail = at(from, tail_at, len - tail_at)?;
    let end = tail.windows(4).rposition(|w| w == b"PK\x05\x06").ok_or("no zip directory at its end (truncated?)")?;
    let (mut size, mut offset) = (u64::from(u32_at(&tail, end + 12)?), u64::from(u32_at(&tail, end + 16)?));
    if end >= 20 && tail[end - 20..].starts_with(b"PK\x06\x07") {
        let record = at(from, u64_at(&tail, end - 12)?, 56)?;
        if !record.starts_with(b"PK\x06\x06") {
            return Err("its zip64 record is missing".into());
        }
        (size, offset) = (u64_at(&record, 40)?, u64_at(&record, 48)?);
    }
    if size > MAX_DIRECTORY {
        return Err(format!("its directory claims {size} bytes, at most {MAX_DIRECTORY} are accepted"));
    }
    let bytes = at(from, offset, size)?;
    let mut rest = &bytes[..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, used) = directory_entry(rest)?;
        entries.push(entry);
        rest = rest.get(used..).ok_or("its directory is cut short")?;
    }
    // Entries that share bytes would make a small file any number of large arrays.
    match entries.iter().try_fold(0u64, |sum, e| sum.checked_add(e.packed)).is_some_and(|sum| sum <= len) {
        true => Ok(entries),
        false => Err(format!("its entries claim more than the {len} bytes of the file")),
    }
}

fn directory_entry(bytes: &[u8]) -> Words<(Entry, usize)> {
    if !bytes.starts_with(b"PK\x01\x02") {
        return Err("its directory is damaged".into());
    }
    let (name_len, extra_len) = (usize::from(u16_at(bytes, 28)?), usize::from(u16_at(bytes, 30)?));
    let len = 46 + name_len + extra_len + usize::from(u16_at(bytes, 32)?);
    let name = bytes.get(46..46 + name_len).ok_or("its directory is cut short")?;
    let extra = bytes.get(46 + name_len..46 + name_len + extra_len).ok_or("its directory is cut short")?;
    let mut entry = Entry {
        name: String::from_utf8_lossy(name).into_owned(),
        method: u16_at(bytes, 10)?,
        crc: u32_at(bytes, 16)?,
        packed: u64::from(u32_at(bytes, 20)?),
        size: u64::from(u32_at(bytes, 24)?),
        offset: u64::from(u32_at(bytes, 42)?),
    };
    if u16_at(bytes, 8)? & 1 != 0 {
        return Err(format!("{} is encrypted", entry.name));
    }
    zip64_extra(extra, &mut entry)?;
    Ok((entry, len))
}

/// Replaces the fields that are all ones by the 64-bit values of extra field 1, in their fixed order.
fn zip64_extra(mut extra: &[u8], entry: &mut Entry) -> Words<()> {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
        let field = extra.get(4..4 + len).ok_or("an extra field is cut short")?;
        if id == 1 {
            let mut i = 0;
            for value in [&mut entry.size, &mut entry.packed, &mut entry.offset] {
                if *value == u64::from(u32::MAX) {
                    *value = u64_at(field, i)?;
                    i += 8;
                }
            }
        }
        extra = &extra[4 + len..];
    }
    Ok(())
}

fn entry_array(from: &mut (impl Read + Seek), entry: &Entry) -> Words<Array> {
    let local = at(from, entry.offset, 30)?;
    if !local.starts_with(b"PK\x03\x04") {
        return Err("its local header is damaged".into());
    }
    let skip = i64::from(u16_at(&local, 26)?) + i64::from(u16_at(&local, 28)?);
    from.seek_relative(skip).map_err(words)?;
    let packed = from.take(entry.packed);
    match entry.method {
        0 => parse_npy(packed, entry),
        8 => parse_npy(DeflateDecoder::new(packed), entry),
        other => Err(format!("compression method {other}; stored (0) and deflate (8) are read")),
    }
}

/// The array in an entry, its length held against the header and its bytes against the checksum.
fn parse_npy(from: impl Read, entry: &Entry) -> Words<Array> {
    let mut from = flate2::CrcReader::new(from);
    let mut start = [0; 12];
    from.read_exact(&mut start[..10]).map_err(words)?;
    if !start.starts_with(b"\x93NUMPY") {
        return Err("not an npy array".into());
    }
    let len = match start[6] {
        1 => usize::from(u16_at(&start, 8)?),
        _ => {
            from.read_exact(&mut start[10..]).map_err(words)?;
            u32_at(&start, 8)? as usize
        }
    };
    if len > 1 << 16 {
        return Err(format!("its header claims {len} bytes"));
    }
    let mut header = vec![0; len];
    from.read_exact(&mut header).map_err(words)?;
    let (descr, shape) = parse_header(&String::from_utf8_lossy(&header))?;
    let item = match descr.as_str() {
        "|u1" => 1,
        "<i4" | "<f4" => 4,
        "<i8" | "<f8" => 8,
        other => return Err(format!("dtype {other}; uint8, int32, int64, float32 and float64 are read")),
    };
    let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).and_then(|n| n.checked_mul(item));
    let count = count.filter(|&n| n <= entry.size).ok_or_else(|| {
        format!("shape {shape:?} of dtype {descr} is more than the {} bytes of the entry", entry.size)
    })?;
    let mut bytes = Vec::new();
    (&mut from).take(count).read_to_end(&mut bytes).map_err(words)?;
    if bytes.len() as u64 != count {
        return Err(format!("truncated: {} of {count} bytes", bytes.len()));
    }
    if from.crc().sum() != entry.crc {
        return Err("its checksum does not match: the file is damaged".into());
    }
    Ok(Array { shape, values: values(&descr, bytes) })
}

fn values(descr: &str, bytes: Vec<u8>) -> Values {
    fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    match descr {
        "<i4" => Values::I64(each(&bytes, |b| i64::from(i32::from_le_bytes(b)))),
        "<i8" => Values::I64(each(&bytes, i64::from_le_bytes)),
        "<f4" => Values::F32(each(&bytes, f32::from_le_bytes)),
        "<f8" => Values::F64(each(&bytes, f64::from_le_bytes)),
        _ => Values::U8(bytes),
    }
}

/// dtype and shape from the dict of a header.
fn parse_header(dict: &str) -> Words<(String, Vec<usize>)> {
    let after = |key: &str| {
        let value = dict.split_once(key).map(|(_, rest)| rest.trim_start_matches([' ', ':']));
        value.ok_or_else(|| format!("its header lacks {key}"))
    };
    let descr = after("'descr'")?.strip_prefix('\'').and_then(|d| d.split_once('\'')).map(|(d, _)| d.to_string());
    let descr = descr.ok_or("a structured dtype; plain numbers are read")?;
    let shape = after("'shape'")?.strip_prefix('(').and_then(|s| s.split_once(')')).ok_or("its shape is damaged")?.0;
    let sizes = shape.split(',').map(str::trim).filter(|d| !d.is_empty()).map(str::parse::<usize>);
    let shape = sizes.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| format!("its shape ({shape}): {e}"))?;
    match after("'fortran_order'")?.starts_with("False") || shape.len() < 2 {
        true => Ok((descr, shape)),
        false => Err("in Fortran order; save it in C order (numpy.ascontiguousarray)".into()),
    }
}
