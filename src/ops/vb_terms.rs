//! The terms of the variational bound for each image, as the bits/dim evaluation reports them.
//!
//! By [`crate::diffusion::bound_terms`]. out: (n, h, w, C or 2C); x_t, eps: (n, h, w, C); t: (n) i32; vb (bits/dim), x_0_mse,
//! eps_mse: (n) f32.

use super::q_sample::Images;
use super::{Cost, Operation, Views};
use crate::diffusion::{self, Objective};
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
    /// Noised images.
    pub x_t: Val,
    /// Noise.
    pub eps: Val,
    /// Index of each image's step in the process.
    pub t: Val,
    /// Meaning of the output, term at t = 0.
    pub objective: Objective,
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Tables of every step.
    pub process: Arc<Process>,
}

impl Operation for VbTerms {
    fn outputs(&self) -> Vec<Val> {
        vec![self.vb, self.x_0_mse, self.eps_mse]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.out, self.x_t, self.eps, self.t].into_iter().chain(self.images.vals()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |vals: &[Val]| vals.iter().map(|&v| g[v].bytes() as f64).sum::<f64>();
        Cost {
            flops: 40.0 * g.shape(self.x_t).len() as f64,
            read: bytes(&[self.out, self.x_t, self.eps, self.t]) + self.images.bytes(g),
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
        let t = m.get::<i32>(self.t);
        let [vb, x_0_mse, eps_mse] = [self.vb, self.x_0_mse, self.eps_mse].map(|v| m.f32_mut(v));
        let images = m.scratch().par_chunks_mut(size).zip(vb.par_iter_mut());
        images.zip(x_0_mse.par_iter_mut()).zip(eps_mse.par_iter_mut()).enumerate().for_each(
            |(n, (((x_0, vb), x_0_mse), eps_mse))| {
                clean.x_0(n, x_0);
                let (x_t, eps) = (&x_t[n * size..][..size], &eps[n * size..][..size]);
                let (c, clip) = (self.process.at(t[n] as usize), diffusion::clip(self.clip));
                let out = &out[n * out_size..][..out_size];
                let terms = diffusion::bound_terms(&self.objective, &c, s.c, clip, x_0, x_t, eps, out);
                *vb = terms.vb_bpd as f32;
                *x_0_mse = terms.x_0_mse as f32;
                *eps_mse = terms.eps_mse as f32;
            },
        );
    }
}
