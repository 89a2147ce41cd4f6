//! One reverse step of a sampler, in place: x_t becomes x_{t-1}, and x_0 the prediction it was made from.
//!
//! By [`crate::diffusion::reverse`]: ancestral, DDIM, DDIM backwards, DPM-Solver++ or Heun. Each image has a seed of its own, so a picture
//! does not depend on the batch it was made in. x, x_0: (n, h, w, C) f32; out: (n, h, w, C or 2C) f32 (bf16 on CUDA); copy:
//! (n, h, w, C) bf16; seeds: (n, 2) i32, low word first; t comes from the control block and is the same for all images: it is the row
//! of the table that [`Reverse::passes`] names. A solver of second order also reads the x_0 that the call before has left.
//!
//! Kernel: `kernels/p_sample.cu`, a block per tile of up to 2,048 elements; images of up to 256 channels. All samplers are one
//! linear form with coefficients by row.

use super::launch::Launcher;
use super::table::Tiling;
use super::{Cost, Operation, Views};
use crate::args;
use crate::device::driver::Arg;
use crate::diffusion;
use crate::diffusion::gaussian::Output;
use crate::diffusion::steer::{self, Bound};
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};
use crate::rng;
use crate::schedule::{Coefs, Process};
use rayon::prelude::*;
use row::ReverseRow;
use std::sync::Arc;
use walk::Step;

mod row;
pub mod walk;

pub use walk::{Pass, Reverse};

/// See the module.
#[derive(Clone, Debug)]
pub struct PSample {
    /// x_t before, x_{t-1} after.
    pub x: Val,
    /// x_{t-1} again, as bf16 for the next forward pass, if wanted.
    pub copy: Option<Val>,
    /// Predicted x_0, if wanted; a solver of second order needs it.
    pub x_0: Option<Val>,
    /// The network's output.
    pub out: Val,
    /// Seed of each image.
    pub seeds: Val,
    /// Noise that the host gives in place of the drawn, f32.
    pub noise: Option<Val>,
    /// Holds t.
    pub control: Val,
    /// Kind of step.
    pub reverse: Reverse,
    /// Meaning of the output.
    pub output: Output,
    /// Weight of classifier-free guidance. Then out holds the outputs of 2n images, the first n with their labels, the others without;
    /// x and copy hold each picture twice.
    pub guidance: Option<f64>,
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Threshold of each image, at which x_0 is clipped and by which it is divided.
    pub threshold: Option<Val>,
    /// Tables of every step.
    pub process: Arc<Process>,
}

/// The seed in words `2n` and `2n + 1`.
pub fn seed_of(seeds: &[i32], n: usize) -> u64 {
    u64::from(seeds[2 * n] as u32) | u64::from(seeds[2 * n + 1] as u32) << 32
}

/// Reverse of `kernels/reverse.cuh`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct ReverseArg {
    clip: i32,
    learned: i32,
    guided: i32,
    guidance: f32,
}

impl PSample {
    /// The pictures of the batch: half of x where that holds them twice.
    pub(super) fn pictures(&self, g: &Graph) -> Shape {
        let s = g.shape(self.x);
        if self.guidance.is_some() { Shape { n: s.n / 2, ..s } } else { s }
    }

    pub(super) fn tiling(&self, g: &Graph) -> Result<Tiling> {
        assert!(self.x_0.is_some() || !self.reverse.remembers(), "{:?} needs a place for x_0", self.reverse);
        Tiling::new(self.pictures(g), g.shape(self.out).c)
    }

    pub(super) fn arg(&self) -> ReverseArg {
        ReverseArg {
            clip: i32::from(self.clip || self.threshold.is_some()),
            learned: i32::from(self.output.learns_variance()),
            guided: i32::from(self.guidance.is_some()),
            guidance: self.guidance.unwrap_or(1.0) as f32,
        }
    }

    /// The tables at row `row`.
    pub(super) fn coefs(&self, row: u32) -> Coefs {
        self.reverse.row(&self.process, row as usize).0
    }

    /// Space for the guided outputs of all pictures, if there is guidance.
    pub(super) fn guided_len(&self, g: &Graph) -> usize {
        self.guidance.map_or(0, |_| g.shape(self.out).len() / 2)
    }

    /// The network's outputs, one per picture: guided into `guided` if there is guidance.
    pub(super) fn outputs_cpu<'a>(&self, m: &Views<'a>, guided: &'a mut [f32]) -> &'a [f32] {
        let out = m.f32(self.out);
        let Some(weight) = self.guidance else { return out };
        let (with, without) = out.split_at(out.len() / 2);
        let (channels, stride) = (m.graph().shape(self.x).c, m.graph().shape(self.out).c);
        steer::guide(guided, with, without, channels, stride, weight);
        guided
    }

