//! Forward noising: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, x_0 = byte/127.5 - 1 (Ho et al. 2020, eq. 4).
//!
//! Gathers each image of the batch from the data by its index, flips it if asked and if its random bit says so, and
//! draws eps by Philox. eps need not be stored: whoever needs it draws the same again. data: (N, h, w, c) u8; index, t: (n) i32;
//! x_t, eps: (n, h, w, c) f32 (bf16 on CUDA).
//!
//! Kernel: `kernels/q_sample.cu`, a block per tile of up to 2,048 elements; images of up to 256 channels.

use super::launch::Launcher;
use super::table::{Split, Tiling};
use super::{Control, Cost, Operation, Views};
use crate::args;
use crate::device::driver::{Arg, Ptr};
use crate::diffusion;
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Shape, Val};
use crate::rng;
use crate::schedule::Process;
use rayon::prelude::*;
use std::sync::Arc;

/// The clean images of a microbatch, where they lie.
#[derive(Clone, Debug)]
pub struct Images {
    /// All images, u8.
    pub data: Val,
    /// Which of them, in batch order.
    pub index: Val,
    /// Mirror left and right every image whose random bit is set.
    pub flip: bool,
    /// Position in the batch of the microbatch's first image.
    pub first_image: u32,
    /// Seed and step.
    pub control: Val,
}

impl Images {
    /// Values it reads.
    pub fn vals(&self) -> [Val; 3] {
        [self.data, self.index, self.control]
    }

    /// Images, of the size of those in the data.
    pub fn shape(&self, g: &Graph) -> Shape {
        Shape { n: g.shape(self.index).len(), ..g.shape(self.data) }
    }

    /// Bytes a step must read to see the images.
    pub fn bytes(&self, g: &Graph) -> f64 {
        (self.shape(g).len() + g[self.index].bytes()) as f64
    }

    /// The images as the kernels take them.
    pub fn arg(&self, m: &Launcher) -> ImagesArg {
        let s = self.shape(m.graph);
        ImagesArg {
            data: m.ptr(self.data).0,
            index: m.ptr(self.index).0,
            control: m.ptr(self.control).0,
            size: (s.len() / s.n.max(1)) as i64,
            w: s.w as i32,
            c: s.c as i32,
            first_image: self.first_image,
            flip: i32::from(self.flip),
        }
    }

    /// The images in memory.
    pub fn open<'a>(&self, m: &Views<'a>) -> ImageReader<'a> {
        ImageReader {
            data: m.get(self.data),
            index: m.get(self.index),
            shape: m.graph().shape(self.data),
            flip: self.flip,
            first_image: self.first_image,
            control: m.control(self.control),
        }
    }
}

/// Images of `kernels/image.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ImagesArg {
    data: u64,
    index: u64,
    control: u64,
    size: i64,
    w: i32,
    c: i32,
    first_image: u32,
    flip: i32,
}

impl<'a> From<&'a ImagesArg> for Arg<'a> {
    fn from(images: &'a ImagesArg) -> Self {
        Arg::Struct(bytemuck::bytes_of(images))
    }
}

/// [`Images`] in memory.
pub struct ImageReader<'a> {
    data: &'a [u8],
    index: &'a [i32],
    shape: Shape,
    flip: bool,
    first_image: u32,
    control: Control,
}

impl ImageReader<'_> {
    /// x_0 of image `n` of the microbatch.
    pub fn x_0(&self, n: usize, x_0: &mut [f32]) {
        let (w, c) = (self.shape.w, self.shape.c);
        let bytes = &self.data[self.index[n] as usize * x_0.len()..][..x_0.len()];
        let counter = [0, self.first_image + n as u32, self.control.step, rng::op::FLIP];
        let mirrored = self.flip && rng::philox(counter, self.control.seed)[0] >> 31 == 1;
        for (p, out) in x_0.chunks_exact_mut(c).enumerate() {
            let (row, col) = (p / w, p % w);
            let from = row * w + if mirrored { w - 1 - col } else { col };
            for (x, b) in out.iter_mut().zip(&bytes[from * c..]) {
                *x = diffusion::to_unit(*b);
            }
        }
    }
}

/// Where the noise of a batch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noise {
    /// Drawn for training: a function of seed, step and position in the batch.
    Drawn,
    /// Drawn for evaluation: a function of seed, number of the image and t.
    PerImage,
    /// As the host or an earlier step has written it.
    Stored(Val),
}

impl Noise {
    /// The value it is read from, if any.
    pub fn val(self) -> Option<Val> {
        match self {
            Noise::Stored(v) => Some(v),
            Noise::Drawn | Noise::PerImage => None,
        }
    }

    /// Bytes a step must read to have it.
    pub fn bytes(self, g: &Graph) -> f64 {
        self.val().map_or(0.0, |v| g[v].bytes() as f64)
    }

    /// The noise in memory, on the CPU.
    pub fn open<'a>(self, m: &Views<'a>, images: &Images) -> NoiseReader<'a> {
        NoiseReader {
            noise: self,
            stored: self.val().map_or(&[], |v| m.f32(v)),
            index: m.get(images.index),
            first_image: images.first_image,
            control: m.control(images.control),
        }
    }

    /// Address and kind as the kernels take them: NoiseKind of `kernels/image.cuh`.
    pub fn arg(self, m: &Launcher) -> (Ptr, i32) {
        match self {
            Noise::Drawn => (Ptr::NULL, 0),
            Noise::PerImage => (Ptr::NULL, 1),
            Noise::Stored(v) => (m.ptr(v), stored_kind(m.graph, v)),
        }
    }
}

