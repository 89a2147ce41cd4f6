//! Kind 09: layers, residual blocks and attention, as recorded plans on a device.
//!
//! Every check records the same steps the program runs, with the stored parameters, and compares the result and every gradient.

use super::Open;
use super::tensors::{channels_first, compare, flag, image_shape, load, number, read};
use super::vectors::{Tensor, VectorFile};
use iddpm::autograd;
use iddpm::device::{Device, Plan};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::attention::{Attention, QkvOrder};
use iddpm::ops::group_norm::{GroupNorm, NormOptions};
use iddpm::ops::silu::Silu;
use iddpm::ops::timestep_embedding::TimestepEmbedding;
use iddpm::unet::{self, Init, Layer, Param, ParamVals, Params, Recorder, ResBlock, Resample};
use serde_json::Value;

/// A small plan around one piece of network: inputs, result, gradients of `sum(result · cotangent)`.
struct Piece<'a> {
    file: &'a VectorFile,
    case: &'a str,
    device: Device,
    params: Params,
    g: Graph,
    vals: ParamVals,
    inputs: Vec<(String, Val, Vec<f32>)>,
}

impl<'a> Piece<'a> {
    fn new(file: &'a VectorFile, case: &'a str, mut params: Params, open: Open) -> Self {
        params.place();
        let device = open();
        let mut g = Graph::on(device.target());
        let vals = params.declare(&mut g);
        Piece { file, case, device, params, g, vals, inputs: Vec::new() }
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
        let mut device = self.device;
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

/// File 09_layers: timestep embedding, normalisation, resampling.
pub fn layers(file: &VectorFile, open: Open) {
    for (name, case) in &file.cases {
        match name.split('.').next().unwrap() {
            "temb" => temb(file, name, case, open),
            "gn" => group_norm(file, name, case, open),
            "up" | "down" => resampling(file, name, case, open),
            "silu" => {}
            other => file.fail(format!("unknown case {other}")),
        }
    }
    if file.has("silu/out") {
        let mut p = Piece::new(file, "silu", no_params(), open);
        let x = p.tensor("in.x");
        let x = p.input("in.x", Shape::rows(1, x.values.len()), x.f32s());
        let y = Silu::record(&mut p.g, x);
        p.check(y);
    }
}

fn temb(file: &VectorFile, name: &str, case: &Value, open: Open) {
    let t = file.get(&format!("{name}/t"));
    let mut device = open();
    let mut g = Graph::on(device.target());
    let val = g.fixed("t", Shape::rows(t.values.len(), 1), DType::F32, Region::Inputs);
    let y = g.arena("y", Shape::rows(t.values.len(), number(case, "dim")));
    g.keep(y);
    g.push(TimestepEmbedding { y, t: val, max_period: number(case, "max_period") as f32 });
    let id = device.bind(Plan::new(g, true)).unwrap();
    device.write(id, val, &t.f32s()).unwrap();
    device.run(id).unwrap();
    file.compare_f32(&format!("{name}/out"), &read(&device, id, y));
}

fn group_norm(file: &VectorFile, name: &str, case: &Value, open: Open) {
    assert_eq!(number(case, "groups"), iddpm::ops::group_norm::GROUPS, "{name}: groups");
    let c = number(case, "channels");
    let tensor = |what: &str, init| Param { name: format!("m.{what}"), dims: vec![c], offset: 0, init };
    let list = vec![tensor("weight", Init::Ones), tensor("bias", Init::Zeros)];
    let mut p = Piece::new(file, name, Params { list, len: 0 }, open);
    let x = p.image("in.x");
    let (gamma, beta) = (p.vals.get("m.weight"), p.vals.get("m.bias"));
    let y = GroupNorm::record(&mut p.g, x.into(), gamma, beta, NormOptions::default());
    p.check(y);
}

fn resampling(file: &VectorFile, name: &str, case: &Value, open: Open) {
    let (c, conv) = (number(case, "channels"), flag(case, "conv"));
    let up = name.starts_with("up");
    let layer = if up { Layer::Upsample { c, conv } } else { Layer::Downsample { c, conv } };
    let mut p = Piece::new(file, name, layer_params(&layer), open);
    let x = p.image("in.x");
    let projected = x;
    let mut r = Recorder::new(&mut p.g, &p.vals, projected, None);
    let y = r.layer("m", &layer, x.into());
    p.check(y);
}

/// File 09_resblocks: residual blocks and their gradients.
pub fn resblocks(file: &VectorFile, open: Open) {
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
        let mut p = Piece::new(file, name, layer_params(&layer), open);
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
pub fn attention(file: &VectorFile, open: Open) {
    for (name, case) in &file.cases {
        if name.starts_with("core") {
            attention_core(file, name, case, open);
            continue;
        }
        let (c, heads) = (number(case, "channels"), number(case, "heads"));
        let layer = Layer::Attention { c, heads, order: QkvOrder::Legacy };
        let mut p = Piece::new(file, name, layer_params(&layer), open);
        let x = p.image("in.x");
        let mut r = Recorder::new(&mut p.g, &p.vals, x, None);
        let y = r.layer("m", &layer, x.into());
        p.check(y);
    }
}

/// (n, 3d, s) with one head; the values lie channels first, as (n, c, 1, s) images do.
fn attention_core(file: &VectorFile, name: &str, case: &Value, open: Open) {
    let (d, s) = (number(case, "d"), number(case, "positions"));
    let image = |what: &str| {
        let t = file.get(&format!("{name}/{what}"));
        Tensor { shape: vec![t.shape[0], t.shape[1], 1, t.shape[2]], ..t.clone() }
    };
    let qkv = image("in.qkv");
    let mut device = open();
    let mut g = Graph::on(device.target());
    let x = g.fixed("qkv", Shape::new(qkv.shape[0], 1, s, 3 * d), DType::F32, Region::Inputs);
    let out = Attention::record(&mut g, x, 1, QkvOrder::Legacy);
    let shape = g.shape(out);
    let dout = g.fixed("cotangent", shape, DType::F32, Region::Inputs);
    let dx = autograd::backward(&mut g, 0..1, out, dout, &[x])[0].unwrap();
    g.keep(dx);
    g.keep(out);
    let id = device.bind(Plan::new(g, true)).unwrap();
    device.write(id, x, &qkv.channels_last().f32s()).unwrap();
    device.write(id, dout, &image("cotangent").channels_last().f32s()).unwrap();
    device.run(id).unwrap();
    file.compare_f32(&format!("{name}/out"), &channels_first(&read(&device, id, out), &image("out")));
    let grad = channels_first(&read(&device, id, dx), &image("grad/in.qkv"));
    file.compare_f32(&format!("{name}/grad/in.qkv"), &grad);
}
