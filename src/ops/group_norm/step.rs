//! The norm's steps in a plan: operands, cost, and the code of each device.

use super::{GroupNorm, GroupNormBackward, GroupNormShape, launch};
use crate::error::Result;
use crate::graph::{Graph, Val};
use crate::ops::launch::Launcher;
use crate::ops::{Cost, Operation, Views, fast, other_columns};

impl GroupNorm {
    fn shape(&self, m: &Views) -> GroupNormShape {
        GroupNormShape { dropout: self.dropout.map(|d| d.at(m)), ..self.shape }
    }

    fn half(&self, g: &Graph) -> Result<bool> {
        let rows = self.scale_shift.map(|(v, _)| v);
        launch::check("group_norm", g, self.x.vals().chain([self.y]).chain(rows), &self.shape)
    }

    /// Bytes of a matrix that do not belong to the columns of its scale and shift.
    fn others(&self, g: &Graph, rows: Option<(Val, usize)>) -> f64 {
        other_columns(g, rows, 2 * self.shape.c())
    }

    fn params(&self) -> impl Iterator<Item = Val> {
        let rows = self.scale_shift.map(|(v, _)| v);
        [self.gamma, self.beta].into_iter().chain(rows).chain(self.dropout.map(|d| d.control))
    }
}

impl Operation for GroupNorm {
    fn outputs(&self) -> Vec<Val> {
        vec![self.y, self.mean, self.rstd]
    }
    fn inputs(&self) -> Vec<Val> {
        let sums = self.sums.iter().flatten().map(|(v, _)| *v);
        self.x.vals().chain(sums).chain(self.params()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let all = Cost::of(self, g, 10.0 * g.shape(self.y).len() as f64);
        Cost { read: all.read - self.others(g, self.scale_shift), ..all }
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::group_norm::forward_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let (y, mean, rstd) = (m.f32_mut(self.y), m.f32_mut(self.mean), m.f32_mut(self.rstd));
        let (gamma, beta) = (m.f32(self.gamma), m.f32(self.beta));
        let rows = self.scale_shift.map(|(v, col)| m.rows(v, col));
        fast::group_norm::forward(
            m.isa(),
            y,
            mean,
            rstd,
            m.cat(self.x),
            gamma,
            beta,
            rows,
            &self.shape(m),
            m.scratch(),
        );
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.half(g).map(|_| Vec::new())
    }
    fn workspace(&self, _g: &Graph) -> usize {
        launch::forward_workspace(self)
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        launch::forward(self, self.half(m.graph)?, m)
    }
}

impl GroupNormBackward {
    fn half(&self, g: &Graph) -> Result<bool> {
        let f = &self.forward;
        let rows = f.scale_shift.into_iter().chain(self.dscale_shift).map(|(v, _)| v);
        let adds = self.add.into_iter().flatten();
        let vals = f.x.vals().chain(self.dx.vals()).chain([self.dy]).chain(adds).chain(rows);
        launch::check("group_norm backward", g, vals, &f.shape)
    }
}

impl Operation for GroupNormBackward {
    fn outputs(&self) -> Vec<Val> {
        self.dx.vals().chain([self.dgamma, self.dbeta]).chain(self.dscale_shift.map(|(v, _)| v)).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        let f = &self.forward;
        let saved = [self.dy, f.mean, f.rstd];
        saved.into_iter().chain(f.x.vals()).chain(f.params()).chain(self.add.into_iter().flatten()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let all = Cost::of(self, g, 30.0 * g.shape(self.dy).len() as f64);
        let others = |rows| self.forward.others(g, rows);
        Cost {
            read: all.read - others(self.forward.scale_shift),
            written: all.written - others(self.dscale_shift),
            ..all
        }
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::group_norm::backward_scratch(&self.forward.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let f = &self.forward;
        let dxb: &mut [f32] = self.dx.b.map_or(&mut [], |v| m.f32_mut(v));
        let [add_a, add_b] = self.add.map(|v| v.map(|v| m.f32(v)));
        fast::group_norm::backward(
            m.isa(),
            m.f32_mut(self.dx.a),
            dxb,
            m.f32_mut(self.dgamma),
            m.f32_mut(self.dbeta),
            self.dscale_shift.map(|(v, col)| m.rows_mut(v, col)),
            m.f32(self.dy),
            m.cat(f.x),
            m.f32(f.mean),
            m.f32(f.rstd),
            m.f32(f.gamma),
            m.f32(f.beta),
            f.scale_shift.map(|(v, col)| m.rows(v, col)),
            add_a,
            add_b,
            self.accumulate,
            &f.shape(m),
            m.scratch(),
        );
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.half(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.half(g).map_or(0, |half| launch::backward_workspace(self, half))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        launch::backward(self, self.half(m.graph)?, m)
    }
}
