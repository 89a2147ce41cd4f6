//! What is measured: a training step bound to a device, with weights that are all random.

use super::configs;
use super::load::peak_memory;
use crate::config::Config;
use crate::data::Dataset;
use crate::device::{Device, Plan, PlanId};
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Val};
use crate::ops::Control;
use crate::rng;
use crate::train::{self, plan::TrainVals};
use crate::unet::{Init, Params};

/// The initial weights, with small normal numbers where the reference starts from zeros: for timing only.
pub fn weights(params: &Params, seed: u64) -> Vec<f32> {
    let mut flat = params.init(seed);
    for (k, p) in params.list.iter().enumerate().filter(|(_, p)| p.init == Init::Zeros) {
        let out = &mut flat[p.offset..p.offset + p.len()];
        rng::fill_normal(out, seed, 0, 0, rng::op::PARAM_INIT + k as u32);
        out.iter_mut().for_each(|x| *x *= 0.02);
    }
    flat
}

/// Opens a device of the kind that is measured; each measurement has one of its own.
pub type Open<'a> = &'a dyn Fn() -> Result<Device>;

/// What a measurement takes from its device.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes of the plan: weights, averages, gradients, moments, data, inputs, state and arena.
    pub planned: usize,
    /// Bytes that were free on the GPU before; None on the processor.
    free_before: Option<usize>,
}

impl Memory {
    /// Of `plan` on a device on which nothing of it is yet.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn of(plan: &Plan, device: &Device) -> Result<Self> {
        Ok(Memory { planned: plan.bytes(), free_before: free(device)? })
    }

    /// Bytes held now: on a GPU what is no longer free, on the processor the most the process has held.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn used(&self, device: &Device) -> Result<Option<u64>> {
        Ok(match (self.free_before, free(device)?) {
            (Some(before), Some(now)) => Some(before.saturating_sub(now) as u64),
            _ => peak_memory(),
        })
    }
}

fn free(device: &Device) -> Result<Option<usize>> {
    match device {
        Device::Cpu(_) => Ok(None),
        Device::Cuda(gpu) => gpu.driver().info().map(|info| Some(info.free_bytes)),
    }
}

/// Numbers that the network of `g` computes with.
pub fn precision(g: &Graph) -> &'static str {
    if g.values.iter().any(|v| v.dtype == DType::Bf16) { "bf16" } else { "f32" }
}

/// A training step of a configuration, ready to run again and again.
pub struct TrainingStep {
    /// Where it runs.
    pub device: Device,
    /// The bound plan.
    pub id: PlanId,
    /// What steers it.
    pub vals: TrainVals,
    /// What it takes.
    pub memory: Memory,
    config: Config,
    steps: u32,
}

impl TrainingStep {
    /// Records, plans and binds the step on a device that `open` gives.
    ///
    /// # Errors
    /// Settings that do not fit together, or memory that cannot be had.
    pub fn new(config: &Config, open: Open) -> Result<Self> {
        let images = configs::images(config)?;
        let device = open()?;
        let (plan, vals, params) = train::plan_of(config, images.n, true, device.target())?;
        let mut step = Self::bind(config, &images, plan, vals, &params, device)?;
        step.device.capture(step.id)?;
        Ok(step)
    }

    /// Binds to `device` a `plan`, which may be another list over the values of a training step, and fills its inputs.
    ///
    /// # Errors
    /// Memory that cannot be had.
    pub fn bind(
        config: &Config,
        images: &Dataset,
        plan: Plan,
        vals: TrainVals,
        params: &Params,
        mut device: Device,
    ) -> Result<Self> {
        train::memory::check(config, &device, &plan)?;
        let memory = Memory::of(&plan, &device)?;
        let id = device.bind(plan)?;
        device.write_region(Region::Data, &images.pixels)?;
        let flat = weights(params, config.train.seed);
        device.write_region(Region::Params, &flat)?;
        device.write_region(Region::Ema, &flat.repeat(config.train.ema_rates.len()))?;
        let index: Vec<i32> = (0..config.train.batch_size as i32).collect();
        device.write(id, vals.index, &index)?;
        if let (Some(v), Some(labels)) = (vals.labels, &images.labels) {
            device.write(id, v, &labels[..config.train.batch_size])?;
        }
        Ok(TrainingStep { device, id, vals, memory, config: config.clone(), steps: 0 })
    }

    /// The recorded list.
    pub fn graph(&self) -> &Graph {
        &self.device.plan(self.id).graph
    }

    /// Tells the plan which step this is, as the trainer does.
    fn control(&mut self) -> Result<()> {
        let (hyper, k) = (train::plan::hyper(&self.config), f64::from(self.steps) + 1.0);
        let control = Control {
            seed: self.config.train.seed,
            step: self.steps,
            lr: self.config.train.lr as f32,
            bias1: (1.0 - hyper.beta1.powf(k)) as f32,
            bias2: (1.0 - hyper.beta2.powf(k)) as f32,
            ..Control::default()
        };
        self.steps += 1;
        self.device.write(self.id, self.vals.control, &[control])
    }

    /// One training step; on a GPU it is started, not waited for.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(&mut self) -> Result<()> {
        self.control()?;
        self.device.run(self.id)
    }

    /// One training step whose ops add their times to `seconds`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run_timed(&mut self, seconds: &mut [f64]) -> Result<()> {
        self.control()?;
        self.device.run_timed(self.id, seconds)
    }

    /// Mean loss of the last step's images.
    ///
    /// # Errors
    /// Those of the device.
    pub fn loss(&self) -> Result<f64> {
        Ok(self.read(self.vals.terms.loss)?.iter().map(|&x| f64::from(x)).sum::<f64>()
            / self.config.train.batch_size as f64)
    }

    fn read(&self, v: Val) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.graph().shape(v).len()];
        self.device.read(self.id, v, &mut out)?;
        Ok(out)
    }
}

/// Threads that compute; on a GPU, one that starts the work.
pub fn threads(device: &Device) -> usize {
    match device {
        Device::Cpu(cpu) => cpu.threads(),
        Device::Cuda(_) => 1,
    }
}

/// The network of a configuration in a line.
pub fn describe(config: &Config) -> String {
    let m = &config.model;
    let list = |x: &[usize]| x.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let sizes: Vec<usize> = m.attention_resolutions.iter().map(|f| m.image_size / f).collect();
    let (size, c, width, blocks) = (m.image_size, m.in_channels, m.model_channels, m.num_res_blocks);
    let (mult, attention) = (list(&m.channel_mult), list(&sizes));
    format!("{size} px, {c} channels, width {width}, {blocks} blocks, mult {mult}, attention at {attention}")
}
