//! Kinds 10_adamw_ema and 10_training: the optimiser, and training steps with given t, noise and weights.

use super::Open;
use super::tensors::{compare, image_shape, ints, load, number, read};
use super::unet::{diffusion_config, model_config};
use super::vectors::{self, Tensor, VectorFile};
use iddpm::autograd;
use iddpm::config::{DiffusionConfig, ModelConfig};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion::Objective;
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::Control;
use iddpm::ops::adamw_ema::{AdamwEma, Hyper};
use iddpm::ops::grad_norm::GradNorm;
use iddpm::ops::hybrid_loss::{HybridLoss, LossVals};
use iddpm::ops::q_sample::{Images, Noise, QSample};
use iddpm::schedule::Process;
use iddpm::unet::{self, Params};
use std::collections::BTreeSet;
use std::sync::Arc;

/// One batch as the files give it: bytes and noise (n, c, h, w).
pub struct Batch {
    pub bytes: Tensor,
    pub noise: Tensor,
    pub t: Tensor,
    pub labels: Option<Tensor>,
    pub weight: Option<Tensor>,
}

/// A training step with given t, noise and weights: q_sample, network, loss, backward, and the optimiser if there is one.
pub struct TrainingPlan {
    pub device: Device,
    pub id: PlanId,
    control: Val,
    index: Val,
    data: Val,
    eps: Val,
    t: Val,
    t_model: Val,
    labels: Option<Val>,
    weight: Val,
    pub terms: LossVals,
    norm: Val,
    pub process: Arc<Process>,
    rescale: bool,
}

impl TrainingPlan {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        config: &ModelConfig,
        diffusion: &DiffusionConfig,
        params: &Params,
        batch: &Batch,
        microbatches: usize,
        hyper: Option<Hyper>,
        open: Open,
    ) -> Self {
        let mut device = open();
        let spaced = !diffusion.timestep_respacing.is_empty();
        let base = Process::new(diffusion.noise_schedule, diffusion.diffusion_steps).unwrap();
        let process = Arc::new(if spaced { Process::from_config(diffusion).unwrap() } else { base });
        let mut g = Graph::on(device.target());
        let vals = params.declare(&mut g);
        let s = image_shape(&batch.bytes);
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let index = g.fixed("index", Shape::rows(s.n, 1), DType::I32, Region::Inputs);
        let data = g.at("data", s, DType::U8, Region::Data, 0);
        let eps = g.fixed("eps", s, DType::F32, Region::Inputs);
        let t = g.fixed("t", Shape::rows(s.n, 1), DType::I32, Region::Inputs);
        let t_model = g.fixed("t_model", Shape::rows(s.n, 1), DType::F32, Region::Inputs);
        let weight = g.fixed("weight", Shape::rows(s.n, 1), DType::F32, Region::Inputs);
        let labels = config.num_classes.map(|_| g.fixed("y", Shape::rows(s.n, 1), DType::I32, Region::Inputs));
        let terms = ["loss", "mse", "vb"].map(|name| g.fixed(name, Shape::rows(s.n, 1), DType::F32, Region::State));
        let n = s.n / microbatches;
        for first in (0..s.n).step_by(n) {
            let part = |g: &mut Graph, v: Val| g.rows(v, first, n);
            let images = Images { data, index: part(&mut g, index), flip: false, first_image: first as u32, control };
            let (eps, t, weight) = (part(&mut g, eps), part(&mut g, t), part(&mut g, weight));
            let start = g.steps.len();
            let noise = Noise::Stored(eps);
            let x_t = QSample::record(&mut g, images.clone(), t, noise, process.clone());
            let (t_model, labels) = (part(&mut g, t_model), labels.map(|v| part(&mut g, v)));
            let out = unet::record(&mut g, config, &vals, x_t.into(), t_model, labels, None).out;
            let end = g.steps.len();
            let d_out = g.like("d_out", out);
            let [loss, mse, vb] = terms.map(|v| part(&mut g, v));
            g.push(HybridLoss {
                d_out,
                terms: LossVals { loss, mse, vb },
                out,
                images,
                noise,
                t,
                weight,
                objective: Objective::from_config(diffusion),
                process: process.clone(),
            });
            autograd::backward(&mut g, start..end, out, d_out, &[]);
        }
        let all = |g: &mut Graph, region, rows| g.at("all", Shape::rows(rows, params.len), DType::F32, region, 0);
        let grads = all(&mut g, Region::Grads, 1);
        let norm = GradNorm::record(&mut g, grads);
        if let Some(hyper) = hyper {
            let (m, v) = (all(&mut g, Region::AdamM, 1), all(&mut g, Region::AdamV, 1));
            let ema = Some(all(&mut g, Region::Ema, hyper.ema_rates.len()));
            g.push(AdamwEma { params: vals.all, m, v, ema, copy: None, grads, norm, control, hyper });
        }
        let id = device.bind(Plan::new(g, true)).unwrap();
        let [loss, mse, vb] = terms;
        let terms = LossVals { loss, mse, vb };
        let rescale = diffusion.rescale_timesteps;
        TrainingPlan {
            device,
            id,
            control,
            index,
            data,
            eps,
            t,
            t_model,
            labels,
            weight,
            terms,
            norm,
            process,
            rescale,
        }
    }

    pub fn step(&mut self, batch: &Batch, control: &Control) {
        let (d, id) = (&mut self.device, self.id);
        let n = batch.bytes.shape[0];
        let bytes: Vec<u8> = batch.bytes.channels_last().values.iter().map(|&v| v as u8).collect();
        let time: Vec<f32> = batch.t.indices().iter().map(|&t| self.process.time_value(t, self.rescale)).collect();
        let ones = vec![1.0; n];
        d.write(id, self.control, bytemuck::bytes_of(control)).unwrap();
        d.write(id, self.index, &(0..n as i32).collect::<Vec<_>>()).unwrap();
        d.write(id, self.data, &bytes).unwrap();
        d.write(id, self.eps, &batch.noise.channels_last().f32s()).unwrap();
        d.write(id, self.t, &ints(&batch.t)).unwrap();
        d.write(id, self.t_model, &time).unwrap();
        d.write(id, self.weight, &batch.weight.as_ref().map_or(ones, Tensor::f32s)).unwrap();
        if let (Some(v), Some(labels)) = (self.labels, &batch.labels) {
            d.write(id, v, &ints(labels)).unwrap();
        }
        d.run(id).unwrap();
    }

    pub fn region(&self, region: Region, len: usize) -> Vec<f32> {
        let mut out = vec![0.0; len];
        self.device.read_region(region, &mut out).unwrap();
        out
    }
}

