//! Training: one recorded plan, run once per step; logs, samples and checkpoints around it.
//!
//! [`Trainer`] holds a model in training and takes one step at a time; [`run`] is the whole run. What a step computes
//! depends on the configuration, the data and the number of the step alone, so a run that was saved and resumed
//! continues to the bit.

pub mod log;
pub mod plan;
pub mod run;

use crate::checkpoint::{Checkpoint, Progress, Slot, Snapshot, StateValue};
use crate::config::Config;
use crate::data::low_res::LowRes;
use crate::data::{Batches, Dataset};
use crate::device::{Device, Plan, PlanId};
use crate::error::{Error, Result};
use crate::graph::{DType, Region, Val};
use crate::ops::Control;
use crate::rng;
use crate::unet::Params;
use log::{Meter, Terms};
use plan::TrainVals;

/// A model in training.
pub struct Trainer {
    /// Every setting.
    pub config: Config,
    /// The tensors of the model.
    pub params: Params,
    /// Where it is trained; its regions hold weights, moments, averages and the data.
    pub device: Device,
    /// Optimiser steps done.
    pub step: u64,
    id: PlanId,
    vals: TrainVals,
    /// Decay of the two moments of AdamW.
    betas: [f64; 2],
    batches: Batches,
    labels: Vec<i32>,
    /// The small images of the data, in super-resolution.
    pub low_res: Option<LowRes>,
    buffers: Buffers,
}

/// Host copies of what a step writes, allocated once.
struct Buffers {
    labels: Vec<i32>,
    low_res: Vec<f32>,
    t: Vec<i32>,
    weight: Vec<f32>,
    loss: Vec<f32>,
    mse: Vec<f32>,
    vb: Vec<f32>,
    /// The state before the step, so that a failed one can be run again.
    before: Vec<Vec<u8>>,
}

/// What a step reports besides its losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
}

/// The places of `params` in a flat region, for a checkpoint.
pub fn slots(params: &Params) -> Vec<Slot<'_>> {
    params.list.iter().map(|p| Slot { name: &p.name, dims: &p.dims, offset: p.offset }).collect()
}

/// Records the training plan of `config` on `images` images and gives every value its place.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit together.
pub fn plan_of(config: &Config, images: usize, reuse: bool) -> Result<(Plan, TrainVals, Params)> {
    config.validate()?;
    let params = Params::new(&config.model);
    let (graph, vals) = plan::record(config, &params, images)?;
    Ok((Plan::new(graph, reuse), vals, params))
}

impl Trainer {
    /// A model at step 0 of `config`, its weights drawn from the seed. With `reuse` off, every value of the plan has
    /// memory of its own.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Data`] for settings and data that do not fit, [`Error::Device`] without memory.
    pub fn new(config: Config, mut device: Device, data: &Dataset, reuse: bool) -> Result<Self> {
        check_data(&config, data)?;
        let (plan, vals, params) = plan_of(&config, data.n, reuse)?;
        check_memory(plan.bytes())?;
        let batches = data.batches(config.train.batch_size, config.train.seed, 0)?;
        let buffers = Buffers::new(&plan, &vals, config.train.batch_size);
        let id = device.bind(plan)?;
        device.write_region(Region::Data, &data.pixels)?;
        let weights = params.init(config.train.seed);
        device.write_region(Region::Params, &weights)?;
        device.write_region(Region::Ema, &weights.repeat(config.train.ema_rates.len()))?;
        let labels = data.labels.clone().unwrap_or_default();
        let hyper = plan::hyper(&config);
        let betas = [hyper.beta1, hyper.beta2];
        let low_res = config.model.low_res.map(|small| LowRes::of(data, small));
        Ok(Trainer { config, params, device, step: 0, id, vals, betas, batches, labels, low_res, buffers })
    }

