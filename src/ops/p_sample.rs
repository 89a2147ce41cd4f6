//! One reverse step of a sampler, in place: x_t becomes x_{t-1}, and x_0 the prediction it was made from.
//!
//! By [`crate::diffusion::reverse`]: ancestral, DDIM, or DDIM backwards. Each image has a seed of its own, so a picture
//! does not depend on the batch it was made in. x, x_0: (n, h, w, C) f32; out: (n, h, w, C or 2C) f32 (bf16 on CUDA); copy:
//! (n, h, w, C) bf16; seeds: (n, 2) i32, low word first; t comes from the control block and is the same for all images.
//!
//! Kernel: `kernels/p_sample.cu`, a block per tile of up to 2,048 elements; images of up to 256 channels. All samplers are one
//! linear form with coefficients by t, [`ReverseRow`].

use super::launch::Launcher;
use super::table::{LogRatio, Split, Tiling};
use super::{Cost, Operation, Views};
use crate::args;
use crate::config::MeanType;
use crate::device::driver::Arg;
use crate::diffusion::{self, gaussian::Output, reverse};
use crate::error::Result;
use crate::graph::{Graph, Val};
use crate::rng;
use crate::schedule::{Coefs, Process};
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
    /// x_{t-1} again, as bf16 for the next forward pass, if wanted.
    pub copy: Option<Val>,
    /// Predicted x_0, if wanted.
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
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Tables of every step.
    pub process: Arc<Process>,
}

/// The seed in words `2n` and `2n + 1`.
pub fn seed_of(seeds: &[i32], n: usize) -> u64 {
    u64::from(seeds[2 * n] as u32) | u64::from(seeds[2 * n + 1] as u32) << 32
}

/// One t of a sampler: ReverseRow of `kernels/p_sample.cu`.
///
/// ```text
/// x_0 = clip(p x_t + q out),   x_next = c_0 x_0 + c_t x_t + c_out out + sigma exp(ratio/2) noise
/// ```
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ReverseRow {
    predict: [Split; 2],
    next: [f32; 3],
    sigma: f32,
    ratio: LogRatio,
    zero: f32,
}

impl ReverseRow {
    fn new(c: &Coefs, output: Output, kind: Reverse) -> Self {
        let predict = match output.mean_type {
            MeanType::Epsilon => [c.sqrt_recip_alpha_bar, -c.sqrt_recipm1_alpha_bar],
            MeanType::XStart => [0.0, 1.0],
            MeanType::PreviousX => [-c.coef2 / c.coef1, 1.0 / c.coef1],
            MeanType::V => [c.sqrt_alpha_bar, -c.sqrt_one_minus_alpha_bar],
        };
        let (next, sigma, ratio) = match kind {
            Reverse::Ancestral => {
                let mean =
                    if output.mean_type == MeanType::PreviousX { [0.0, 0.0, 1.0] } else { [c.coef1, c.coef2, 0.0] };
                (mean, (0.5 * c.log_beta_tilde_clipped).exp(), LogRatio::new(c, output.var_type))
            }
            Reverse::Ddim(eta) => {
                let (keep, eps_scale, sigma) = reverse::ddim_coefs(c, eta);
                (Self::ddim(c, keep, eps_scale), sigma, LogRatio::ZERO)
            }
            Reverse::DdimReverse => {
                let next = c.alpha_bar_next;
                (Self::ddim(c, next.sqrt(), (1.0 - next).sqrt()), 0.0, LogRatio::ZERO)
            }
        };
        let sigma = if c.t == 0 { 0.0 } else { sigma };
        ReverseRow {
            predict: predict.map(Split::from),
            next: next.map(|x| x as f32),
            sigma: sigma as f32,
            ratio,
            zero: 0.0,
        }
    }

    /// `keep x_0 + eps_scale eps`, eps from x_0 and x_t, as factors of x_0 and x_t.
    fn ddim(c: &Coefs, keep: f64, eps_scale: f64) -> [f64; 3] {
        let per_x_0 = eps_scale / c.sqrt_recipm1_alpha_bar;
        [keep - per_x_0, per_x_0 * c.sqrt_recip_alpha_bar, 0.0]
    }
}

/// Reverse of `kernels/p_sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ReverseArg {
    clip: i32,
    learned: i32,
}

impl PSample {
    fn tiling(&self, g: &Graph) -> Result<Tiling> {
        Tiling::new(g.shape(self.x), g.shape(self.out).c)
    }

    /// Whether the step draws noise.
    fn draws(&self) -> bool {
        match self.reverse {
            Reverse::Ancestral => true,
            Reverse::Ddim(eta) => eta != 0.0,
            Reverse::DdimReverse => false,
        }
    }
}

impl Operation for PSample {
    fn outputs(&self) -> Vec<Val> {
        [self.x].into_iter().chain(self.copy).chain(self.x_0).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        [self.out, self.seeds, self.control].into_iter().chain(self.noise).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let bytes = |v: Val| g[v].bytes() as f64;
        Cost {
            flops: 12.0 * g.shape(self.x).len() as f64,
            read: bytes(self.x) + bytes(self.out) + bytes(self.seeds) + self.noise.map_or(0.0, bytes),
            written: self.outputs().into_iter().map(bytes).sum(),
        }
    }
    fn scratch(&self, g: &Graph) -> usize {
        3 * g.shape(self.x).len()
    }
    fn run_cpu(&self, m: &Views) {
        let s = m.graph().shape(self.x);
        let (size, out_size) = (s.len() / s.n, m.graph().shape(self.out).len() / s.n);
        let (out, seeds, control) = (m.f32(self.out), m.get::<i32>(self.seeds), m.control(self.control));
        let (c, given) = (self.process.at(control.t as usize), self.noise.map(|v| m.f32(v)));
        let clip = diffusion::clip(self.clip);
        let (scratch, unseen) = m.scratch().split_at_mut(2 * s.len());
        let all_x_0 = self.x_0.map_or(unseen, |v| m.f32_mut(v));
        let all_x = m.f32_mut(self.x);
        let images = all_x.par_chunks_mut(size).zip(all_x_0.par_chunks_mut(size));
        images.zip(scratch.par_chunks_mut(2 * size)).enumerate().for_each(|(n, ((x, x_0), scratch))| {
            let (x_t, noise) = scratch.split_at_mut(size);
            x_t.copy_from_slice(x);
            let out = &out[n * out_size..][..out_size];
            if let Some(given) = given {
                noise.copy_from_slice(&given[n * size..][..size]);
            } else if self.draws() {
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
        if let Some(v) = self.copy {
            m.get_mut::<half::bf16>(v).iter_mut().zip(&*all_x).for_each(|(c, &x)| *c = half::bf16::from_f32(x));
        }
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.tiling(g)?;
        let row = |t| ReverseRow::new(&self.process.at(t), self.output, self.reverse);
        Ok(bytemuck::cast_slice(&(0..self.process.steps()).map(row).collect::<Vec<_>>()).to_vec())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let tiling = self.tiling(m.graph)?;
        let reverse = ReverseArg { clip: i32::from(self.clip), learned: i32::from(self.output.learns_variance()) };
        let args = args![
            m.ptr(self.x),
            m.optional(self.copy),
            m.optional(self.x_0),
            m.ptr(self.out),
            m.ptr(self.seeds),
            m.optional(self.noise),
            m.ptr(self.control),
            m.memory,
            Arg::Struct(bytemuck::bytes_of(&reverse)),
            &tiling,
        ];
        m.start_typed("p_sample", self.out, tiling.items(), args)
    }
}
