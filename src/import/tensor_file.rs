//! A file of named tensors, whoever wrote it: `.pt` as a zip archive or as the older plain stream, or `.safetensors`.
//!
//! The file is mapped; a tensor is a place in it. Opening checks that every tensor lies inside the file and that the
//! checksums of the archive hold; nothing is allocated beyond the size of the file. Names of nested containers are joined with dots:
//! `state.0.exp_avg`.

use super::pickle::{self, Dtype, Id, Pickle, TensorView, Value};
use super::zip;
use crate::error::{Error, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Result of a step that does not know the file's name.
pub type Text<T> = std::result::Result<T, String>;

/// Deepest nesting of containers, and most values and bytes of names in all.
const MAX_DEPTH: usize = 16;
const MAX_VISITS: usize = 1 << 19;
const MAX_NAME_BYTES: usize = 64 << 20;
/// A tensor that repeats elements (stride 0) may have this many elements without the file holding them.
const MAX_EXPANDED: usize = 1 << 24;
/// First value of a plain stream.
const LEGACY_MAGIC: [u8; 14] = *b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Size.
    pub dims: Vec<usize>,
    /// Elements between neighbours in each dimension.
    strides: Vec<usize>,
    /// Byte of the file where the first element lies.
    at: usize,
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensor with its dimensions in another order.
    pub fn permuted(&self, order: &[usize]) -> Tensor {
        let pick = |x: &[usize]| order.iter().map(|&i| x[i]).collect();
        Tensor { dims: pick(&self.dims), strides: pick(&self.strides), ..*self }
    }

    /// `len` rows from `first` of the first dimension.
    pub fn rows(&self, first: usize, len: usize) -> Tensor {
        assert!(first + len <= self.dims[0], "rows {first}..{} of {}", first + len, self.dims[0]);
        let mut t = self.clone();
        t.dims[0] = len;
        t.at += first * self.strides[0] * self.dtype.bytes();
        t
    }
}

/// A file of tensors.
pub struct TensorFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// Its tensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// Its numbers: steps, rates.
    pub numbers: BTreeMap<String, f64>,
    /// Metadata of a safetensors file.
    pub metadata: HashMap<String, String>,
    map: Mmap,
}

impl TensorFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is damaged, hostile or of another kind; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "read"))?;
        // SAFETY: mapped for reading; a file that another program changes meanwhile gives wrong numbers, as with any reader.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "read"))?;
        let found = parse(&map).map_err(|e| Error::checkpoint(path, e))?;
        let Found { tensors, numbers, metadata } = found;
        let opened = TensorFile { path: path.into(), tensors, numbers, metadata, map };
        opened.release();
        Ok(opened)
    }

    /// Gives the pages read so far back to the system.
    pub fn release(&self) {
        // SAFETY: the mapping is shared and never written, so that dropped pages come back from the file unchanged.
        // A refusal costs memory only.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| {
            let first = self.tensors.keys().next().map_or("none", String::as_str);
            let n = self.tensors.len();
            Error::checkpoint(&self.path, format!("no tensor {name} among its {n} tensors (the first is {first})"))
        })
    }

    /// The elements of `t`, last dimension fastest, as bytes.
    pub fn bytes(&self, t: &Tensor) -> Vec<u8> {
        match t.dtype.bytes() {
            8 => self.gather(t, |b: [u8; 8]| b).as_flattened().to_vec(),
            4 => self.gather(t, |b: [u8; 4]| b).as_flattened().to_vec(),
            2 => self.gather(t, |b: [u8; 2]| b).as_flattened().to_vec(),
            _ => self.gather(t, |[b]: [u8; 1]| b),
        }
    }

    /// The elements of `t`, last dimension fastest; whole numbers and f64 are not converted.
    pub fn f32s(&self, t: &Tensor) -> Option<Vec<f32>> {
        match t.dtype {
            Dtype::F32 => Some(self.gather(t, f32::from_le_bytes)),
            Dtype::F16 => Some(self.gather(t, |b| half::f16::from_le_bytes(b).to_f32())),
            Dtype::Bf16 => Some(self.gather(t, |b| half::bf16::from_le_bytes(b).to_f32())),
            _ => None,
        }
    }

    fn gather<const N: usize, T>(&self, t: &Tensor, convert: impl Fn([u8; N]) -> T) -> Vec<T> {
        let mut out = Vec::with_capacity(t.len());
        if t.is_empty() {
            return out;
        }
        let element = |at: usize| convert(self.map[at..at + N].try_into().expect("N bytes"));
        let Some((&inner, outer)) = t.dims.split_last() else {
            out.push(element(t.at));
            return out;
        };
        let step = t.strides[outer.len()] * N;
        let mut index = vec![0; outer.len()];
        loop {
            let row = t.at + index.iter().zip(&t.strides).map(|(i, s)| i * s * N).sum::<usize>();
            out.extend((0..inner).map(|i| element(row + i * step)));
            let Some(d) = (0..outer.len()).rev().find(|&d| index[d] + 1 < outer[d]) else { return out };
            index[d] += 1;
            index[d + 1..].fill(0);
        }
    }
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Found {
    /// Its tensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// Its numbers.
    pub numbers: BTreeMap<String, f64>,
    /// Metadata of a safetensors file.
    pub metadata: HashMap<String, String>,
}

