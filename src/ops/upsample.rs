//! Nearest-neighbour enlargement by 2: (n, h, w, c) to (n, 2h, 2w, c), f32, or bf16 on CUDA.
//!
//! Its gradient sums dy over each 2x2 pixels. Before a 3x3 convolution it is part of [`super::conv2d`] instead.
//!
//! Kernels: `kernels/upsample.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};

/// `y[2i + a][2j + b] = x[i][j]`, a and b in {0, 1}.
#[derive(Clone, Debug)]
pub struct Upsample {
    /// Result.
    pub y: Val,
    /// Input.
    pub x: Val,
}

/// Gradient of [`Upsample`].
#[derive(Clone, Debug)]
pub struct UpsampleBackward {
    /// Gradient of x.
    pub dx: Val,
    /// Gradient of y.
    pub dy: Val,
    /// Gradient of x from elsewhere.
    pub add: Option<Val>,
}

impl Upsample {
    /// Appends the enlargement of `x`.
    pub fn record(g: &mut Graph, x: Val) -> Val {
        let s = g.shape(x);
        let y = g.shaped_like("upsample", x, Shape::new(s.n, 2 * s.h, 2 * s.w, s.c));
        g.push(Upsample { y, x });
        y
    }
}

impl Operation for Upsample {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.x]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 0.0)
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.x), m.graph().shape(self.x));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("upsample", g, [self.y, self.x]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let s = m.graph.shape(self.x);
        let len = s.len();
        let args = args![m.ptr(self.y), m.ptr(self.x), len as i64, s.h as i32, s.w as i32, s.c as i32];
        m.start_elementwise("upsample", self.y, len, args)
    }
}

impl Operation for UpsampleBackward {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dx]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy].into_iter().chain(self.add).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, g.shape(self.dy).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        let add = self.add.map(|v| m.f32(v));
        backward_cpu(m.f32_mut(self.dx), m.f32(self.dy), add, m.graph().shape(self.dx));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        let vals = [self.dx, self.dy].into_iter().chain(self.add);
        launch::check("upsample backward", g, vals).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let s = m.graph.shape(self.dx);
        let len = s.len();
        let args =
            args![m.ptr(self.dx), m.ptr(self.dy), m.optional(self.add), len as i64, s.h as i32, s.w as i32, s.c as i32];
        m.start_elementwise("upsample_backward", self.dx, len, args)
    }
}

/// y (n, 2h, 2w, c) from x of shape `s`.
pub fn forward_cpu(y: &mut [f32], x: &[f32], s: Shape) {
    assert!(x.len() == s.len() && y.len() == 4 * s.len(), "upsample: sizes do not fit {s}");
    for (p, out) in y.chunks_exact_mut(s.c).enumerate() {
        let (n, i, j) = (p / (4 * s.h * s.w), p / (2 * s.w) % (2 * s.h) / 2, p % (2 * s.w) / 2);
        let from = ((n * s.h + i) * s.w + j) * s.c;
        out.copy_from_slice(&x[from..from + s.c]);
    }
}

/// dx of shape `s` from dy (n, 2h, 2w, c).
pub fn backward_cpu(dx: &mut [f32], dy: &[f32], add: Option<&[f32]>, s: Shape) {
    assert!(dx.len() == s.len() && dy.len() == 4 * s.len(), "upsample: sizes do not fit {s}");
    let row = 2 * s.w * s.c;
    for (p, out) in dx.chunks_exact_mut(s.c).enumerate() {
        let (i, j) = (p / s.w, p % s.w);
        let (a, b) = (2 * i * row + 2 * j * s.c, (2 * i + 1) * row + 2 * j * s.c);
        for (c, dx) in out.iter_mut().enumerate() {
            let sum = dy[a + c] + dy[a + s.c + c] + dy[b + c] + dy[b + s.c + c];
            *dx = sum + add.map_or(0.0, |add| add[p * s.c + c]);
        }
    }
}
