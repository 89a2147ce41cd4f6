//! Kernel arguments: values packed as the driver wants them, one pointer to each.

use std::ffi::c_void;

use super::{Ptr, TensorMap};

/// One kernel parameter. The kernel's C++ type must have the same size and kind; the emulator checks that.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A pointer to device memory.
    Ptr(Ptr),
    /// `int`, `int32_t`.
    I32(i32),
    /// `unsigned`, `uint32_t`.
    U32(u32),
    /// `int64_t`, `long long`.
    I64(i64),
    /// `uint64_t`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
    /// A struct passed by value, such as a tensor map; aligned to 128 bytes.
    Struct(&'a [u8]),
}

macro_rules! arg_from {
    ($($type:ty => $variant:ident),*) => {
        $(impl From<$type> for Arg<'_> {
            fn from(value: $type) -> Self {
                Arg::$variant(value)
            }
        })*
    };
}
arg_from!(Ptr => Ptr, i32 => I32, u32 => U32, i64 => I64, u64 => U64, f32 => F32, f64 => F64);

impl<'a> From<&'a TensorMap> for Arg<'a> {
    fn from(map: &'a TensorMap) -> Self {
        Arg::Struct(&map.0)
    }
}

/// Kernel arguments from anything that is an [`Arg`]: `args![dx, x, n as i32, 1e-5f32]`.
#[macro_export]
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::device::driver::Arg::from($value)),*] };
}

/// A cache line of argument storage, aligned as the strictest parameter type (a tensor map) wants it.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Line([u8; 128]);

/// Size and kind of one packed argument, as the emulator compares it with the kernel's parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes.
    pub size: u32,
    /// `p` pointer, `i` integer, `f` floating point, `s` struct.
    pub kind: u8,
}

/// Arguments in the form of `cuLaunchKernel`. Owns its bytes, so a recorded launch can be repeated.
pub struct Packed {
    lines: Vec<Line>,
    offsets: Vec<usize>,
    shapes: Vec<Shape>,
}

impl Packed {
    /// Packs `args`: scalars side by side, each struct on a line of its own.
    pub fn new(args: &[Arg]) -> Packed {
        let mut packed = Packed { lines: Vec::new(), offsets: Vec::new(), shapes: Vec::new() };
        let mut end = 0;
        for arg in args {
            let (bytes, kind): (&[u8], u8) = match arg {
                Arg::Ptr(p) => (bytemuck::bytes_of(&p.0), b'p'),
                Arg::I32(v) => (bytemuck::bytes_of(v), b'i'),
                Arg::U32(v) => (bytemuck::bytes_of(v), b'i'),
                Arg::I64(v) => (bytemuck::bytes_of(v), b'i'),
                Arg::U64(v) => (bytemuck::bytes_of(v), b'i'),
                Arg::F32(v) => (bytemuck::bytes_of(v), b'f'),
                Arg::F64(v) => (bytemuck::bytes_of(v), b'f'),
                Arg::Struct(v) => (v, b's'),
            };
            let align = if kind == b's' { 128 } else { 8 };
            let start = usize::next_multiple_of(end, align);
            end = start + bytes.len();
            packed.lines.resize(end.div_ceil(128), Line([0; 128]));
            let storage: &mut [u8] = packed.storage();
            storage[start..end].copy_from_slice(bytes);
            packed.offsets.push(start);
            packed.shapes.push(Shape { size: bytes.len() as u32, kind });
        }
        packed
    }

    fn storage(&mut self) -> &mut [u8] {
        // SAFETY: Line is 128 plain bytes without padding, and the vector owns len() of them.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 128) }
    }

    /// One pointer to each argument, valid while `self` is neither moved nor changed.
    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        let base: *mut u8 = self.storage().as_mut_ptr();
        // SAFETY: every offset lies within the storage.
        self.offsets.iter().map(|&o| unsafe { base.add(o) }.cast()).collect()
    }

    /// Size and kind of each argument.
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }
}
