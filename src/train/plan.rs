//! The recorded training step: choice of t, noising, U-Net, loss, backward, gradient norm, AdamW with its averages.
//!
//! A batch is recorded as its microbatches one after the other; each back-propagates the mean loss of its images, and
//! the gradients add up, as in the reference.

use crate::autograd;
use crate::config::Config;
use crate::diffusion::Objective;
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Shape, Source, Target, Val};
use crate::ops::Control;
use crate::ops::adamw_ema::{AdamwEma, Hyper};
use crate::ops::grad_norm::GradNorm;
use crate::ops::hybrid_loss::{HybridLoss, LossVals};
use crate::ops::q_sample::{Images, Noise, QSample};
use crate::ops::timestep_dist::TimestepDist;
use crate::schedule::Process;
use crate::unet::{self, DropoutRun, ParamVals, Params};
use std::sync::Arc;

/// The values of the plan that the host writes, reads or saves.
#[derive(Clone, Debug)]
pub struct TrainVals {
    /// Seed, step, learning rate: one [`Control`].
    pub control: Val,
    /// Index of each image of the batch in the data, i32.
    pub index: Val,
    /// Label of each image, if the model has classes, i32.
    pub labels: Option<Val>,
    /// Small image of each, enlarged, in super-resolution.
    pub low_res: Option<Val>,
    /// Index of each image's step in the process, i32.
    pub t: Val,
    /// Importance weight of each image.
    pub weight: Val,
    /// Loss of each image and its parts.
    pub terms: LossVals,
    /// Norm of the gradients.
    pub norm: Val,
    /// Steps of the process in use, fewer than T if it is respaced.
    pub process_steps: usize,
    /// What the next step depends on, with its name in a checkpoint.
    pub state: Vec<(&'static str, Val)>,
}

/// Constants of the optimiser of `config`.
pub fn hyper(config: &Config) -> Hyper {
    let t = &config.train;
    let max_norm = (t.grad_clip > 0.0).then_some(t.grad_clip as f32);
    Hyper { weight_decay: t.weight_decay, max_norm, ema_rates: t.ema_rates.clone(), ..Hyper::default() }
}

/// Records one training step on batches out of `images` images, for `target`.
///
/// # Errors
/// [`Error::Config`](crate::error::Error::Config) for a process that cannot be respaced as asked.
pub fn record(config: &Config, params: &Params, images: usize, target: Target) -> Result<(Graph, TrainVals)> {
    let (m, t) = (&config.model, &config.train);
    let process = Arc::new(Process::from_config(&config.diffusion)?);
    let mut g = Graph::on(target);
    g.scope("diffusion");
    let batch = Shape::rows(t.batch_size, 1);
    let control = g.fixed("control", Shape::rows(1, size_of::<Control>() / 4), DType::I32, Region::Inputs);
    let index = g.fixed("index", batch, DType::I32, Region::Inputs);
    let labels = m.num_classes.map(|_| g.fixed("labels", batch, DType::I32, Region::Inputs));
    let large = Shape::new(t.batch_size, m.image_size, m.image_size, m.in_channels);
    let low_res = m.low_res.map(|_| g.fixed("low_res", large, g.float(), Region::Inputs));
    let mut term = |name| g.fixed(name, batch, DType::F32, Region::State);
    let terms = LossVals { loss: term("loss"), mse: term("mse"), vb: term("vb") };
    let process_steps = process.steps();
    let (sampler, rescale) = (t.schedule_sampler, config.diffusion.rescale_timesteps);
    let dist = TimestepDist::record(&mut g, sampler, terms.loss, control, process.clone(), rescale);
    let data = Shape::new(images, m.image_size, m.image_size, m.in_channels);
    let mut r = Recorder {
        data: g.at("data", data, DType::U8, Region::Data, 0),
        params: params.declare(&mut g),
        g,
        config,
        process,
        dist,
        control,
        index,
        labels,
        low_res,
        terms,
    };
    let mut first = 0;
    for n in t.microbatches() {
        r.microbatch(first, n);
        first += n;
    }
    let norm = r.optimiser(params.len);
    let history = r.dist.history.into_iter().flat_map(|h| [("losses", h.losses), ("counts", h.counts)]);
    let state = [("t", r.dist.t), ("loss", terms.loss)].into_iter().chain(history).collect();
    let vals = TrainVals {
        control,
        index,
        labels,
        low_res,
        t: r.dist.t,
        weight: r.dist.weight,
        terms,
        norm,
        process_steps,
        state,
    };
    Ok((r.g, vals))
}

/// Records the norm of the weights.
pub fn record_norm(params: &Params, target: Target) -> (Graph, Val) {
    let mut g = Graph::on(target);
    g.scope("weights");
    let all = g.at("params", Shape::rows(1, params.len), DType::F32, Region::Params, 0);
    let norm = GradNorm::record(&mut g, all);
    (g, norm)
}

struct Recorder<'a> {
    g: Graph,
    config: &'a Config,
    params: ParamVals,
    process: Arc<Process>,
    dist: TimestepDist,
    data: Val,
    control: Val,
    index: Val,
    labels: Option<Val>,
    low_res: Option<Val>,
    terms: LossVals,
}

