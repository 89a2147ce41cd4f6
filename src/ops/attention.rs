//! Self-attention over the pixels of an image, one softmax per head:
//!
//! `out[i] = Σ_j p[i,j] v[j]`, `p[i,·] = softmax_j((q[i] d^-¼)·(k[j] d^-¼))`, `lse[i] = log Σ_j exp(score[i,j])`.
//!
//! qkv: (n, s, 3·heads·d), out: (n, s, heads·d), lse: (n, heads, s); s tokens, d channels per head.

use super::launch::Launcher;
use super::{Cost, Operation, Views, fast};
use crate::error::Result;
use crate::graph::{Graph, Shape, Val};

pub mod launch;

/// Where a head finds its q, k and v among the channels of qkv.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkvOrder {
    /// Heads outermost: head h owns channels [3hd, 3hd + 3d) as q, k, v (Improved DDPM).
    Legacy,
    /// All of q, then all of k, then all of v, heads inside each.
    New,
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Images.
    pub n: usize,
    /// Tokens (pixels) per image.
    pub s: usize,
    /// Heads.
    pub heads: usize,
    /// Channels per head.
    pub d: usize,
    /// Order of the channels of qkv.
    pub order: QkvOrder,
}

impl AttentionShape {
    /// Channels of the output, heads·d.
    pub fn c(&self) -> usize {
        self.heads * self.d
    }

    /// First channel of q, k and v of head `head` in qkv.
    pub fn columns(&self, head: usize) -> [usize; 3] {
        match self.order {
            QkvOrder::Legacy => [0, 1, 2].map(|part| (3 * head + part) * self.d),
            QkvOrder::New => [0, 1, 2].map(|part| part * self.c() + head * self.d),
        }
    }

    /// What q·k is multiplied by, 1/√d.
    pub fn scale(&self) -> f64 {
        1.0 / (self.d as f64).sqrt()
    }

    /// Panics unless the slices have the lengths of this shape.
    pub fn check(&self, qkv: &[f32], out: &[f32], lse: &[f32]) {
        assert_eq!(qkv.len(), self.n * self.s * 3 * self.c(), "attention: length of qkv");
        assert_eq!(out.len(), self.n * self.s * self.c(), "attention: length of out");
        assert_eq!(lse.len(), self.n * self.heads * self.s, "attention: length of lse");
    }

    /// Calls `f(image, head)` for every pair.
    fn for_each(&self, mut f: impl FnMut(usize, usize)) {
        (0..self.n).for_each(|n| (0..self.heads).for_each(|head| f(n, head)));
    }
}

/// Product of two vectors, summed in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `out = softmax(q kᵀ/√d) v` per image and head, and the log of each row's denominator.
pub fn forward_cpu(out: &mut [f32], lse: &mut [f32], qkv: &[f32], s: &AttentionShape) {
    s.check(qkv, out, lse);
    let (c, d) = (s.c(), s.d);
    s.for_each(|n, head| {
        let [q, k, v] = s.columns(head);
        let token = |i: usize, column: usize| &qkv[(n * s.s + i) * 3 * c + column..][..d];
        for i in 0..s.s {
            let score: Vec<f64> = (0..s.s).map(|j| s.scale() * dot(token(i, q), token(j, k))).collect();
            let max = score.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = max + score.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            lse[(n * s.heads + head) * s.s + i] = log_sum as f32;
            for e in 0..d {
                let sum: f64 = (0..s.s).map(|j| (score[j] - log_sum).exp() * f64::from(token(j, v)[e])).sum();
                out[(n * s.s + i) * c + head * d + e] = sum as f32;
            }
        }
    });
}

/// Gradient of qkv: with `p` as in the forward, `delta[i] = dout[i]·out[i]` and
/// `ds[i,j] = p[i,j] (dout[i]·v[j] − delta[i])/√d`:
/// `dq[i] = Σ_j ds[i,j] k[j]`, `dk[j] = Σ_i ds[i,j] q[i]`, `dv[j] = Σ_i p[i,j] dout[i]`.
pub fn backward_cpu(dqkv: &mut [f32], dout: &[f32], qkv: &[f32], out: &[f32], lse: &[f32], s: &AttentionShape) {
    s.check(qkv, out, lse);
    assert!(dqkv.len() == qkv.len() && dout.len() == out.len(), "attention backward: lengths of dqkv or dout");
    let (c, d) = (s.c(), s.d);
    let mut sums = vec![0f64; dqkv.len()];
    s.for_each(|n, head| {
        let [q, k, v] = s.columns(head);
        let at = |i: usize, column: usize| (n * s.s + i) * 3 * c + column;
        for i in 0..s.s {
            let row = (n * s.s + i) * c + head * d;
            let (dout, out) = (&dout[row..][..d], &out[row..][..d]);
            let delta = dot(dout, out);
            for j in 0..s.s {
                let score = s.scale() * dot(&qkv[at(i, q)..][..d], &qkv[at(j, k)..][..d]);
                let p = (score - f64::from(lse[(n * s.heads + head) * s.s + i])).exp();
                let ds = p * (dot(dout, &qkv[at(j, v)..][..d]) - delta) * s.scale();
                for e in 0..d {
                    sums[at(i, q) + e] += ds * f64::from(qkv[at(j, k) + e]);
                    sums[at(j, k) + e] += ds * f64::from(qkv[at(i, q) + e]);
                    sums[at(j, v) + e] += p * f64::from(dout[e]);
                }
            }
        }
    });
    dqkv.iter_mut().zip(sums).for_each(|(dqkv, sum)| *dqkv = sum as f32);
}