    /// Goes on where `checkpoint` was saved. The configuration must be the one it holds but for the number of steps.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it does not fit the model or the data.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let graph = &self.device.plan(self.id).graph;
        let state: Vec<(String, bool, usize)> = self
            .vals
            .state
            .iter()
            .map(|&(name, v)| (name.to_string(), graph[v].dtype == DType::I32, graph.shape(v).len()))
            .collect();
        let s = checkpoint.snapshot(&slots(&self.params), self.params.len, &state)?;
        let (have, want) = (&s.progress.config.data, &self.config.data);
        if !checkpoint.imported() && (have.fingerprint, have.images) != (want.fingerprint, want.images) {
            return Err(Error::checkpoint(
                checkpoint.path(),
                format!(
                    "trained on {} images of {} with fingerprint {:016x}; {} has {} with {:016x}: resume with the same data",
                    have.images, have.source, have.fingerprint, want.source, want.images, want.fingerprint
                ),
            ));
        }
        self.device.write_region(Region::Params, &s.params)?;
        self.device.write_region(Region::Ema, &s.ema)?;
        self.device.write_region(Region::AdamM, &s.adam_m)?;
        self.device.write_region(Region::AdamV, &s.adam_v)?;
        for (value, &(_, v)) in s.state.iter().zip(&self.vals.state) {
            self.device.write(self.id, v, &value.bytes)?;
        }
        self.step = s.progress.step;
        self.batches.position = s.progress.position;
        Ok(())
    }

    /// Everything a checkpoint holds.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a weight is not finite: such weights are never saved.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let len = self.params.len;
        let read = |region, n: usize| {
            let mut flat = vec![0.0f32; n];
            self.device.read_region(region, &mut flat).map(|()| flat)
        };
        let graph = &self.device.plan(self.id).graph;
        let state = self.vals.state.iter().map(|&(name, v)| {
            let mut bytes = vec![0u8; graph[v].bytes()];
            self.device.read(self.id, v, &mut bytes)?;
            Ok(StateValue { name: name.into(), integers: graph[v].dtype == DType::I32, bytes })
        });
        let (step, images) = (self.step, self.images());
        let progress = Progress { step, images, position: self.batches.position, config: self.config.clone() };
        let snapshot = Snapshot {
            progress,
            params: read(Region::Params, len)?,
            ema: read(Region::Ema, len * self.config.train.ema_rates.len())?,
            adam_m: read(Region::AdamM, len)?,
            adam_v: read(Region::AdamV, len)?,
            state: state.collect::<Result<_>>()?,
        };
        for p in &self.params.list {
            let at = p.offset..p.offset + p.len();
            let regions = [&snapshot.params, &snapshot.adam_m, &snapshot.adam_v];
            if let Some(x) = regions.into_iter().flat_map(|r| &r[at.clone()]).find(|x| !x.is_finite()) {
                let what =
                    format!("step {step}: {} holds {x} and is not saved: use a lower --lr or --grad-clip 1", p.name);
                return Err(Error::NonFinite(what));
            }
        }
        Ok(snapshot)
    }

    /// Images trained on.
    pub fn images(&self) -> u64 {
        self.step * self.config.train.batch_size as u64
    }

    /// Steps of the process in use.
    pub fn process_steps(&self) -> usize {
        self.vals.process_steps
    }

    /// The recorded step.
    pub fn plan(&self) -> &Plan {
        self.device.plan(self.id)
    }

    /// Norm of the weights.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn param_norm(&self) -> Result<f64> {
        let mut flat = vec![0.0f32; self.params.len];
        self.device.read_region(Region::Params, &mut flat)?;
        Ok(flat.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt())
    }

    /// Takes one step and adds its losses to `meter`. Allocates nothing but the order of a new epoch.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a loss or the gradient is not finite, naming the step, t and the first operation at
    /// fault; the weights are then as before the step.
    pub fn step(&mut self, meter: &mut Meter) -> Result<Report> {
        let lr = self.config.train.lr_at(self.step);
        self.write_inputs(lr)?;
        let b = &mut self.buffers;
        for (bytes, &(_, v)) in b.before.iter_mut().zip(&self.vals.state) {
            self.device.read(self.id, v, bytes)?;
        }
        self.device.run(self.id)?;
        let mut norm = [0.0f32];
        self.device.read(self.id, self.vals.norm, &mut norm)?;
        self.device.read(self.id, self.vals.t, &mut b.t)?;
        self.device.read(self.id, self.vals.weight, &mut b.weight)?;
        self.device.read(self.id, self.vals.terms.loss, &mut b.loss)?;
        self.device.read(self.id, self.vals.terms.mse, &mut b.mse)?;
        self.device.read(self.id, self.vals.terms.vb, &mut b.vb)?;
        if !norm[0].is_finite() || b.loss.iter().any(|x| !x.is_finite()) {
            return Err(self.explain_non_finite());
        }
        let steps = self.vals.process_steps;
        for i in 0..b.t.len() {
            let terms = Terms { loss: b.loss[i].into(), mse: b.mse[i].into(), vb: b.vb[i].into() };
            meter.add(b.t[i] as usize, steps, b.weight[i].into(), terms);
        }
        self.step += 1;
        Ok(Report { grad_norm: norm[0].into(), lr })
    }

    fn write_inputs(&mut self, lr: f64) -> Result<()> {
        let index = self.batches.next();
        self.device.write(self.id, self.vals.index, index)?;
        if let Some(labels) = self.vals.labels {
            let (p, seed, step) = (self.config.train.label_dropout, self.config.train.seed, self.step as u32);
            for (n, (label, &i)) in self.buffers.labels.iter_mut().zip(index).enumerate() {
                let null = self.config.model.null_label().filter(|_| rng::drops_label(p, seed, n as u32, step));
                *label = null.unwrap_or(self.labels[i as usize]);
            }
            self.device.write(self.id, labels, &self.buffers.labels)?;
        }
        if let (Some(v), Some(low_res)) = (self.vals.low_res, &self.low_res) {
            let size = self.buffers.low_res.len() / index.len();
            for (out, &i) in self.buffers.low_res.chunks_exact_mut(size).zip(index) {
                low_res.enlarge(i as usize, self.config.model.image_size, out);
            }
            self.device.write(self.id, v, &self.buffers.low_res)?;
        }
        let k = self.step as f64 + 1.0;
        let control = Control {
            seed: self.config.train.seed,
            step: u32::try_from(self.step).expect("steps are checked to be below 2^32"),
            lr: lr as f32,
            bias1: (1.0 - self.betas[0].powf(k)) as f32,
            bias2: (1.0 - self.betas[1].powf(k)) as f32,
            ..Control::default()
        };
        self.device.write(self.id, self.vals.control, &[control])
    }

    /// Runs the failed step again from the state before it, to find the first operation at fault.
    fn explain_non_finite(&mut self) -> Error {
        let restored: Result<()> = self
            .vals
            .state
            .iter()
            .zip(&self.buffers.before)
            .try_for_each(|(&(_, v), bytes)| self.device.write(self.id, v, bytes));
        let found = match restored.and_then(|()| self.device.first_non_finite(self.id)) {
            Ok(found) => found,
            Err(e) => return e,
        };
        let graph = &self.device.plan(self.id).graph;
        let place = found.map_or("the gradients together overflow".to_string(), |(i, value)| {
            let step = &graph.steps[i];
            format!("the first bad value is {value}, written by {} of {}", step.op.name(), step.scope)
        });
        let bad = |&i: &usize| !self.buffers.loss[i].is_finite();
        let t: Vec<_> = (0..self.buffers.t.len()).filter(bad).map(|i| self.buffers.t[i].to_string()).collect();
        let t = if t.is_empty() { "none".to_string() } else { t.join(", ") };
        Error::NonFinite(format!(
            "step {}: the loss or its gradient is not finite; t of the images with a bad loss: {t}; {place}. \
             Use a lower --lr or --grad-clip 1, or look at the images of this batch",
            self.step
        ))
    }
}

