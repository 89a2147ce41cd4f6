//! Tensor maps: how a tensor lies in memory, for the bulk-copy engine (TMA) of Hopper and later.
//!
//! Dimension 0 is the fastest. In tile mode a copy takes a box; in im2col mode (rank 4: C, W, H, N) it takes `pixels` pixels
//! of `channels` channels, walking W, H, N inside the bounding box that `lower` and `upper` shrink or widen.

use super::Ptr;
use crate::error::{Error, Result};

/// A described tensor, passed to kernels by value (`const __grid_constant__ TensorMap`).
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub struct TensorMap(pub(super) [u8; 128]);

/// Type of the elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 2 bytes.
    Bf16,
    /// 4 bytes.
    F32,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::Bf16 => 2,
            Element::F32 => 4,
        }
    }
}

/// How 16-byte chunks are permuted in shared memory so that columns have no bank conflicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swizzle {
    /// As they are.
    None,
    /// In rows of 32 bytes.
    B32,
    /// In rows of 64 bytes.
    B64,
    /// In rows of 128 bytes.
    B128,
}

impl Swizzle {
    /// Length of the row within which chunks are permuted; no limit without a swizzle.
    fn row_bytes(self) -> usize {
        match self {
            Swizzle::None => usize::MAX,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }
}

/// What one copy takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorMapMode {
    /// A box of these sizes.
    Tile {
        /// Elements in each dimension.
        sizes: Vec<u32>,
    },
    /// Pixels of a convolution's receptive field.
    Im2col {
        /// Offsets of the bounding box's lower corner in W and H.
        lower: [i32; 2],
        /// Offsets of its upper corner in W and H.
        upper: [i32; 2],
        /// Channels per pixel.
        channels: u32,
        /// Pixels per copy.
        pixels: u32,
    },
}

/// Everything a tensor map holds.
#[derive(Debug, Clone)]
pub struct TensorMapSpec {
    /// Type of the elements.
    pub element: Element,
    /// Where the tensor begins; a multiple of 16.
    pub address: Ptr,
    /// Elements in each dimension, fastest first; 1 to 5 dimensions.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next in dimensions 1 and up; multiples of 16.
    pub strides_bytes: Vec<u64>,
    /// Step in each dimension (1: every element).
    pub element_strides: Vec<u32>,
    /// Layout in shared memory.
    pub swizzle: Swizzle,
    /// Tile or im2col.
    pub mode: TensorMapMode,
}

impl TensorMapSpec {
    /// The rules of the hardware that the driver would answer with a bare "invalid value".
    pub(super) fn check(&self) -> Result<()> {
        let rank = self.dims.len();
        let fail = |what: String| Err(Error::Device(format!("tensor map: {what}")));
        if !(1..=5).contains(&rank) || self.strides_bytes.len() + 1 != rank || self.element_strides.len() != rank {
            return fail(format!(
                "{rank} dimensions with {} strides and {} element strides; 1 to 5 dimensions need one stride fewer and as many element strides",
                self.strides_bytes.len(),
                self.element_strides.len()
            ));
        }
        if !self.address.0.is_multiple_of(16) {
            return fail(format!("address {:#x} is not a multiple of 16", self.address.0));
        }
        if let Some(s) = self.strides_bytes.iter().find(|s| *s % 16 != 0 || **s >= 1 << 40) {
            return fail(format!("a stride of {s} bytes; strides are multiples of 16 below 2^40"));
        }
        if let Some(d) = self.dims.iter().find(|d| **d == 0 || **d > 1 << 32) {
            return fail(format!("a dimension of {d}; it can be 1 to 2^32"));
        }
        let inner = match &self.mode {
            TensorMapMode::Tile { sizes } => {
                if sizes.len() != rank || sizes.iter().any(|s| !(1..=256).contains(s)) {
                    return fail(format!("a box of {sizes:?} for {rank} dimensions; each side can be 1 to 256"));
                }
                sizes[0]
            }
            TensorMapMode::Im2col { channels, pixels, .. } => {
                if rank != 4 || *channels > 256 || *pixels > 1024 || *channels == 0 || *pixels == 0 {
                    return fail(format!(
                        "im2col of rank {rank} with {channels} channels and {pixels} pixels; rank is 4 here, at most 256 and 1024"
                    ));
                }
                *channels
            }
        };
        let inner_bytes = inner as usize * self.element.bytes();
        if !inner_bytes.is_multiple_of(16) || inner_bytes > self.swizzle.row_bytes() {
            return fail(format!(
                "{inner_bytes} bytes in the fastest dimension with swizzle {:?}; a multiple of 16 that fits the swizzle's row",
                self.swizzle
            ));
        }
        Ok(())
    }
}
