//! y = a + b.   All (n, h, w, c) f32, or bf16 on CUDA.
//!
//! Kernel: `kernels/add.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Val};

/// See the module.
#[derive(Clone, Debug)]
pub struct Add {
    /// Sum.
    pub y: Val,
    /// First summand.
    pub a: Val,
    /// Second summand.
    pub b: Val,
}

impl Add {
    /// Appends y = a + b.
    pub fn record(g: &mut Graph, a: Val, b: Val) -> Val {
        let name = format!("{} + {}", g[a].name, g[b].name);
        let y = g.like(&name, a);
        g.push(Add { y, a, b });
        y
    }
}

impl Operation for Add {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.a, self.b]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, g.shape(self.y).len() as f64)
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.a), m.f32(self.b));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("add", g, [self.y, self.a, self.b]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let len = m.graph.shape(self.y).len();
        m.start_elementwise("add", self.y, len, args![m.ptr(self.y), m.ptr(self.a), m.ptr(self.b), len as i64])
    }
}

/// y = a + b, element by element.
pub fn forward_cpu(y: &mut [f32], a: &[f32], b: &[f32]) {
    assert!(y.len() == a.len() && a.len() == b.len(), "add: lengths differ");
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = a + b;
    }
}
