//! Mean of 2x2 pixels, stride 2: (n, h, w, c) to (n, h/2, w/2, c), f32, or bf16 on CUDA. An odd last row or column is left
//! out.
//!
//! Its gradient gives each of the four pixels a quarter of dy, and a pixel left out none.
//!
//! Kernels: `kernels/avg_pool.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};

/// y = mean over 2x2 pixels of x.
#[derive(Clone, Debug)]
pub struct AvgPool {
    /// Result.
    pub y: Val,
    /// Input.
    pub x: Val,
}

/// Gradient of [`AvgPool`].
#[derive(Clone, Debug)]
pub struct AvgPoolBackward {
    /// Gradient of x.
    pub dx: Val,
    /// Gradient of y.
    pub dy: Val,
    /// Gradient of x from elsewhere.
    pub add: Option<Val>,
}

impl AvgPool {
    /// Appends the pooling of `x`.
    pub fn record(g: &mut Graph, x: Val) -> Val {
        let s = g.shape(x);
        let y = g.shaped_like("avg_pool", x, Shape::new(s.n, s.h / 2, s.w / 2, s.c));
        g.push(AvgPool { y, x });
        y
    }
}

impl Operation for AvgPool {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.x]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 4.0 * g.shape(self.y).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.x), m.graph().shape(self.x));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("avg_pool", g, [self.y, self.x]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let s = m.graph.shape(self.x);
        let len = m.graph.shape(self.y).len();
        let args = args![m.ptr(self.y), m.ptr(self.x), len as i64, s.h as i32, s.w as i32, s.c as i32];
        m.start_elementwise("avg_pool", self.y, len, args)
    }
}

impl Operation for AvgPoolBackward {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dx]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy].into_iter().chain(self.add).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, g.shape(self.dx).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        let add = self.add.map(|v| m.f32(v));
        backward_cpu(m.f32_mut(self.dx), m.f32(self.dy), add, m.graph().shape(self.dx));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        let vals = [self.dx, self.dy].into_iter().chain(self.add);
        launch::check("avg_pool backward", g, vals).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let s = m.graph.shape(self.dx);
        let len = s.n * s.h.div_ceil(2) * s.w.div_ceil(2) * s.c;
        let args =
            args![m.ptr(self.dx), m.ptr(self.dy), m.optional(self.add), len as i64, s.h as i32, s.w as i32, s.c as i32];
        m.start_elementwise("avg_pool_backward", self.dx, len, args)
    }
}

/// y (n, h/2, w/2, c) from x of shape `s`.
pub fn forward_cpu(y: &mut [f32], x: &[f32], s: Shape) {
    let (oh, ow) = (s.h / 2, s.w / 2);
    assert!(x.len() == s.len() && y.len() == s.n * oh * ow * s.c, "avg_pool: sizes do not fit {s}");
    let at = |n: usize, i: usize, j: usize| ((n * s.h + i) * s.w + j) * s.c;
    for (p, out) in y.chunks_exact_mut(s.c).enumerate() {
        let (n, i, j) = (p / (oh * ow), p / ow % oh, p % ow);
        let (a, b) = (at(n, 2 * i, 2 * j), at(n, 2 * i + 1, 2 * j));
        for (c, y) in out.iter_mut().enumerate() {
            *y = 0.25 * (x[a + c] + x[a + s.c + c] + x[b + c] + x[b + s.c + c]);
        }
    }
}

/// dx of shape `s` from dy (n, h/2, w/2, c).
pub fn backward_cpu(dx: &mut [f32], dy: &[f32], add: Option<&[f32]>, s: Shape) {
    let (oh, ow) = (s.h / 2, s.w / 2);
    assert!(dx.len() == s.len() && dy.len() == s.n * oh * ow * s.c, "avg_pool: sizes do not fit {s}");
    for (p, out) in dx.chunks_exact_mut(s.c).enumerate() {
        let (n, i, j) = (p / (s.h * s.w), p / s.w % s.h / 2, p % s.w / 2);
        for (c, dx) in out.iter_mut().enumerate() {
            let share = if i < oh && j < ow { 0.25 * dy[((n * oh + i) * ow + j) * s.c + c] } else { 0.0 };
            *dx = share + add.map_or(0.0, |a| a[p * s.c + c]);
        }
    }
}