/// out = softmax(q kᵀ / √d) v per head, as a step.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Result, (n, h, w, heads·d).
    pub out: Val,
    /// Logarithm of each softmax denominator, (n, heads, s).
    pub lse: Val,
    /// Queries, keys and values, (n, h, w, 3·heads·d).
    pub qkv: Val,
    /// Sizes.
    pub shape: AttentionShape,
}

/// Gradient of [`Attention`].
#[derive(Clone, Debug)]
pub struct AttentionBackward {
    /// Gradient of qkv.
    pub dqkv: Val,
    /// Gradient of out.
    pub dout: Val,
    /// Queries, keys and values.
    pub qkv: Val,
    /// Result of the forward pass.
    pub out: Val,
    /// Logarithm of each softmax denominator.
    pub lse: Val,
    /// Sizes.
    pub shape: AttentionShape,
}

impl Attention {
    /// Appends self-attention of `heads` heads over the pixels of `qkv`.
    pub fn record(g: &mut Graph, qkv: Val, heads: usize, order: QkvOrder) -> Val {
        let s = g.shape(qkv);
        let c = s.c / 3;
        assert!(c.is_multiple_of(heads), "attention: {c} channels do not divide into {heads} heads");
        let shape = AttentionShape { n: s.n, s: s.h * s.w, heads, d: c / heads, order };
        let out = g.activation("attention", Shape { c, ..s });
        let lse = g.arena("lse", Shape::new(s.n, heads, 1, shape.s));
        g.push(Attention { out, lse, qkv, shape });
        out
    }

    fn is_half(&self, g: &Graph) -> Result<bool> {
        launch::is_half("attention", g, &[self.qkv, self.out], &self.shape)
    }
}

impl AttentionBackward {
    fn is_half(&self, g: &Graph) -> Result<bool> {
        launch::is_half("attention backward", g, &[self.qkv, self.out, self.dout, self.dqkv], &self.shape)
    }
}

impl Operation for Attention {
    fn outputs(&self) -> Vec<Val> {
        vec![self.out, self.lse]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.qkv]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let s = &self.shape;
        Cost::of(self, g, 4.0 * (s.n * s.heads * s.s * s.s * s.d) as f64)
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::attention::forward_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let (out, lse) = (m.f32_mut(self.out), m.f32_mut(self.lse));
        fast::attention::forward(m.isa(), out, lse, m.f32(self.qkv), &self.shape, m.scratch());
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.is_half(g).map(|_| Vec::new())
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let f = launch::Forward { out: m.ptr(self.out), lse: m.ptr(self.lse), qkv: m.ptr(self.qkv) };
        launch::forward(m.driver, &self.shape, self.is_half(m.graph)?, launch::FULL, &f)
    }
}

impl Operation for AttentionBackward {
    fn outputs(&self) -> Vec<Val> {
        vec![self.dqkv]
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.dout, self.qkv, self.out, self.lse]
    }
    fn cost(&self, g: &Graph) -> Cost {
        let s = &self.shape;
        Cost::of(self, g, 10.0 * (s.n * s.heads * s.s * s.s * s.d) as f64)
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::attention::backward_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let (dout, qkv, out, lse) = (m.f32(self.dout), m.f32(self.qkv), m.f32(self.out), m.f32(self.lse));
        fast::attention::backward(m.isa(), m.f32_mut(self.dqkv), dout, qkv, out, lse, &self.shape, m.scratch());
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.is_half(g).map(|_| Vec::new())
    }
    fn workspace(&self, _g: &Graph) -> usize {
        launch::backward_workspace(&self.shape)
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let b = launch::Backward {
            dqkv: m.ptr(self.dqkv),
            dout: m.ptr(self.dout),
            qkv: m.ptr(self.qkv),
            out: m.ptr(self.out),
            lse: m.ptr(self.lse),
        };
        launch::backward(m.driver, &self.shape, self.is_half(m.graph)?, launch::FULL, &b, m.workspace)
    }
}
