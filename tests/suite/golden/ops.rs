//! Files 03, 04, 06, 07 and 08 through ops on a device: recorded, bound and run, as training and sampling use them.

use std::sync::Arc;

use iddpm::config::{FirstStep, LossType, LossWeight, TimestepSampler};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion::{Objective, Output};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::Control;
use iddpm::ops::hybrid_loss::{HybridLoss, LossVals};
use iddpm::ops::p_sample::{PSample, Reverse};
use iddpm::ops::q_sample::{Images, Noise, QSample};
use iddpm::ops::timestep_dist::TimestepDist;
use iddpm::ops::vb_terms::VbTerms;
use iddpm::schedule::Process;
use serde_json::Value;

use super::losses::LOSSES;
use super::samplers::{StandIn, output, planar};
use super::vectors::{Tensor, VectorFile, outputs, process};

/// Checks one file on devices that the function makes.
pub type Check = fn(&VectorFile, &dyn Fn() -> Device);

/// Kinds of files that ops are checked by.
pub const KINDS: &[(&str, Check)] = &[
    ("03_gaussian", gaussian),
    ("04_losses", losses),
    ("06_samplers", samplers),
    ("07_bpd", bound),
    ("08_timestep_samplers", timesteps),
];

fn read(device: &Device, id: PlanId, v: Val) -> Vec<f32> {
    let mut out = vec![f32::NAN; device.plan(id).graph.shape(v).len()];
    device.read(id, v, &mut out).unwrap();
    out
}

fn shape(x: &Tensor) -> Shape {
    Shape::new(x.shape[0], x.shape[2], x.shape[3], x.shape[1])
}

/// Images of f64 values on the grid of bytes.
fn bytes(x: &Tensor) -> Vec<u8> {
    x.channels_last().values.iter().map(|x| ((x + 1.0) * 127.5).round() as u8).collect()
}

/// (n, h, w, c) results in the order of the files.
fn to_planar(values: &[f32], s: Shape) -> Vec<f64> {
    values.chunks_exact(s.len() / s.n).flat_map(|image| planar(image, s.c)).collect()
}

/// Images with given noise at given t: what training and evaluation begin with.
struct Noised {
    g: Graph,
    images: Images,
    eps: Val,
    t: Val,
}

impl Noised {
    /// A batch of `s.n` out of as many images as there are.
    fn new(stored: usize, s: Shape) -> Self {
        let mut g = Graph::new();
        let data = g.at("data", Shape { n: stored, ..s }, DType::U8, Region::Data, 0);
        let rows = Shape::rows(s.n, 1);
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let index = g.fixed("index", rows, DType::I32, Region::Inputs);
        let t = g.fixed("t", rows, DType::I32, Region::Inputs);
        let eps = g.fixed("eps", s, DType::F32, Region::Inputs);
        Noised { g, images: Images { data, index, flip: false, first_image: 0, control }, eps, t }
    }

    fn write(&self, device: &mut Device, id: PlanId, x_0: &Tensor, index: &[i32], t: &[usize], eps: &[f32]) {
        device.write(id, self.images.data, &bytes(x_0)).unwrap();
        device.write(id, self.images.index, index).unwrap();
        device.write(id, self.t, &t.iter().map(|&t| t as i32).collect::<Vec<_>>()).unwrap();
        device.write(id, self.eps, eps).unwrap();
        device.write(id, self.images.control, &[Control::default()]).unwrap();
    }
}

