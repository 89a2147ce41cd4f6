//! SiLU of a row vector, for the time embedding: y = x s, s = sigmoid(x); dx = dy s (1 + x (1 - s)) + add.
//!
//! All (n, c) f32, or bf16 on CUDA. Inside the network SiLU is part of [`super::group_norm`].
//!
//! Kernels: `kernels/silu.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Val};

/// y = silu(x).
#[derive(Clone, Debug)]
pub struct Silu {
    /// Result.
    pub y: Val,
    /// Argument.
    pub x: Val,
}

/// Gradient of [`Silu`].
#[derive(Clone, Debug)]
pub struct SiluBackward {
    /// Gradient of x.
    pub dx: Val,
    /// Gradient of y.
    pub dy: Val,
    /// Argument.
    pub x: Val,
    /// Gradient of x from elsewhere.
    pub add: Option<Val>,
}

impl Silu {
    /// Appends y = silu(x).
    pub fn record(g: &mut Graph, x: Val) -> Val {
        let name = format!("silu {}", g[x].name);
        let y = g.like(&name, x);
        g.push(Silu { y, x });
        y
    }
}

impl Operation for Silu {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.x]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 5.0 * g.shape(self.y).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.x));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("silu", g, [self.y, self.x]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let len = m.graph.shape(self.y).len();
        m.start_elementwise("silu", self.y, len, args![m.ptr(self.y), m.ptr(self.x), len as i64])
    }
}

impl Operation for SiluBackward {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dx]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy, self.x].into_iter().chain(self.add).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 9.0 * g.shape(self.dx).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        backward_cpu(m.f32_mut(self.dx), m.f32(self.dy), m.f32(self.x), self.add.map(|v| m.f32(v)));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("silu backward", g, self.outputs().into_iter().chain(self.inputs())).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let len = m.graph.shape(self.dx).len();
        let args = args![m.ptr(self.dx), m.ptr(self.dy), m.ptr(self.x), m.optional(self.add), len as i64];
        m.start_elementwise("silu_backward", self.dx, len, args)
    }
}

/// y = x / (1 + exp(-x)).
pub fn forward_cpu(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "silu: lengths differ");
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x / (1.0 + (-x).exp());
    }
}

/// dx = dy s (1 + x (1 - s)) + add, s = sigmoid(x).
pub fn backward_cpu(dx: &mut [f32], dy: &[f32], x: &[f32], add: Option<&[f32]>) {
    assert!(dx.len() == dy.len() && dy.len() == x.len(), "silu: lengths differ");
    for (i, dx) in dx.iter_mut().enumerate() {
        let s = 1.0 / (1.0 + (-x[i]).exp());
        *dx = dy[i] * s * (1.0 + x[i] * (1.0 - s)) + add.map_or(0.0, |a| a[i]);
    }
}
