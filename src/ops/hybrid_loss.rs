//! The training loss of every image and, in the same pass, its gradient with respect to the network's output.
//!
//! All four objectives of the reference (paper, eq. 16 and section 3.1), by [`crate::diffusion::loss`]. The gradient is
//! that of the weighted mean over the microbatch: `weight[n]/n`. out, d_out: (n, h, w, C or 2C); x_t, eps: (n, h, w, C); t: (n) i32;
//! weight, loss, mse, vb (bits/dim): (n) f32.

use super::q_sample::Images;
use super::{Cost, Operation, Views};
use crate::diffusion::{self, Objective};
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
    /// Noised images.
    pub x_t: Val,
    /// Noise.
    pub eps: Val,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Importance weight of each image.
    pub weight: Val,
    /// What is minimised.
    pub objective: Objective,
    /// Tables of every step.
    pub process: Arc<Process>,
}

impl Operation for HybridLoss {
    fn outputs(&self) -> Vec<Val> {
        vec![self.d_out, self.terms.loss, self.terms.mse, self.terms.vb]
    }
    fn inputs(&self) -> Vec<Val> {
        let own = [self.out, self.x_t, self.eps, self.t, self.weight];
        own.into_iter().chain(self.images.vals()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |vals: &[Val]| vals.iter().map(|&v| g[v].bytes() as f64).sum::<f64>();
        Cost {
            flops: 40.0 * g.shape(self.x_t).len() as f64,
            read: bytes(&[self.out, self.x_t, self.eps, self.t, self.weight]) + self.images.bytes(g),
            written: bytes(&self.outputs()),
        }
    }
    fn scratch(&self, g: &Graph) -> usize {
        g.shape(self.x_t).len()
    }
    fn run_cpu(&self, m: &Views) {
        let clean = self.images.open(m);
        let s = m.graph().shape(self.x_t);
        let (size, out_size) = (s.len() / s.n, m.graph().shape(self.out).len() / s.n);
        let (out, x_t, eps) = (m.f32(self.out), m.f32(self.x_t), m.f32(self.eps));
        let (t, weight) = (m.get::<i32>(self.t), m.f32(self.weight));
        let terms = [self.terms.loss, self.terms.mse, self.terms.vb].map(|v| m.f32_mut(v));
        let [loss, mse, vb] = terms;
        let images = m.f32_mut(self.d_out).par_chunks_mut(out_size).zip(m.scratch().par_chunks_mut(size));
        let images = images.zip(loss.par_iter_mut()).zip(mse.par_iter_mut()).zip(vb.par_iter_mut());
        images.enumerate().for_each(|(n, ((((d_out, x_0), loss), mse), vb))| {
            clean.x_0(n, x_0);
            let (x_t, eps, out) =
                (&x_t[n * size..][..size], &eps[n * size..][..size], &out[n * out_size..][..out_size]);
            let (c, scale) = (self.process.at(t[n] as usize), f64::from(weight[n]) / s.n as f64);
            let terms = diffusion::loss_and_grad(&self.objective, &c, s.c, scale, d_out, x_0, x_t, eps, out);
            (*loss, *mse, *vb) = (terms.loss as f32, terms.mse as f32, terms.vb_bpd as f32);
        });
    }
}
