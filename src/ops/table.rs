//! What the diffusion kernels read besides values: coefficients by t, computed in f64, and how images fall into tiles.
//!
//! The layouts are those of `kernels/gaussian.cuh` and `kernels/image.cuh`, which say what the numbers mean.

use crate::config::{MeanType, VarType};
use crate::device::driver::{Arg, Ptr};
use crate::diffusion::Objective;
use crate::error::{Error, Result};
use crate::graph::{ALIGN, Shape};
use crate::schedule::{Coefs, Process};
use bytemuck::{Pod, Zeroable};

/// Largest tile of an image, in elements: TILE of `kernels/image.cuh`.
const TILE: usize = 2048;

/// A number as the sum of two floats: 48 bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Split {
    hi: f32,
    lo: f32,
}

impl From<f64> for Split {
    fn from(x: f64) -> Self {
        let hi = x as f32;
        // An infinite coefficient has no remainder: inf - inf would be NaN.
        Split { hi, lo: if hi.is_finite() { (x - f64::from(hi)) as f32 } else { 0.0 } }
    }
}

/// `ln(variance_p / variance_q) = s·((v + z_hi) + z_lo)` of the variance output v (0 where it is fixed).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct LogRatio {
    s: f32,
    z_hi: f32,
    z_lo: f32,
}

impl LogRatio {
    /// Of the variance kind at one t, relative to the clipped posterior variance.
    pub fn new(c: &Coefs, var_type: VarType) -> Self {
        let log1 = c.log_beta_tilde_clipped;
        let (s, z) = match var_type {
            VarType::Learned => (1.0, -log1),
            VarType::LearnedRange => (0.5 * (c.log_beta - log1), 1.0),
            VarType::FixedSmall => (1.0, 0.0),
            VarType::FixedLarge => (1.0, c.log_beta_large - log1),
        };
        let z = Split::from(z);
        LogRatio { s: s as f32, z_hi: z.hi, z_lo: z.lo }
    }

    /// That of p itself where there is none to learn or to add.
    pub const ZERO: Self = LogRatio { s: 0.0, z_hi: 0.0, z_lo: 0.0 };
}

/// One t of the bound and of the losses: TableRow of `kernels/gaussian.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct BoundRow {
    target: [Split; 2],
    ratio: LogRatio,
    k: f32,
    m: f32,
    c: f32,
    eps_scale: f32,
    weight: f32,
    k64: f64,
    m64: f64,
    coef1: f64,
    log1: f64,
}

impl BoundRow {
    fn new(c: &Coefs, objective: &Objective) -> Self {
        let output = objective.output;
        let sigma = (0.5 * c.log_beta_tilde_clipped).exp();
        let ([a, b], k, m) = match output.mean_type {
            MeanType::Epsilon => ([0.0, 1.0], -c.coef1 * c.sqrt_recipm1_alpha_bar, -c.sqrt_recipm1_alpha_bar),
            MeanType::XStart => ([1.0, 0.0], c.coef1, 1.0),
            MeanType::PreviousX => {
                ([c.alpha_bar_prev.sqrt(), c.coef2 * c.sqrt_one_minus_alpha_bar], 1.0, 1.0 / c.coef1)
            }
            MeanType::V => (
                [-c.sqrt_one_minus_alpha_bar, c.sqrt_alpha_bar],
                -c.coef1 * c.sqrt_one_minus_alpha_bar,
                -c.sqrt_one_minus_alpha_bar,
            ),
        };
        BoundRow {
            target: [a.into(), b.into()],
            ratio: LogRatio::new(c, output.var_type),
            k: (k / sigma) as f32,
            m: m as f32,
            c: (c.coef1 / sigma) as f32,
            eps_scale: c.sqrt_recipm1_alpha_bar.powi(-2) as f32,
            weight: objective.weight(c) as f32,
            k64: k,
            m64: m,
            coef1: c.coef1,
            log1: c.log_beta_tilde_clipped,
        }
    }

