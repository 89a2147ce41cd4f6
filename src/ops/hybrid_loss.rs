//! The training loss of every image and, in the same pass, its gradient with respect to the network's output.
//!
//! All four objectives of the reference (paper, eq. 16 and section 3.1), by [`crate::diffusion::loss`]. The gradient is
//! that of the weighted mean over the microbatch: `weight[n]/n`. It is a function of x_0, eps and the output: neither x_t nor,
//! where it is drawn, eps need be stored. out, d_out: (n, h, w, C or 2C) f32 (bf16 on CUDA); eps: (n, h, w, C); t: (n) i32;
//! weight, loss, mse, vb (bits/dim): (n) f32.
//!
//! Kernel: `kernels/hybrid_loss.cu`, a block per tile of up to 2,048 elements of x_0; images of up to 256 channels.

use super::launch::Launcher;
use super::q_sample::{Images, Noise};
use super::table::{BoundMemory, Tiling};
use super::{Cost, Operation, Views};
use crate::args;
use crate::config::FirstStep;
use crate::device::driver::Arg;
use crate::diffusion::{self, Objective};
use crate::error::Result;
use crate::graph::{Graph, Val};
use crate::schedule::Process;
use rayon::prelude::*;
use std::sync::Arc;

/// The three numbers each image reports, (n) each.
#[derive(Clone, Copy, Debug)]
pub struct LossVals {
    /// What is minimised, before the importance weight.
    pub loss: Val,
    /// Mean squared error of the prediction.
    pub mse: Val,
    /// Term of the bound, bits/dim.
    pub vb: Val,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct HybridLoss {
    /// Gradient of the network's output.
    pub d_out: Val,
    /// Loss and its parts.
    pub terms: LossVals,
    /// The network's output.
    pub out: Val,
    /// Clean images.
    pub images: Images,
    /// The noise the images were given.
    pub noise: Noise,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Importance weight of each image.
    pub weight: Val,
    /// What is minimised.
    pub objective: Objective,
    /// Tables of every step.
    pub process: Arc<Process>,
}

/// Objective of `kernels/hybrid_loss.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ObjectiveArg {
    mse_scale: f32,
    vb_scale: f32,
    nll_first: i32,
    learned: i32,
}

impl HybridLoss {
    fn tiling(&self, g: &Graph) -> Result<Tiling> {
        Tiling::new(self.images.shape(g), g.shape(self.out).c)
    }
}

impl Operation for HybridLoss {
    fn outputs(&self) -> Vec<Val> {
        vec![self.d_out, self.terms.loss, self.terms.mse, self.terms.vb]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.out, self.t, self.weight].into_iter().chain(self.images.vals()).chain(self.noise.val()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |vals: &[Val]| vals.iter().map(|&v| g[v].bytes() as f64).sum::<f64>();
        let s = self.images.shape(g);
        let inputs = bytes(&[self.out, self.t, self.weight]) + self.images.bytes(g) + self.noise.bytes(g);
        Cost { flops: 40.0 * s.len() as f64, read: inputs + BoundMemory::cost(s.n), written: bytes(&self.outputs()) }
    }
    fn scratch(&self, g: &Graph) -> usize {
        2 * self.images.shape(g).len()
    }
    fn run_cpu(&self, m: &Views) {
        let (clean, noise) = (self.images.open(m), self.noise.open(m, &self.images));
        let s = self.images.shape(m.graph());
        let (size, out_size) = (s.len() / s.n, m.graph().shape(self.out).len() / s.n);
        let (out, t, weight) = (m.f32(self.out), m.get::<i32>(self.t), m.f32(self.weight));
        let terms = [self.terms.loss, self.terms.mse, self.terms.vb].map(|v| m.f32_mut(v));
        let [loss, mse, vb] = terms;
        let images = m.f32_mut(self.d_out).par_chunks_mut(out_size).zip(m.scratch().par_chunks_mut(2 * size));
        let images = images.zip(loss.par_iter_mut()).zip(mse.par_iter_mut()).zip(vb.par_iter_mut());
        images.enumerate().for_each(|(n, ((((d_out, scratch), loss), mse), vb))| {
            let (x_0, eps) = scratch.split_at_mut(size);
            clean.x_0(n, x_0);
            noise.eps(n, t[n], eps);
            let out = &out[n * out_size..][..out_size];
            let (c, scale) = (self.process.at(t[n] as usize), f64::from(weight[n]) / s.n as f64);
            let terms = diffusion::loss_and_grad(&self.objective, &c, s.c, scale, d_out, x_0, eps, out);
            (*loss, *mse, *vb) = (terms.loss as f32, terms.mse as f32, terms.vb_bpd as f32);
        });
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        Ok(BoundMemory::initial(&self.process, &self.objective, &self.tiling(g)?))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (tiling, images) = (self.tiling(m.graph)?, self.images.arg(m));
        let memory = BoundMemory::at(m.memory, &self.process, &tiling);
        let objective = ObjectiveArg {
            mse_scale: self.objective.mse_scale() as f32,
            vb_scale: self.objective.vb_scale(self.process.steps()) as f32,
            nll_first: i32::from(self.objective.first_step == FirstStep::Nll),
            learned: i32::from(self.objective.output.learns_variance()),
        };
        let (stored, kind) = self.noise.arg(m);
        let LossVals { loss, mse, vb } = self.terms;
        let args = args![
            m.ptr(self.d_out),
            m.ptr(loss),
            m.ptr(mse),
            m.ptr(vb),
            m.ptr(self.out),
            m.ptr(self.weight),
            stored,
            kind,
            &images,
            m.ptr(self.t),
            memory.rows,
            memory.partials,
            memory.arrived,
            Arg::Struct(bytemuck::bytes_of(&objective)),
            &tiling,
        ];
        m.start_typed("hybrid_loss", self.out, tiling.items(), args)
    }
}
