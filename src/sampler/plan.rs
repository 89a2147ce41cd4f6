//! The recorded sampling pass: the U-Net on x, the guidance and bounds of its word, one row of the sampler's table.
//!
//! With guidance the network sees every picture twice, first with its label, then with the null class, in one batch of 2n.

use super::SampleSettings;
use crate::config::{DiffusionConfig, ModelConfig};
use crate::device::Plan;
use crate::diffusion::gaussian::Output;
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Shape, Source, Target, Val};
use crate::ops::dynamic_threshold::DynamicThreshold;
use crate::ops::p_sample::PSample;
use crate::schedule::Process;
use crate::unet::{self, Params};
use std::sync::Arc;

/// The values that a pass is steered by and leaves its results in; n pictures, m images that the network sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vals {
    /// x_t, (m, h, w, c).
    pub x: Val,
    /// x as the network reads it, where that is bf16.
    pub copy: Option<Val>,
    /// Predicted x_0, (n, h, w, c).
    pub x_0: Val,
    /// Time values, (m).
    pub time: Val,
    /// Labels, (m).
    pub labels: Option<Val>,
    /// Small images, enlarged, (m, h, w, c).
    pub low_res: Option<Val>,
    /// Seeds, (n, 2).
    pub seeds: Val,
    /// Row of the table.
    pub control: Val,
}

/// Records a pass for `target`.
pub(super) fn record(
    model: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    settings: &SampleSettings,
    process: &Arc<Process>,
    target: Target,
) -> (Graph, Vals) {
    let mut g = Graph::on(target);
    let vals = params.declare(&mut g);
    let seen = settings.batch * settings.copies();
    let (rows, side) = (Shape::rows(seen, 1), model.image_size);
    let size = Shape::new(seen, side, side, model.in_channels);
    let pictures = Shape { n: settings.batch, ..size };
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let seeds = g.fixed("seeds", Shape::rows(settings.batch, 2), DType::I32, Region::Inputs);
    let time = g.fixed("time", rows, DType::F32, Region::Inputs);
    let labels = model.num_classes.map(|_| g.fixed("labels", rows, DType::I32, Region::Inputs));
    let x = g.fixed("x", size, DType::F32, Region::State);
    let x_0 = g.fixed("x_0", pictures, DType::F32, Region::State);
    let copy = g.half.then(|| g.fixed("x bf16", size, DType::Bf16, Region::State));
    let low_res = model.low_res.map(|_| g.fixed("low_res", size, g.float(), Region::Inputs));
    let input = Source { a: copy.unwrap_or(x), b: low_res };
    let out = unet::record(&mut g, model, &vals, input, time, labels, None).out;
    g.scope("sample");
    let mut step = PSample {
        x,
        copy,
        x_0: Some(x_0),
        out,
        seeds,
        noise: None,
        control,
        reverse: settings.reverse,
        output: Output { mean_type: diffusion.mean_type, var_type: diffusion.var_type },
        guidance: settings.guidance,
        clip: settings.clip,
        threshold: None,
        process: process.clone(),
    };
    if let Some(quantile) = settings.dynamic_threshold {
        let threshold = g.fixed("threshold", Shape::rows(settings.batch, 1), DType::F32, Region::State);
        g.push(DynamicThreshold { threshold, quantile, step: step.clone() });
        step.threshold = Some(threshold);
    }
    g.push(step);
    (g, Vals { x, copy, x_0, time, labels, low_res, seeds, control })
}

/// The plan that [`super::Sampler::new`] binds to a device of `target`, for printing.
///
/// # Errors
/// Those of [`SampleSettings::validate`]; when the process of `diffusion` cannot be.
pub fn plan(
    model: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    settings: &SampleSettings,
    target: Target,
) -> Result<Plan> {
    settings.validate()?;
    let process = Arc::new(Process::from_config(diffusion)?);
    Ok(Plan::new(record(model, diffusion, params, settings, &process, target).0, true))
}
