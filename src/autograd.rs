//! Reverse-mode differentiation of a recorded list: walks it backwards and appends ordinary steps.
//!
//! The gradient of a value is a list of contributions. A backward step that produces one takes the sum of the earlier
//! ones as an addend, so they are summed in the same pass; a contribution that is a gradient unchanged (of a residual
//! sum) costs nothing. Gradients of parameters go to their place in the flat gradient region, the first writer
//! overwriting, later ones (other microbatches) adding.

use crate::graph::{Graph, Source, Val};
use crate::ops::add::Add;
use crate::ops::attention::AttentionBackward;
use crate::ops::avg_pool::AvgPoolBackward;
use crate::ops::conv2d::{Conv2dBackwardData, Conv2dBackwardWeight};
use crate::ops::embedding::EmbeddingBackward;
use crate::ops::group_norm::GroupNormBackward;
use crate::ops::linear::{LinearBackwardData, LinearBackwardWeight};
use crate::ops::silu::SiluBackward;
use crate::ops::upsample::UpsampleBackward;
use crate::ops::{Op, Operation};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Appends the steps that carry the gradient `dout` of `out` back through `steps`, to every parameter and to `wanted`.
///
/// Returns the gradient of each wanted value, where there is one.
pub fn backward(g: &mut Graph, steps: Range<usize>, out: Val, dout: Val, wanted: &[Val]) -> Vec<Option<Val>> {
    let mut tape = Tape::new(g, wanted);
    tape.need(steps.clone());
    tape.start(out, dout);
    tape.walk(steps);
    wanted.iter().map(|&v| tape.gradient(v)).collect()
}

/// Gradients on their way back; [`backward`] is the plain use of it.
pub struct Tape<'g> {
    /// The plan that steps are appended to.
    pub g: &'g mut Graph,
    needed: HashSet<Val>,
    contributions: HashMap<Val, Vec<Val>>,
}

impl<'g> Tape<'g> {
    /// A tape that also keeps the gradients of `wanted`.
    pub fn new(g: &'g mut Graph, wanted: &[Val]) -> Self {
        Tape { g, needed: wanted.iter().copied().collect(), contributions: HashMap::new() }
    }

    /// Notes which results of `steps` need a gradient: those computed from parameters and from values that need one.
    pub fn need(&mut self, steps: Range<usize>) {
        for step in &self.g.steps[steps] {
            if step.op.inputs().iter().any(|&v| self.g.is_param(v) || self.needed.contains(&v)) {
                self.needed.extend(step.op.outputs());
            }
        }
    }

    /// `dout` is a gradient of `out`.
    pub fn start(&mut self, out: Val, dout: Val) {
        assert_eq!(self.g.shape(out), self.g.shape(dout), "the gradient of {} has another shape", self.g[out].name);
        self.contributions.entry(out).or_default().push(dout);
    }

    /// Appends the gradients of `steps`, last first.
    pub fn walk(&mut self, steps: Range<usize>) {
        for i in steps.rev() {
            let step = self.g.steps[i].clone();
            self.g.scope(step.scope);
            self.step(step.op);
        }
    }

    /// Takes the sum of what has been contributed to the gradient of `v`.
    pub fn gradient(&mut self, v: Val) -> Option<Val> {
        let list = self.contributions.remove(&v)?;
        list.into_iter().reduce(|a, b| Add::record(self.g, a, b))
    }
}

