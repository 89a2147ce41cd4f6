//! Choice of t for every image of the batch (paper, section 3.3), without the host.
//!
//! First the losses of the previous step enter the history, then t is drawn from its distribution with its importance
//! weight, by [`crate::timestep`]. t: (n) i32, index into the process; time: (n) f32, the value told to the network; weight: (n) f32;
//! losses: (T, 10) f32; counts: (T) i32. All but `control` survive from run to run.
//!
//! Kernel: `kernels/timestep_dist.cu`, one block for any batch and T.

use super::launch::Launcher;
use super::{Cost, Operation, Views};
use crate::args;
use crate::config::TimestepSampler;
use crate::device::driver::{Arg, Ptr};
use crate::error::{Error, Result};
use crate::graph::{ALIGN, DType, Graph, Region, Shape, Val};
use crate::schedule::Process;
use crate::timestep;
use std::sync::Arc;

/// See the module.
#[derive(Clone, Debug)]
pub struct TimestepDist {
    /// Index of each image's step in the process; before the run, those of the previous step.
    pub t: Val,
    /// The same as the network is told it.
    pub time: Val,
    /// Importance weight of each image.
    pub weight: Val,
    /// The loss history, if t is drawn by it.
    pub history: Option<LossHistoryVals>,
    /// Unweighted losses of the previous step.
    pub loss: Val,
    /// Seed and step.
    pub control: Val,
    /// Number of steps, and what the network is told of each.
    pub process: Arc<Process>,
    /// The network is told t·1000/T.
    pub rescale: bool,
}

/// The loss history as values.
#[derive(Clone, Copy, Debug)]
pub struct LossHistoryVals {
    /// The last losses of each t, oldest first.
    pub losses: Val,
    /// Number of losses of each t.
    pub counts: Val,
}

impl TimestepDist {
    /// Appends the choice of t for the images of `loss` (n), where the loss op leaves its result.
    pub fn record(
        g: &mut Graph,
        sampler: TimestepSampler,
        loss: Val,
        control: Val,
        process: Arc<Process>,
        rescale: bool,
    ) -> Self {
        let (rows, steps) = (g.shape(loss), process.steps());
        let mut state = |name: &str, shape, dtype| g.fixed(name, shape, dtype, Region::State);
        let t = state("t", rows, DType::I32);
        let time = state("time", rows, DType::F32);
        let weight = state("weight", rows, DType::F32);
        let history = (sampler == TimestepSampler::LossSecondMoment).then(|| LossHistoryVals {
            losses: state("losses", Shape::rows(steps, timestep::HISTORY), DType::F32),
            counts: state("counts", Shape::rows(steps, 1), DType::I32),
        });
        let op = TimestepDist { t, time, weight, history, loss, control, process, rescale };
        g.push(op.clone());
        op
    }
}

/// Distribution of `kernels/timestep_dist.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DistributionArg {
    n: i32,
    steps: i32,
    kept: i32,
    unused: i32,
    uniform_prob: f64,
}

impl TimestepDist {
    /// Offset of the weights and running sums in the step's memory, behind the times.
    fn work_offset(&self) -> usize {
        (self.process.steps() * 4).next_multiple_of(ALIGN)
    }
}

impl Operation for TimestepDist {
    fn outputs(&self) -> Vec<Val> {
        let history = self.history.map(|h| [h.losses, h.counts]);
        [self.t, self.time, self.weight].into_iter().chain(history.into_iter().flatten()).collect()
    }
    fn inputs(&self) -> Vec<Val> {
        vec![self.loss, self.control]
    }
    fn cost(&self, g: &Graph) -> Cost {
        Cost::of(self, g, 4.0 * self.history.map_or(0.0, |h| g.shape(h.losses).len() as f64))
    }
    fn scratch(&self, _g: &Graph) -> usize {
        if self.history.is_some() { 4 * self.process.steps() } else { 0 }
    }
    fn run_cpu(&self, m: &Views) {
        let control = m.control(self.control);
        let (t, time, weight) = (m.get_mut::<i32>(self.t), m.f32_mut(self.time), m.f32_mut(self.weight));
        let steps = self.process.steps();
        let u = |n: usize| timestep::uniform(control.seed, control.step, n as u32);
        if let Some(h) = self.history {
            let (losses, counts) = (m.f32_mut(h.losses), m.get_mut::<u32>(h.counts));
            if control.step > 0 {
                let last = t.iter().zip(m.f32(self.loss));
                last.for_each(|(&t, &loss)| timestep::push(losses, counts, t as usize, loss));
            }
            let (w, sums) = bytemuck::cast_slice_mut::<f32, f64>(m.scratch()).split_at_mut(steps);
            timestep::weights(losses, counts, timestep::UNIFORM_PROB, w);
            timestep::accumulate(w, sums);
            for (n, (t, weight)) in t.iter_mut().zip(weight).enumerate() {
                let (drawn, factor) = timestep::pick_weighted(u(n), w, sums);
                (*t, *weight) = (drawn as i32, factor);
            }
        } else {
            t.iter_mut().enumerate().for_each(|(n, t)| *t = timestep::pick_uniform(u(n), steps) as i32);
            weight.fill(1.0);
        }
        for (time, &t) in time.iter_mut().zip(&*t) {
            *time = self.process.time_value(t as usize, self.rescale);
        }
    }
    fn prepare_cuda(&self, g: &Graph) -> Result<Vec<u8>> {
        let (n, steps) = (g.shape(self.t).len(), self.process.steps());
        if n.max(steps) > i32::MAX as usize {
            return Err(Error::Device(format!("{n} images and {steps} steps do not fit in 32 bits")));
        }
        let times: Vec<f32> = (0..steps).map(|t| self.process.time_value(t, self.rescale)).collect();
        let mut bytes = bytemuck::cast_slice(&times).to_vec();
        bytes.resize(self.work_offset() + 2 * 8 * steps, 0);
        Ok(bytes)
    }
    fn launch(&self, m: &Launcher) -> Result<()> {
        let (losses, counts) = self.history.map_or((Ptr::NULL, Ptr::NULL), |h| (m.ptr(h.losses), m.ptr(h.counts)));
        let distribution = DistributionArg {
            n: m.graph.shape(self.t).len() as i32,
            steps: self.process.steps() as i32,
            kept: timestep::HISTORY as i32,
            unused: 0,
            uniform_prob: timestep::UNIFORM_PROB,
        };
        let args = args![
            m.ptr(self.t),
            m.ptr(self.time),
            m.ptr(self.weight),
            losses,
            counts,
            m.ptr(self.loss),
            m.ptr(self.control),
            m.memory,
            m.memory.offset(self.work_offset()),
            Arg::Struct(bytemuck::bytes_of(&distribution)),
        ];
        m.start("timestep_dist", 1, args)
    }
}
