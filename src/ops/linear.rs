//! Linear layer: `y[n,o] = b[o] + Σ_c x[n,c] · w[o,c]`.   x: (n, c), w: (oc, c), b: (oc), y: (n, oc).

use super::conv2d::ConvShape;
use super::conv2d::launch::{self, FULL, Types};
use super::launch::Launcher;
use super::{Cost, Operation, Views, fast};
use crate::device::driver::Ptr;
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};

/// `y = x wᵀ + b`.
pub fn forward_cpu(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], n: usize, c: usize, oc: usize) {
    assert!(y.len() == n * oc && x.len() == n * c && w.len() == oc * c && b.len() == oc, "linear forward: lengths");
    for (i, y) in y.iter_mut().enumerate() {
        let (x, w) = (&x[i / oc * c..][..c], &w[i % oc * c..][..c]);
        let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        *y = (sum + f64::from(b[i % oc])) as f32;
    }
}

/// Gradient of the input: `dx = dy w + add`.   dx, add: (n, c), dy: (n, oc).
pub fn backward_data_cpu(dx: &mut [f32], dy: &[f32], w: &[f32], add: Option<&[f32]>, n: usize, c: usize, oc: usize) {
    assert!(dx.len() == n * c && dy.len() == n * oc && w.len() == oc * c, "linear backward: lengths");
    for (i, dx) in dx.iter_mut().enumerate() {
        let dy = &dy[i / c * oc..][..oc];
        let sum: f64 = dy.iter().enumerate().map(|(o, dy)| f64::from(*dy) * f64::from(w[o * c + i % c])).sum();
        *dx = (sum + f64::from(add.map_or(0.0, |add| add[i]))) as f32;
    }
}

/// Gradients of the parameters: `dw = dyᵀ x`, `db[o] = Σ_n dy[n,o]`; added to the old values with `accumulate`.
#[allow(clippy::too_many_arguments)]
pub fn backward_weight_cpu(
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    x: &[f32],
    accumulate: bool,
    n: usize,
    c: usize,
    oc: usize,
) {
    assert!(dw.len() == oc * c && db.len() == oc && dy.len() == n * oc && x.len() == n * c, "linear backward: lengths");
    let kept = |old: f32| if accumulate { f64::from(old) } else { 0.0 };
    for (i, dw) in dw.iter_mut().enumerate() {
        let (o, c_in) = (i / c, i % c);
        let sum: f64 = (0..n).map(|n| f64::from(dy[n * oc + o]) * f64::from(x[n * c + c_in])).sum();
        *dw = (kept(*dw) + sum) as f32;
    }
    for (o, db) in db.iter_mut().enumerate() {
        *db = (kept(*db) + (0..n).map(|n| f64::from(dy[n * oc + o])).sum::<f64>()) as f32;
    }
}

/// y = x wᵀ + b, as a step.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Result, (n, oc).
    pub y: Val,
    /// Rows, (n, c).
    pub x: Val,
    /// Matrix, (oc, c).
    pub w: Val,
    /// Bias, (oc).
    pub b: Val,
}

/// Gradient of [`Linear`] with respect to x.
#[derive(Clone, Debug)]
pub struct LinearBackwardData {
    /// Gradient of x.
    pub dx: Val,
    /// Gradient of y.
    pub dy: Val,
    /// Matrix.
    pub w: Val,
    /// Gradient of x from elsewhere.
    pub add: Option<Val>,
}

/// Gradient of [`Linear`] with respect to w and b.
#[derive(Clone, Debug)]
pub struct LinearBackwardWeight {
    /// Gradient of w.
    pub dw: Val,
    /// Gradient of b.
    pub db: Val,
    /// Gradient of y.
    pub dy: Val,
    /// Rows.
    pub x: Val,
    /// Add to `dw` and `db` rather than overwrite them.
    pub accumulate: bool,
}

impl Linear {
    /// Appends y = x wᵀ + b.
    pub fn record(g: &mut Graph, x: Val, w: Val, b: Val) -> Val {
        let (n, c, oc) = (g.shape(x).n, g.shape(x).c, g.shape(w).n);
        assert_eq!(c, g.shape(w).c, "linear: {c} columns for {}", g[w].name);
        let y = g.activation("linear", Shape::rows(n, oc));
        g.push(Linear { y, x, w, b });
        y
    }
}

/// (n, c, oc) of x (n, c) and w (oc, c).
fn sizes(g: &Graph, x: Val, w: Val) -> (usize, usize, usize) {
    (g.shape(x).n, g.shape(w).c, g.shape(w).n)
}

/// On CUDA a linear layer is the convolution of an image of one row: n pixels of c channels.
fn conv_shape((n, c, oc): (usize, usize, usize)) -> ConvShape {
    ConvShape { n: 1, h: 1, w: n, ca: c, cb: 0, oc, k: 1, stride: 1, upsample: false, pad: 0 }
}