    /// What happens to an x_0 prediction of a picture with this threshold, if there are thresholds.
    fn bound(&self, threshold: Option<f32>) -> Bound {
        match (threshold, self.clip) {
            (Some(s), _) => Bound::Threshold(f64::from(s)),
            (None, true) => Bound::Clip,
            (None, false) => Bound::Free,
        }
    }
}

impl Operation for PSample {
    fn outputs(&self) -> Vec<Val> {
        [self.x].into_iter().chain(self.copy).chain(self.x_0).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        [self.out, self.seeds, self.control].into_iter().chain(self.noise).chain(self.threshold).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |v: Val| g[v].bytes() as f64;
        let last = self.x_0.filter(|_| self.reverse.remembers()).map_or(0.0, bytes);
        let optional = [self.noise, self.threshold].into_iter().flatten().map(bytes).sum::<f64>();
        let x = 4.0 * self.pictures(g).len() as f64;
        Cost {
            flops: 12.0 * self.pictures(g).len() as f64,
            read: x + last + bytes(self.out) + bytes(self.seeds) + optional,
            written: self.outputs().into_iter().map(bytes).sum(),
        }
    }
    fn scratch(&self, g: &Graph) -> usize {
        3 * self.pictures(g).len() + self.guided_len(g)
    }
    fn run_cpu(&self, m: &Views) {
        let s = self.pictures(m.graph());
        let (size, out_size) = (s.len() / s.n, s.len() / s.n / s.c * m.graph().shape(self.out).c);
        let (seeds, control) = (m.get::<i32>(self.seeds), m.control(self.control));
        let (c, step) = self.reverse.row(&self.process, control.t as usize);
        let (given, thresholds) = (self.noise.map(|v| m.f32(v)), self.threshold.map(|v| m.f32(v)));
        let (scratch, rest) = m.scratch().split_at_mut(2 * s.len());
        let (unseen, guided) = rest.split_at_mut(s.len());
        let outputs = self.outputs_cpu(m, guided);
        let all_x_0 = self.x_0.map_or(unseen, |v| m.f32_mut(v));
        let all_x = m.f32_mut(self.x);
        let (pictures, again) = all_x.split_at_mut(s.len());
        let images = pictures.par_chunks_mut(size).zip(all_x_0.par_chunks_mut(size));
        images.zip(scratch.par_chunks_mut(2 * size)).enumerate().for_each(|(n, ((x, x_0), scratch))| {
            let (x_t, noise) = scratch.split_at_mut(size);
            x_t.copy_from_slice(x);
            let (out, map) = (&outputs[n * out_size..][..out_size], self.bound(thresholds.map(|s| s[n])).map());
            if let Some(given) = given {
                noise.copy_from_slice(&given[n * size..][..size]);
            } else if self.reverse.draws() {
                rng::fill_normal(noise, seed_of(seeds, n), 0, control.t, rng::op::P_SAMPLE);
            } else {
                noise.fill(0.0);
            }
            match step {
                Step::Ancestral => diffusion::p_sample(self.output, &c, s.c, map, x, x_0, x_t, out, noise),
                Step::Ddim(eta) => diffusion::ddim(self.output, &c, s.c, eta, map, x, x_0, x_t, out, noise),
                Step::DdimReverse => diffusion::ddim_reverse(self.output, &c, s.c, map, x, x_0, x_t, out),
                Step::SecondOrder(coefs) => {
                    diffusion::second_order(self.output, &c, s.c, coefs, map, x, x_0, x_t, out);
                }
            }
        });
        again.copy_from_slice(&pictures[..again.len()]);
        if let Some(v) = self.copy {
            m.get_mut::<half::bf16>(v).iter_mut().zip(&*all_x).for_each(|(c, &x)| *c = half::bf16::from_f32(x));
        }
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.tiling(g)?;
        Ok(bytemuck::cast_slice(&ReverseRow::table(self.reverse, self.output, &self.process)).to_vec())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (tiling, reverse) = (self.tiling(m.graph)?, self.arg());
        let args = args![
            m.ptr(self.x),
            m.optional(self.copy),
            m.optional(self.x_0),
            m.ptr(self.out),
            m.ptr(self.seeds),
            m.optional(self.noise),
            m.optional(self.threshold),
            m.ptr(self.control),
            m.memory,
            Arg::Struct(bytemuck::bytes_of(&reverse)),
            &tiling,
        ];
        m.start_typed("p_sample", self.out, tiling.items(), args)
    }
}
