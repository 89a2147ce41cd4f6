//! Bits per dimension by the variational bound: L = L_prior + sum over t of L_t (Ho et al. 2020, eq. 5; paper, eq. 4-7).
//!
//! Every term of every image is evaluated once, with noise that is a function of (seed, image, t): the figure does not
//! depend on batch size or threads. A batch of the plan holds any pairs of image and t. Images for which the device has no room
//! come to it in parts, one after the other.

use crate::config::{DiffusionConfig, ModelConfig};
use crate::device::ring::{Page, Ring};
use crate::device::{Device, Plan, PlanId};
use crate::diffusion::{self, Objective};
use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Region, Shape, Target, Val};
use crate::ops::Control;
use crate::ops::q_sample::{Images, Noise, QSample};
use crate::ops::vb_terms::VbTerms;
use crate::schedule::Process;
use crate::unet::{self, Params};
use std::ops::Range;
use std::sync::Arc;

/// How the bound is evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct NllSettings {
    /// Clip the predicted x_0 to [-1, 1], as the reference does by default.
    pub clip: bool,
    /// Pairs of image and t evaluated at the same time.
    pub batch: usize,
    /// Seed of the noise.
    pub seed: u64,
}

/// The bound over a set of images, in bits/dim.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NllReport {
    /// Prior term of each image: KL(q(x_T | x_0) || N(0, 1)).
    pub prior_bpd: Vec<f64>,
    /// Whole bound of each image.
    pub total_bpd: Vec<f64>,
    /// Term of each t, mean over the images; t = 0 is the decoder's.
    pub vb_bpd: Vec<f64>,
    /// Mean squared error of the predicted x_0 at each t.
    pub x_0_mse: Vec<f64>,
    /// Mean squared error of the noise derived from it at each t.
    pub eps_mse: Vec<f64>,
}

/// Mean of `x` and half the width of its 95 % confidence interval (normal approximation; NaN below two values).
pub fn mean_and_interval(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, 1.96 * (variance / n).sqrt())
}

/// A plan of noising, network and terms, bound to a device.
pub struct Nll {
    id: PlanId,
    vals: Vals,
    /// Images to evaluate, and how many of them lie on the device at a time.
    images: usize,
    resident: usize,
    /// Bytes of an image.
    image: usize,
    batch: usize,
    classes: Option<usize>,
    process: Arc<Process>,
    rescale: bool,
    seed: u64,
}

/// The values that the plan is steered and read by.
struct Vals {
    index: Val,
    t: Val,
    time: Val,
    labels: Option<Val>,
    control: Val,
    /// vb, and the squared errors of x_0 and eps.
    terms: [Val; 3],
}

/// Terms of one image at one t: vb in bits/dim, squared errors of x_0 and of eps.
pub type Terms = [f32; 3];

/// How far an evaluation is, for progress bars and for keeping what is done.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation<'a> {
    /// The terms that came last, in order: all t of one image, then those of the next.
    pub new: &'a [Terms],
    /// Terms done, these included.
    pub done: usize,
    /// Terms of all images.
    pub total: usize,
}

/// Images to evaluate: bytes (n, h, w, c), and classes where the model has them.
#[derive(Clone, Copy, Debug)]
pub struct Evaluated<'a> {
    /// The pixels of all images.
    pub pixels: &'a [u8],
    /// Class of each image.
    pub labels: Option<&'a [i32]>,
}