/// x_t, and by a reverse step without noise the mean and x_0 of every output kind.
fn gaussian(file: &VectorFile, device: &dyn Fn() -> Device) {
    for (name, case) in &file.cases {
        let get = |part: &str| file.get(&format!("{name}/{part}"));
        let (process, t, s) = (Arc::new(process(case)), get("t").indices(), shape(get("x_start")));
        let mut plan = Noised::new(s.n, s);
        let noise = Noise::Stored(plan.eps);
        let x_t = QSample::record(&mut plan.g, plan.images.clone(), plan.t, noise, process.clone());
        plan.g.keep(x_t);
        let mut d = device();
        let id = d.bind(Plan::new(plan.g.clone(), true)).unwrap();
        let index: Vec<i32> = (0..s.n as i32).collect();
        plan.write(&mut d, id, get("x_start"), &index, &t, &get("noise").channels_last().f32s());
        d.run(id).unwrap();
        file.compare(&format!("{name}/x_t"), &to_planar(&read(&d, id, x_t), s));
        for (combo, output) in outputs(file, name) {
            for clip in [false, true] {
                let (mut mean, mut x_0) = (vec![], vec![]);
                let mut step = Reversed::new(device, Shape { n: 1, ..s }, output, Reverse::Ancestral, clip, &process);
                for (n, &t) in t.iter().enumerate() {
                    let image = |x: &Tensor| x.sub(n).channels_last().f32s();
                    step.device.write(step.id, step.x, &image(get("x_t"))).unwrap();
                    let out = image(get(&format!("{combo}/model_output")));
                    let (x, predicted) = step.run(t, &out, &vec![0.0; s.len() / s.n]);
                    mean.extend(planar(&x, s.c));
                    x_0.extend(planar(&predicted, s.c));
                }
                let part = format!("{name}/{combo}/clip{}", u8::from(clip));
                file.compare(&format!("{part}/mean"), &mean);
                file.compare(&format!("{part}/pred_xstart"), &x_0);
            }
        }
    }
}

/// A bound reverse step with given noise.
struct Reversed {
    device: Device,
    id: PlanId,
    x: Val,
    x_0: Val,
    out: Val,
    noise: Val,
    control: Val,
}

impl Reversed {
    fn new(
        device: &dyn Fn() -> Device,
        s: Shape,
        output: Output,
        reverse: Reverse,
        clip: bool,
        process: &Arc<Process>,
    ) -> Self {
        let mut g = Graph::new();
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let seeds = g.fixed("seeds", Shape::rows(s.n, 2), DType::I32, Region::Inputs);
        let out = g.fixed("out", Shape { c: output.channels(s.c), ..s }, DType::F32, Region::Inputs);
        let noise = g.fixed("noise", s, DType::F32, Region::Inputs);
        let (x, x_0) = (g.fixed("x", s, DType::F32, Region::State), g.fixed("x_0", s, DType::F32, Region::State));
        let (given, predicted, process) = (Some(noise), Some(x_0), process.clone());
        g.push(PSample {
            x,
            copy: None,
            x_0: predicted,
            out,
            seeds,
            noise: given,
            control,
            reverse,
            output,
            guidance: None,
            threshold: None,
            clip,
            process,
        });
        let mut device = device();
        let id = device.bind(Plan::new(g, true)).unwrap();
        Reversed { device, id, x, x_0, out, noise, control }
    }

    /// x after the step, and the predicted x_0.
    fn run(&mut self, t: usize, out: &[f32], noise: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (d, id) = (&mut self.device, self.id);
        d.write(id, self.control, &[Control { t: t as u32, ..Control::default() }]).unwrap();
        d.write(id, self.out, out).unwrap();
        d.write(id, self.noise, noise).unwrap();
        d.run(id).unwrap();
        (read(d, id, self.x), read(d, id, self.x_0))
    }
}

/// Whole walks; those that map x_0 by a function of the caller are not what the op does.
fn samplers(file: &VectorFile, device: &dyn Fn() -> Device) {
    for (name, case) in file.cases.iter().filter(|(_, case)| case["denoised_fn"] != true) {
        let (process, model) = (Arc::new(process(case)), StandIn::of(file, name, case));
        let start = file.get(&format!("{name}/x_init"));
        let (s, steps) = (shape(start), process.steps());
        let reverse = match case["kind"].as_str().expect("kind") {
            "ancestral" => Reverse::Ancestral,
            "ddim" => Reverse::Ddim(case["eta"].as_f64().expect("eta")),
            "ddim reverse" => Reverse::DdimReverse,
            other => panic!("{name}: unknown sampler {other}"),
        };
        let mut step = Reversed::new(device, s, output(case), reverse, case["clip_denoised"] == true, &process);
        let mut x = start.channels_last().f32s();
        step.device.write(step.id, step.x, &x).unwrap();
        let (mut xs, mut x_0s) = (vec![], vec![]);
        for call in 0..steps {
            let backwards = reverse == Reverse::DdimReverse;
            let t = if backwards { call } else { steps - 1 - call };
            let out = model.run(&x, process.time_value(t, case["rescale_timesteps"] == true));
            let none = || vec![0.0; s.len()];
            let noise =
                if backwards { none() } else { file.get(&format!("{name}/noise")).sub(call).channels_last().f32s() };
            let (next, x_0) = step.run(t, &out, &noise);
            xs.extend(to_planar(&next, s));
            x_0s.extend(to_planar(&x_0, s));
            x = next;
        }
        file.compare(&format!("{name}/x"), &xs);
        file.compare(&format!("{name}/pred_xstart"), &x_0s);
    }
}

