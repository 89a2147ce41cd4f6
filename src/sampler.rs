//! Sampling: a plan of U-Net and reverse step, run once per step of the (respaced) process from t = T-1 down to 0.
//!
//! Every image has a seed of its own, which makes its x_T and all its noise: a picture is the same in any batch, on any
//! number of threads.

use crate::config::{DiffusionConfig, ModelConfig};
use crate::data::low_res::LowRes;
use crate::device::{Device, Plan, PlanId};
use crate::diffusion::gaussian::Output;
use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Region, Shape, Source, Target, Val};
use crate::ops::Control;
use crate::ops::p_sample::{PSample, Reverse};
use crate::rng;
use crate::schedule::Process;
use crate::unet::{self, Params};
use std::collections::VecDeque;
use std::sync::Arc;

/// How pictures are made.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSettings {
    /// Kind of reverse step.
    pub reverse: Reverse,
    /// Clip the predicted x_0 to [-1, 1].
    pub clip: bool,
    /// Images made at the same time.
    pub batch: usize,
}

/// Steps that are started before the oldest of them has ended.
const AHEAD: usize = 8;

/// A sampling plan bound to a device.
pub struct Sampler {
    id: PlanId,
    x: Val,
    /// x as the network reads it, where that is bf16.
    copy: Option<Val>,
    x_0: Val,
    time: Val,
    labels: Option<Val>,
    low_res: Option<Val>,
    seeds: Val,
    control: Val,
    shape: Shape,
    classes: Option<usize>,
    process: Arc<Process>,
    rescale: bool,
}

/// The pictures to make, one entry per picture.
#[derive(Clone, Copy, Debug)]
pub struct Pictures<'a> {
    /// Seed of each picture.
    pub seeds: &'a [u64],
    /// Class of each picture, if the model has classes.
    pub labels: Option<&'a [i32]>,
}

/// Where a sampling walk is, for progress bars and denoising strips.
pub struct Walk<'a> {
    device: &'a Device,
    sampler: &'a Sampler,
    /// Pictures of this batch.
    pub pictures: usize,
    /// Position of the batch's first picture among all.
    pub first: usize,
    /// Steps done, counted over all batches.
    pub done: usize,
    /// Steps to do, counted over all batches.
    pub total: usize,
}

impl Walk<'_> {
    /// The present prediction of x_0 of this batch's pictures, (n, h, w, c) in [-1, 1] when clipped.
    pub fn x_0(&self) -> Result<Vec<f32>> {
        self.sampler.read(self.device, self.sampler.x_0, self.pictures)
    }

    /// The present x_t of this batch's pictures.
    pub fn x(&self) -> Result<Vec<f32>> {
        self.sampler.read(self.device, self.sampler.x, self.pictures)
    }
}

/// The values a sampling plan is steered by.
struct Steering {
    x: Val,
    copy: Option<Val>,
    x_0: Val,
    time: Val,
    seeds: Val,
    control: Val,
    labels: Option<Val>,
    low_res: Option<Val>,
}

/// Records the sampling plan for `target`.
fn record(
    model: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    settings: &SampleSettings,
    process: &Arc<Process>,
    target: Target,
) -> (Graph, Steering) {
    let mut g = Graph::on(target);
    let vals = params.declare(&mut g);
    let rows = Shape::rows(settings.batch, 1);
    let size = Shape::new(settings.batch, model.image_size, model.image_size, model.in_channels);
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let seeds = g.fixed("seeds", Shape::rows(settings.batch, 2), DType::I32, Region::Inputs);
    let time = g.fixed("time", rows, DType::F32, Region::Inputs);
    let labels = model.num_classes.map(|_| g.fixed("labels", rows, DType::I32, Region::Inputs));
    let x = g.fixed("x", size, DType::F32, Region::State);
    let x_0 = g.fixed("x_0", size, DType::F32, Region::State);
    let copy = g.half.then(|| g.fixed("x bf16", size, DType::Bf16, Region::State));
    let low_res = model.low_res.map(|_| g.fixed("low_res", size, g.float(), Region::Inputs));
    let input = Source { a: copy.unwrap_or(x), b: low_res };
    let out = unet::record(&mut g, model, &vals, input, time, labels, None).out;
    g.scope("sample");
    let output = Output { mean_type: diffusion.mean_type, var_type: diffusion.var_type };
    let (reverse, clip, process) = (settings.reverse, settings.clip, process.clone());
    g.push(PSample { x, copy, x_0: Some(x_0), out, seeds, noise: None, control, reverse, output, clip, process });
    (g, Steering { x, copy, x_0, time, seeds, control, labels, low_res })
}

