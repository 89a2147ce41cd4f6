//! The recorded network: sizes, gradients against central differences, memory reuse, sampling and bits/dim.

use crate::device::device;
use approx::assert_relative_eq;
use iddpm::autograd;
use iddpm::config::{DiffusionConfig, LossType, ModelConfig, Schedule, VarType};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::nll::{Evaluated, Nll, NllSettings, mean_and_interval};
use iddpm::ops::p_sample::Reverse;
use iddpm::ops::{Control, Operation};
use iddpm::rng;
use iddpm::sampler::{Pictures, SampleSettings, Sampler};
use iddpm::unet::{self, DropoutRun, Params};

/// 8x8 pixels, two levels, attention at both: every kind of layer in a network that runs in milliseconds.
fn tiny() -> ModelConfig {
    ModelConfig {
        image_size: 8,
        in_channels: 1,
        out_channels: 2,
        model_channels: 32,
        num_res_blocks: 1,
        channel_mult: vec![1, 2],
        attention_resolutions: vec![1, 2],
        num_heads: 2,
        num_heads_upsample: 4,
        ..ModelConfig::default()
    }
}

/// The same with everything switched the other way.
fn tiny_other() -> ModelConfig {
    ModelConfig {
        in_channels: 3,
        out_channels: 3,
        num_classes: Some(5),
        use_scale_shift_norm: false,
        conv_resample: false,
        dropout: 0.3,
        ..tiny()
    }
}

/// The features of guided-diffusion.
fn tiny_guided() -> ModelConfig {
    ModelConfig { num_head_channels: Some(16), resblock_updown: true, use_new_attention_order: true, ..tiny() }
}

fn process() -> DiffusionConfig {
    DiffusionConfig {
        diffusion_steps: 100,
        noise_schedule: Schedule::Cosine,
        timestep_respacing: "8".into(),
        var_type: VarType::LearnedRange,
        loss_type: LossType::RescaledMse,
        ..DiffusionConfig::default()
    }
}

/// Initial weights with the zero-initialised tensors filled too, so that every path carries something.
fn weights(params: &Params, seed: u64) -> Vec<f32> {
    let mut flat = params.init(seed);
    for (k, p) in params.list.iter().enumerate() {
        let w = &mut flat[p.offset..p.offset + p.len()];
        if w.iter().all(|x| *x == 0.0) {
            rng::fill_normal(w, seed, 1, 0, k as u32);
            w.iter_mut().for_each(|x| *x *= 0.05);
        }
    }
    flat
}

fn normals(len: usize, seed: u64, op: u32) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(&mut x, seed, 0, 0, op);
    x
}

/// Network, its inputs and a cotangent, forward and backward.
struct Probe {
    device: Device,
    id: PlanId,
    out: Val,
    dx: Val,
    x: Val,
    cotangent: Vec<f32>,
    params: Params,
}

impl Probe {
    fn new(config: &ModelConfig, n: usize, reuse: bool) -> Self {
        Self::with(config, n, reuse, false)
    }

    fn with(config: &ModelConfig, n: usize, reuse: bool, recompute: bool) -> Self {
        let params = Params::new(config);
        let mut g = Graph::new();
        let vals = params.declare(&mut g);
        let size = Shape::new(n, config.image_size, config.image_size, config.in_channels);
        let x = g.fixed("x", size, DType::F32, Region::Inputs);
        let t = g.fixed("t", Shape::rows(n, 1), DType::F32, Region::Inputs);
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let labels = config.num_classes.map(|_| g.fixed("y", Shape::rows(n, 1), DType::I32, Region::Inputs));
        let dropout = Some(DropoutRun { p: config.dropout, first_image: 0, control });
        let net = unet::record(&mut g, config, &vals, x.into(), t, labels, dropout);
        let (out, steps) = (net.out, g.steps.len());
        let shape = g.shape(out);
        let dout = g.fixed("cotangent", shape, DType::F32, Region::Inputs);
        let dx = if recompute {
            unet::backward_with_recompute(&mut g, &vals, &net, dropout, 0..steps, dout);
            out
        } else {
            autograd::backward(&mut g, 0..steps, out, dout, &[x])[0].unwrap()
        };
        g.keep(out);
        g.keep(dx);
        let mut device = device();
        let id = device.bind(Plan::new(g, reuse)).unwrap();
        let cotangent = normals(shape.len(), 3, 1);
        device.write(id, x, &normals(size.len(), 3, 2)).unwrap();
        device.write(id, t, &(0..n).map(|i| 7.0 + 100.0 * i as f32).collect::<Vec<_>>()).unwrap();
        device.write(id, dout, &cotangent).unwrap();
        device.write(id, control, bytemuck::bytes_of(&Control { seed: 9, step: 4, ..Control::default() })).unwrap();
        if let Some(labels) = labels {
            device.write(id, labels, &(0..n as i32).map(|i| i % 5).collect::<Vec<_>>()).unwrap();
        }
        Probe { device, id, out, dx, x, cotangent, params }
    }