impl Nll {
    /// Binds the plan for `images` images of the model's size to `device`: for all of them at a time, or as many as there is room for.
    ///
    /// # Errors
    /// When the process cannot be, or memory cannot be had.
    pub fn new(
        device: &mut Device,
        model: &ModelConfig,
        diffusion: &DiffusionConfig,
        params: &Params,
        images: usize,
        settings: &NllSettings,
    ) -> Result<Self> {
        if settings.batch == 0 {
            return Err(Error::Config("batch_size 0: the evaluation needs a batch of at least 1".into()));
        }
        if model.low_res.is_some() {
            return Err(Error::Config("bits/dim of a model of super-resolution are not defined here".into()));
        }
        let process = Arc::new(Process::from_config(diffusion)?);
        let target = device.target();
        let record = |resident: usize, batch: usize| {
            let settings = NllSettings { batch, ..settings.clone() };
            let (g, vals) = record(model, diffusion, params, resident, &settings, &process, target);
            (Plan::new(g, true), vals)
        };
        let (mut resident, (mut plan, mut vals)) = (images, record(images, settings.batch));
        let image = model.image_size * model.image_size * model.in_channels;
        if !device.room(&plan)?.is_enough() {
            let room = device.room(&record(1, settings.batch).0)?;
            resident = (1 + room.free.map_or(0, |free| free.saturating_sub(room.need)) / image).min(images);
            (plan, vals) = record(resident, settings.batch);
        }
        let smaller = |n| Ok(record(1, n).0);
        device.check_room("the evaluation", &plan, ("--batch-size", settings.batch), smaller)?;
        let id = device.bind(plan)?;
        device.capture(id)?;
        let (batch, classes, rescale, seed) =
            (settings.batch, model.num_classes, diffusion.rescale_timesteps, settings.seed);
        Ok(Nll { id, vals, images, resident, image, batch, classes, process, rescale, seed })
    }

    /// Images that lie on the device at a time.
    pub fn resident(&self) -> usize {
        self.resident
    }

    /// Terms of all images.
    pub fn terms(&self) -> usize {
        self.images * self.process.steps()
    }

    /// The bound plan, to choose its weights.
    pub fn id(&self) -> PlanId {
        self.id
    }

    /// Evaluates every term of every image but the first ones, which are `known`; `each` is told of those that are done and may end
    /// the run.
    ///
    /// # Errors
    /// Labels that are missing or no class of the model.
    pub fn run(
        &self,
        device: &mut Device,
        images: Evaluated,
        known: &[Terms],
        each: &mut dyn FnMut(Evaluation) -> Result<()>,
    ) -> Result<NllReport> {
        let n = self.images;
        self.check_labels(images, n)?;
        assert_eq!(images.pixels.len(), n * self.image, "bytes of {n} images");
        let steps = self.process.steps();
        let mut report = NllReport {
            prior_bpd: self.priors(images.pixels, n),
            total_bpd: vec![0.0; n],
            vb_bpd: vec![0.0; steps],
            x_0_mse: vec![0.0; steps],
            eps_mse: vec![0.0; steps],
        };
        report.total_bpd.copy_from_slice(&report.prior_bpd);
        assert!(known.len() <= self.terms(), "{} terms of {n} images are known", known.len());
        self.add(&mut report, 0, known);
        let mut ring = Ring::new(device, self.id)?;
        for (part, pixels) in images.pixels.chunks(self.resident * self.image).enumerate() {
            let first = part * self.resident * steps;
            let end = first + pixels.len() / self.image * steps;
            if known.len() >= end {
                continue;
            }
            device.write_region(Region::Data, pixels)?;
            let first = first.max(known.len());
            for batch in (first..end).step_by(self.batch).map(|first| first..end.min(first + self.batch)) {
                if ring.is_full() {
                    self.take(device, &mut ring, &mut report, each)?;
                }
                self.fill(&device.plan(self.id).graph, ring.page(), &batch, images.labels);
                ring.start(device, batch)?;
            }
            while !ring.is_empty() {
                self.take(device, &mut ring, &mut report, each)?;
            }
        }
        Ok(report)
    }

    /// Image and t of the pair `k`: all t of one image follow one another.
    fn pair(&self, k: usize) -> (usize, usize) {
        (k / self.process.steps(), k % self.process.steps())
    }

    /// Writes the inputs of a batch of pairs; one that is not full is filled up with its last.
    fn fill(&self, g: &Graph, page: &mut Page, batch: &Range<usize>, labels: Option<&[i32]>) {
        let pairs = || (batch.start..batch.start + self.batch).map(|k| self.pair(k.min(batch.end - 1)));
        // The first image of those on the device.
        let first = self.pair(batch.start).0 / self.resident * self.resident;
        let mut column = |v: Val, f: &dyn Fn((usize, usize)) -> i32| {
            page.input_mut::<i32>(g, v).iter_mut().zip(pairs()).for_each(|(x, pair)| *x = f(pair));
        };
        column(self.vals.index, &|(image, _)| (image - first) as i32);
        column(self.vals.t, &|(_, t)| t as i32);
        if let (Some(v), Some(labels)) = (self.vals.labels, labels) {
            column(v, &|(image, _)| labels[image]);
        }
        let times = page.input_mut::<f32>(g, self.vals.time).iter_mut().zip(pairs());
        times.for_each(|(x, (_, t))| *x = self.process.time_value(t, self.rescale));
        page.input_mut::<Control>(g, self.vals.control)[0] =
            Control { seed: self.seed, first: first as u32, ..Control::default() };
    }