/// [`Noise`] in memory.
pub struct NoiseReader<'a> {
    noise: Noise,
    stored: &'a [f32],
    index: &'a [i32],
    first_image: u32,
    control: Control,
}

impl NoiseReader<'_> {
    /// eps of image `n` of the microbatch, which is at step `t`.
    pub fn eps(&self, n: usize, t: i32, eps: &mut [f32]) {
        let (image, step, op) = match self.noise {
            Noise::Stored(_) => return eps.copy_from_slice(&self.stored[n * eps.len()..][..eps.len()]),
            Noise::PerImage => (self.control.first + self.index[n] as u32, t as u32, rng::op::NLL),
            Noise::Drawn => (self.first_image + n as u32, self.control.step, rng::op::Q_SAMPLE),
        };
        rng::fill_normal(eps, self.control.seed, image, step, op);
    }
}

/// NoiseKind of a value that holds noise.
fn stored_kind(g: &Graph, v: Val) -> i32 {
    if g[v].dtype == DType::Bf16 { 3 } else { 2 }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct QSample {
    /// Noised images.
    pub x_t: Val,
    /// Where the drawn noise is stored, if it is. It is rounded to the value's type first, and x_t made of that.
    pub store: Option<Val>,
    /// Clean images.
    pub images: Images,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Origin of eps.
    pub noise: Noise,
    /// alpha_bar of every step.
    pub process: Arc<Process>,
}

impl QSample {
    /// Appends the noising of `images` at `t`; returns x_t. Drawn noise is not stored.
    pub fn record(g: &mut Graph, images: Images, t: Val, noise: Noise, process: Arc<Process>) -> Val {
        let s = images.shape(g);
        let x_t = g.activation("x_t", s);
        g.push(QSample { x_t, store: None, images, t, noise, process });
        x_t
    }

    /// Appends the noising of `images` at `t` with drawn noise that is stored; returns x_t and eps.
    pub fn record_stored(g: &mut Graph, images: Images, t: Val, noise: Noise, process: Arc<Process>) -> (Val, Val) {
        assert!(noise.val().is_none(), "the noise is stored already");
        let s = images.shape(g);
        let (x_t, eps) = (g.activation("x_t", s), g.activation("eps", s));
        g.push(QSample { x_t, store: Some(eps), images, t, noise, process });
        (x_t, eps)
    }

    /// Declares a value for noise that the host gives, of the size of `images`.
    pub fn given_noise(g: &mut Graph, images: &Images) -> Val {
        let s = images.shape(g);
        g.fixed("eps", s, DType::F32, Region::Inputs)
    }

    fn rows(&self) -> Vec<[Split; 2]> {
        let p = &self.process;
        p.sqrt_alpha_bar.iter().zip(&p.sqrt_one_minus_alpha_bar).map(|(&a, &b)| [a.into(), b.into()]).collect()
    }
}

impl Operation for QSample {
    fn outputs(&self) -> Vec<Val> {
        [self.x_t].into_iter().chain(self.store).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        self.images.vals().into_iter().chain([self.t]).chain(self.noise.val()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |v: Val| g[v].bytes() as f64;
        let rows = (g.shape(self.x_t).n * size_of::<[Split; 2]>()) as f64;
        Cost {
            flops: 3.0 * g.shape(self.x_t).len() as f64,
            read: self.images.bytes(g) + bytes(self.t) + self.noise.bytes(g) + rows,
            written: bytes(self.x_t) + self.store.map_or(0.0, bytes),
        }
    }
    fn scratch(&self, g: &Graph) -> usize {
        if self.store.is_some() { 0 } else { g.shape(self.x_t).len() }
    }
    fn run_cpu(&self, m: &Views) {
        let size = m.graph().shape(self.x_t).len() / m.graph().shape(self.x_t).n;
        let t = m.get::<i32>(self.t);
        let (images, noise) = (self.images.open(m), self.noise.open(m, &self.images));
        let all_eps = self.store.map_or_else(|| m.scratch(), |eps| m.f32_mut(eps));
        let all = m.f32_mut(self.x_t).par_chunks_mut(size).zip(all_eps.par_chunks_mut(size));
        all.enumerate().for_each(|(n, (x, eps))| {
            noise.eps(n, t[n], eps);
            images.x_0(n, x);
            let c = self.process.at(t[n] as usize);
            for (x, eps) in x.iter_mut().zip(eps) {
                *x = diffusion::gaussian::q_sample_value(&c, f64::from(*x), f64::from(*eps)) as f32;
            }
        });
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        Tiling::new(g.shape(self.x_t), g.shape(self.x_t).c)?;
        Ok(bytemuck::cast_slice(&self.rows()).to_vec())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let s = m.graph.shape(self.x_t);
        let (tiling, images) = (Tiling::new(s, s.c)?, self.images.arg(m));
        let (given, kind) = self.noise.arg(m);
        let stored = self.store.map_or(given, |v| m.ptr(v));
        let store_kind = self.store.map_or(0, |v| stored_kind(m.graph, v));
        let args = args![m.ptr(self.x_t), stored, kind, store_kind, &images, m.ptr(self.t), m.memory, &tiling];
        m.start_typed("q_sample", self.x_t, tiling.items(), args)
    }
}
