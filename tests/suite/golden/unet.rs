//! Kinds 10_unet and 10_superres: whole networks, every gradient, one training loss.

use super::Open;
use super::tensors::{compare, compare_image, flag, image_shape, ints, load, number, read};
use super::training::{Batch, TrainingPlan};
use super::vectors::{self, VectorFile};
use iddpm::autograd;
use iddpm::config::{DiffusionConfig, FirstStep, LossType, LossWeight, ModelConfig};
use iddpm::data::low_res::bilinear;
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion::Objective;
use iddpm::graph::{DType, Graph, Region, Shape, Source, Target, Val};
use iddpm::ops::Control;
use iddpm::unet::{self, Params};
use serde_json::Value;

/// The network of the settings' `config`, with the defaults the file states.
pub fn model_config(config: &Value) -> ModelConfig {
    let list = |key: &str| -> Vec<usize> {
        config[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
    };
    let heads = config["num_heads"].as_u64().unwrap_or(1) as usize;
    ModelConfig {
        image_size: 0, // the recorded steps take their sizes from x
        in_channels: number(config, "in_channels"),
        out_channels: number(config, "out_channels"),
        model_channels: number(config, "model_channels"),
        num_res_blocks: number(config, "num_res_blocks"),
        channel_mult: list("channel_mult"),
        attention_resolutions: list("attention_resolutions"),
        dropout: config["dropout"].as_f64().unwrap_or(0.0) as f32,
        num_classes: config["num_classes"].as_u64().map(|n| n as usize),
        num_heads: heads,
        num_heads_upsample: config["num_heads_upsample"].as_u64().map_or(heads, |n| n as usize),
        use_scale_shift_norm: flag(config, "use_scale_shift_norm"),
        conv_resample: config["conv_resample"].as_bool().unwrap_or(true),
        ..ModelConfig::default()
    }
}

fn loss_type(name: &str) -> LossType {
    match name {
        "mse" => LossType::Mse,
        "rescaled_mse" => LossType::RescaledMse,
        "kl" => LossType::Kl,
        "rescaled_kl" => LossType::RescaledKl,
        other => panic!("unknown loss {other}"),
    }
}

pub fn diffusion_config(loss: &Value) -> DiffusionConfig {
    let text = |key: &str| loss[key].as_str().unwrap_or_else(|| panic!("{key} of {loss}"));
    DiffusionConfig {
        diffusion_steps: number(loss, "T"),
        noise_schedule: vectors::schedule(loss),
        timestep_respacing: vectors::spec(loss).unwrap_or_default(),
        mean_type: vectors::mean_type(text("mean")),
        var_type: vectors::var_type(text("var")),
        loss_type: loss_type(text("loss_type")),
        rescale_timesteps: flag(loss, "rescale_timesteps"),
        vb_first_step: FirstStep::Nll,
        loss_weight: LossWeight::Uniform,
    }
}
/// Files 10_unet_*: whole networks, every gradient, one training loss.
pub fn unet(file: &VectorFile, open: Open) {
    let config = model_config(&file.settings["config"]);
    let params = Params::new(&config);
    let stored = file.names().filter(|n| n.starts_with("param/")).count();
    assert_eq!(params.list.len(), stored, "{}: number of tensors", file.path.display());
    let weights = load(file, &params, "param/", "");
    unet_forward(file, &config, &params, &weights, open);
    let batch = Batch {
        bytes: file.get("loss/x_start_u8").clone(),
        noise: file.get("loss/noise").clone(),
        t: file.get("loss/t").clone(),
        labels: file.has("loss/y").then(|| file.get("loss/y").clone()),
        weight: None,
    };
    let diffusion = diffusion_config(&file.settings["loss"]);
    let mut run = TrainingPlan::new(&config, &diffusion, &params, &batch, 1, None, open);
    run.device.write_region(Region::Params, &weights).unwrap();
    run.step(&batch, &Control::default());
    // The reference reports the bound term as it enters the loss, we report it in bits/dim.
    let vb_scale = Objective::from_config(&diffusion).vb_scale(run.process.steps()) as f32;
    for (name, v, scale) in [("loss", run.terms.loss, 1.0), ("mse", run.terms.mse, 1.0), ("vb", run.terms.vb, vb_scale)]
    {
        let name = format!("loss/{name}");
        if file.has(&name) {
            let values: Vec<f32> = read(&run.device, run.id, v).iter().map(|x| x * scale).collect();
            file.compare_f32(&name, &values);
        }
    }
    compare(file, &params, &run.region(Region::Grads, params.len), "loss/grad/param/", "");
}

/// File 10_superres: the network with a small image, enlarged, beside x.
pub fn super_resolution(file: &VectorFile, open: Open) {
    let mut config = model_config(&file.settings["config"]);
    config.low_res = Some(*file.get("in/low_res").shape.last().unwrap());
    let params = Params::new(&config);
    unet_forward(file, &config, &params, &load(file, &params, "param/", ""), open);
}

/// The small images of a file, enlarged to the size of x (n, h, w, c).
fn enlarged(file: &VectorFile) -> Vec<f32> {
    let (low, x) = (file.get("in/low_res"), file.get("in/x"));
    let [n, c, h, w] = low.shape[..] else { panic!("low_res has no four dimensions") };
    let (to, pixels) = ([x.shape[2], x.shape[3]], low.channels_last().f32s());
    let mut out = vec![f32::NAN; n * to[0] * to[1] * c];
    for (out, image) in out.chunks_exact_mut(to[0] * to[1] * c).zip(pixels.chunks_exact(h * w * c)) {
        bilinear(out, image, [h, w], to, c);
    }
    compare_image(file, "upsampled", &out);
    out
}

/// The gradient with respect to the small images from that with respect to the enlarged ones: enlarging is linear, so
/// each of its elements is the product of the gradient with an enlarged unit image.
fn compare_small_gradient(file: &VectorFile, grad: &[f32]) {
    let (low, x) = (file.get("in/low_res"), file.get("in/x"));
    let [n, c, h, w] = low.shape[..] else { panic!("low_res has no four dimensions") };
    let to = [x.shape[2], x.shape[3]];
    let each = to[0] * to[1] * c;
    let mut small = vec![0.0f32; n * h * w * c];
    for i in 0..h * w * c {
        let (mut unit, mut large) = (vec![0.0; h * w * c], vec![0.0; each]);
        unit[i] = 1.0;
        bilinear(&mut large, &unit, [h, w], to, c);
        for image in 0..n {
            let product = large.iter().zip(&grad[image * each..]).map(|(a, b)| f64::from(*a) * f64::from(*b));
            small[image * h * w * c + i] = product.sum::<f64>() as f32;
        }
    }
    compare_image(file, "vjp/in/low_res", &small);
}

/// A network forward and backward from a file's inputs.
pub struct UnetRun {
    pub g: Graph,
    /// What is read after a run: outputs, features, gradients of the inputs.
    pub named: Vec<(String, Val)>,
    /// What is written before it.
    pub floats: Vec<(Val, Vec<f32>)>,
    pub labels: Option<(Val, Vec<i32>)>,
}

impl UnetRun {
    pub fn record(file: &VectorFile, config: &ModelConfig, params: &Params, target: Target) -> Self {
        let mut g = Graph::on(target);
        let vals = params.declare(&mut g);
        let (x, cotangent) = (file.get("in/x"), file.get("in/cotangent"));
        let (n, float) = (x.shape[0], g.float());
        let xv = g.fixed("x", image_shape(x), float, Region::Inputs);
        let tv = g.fixed("t", Shape::rows(n, 1), DType::F32, Region::Inputs);
        let yv = config.num_classes.map(|_| g.fixed("y", Shape::rows(n, 1), DType::I32, Region::Inputs));
        let low = config.low_res.map(|_| g.fixed("low_res", image_shape(x), float, Region::Inputs));
        let net = unet::record(&mut g, config, &vals, Source { a: xv, b: low }, tv, yv, None);
        let steps = g.steps.len();
        let dv = g.fixed("cotangent", image_shape(cotangent), float, Region::Inputs);
        let wanted: Vec<Val> = [xv].into_iter().chain(low).collect();
        let grads = autograd::backward(&mut g, 0..steps, net.out, dv, &wanted);
        let mut named = vec![("out".to_string(), net.out), ("emb".into(), net.emb)];
        named.extend(["vjp/in/x", "vjp/low_res"].map(String::from).into_iter().zip(grads.into_iter().flatten()));
        let numbered = |part: &str, list: &[Val]| -> Vec<(String, Val)> {
            list.iter().enumerate().map(|(i, v)| (format!("feat/{part}.{i}"), *v)).collect()
        };
        named.extend(numbered("down", &net.input));
        named.extend(numbered("up", &net.output));
        named.push(("feat/middle".into(), net.middle));
        named.iter().for_each(|(_, v)| g.keep(*v));
        let mut floats = vec![
            (xv, x.channels_last().f32s()),
            (tv, file.get("in/timesteps").f32s()),
            (dv, cotangent.channels_last().f32s()),
        ];
        floats.extend(low.map(|v| (v, enlarged(file))));
        UnetRun { g, named, floats, labels: yv.map(|v| (v, ints(file.get("in/y")))) }
    }

    /// Runs on a device with the flat `weights`; the plan, and the gradients of all parameters.
    pub fn run(&self, device: &mut Device, weights: &[f32]) -> (PlanId, Vec<f32>) {
        device.write_region(Region::Params, weights).unwrap();
        let id = device.bind(Plan::new(self.g.clone(), true)).unwrap();
        self.floats.iter().for_each(|(v, x)| device.write_f32(id, *v, x).unwrap());
        self.labels.iter().for_each(|(v, x)| device.write(id, *v, x).unwrap());
        device.run(id).unwrap();
        let mut grads = vec![f32::NAN; weights.len()];
        device.read_region(Region::Grads, &mut grads).unwrap();
        (id, grads)
    }
}

fn unet_forward(file: &VectorFile, config: &ModelConfig, params: &Params, weights: &[f32], open: Open) {
    let mut device = open();
    let run = UnetRun::record(file, config, params, device.target());
    let (id, grads) = run.run(&mut device, weights);
    for (name, v) in run.named.iter().filter(|(name, _)| file.has(name)) {
        let values = read(&device, id, *v);
        match file.get(name).shape.len() {
            4 => compare_image(file, name, &values),
            _ => file.compare_f32(name, &values),
        }
    }
    if let Some((_, v)) = run.named.iter().find(|(name, _)| name == "vjp/low_res") {
        compare_small_gradient(file, &read(&device, id, *v));
    }
    compare(file, params, &grads, "vjp/param/", "");
}