impl Recorder<'_> {
    /// Forward and backward of images `first .. first + n` of the batch.
    fn microbatch(&mut self, first: usize, n: usize) {
        let g = &mut self.g;
        g.scope("diffusion");
        let mut rows = |v| g.rows(v, first, n);
        let [index, t, time, weight] = [self.index, self.dist.t, self.dist.time, self.dist.weight].map(&mut rows);
        let terms = LossVals { loss: rows(self.terms.loss), mse: rows(self.terms.mse), vb: rows(self.terms.vb) };
        let (labels, low_res) = (self.labels.map(&mut rows), self.low_res.map(&mut rows));
        let first_image = u32::try_from(first).expect("a batch is checked to be below 65,536");
        let (control, flip) = (self.control, self.config.train.flip);
        let images = Images { data: self.data, index, flip, first_image, control };
        let noise = Noise::Drawn;
        let x_t = QSample::record(g, images.clone(), t, noise, self.process.clone());
        let start = g.steps.len();
        let dropout = Some(DropoutRun { p: self.config.model.dropout, first_image, control });
        let x = Source { a: x_t, b: low_res };
        let net = unet::record(g, &self.config.model, &self.params, x, time, labels, dropout);
        let out = net.out;
        let end = g.steps.len();
        g.scope("diffusion");
        let d_out = g.like("d out", out);
        let objective = Objective::from_config(&self.config.diffusion);
        let process = self.process.clone();
        g.push(HybridLoss { d_out, terms, out, images, noise, t, weight, objective, process });
        if self.config.train.recompute {
            unet::backward_with_recompute(g, &self.params, &net, dropout, start..end, d_out);
        } else {
            autograd::backward(g, start..end, out, d_out, &[]);
        }
    }

    /// Gradient norm and optimiser step; returns the norm.
    fn optimiser(&mut self, len: usize) -> Val {
        let hyper = hyper(self.config);
        let g = &mut self.g;
        g.scope("optimiser");
        let mut flat = |name, rows, region| g.at(name, Shape::rows(rows, len), DType::F32, region, 0);
        let grads = flat("grads", 1, Region::Grads);
        let m = flat("adam_m", 1, Region::AdamM);
        let v = flat("adam_v", 1, Region::AdamV);
        let ema = Some(flat("ema", hyper.ema_rates.len(), Region::Ema));
        let norm = GradNorm::record_guarded(g, grads, self.terms.loss);
        let ParamVals { all: params, compute: copy, .. } = self.params;
        g.push(AdamwEma { params, m, v, ema, copy, grads, norm, control: self.control, hyper });
        norm
    }
}
