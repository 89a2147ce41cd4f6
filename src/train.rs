//! Training: one recorded plan, run once per step; logs, samples and checkpoints around it.
//!
//! [`Trainer`] holds a model in training and takes one step at a time; [`run`] is the whole run. What a step computes
//! depends on the configuration, the data and the number of the step alone, so a run that was saved and resumed
//! continues to the bit.

pub mod log;
pub mod memory;
pub mod plan;
pub mod run;
mod step;
mod stream;

use crate::checkpoint::{Checkpoint, Progress, Slot, Snapshot, StateValue};
use crate::config::Config;
use crate::data::low_res::LowRes;
use crate::data::{Batches, Dataset};
use crate::device::ring::Ring;
use crate::device::{Device, Plan, PlanId};
use crate::error::{Error, Result};
use crate::graph::{DType, Region, Target, Val};
use crate::unet::Params;
use plan::TrainVals;
use step::InFlight;
use stream::Stream;

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
    /// The images, if they do not lie on the device.
    stream: Option<Stream>,
    /// A small image, enlarged.
    image: Vec<f32>,
    /// The plan of the norm of the weights, and the norm.
    norm: (PlanId, Val),
    /// Steps that were started and not yet looked at.
    ring: Ring<InFlight>,
    /// What the step looked at last reported.
    report: Report,
}

/// What a step reports besides its losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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

/// Records the training plan of `config` on `images` images for `target` and gives every value its place.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit together.
pub fn plan_of(config: &Config, images: usize, reuse: bool, target: Target) -> Result<(Plan, TrainVals, Params)> {
    config.validate()?;
    let params = Params::new(&config.model);
    let (graph, vals) = plan::record(config, &params, images, target)?;
    Ok((Plan::new(graph, reuse), vals, params))
}

impl Trainer {
    /// A model at step 0 of `config`, its weights drawn from the seed, all images on the device. With `reuse` off, every value
    /// of the plan has memory of its own.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Data`] for settings and data that do not fit, [`Error::Device`] without memory.
    pub fn new(config: Config, device: Device, data: &Dataset, reuse: bool) -> Result<Self> {
        check_data(&config, data)?;
        let planned = plan_of(&config, data.n, reuse, device.target())?;
        memory::check(&config, &device, &planned.0)?;
        Self::resident(config, device, data, planned)
    }

    /// The same with the images on the host, if that is asked for or the device has no room for them: each batch is gathered and
    /// sent ahead of its step. What a step computes is the same to the bit.
    ///
    /// # Errors
    /// Those of [`Trainer::new`].
    pub fn open(config: Config, device: Device, data: Dataset, stream: bool) -> Result<Self> {
        check_data(&config, &data)?;
        if !stream {
            let planned = plan_of(&config, data.n, true, device.target())?;
            if device.room(&planned.0)?.is_enough() {
                return Self::resident(config, device, &data, planned);
            }
        }
        let planned = plan_of(&config, stream::images(&config), true, device.target())?;
        memory::check(&config, &device, &planned.0)?;
        let mut trainer = Self::bind(config, device, &data, planned)?;
        trainer.stream = Some(Stream::new(&trainer.device, data, trainer.batches.clone())?);
        Ok(trainer)
    }

    fn resident(config: Config, device: Device, data: &Dataset, planned: (Plan, TrainVals, Params)) -> Result<Self> {
        let mut trainer = Self::bind(config, device, data, planned)?;
        trainer.device.write_region(Region::Data, &data.pixels)?;
        Ok(trainer)
    }

    /// Whether the images stay on the host.
    pub fn streams(&self) -> bool {
        self.stream.is_some()
    }

    fn bind(
        config: Config,
        mut device: Device,
        data: &Dataset,
        (plan, vals, params): (Plan, TrainVals, Params),
    ) -> Result<Self> {
        let batches = data.batches(config.train.batch_size, config.train.seed, 0)?;
        let id = device.bind(plan)?;
        let weights = params.init(config.train.seed);
        device.write_region(Region::Params, &weights)?;
        device.write_region(Region::Ema, &weights.repeat(config.train.ema_rates.len()))?;
        let labels = data.labels.clone().unwrap_or_default();
        let hyper = plan::hyper(&config);
        let betas = [hyper.beta1, hyper.beta2];
        let low_res = config.model.low_res.map(|small| LowRes::of(data, small));
        let weights_norm = plan::record_norm(&params, device.target());
        let norm = (device.bind(Plan::new(weights_norm.0, true))?, weights_norm.1);
        for id in [id, norm.0] {
            device.capture(id)?;
        }
        let ring = Ring::new(&mut device, id)?;
        let (stream, image, report) = (None, Vec::new(), Report::default());
        Ok(Trainer {
            config,
            params,
            device,
            step: 0,
            id,
            vals,
            betas,
            batches,
            labels,
            low_res,
            stream,
            image,
            norm,
            ring,
            report,
        })
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
        self.seek(s.progress.position)?;
        self.ring.start_over(&mut self.device)
    }

    /// Everything a checkpoint holds.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a weight is not finite: such weights are never saved.
    pub fn snapshot(&self) -> Result<Snapshot> {
        assert!(self.ring.is_empty(), "steps are in flight: finish them first");
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
    pub fn param_norm(&mut self) -> Result<f64> {
        let (id, v) = self.norm;
        self.device.run(id)?;
        let mut norm = [0.0f32];
        self.device.read(id, v, &mut norm)?;
        Ok(norm[0].into())
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
