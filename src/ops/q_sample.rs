//! Forward noising: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, x_0 = byte/127.5 - 1 (Ho et al. 2020, eq. 4).
//!
//! Gathers each image of the batch from the data by its index, flips it if asked and if its random bit says so, and
//! draws eps by Philox. data: (N, h, w, c) u8; index, t: (n) i32; x_t, eps: (n, h, w, c) f32.

use super::{Control, Cost, Operation, Views};
use crate::diffusion;
use crate::graph::{DType, Graph, Shape, Val};
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

/// Where the noise comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noise {
    /// Drawn by the step for training: a function of seed, step and position in the batch.
    Drawn,
    /// Drawn by the step for evaluation: a function of seed, image index and t.
    PerImage,
    /// Given in `eps`.
    Given,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct QSample {
    /// Noised images.
    pub x_t: Val,
    /// Noise: written, or read if given.
    pub eps: Val,
    /// Clean images.
    pub images: Images,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Origin of `eps`.
    pub noise: Noise,
    /// alpha_bar of every step.
    pub process: Arc<Process>,
}

impl QSample {
    /// Appends the noising of `images` at `t`; returns x_t and eps.
    pub fn record(g: &mut Graph, images: Images, t: Val, noise: Noise, process: Arc<Process>) -> (Val, Val) {
        let s = images.shape(g);
        let x_t = g.arena("x_t", s);
        let eps = g.arena("eps", s);
        g.push(QSample { x_t, eps, images, t, noise, process });
        (x_t, eps)
    }

    /// Appends the noising of `images` at `t` with the noise the host has written to `eps`.
    pub fn record_given(g: &mut Graph, images: Images, t: Val, eps: Val, process: Arc<Process>) -> Val {
        let x_t = g.arena("x_t", images.shape(g));
        g.push(QSample { x_t, eps, images, t, noise: Noise::Given, process });
        x_t
    }

    /// Declares a value for given noise of the size of `images`.
    pub fn given_noise(g: &mut Graph, images: &Images) -> Val {
        let s = images.shape(g);
        g.fixed("eps", s, DType::F32, crate::graph::Region::Inputs)
    }
}

impl Operation for QSample {
    fn outputs(&self) -> Vec<Val> {
        [self.x_t].into_iter().chain((self.noise != Noise::Given).then_some(self.eps)).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        let given = (self.noise == Noise::Given).then_some(self.eps);
        self.images.vals().into_iter().chain([self.t]).chain(given).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let x = g[self.x_t].bytes() as f64;
        let (given, drawn) = if self.noise == Noise::Given { (x, 0.0) } else { (0.0, x) };
        Cost {
            flops: 3.0 * g.shape(self.x_t).len() as f64,
            read: self.images.bytes(g) + g[self.t].bytes() as f64 + given,
            written: x + drawn,
        }
    }
    fn run_cpu(&self, m: &Views) {
        let size = m.graph().shape(self.x_t).len() / m.graph().shape(self.x_t).n;
        let (control, first_image) = (m.control(self.images.control), self.images.first_image);
        let (t, index) = (m.get::<i32>(self.t), m.get::<i32>(self.images.index));
        let images = self.images.open(m);
        let x_t = m.f32_mut(self.x_t).par_chunks_mut(size).enumerate();
        let noised = |n: usize, x: &mut [f32], eps: &[f32]| {
            images.x_0(n, x);
            let c = self.process.at(t[n] as usize);
            for (x, eps) in x.iter_mut().zip(eps) {
                *x = diffusion::gaussian::q_sample_value(&c, f64::from(*x), f64::from(*eps)) as f32;
            }
        };
        match self.noise {
            Noise::Given => {
                let eps = m.f32(self.eps);
                x_t.for_each(|(n, x)| noised(n, x, &eps[n * size..][..size]));
            }
            Noise::Drawn | Noise::PerImage => {
                x_t.zip(m.f32_mut(self.eps).par_chunks_mut(size)).for_each(|((n, x), eps)| {
                    let (image, step, op) = match self.noise {
                        Noise::PerImage => (index[n] as u32, t[n] as u32, rng::op::NLL),
                        _ => (first_image + n as u32, control.step, rng::op::Q_SAMPLE),
                    };
                    rng::fill_normal(eps, control.seed, image, step, op);
                    noised(n, x, eps);
                });
            }
        }
    }
}