/// The plan that [`Sampler::new`] binds to a device of `target`, for printing.
///
/// # Errors
/// When the process of `diffusion` cannot be.
pub fn plan(
    model: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    settings: &SampleSettings,
    target: Target,
) -> Result<Plan> {
    let process = Arc::new(Process::from_config(diffusion)?);
    Ok(Plan::new(record(model, diffusion, params, settings, &process, target).0, true))
}

impl Sampler {
    /// Binds a sampling plan for the network `model` with tensors `params` to `device`.
    ///
    /// # Errors
    /// When the process cannot be, or memory cannot be had.
    pub fn new(
        device: &mut Device,
        model: &ModelConfig,
        diffusion: &DiffusionConfig,
        params: &Params,
        settings: &SampleSettings,
    ) -> Result<Self> {
        if settings.batch == 0 {
            return Err(Error::Config("batch_size 0: sampling needs a batch of at least 1".into()));
        }
        let process = Arc::new(Process::from_config(diffusion)?);
        let (g, s) = record(model, diffusion, params, settings, &process, device.target());
        let Steering { x, copy, x_0, time, seeds, control, labels, low_res } = s;
        let (shape, classes) = (g.shape(x), model.num_classes);
        let (whole, target) = (Plan::new(g, true), device.target());
        let smaller = |batch| plan(model, diffusion, params, &SampleSettings { batch, ..settings.clone() }, target);
        device.check_room("sampling", &whole, ("--batch-size", settings.batch), smaller)?;
        let id = device.bind(whole)?;
        device.capture(id)?;
        let rescale = diffusion.rescale_timesteps;
        Ok(Sampler { id, x, copy, x_0, time, labels, low_res, seeds, control, shape, classes, process, rescale })
    }

    /// The bound plan, to choose its weights.
    pub fn id(&self) -> PlanId {
        self.id
    }

    /// Steps of the process.
    pub fn steps(&self) -> usize {
        self.process.steps()
    }

    /// Makes the pictures, batch by batch: (n, h, w, c), in [-1, 1] up to what the last step leaves.
    ///
    /// `each` is called after every step; an error of its own ends the walk.
    ///
    /// # Errors
    /// Labels that are missing, superfluous or no class of the model; a model of super-resolution.
    pub fn run(
        &self,
        device: &mut Device,
        pictures: Pictures,
        each: &mut dyn FnMut(&Walk) -> Result<()>,
    ) -> Result<Vec<f32>> {
        if self.low_res.is_some() {
            return Err(Error::Config("a model of super-resolution needs small images: give --base-samples".into()));
        }
        self.walk(device, pictures, None, each)
    }

    /// Enlarges small images: as [`Self::run`], picture i from image i of `low_res`, over again if there are fewer.
    ///
    /// # Errors
    /// Those of [`Self::run`]; a model that enlarges nothing, or small images of another size.
    pub fn enlarge(
        &self,
        device: &mut Device,
        pictures: Pictures,
        low_res: &LowRes,
        each: &mut dyn FnMut(&Walk) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let fits = self.low_res.is_some() && low_res.c == self.shape.c && !low_res.is_empty();
        if !fits {
            let (small, c) = (low_res.small, low_res.c);
            let what = format!("{} images of {small}x{small}x{c} cannot be enlarged by this model", low_res.len());
            return Err(Error::Config(what));
        }
        self.walk(device, pictures, Some(low_res), each)
    }