/// Every loss and gradient.
fn losses(file: &VectorFile, device: &dyn Fn() -> Device) {
    for (name, case) in &file.cases {
        let process = Arc::new(process(case));
        for (combo, output) in outputs(file, name) {
            for (loss, loss_type) in LOSSES {
                let objective =
                    Objective { output, loss_type, first_step: FirstStep::Nll, weight: LossWeight::Uniform };
                one_loss(file, name, &format!("{name}/{combo}"), loss, objective, &process, device);
            }
        }
    }
}

fn one_loss(
    file: &VectorFile,
    name: &str,
    combo: &str,
    kind: &str,
    objective: Objective,
    process: &Arc<Process>,
    device: &dyn Fn() -> Device,
) {
    let get = |part: &str| file.get(&format!("{name}/{part}"));
    let model_output = file.get(&format!("{combo}/model_output"));
    let s = shape(get("x_start"));
    let mut plan = Noised::new(s.n, s);
    let g = &mut plan.g;
    let rows = Shape::rows(s.n, 1);
    let out = g.fixed("out", shape(model_output), DType::F32, Region::Inputs);
    let weight = g.fixed("weight", rows, DType::F32, Region::Inputs);
    let d_out = g.fixed("d_out", shape(model_output), DType::F32, Region::State);
    let [loss, mse, vb] = ["loss", "mse", "vb"].map(|name| g.fixed(name, rows, DType::F32, Region::State));
    let (terms, noise, process_) = (LossVals { loss, mse, vb }, Noise::Stored(plan.eps), process.clone());
    let (images, t) = (plan.images.clone(), plan.t);
    g.push(HybridLoss { d_out, terms, out, images, noise, t, weight, objective, process: process_ });
    let mut d = device();
    let id = d.bind(Plan::new(plan.g.clone(), true)).unwrap();
    let index: Vec<i32> = (0..s.n as i32).collect();
    plan.write(&mut d, id, get("x_start"), &index, &get("t").indices(), &get("noise").channels_last().f32s());
    d.write(id, out, &model_output.channels_last().f32s()).unwrap();
    d.write(id, weight, &vec![1.0f32; s.n]).unwrap();
    d.run(id).unwrap();
    let vb_scale = objective.vb_scale(process.steps());
    let f64s = |v: Val, scale: f64| read(&d, id, v).iter().map(|&x| f64::from(x) * scale).collect::<Vec<_>>();
    let compare = |part: &str, got: &[f64]| {
        let tensor = format!("{combo}/{kind}/{part}");
        if file.has(&tensor) {
            file.compare(&tensor, got);
        }
    };
    compare("loss", &f64s(loss, 1.0));
    compare("mse", &f64s(mse, 1.0));
    compare("vb", &f64s(vb, vb_scale));
    let out_shape = shape(model_output);
    compare("grad", &to_planar(&read(&d, id, d_out), out_shape));
}