impl Buffers {
    fn new(plan: &Plan, vals: &TrainVals, batch: usize) -> Self {
        let bytes = |v: Val| vec![0; plan.graph[v].bytes()];
        let floats = || vec![0.0; batch];
        Buffers {
            labels: vec![0; batch],
            low_res: vals.low_res.map_or_else(Vec::new, |v| vec![0.0; plan.graph.shape(v).len()]),
            t: vec![0; batch],
            weight: floats(),
            loss: floats(),
            mse: floats(),
            vb: floats(),
            before: vals.state.iter().map(|&(_, v)| bytes(v)).collect(),
        }
    }
}

/// The images have the size, the channels and the labels that the network was configured for.
///
/// # Errors
/// [`Error::Data`] naming both.
pub fn check_data(config: &Config, data: &Dataset) -> Result<()> {
    let m = &config.model;
    let want = [m.image_size, m.image_size, m.in_channels];
    let have = [data.h, data.w, data.c];
    if want != have {
        return Err(Error::data(
            &data.source.path,
            format!("images are {have:?} (height, width, channels), the network takes {want:?}"),
        ));
    }
    match (m.num_classes, &data.labels) {
        (Some(_), None) => Err(Error::data(
            &data.source.path,
            "no labels, which --class-cond needs: name the files \
             class_name.png or put each class into a folder",
        )),
        (Some(n), Some(_)) if data.classes.len() > n => {
            Err(Error::data(&data.source.path, format!("{} classes, the network has {n}", data.classes.len())))
        }
        _ => Ok(()),
    }
}

/// Refuses a plan that the machine's free memory cannot hold.
///
/// # Errors
/// [`Error::Device`] naming both sizes.
pub fn check_memory(need: usize) -> Result<()> {
    let Some(free) = free_memory() else { return Ok(()) };
    if need > free {
        return Err(Error::Device(format!(
            "training needs {} of memory, {} are free: use a smaller --microbatch or --batch-size",
            log::bytes(need),
            log::bytes(free)
        )));
    }
    Ok(())
}

/// Memory that new allocations can have, where the system tells.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}