/// What the host writes before optimiser step `k` (from 0).
fn control(k: usize, lr: f64, hyper: &Hyper) -> Control {
    let bias = |beta: f64| (1.0 - beta.powi(k as i32 + 1)) as f32;
    let (bias1, bias2) = (bias(hyper.beta1), bias(hyper.beta2));
    Control { step: k as u32, lr: lr as f32, bias1, bias2, ..Control::default() }
}

/// File 10_adamw_ema: the optimiser and the moving averages.
pub fn adamw_ema(file: &VectorFile, open: Open) {
    for (name, case) in &file.cases {
        let get = |what: &str| file.get(&format!("{name}/{what}"));
        let (p0, grad) = (get("p0").f32s(), get("grad"));
        let rates: Vec<f64> = case["ema_rates"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
        let weight_decay = case["weight_decay"].as_f64().unwrap();
        let hyper = Hyper { weight_decay, ema_rates: rates.clone(), ..Hyper::default() };
        let mut device = open();
        let mut g = Graph::on(device.target());
        let mut all = |region, rows| g.at("all", Shape::rows(rows, p0.len()), DType::F32, region, 0);
        let [params, m, v, grads] = [Region::Params, Region::AdamM, Region::AdamV, Region::Grads].map(|r| all(r, 1));
        let ema = all(Region::Ema, rates.len());
        let control_val = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let norm = GradNorm::record(&mut g, grads);
        g.push(AdamwEma {
            params,
            m,
            v,
            ema: Some(ema),
            copy: None,
            grads,
            norm,
            control: control_val,
            hyper: hyper.clone(),
        });
        device.write_region(Region::Params, &p0).unwrap();
        device.write_region(Region::Ema, &p0.repeat(rates.len())).unwrap();
        let id = device.bind(Plan::new(g, true)).unwrap();
        let mut history = [params, m, v, ema].map(|v| (v, Vec::new()));
        let (lr, anneal) = (case["lr"].as_f64().unwrap(), number(case, "anneal_steps"));
        for k in 0..number(case, "steps") {
            let lr = if anneal == 0 { lr } else { lr * (1.0 - k as f64 / anneal as f64) };
            device.write(id, grads, &grad.sub(k).f32s()).unwrap();
            device.write(id, control_val, bytemuck::bytes_of(&control(k, lr, &hyper))).unwrap();
            device.run(id).unwrap();
            history.iter_mut().for_each(|(v, list)| list.extend(read(&device, id, *v)));
        }
        for (what, (_, values)) in ["p", "m", "v", "ema"].iter().zip(&history) {
            file.compare_f32(&format!("{name}/{what}"), values);
        }
    }
}

/// File 10_training: training steps of the network of another file of the same folder.
pub fn training(file: &VectorFile, open: Open) {
    for case in file.cases.values() {
        let model = format!("{}.safetensors", case["config"].as_str().unwrap());
        let folder = vectors::Folder::open(file.path.parent().unwrap());
        let model = folder.load(&model);
        let config = model_config(&model.settings["config"]);
        let params = Params::new(&config);
        let weights = load(&model, &params, "param/", "");
        let d = case["diffusion"].as_array().unwrap();
        let loss = serde_json::json!({
            "schedule": d[0], "T": d[1], "spec": d[2], "mean": "eps", "var": d[3], "loss_type": d[4], "rescale_timesteps": d[5],
        });
        let diffusion = diffusion_config(&loss);
        // "wd0: 0; wd05: 0.05": the runs and their weight decay.
        for run in file.settings["weight_decay"].as_str().unwrap().split(';') {
            let (name, decay) = run.split_once(':').unwrap();
            let run = (name.trim(), decay.trim().parse().unwrap());
            training_run(file, open, run, &config, &diffusion, &params, &weights, number(case, "steps"));
        }
        for size in microbatch_sizes(file) {
            let batch = training_batch(file, 0);
            let parts = batch.t.values.len() / size;
            let mut plan = TrainingPlan::new(&config, &diffusion, &params, &batch, parts, None, open);
            plan.device.write_region(Region::Params, &weights).unwrap();
            plan.step(&batch, &Control::default());
            let grads = plan.region(Region::Grads, params.len);
            compare(file, &params, &grads, &format!("microbatch{size}/grad/"), "");
        }
    }
}

/// The n of every `microbatch<n>/..` among the names.
fn microbatch_sizes(file: &VectorFile) -> BTreeSet<usize> {
    let size = |name: &String| name.strip_prefix("microbatch")?.split('/').next()?.parse().ok();
    file.names().filter_map(size).collect()
}

fn training_batch(file: &VectorFile, step: usize) -> Batch {
    let at = |name: &str| file.get(name).sub(step);
    Batch { bytes: at("x_start_u8"), noise: at("noise"), t: at("t"), labels: None, weight: Some(at("weight")) }
}

#[allow(clippy::too_many_arguments)]
fn training_run(
    file: &VectorFile,
    open: Open,
    (run, weight_decay): (&str, f64),
    config: &ModelConfig,
    diffusion: &DiffusionConfig,
    params: &Params,
    weights: &[f32],
    steps: usize,
) {
    let rates: Vec<f64> = file.settings["ema_rates"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
    let hyper = Hyper { weight_decay, ema_rates: rates.clone(), ..Hyper::default() };
    let lr = file.settings["lr"].as_f64().unwrap();
    let first = training_batch(file, 0);
    let mut plan = TrainingPlan::new(config, diffusion, params, &first, 1, Some(hyper.clone()), open);
    plan.device.write_region(Region::Params, weights).unwrap();
    plan.device.write_region(Region::Ema, &weights.repeat(rates.len())).unwrap();
    let terms = [("loss", plan.terms.loss), ("mse", plan.terms.mse), ("vb", plan.terms.vb), ("grad_norm", plan.norm)];
    let mut history = terms.map(|(name, v)| (name, v, Vec::new()));
    for step in 0..steps {
        plan.step(&training_batch(file, step), &control(step, lr, &hyper));
        history.iter_mut().for_each(|(_, v, list)| list.extend(read(&plan.device, plan.id, *v)));
        compare(file, params, &plan.region(Region::Grads, params.len), &format!("{run}/grad.{step}/"), "");
    }
    for (name, _, values) in &history {
        file.compare_f32(&format!("{run}/{name}"), values);
    }
    compare(file, params, &plan.region(Region::Params, params.len), &format!("{run}/params/"), "");
    let ema = plan.region(Region::Ema, params.len * rates.len());
    for (rate, row) in rates.iter().zip(ema.chunks(params.len)) {
        compare(file, params, row, &format!("{run}/ema_{rate}/"), "");
    }
}
