//! Kinds 09 and 10: layers, residual blocks, attention, U-Nets, the optimiser and training, as recorded plans on a device.
//!
//! Every check records the same steps the program runs, with the stored parameters, and compares the result and
//! every gradient. Stored tensors are (out, in, kh, kw); ours are (out, kh, kw, in).

use super::vectors::{self, Tensor, VectorFile};
use crate::device::device;
use iddpm::autograd;
use iddpm::config::{DiffusionConfig, FirstStep, LossType, LossWeight, ModelConfig};
use iddpm::data::low_res::bilinear;
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion::Objective;
use iddpm::graph::{DType, Graph, Region, Shape, Source, Val};
use iddpm::ops::Control;
use iddpm::ops::adamw_ema::{AdamwEma, Hyper};
use iddpm::ops::attention::{Attention, QkvOrder};
use iddpm::ops::grad_norm::GradNorm;
use iddpm::ops::group_norm::{GroupNorm, NormOptions};
use iddpm::ops::hybrid_loss::{HybridLoss, LossVals};
use iddpm::ops::q_sample::{Images, Noise, QSample};
use iddpm::ops::silu::Silu;
use iddpm::ops::timestep_embedding::TimestepEmbedding;
use iddpm::schedule::Process;
use iddpm::unet::{self, Init, Layer, Param, ParamVals, Params, Recorder, ResBlock, Resample};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;

/// (out, in, rest..) to (out, rest.., in); vectors and matrices stay.
fn to_ours(t: &Tensor) -> Vec<f32> {
    permute(&t.f32s(), t, true)
}

/// The order of `t` from values in our order.
fn to_theirs(values: &[f32], t: &Tensor) -> Vec<f32> {
    permute(values, t, false)
}

fn permute(values: &[f32], t: &Tensor, forward: bool) -> Vec<f32> {
    if t.shape.len() < 3 {
        return values.to_vec();
    }
    let (inner, rest) = (t.shape[1], t.shape[2..].iter().product::<usize>());
    let mut out = vec![0.0; values.len()];
    for (i, &v) in values.iter().enumerate() {
        let (o, a, b) = if forward {
            (i / (inner * rest), i / rest % inner, i % rest)
        } else {
            (i / (inner * rest), i / inner % rest, i % inner)
        };
        let (da, db) = if forward { (inner, b * inner + a) } else { (rest, b * rest + a) };
        out[o * da * if forward { rest } else { inner } + db] = v;
    }
    out
}

fn image_shape(t: &Tensor) -> Shape {
    Shape::new(t.shape[0], t.shape[2], t.shape[3], t.shape[1])
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// The flat region filled from the tensors `prefix + name`; `strip` is taken off our names first.
fn load(file: &VectorFile, params: &Params, prefix: &str, strip: &str) -> Vec<f32> {
    let mut flat = vec![0.0; params.len];
    for p in &params.list {
        let t = file.get(&format!("{prefix}{}", p.name.strip_prefix(strip).unwrap_or(&p.name)));
        assert_eq!(t.values.len(), p.len(), "{}: {} of {:?}", file.path.display(), p.name, t.shape);
        flat[p.offset..p.offset + p.len()].copy_from_slice(&to_ours(t));
    }
    flat
}

/// Compares each tensor of the flat region with `prefix + name`, where the file has it.
fn compare(file: &VectorFile, params: &Params, flat: &[f32], prefix: &str, strip: &str) {
    for p in &params.list {
        let name = format!("{prefix}{}", p.name.strip_prefix(strip).unwrap_or(&p.name));
        if file.has(&name) {
            file.compare_f32(&name, &to_theirs(&flat[p.offset..p.offset + p.len()], file.get(&name)));
        }
    }
}

fn read(device: &Device, id: PlanId, v: Val) -> Vec<f32> {
    let mut out = vec![f32::NAN; device.plan(id).graph.shape(v).len()];
    device.read(id, v, &mut out).unwrap();
    out
}

/// Compares an image, ours channels last.
fn compare_image(file: &VectorFile, name: &str, values: &[f32]) {
    let t = file.get(name);
    file.compare_f32(name, &channels_first(values, t));
}

fn channels_first(values: &[f32], t: &Tensor) -> Vec<f32> {
    let image = values.len() / t.shape[0];
    let planes = |x: &[f32]| {
        let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        vectors::channels_first(&wide, t.shape[1])
    };
    values.chunks(image).flat_map(|x| f32s(&planes(x))).collect()
}

/// A small plan around one piece of network: inputs, result, gradients of `sum(result · cotangent)`.
struct Piece<'a> {
    file: &'a VectorFile,
    case: &'a str,
    params: Params,
    g: Graph,
    vals: ParamVals,
    inputs: Vec<(String, Val, Vec<f32>)>,
}

