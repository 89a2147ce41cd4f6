//! Sampling: a plan of U-Net and reverse step, run once per pass of the sampler over the (respaced) process from t = T-1 down to 0.
//!
//! Every image has a seed of its own, which makes its x_T and all its noise: a picture is the same in any batch, on any
//! number of threads. A walk may also start at a given x_T, or go from images to their noise ([`Sampler::run_from`]).

pub mod latents;
mod plan;

pub use plan::plan;

use crate::config::{DiffusionConfig, ModelConfig};
use crate::data::low_res::LowRes;
use crate::device::{Device, Plan, PlanId};
use crate::error::{Error, Result};
use crate::graph::{Shape, Val};
use crate::ops::Control;
use crate::ops::p_sample::{Pass, Reverse};
use crate::schedule::Process;
use crate::unet::Params;
use plan::Vals;
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
    /// Weight of classifier-free guidance, of a model with a null class: 0 without label, 1 with it, above 1 beyond it.
    pub guidance: Option<f64>,
    /// In place of clipping, each x_0 is bounded by this quantile of its magnitudes and scaled into [-1, 1].
    pub dynamic_threshold: Option<f64>,
}

impl Default for SampleSettings {
    fn default() -> Self {
        SampleSettings { reverse: Reverse::Ancestral, clip: true, batch: 1, guidance: None, dynamic_threshold: None }
    }
}

/// Largest weight of guidance.
const LARGEST_GUIDANCE: f64 = 100.0;

impl SampleSettings {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty batch, and for numbers out of their range: an eta above 1, with which the variance of DDIM may
    /// exceed all there is, a weight of guidance below 0, a quantile that is none.
    pub fn validate(&self) -> Result<()> {
        let within = |flag: &str, value: Option<f64>, low: f64, high: f64| match value {
            Some(x) if !(low..=high).contains(&x) => {
                Err(Error::Config(format!("--{flag} {x}: must lie between {low} and {high}")))
            }
            _ => Ok(()),
        };
        if self.batch == 0 {
            return Err(Error::Config("batch_size 0: sampling needs a batch of at least 1".into()));
        }
        let eta = if let Reverse::Ddim(eta) = self.reverse { Some(eta) } else { None };
        within("eta", eta, 0.0, 1.0)?;
        within("guidance", self.guidance, 0.0, LARGEST_GUIDANCE)?;
        within("dynamic-threshold", self.dynamic_threshold, 0.0, 1.0)
    }

    /// Images that the network sees for each picture.
    fn copies(&self) -> usize {
        if self.guidance.is_some() { 2 } else { 1 }
    }
}

/// Calls of the network that are started before the oldest of them has ended.
const AHEAD: usize = 8;

/// A sampling plan bound to a device.
pub struct Sampler {
    id: PlanId,
    vals: Vals,
    /// The pictures of a batch.
    shape: Shape,
    copies: usize,
    reverse: Reverse,
    classes: Option<usize>,
    null: Option<i32>,
    process: Arc<Process>,
    passes: Vec<Pass>,
    rescale: bool,
}

/// The pictures to make, one entry per picture.
#[derive(Clone, Copy, Debug)]
pub struct Pictures<'a> {
    /// Position of the first among all that are made, if these are a part of them.
    pub first: usize,
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
        self.sampler.read(self.device, self.sampler.vals.x_0, self.pictures)
    }

    /// The present x_t of this batch's pictures.
    pub fn x(&self) -> Result<Vec<f32>> {
        self.sampler.read(self.device, self.sampler.vals.x, self.pictures)
    }
}

