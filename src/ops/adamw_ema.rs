//! The optimiser step over the flat regions: AdamW (Loshchilov & Hutter 2019), then every moving average, in one pass.
//!
//! ```text
//! g <- g clip                          clip = min(1, max_norm / norm), or 1
//! p <- p (1 - lr weight_decay)
//! m <- m + (g - m)(1 - beta1),  v <- beta2 v + (1 - beta2) g²
//! p <- p - lr/(1 - beta1^k) m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//! e <- rate e + (1 - rate) p           for each rate
//! ```
//!
//! All (1, P) f32, the averages (rates, P), the copy (1, P) bf16. A gradient norm that is not finite leaves everything as it was.
//!
//! Kernel: `kernels/adamw_ema.cu`, 4 parameters per thread and stride.

use super::launch::Launcher;
use super::{Control, Cost, Operation, Views};
use crate::args;
use crate::device::driver::Arg;
use crate::error::Result;
use crate::graph::{Graph, Val};
use rayon::prelude::*;

/// Elements one thread works on at a time.
const CHUNK: usize = 4_096;

/// See the module.
#[derive(Clone, Debug)]
pub struct AdamwEma {
    /// Weights.
    pub params: Val,
    /// First moments.
    pub m: Val,
    /// Second moments.
    pub v: Val,
    /// Moving averages, one row per rate; none without rates.
    pub ema: Option<Val>,
    /// The weights again, as bf16, if wanted.
    pub copy: Option<Val>,
    /// Gradients.
    pub grads: Val,
    /// Norm of the gradients.
    pub norm: Val,
    /// Learning rate and bias corrections.
    pub control: Val,
    /// The constants.
    pub hyper: Hyper,
}

/// Constants of the optimiser.
#[derive(Clone, Debug, PartialEq)]
pub struct Hyper {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub max_norm: Option<f32>,
    /// Decay of each moving average.
    pub ema_rates: Vec<f64>,
}

impl Default for Hyper {
    fn default() -> Self {
        Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_norm: None, ema_rates: vec![0.9999] }
    }
}

/// Hyper of `kernels/adamw_ema.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct HyperArg {
    len: i64,
    weight_decay: f64,
    b1: f32,
    b2: f32,
    c2: f32,
    eps: f32,
    max_norm: f32,
    rates: i32,
}

impl Operation for AdamwEma {
    fn outputs(&self) -> Vec<Val> {
        [self.params, self.m, self.v].into_iter().chain(self.ema).chain(self.copy).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.grads, self.norm, self.control]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let written: f64 = self.outputs().iter().map(|&v| g[v].bytes() as f64).sum();
        let state = written - self.copy.map_or(0.0, |v| g[v].bytes() as f64);
        let flops = (14 + 3 * self.hyper.ema_rates.len()) as f64 * g.shape(self.params).len() as f64;
        Cost { flops, read: state + g[self.grads].bytes() as f64, written }
    }
    fn run_cpu(&self, m: &Views) {
        let (control, norm) = (m.control(self.control), m.f32(self.norm)[0]);
        let ema = self.ema.map_or(&mut [][..], |v| m.f32_mut(v));
        let (params, moments) = (m.f32_mut(self.params), (m.f32_mut(self.m), m.f32_mut(self.v)));
        step_cpu(params, moments, ema, m.f32(self.grads), norm, &control, &self.hyper);
        if let Some(copy) = self.copy.filter(|_| norm.is_finite()) {
            let weights = m.get_mut::<half::bf16>(copy).iter_mut().zip(&*params);
            weights.for_each(|(c, &p)| *c = half::bf16::from_f32(p));
        }
    }
    fn prepare_cuda(&self, _g: &Graph) -> Result<Vec<u8>> {
        let rates = self.hyper.ema_rates.iter().flat_map(|&rate| [rate as f32, (1.0 - rate) as f32]);
        Ok(bytemuck::cast_slice(&rates.collect::<Vec<f32>>()).to_vec())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (h, len) = (&self.hyper, m.graph.shape(self.params).len());
        let hyper = HyperArg {
            len: len as i64,
            weight_decay: h.weight_decay,
            b1: (1.0 - h.beta1) as f32,
            b2: h.beta2 as f32,
            c2: (1.0 - h.beta2) as f32,
            eps: h.eps as f32,
            max_norm: h.max_norm.unwrap_or(f32::INFINITY),
            rates: h.ema_rates.len() as i32,
        };
        let args = args![
            m.ptr(self.params),
            m.ptr(self.m),
            m.ptr(self.v),
            m.optional(self.ema),
            m.optional(self.copy),
            m.ptr(self.grads),
            m.ptr(self.norm),
            m.ptr(self.control),
            m.memory,
            Arg::Struct(bytemuck::bytes_of(&hyper)),
        ];
        m.start("adamw_ema", len.div_ceil(4 * 256), args)
    }
}

/// See the module; `ema` holds one row of the length of `params` per rate.
pub fn step_cpu(
    params: &mut [f32],
    (m, v): (&mut [f32], &mut [f32]),
    ema: &mut [f32],
    grads: &[f32],
    norm: f32,
    control: &Control,
    hyper: &Hyper,
) {
    let len = params.len();
    assert!(m.len() == len && v.len() == len && grads.len() == len, "adamw_ema: lengths differ");
    assert_eq!(ema.len(), len * hyper.ema_rates.len(), "adamw_ema: one row per rate");
    if !norm.is_finite() {
        return;
    }
    let clip = hyper.max_norm.map_or(1.0, |max| (max / norm).min(1.0));
    let lr = f64::from(control.lr);
    let keep = (1.0 - lr * hyper.weight_decay) as f32;
    let step = (lr / f64::from(control.bias1)) as f32;
    let root = f64::from(control.bias2).sqrt() as f32;
    let (b1, b2, c2) = ((1.0 - hyper.beta1) as f32, hyper.beta2 as f32, (1.0 - hyper.beta2) as f32);
    let eps = hyper.eps as f32;
    let chunks = params.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(grads.par_chunks(CHUNK)).for_each(|(((p, m), v), g)| {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * clip;
            *m += (g - *m) * b1;
            *v = *v * b2 + c2 * g * g;
            *p = *p * keep - step * (*m / (v.sqrt() / root + eps));
        }
    });
    let params = &*params;
    for (e, rate) in ema.chunks_exact_mut(len.max(1)).zip(&hyper.ema_rates) {
        let (rate, rest) = (*rate as f32, (1.0 - rate) as f32);
        e.par_chunks_mut(CHUNK).zip(params.par_chunks(CHUNK)).for_each(|(e, p)| {
            for (e, p) in e.iter_mut().zip(p) {
                *e = rate * *e + rest * p;
            }
        });
    }
}