impl<'a> Piece<'a> {
    fn new(file: &'a VectorFile, case: &'a str, mut params: Params) -> Self {
        params.place();
        let mut g = Graph::new();
        let vals = params.declare(&mut g);
        Piece { file, case, params, g, vals, inputs: Vec::new() }
    }

    fn tensor(&self, name: &str) -> &'a Tensor {
        self.file.get(&format!("{}/{name}", self.case))
    }

    fn input(&mut self, name: &str, shape: Shape, values: Vec<f32>) -> Val {
        let v = self.g.fixed(name, shape, DType::F32, Region::Inputs);
        self.inputs.push((name.into(), v, values));
        v
    }

    /// An image input, to which the gradient is wanted.
    fn image(&mut self, name: &str) -> Val {
        let t = self.tensor(name);
        let values = t.channels_last().f32s();
        self.input(name, image_shape(t), values)
    }

    /// Runs forward and backward; `flat` says the result is no image. Compares everything the file has.
    fn check(mut self, out: Val) {
        let images = self.tensor("out").shape.len() == 4;
        let order = |t: &Tensor| if images { t.channels_last().f32s() } else { t.f32s() };
        let cotangent = order(self.tensor("cotangent"));
        let shape = self.g.shape(out);
        let steps = self.g.steps.len();
        let dout = self.g.fixed("cotangent", shape, DType::F32, Region::Inputs);
        let wanted: Vec<Val> = self.inputs.iter().map(|i| i.1).collect();
        let grads = autograd::backward(&mut self.g, 0..steps, out, dout, &wanted);
        for v in grads.iter().flatten().chain([&out]) {
            self.g.keep(*v);
        }
        let mut device = device();
        device
            .write_region(Region::Params, &load(self.file, &self.params, &format!("{}/param.", self.case), "m."))
            .unwrap();
        let id = device.bind(Plan::new(self.g, true)).unwrap();
        for (_, v, values) in &self.inputs {
            device.write(id, *v, values).unwrap();
        }
        device.write(id, dout, &cotangent).unwrap();
        device.run(id).unwrap();
        let compare_value = |name: &str, v: Val| {
            let name = format!("{}/{name}", self.case);
            let (values, t) = (read(&device, id, v), self.file.get(&name));
            let values = if t.shape.len() == 4 { channels_first(&values, t) } else { values };
            self.file.compare_f32(&name, &values);
        };
        compare_value("out", out);
        for ((name, ..), grad) in self.inputs.iter().zip(grads) {
            compare_value(&format!("grad/{name}"), grad.expect("the result depends on every input"));
        }
        let mut flat = vec![0.0; self.params.len];
        device
            .read_region(Region::Grads, &mut flat[..if self.params.list.is_empty() { 0 } else { self.params.len }])
            .unwrap();
        compare(self.file, &self.params, &flat, &format!("{}/grad/param.", self.case), "m.");
    }
}

fn no_params() -> Params {
    Params::default()
}

fn layer_params(layer: &Layer) -> Params {
    let mut p = Params::default();
    p.layer("m", layer);
    p
}

fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} of {case}")) as usize
}

fn flag(case: &Value, key: &str) -> bool {
    case[key].as_bool().unwrap_or(false)
}

/// File 09_layers: timestep embedding, normalisation, resampling.
pub fn layers(file: &VectorFile) {
    for (name, case) in &file.cases {
        match name.split('.').next().unwrap() {
            "temb" => temb(file, name, case),
            "gn" => group_norm(file, name, case),
            "up" | "down" => resampling(file, name, case),
            "silu" => {}
            other => file.fail(format!("unknown case {other}")),
        }
    }
    if file.has("silu/out") {
        let mut p = Piece::new(file, "silu", no_params());
        let x = p.tensor("in.x");
        let x = p.input("in.x", Shape::rows(1, x.values.len()), x.f32s());
        let y = Silu::record(&mut p.g, x);
        p.check(y);
    }
}