fn flops((n, c, oc): (usize, usize, usize)) -> f64 {
    2.0 * (n * c * oc) as f64
}

impl Linear {
    fn cuda(&self, g: &Graph) -> Result<(ConvShape, Types)> {
        let s = conv_shape(sizes(g, self.x, self.w));
        Ok((s, Types::of("linear", g, [self.x, self.y], Some(self.w), &s)?))
    }
}

impl LinearBackwardData {
    fn cuda(&self, g: &Graph) -> Result<(ConvShape, Types)> {
        let s = conv_shape(sizes(g, self.dx, self.w));
        let acts = [self.dx, self.dy].into_iter().chain(self.add);
        Ok((s, Types::of("linear backward", g, acts, Some(self.w), &s)?))
    }
}

impl LinearBackwardWeight {
    fn cuda(&self, g: &Graph) -> Result<(ConvShape, Types)> {
        let s = conv_shape(sizes(g, self.x, self.dw));
        Ok((s, Types::of("linear backward", g, [self.x, self.dy], None, &s)?))
    }
}

impl Operation for Linear {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.x, self.w, self.b]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, flops(sizes(g, self.x, self.w)))
    }
    fn scratch(&self, g: &Graph) -> usize {
        let (n, c, oc) = sizes(g, self.x, self.w);
        fast::linear::forward_scratch(n, c, oc)
    }
    fn run_cpu(&self, m: &Views) {
        let (n, c, oc) = sizes(m.graph(), self.x, self.w);
        let (x, w, b) = (m.f32(self.x), m.f32(self.w), m.f32(self.b));
        fast::linear::forward(m.isa(), m.f32_mut(self.y), x, w, b, n, c, oc, m.scratch());
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.cuda(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.cuda(g).map_or(0, |(s, t)| launch::weights_workspace(&s, t))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (s, t) = self.cuda(m.graph)?;
        let (x, bias) = ([m.ptr(self.x), Ptr::NULL], m.ptr(self.b));
        let f = launch::Forward { y: m.ptr(self.y), x, w: m.ptr(self.w), bias, ..Default::default() };
        launch::forward(m.driver, &s, t, FULL, &f, m.workspace)
    }
}

impl Operation for LinearBackwardData {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dx]
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy, self.w].into_iter().chain(self.add).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, flops(sizes(g, self.dx, self.w)))
    }
    fn scratch(&self, g: &Graph) -> usize {
        let (n, c, oc) = sizes(g, self.dx, self.w);
        fast::linear::backward_data_scratch(n, c, oc)
    }
    fn run_cpu(&self, m: &Views) {
        let (n, c, oc) = sizes(m.graph(), self.dx, self.w);
        let add = self.add.map(|v| m.f32(v));
        fast::linear::backward_data(
            m.isa(),
            m.f32_mut(self.dx),
            m.f32(self.dy),
            m.f32(self.w),
            add,
            n,
            c,
            oc,
            m.scratch(),
        );
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.cuda(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.cuda(g).map_or(0, |(s, t)| launch::weights_workspace(&s, t))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (s, t) = self.cuda(m.graph)?;
        let (dx, add) = ([m.ptr(self.dx), Ptr::NULL], [m.optional(self.add), Ptr::NULL]);
        let b = launch::BackwardData { dx, dy: m.ptr(self.dy), w: m.ptr(self.w), add };
        launch::backward_data(m.driver, &s, t, FULL, &b, m.workspace)
    }
}

impl Operation for LinearBackwardWeight {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dw, self.db]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.dy, self.x]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let all = Cost::of(self, g, flops(sizes(g, self.x, self.dw)));
        Cost { read: all.read + if self.accumulate { all.written } else { 0.0 }, ..all }
    }
    fn scratch(&self, g: &Graph) -> usize {
        let (n, c, oc) = sizes(g, self.x, self.dw);
        fast::linear::backward_weight_scratch(n, c, oc)
    }
    fn run_cpu(&self, m: &Views) {
        let (n, c, oc) = sizes(m.graph(), self.x, self.dw);
        let (dw, db) = (m.f32_mut(self.dw), m.f32_mut(self.db));
        fast::linear::backward_weight(
            m.isa(),
            dw,
            db,
            m.f32(self.dy),
            m.f32(self.x),
            self.accumulate,
            n,
            c,
            oc,
            m.scratch(),
        );
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.cuda(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.cuda(g).map_or(0, |(s, t)| launch::backward_weight_workspace(&s, t, FULL))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (s, t) = self.cuda(m.graph)?;
        let b = launch::BackwardWeight {
            dw: m.ptr(self.dw),
            db: m.ptr(self.db),
            dy: m.ptr(self.dy),
            x: [m.ptr(self.x), Ptr::NULL],
            accumulate: self.accumulate,
            ..Default::default()
        };
        launch::backward_weight(m.driver, &s, t, FULL, &b, m.workspace)
    }
}
