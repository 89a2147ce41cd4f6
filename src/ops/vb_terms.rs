//! The terms of the variational bound for each image, as the bits/dim evaluation reports them.
//!
//! By [`crate::diffusion::bound_terms`]. out: (n, h, w, C or 2C) f32 (bf16 on CUDA); eps: (n, h, w, C); t: (n) i32; vb (bits/dim),
//! x_0_mse, eps_mse: (n) f32.
//!
//! Kernel: `kernels/vb_terms.cu`, a block per tile of up to 2,048 elements of x_0; images of up to 256 channels.

use super::launch::Launcher;
use super::q_sample::{Images, Noise};
use super::table::{BoundMemory, Tiling};
use super::{Cost, Operation, Views};
use crate::args;
use crate::config::{FirstStep, MeanType};
use crate::device::driver::Arg;
use crate::diffusion::{self, Objective};
use crate::error::Result;
use crate::graph::{Graph, Val};
use crate::schedule::Process;
use rayon::prelude::*;
use std::sync::Arc;

/// See the module.
#[derive(Clone, Debug)]
pub struct VbTerms {
    /// Term of the bound, bits/dim.
    pub vb: Val,
    /// Mean squared error of the predicted x_0.
    pub x_0_mse: Val,
    /// Mean squared error of the noise derived from the predicted x_0.
    pub eps_mse: Val,
    /// The network's output.
    pub out: Val,
    /// Clean images.
    pub images: Images,
    /// The noise the images were given.
    pub noise: Noise,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Meaning of the output, term at t = 0.
    pub objective: Objective,
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Tables of every step.
    pub process: Arc<Process>,
}

/// Evaluation of `kernels/vb_terms.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct EvaluationArg {
    clip: i32,
    nll_first: i32,
    learned: i32,
    x_prev: i32,
}

impl VbTerms {
    fn tiling(&self, g: &Graph) -> Result<Tiling> {
        Tiling::new(self.images.shape(g), g.shape(self.out).c)
    }
}

impl Operation for VbTerms {
    fn outputs(&self) -> Vec<Val> {
        vec![self.vb, self.x_0_mse, self.eps_mse]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.out, self.t].into_iter().chain(self.images.vals()).chain(self.noise.val()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |vals: &[Val]| vals.iter().map(|&v| g[v].bytes() as f64).sum::<f64>();
        let s = self.images.shape(g);
        Cost {
            flops: 40.0 * s.len() as f64,
            read: bytes(&[self.out, self.t]) + self.images.bytes(g) + self.noise.bytes(g) + BoundMemory::cost(s.n),
            written: bytes(&self.outputs()),
        }
    }
    fn scratch(&self, g: &Graph) -> usize {
        2 * self.images.shape(g).len()
    }
    fn run_cpu(&self, m: &Views) {
        let (clean, noise) = (self.images.open(m), self.noise.open(m, &self.images));
        let s = self.images.shape(m.graph());
        let (size, out_size) = (s.len() / s.n, m.graph().shape(self.out).len() / s.n);
        let (out, t) = (m.f32(self.out), m.get::<i32>(self.t));
        let [vb, x_0_mse, eps_mse] = [self.vb, self.x_0_mse, self.eps_mse].map(|v| m.f32_mut(v));
        let images = m.scratch().par_chunks_mut(2 * size).zip(vb.par_iter_mut());
        images.zip(x_0_mse.par_iter_mut()).zip(eps_mse.par_iter_mut()).enumerate().for_each(
            |(n, (((scratch, vb), x_0_mse), eps_mse))| {
                let (x_0, eps) = scratch.split_at_mut(size);
                clean.x_0(n, x_0);
                noise.eps(n, t[n], eps);
                let (c, clip) = (self.process.at(t[n] as usize), diffusion::clip(self.clip));
                let out = &out[n * out_size..][..out_size];
                let terms = diffusion::bound_terms(&self.objective, &c, s.c, clip, x_0, eps, out);
                *vb = terms.vb_bpd as f32;
                *x_0_mse = terms.x_0_mse as f32;
                *eps_mse = terms.eps_mse as f32;
            },
        );
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        Ok(BoundMemory::initial(&self.process, &self.objective, &self.tiling(g)?))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (tiling, images) = (self.tiling(m.graph)?, self.images.arg(m));
        let memory = BoundMemory::at(m.memory, &self.process, &tiling);
        let output = self.objective.output;
        let evaluation = EvaluationArg {
            clip: i32::from(self.clip),
            nll_first: i32::from(self.objective.first_step == FirstStep::Nll),
            learned: i32::from(output.learns_variance()),
            x_prev: i32::from(output.mean_type == MeanType::PreviousX),
        };
        let (stored, kind) = self.noise.arg(m);
        let args = args![
            m.ptr(self.vb),
            m.ptr(self.x_0_mse),
            m.ptr(self.eps_mse),
            m.ptr(self.out),
            stored,
            kind,
            &images,
            m.ptr(self.t),
            memory.rows,
            memory.partials,
            memory.arrived,
            Arg::Struct(bytemuck::bytes_of(&evaluation)),
            &tiling,
        ];
        m.start_typed("vb_terms", self.out, tiling.items(), args)
    }
}