fn temb(file: &VectorFile, name: &str, case: &Value) {
    let t = file.get(&format!("{name}/t"));
    let mut g = Graph::new();
    let val = g.fixed("t", Shape::rows(t.values.len(), 1), DType::F32, Region::Inputs);
    let y = g.arena("y", Shape::rows(t.values.len(), number(case, "dim")));
    g.keep(y);
    g.push(TimestepEmbedding { y, t: val, max_period: number(case, "max_period") as f32 });
    let mut device = device();
    let id = device.bind(Plan::new(g, true)).unwrap();
    device.write(id, val, &t.f32s()).unwrap();
    device.run(id).unwrap();
    file.compare_f32(&format!("{name}/out"), &read(&device, id, y));
}

fn group_norm(file: &VectorFile, name: &str, case: &Value) {
    assert_eq!(number(case, "groups"), iddpm::ops::group_norm::GROUPS, "{name}: groups");
    let c = number(case, "channels");
    let tensor = |what: &str, init| Param { name: format!("m.{what}"), dims: vec![c], offset: 0, init };
    let list = vec![tensor("weight", Init::Ones), tensor("bias", Init::Zeros)];
    let mut p = Piece::new(file, name, Params { list, len: 0 });
    let x = p.image("in.x");
    let (gamma, beta) = (p.vals.get("m.weight"), p.vals.get("m.bias"));
    let y = GroupNorm::record(&mut p.g, x.into(), gamma, beta, NormOptions::default());
    p.check(y);
}

fn resampling(file: &VectorFile, name: &str, case: &Value) {
    let (c, conv) = (number(case, "channels"), flag(case, "conv"));
    let up = name.starts_with("up");
    let layer = if up { Layer::Upsample { c, conv } } else { Layer::Downsample { c, conv } };
    let mut p = Piece::new(file, name, layer_params(&layer));
    let x = p.image("in.x");
    let projected = x;
    let mut r = Recorder::new(&mut p.g, &p.vals, projected, None);
    let y = r.layer("m", &layer, x.into());
    p.check(y);
}

/// File 09_resblocks: residual blocks and their gradients.
pub fn resblocks(file: &VectorFile) {
    for (name, case) in &file.cases {
        assert_eq!(case["dropout"].as_f64(), Some(0.0), "{name}: dropout");
        let layer = Layer::Res(ResBlock {
            c: number(case, "channels"),
            oc: number(case, "out_channels"),
            emb: number(case, "emb_channels"),
            scale_shift: flag(case, "use_scale_shift_norm"),
            skip_kernel: if flag(case, "use_conv") { 3 } else { 1 },
            resample: Resample::Keep,
            column: 0,
            number: 0,
        });
        let mut p = Piece::new(file, name, layer_params(&layer));
        let x = p.image("in.x");
        let emb = p.tensor("in.emb");
        let emb = p.input("in.emb", Shape::rows(emb.shape[0], emb.shape[1]), emb.f32s());
        let projected = unet::project(&mut p.g, &p.vals, emb);
        let mut r = Recorder::new(&mut p.g, &p.vals, projected, None);
        let y = r.layer("m", &layer, x.into());
        p.check(y);
    }
}

/// File 09_attention: attention blocks and their gradients.
pub fn attention(file: &VectorFile) {
    for (name, case) in &file.cases {
        if name.starts_with("core") {
            attention_core(file, name, case);
            continue;
        }
        let (c, heads) = (number(case, "channels"), number(case, "heads"));
        let layer = Layer::Attention { c, heads, order: QkvOrder::Legacy };
        let mut p = Piece::new(file, name, layer_params(&layer));
        let x = p.image("in.x");
        let mut r = Recorder::new(&mut p.g, &p.vals, x, None);
        let y = r.layer("m", &layer, x.into());
        p.check(y);
    }
}