impl Sampler {
    /// Binds a sampling plan for the network `model` with tensors `params` to `device`.
    ///
    /// # Errors
    /// Those of [`SampleSettings::validate`]; guidance of a model without a null class; when the process cannot be, or memory cannot be had.
    pub fn new(
        device: &mut Device,
        model: &ModelConfig,
        diffusion: &DiffusionConfig,
        params: &Params,
        settings: &SampleSettings,
    ) -> Result<Self> {
        settings.validate()?;
        let null = model.null_label();
        if let (Some(w), None) = (settings.guidance, null) {
            return Err(Error::Config(format!(
                "--guidance {w}: the model has no null class to be guided away from; train it with --class-cond True \
                 --label-dropout 0.1"
            )));
        }
        let process = Arc::new(Process::from_config(diffusion)?);
        let target = device.target();
        let (g, vals) = plan::record(model, diffusion, params, settings, &process, target);
        let shape = Shape { n: settings.batch, ..g.shape(vals.x) };
        let whole = Plan::new(g, true);
        let smaller = |batch| plan(model, diffusion, params, &SampleSettings { batch, ..settings.clone() }, target);
        device.check_room("sampling", &whole, ("--batch-size", settings.batch), smaller)?;
        let id = device.bind(whole)?;
        device.capture(id)?;
        Ok(Sampler {
            id,
            vals,
            shape,
            copies: settings.copies(),
            reverse: settings.reverse,
            classes: model.num_classes,
            null,
            passes: settings.reverse.passes(process.steps()),
            process,
            rescale: diffusion.rescale_timesteps,
        })
    }

    /// The bound plan, to choose its weights.
    pub fn id(&self) -> PlanId {
        self.id
    }

    /// Pictures made at the same time.
    pub fn batch(&self) -> usize {
        self.shape.n
    }

    /// Values of a picture.
    pub fn picture(&self) -> usize {
        self.shape.len() / self.shape.n
    }

    /// Steps of the process.
    pub fn steps(&self) -> usize {
        self.process.steps()
    }

    /// Calls of the network that a picture takes.
    pub fn calls(&self) -> usize {
        self.passes.len()
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
        self.plain()?;
        assert!(self.reverse != Reverse::DdimReverse, "a walk to noise starts from images");
        self.walk(device, pictures, None, None, each)
    }

    /// Walks from `start` (n, h, w, c) in place of drawn noise: from x_T to pictures, or with [`Reverse::DdimReverse`] from images to
    /// their x_T. Returns where it ends.
    ///
    /// # Errors
    /// Those of [`Self::run`]; another number of values than the pictures have.
    pub fn run_from(
        &self,
        device: &mut Device,
        pictures: Pictures,
        start: &[f32],
        each: &mut dyn FnMut(&Walk) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.plain()?;
        let (have, need) = (start.len(), pictures.seeds.len() * self.picture());
        if have != need {
            let n = pictures.seeds.len();
            return Err(Error::Config(format!("{n} pictures start from {need} values, {have} were given")));
        }
        self.walk(device, pictures, Some(start), None, each)
    }

    /// Refuses a model that cannot do without small images.
    fn plain(&self) -> Result<()> {
        match self.vals.low_res {
            None => Ok(()),
            Some(_) => Err(Error::Config("a model of super-resolution needs small images: give --base-samples".into())),
        }
    }