    /// Waits for the oldest batch in flight and adds its terms.
    fn take(
        &self,
        device: &Device,
        ring: &mut Ring<Range<usize>>,
        report: &mut NllReport,
        each: &mut dyn FnMut(Evaluation) -> Result<()>,
    ) -> Result<()> {
        let Some((batch, page)) = ring.take(true)? else { return Ok(()) };
        let terms = self.vals.terms.map(|v| page.state::<f32>(&device.plan(self.id).graph, v));
        let new: Vec<Terms> = (0..batch.len()).map(|slot| terms.map(|x| x[slot])).collect();
        self.add(report, batch.start, &new);
        each(Evaluation { new: &new, done: batch.end, total: self.terms() })
    }

    /// Adds the terms of the pairs from `first` on.
    fn add(&self, report: &mut NllReport, first: usize, terms: &[Terms]) {
        let n = self.images as f64;
        for (k, terms) in (first..).zip(terms) {
            let ((image, t), [vb, x_0_mse, eps_mse]) = (self.pair(k), terms.map(f64::from));
            report.total_bpd[image] += vb;
            report.vb_bpd[t] += vb / n;
            report.x_0_mse[t] += x_0_mse / n;
            report.eps_mse[t] += eps_mse / n;
        }
    }

    fn priors(&self, pixels: &[u8], n: usize) -> Vec<f64> {
        let image = |bytes: &[u8]| bytes.iter().map(|&b| diffusion::to_unit(b)).collect::<Vec<f32>>();
        pixels.chunks_exact(pixels.len() / n).map(|p| diffusion::prior_bpd(&self.process, &image(p))).collect()
    }

    fn check_labels(&self, images: Evaluated, n: usize) -> Result<()> {
        let Some(classes) = self.classes else { return Ok(()) };
        let Some(labels) = images.labels else {
            return Err(Error::Config(format!("the model has {classes} classes, but the images have no labels")));
        };
        assert_eq!(labels.len(), n, "one label per image");
        match labels.iter().find(|&&y| y < 0 || y as usize >= classes) {
            Some(y) => {
                Err(Error::Config(format!("label {y} of the images is no class of the model, which has {classes}")))
            }
            None => Ok(()),
        }
    }
}

/// Records the evaluation of a batch of pairs out of `images` images on the device.
fn record(
    model: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    images: usize,
    settings: &NllSettings,
    process: &Arc<Process>,
    target: Target,
) -> (Graph, Vals) {
    let mut g = Graph::on(target);
    let weights = params.declare(&mut g);
    let rows = Shape::rows(settings.batch, 1);
    let size = Shape::new(images, model.image_size, model.image_size, model.in_channels);
    let data = g.at("data", size, DType::U8, Region::Data, 0);
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let index = g.fixed("index", rows, DType::I32, Region::Inputs);
    let t = g.fixed("t", rows, DType::I32, Region::Inputs);
    let time = g.fixed("time", rows, DType::F32, Region::Inputs);
    let labels = model.num_classes.map(|_| g.fixed("labels", rows, DType::I32, Region::Inputs));
    let terms = ["vb", "x_0_mse", "eps_mse"].map(|name| g.fixed(name, rows, DType::F32, Region::State));
    let batch = Images { data, index, flip: false, first_image: 0, control };
    let noise = Noise::PerImage;
    let x_t = QSample::record(&mut g, batch.clone(), t, noise, process.clone());
    let out = unet::record(&mut g, model, &weights, x_t.into(), time, labels, None).out;
    let ([vb, x_0_mse, eps_mse], clip) = (terms, settings.clip);
    let (objective, process) = (Objective::from_config(diffusion), process.clone());
    g.scope("bound");
    g.push(VbTerms { vb, x_0_mse, eps_mse, out, images: batch, noise, t, objective, clip, process });
    (g, Vals { index, t, time, labels, control, terms })
}
