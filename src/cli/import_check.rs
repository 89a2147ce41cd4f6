//! What an imported network makes of one noised batch: finite numbers, and noise that it recognises.
//!
//! With images, x_t = √ᾱ x_0 + √(1-ᾱ) eps at several t goes through the network twice, with its attention channels in
//! the stored order and in the other one. The right order predicts eps better; a file read in the wrong one gives noise.

use crate::config::{Config, MeanType, ModelConfig, Precision};
use crate::data::low_res::LowRes;
use crate::data::{self, DataSpec};
use crate::device::{Device, Plan, PlanId};
use crate::diffusion::to_unit;
use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Region, Shape, Source, Val};
use crate::rng;
use crate::schedule::Process;
use crate::unet::{self, ParamVals, Params};
use std::path::Path;

/// Images in the batch, if there are images.
const BATCH: usize = 4;
/// The other order is reported if its error is below this part of the stored order's.
const CLEARLY: f64 = 0.8;

/// A network to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    /// Every setting.
    pub config: &'a Config,
    /// Its tensors.
    pub params: &'a Params,
    /// Images like those it was trained on.
    pub images: Option<&'a Path>,
}

/// What the network is shown: pictures in [-1, 1], their classes, and their small images enlarged.
struct Shown {
    x_0: Vec<f32>,
    labels: Vec<i32>,
    low_res: Vec<f32>,
}

/// A recorded forward pass.
struct Forward {
    id: PlanId,
    x: Val,
    t: Val,
    labels: Option<Val>,
    low_res: Option<Val>,
    out: Val,
    vals: ParamVals,
}

