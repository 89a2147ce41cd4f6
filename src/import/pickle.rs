//! A reader of pickle streams that runs nothing: it builds tensors, containers, numbers and texts, and refuses the rest.
//!
//! A pickle is a program for a stack machine that may call any function by name. A checkpoint needs a few of them
//! ([`Global`]), which are understood here as data; any other name is an error at the moment it is read. Values live
//! in one list and refer to each other by position, so depth costs nothing and cycles do no harm. The number of
//! operations and values is bounded.

mod machine;

use machine::Machine;

/// What went wrong, without the file name.
type Result<T> = std::result::Result<T, String>;

/// Most operations of a stream. A model of a thousand tensors needs some 50,000.
const MAX_OPERATIONS: usize = 8 << 20;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::Bf16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// Name in PyTorch.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::I64 => "int64",
            Dtype::I32 => "int32",
            Dtype::I16 => "int16",
            Dtype::I8 => "int8",
            Dtype::U8 => "uint8",
            Dtype::Bool => "bool",
        }
    }
}

/// Everything a stream may call or name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// `torch.Size`.
    Size,
    /// `_codecs.encode`: how protocol 2 writes bytes.
    Encode,
    /// `torch.FloatStorage` and its kin.
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Self> {
        let storage = |dtype| Ok(Global::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", "Size") => Ok(Global::Size),
            ("_codecs", "encode") => Ok(Global::Encode),
            ("torch", "DoubleStorage") => storage(Dtype::F64),
            ("torch", "FloatStorage") => storage(Dtype::F32),
            ("torch", "HalfStorage") => storage(Dtype::F16),
            ("torch", "BFloat16Storage") => storage(Dtype::Bf16),
            ("torch", "LongStorage") => storage(Dtype::I64),
            ("torch", "IntStorage") => storage(Dtype::I32),
            ("torch", "ShortStorage") => storage(Dtype::I16),
            ("torch", "CharStorage") => storage(Dtype::I8),
            ("torch", "ByteStorage") => storage(Dtype::U8),
            ("torch", "BoolStorage") => storage(Dtype::Bool),
            _ => Err(format!(
                "the file wants to use `{module}.{name}`, which is no part of a tensor file: refused, nothing was executed"
            )),
        }
    }
}

/// A run of elements kept outside the pickle.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Name of the record that holds the elements.
    pub key: &'a str,
    /// Number of elements.
    pub len: usize,
}

/// A view of a storage; every element lies inside it.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// The elements.
    pub storage: Storage<'a>,
    /// Element of the storage where the tensor starts.
    pub offset: usize,
    /// Size.
    pub dims: Vec<usize>,
    /// Elements between neighbours in each dimension.
    pub strides: Vec<usize>,
}

/// Position of a value.
pub type Id = u32;

/// A value of the stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// None.
    None,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number that does not fit 64 bits, or bytes: kept out, as no tensor needs it.
    Opaque,
    /// A number.
    Float(f64),
    /// A text.
    Text(&'a str),
    /// A list.
    List(Vec<Id>),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A dict, entries in order.
    Dict(Vec<(Id, Id)>),
    /// A name of the closed list.
    Global(Global),
    /// Elements outside the pickle.
    Storage(Storage<'a>),
    /// A tensor.
    Tensor(TensorView<'a>),
}

impl Value<'_> {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a truth value",
            Value::Int(_) | Value::Float(_) | Value::Opaque => "a number",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dict",
            Value::Global(_) => "a name",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

/// All values of a stream.
#[derive(Debug, Default)]
pub struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// The value at `id`.
    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }

    /// Every value made, in order.
    pub fn values(&self) -> impl Iterator<Item = &Value<'a>> {
        self.values.iter()
    }

    /// Position of the result.
    pub fn root(&self) -> Id {
        self.root
    }
}

/// Reads one pickle from the start of `bytes`; also returns its length.
///
/// # Errors
/// What is damaged or refused, and at which byte.
pub fn read(bytes: &[u8]) -> Result<(Pickle<'_>, usize)> {
    let mut m = Machine::new(bytes);
    for _ in 0..MAX_OPERATIONS {
        let at = m.at;
        if m.step().map_err(|e| format!("pickle byte {at}: {e}"))? {
            let root = m.stack.pop().ok_or("pickle: it ends without a value")?;
            return Ok((Pickle { values: m.values, root }, m.at));
        }
    }
    Err(format!("pickle: more than {MAX_OPERATIONS} operations, a hundred times what a model needs"))
}