/// Finds the tensors in the bytes of a file.
///
/// # Errors
/// What is damaged or refused.
pub fn parse(bytes: &[u8]) -> Text<Found> {
    match bytes {
        [b'P', b'K', 3, 4, ..] => parse_zip(bytes),
        _ if bytes.starts_with(&LEGACY_MAGIC) => parse_stream(bytes),
        [_, _, _, _, _, _, _, _, b'{', ..] => parse_safetensors(bytes),
        [] => Err("the file is empty".into()),
        [0x80, ..] => Err("a pickle without tensors (not written by torch.save): refused".into()),
        _ if bytes.get(257..262) == Some(b"ustar") => {
            Err("a tar archive of PyTorch before 0.1.2: load and save it with a newer PyTorch first".into())
        }
        _ => Err("neither a .pt nor a .safetensors file: its first bytes are those of neither".into()),
    }
}

/// `<name>/data.pkl` and one record `<name>/data/<key>` per storage.
fn parse_zip(bytes: &[u8]) -> Text<Found> {
    let entries = zip::entries(bytes)?;
    let mut pickles = entries.keys().filter_map(|k| k.strip_suffix("data.pkl"));
    let folder = match (pickles.next(), pickles.next()) {
        (Some(folder), None) if folder.is_empty() || folder.ends_with('/') => folder,
        (None, _) if entries.keys().any(|k| k.ends_with("constants.pkl")) => {
            return Err("a TorchScript archive, which holds code: save the state dict instead".into());
        }
        (None, _) => return Err("a zip archive without data.pkl: not written by torch.save".into()),
        _ => return Err("a zip archive with several data.pkl: not written by torch.save".into()),
    };
    let entry = |name: &str| entries.get(&format!("{folder}{name}"));
    if entry("byteorder").is_some_and(|e| bytes[e.range.clone()].trim_ascii() != b"little") {
        return Err("written on a big-endian machine: not supported".into());
    }
    if entry("constants.pkl").is_some() {
        return Err("a TorchScript archive, which holds code: save the state dict instead".into());
    }
    let stream = entry("data.pkl").ok_or("a zip archive without data.pkl")?;
    if !zip::intact(bytes, stream) {
        return Err("damaged: the checksum of data.pkl does not hold; copy or download the file again".into());
    }
    let (p, _) = pickle::read(&bytes[stream.range.clone()])?;
    let mut checked: HashMap<String, Range<usize>> = HashMap::new();
    collect(&p, |key| {
        if let Some(range) = checked.get(key) {
            return Ok(range.clone());
        }
        let record = format!("{folder}data/{key}");
        let e = entries.get(&record).ok_or_else(|| format!("no record {record} in the archive"))?;
        if !zip::intact(bytes, e) {
            return Err(format!("damaged: the checksum of {record} does not hold; copy or download the file again"));
        }
        checked.insert(key.into(), e.range.clone());
        Ok(e.range.clone())
    })
}

/// Magic number, version, system, the object, the list of storage keys; then each storage: length and elements.
fn parse_stream(bytes: &[u8]) -> Text<Found> {
    let mut at = LEGACY_MAGIC.len() + 1;
    let mut next = || -> Text<Pickle> {
        let rest = bytes.get(at..).ok_or("truncated")?;
        let (p, len) = pickle::read(rest).map_err(|e| format!("from byte {at}: {e}"))?;
        at += len;
        Ok(p)
    };
    let version = next()?;
    if *version.get(version.root()) != Value::Int(1001) {
        return Err("unknown version of the plain stream".into());
    }
    let system = next()?;
    if text_entry(&system, "little_endian").is_some_and(|v| *v == Value::Bool(false)) {
        return Err("written on a big-endian machine: not supported".into());
    }
    let (object, keys) = (next()?, next()?);
    let mut sizes = HashMap::new();
    for value in object.values() {
        if let Value::Tensor(t) = value {
            sizes.insert(t.storage.key, t.storage.dtype.bytes());
        }
    }
    let Value::List(ids) = keys.get(keys.root()) else { return Err("damaged: no list of storages".into()) };
    let mut places = HashMap::new();
    for id in ids {
        let Value::Text(key) = keys.get(*id) else { return Err("damaged: a storage without a name".into()) };
        let size = *sizes.get(key).ok_or_else(|| format!("storage {key} belongs to no tensor"))?;
        let len = bytes.get(at..at + 8).ok_or_else(|| format!("truncated: storage {key} is missing"))?;
        let len = u64::from_le_bytes(len.try_into().expect("8 bytes"));
        let start = at + 8;
        let end = usize::try_from(len).ok().and_then(|n| n.checked_mul(size)?.checked_add(start));
        let end = end.filter(|&e| e <= bytes.len());
        at = end.ok_or_else(|| {
            format!("truncated: storage {key} has {len} elements from byte {start}, the file has {} bytes", bytes.len())
        })?;
        places.insert(*key, start..at);
    }
    collect(&object, |key| places.get(key).cloned().ok_or_else(|| format!("no storage {key} in the file")))
}

