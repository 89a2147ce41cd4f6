//! One reverse step of a sampler, in place: x_t becomes x_{t-1}, and x_0 the prediction it was made from.
//!
//! By [`crate::diffusion::reverse`]: ancestral, DDIM, or DDIM backwards. Each image has a seed of its own, so a picture
//! does not depend on the batch it was made in. x, x_0: (n, h, w, C) f32; out: (n, h, w, C or 2C); seeds: (n, 2) i32, low
//! word first; t comes from the control block and is the same for all images.

use super::{Cost, Operation, Views};
use crate::diffusion::{self, gaussian::Output};
use crate::graph::{Graph, Val};
use crate::rng;
use crate::schedule::Process;
use rayon::prelude::*;
use std::sync::Arc;

/// Kind of reverse step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reverse {
    /// x_{t-1} drawn from p(x_{t-1} | x_t).
    Ancestral,
    /// DDIM with this eta: 0 draws no noise.
    Ddim(f64),
    /// DDIM from x_t to x_{t+1}: the way from an image to its noise.
    DdimReverse,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct PSample {
    /// x_t before, x_{t-1} after.
    pub x: Val,
    /// Predicted x_0.
    pub x_0: Val,
    /// The network's output.
    pub out: Val,
    /// Seed of each image.
    pub seeds: Val,
    /// Holds t.
    pub control: Val,
    /// Kind of step.
    pub reverse: Reverse,
    /// Meaning of the output.
    pub output: Output,
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Tables of every step.
    pub process: Arc<Process>,
}

/// The seed in words `2n` and `2n + 1`.
pub fn seed_of(seeds: &[i32], n: usize) -> u64 {
    u64::from(seeds[2 * n] as u32) | u64::from(seeds[2 * n + 1] as u32) << 32
}

impl Operation for PSample {
    fn outputs(&self) -> Vec<Val> {
        vec![self.x, self.x_0]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.out, self.seeds, self.control]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let x = g[self.x].bytes() as f64;
        let read = x + g[self.out].bytes() as f64 + g[self.seeds].bytes() as f64;
        Cost { flops: 12.0 * g.shape(self.x).len() as f64, read, written: 2.0 * x }
    }
    fn scratch(&self, g: &Graph) -> usize {
        2 * g.shape(self.x).len()
    }
    fn run_cpu(&self, m: &Views) {
        let s = m.graph().shape(self.x);
        let (size, out_size) = (s.len() / s.n, m.graph().shape(self.out).len() / s.n);
        let (out, seeds, control) = (m.f32(self.out), m.get::<i32>(self.seeds), m.control(self.control));
        let c = self.process.at(control.t as usize);
        let clip = diffusion::clip(self.clip);
        let images = m.f32_mut(self.x).par_chunks_mut(size).zip(m.f32_mut(self.x_0).par_chunks_mut(size));
        images.zip(m.scratch().par_chunks_mut(2 * size)).enumerate().for_each(|(n, ((x, x_0), scratch))| {
            let (x_t, noise) = scratch.split_at_mut(size);
            x_t.copy_from_slice(x);
            let out = &out[n * out_size..][..out_size];
            if matches!(self.reverse, Reverse::Ancestral) || matches!(self.reverse, Reverse::Ddim(eta) if eta != 0.0) {
                rng::fill_normal(noise, seed_of(seeds, n), 0, control.t, rng::op::P_SAMPLE);
            } else {
                noise.fill(0.0);
            }
            match self.reverse {
                Reverse::Ancestral => diffusion::p_sample(self.output, &c, s.c, clip, x, x_0, x_t, out, noise),
                Reverse::Ddim(eta) => diffusion::ddim(self.output, &c, s.c, eta, clip, x, x_0, x_t, out, noise),
                Reverse::DdimReverse => diffusion::ddim_reverse(self.output, &c, s.c, clip, x, x_0, x_t, out),
            }
        });
    }
}
