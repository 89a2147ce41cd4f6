//! The stack machine of a pickle, operation by operation.

use super::{Global, Id, Result, Storage, TensorView, Value};
use std::collections::HashMap;

/// Most values that a stream may make. A model of a thousand tensors needs some 50,000.
const MAX_VALUES: usize = 1 << 19;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 16;

/// The stack machine.
#[derive(Default)]
pub struct Machine<'a> {
    bytes: &'a [u8],
    /// Bytes read.
    pub at: usize,
    /// Every value made.
    pub values: Vec<Value<'a>>,
    /// Where those in work are among them.
    pub stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Entries of the dicts that were made from lists.
    entries: usize,
}

impl<'a> Machine<'a> {
    /// At the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Machine { bytes, ..Machine::default() }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let end = end.ok_or_else(|| format!("truncated: {n} bytes wanted, {} left", self.bytes.len() - self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian unsigned number of `n` bytes.
    fn number(&mut self, n: usize) -> Result<usize> {
        let mut wide = [0; 8];
        wide[..n].copy_from_slice(self.take(n)?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|e| e.to_string())
    }

    fn text(&mut self, n: usize) -> Result<&'a str> {
        std::str::from_utf8(self.take(n)?).map_err(|e| format!("a text is not UTF-8: {e}"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().take(1024).position(|&b| b == b'\n').ok_or("a name without an end")?;
        let line = self.text(n)?;
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, value: Value<'a>) -> Result<()> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values, ten times what a model needs"));
        }
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("damaged: the stack is empty".into());
        }
        Ok(self.stack.pop().expect("checked above"))
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or_else(|| "damaged: the stack is empty".into())
    }

    fn popped(&mut self, n: usize) -> Result<Vec<Id>> {
        let mut ids = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        ids.reverse();
        Ok(ids)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or("damaged: no mark on the stack")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }

    fn keep(&mut self, key: usize) -> Result<()> {
        let key = u32::try_from(key).map_err(|e| e.to_string())?;
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<()> {
        let id = u32::try_from(key).ok().and_then(|k| self.memo.get(&k).copied());
        self.stack.push(id.ok_or_else(|| format!("damaged: nothing was kept as {key}"))?);
        Ok(())
    }

    /// One operation; true at the end of the stream.
    ///
    /// # Errors
    /// What is damaged or refused.
    pub fn step(&mut self) -> Result<bool> {
        let op = self.take(1)?[0];
        match op {
            b'.' => return Ok(true),
            0x80 => {
                let version = self.number(1)?;
                if !(2..=5).contains(&version) {
                    return Err(format!("pickle protocol {version}; 2 to 5 are known"));
                }
            }
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => self.stack.push(self.top()?),
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool(op == 0x88))?,
            b'K' | b'M' | b'J' | b'G' | 0x8a | 0x8b => self.step_number(op)?,
            b'X' | b'U' | b'T' | 0x8c | 0x8d | b'B' | b'C' | 0x8e => self.step_text(op)?,
            b']' | b'a' | b'e' | b'l' | b')' | b't' | 0x85..=0x87 | b'}' | b'd' | b's' | b'u' => {
                self.step_container(op)?
            }
            b'q' | b'r' | b'h' | b'j' | 0x94 => self.step_memo(op)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(Global::named(module, name)?))?;
            }
            0x93 => self.stack_global()?,
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            other => return Err(format!("operation {other:#04x} is no part of a tensor file: refused")),
        }
        Ok(false)
    }

    fn step_number(&mut self, op: u8) -> Result<()> {
        let value = match op {
            b'K' => Value::Int(self.number(1)? as i64),
            b'M' => Value::Int(self.number(2)? as i64),
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))),
            b'G' => Value::Float(f64::from_be_bytes(self.take(8)?.try_into().expect("8 bytes"))),
            _ => {
                let n = self.number(if op == 0x8a { 1 } else { 4 })?;
                let digits = self.take(n)?;
                let sign = if digits.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
                let mut wide = [sign; 8];
                match wide.get_mut(..n) {
                    Some(low) => {
                        low.copy_from_slice(digits);
                        Value::Int(i64::from_le_bytes(wide))
                    }
                    None => Value::Opaque,
                }
            }
        };
        self.push(value)
    }

    fn step_text(&mut self, op: u8) -> Result<()> {
        let n = self.number(match op {
            b'U' | b'C' | 0x8c => 1,
            b'X' | b'T' | b'B' => 4,
            _ => 8,
        })?;
        match op {
            b'B' | b'C' | 0x8e => {
                self.take(n)?;
                self.push(Value::Opaque)
            }
            _ => {
                let text = self.text(n)?;
                self.push(Value::Text(text))
            }
        }
    }

    fn step_container(&mut self, op: u8) -> Result<()> {
        match op {
            b']' => self.push(Value::List(vec![])),
            b')' => self.push(Value::Tuple(vec![])),
            b'}' => self.push(Value::Dict(vec![])),
            b'l' | b't' | b'd' => {
                let items = self.pop_to_mark()?;
                let value = match op {
                    b'l' => Value::List(items),
                    b't' => Value::Tuple(items),
                    _ => Value::Dict(pairs(items)?),
                };
                self.push(value)
            }
            0x85..=0x87 => {
                let items = self.popped(usize::from(op - 0x84))?;
                self.push(Value::Tuple(items))
            }
            b'a' | b'e' => {
                let items = if op == b'a' { self.popped(1)? } else { self.pop_to_mark()? };
                let top = self.top()?;
                match &mut self.values[top as usize] {
                    Value::List(list) => list.extend(items),
                    other => return Err(format!("damaged: appends to {}", other.kind())),
                }
                Ok(())
            }
            _ => {
                let items = if op == b's' { self.popped(2)? } else { self.pop_to_mark()? };
                let top = self.top()?;
                match &mut self.values[top as usize] {
                    Value::Dict(dict) => dict.extend(pairs(items)?),
                    other => return Err(format!("damaged: sets an item of {}", other.kind())),
                }
                Ok(())
            }
        }
    }

    fn step_memo(&mut self, op: u8) -> Result<()> {
        match op {
            0x94 => self.keep(self.memo.len()),
            _ => {
                let key = self.number(if matches!(op, b'q' | b'h') { 1 } else { 4 })?;
                if matches!(op, b'q' | b'r') { self.keep(key) } else { self.recall(key) }
            }
        }
    }

    fn stack_global(&mut self) -> Result<()> {
        let ids = self.popped(2)?;
        match (self.value(ids[0]), self.value(ids[1])) {
            (Value::Text(module), Value::Text(name)) => {
                let global = Global::named(module, name)?;
                self.push(Value::Global(global))
            }
            _ => Err("damaged: a name that is no text".into()),
        }
    }

    /// ('storage', type, key, location, elements), and None or a view in files of the old kind.
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Value::Tuple(ids) = self.value(id) else { return Err("damaged: a storage without a description".into()) };
        let fields: Vec<&Value> = ids.iter().map(|&id| self.value(id)).collect();
        let storage = match fields[..] {
            [Value::Text("storage"), Value::Global(Global::Storage(dtype)), Value::Text(key), _, Value::Int(len)]
            | [
                Value::Text("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Text(key),
                _,
                Value::Int(len),
                Value::None,
            ] => {
                let len = usize::try_from(*len).map_err(|_| format!("a storage of {len} elements"))?;
                Storage { dtype: *dtype, key, len }
            }
            _ => return Err("a storage of unknown description".into()),
        };
        self.push(Value::Storage(storage))
    }

    /// A call of one of the closed list.
    fn reduce(&mut self) -> Result<()> {
        let (args, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(args) = self.value(args) else { return Err("damaged: a call without arguments".into()) };
        let made = match *self.value(function) {
            Value::Global(Global::OrderedDict) => Value::Dict(self.ordered_dict(args)?),
            Value::Global(Global::RebuildTensor) => Value::Tensor(self.tensor(args)?),
            Value::Global(Global::Encode) => Value::Opaque,
            Value::Global(Global::RebuildParameter | Global::Size) if !args.is_empty() => match self.value(args[0]) {
                // The value itself, not a copy: a stream may call this as often as it likes.
                Value::Tensor(_) | Value::Tuple(_) => {
                    self.stack.push(args[0]);
                    return Ok(());
                }
                other => return Err(format!("damaged: a parameter made from {}", other.kind())),
            },
            ref other => return Err(format!("a call of {} is no part of a tensor file: refused", other.kind())),
        };
        if let Value::Dict(entries) = &made {
            self.entries += entries.len();
        }
        self.push(made)
    }

    /// From a list of pairs. Lists may be named again and again, so that the entries of all dicts are counted.
    fn ordered_dict(&self, args: &[Id]) -> Result<Vec<(Id, Id)>> {
        let Some(&items) = args.first() else { return Ok(vec![]) };
        let Value::List(items) = self.value(items) else { return Err("damaged: a dict made from no list".into()) };
        if self.entries + items.len() > MAX_VALUES {
            return Err(format!("dicts of more than {MAX_VALUES} entries, ten times what a model needs"));
        }
        let pair = |&id: &Id| match self.value(id) {
            Value::List(kv) | Value::Tuple(kv) if kv.len() == 2 => Ok((kv[0], kv[1])),
            other => Err(format!("damaged: a dict entry that is {}", other.kind())),
        };
        items.iter().map(pair).collect()
    }

    /// (storage, offset, size, strides, …): checked to lie inside its storage.
    fn tensor(&self, args: &[Id]) -> Result<TensorView<'a>> {
        let [storage, offset, dims, strides, ..] = args else {
            return Err("damaged: a tensor of too few fields".into());
        };
        let Value::Storage(storage) = self.value(*storage) else {
            return Err("damaged: a tensor without storage".into());
        };
        let (dims, strides) = (self.sizes(*dims)?, self.sizes(*strides)?);
        if dims.len() != strides.len() || dims.len() > MAX_DIMS {
            return Err(format!("a tensor of {} sizes and {} strides", dims.len(), strides.len()));
        }
        let offset = self.size(*offset)?;
        let bad = || {
            format!("a tensor of size {dims:?} and strides {strides:?} at {offset}: its storage has {}", storage.len)
        };
        let count = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(bad)?;
        let last =
            dims.iter().zip(&strides).try_fold(offset, |at, (&d, &s)| at.checked_add(s.checked_mul(d.max(1) - 1)?));
        if count > 0 && last.is_none_or(|last| last >= storage.len) {
            return Err(bad());
        }
        Ok(TensorView { storage: storage.clone(), offset, dims, strides })
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>> {
        match self.value(id) {
            Value::Tuple(ids) | Value::List(ids) if ids.len() <= MAX_DIMS => {
                ids.iter().map(|&id| self.size(id)).collect()
            }
            other => Err(format!("damaged: the size of a tensor is {}", other.kind())),
        }
    }

    fn size(&self, id: Id) -> Result<usize> {
        match self.value(id) {
            Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a size or stride of {n}")),
            other => Err(format!("damaged: a size is {}", other.kind())),
        }
    }

    /// The attributes of an ordered dict: versions of the modules, which nothing here depends on.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        let target = self.top()?;
        match (self.value(target), self.value(state)) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            (target, _) => Err(format!("attributes set on {}: refused", target.kind())),
        }
    }
}

fn pairs(items: Vec<Id>) -> Result<Vec<(Id, Id)>> {
    let (pairs, []) = items.as_chunks::<2>() else { return Err("damaged: a key without a value".into()) };
    Ok(pairs.iter().map(|&[k, v]| (k, v)).collect())
}