impl Check<'_> {
    /// Runs the check on `device`, in f32, with the tensors that `read` gives by number; returns what was found in a line.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the network's output is not finite; those of `read` and of the images.
    pub fn run(&self, device: Device, mut read: impl FnMut(usize) -> Result<Vec<f32>>) -> Result<String> {
        let m = &self.config.model;
        let levels = m.channel_mult.len();
        let size = if self.images.is_some() { m.image_size } else { 1 << (levels - 1) };
        let batch = if self.images.is_some() { BATCH } else { 1 };
        let mut device = device.with_precision(Precision::F32);
        let stored = self.bind(&mut device, m, size, batch)?;
        for (i, p) in self.params.list.iter().enumerate() {
            device.write(stored.id, stored.vals.get(&p.name), &read(i)?)?;
        }
        let process = Process::from_config(&self.config.diffusion)?;
        let steps: Vec<usize> = (0..batch).map(|i| (2 * i + 1) * process.steps() / (2 * batch)).collect();
        let time: Vec<f32> =
            steps.iter().map(|&t| process.time_value(t, self.config.diffusion.rescale_timesteps)).collect();
        let shown = self.pictures(size, batch)?;
        let x_0 = &shown.x_0;
        let mut eps = vec![0.0; x_0.len()];
        rng::fill_normal(&mut eps, 0, 0, 0, rng::op::NLL);
        let each = x_0.len() / batch;
        let x_t: Vec<f32> = (0..x_0.len())
            .map(|i| {
                let alpha_bar = process.alpha_bar[steps[i / each]];
                (alpha_bar.sqrt() * f64::from(x_0[i]) + (1.0 - alpha_bar).sqrt() * f64::from(eps[i])) as f32
            })
            .collect();
        let out = stored.run(&mut device, &x_t, &time, &shown)?;
        if let Some(bad) = out.iter().find(|x| !x.is_finite()) {
            return Err(Error::NonFinite(format!("the network's output holds {bad}: the file is damaged")));
        }
        let target = match self.config.diffusion.mean_type {
            MeanType::Epsilon => &eps,
            MeanType::XStart if self.images.is_some() => x_0,
            _ => return Ok("a noised batch gives finite numbers".into()),
        };
        let error = self.error(&out, target);
        let Some(images) = self.images else { return Ok("a noised batch gives finite numbers".into()) };
        let other = ModelConfig { use_new_attention_order: !m.use_new_attention_order, ..m.clone() };
        let swapped = self.bind(&mut device, &other, size, batch)?;
        let swapped_error = self.error(&swapped.run(&mut device, &x_t, &time, &shown)?, target);
        if swapped_error < CLEARLY * error {
            eprintln!(
                "warning: the other order of the attention's channels predicts the images of {} better (error {swapped_error:.4} \
                 against {error:.4}): import again with --use-new-attention-order {}",
                images.display(),
                other.use_new_attention_order
            );
        }
        Ok(format!(
            "mean squared error of the prediction on {BATCH} images {error:.4}; with the other order of attention {swapped_error:.4}"
        ))
    }

    fn bind(&self, device: &mut Device, m: &ModelConfig, size: usize, batch: usize) -> Result<Forward> {
        let mut g = Graph::on(device.target());
        let vals = self.params.declare(&mut g);
        let x = g.fixed("x", Shape::new(batch, size, size, m.in_channels), DType::F32, Region::Inputs);
        let t = g.fixed("t", Shape::rows(batch, 1), DType::F32, Region::Inputs);
        let labels = m.num_classes.map(|_| g.fixed("labels", Shape::rows(batch, 1), DType::I32, Region::Inputs));
        let low_res = m.low_res.map(|_| g.fixed("low_res", g.shape(x), DType::F32, Region::Inputs));
        let out = unet::record(&mut g, m, &vals, Source { a: x, b: low_res }, t, labels, None).out;
        g.keep(out);
        let id = device.bind(Plan::new(g, true))?;
        Ok(Forward { id, x, t, labels, low_res, out, vals })
    }

    /// A batch of pictures; grey ones without an image set.
    fn pictures(&self, size: usize, batch: usize) -> Result<Shown> {
        let m = &self.config.model;
        let len = batch * size * size * m.in_channels;
        let Some(path) = self.images else {
            return Ok(Shown { x_0: vec![0.0; len], labels: vec![0; batch], low_res: vec![0.0; len] });
        };
        let mut spec = DataSpec::new(path);
        (spec.image_size, spec.channels, spec.limit) = (Some(size), Some(m.in_channels), Some(batch));
        let set = data::open(&spec)?;
        let x_0: Vec<f32> = set.pixels.iter().cycle().take(len).map(|&b| to_unit(b)).collect();
        let mut low_res = vec![0.0; len];
        if let Some(small) = m.low_res {
            let images = LowRes::of(&set, small);
            let each = low_res.chunks_exact_mut(len / batch).enumerate();
            each.for_each(|(i, out)| images.enlarge(i % set.n, size, out));
        }
        let classes = m.num_classes.unwrap_or(1) as i32;
        let labels = set.labels.unwrap_or_default();
        Ok(Shown { x_0, labels: (0..batch).map(|i| labels.get(i).map_or(0, |l| l % classes)).collect(), low_res })
    }

    /// Mean squared difference of the first channels of `out` from `target`.
    fn error(&self, out: &[f32], target: &[f32]) -> f64 {
        let (c, oc) = (self.config.model.in_channels, self.config.model.out_channels);
        let pixels = out.chunks_exact(oc).zip(target.chunks_exact(c));
        let squares = pixels.flat_map(|(o, t)| o.iter().zip(t).map(|(o, t)| f64::from(o - t).powi(2)));
        squares.sum::<f64>() / target.len() as f64
    }
}

impl Forward {
    fn run(&self, device: &mut Device, x: &[f32], t: &[f32], shown: &Shown) -> Result<Vec<f32>> {
        device.write(self.id, self.x, x)?;
        device.write(self.id, self.t, t)?;
        if let Some(v) = self.labels {
            device.write(self.id, v, &shown.labels)?;
        }
        if let Some(v) = self.low_res {
            device.write(self.id, v, &shown.low_res)?;
        }
        device.run(self.id)?;
        let mut out = vec![0.0; device.plan(self.id).graph.shape(self.out).len()];
        device.read(self.id, self.out, &mut out)?;
        Ok(out)
    }
}