/// (n, 3d, s) with one head; the values lie channels first, as (n, c, 1, s) images do.
fn attention_core(file: &VectorFile, name: &str, case: &Value) {
    let (d, s) = (number(case, "d"), number(case, "positions"));
    let image = |what: &str| {
        let t = file.get(&format!("{name}/{what}"));
        Tensor { shape: vec![t.shape[0], t.shape[1], 1, t.shape[2]], ..t.clone() }
    };
    let qkv = image("in.qkv");
    let mut g = Graph::new();
    let x = g.fixed("qkv", Shape::new(qkv.shape[0], 1, s, 3 * d), DType::F32, Region::Inputs);
    let out = Attention::record(&mut g, x, 1, QkvOrder::Legacy);
    let shape = g.shape(out);
    let dout = g.fixed("cotangent", shape, DType::F32, Region::Inputs);
    let dx = autograd::backward(&mut g, 0..1, out, dout, &[x])[0].unwrap();
    g.keep(dx);
    g.keep(out);
    let mut device = device();
    let id = device.bind(Plan::new(g, true)).unwrap();
    device.write(id, x, &qkv.channels_last().f32s()).unwrap();
    device.write(id, dout, &image("cotangent").channels_last().f32s()).unwrap();
    device.run(id).unwrap();
    file.compare_f32(&format!("{name}/out"), &channels_first(&read(&device, id, out), &image("out")));
    let grad = channels_first(&read(&device, id, dx), &image("grad/in.qkv"));
    file.compare_f32(&format!("{name}/grad/in.qkv"), &grad);
}

