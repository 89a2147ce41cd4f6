//! Sinusoidal embedding of the time value: `y[n] = [cos(t f_k), sin(t f_k)]`, f_k = exp(-ln(max_period) k / half),
//! half = dim / 2; an odd dim ends with a zero column.   t: (n) f32, y: (n, dim) f32, or bf16 on CUDA.
//!
//! The angle is an f32 product, as in the reference: at t near 1000 its rounding is part of the definition.
//!
//! Kernel: `kernels/timestep_embedding.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};

/// See the module.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    /// Embedding, one row per image.
    pub y: Val,
    /// Time value of each image.
    pub t: Val,
    /// Longest period, 10000 in the network.
    pub max_period: f32,
}

impl TimestepEmbedding {
    /// Appends the embedding of `t` in `dim` numbers, its longest period being `max_period`.
    pub fn record(g: &mut Graph, t: Val, dim: usize, max_period: f32) -> Val {
        let n = g.shape(t).len();
        let y = g.activation("timestep_embedding", Shape::rows(n, dim));
        g.push(TimestepEmbedding { y, t, max_period });
        y
    }
}

impl Operation for TimestepEmbedding {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.t]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 2.0 * g.shape(self.y).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.t), self.max_period);
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("timestep_embedding", g, [self.y])?;
        let half = g.shape(self.y).c / 2;
        let table: Vec<f32> = (0..half).map(|k| frequency(self.max_period, k, half)).collect();
        Ok(bytemuck::cast_slice(&table).to_vec())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (len, dim) = (m.graph.shape(self.y).len(), m.graph.shape(self.y).c);
        let args = args![m.ptr(self.y), m.ptr(self.t), m.memory, len as i64, dim as i32];
        m.start_typed("timestep_embedding", self.y, len.div_ceil(256), args)
    }
}

/// f_k.
fn frequency(max_period: f32, k: usize, half: usize) -> f32 {
    (-f64::from(max_period).ln() * k as f64 / half as f64).exp() as f32
}

/// See the module.
pub fn forward_cpu(y: &mut [f32], t: &[f32], max_period: f32) {
    let dim = y.len() / t.len();
    let half = dim / 2;
    for (&t, row) in t.iter().zip(y.chunks_exact_mut(dim)) {
        for k in 0..half {
            let angle = f64::from(t * frequency(max_period, k, half));
            row[k] = angle.cos() as f32;
            row[half + k] = angle.sin() as f32;
        }
        row[2 * half..].fill(0.0);
    }
}