    /// Enlarges small images: as [`Self::run`], the picture at position i from image i of `low_res`, over again if there are fewer.
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
        let fits = self.vals.low_res.is_some() && low_res.c == self.shape.c && !low_res.is_empty();
        if !fits {
            let (small, c) = (low_res.small, low_res.c);
            let what = format!("{} images of {small}x{small}x{c} cannot be enlarged by this model", low_res.len());
            return Err(Error::Config(what));
        }
        self.walk(device, pictures, None, Some(low_res), each)
    }

    fn walk(
        &self,
        device: &mut Device,
        pictures: Pictures,
        given: Option<&[f32]>,
        low_res: Option<&LowRes>,
        each: &mut dyn FnMut(&Walk) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check_labels(pictures)?;
        let steps = self.steps();
        let total = pictures.seeds.len().div_ceil(self.shape.n) * steps;
        let mut flight = VecDeque::new();
        let mut images = Vec::with_capacity(pictures.seeds.len() * self.picture());
        for (batch, seeds) in pictures.seeds.chunks(self.shape.n).enumerate() {
            let first = batch * self.shape.n;
            let labels = pictures.labels.map(|l| &l[first..first + seeds.len()]);
            let size = self.picture();
            let given = given.map(|x| &x[first * size..][..seeds.len() * size]);
            self.begin(device, Pictures { first, seeds, labels }, given)?;
            let first = pictures.first + first;
            self.write_low_res(device, first, low_res)?;
            let mut done = batch * steps;
            for pass in &self.passes {
                self.pass(device, pass)?;
                // The host runs a little ahead of the device, so that what is told of the walk stays true.
                flight.push_back(device.mark()?);
                if flight.len() > AHEAD {
                    flight.pop_front().map_or(Ok(()), |mark| mark.wait())?;
                }
                if pass.completes {
                    done += 1;
                    each(&Walk { device, sampler: self, pictures: seeds.len(), first, done, total })?;
                }
            }
            images.extend(self.read(device, self.vals.x, seeds.len())?);
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

    /// Writes x_T as it is drawn, seeds and labels of at most a batch of pictures.
    ///
    /// # Errors
    /// Those of the device.
    pub fn start(&self, device: &mut Device, pictures: Pictures) -> Result<()> {
        self.begin(device, pictures, None)
    }

    /// [`Self::start`] with x_T `given` or drawn; a batch that is not full is filled up with its last picture.
    fn begin(
        &self,
        device: &mut Device,
        Pictures { seeds, labels, .. }: Pictures,
        given: Option<&[f32]>,
    ) -> Result<()> {
        let at = |n: usize| n.min(seeds.len() - 1);
        let size = self.picture();
        let mut x = vec![0.0; self.shape.len()];
        let mut words = Vec::with_capacity(2 * self.shape.n);
        for (n, x) in x.chunks_exact_mut(size).enumerate() {
            let seed = seeds[at(n)];
            match given {
                Some(given) => x.copy_from_slice(&given[at(n) * size..][..size]),
                None => latents::draw(x, seed),
            }
            words.extend([seed as u32, (seed >> 32) as u32]);
        }
        let x = x.repeat(self.copies);
        for v in [Some(self.vals.x), self.vals.copy].into_iter().flatten() {
            device.write_f32(self.id, v, &x)?;
        }
        device.write(self.id, self.vals.seeds, &words)?;
        if let (Some(v), Some(labels)) = (self.vals.labels, labels) {
            let with = (0..self.shape.n).map(|n| labels[at(n)]);
            let without = self.null.into_iter().cycle().take((self.copies - 1) * self.shape.n);
            device.write(self.id, v, &with.chain(without).collect::<Vec<i32>>())?;
        }
        Ok(())
    }

    /// Writes the small images of the batch whose first picture is `first`.
    fn write_low_res(&self, device: &mut Device, first: usize, low_res: Option<&LowRes>) -> Result<()> {
        let (Some(v), Some(low_res)) = (self.vals.low_res, low_res) else { return Ok(()) };
        let mut all = vec![0.0; self.shape.len()];
        for (n, out) in all.chunks_exact_mut(self.picture()).enumerate() {
            low_res.enlarge((first + n) % low_res.len(), self.shape.h, out);
        }
        device.write_f32(self.id, v, &all.repeat(self.copies))
    }

    /// One reverse step from `t`, the first half of Heun's; on a GPU it is started, not waited for.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&self, device: &mut Device, t: usize) -> Result<()> {
        self.pass(device, &Pass { t, row: t, completes: true })
    }

    /// One call of the network and the row of the sampler's table that follows.
    fn pass(&self, device: &mut Device, pass: &Pass) -> Result<()> {
        let time = vec![self.process.time_value(pass.t, self.rescale); self.shape.n * self.copies];
        let control = Control { t: pass.row as u32, ..Control::default() };
        device.write(self.id, self.vals.time, &time)?;
        device.write(self.id, self.vals.control, bytemuck::bytes_of(&control))?;
        device.run(self.id)
    }

    /// The first `pictures` pictures of `v`.
    fn read(&self, device: &Device, v: Val, pictures: usize) -> Result<Vec<f32>> {
        let mut all = vec![0.0; device.plan(self.id).graph.shape(v).len()];
        device.read(self.id, v, &mut all)?;
        all.truncate(pictures * self.picture());
        Ok(all)
    }
}