impl Tape<'_> {
    /// Contributes `dv` to the gradient of `v`.
    fn give(&mut self, v: Val, dv: Val) {
        if self.needed.contains(&v) {
            self.contributions.entry(v).or_default().push(dv);
        }
    }

    /// A new value for the gradient of `v`, and the earlier contributions, which the step that writes it must add.
    fn fresh(&mut self, v: Val) -> (Val, Option<Val>) {
        let add = self.gradient(v);
        let dv = self.g.like(&format!("d {}", self.g[v].name), v);
        self.give(v, dv);
        (dv, add)
    }

    fn fresh_source(&mut self, x: Source) -> (Source, [Option<Val>; 2]) {
        let (a, add_a) = self.fresh(x.a);
        let b = x.b.map(|b| self.fresh(b));
        (Source { a, b: b.map(|b| b.0) }, [add_a, b.and_then(|b| b.1)])
    }

    /// The gradient of a matrix whose columns each have one user, which writes them.
    fn columns(&mut self, (v, col): (Val, usize)) -> (Val, usize) {
        if let Some(list) = self.contributions.get(&v) {
            return (list[0], col);
        }
        (self.fresh(v).0, col)
    }

    fn needs(&self, x: Source) -> bool {
        x.vals().any(|v| self.needed.contains(&v))
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Add(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    self.give(op.a, dy);
                    self.give(op.b, dy);
                }
            }
            Op::Silu(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let (dx, add) = self.fresh(op.x);
                    self.g.push(SiluBackward { dx, dy, x: op.x, add });
                }
            }
            Op::AvgPool(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let (dx, add) = self.fresh(op.x);
                    self.g.push(AvgPoolBackward { dx, dy, add });
                }
            }
            Op::Upsample(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let (dx, add) = self.fresh(op.x);
                    self.g.push(UpsampleBackward { dx, dy, add });
                }
            }
            Op::Embedding(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let (dtable, accumulate) = self.g.grad_of(op.table);
                    self.g.push(EmbeddingBackward { dtable, dy, labels: op.labels, accumulate });
                    self.give(op.x, dy);
                }
            }
            Op::Linear(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let ((dw, accumulate), (db, _)) = (self.g.grad_of(op.w), self.g.grad_of(op.b));
                    self.g.push(LinearBackwardWeight { dw, db, dy, x: op.x, accumulate });
                    if self.needed.contains(&op.x) {
                        let (dx, add) = self.fresh(op.x);
                        self.g.push(LinearBackwardData { dx, dy, w: op.w, add });
                    }
                }
            }
            Op::Conv2d(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let (dw, accumulate) = self.g.grad_of(op.w);
                    let db = op.b.map(|b| self.g.grad_of(b).0);
                    let dshift = op.shift.map(|shift| self.columns(shift));
                    self.g.push(Conv2dBackwardWeight { dw, db, dshift, dy, x: op.x, accumulate, shape: op.shape });
                    if let Some(residual) = op.residual {
                        self.give(residual, dy);
                    }
                    if self.needs(op.x) {
                        let (dx, add) = self.fresh_source(op.x);
                        self.g.push(Conv2dBackwardData { dx, dy, w: op.w, add, shape: op.shape });
                    }
                }
            }
            Op::GroupNorm(op) => {
                if let Some(dy) = self.gradient(op.y) {
                    let ((dgamma, accumulate), (dbeta, _)) = (self.g.grad_of(op.gamma), self.g.grad_of(op.beta));
                    let dscale_shift = op.scale_shift.map(|rows| self.columns(rows));
                    let (dx, add) = self.fresh_source(op.x);
                    self.g.push(GroupNormBackward {
                        dx,
                        dgamma,
                        dbeta,
                        dscale_shift,
                        dy,
                        add,
                        accumulate,
                        forward: op,
                    });
                }
            }
            Op::Attention(op) => {
                if let Some(dout) = self.gradient(op.out) {
                    let (dqkv, add) = self.fresh(op.qkv);
                    assert!(add.is_none(), "attention: qkv has another user");
                    let (qkv, out, lse, shape) = (op.qkv, op.out, op.lse, op.shape);
                    self.g.push(AttentionBackward { dqkv, dout, qkv, out, lse, shape });
                }
            }
            // Constant with respect to every parameter.
            Op::TimestepEmbedding(_) | Op::TimestepDist(_) | Op::QSample(_) => {}
            Op::EmbeddingBackward(_)
            | Op::SiluBackward(_)
            | Op::LinearBackwardData(_)
            | Op::LinearBackwardWeight(_)
            | Op::Conv2dBackwardData(_)
            | Op::Conv2dBackwardWeight(_)
            | Op::GroupNormBackward(_)
            | Op::AttentionBackward(_)
            | Op::AvgPoolBackward(_)
            | Op::UpsampleBackward(_)
            | Op::HybridLoss(_)
            | Op::GradNorm(_)
            | Op::AdamwEma(_)
            | Op::DynamicThreshold(_)
            | Op::PSample(_)
            | Op::VbTerms(_) => panic!("{} has no gradient", op.name()),
        }
    }
}
