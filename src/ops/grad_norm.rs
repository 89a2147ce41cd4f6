//! Euclidean norm of the whole flat gradient: norm = sqrt(sum g²).   grads: (1, P) f32, norm: (1) f32.
//!
//! Two stages with a fixed partition, so that the sum does not depend on the number of threads.
//!
//! A guarded norm is not finite either when one of the step's losses, (n) f32, is not, nor when the norm of the step before was not:
//! after a failed step the optimiser leaves the weights alone until the host has seen it, however many steps were started.
//!
//! Kernels: `kernels/grad_norm.cu`, a block per 16,384 elements, then one block over their sums.

use super::launch::Launcher;
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Shape, Val};
use rayon::prelude::*;

/// Elements of one partial sum; the kernel has the same number.
const CHUNK: usize = 16_384;

/// See the module.
#[derive(Clone, Debug)]
pub struct GradNorm {
    /// The norm.
    pub norm: Val,
    /// All gradients.
    pub grads: Val,
    /// The losses of a guarded norm.
    pub guard: Option<Val>,
}

impl GradNorm {
    /// Appends the norm of all gradients.
    pub fn record(g: &mut Graph, grads: Val) -> Val {
        Self::append(g, grads, None)
    }

    /// Appends the norm of all gradients, guarded by the step's losses.
    pub fn record_guarded(g: &mut Graph, grads: Val, loss: Val) -> Val {
        Self::append(g, grads, Some(loss))
    }

    fn append(g: &mut Graph, grads: Val, guard: Option<Val>) -> Val {
        let norm = g.fixed("grad_norm", Shape::rows(1, 1), DType::F32, Region::State);
        g.push(GradNorm { norm, grads, guard });
        norm
    }
}

impl Operation for GradNorm {
    fn outputs(&self) -> Vec<Val> {
        vec![self.norm]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.grads].into_iter().chain(self.guard).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 2.0 * g.shape(self.grads).len() as f64)
    }
    fn scratch(&self, g: &Graph) -> usize {
        2 * g.shape(self.grads).len().div_ceil(CHUNK)
    }
    fn run_cpu(&self, m: &Views) {
        let partial: &mut [f64] = bytemuck::cast_slice_mut(m.scratch());
        let (norm, before) = (norm_cpu(m.f32(self.grads), partial), m.f32_mut(self.norm));
        let losses = self.guard.map(|v| m.f32(v));
        before[0] = match losses {
            Some(_) if !before[0].is_finite() => before[0],
            Some(losses) if losses.iter().any(|x| !x.is_finite()) => f32::NAN,
            _ => norm,
        };
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        Ok(vec![0; 8 * g.shape(self.grads).len().div_ceil(CHUNK)])
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let len = m.graph.shape(self.grads).len();
        let chunks = len.div_ceil(CHUNK);
        m.start("grad_norm_partial", chunks, args![m.memory, m.ptr(self.grads), len as i64])?;
        let images = self.guard.map_or(0, |v| m.graph.shape(v).len());
        m.start("grad_norm", 1, args![m.ptr(self.norm), m.memory, chunks as i64, m.optional(self.guard), images as i64])
    }
}

/// Norm of `x`; `partial` holds one number per 16,384 elements.
pub fn norm_cpu(x: &[f32], partial: &mut [f64]) -> f32 {
    let square = |x: &[f32]| -> f64 {
        let mut lanes = [0.0f64; 8];
        for x in x.chunks(8) {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += f64::from(*x) * f64::from(*x);
            }
        }
        lanes.iter().sum()
    };
    x.par_chunks(CHUNK).zip(partial.par_iter_mut()).for_each(|(x, p)| *p = square(x));
    partial.iter().sum::<f64>().sqrt() as f32
}
