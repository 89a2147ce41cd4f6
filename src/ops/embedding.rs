//! Class embedding: `y[n] = x[n] + table[label[n]]`.   x, y: (n, c) f32, or bf16 on CUDA; table: (classes, c) f32; labels: (n) i32.
//!
//! The gradient of x is that of y; the table's row k gets the sum of dy over the images of class k, in their order.
//!
//! Kernels: `kernels/embedding.cu`.

use super::launch::{self, Launcher};
use super::{Cost, Operation, Views};
use crate::args;
use crate::error::Result;
use crate::graph::{Graph, Val};

/// `y = x + table[labels]`.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Result.
    pub y: Val,
    /// What the embedding is added to.
    pub x: Val,
    /// One row per class.
    pub table: Val,
    /// One class per image.
    pub labels: Val,
}

/// Gradient of the table of [`Embedding`].
#[derive(Clone, Debug)]
pub struct EmbeddingBackward {
    /// Gradient of the table.
    pub dtable: Val,
    /// Gradient of y.
    pub dy: Val,
    /// One class per image.
    pub labels: Val,
    /// Add to `dtable` rather than overwrite it.
    pub accumulate: bool,
}

impl Embedding {
    /// Appends `y = x + table[labels]`.
    pub fn record(g: &mut Graph, x: Val, table: Val, labels: Val) -> Val {
        let y = g.like("emb + label_emb", x);
        g.push(Embedding { y, x, table, labels });
        y
    }
}

impl Operation for Embedding {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.x, self.table, self.labels]
    }
    fn cost(&self, g: &Graph) -> Cost {
        // Each image gathers a row of the table.
        let (y, len) = (g[self.y].bytes() as f64, g.shape(self.y).len() as f64);
        Cost { flops: len, read: y + 4.0 * len + g[self.labels].bytes() as f64, written: y }
    }
    fn run_cpu(&self, m: &Views) {
        forward_cpu(m.f32_mut(self.y), m.f32(self.x), m.f32(self.table), m.get(self.labels));
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("embedding", g, [self.y, self.x]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (len, c) = (m.graph.shape(self.y).len(), m.graph.shape(self.y).c);
        let [y, x, table, labels] = [self.y, self.x, self.table, self.labels].map(|v| m.ptr(v));
        m.start_elementwise("embedding", self.y, len, args![y, x, table, labels, len as i64, c as i32])
    }
}

impl Operation for EmbeddingBackward {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dtable]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.dy, self.labels]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let cost = Cost::of(self, g, g.shape(self.dy).len() as f64);
        Cost { read: cost.read + if self.accumulate { cost.written } else { 0.0 }, ..cost }
    }
    fn run_cpu(&self, m: &Views) {
        backward_cpu(m.f32_mut(self.dtable), m.f32(self.dy), m.get(self.labels), self.accumulate);
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        launch::check("embedding backward", g, [self.dy])?;
        launch::check("embedding backward", g, [self.dtable]).map(|()| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (table, dy) = (m.graph.shape(self.dtable), m.graph.shape(self.dy));
        let [dtable, from, labels] = [self.dtable, self.dy, self.labels].map(|v| m.ptr(v));
        let sizes = [dy.n, dy.c, usize::from(self.accumulate)].map(|n| n as i32);
        let args = args![dtable, from, labels, table.len() as i64, sizes[0], sizes[1], sizes[2]];
        m.start_elementwise("embedding_backward", self.dy, table.len(), args)
    }
}

/// `y = x + table[labels]`; labels lie in 0 .. classes (the host checks them).
pub fn forward_cpu(y: &mut [f32], x: &[f32], table: &[f32], labels: &[i32]) {
    let c = y.len() / labels.len();
    for (n, &label) in labels.iter().enumerate() {
        let row = &table[label as usize * c..][..c];
        for ((y, x), e) in y[n * c..][..c].iter_mut().zip(&x[n * c..]).zip(row) {
            *y = x + e;
        }
    }
}

/// `dtable[k]` = sum of `dy[n]` over the images n with label k.
pub fn backward_cpu(dtable: &mut [f32], dy: &[f32], labels: &[i32], accumulate: bool) {
    let c = dy.len() / labels.len();
    if !accumulate {
        dtable.fill(0.0);
    }
    for (&label, dy) in labels.iter().zip(dy.chunks_exact(c)) {
        for (d, dy) in dtable[label as usize * c..][..c].iter_mut().zip(dy) {
            *d += dy;
        }
    }
}
