//! The dynamic threshold of every image before a reverse step: a quantile of |x_0| over the image, at least 1.
//!
//! By [`crate::diffusion::steer`]; the step then divides what it clips there. threshold: (n) f32; the rest is as the step
//! ([`PSample`]) will see it.
//!
//! Kernel: `kernels/dynamic_threshold.cu`, a block per image, exact selection: the value that sorting would give.

use super::launch::Launcher;
use super::p_sample::PSample;
use super::{Cost, Operation, Views};
use crate::args;
use crate::device::driver::Arg;
use crate::diffusion::{gaussian, steer};
use crate::error::Result;
use crate::graph::{Graph, Val};
use rayon::prelude::*;

/// See the module.
#[derive(Clone, Debug)]
pub struct DynamicThreshold {
    /// Threshold of each image.
    pub threshold: Val,
    /// The part of an image's magnitudes that lies below its threshold, 0 to 1.
    pub quantile: f64,
    /// The step that follows.
    pub step: PSample,
}

/// Quantile of `kernels/dynamic_threshold.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct QuantileArg {
    rank: u32,
    fraction: f32,
}

impl Operation for DynamicThreshold {
    fn outputs(&self) -> Vec<Val> {
        vec![self.threshold]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.step.x, self.step.out, self.step.control]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let pictures = self.step.pictures(g);
        let read = g[self.step.out].bytes() + 4 * pictures.len();
        Cost { flops: 20.0 * pictures.len() as f64, read: read as f64, written: g[self.threshold].bytes() as f64 }
    }
    fn scratch(&self, g: &Graph) -> usize {
        self.step.pictures(g).len() + self.step.guided_len(g)
    }
    fn run_cpu(&self, m: &Views) {
        let step = &self.step;
        let s = step.pictures(m.graph());
        let size = s.len() / s.n;
        let c = step.coefs(m.control(step.control).t);
        let (x, stride) = (m.f32(step.x), step.output.channels(s.c));
        let (all_x_0, guided) = m.scratch().split_at_mut(s.len());
        let outputs = step.outputs_cpu(m, guided);
        let images = m.f32_mut(self.threshold).par_iter_mut().zip(all_x_0.par_chunks_mut(size));
        images.enumerate().for_each(|(n, (threshold, x_0))| {
            let (x, out) = (&x[n * size..], &outputs[n * size / s.c * stride..]);
            for (i, x_0) in x_0.iter_mut().enumerate() {
                let mean = f64::from(out[i / s.c * stride + i % s.c]);
                *x_0 = gaussian::predict_x_0(&c, step.output.mean_type, f64::from(x[i]), mean) as f32;
            }
            *threshold = steer::dynamic_threshold(x_0, self.quantile);
        });
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.step.prepare_cuda(g)
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (tiling, reverse) = (self.step.tiling(m.graph)?, self.step.arg());
        let s = self.step.pictures(m.graph);
        let (rank, fraction) = steer::quantile_place(self.quantile, s.len() / s.n);
        let quantile = QuantileArg { rank: rank as u32, fraction };
        let args = args![
            m.ptr(self.threshold),
            m.ptr(self.step.x),
            m.ptr(self.step.out),
            m.ptr(self.step.control),
            m.memory,
            Arg::Struct(bytemuck::bytes_of(&quantile)),
            Arg::Struct(bytemuck::bytes_of(&reverse)),
            &tiling,
        ];
        m.start_typed("dynamic_threshold", self.step.out, s.n, args)
    }
}