    /// Every t of a process.
    pub fn table(process: &Process, objective: &Objective) -> Vec<Self> {
        (0..process.steps()).map(|t| BoundRow::new(&process.at(t), objective)).collect()
    }
}

/// How n images fall into tiles of neighbouring elements: Tiling of `kernels/image.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Tiling {
    size: i64,
    n: i32,
    tile: i32,
    tiles: i32,
    channels: i32,
    stride: i32,
    unused: i32,
}

impl<'a> From<&'a Tiling> for Arg<'a> {
    fn from(tiling: &'a Tiling) -> Self {
        Arg::Struct(bytemuck::bytes_of(tiling))
    }
}

impl Tiling {
    /// Tiles of equal size of images of shape `s`, each of whole pixels and of a multiple of 8 elements (the last one may be shorter);
    /// `stride` is the channels of the network's output.
    ///
    /// # Errors
    /// [`Error::Device`] when 8 pixels exceed a tile, and for sizes beyond 32 bits.
    pub fn new(s: Shape, stride: usize) -> Result<Self> {
        if 8 * s.c > TILE || stride > 2 * s.c {
            let most = TILE / 8;
            return Err(Error::Device(format!("images of {} channels: its kernel takes at most {most}", s.c)));
        }
        let size = s.len() / s.n.max(1);
        let tiles = size.div_ceil(TILE / (8 * s.c) * 8 * s.c).max(1);
        let tile = size.div_ceil(tiles).next_multiple_of(8 * s.c);
        let number = |x: usize| {
            i32::try_from(x).map_err(|_| Error::Device(format!("images of {s}: {x} does not fit in 32 bits")))
        };
        number(s.w * s.c)?;
        Ok(Tiling {
            size: i64::try_from(size).unwrap_or(i64::MAX),
            n: number(s.n)?,
            tile: number(tile)?,
            tiles: number(size.div_ceil(tile).max(1))?,
            channels: number(s.c)?,
            stride: number(stride)?,
            unused: 0,
        })
    }

    /// Tiles of all images.
    pub fn items(&self) -> usize {
        self.n as usize * self.tiles as usize
    }

    /// Bytes of partial sums, two numbers for each tile.
    fn partial_bytes(&self) -> usize {
        self.items() * 8
    }
}

/// Where the parts of a step's memory lie: rows by t, partial sums of the tiles, the number of tiles that have arrived.
pub struct BoundMemory {
    /// [`BoundRow`] of every t.
    pub rows: Ptr,
    /// Two f32 per tile.
    pub partials: Ptr,
    /// One u32 per image, 0 at rest.
    pub arrived: Ptr,
}

impl BoundMemory {
    fn offsets(steps: usize, tiling: &Tiling) -> [usize; 3] {
        let partials = (steps * size_of::<BoundRow>()).next_multiple_of(ALIGN);
        let arrived = partials + tiling.partial_bytes().next_multiple_of(ALIGN);
        [partials, arrived, arrived + tiling.n as usize * 4]
    }

    /// The memory as the first run finds it.
    pub fn initial(process: &Process, objective: &Objective, tiling: &Tiling) -> Vec<u8> {
        let [_, _, end] = Self::offsets(process.steps(), tiling);
        let mut bytes = bytemuck::cast_slice(&BoundRow::table(process, objective)).to_vec();
        bytes.resize(end, 0);
        bytes
    }

    /// Its parts, when it begins at `memory`.
    pub fn at(memory: Ptr, process: &Process, tiling: &Tiling) -> Self {
        let [partials, arrived, _] = Self::offsets(process.steps(), tiling);
        BoundMemory { rows: memory, partials: memory.offset(partials), arrived: memory.offset(arrived) }
    }

    /// Bytes that a step must read of it: a row per image.
    pub fn cost(images: usize) -> f64 {
        (images * size_of::<BoundRow>()) as f64
    }
}