    fn walk(
        &self,
        device: &mut Device,
        pictures: Pictures,
        low_res: Option<&LowRes>,
        each: &mut dyn FnMut(&Walk) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check_labels(pictures)?;
        let steps = self.steps();
        let total = pictures.seeds.len().div_ceil(self.shape.n) * steps;
        let mut flight = VecDeque::new();
        let mut images = Vec::with_capacity(pictures.seeds.len() * self.shape.len() / self.shape.n);
        for (batch, seeds) in pictures.seeds.chunks(self.shape.n).enumerate() {
            let first = batch * self.shape.n;
            let labels = pictures.labels.map(|l| &l[first..first + seeds.len()]);
            self.start(device, Pictures { seeds, labels })?;
            self.write_low_res(device, first, low_res)?;
            for k in 0..steps {
                self.step(device, steps - 1 - k)?;
                let done = batch * steps + k + 1;
                // The host runs a little ahead of the device, so that what is told of the walk stays true.
                flight.push_back(device.mark()?);
                if flight.len() > AHEAD {
                    flight.pop_front().map_or(Ok(()), |mark| mark.wait())?;
                }
                each(&Walk { device, sampler: self, pictures: seeds.len(), first, done, total })?;
            }
            images.extend(self.read(device, self.x, seeds.len())?);
        }
        Ok(images)
    }

    fn check_labels(&self, pictures: Pictures) -> Result<()> {
        let bad = |what: String| Err(Error::Config(what));
        match (self.classes, pictures.labels) {
            (None, None) => Ok(()),
            (None, Some(_)) => bad("labels were given, but the model has no classes".into()),
            (Some(n), None) => bad(format!("the model has {n} classes: give labels in 0..{n}")),
            (Some(_), Some(l)) if l.len() != pictures.seeds.len() => {
                bad(format!("{} labels were given for {} pictures", l.len(), pictures.seeds.len()))
            }
            (Some(n), Some(l)) => match l.iter().find(|&&y| y < 0 || y as usize >= n) {
                Some(y) => bad(format!("label {y} is no class of the model: its {n} classes are 0..{}", n - 1)),
                None => Ok(()),
            },
        }
    }

    /// Writes x_T, seeds and labels; a batch that is not full is filled up with its last picture.
    ///
    /// # Errors
    /// Those of the device.
    pub fn start(&self, device: &mut Device, Pictures { seeds, labels }: Pictures) -> Result<()> {
        let at = |n: usize| n.min(seeds.len() - 1);
        let size = self.shape.len() / self.shape.n;
        let mut x = vec![0.0; self.shape.len()];
        let mut words = Vec::with_capacity(2 * self.shape.n);
        for (n, x) in x.chunks_exact_mut(size).enumerate() {
            let seed = seeds[at(n)];
            rng::fill_normal(x, seed, 0, 0, rng::op::X_T);
            words.extend([seed as u32, (seed >> 32) as u32]);
        }
        for v in [Some(self.x), self.copy].into_iter().flatten() {
            device.write_f32(self.id, v, &x)?;
        }
        device.write(self.id, self.seeds, &words)?;
        if let (Some(v), Some(labels)) = (self.labels, labels) {
            let all: Vec<i32> = (0..self.shape.n).map(|n| labels[at(n)]).collect();
            device.write(self.id, v, &all)?;
        }
        Ok(())
    }

    /// Writes the small images of the batch whose first picture is `first`.
    fn write_low_res(&self, device: &mut Device, first: usize, low_res: Option<&LowRes>) -> Result<()> {
        let (Some(v), Some(low_res)) = (self.low_res, low_res) else { return Ok(()) };
        let mut all = vec![0.0; self.shape.len()];
        for (n, out) in all.chunks_exact_mut(self.shape.len() / self.shape.n).enumerate() {
            low_res.enlarge((first + n) % low_res.len(), self.shape.h, out);
        }
        device.write_f32(self.id, v, &all)
    }

    /// One reverse step from `t`; on a GPU it is started, not waited for.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&self, device: &mut Device, t: usize) -> Result<()> {
        let time = vec![self.process.time_value(t, self.rescale); self.shape.n];
        device.write(self.id, self.time, &time)?;
        device.write(self.id, self.control, bytemuck::bytes_of(&Control { t: t as u32, ..Control::default() }))?;
        device.run(self.id)
    }

    fn read(&self, device: &Device, v: Val, pictures: usize) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.shape.len()];
        device.read(self.id, v, &mut all)?;
        all.truncate(pictures * self.shape.len() / self.shape.n);
        Ok(all)
    }
}
