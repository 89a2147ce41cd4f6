//! The convolution's steps in a plan: operands, cost, and the code of each device.

use super::launch::{self, FULL, Types};
use super::{Conv2d, Conv2dBackwardData, Conv2dBackwardWeight};
use crate::device::driver::Ptr;
use crate::error::Result;
use crate::graph::{Graph, Source, Val};
use crate::ops::launch::Launcher;
use crate::ops::view::Cat;
use crate::ops::{Cost, Operation, Views, fast, other_columns};

/// Addresses of both parts of a source.
fn both(m: &Launcher, x: Source) -> [Ptr; 2] {
    [m.ptr(x.a), m.optional(x.b)]
}

/// Address of the first of an op's columns of a matrix, and the elements from one row to the next.
fn columns(m: &Launcher, rows: Option<(Val, usize)>) -> (Ptr, usize) {
    rows.map_or((Ptr::NULL, 0), |(v, col)| (m.ptr(v).offset(col * m.graph[v].dtype.bytes()), m.graph.shape(v).c))
}

impl Conv2d {
    fn types(&self, g: &Graph) -> Result<Types> {
        let acts = self.x.vals().chain([self.y]).chain(self.shift.map(|(v, _)| v)).chain(self.residual);
        Types::of("conv2d", g, acts, Some(self.w), &self.shape)
    }
}

impl Conv2dBackwardData {
    fn types(&self, g: &Graph) -> Result<Types> {
        let acts = self.dx.vals().chain([self.dy]).chain(self.add.into_iter().flatten());
        Types::of("conv2d backward", g, acts, Some(self.w), &self.shape)
    }
}

impl Conv2dBackwardWeight {
    fn types(&self, g: &Graph) -> Result<Types> {
        let acts = self.x.vals().chain([self.dy]).chain(self.dshift.map(|(v, _)| v));
        Types::of("conv2d backward", g, acts, None, &self.shape)
    }
}

impl Operation for Conv2d {
    fn outputs(&self) -> Vec<Val> {
        [self.y].into_iter().chain(self.sums).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        let shift = self.shift.map(|(v, _)| v);
        self.x.vals().chain([self.w]).chain(self.b).chain(shift).chain(self.residual).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let all = Cost::of(self, g, self.shape.flops());
        Cost { read: all.read - other_columns(g, self.shift, self.shape.oc), ..all }
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::conv2d::forward_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let (b, residual) = (self.b.map(|b| m.f32(b)), self.residual.map(|r| Cat::single(m.f32(r), self.shape.oc)));
        let shift = self.shift.map(|(v, col)| m.rows(v, col));
        let (x, w) = (m.cat(self.x), m.f32(self.w));
        let y = m.f32_mut(self.y);
        fast::conv2d::forward(m.isa(), y, x, w, b, shift, residual, &self.shape, m.scratch());
        if let Some(sums) = self.sums {
            self.shape.sums_cpu(m.f32_mut(sums), y);
        }
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.types(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.types(g).map_or(0, |t| launch::weights_workspace(&self.shape, t))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let f = launch::Forward {
            y: m.ptr(self.y),
            x: both(m, self.x),
            w: m.ptr(self.w),
            bias: m.optional(self.b),
            shift: columns(m, self.shift),
            residual: m.optional(self.residual),
            sums: m.optional(self.sums),
        };
        launch::forward(m.driver, &self.shape, self.types(m.graph)?, FULL, &f, m.workspace)
    }
}

impl Operation for Conv2dBackwardData {
    fn outputs(&self) -> Vec<Val> {
        self.dx.vals().collect()
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy, self.w].into_iter().chain(self.add.into_iter().flatten()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, self.shape.flops())
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::conv2d::backward_data_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let dxb: &mut [f32] = self.dx.b.map_or(&mut [], |v| m.f32_mut(v));
        let [add_a, add_b] = self.add.map(|v| v.map(|v| m.f32(v)));
        let (dxa, dy, w) = (m.f32_mut(self.dx.a), m.f32(self.dy), m.f32(self.w));
        fast::conv2d::backward_data(m.isa(), dxa, dxb, dy, w, add_a, add_b, &self.shape, m.scratch());
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.types(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.types(g).map_or(0, |t| launch::weights_workspace(&self.shape, t))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let add = self.add.map(|v| m.optional(v));
        let b = launch::BackwardData { dx: both(m, self.dx), dy: m.ptr(self.dy), w: m.ptr(self.w), add };
        launch::backward_data(m.driver, &self.shape, self.types(m.graph)?, FULL, &b, m.workspace)
    }
}

impl Operation for Conv2dBackwardWeight {
    fn outputs(&self) -> Vec<Val> {
        [self.dw].into_iter().chain(self.db).chain(self.dshift.map(|(v, _)| v)).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        [self.dy].into_iter().chain(self.x.vals()).collect()
    }
    fn cost(&self, g: &Graph) -> Cost {
        let all = Cost::of(self, g, self.shape.flops());
        let sums: f64 = [Some(self.dw), self.db].into_iter().flatten().map(|v| g[v].bytes() as f64).sum();
        let read = all.read + if self.accumulate { sums } else { 0.0 };
        Cost { read, written: all.written - other_columns(g, self.dshift, self.shape.oc), ..all }
    }
    fn scratch(&self, _g: &Graph) -> usize {
        fast::conv2d::backward_weight_scratch(&self.shape)
    }
    fn run_cpu(&self, m: &Views) {
        let (db, dshift) = (self.db.map(|v| m.f32_mut(v)), self.dshift.map(|(v, col)| m.rows_mut(v, col)));
        let (dy, x) = (m.f32(self.dy), m.cat(self.x));
        let dw = m.f32_mut(self.dw);
        fast::conv2d::backward_weight(m.isa(), dw, db, dshift, dy, x, self.accumulate, &self.shape, m.scratch());
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        self.types(g).map(|_| Vec::new())
    }
    fn workspace(&self, g: &Graph) -> usize {
        self.types(g).map_or(0, |t| launch::backward_weight_workspace(&self.shape, t, FULL))
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let b = launch::BackwardWeight {
            dw: m.ptr(self.dw),
            db: m.optional(self.db),
            dshift: columns(m, self.dshift),
            dy: m.ptr(self.dy),
            x: both(m, self.x),
            accumulate: self.accumulate,
        };
        launch::backward_weight(m.driver, &self.shape, self.types(m.graph)?, FULL, &b, m.workspace)
    }
}