    fn read(&self, v: Val) -> Vec<f32> {
        let mut values = vec![f32::NAN; self.device.plan(self.id).graph.shape(v).len()];
        self.device.read(self.id, v, &mut values).unwrap();
        values
    }

    /// sum(out · cotangent) with these weights.
    fn scalar(&mut self, weights: &[f32]) -> f64 {
        self.device.write_region(Region::Params, weights).unwrap();
        self.device.run(self.id).unwrap();
        self.read(self.out).iter().zip(&self.cotangent).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    fn grads(&self) -> Vec<f32> {
        let mut grads = vec![0.0; self.params.len];
        self.device.read_region(Region::Grads, &mut grads).unwrap();
        grads
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Moves each tensor along its own gradient: the scalar must change at the rate of the gradient's norm. A wrong gradient has
/// a smaller component along the true one than its norm says.
fn gradients_agree(config: &ModelConfig) {
    let mut probe = Probe::new(config, 2, true);
    let flat = weights(&probe.params, 5);
    probe.scalar(&flat);
    let grads = probe.grads();
    let largest = norm(&grads);
    let list = probe.params.list.clone();
    let mut rate = |move_by: &dyn Fn(&mut Probe, f32) -> Vec<f32>, h: f64| {
        let up = move_by(&mut probe, h as f32);
        let up = probe.scalar(&up);
        let down = move_by(&mut probe, -h as f32);
        (up - probe.scalar(&down)) / (2.0 * h)
    };
    for p in &list {
        let (range, g) = (p.offset..p.offset + p.len(), &grads[p.offset..p.offset + p.len()]);
        let size = norm(g);
        if size < 1e-5 * largest {
            continue; // mathematically zero: a bias before a norm with one channel per group
        }
        let along = |_: &mut Probe, h: f32| {
            let mut moved = flat.clone();
            moved[range.clone()].iter_mut().zip(g).for_each(|(w, g)| *w += h * g / size as f32);
            moved
        };
        // Truncation falls with h², the f32 rounding of the forward pass (about 1e-5 here) with 1/h: 0.01 balances them.
        let measured = rate(&along, 1e-2);
        let error = (measured - size).abs() / size;
        let rounding = 2e-5 / 1e-2 / size;
        assert!(error < 0.02 + rounding, "{}: moves by {measured}, its gradient says {size} (seed 5)", p.name);
    }
}

#[test]
fn gradients_agree_with_central_differences() {
    gradients_agree(&tiny());
}

#[test]
fn gradients_agree_with_classes_pooling_added_embedding_and_dropout() {
    gradients_agree(&tiny_other());
}

#[test]
fn gradients_of_the_guided_network_agree_with_differences() {
    gradients_agree(&tiny_guided());
}

#[test]
fn input_gradient_agrees_with_central_differences() {
    let mut probe = Probe::new(&tiny(), 1, true);
    let flat = weights(&probe.params, 6);
    probe.scalar(&flat);
    let (dx, x) = (probe.read(probe.dx), probe.read(probe.x));
    let size = norm(&dx);
    let mut at = |h: f32| {
        let moved: Vec<f32> = x.iter().zip(&dx).map(|(x, d)| x + h * d / size as f32).collect();
        let (id, v) = (probe.id, probe.x);
        probe.device.write(id, v, &moved).unwrap();
        probe.scalar(&flat)
    };
    let measured = (at(1e-2) - at(-1e-2)) / 2e-2;
    // x moves the scalar by `measured`, its gradient says `size`; the bound is that of the tensors above.
    assert_relative_eq!(measured, size, max_relative = 0.02);
}

#[test]
fn memory_reuse_changes_no_bit_and_saves_memory() {
    for config in [tiny(), tiny_other(), tiny_guided()] {
        let (mut a, mut b) = (Probe::new(&config, 3, true), Probe::new(&config, 3, false));
        let flat = weights(&a.params, 7);
        assert_eq!(a.scalar(&flat).to_bits(), b.scalar(&flat).to_bits());
        assert_eq!(bytemuck::cast_slice::<f32, u32>(&a.grads()), bytemuck::cast_slice::<f32, u32>(&b.grads()));
        assert_eq!(a.read(a.dx), b.read(b.dx));
        let (with, without) = (a.device.plan(a.id).layout.bytes, b.device.plan(b.id).layout.bytes);
        assert!(with * 3 < without * 2, "reuse needs {with} of {without} bytes");
    }
}

#[test]
fn recomputing_blocks_changes_no_bit_and_saves_memory() {
    for config in [tiny(), tiny_other(), tiny_guided()] {
        let (mut a, mut b) = (Probe::with(&config, 3, true, false), Probe::with(&config, 3, true, true));
        let flat = weights(&a.params, 7);
        assert_eq!(a.scalar(&flat).to_bits(), b.scalar(&flat).to_bits());
        assert_eq!(bytemuck::cast_slice::<f32, u32>(&a.grads()), bytemuck::cast_slice::<f32, u32>(&b.grads()));
        let (kept, recomputed) = (a.device.plan(a.id).layout.bytes, b.device.plan(b.id).layout.bytes);
        assert!(recomputed < kept, "recomputing needs {recomputed} bytes, keeping {kept}");
    }
}

#[test]
fn two_runs_and_any_number_of_threads_give_the_same_bits() {
    let config = tiny_other();
    let mut probe = Probe::new(&config, 3, true);
    let flat = weights(&probe.params, 8);
    probe.scalar(&flat);
    let first = probe.grads();
    probe.scalar(&flat);
    assert_eq!(first, probe.grads());
}

/// Values that live at the same time never share a byte, whatever the planner decided.
#[test]
fn planned_values_do_not_meet() {
    let probe = Probe::new(&tiny_other(), 2, true);
    let plan = probe.device.plan(probe.id);
    let (g, layout) = (&plan.graph, &plan.layout);
    let mut life = vec![None::<(usize, usize)>; g.values.len()];
    for (i, step) in g.steps.iter().enumerate() {
        for v in step.op.outputs().into_iter().chain(step.op.inputs()) {
            let (first, last) = life[v.index()].unwrap_or((i, i));
            life[v.index()] = Some((first.min(i), last.max(i)));
        }
    }
    let alive: Vec<(usize, usize, usize, usize)> = (0..g.values.len())
        .filter(|&i| matches!(g.values[i].place, iddpm::graph::Place::Arena))
        .filter_map(|i| life[i].map(|(a, b)| (a, b, layout.offsets[i], g.values[i].bytes())))
        .collect();
    for (i, a) in alive.iter().enumerate() {
        assert!(a.2 + a.3 <= layout.bytes);
        for b in &alive[i + 1..] {
            let meet = a.0 <= b.1 && b.0 <= a.1 && a.2 < b.2 + b.3 && b.2 < a.2 + a.3;
            assert!(!meet, "{a:?} and {b:?}");
        }
    }
}

/// Tensors and parameters of the reference's published models.
#[test]
fn published_models_have_their_sizes() {
    let imagenet = ModelConfig { out_channels: 6, num_res_blocks: 3, ..ModelConfig::default() };
    let cifar = ModelConfig {
        image_size: 32,
        channel_mult: vec![1, 2, 2, 2],
        attention_resolutions: vec![2, 4],
        ..imagenet.clone()
    };
    let conditional = ModelConfig { model_channels: 192, num_classes: Some(1000), ..imagenet.clone() };
    let upsampler = ModelConfig {
        image_size: 256,
        in_channels: 6,
        num_res_blocks: 2,
        channel_mult: vec![1, 1, 2, 2, 4, 4],
        attention_resolutions: vec![16, 32],
        ..conditional.clone()
    };
    let lsun = ModelConfig {
        image_size: 256,
        num_res_blocks: 2,
        channel_mult: vec![1, 1, 2, 2, 4, 4],
        attention_resolutions: vec![16],
        num_heads: 1,
        use_scale_shift_norm: false,
        ..imagenet.clone()
    };
    // guided-diffusion's 64x64 model, and one for CIFAR-10 trained with its network.
    let guided = ModelConfig {
        attention_resolutions: vec![2, 4, 8],
        num_head_channels: Some(64),
        resblock_updown: true,
        use_new_attention_order: true,
        ..conditional.clone()
    };
    let guided_cifar = ModelConfig { num_head_channels: Some(32), resblock_updown: true, ..cifar.clone() };
    let sizes = [
        (guided, 541, 295_904_454),
        (guided_cifar, 494, 57_094_662),
        (cifar, 446, 52_546_438),
        (imagenet, 450, 121_063_942),
        (conditional, 451, 273_049_350),
        (upsampler, 457, 279_792_390),
        (lsun, 426, 113_676_678),
    ];
    for (config, tensors, parameters) in sizes {
        let params = Params::new(&config);
        assert_eq!((params.list.len(), params.count()), (tensors, parameters), "{config:?}");
    }
}

#[test]
fn initial_weights_follow_the_reference() {
    let params = Params::new(&tiny());
    let flat = params.init(1);
    for p in &params.list {
        let w = &flat[p.offset..p.offset + p.len()];
        let zero = w.iter().all(|x| *x == 0.0);
        let last = ["out_layers.3.", "proj_out.", "out.2."].iter().any(|s| p.name.contains(s));
        let norm_bias = p.dims.len() == 1 && p.name.ends_with("bias") && {
            let weight = p.name.replace("bias", "weight");
            params.list.iter().any(|q| q.name == weight && q.dims.len() == 1)
        };
        assert_eq!(zero, last || norm_bias, "{}", p.name);
    }
    assert_ne!(flat, params.init(2));
    assert_eq!(flat, params.init(1));
}

fn sample(batch: usize, reverse: Reverse, threads: usize, config: &ModelConfig) -> Vec<f32> {
    let params = Params::new(config);
    let mut device = Device::cpu(threads).unwrap();
    device.write_region(Region::Params, &weights(&params, 4)).unwrap();
    let settings = SampleSettings { reverse, batch, ..SampleSettings::default() };
    let diffusion = DiffusionConfig {
        var_type: if config.out_channels > config.in_channels { VarType::LearnedRange } else { VarType::FixedLarge },
        ..process()
    };
    let sampler = Sampler::new(&mut device, config, &diffusion, &params, &settings).unwrap();
    let labels: Option<Vec<i32>> = config.num_classes.map(|n| (0..5).map(|i| i % n as i32).collect());
    let mut calls = 0;
    let pictures = Pictures { first: 0, seeds: &[11, 12, 13, 14, 15], labels: labels.as_deref() };
    let images = sampler
        .run(&mut device, pictures, &mut |walk| {
            calls += 1;
            assert_eq!(walk.done, calls);
            assert_eq!(walk.x_0()?.len(), walk.pictures * 64 * config.in_channels);
            Ok(())
        })
        .unwrap();
    assert_eq!(calls, 8 * 5usize.div_ceil(batch));
    images
}

#[test]
fn pictures_do_not_depend_on_batch_or_threads() {
    for (config, reverse) in
        [(tiny(), Reverse::Ancestral), (tiny(), Reverse::Ddim(0.0)), (tiny_other(), Reverse::Ddim(0.7))]
    {
        let one = sample(1, reverse, 1, &config);
        assert!(one.iter().all(|x| x.is_finite()));
        for (batch, threads) in [(2, 2), (5, 1), (8, 2)] {
            assert_eq!(one, sample(batch, reverse, threads, &config), "{reverse:?}, batch {batch}, {threads} threads");
        }
    }
}

#[test]
fn sampling_refuses_wrong_labels() {
    let config = tiny_other();
    let params = Params::new(&config);
    let mut device = device();
    let settings = SampleSettings { batch: 2, ..SampleSettings::default() };
    let diffusion = DiffusionConfig { var_type: VarType::FixedSmall, ..process() };
    let sampler = Sampler::new(&mut device, &config, &diffusion, &params, &settings).unwrap();
    for (labels, word) in [(None, "5 classes"), (Some(&[0, 5][..]), "label 5"), (Some(&[0][..]), "1 labels")] {
        let pictures = Pictures { first: 0, seeds: &[1, 2], labels };
        let error = sampler.run(&mut device, pictures, &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}

fn bits_per_dim(batch: usize) -> iddpm::nll::NllReport {
    let config = tiny();
    let params = Params::new(&config);
    let mut device = device();
    device.write_region(Region::Params, &weights(&params, 4)).unwrap();
    let settings = NllSettings { clip: true, batch, seed: 3 };
    let nll = Nll::new(&mut device, &config, &process(), &params, 3, &settings).unwrap();
    let pixels: Vec<u8> = (0..3 * 64).map(|i| (i * 37 % 256) as u8).collect();
    nll.run(&mut device, Evaluated { pixels: &pixels, labels: None }, &[], &mut |_| Ok(())).unwrap()
}

#[test]
fn bits_per_dim_do_not_depend_on_the_batch_and_add_up() {
    let report = bits_per_dim(4);
    assert_eq!(report, bits_per_dim(7));
    assert_eq!((report.vb_bpd.len(), report.total_bpd.len()), (8, 3));
    let (mean, interval) = mean_and_interval(&report.total_bpd);
    let prior = report.prior_bpd.iter().sum::<f64>() / 3.0;
    let sum = prior + report.vb_bpd.iter().sum::<f64>();
    assert_relative_eq!(mean, sum, max_relative = 1e-9);
    assert!(interval > 0.0 && report.vb_bpd[1..].iter().all(|&kl| kl >= 0.0));
}