/// The network of the settings' `config`, with the defaults the file states.
fn model_config(config: &Value) -> ModelConfig {
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

fn diffusion_config(loss: &Value) -> DiffusionConfig {
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
pub fn unet(file: &VectorFile) {
    let config = model_config(&file.settings["config"]);
    let params = Params::new(&config);
    let stored = file.names().filter(|n| n.starts_with("param/")).count();
    assert_eq!(params.list.len(), stored, "{}: number of tensors", file.path.display());
    let weights = load(file, &params, "param/", "");
    unet_forward(file, &config, &params, &weights);
    let batch = Batch {
        bytes: file.get("loss/x_start_u8").clone(),
        noise: file.get("loss/noise").clone(),
        t: file.get("loss/t").clone(),
        labels: file.has("loss/y").then(|| file.get("loss/y").clone()),
        weight: None,
    };
    let diffusion = diffusion_config(&file.settings["loss"]);
    let mut run = TrainingPlan::new(&config, &diffusion, &params, &batch, 1, None);
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
pub fn super_resolution(file: &VectorFile) {
    let mut config = model_config(&file.settings["config"]);
    config.low_res = Some(*file.get("in/low_res").shape.last().unwrap());
    let params = Params::new(&config);
    unet_forward(file, &config, &params, &load(file, &params, "param/", ""));
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

fn unet_forward(file: &VectorFile, config: &ModelConfig, params: &Params, weights: &[f32]) {
    let mut g = Graph::new();
    let vals = params.declare(&mut g);
    let (x, cotangent) = (file.get("in/x"), file.get("in/cotangent"));
    let n = x.shape[0];
    let xv = g.fixed("x", image_shape(x), DType::F32, Region::Inputs);
    let tv = g.fixed("t", Shape::rows(n, 1), DType::F32, Region::Inputs);
    let yv = config.num_classes.map(|_| g.fixed("y", Shape::rows(n, 1), DType::I32, Region::Inputs));
    let low = config.low_res.map(|_| g.fixed("low_res", image_shape(x), DType::F32, Region::Inputs));
    let net = unet::record(&mut g, config, &vals, Source { a: xv, b: low }, tv, yv, None);
    let steps = g.steps.len();
    let dv = g.fixed("cotangent", image_shape(cotangent), DType::F32, Region::Inputs);
    let wanted: Vec<Val> = [xv].into_iter().chain(low).collect();
    let dx = autograd::backward(&mut g, 0..steps, net.out, dv, &wanted);
    let (dx, d_low) = (dx[0].unwrap(), dx.get(1).map(|v| v.unwrap()));
    d_low.iter().for_each(|v| g.keep(*v));
    let mut named = vec![("out".to_string(), net.out), ("emb".into(), net.emb), ("vjp/in/x".into(), dx)];
    let numbered = |part: &str, list: &[Val]| -> Vec<(String, Val)> {
        list.iter().enumerate().map(|(i, v)| (format!("feat/{part}.{i}"), *v)).collect()
    };
    named.extend(numbered("down", &net.input));
    named.extend(numbered("up", &net.output));
    named.push(("feat/middle".into(), net.middle));
    named.iter().for_each(|(_, v)| g.keep(*v));
    let mut device = device();
    device.write_region(Region::Params, weights).unwrap();
    let id = device.bind(Plan::new(g, true)).unwrap();
    device.write(id, xv, &x.channels_last().f32s()).unwrap();
    device.write(id, tv, &file.get("in/timesteps").f32s()).unwrap();
    device.write(id, dv, &cotangent.channels_last().f32s()).unwrap();
    if let Some(low) = low {
        device.write(id, low, &enlarged(file)).unwrap();
    }
    if let Some(yv) = yv {
        device.write(id, yv, &ints(file.get("in/y"))).unwrap();
    }
    device.run(id).unwrap();
    for (name, v) in named.iter().filter(|(name, _)| file.has(name)) {
        let values = read(&device, id, *v);
        match file.get(name).shape.len() {
            4 => compare_image(file, name, &values),
            _ => file.compare_f32(name, &values),
        }
    }
    if let Some(d_low) = d_low {
        compare_small_gradient(file, &read(&device, id, d_low));
    }
    let mut grads = vec![0.0; params.len];
    device.read_region(Region::Grads, &mut grads).unwrap();
    compare(file, params, &grads, "vjp/param/", "");
}

fn ints(t: &Tensor) -> Vec<i32> {
    t.values.iter().map(|&v| v as i32).collect()
}

/// One batch as the files give it: bytes and noise (n, c, h, w).
struct Batch {
    bytes: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Option<Tensor>,
    weight: Option<Tensor>,
}

/// A training step with given t, noise and weights: q_sample, network, loss, backward, and the optimiser if there is one.
struct TrainingPlan {
    device: Device,
    id: PlanId,
    control: Val,
    index: Val,
    data: Val,
    eps: Val,
    t: Val,
    t_model: Val,
    labels: Option<Val>,
    weight: Val,
    terms: LossVals,
    norm: Val,
    process: Arc<Process>,
    rescale: bool,
}

impl TrainingPlan {
    fn new(
        config: &ModelConfig,
        diffusion: &DiffusionConfig,
        params: &Params,
        batch: &Batch,
        microbatches: usize,
        hyper: Option<Hyper>,
    ) -> Self {
        let spaced = !diffusion.timestep_respacing.is_empty();
        let base = Process::new(diffusion.noise_schedule, diffusion.diffusion_steps).unwrap();
        let process = Arc::new(if spaced { Process::from_config(diffusion).unwrap() } else { base });
        let mut g = Graph::new();
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
            let shape = g.shape(out);
            let d_out = g.arena("d_out", shape);
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
        let mut device = device();
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

    fn step(&mut self, batch: &Batch, control: &Control) {
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

    fn region(&self, region: Region, len: usize) -> Vec<f32> {
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
pub fn adamw_ema(file: &VectorFile) {
    for (name, case) in &file.cases {
        let get = |what: &str| file.get(&format!("{name}/{what}"));
        let (p0, grad) = (get("p0").f32s(), get("grad"));
        let rates: Vec<f64> = case["ema_rates"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
        let weight_decay = case["weight_decay"].as_f64().unwrap();
        let hyper = Hyper { weight_decay, ema_rates: rates.clone(), ..Hyper::default() };
        let mut g = Graph::new();
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
        let mut device = device();
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
pub fn training(file: &VectorFile) {
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
            training_run(file, run, &config, &diffusion, &params, &weights, number(case, "steps"));
        }
        for size in microbatch_sizes(file) {
            let batch = training_batch(file, 0);
            let parts = batch.t.values.len() / size;
            let mut plan = TrainingPlan::new(&config, &diffusion, &params, &batch, parts, None);
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

fn training_run(
    file: &VectorFile,
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
    let mut plan = TrainingPlan::new(config, diffusion, params, &first, 1, Some(hyper.clone()));
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