fn parse_safetensors(bytes: &[u8]) -> Text<Found> {
    let st = safetensors::SafeTensors::deserialize(bytes).map_err(|e| format!("damaged safetensors file: {e}"))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let mut found = Found { metadata, ..Found::default() };
    for (name, view) in st.iter() {
        let dtype = of_safetensors(view.dtype()).ok_or_else(|| format!("{name}: element type {:?}", view.dtype()))?;
        let dims = view.shape().to_vec();
        // Sizes beside a 0 are not bounded by the length of the file.
        let stride = |d: usize| dims[d + 1..].iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let strides = (0..dims.len()).map(stride).collect::<Option<Vec<_>>>();
        let strides = strides.ok_or_else(|| format!("{name}: a tensor of size {dims:?}"))?;
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        found.tensors.insert(name.into(), Tensor { dtype, dims, strides, at });
    }
    Ok(found)
}

fn of_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
    use safetensors::Dtype as S;
    Some(match dtype {
        S::F64 => Dtype::F64,
        S::F32 => Dtype::F32,
        S::F16 => Dtype::F16,
        S::BF16 => Dtype::Bf16,
        S::I64 => Dtype::I64,
        S::I32 => Dtype::I32,
        S::I16 => Dtype::I16,
        S::I8 => Dtype::I8,
        S::U8 => Dtype::U8,
        S::BOOL => Dtype::Bool,
        _ => return None,
    })
}

fn text_entry<'p, 'a>(p: &'p Pickle<'a>, key: &str) -> Option<&'p Value<'a>> {
    let Value::Dict(entries) = p.get(p.root()) else { return None };
    entries.iter().find(|(k, _)| matches!(p.get(*k), Value::Text(t) if *t == key)).map(|(_, v)| p.get(*v))
}

/// Values still to be visited, with their names and depths. Both their number and the bytes of their names are bounded,
/// since a container may be referred to many times.
#[derive(Default)]
struct Walk {
    todo: Vec<(String, Id, usize)>,
    visits: usize,
    name_bytes: usize,
}

impl Walk {
    fn push(&mut self, parent: &str, key: &str, id: Id, depth: usize) -> Text<()> {
        let name = if parent.is_empty() { key.to_string() } else { format!("{parent}.{key}") };
        self.visits += 1;
        self.name_bytes += name.len();
        if self.visits > MAX_VISITS || self.name_bytes > MAX_NAME_BYTES || depth > MAX_DEPTH {
            return Err(format!("{parent}: {} values nested {depth} deep, far beyond a model: refused", self.visits));
        }
        self.todo.push((name, id, depth));
        Ok(())
    }
}

/// The tensors and numbers under the root, with `place` giving the bytes of a storage.
fn collect(p: &Pickle, mut place: impl FnMut(&str) -> Text<Range<usize>>) -> Text<Found> {
    let mut found = Found::default();
    let mut walk = Walk { todo: vec![(String::new(), p.root(), 0)], ..Walk::default() };
    while let Some((name, id, depth)) = walk.todo.pop() {
        match p.get(id) {
            Value::Dict(entries) => {
                for (k, v) in entries {
                    match p.get(*k) {
                        Value::Text(t) if t.len() <= 1024 => walk.push(&name, t, *v, depth + 1)?,
                        Value::Int(i) => walk.push(&name, &i.to_string(), *v, depth + 1)?,
                        other => return Err(format!("{name}: a key of a dict is {}", other.kind())),
                    }
                }
            }
            Value::List(items) | Value::Tuple(items) => {
                for (i, &v) in items.iter().enumerate() {
                    walk.push(&name, &i.to_string(), v, depth + 1)?;
                }
            }
            Value::Tensor(t) => {
                let tensor = placed(t, &mut place).map_err(|e| format!("{name}: {e}"))?;
                if found.tensors.insert(name.clone(), tensor).is_some() {
                    return Err(format!("{name} is there twice"));
                }
            }
            Value::Int(i) => _ = found.numbers.insert(name, *i as f64),
            Value::Float(x) => _ = found.numbers.insert(name, *x),
            _ => {}
        }
    }
    Ok(found)
}

fn placed(t: &TensorView, place: &mut impl FnMut(&str) -> Text<Range<usize>>) -> Text<Tensor> {
    let (s, size) = (&t.storage, t.storage.dtype.bytes());
    let range = place(s.key)?;
    if s.len.checked_mul(size) != Some(range.len()) {
        let (dtype, have) = (s.dtype.name(), range.len());
        return Err(format!("storage {} should hold {} elements of {dtype}, it has {have} bytes", s.key, s.len));
    }
    let len: usize = t.dims.iter().product();
    if len > s.len.max(MAX_EXPANDED) {
        return Err(format!("a tensor of size {:?} over a storage of {} elements: refused", t.dims, s.len));
    }
    let at = range.start + t.offset * size;
    Ok(Tensor { dtype: s.dtype, dims: t.dims.clone(), strides: t.strides.clone(), at })
}