/// Every term of the bound: all pairs of image and t in one batch.
fn bound(file: &VectorFile, device: &dyn Fn() -> Device) {
    for (name, case) in &file.cases {
        let (process, model) = (Arc::new(process(case)), StandIn::of(file, name, case));
        let (x_0, noise) = (file.get(&format!("{name}/x_start")), file.get(&format!("{name}/noise")));
        let (steps, images) = (process.steps(), shape(x_0));
        let s = Shape { n: images.n * steps, ..images };
        let objective = Objective {
            output: output(case),
            loss_type: LossType::Kl,
            first_step: FirstStep::Nll,
            weight: LossWeight::Uniform,
        };
        let (mut index, mut t, mut eps, mut outs) = (vec![], vec![], vec![], vec![]);
        for n in 0..images.n {
            for call in 0..steps {
                let (step, noise) = (steps - 1 - call, noise.sub(call).sub(n).channels_last().f32s());
                let clean = x_0.sub(n).channels_last().f32s();
                let mut x_t = vec![f32::NAN; clean.len()];
                iddpm::diffusion::q_sample(&process.at(step), &mut x_t, &clean, &noise);
                outs.extend(model.run(&x_t, process.time_value(step, case["rescale_timesteps"] == true)));
                index.push(n as i32);
                t.push(step);
                eps.extend(noise);
            }
        }
        let mut plan = Noised::new(images.n, s);
        let rows = Shape::rows(s.n, 1);
        let channels = objective.output.channels(s.c);
        let out = plan.g.fixed("out", Shape { c: channels, ..s }, DType::F32, Region::Inputs);
        let [vb, x_0_mse, eps_mse] =
            ["vb", "x_0_mse", "eps_mse"].map(|name| plan.g.fixed(name, rows, DType::F32, Region::State));
        let (noise, batch, clip) = (Noise::Stored(plan.eps), plan.images.clone(), case["clip_denoised"] == true);
        let t_val = plan.t;
        plan.g.push(VbTerms { vb, x_0_mse, eps_mse, out, images: batch, noise, t: t_val, objective, clip, process });
        let mut d = device();
        let id = d.bind(Plan::new(plan.g.clone(), true)).unwrap();
        plan.write(&mut d, id, x_0, &index, &t, &eps);
        d.write(id, out, &outs).unwrap();
        d.run(id).unwrap();
        for (part, v) in [("vb", vb), ("xstart_mse", x_0_mse), ("mse", eps_mse)] {
            file.compare_f32(&format!("{name}/{part}"), &read(&d, id, v));
        }
    }
}

/// The histories of the default length: after every call the importance weights are those of the stored probabilities.
fn timesteps(file: &VectorFile, device: &dyn Fn() -> Device) {
    let is_ours = |case: &Value| {
        case["history_per_term"].as_u64() == Some(iddpm::timestep::HISTORY as u64)
            && case["uniform_prob"].as_f64() == Some(iddpm::timestep::UNIFORM_PROB)
    };
    for (name, case) in file.cases.iter().filter(|(_, case)| is_ours(case)) {
        let steps = case["T"].as_u64().expect("`T`") as usize;
        let get = |part: &str| file.get(&format!("{name}/{part}"));
        let (t, loss, p) = (get("t"), get("loss"), get("p"));
        let n = t.shape[1];
        let process = Arc::new(Process::new(iddpm::config::Schedule::Cosine, steps).unwrap());
        let mut g = Graph::new();
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let loss_val = g.fixed("loss", Shape::rows(n, 1), DType::F32, Region::State);
        let sampler = TimestepSampler::LossSecondMoment;
        let step = TimestepDist::record(&mut g, sampler, loss_val, control, process, false);
        let mut d = device();
        let id = d.bind(Plan::new(g, true)).unwrap();
        for call in 0..t.shape[0] {
            let seen: Vec<i32> = t.sub(call).values.iter().map(|&t| t as i32).collect();
            d.write(id, step.t, &seen).unwrap();
            d.write(id, loss_val, &loss.sub(call).f32s()).unwrap();
            d.write(id, control, &[Control { seed: 3, step: call as u32 + 1, ..Control::default() }]).unwrap();
            d.run(id).unwrap();
            let mut drawn = vec![0i32; n];
            d.read(id, step.t, &mut drawn).unwrap();
            for (&t, got) in drawn.iter().zip(read(&d, id, step.weight)) {
                let want = 1.0 / (steps as f64 * p.sub(call).values[t as usize]);
                // One rounding to f32 of a quotient of f64 sums.
                if (f64::from(got) - want).abs() > 1e-7 * want {
                    file.fail(format!("{name}: call {call}, t = {t}: weight {got}, expected {want}"));
                }
            }
        }
    }
}
