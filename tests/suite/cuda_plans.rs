//! Plans in bf16 on a GPU or its emulation: the rounded weights they multiply by, what they need of memory, sampling and bits/dim.

use crate::cuda_ops::{cuda, gpu, normals, round};
use crate::half::distance;
use half::bf16;
use iddpm::autograd;
use iddpm::config::{DiffusionConfig, LossType, ModelConfig, Precision, Schedule, VarType};
use iddpm::device::{Device, Plan, PlanId, Weights};
use iddpm::graph::{DType, Graph, Place, Region, Shape, Target, Val};
use iddpm::nll::{Evaluated, Evaluation, Nll, NllSettings, Terms};
use iddpm::ops::Control;
use iddpm::ops::adamw_ema::{AdamwEma, Hyper};
use iddpm::ops::grad_norm::GradNorm;
use iddpm::ops::linear::Linear;
use iddpm::ops::p_sample::Reverse;
use iddpm::sampler::{self, Pictures, SampleSettings, Sampler};
use iddpm::unet::{Layer, Params};

const BF16: Target = Target::Cuda(Precision::Bf16);

fn on_gpu(precision: Precision) -> Device {
    gpu().with_precision(precision)
}

/// A convolution's tensors, used as a linear layer: 8 columns to 16.
fn params() -> Params {
    let mut p = Params::default();
    p.layer("m", &Layer::Conv { c: 8, oc: 16 });
    p.list[0].dims = vec![16, 8];
    p.place();
    p
}

/// y = x wᵀ + b for two rows; with `train`, also a gradient, and an optimiser step that keeps one average.
struct Layers {
    id: PlanId,
    x: Val,
    y: Val,
    compute: Val,
}

impl Layers {
    fn bind(device: &mut Device, train: bool) -> Self {
        let params = params();
        let mut g = Graph::on(BF16);
        let vals = params.declare(&mut g);
        let x = g.fixed("x", Shape::rows(2, 8), DType::Bf16, Region::Inputs);
        let (w, b) = vals.pair("m");
        let y = Linear::record(&mut g, x, w, b);
        g.keep(y);
        if train {
            let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::State);
            let dy = g.fixed("dy", Shape::rows(2, 16), DType::Bf16, Region::State);
            autograd::backward(&mut g, 0..1, y, dy, &[]);
            let mut all = |region| g.at("all", Shape::rows(1, params.len), DType::F32, region, 0);
            let [grads, m, v, ema] = [Region::Grads, Region::AdamM, Region::AdamV, Region::Ema].map(&mut all);
            let norm = GradNorm::record(&mut g, grads);
            let hyper = Hyper { weight_decay: 0.5, ema_rates: vec![0.5], ..Hyper::default() };
            let (ema, copy) = (Some(ema), vals.compute);
            g.push(AdamwEma { params: vals.all, m, v, ema, copy, grads, norm, control, hyper });
        }
        let compute = vals.compute.expect("a plan in bf16");
        let id = device.bind(Plan::new(g, true)).unwrap();
        let layers = Layers { id, x, y, compute };
        device.write_f32(id, layers.x, &normals(16, 1)).unwrap();
        if train {
            let value = |name: &str| {
                let values = &device.plan(id).graph.values;
                values.iter().position(|v| v.name == name).expect("declared above")
            };
            let [control, dy] = [value("control"), value("dy")].map(|i| nth(&device.plan(id).graph, i));
            let step = Control { lr: 0.1, bias1: 0.1, bias2: 0.001, ..Control::default() };
            device.write(id, control, &[step]).unwrap();
            device.write_f32(id, dy, &normals(32, 2)).unwrap();
        }
        layers
    }

    /// Runs, and checks that the plan multiplied by `flat`, rounded.
    fn multiplies_by(&self, device: &mut Device, flat: &[f32], what: &str) {
        device.run(self.id).unwrap();
        let p = params();
        let rounded = round(flat);
        let (w, b) = (&rounded[p.list[0].offset..][..128], &flat[p.list[1].offset..][..16]);
        let x = round(&normals(16, 1));
        let mut y = vec![bf16::NAN; 32];
        device.read(self.id, self.y, &mut y).unwrap();
        for (i, y) in y.iter().enumerate() {
            let terms = (0..8).map(|c| f64::from(x[i / 16 * 8 + c]) * f64::from(w[i % 16 * 8 + c]));
            let (size, sum) = terms.fold((0.0, f64::from(b[i % 16])), |(size, sum), t| (size + t.abs(), sum + t));
            // Nine roundings of f32 and one to bf16; other weights are off by far more.
            let bound = sum.abs() / 256.0 + size * 1e-6;
            assert!((y.to_f64() - sum).abs() <= bound, "{what}: y[{i}] is {y} for {sum}");
        }
    }

    fn copies(&self, device: &Device) -> Vec<f32> {
        let mut all = vec![bf16::NAN; params().len];
        device.read(self.id, self.compute, &mut all).unwrap();
        all.iter().map(|x| x.to_f32()).collect()
    }
}

/// Value number `i` of a graph.
fn nth(g: &Graph, i: usize) -> Val {
    let used = g.steps.iter().flat_map(|s| iddpm::ops::Operation::inputs(&s.op));
    used.into_iter().find(|v| v.index() == i).expect("a step reads it")
}

fn region(device: &Device, region: Region) -> Vec<f32> {
    let mut flat = vec![f32::NAN; params().len];
    device.read_region(region, &mut flat).unwrap();
    flat
}

/// Weights change by the host, by the choice of an average and by another plan's optimiser; whatever changed them, a plan multiplies by the
/// present ones, as a captured graph too.
#[test]
fn rounded_weights_follow_the_weights() {
    let mut device = on_gpu(Precision::Bf16);
    let len = params().len;
    let [first, second, average] = [11, 12, 13].map(|stream| normals(len, stream));
    device.write_region(Region::Params, &first).unwrap();
    device.write_region(Region::Ema, &average).unwrap();
    let train = Layers::bind(&mut device, true);
    let live = Layers::bind(&mut device, false);
    let averaged = Layers::bind(&mut device, false);
    device.set_weights(averaged.id, Weights::Ema(0));
    device.capture(live.id).unwrap();
    live.multiplies_by(&mut device, &first, "the first weights");
    averaged.multiplies_by(&mut device, &average, "the average");
    device.write_region(Region::Params, &second).unwrap();
    live.multiplies_by(&mut device, &second, "weights that the host wrote");
    for step in 0..2 {
        let before = region(&device, Region::Params);
        train.multiplies_by(&mut device, &before, &format!("training step {step}"));
        let now = region(&device, Region::Params);
        assert!(distance(&now, &before) > 0.01, "the step changed nothing");
        assert_eq!(train.copies(&device), round(&now), "training keeps its own copies");
        live.multiplies_by(&mut device, &now, "weights after a step");
        let present = region(&device, Region::Ema);
        averaged.multiplies_by(&mut device, &present, "the average after a step");
    }
    device.set_weights(averaged.id, Weights::Live);
    let present = region(&device, Region::Params);
    averaged.multiplies_by(&mut device, &present, "live weights again");
    train.multiplies_by(&mut device, &present, "training after other plans");
}

/// One launch rounds the weights when they have changed, none when they have not.
#[test]
fn weights_are_rounded_once_for_each_change() {
    let mut device = Device::emulated().unwrap();
    device.write_region(Region::Params, &normals(params().len, 3)).unwrap();
    let live = Layers::bind(&mut device, false);
    let mut rounded = || {
        let driver = cuda(&mut device).driver().clone();
        let ((), launches) = driver.emulator().unwrap().metered(|| device.run(live.id)).unwrap();
        launches.iter().filter(|l| l.kernel == "conv2d_round_weights").count()
    };
    assert_eq!([rounded(), rounded(), rounded()], [1, 0, 0]);
}

/// The factors of products are bf16, half as far into their region as their masters; biases, norms and the table of classes stay f32.
#[test]
fn a_plan_in_bf16_declares_what_is_rounded() {
    let config = ModelConfig { image_size: 32, num_classes: Some(10), model_channels: 32, ..ModelConfig::default() };
    let params = Params::new(&config);
    let mut g = Graph::on(BF16);
    let vals = params.declare(&mut g);
    for p in &params.list {
        let v = vals.get(&p.name);
        let factor = p.dims.len() > 1 && p.name != "label_emb.weight";
        let (dtype, place) = if factor {
            (DType::Bf16, Place::Fixed(Region::Compute, 2 * p.offset))
        } else {
            (DType::F32, Place::Fixed(Region::Params, 4 * p.offset))
        };
        assert_eq!((g[v].dtype, g[v].place), (dtype, place), "{}", p.name);
        let (dw, _) = g.grad_of(v);
        assert_eq!((g[dw].dtype, g[dw].place), (DType::F32, Place::Fixed(Region::Grads, 4 * p.offset)), "{}", p.name);
    }
    assert_eq!(g.region_bytes(Region::Compute) * 2, g.region_bytes(Region::Params));
}

fn tiny() -> (ModelConfig, DiffusionConfig) {
    let model = ModelConfig {
        image_size: 4,
        in_channels: 1,
        out_channels: 2,
        model_channels: 32,
        num_res_blocks: 1,
        channel_mult: vec![1, 1],
        attention_resolutions: vec![2],
        num_classes: Some(3),
        ..ModelConfig::default()
    };
    let diffusion = DiffusionConfig {
        diffusion_steps: 100,
        noise_schedule: Schedule::Cosine,
        timestep_respacing: "4".into(),
        var_type: VarType::LearnedRange,
        loss_type: LossType::RescaledMse,
        ..DiffusionConfig::default()
    };
    (model, diffusion)
}

/// Weights of a network, none of them 0.
fn weights(params: &Params) -> Vec<f32> {
    let mut flat = params.init(3);
    for (i, x) in flat.iter_mut().enumerate().filter(|(_, x)| **x == 0.0) {
        *x = 0.02 * (0.7 * i as f32).sin();
    }
    flat
}

/// Five pictures in batches of two, and the terms of the bound of three images.
fn sampled_and_measured(mut device: Device, reverse: Reverse) -> (Vec<f32>, Vec<f32>) {
    let (model, diffusion) = tiny();
    let params = Params::new(&model);
    device.write_region(Region::Params, &weights(&params)).unwrap();
    let settings = SampleSettings { reverse, clip: false, batch: 2, ..SampleSettings::default() };
    let sampler = Sampler::new(&mut device, &model, &diffusion, &params, &settings).unwrap();
    let pictures = Pictures { first: 0, seeds: &[1, 2, 3, 4, 5], labels: Some(&[0, 1, 2, 0, 1]) };
    let images = sampler.run(&mut device, pictures, &mut |_| Ok(())).unwrap();
    let settings = NllSettings { clip: false, batch: 5, seed: 4 };
    let nll = Nll::new(&mut device, &model, &diffusion, &params, 3, &settings).unwrap();
    let pixels: Vec<u8> = (0..48).map(|i| (i * 53 % 256) as u8).collect();
    let report =
        nll.run(&mut device, Evaluated { pixels: &pixels, labels: Some(&[0, 1, 2]) }, &[], &mut |_| Ok(())).unwrap();
    (images, report.total_bpd.iter().map(|&x| x as f32).collect())
}

/// In f32 sums are taken in another order: some ten roundings of 2^-24 follow one another, and four steps. In bf16 ten of 2^-9.
#[test]
fn samples_and_bits_per_dim_follow_the_processor() {
    for reverse in [Reverse::Ancestral, Reverse::Ddim(0.0)] {
        let (images, bits) = sampled_and_measured(Device::cpu(0).unwrap(), reverse);
        for (precision, bound) in [(Precision::F32, 2e-6), (Precision::Bf16, 10f64.sqrt() / 512.0)] {
            let (ours, our_bits) = sampled_and_measured(on_gpu(precision), reverse);
            let off = [distance(&ours, &images), distance(&our_bits, &bits)];
            println!("{reverse:?} {precision:?}: pictures {:.1e} off, bits/dim {:.1e}", off[0], off[1]);
            assert!(off.iter().all(|&off| off <= bound), "{reverse:?} {precision:?}: {off:?} off, bound {bound:e}");
        }
    }
}

/// A picture has the same bits in any batch, and so have the terms of the bound of an image, also where the images come to the device
/// in parts: sums of a network's forward pass have one order for every number of images.
#[test]
fn bits_do_not_depend_on_the_batch() {
    let (model, diffusion) = tiny();
    let params = Params::new(&model);
    let seeds: Vec<u64> = (1..=7).collect();
    let pixels: Vec<u8> = (0..7 * 16).map(|i| (i * 53 % 256) as u8).collect();
    let labels = [0, 1, 2, 0, 1, 2, 0];
    let pictures = |precision, batch| -> Vec<u32> {
        let mut device = on_gpu(precision);
        device.write_region(Region::Params, &weights(&params)).unwrap();
        let settings = SampleSettings { batch, ..SampleSettings::default() };
        let sampler = Sampler::new(&mut device, &model, &diffusion, &params, &settings).unwrap();
        let pictures = Pictures { first: 0, seeds: &seeds, labels: Some(&labels) };
        sampler.run(&mut device, pictures, &mut |_| Ok(())).unwrap().iter().map(|x| x.to_bits()).collect()
    };
    // `lacking`: bytes of memory fewer than all images need, on the emulator. `known`: terms from a run before.
    let report = |precision, batch, lacking: Option<usize>, known: &[Terms]| {
        let mut device = on_gpu(precision);
        device.write_region(Region::Params, &weights(&params)).unwrap();
        let settings = NllSettings { clip: true, batch, seed: 4 };
        let nll = |device: &mut Device| Nll::new(device, &model, &diffusion, &params, 7, &settings).unwrap();
        if let Some(lacking) = lacking {
            let mut whole = on_gpu(precision);
            let id = nll(&mut whole).id();
            let need = whole.plan(id).bytes();
            cuda(&mut device).driver().emulator().unwrap().set_memory(need - lacking);
        }
        let nll = nll(&mut device);
        let mut terms = known.to_vec();
        let images = Evaluated { pixels: &pixels, labels: Some(&labels) };
        let report = nll.run(&mut device, images, known, &mut |e: Evaluation| {
            terms.extend(e.new);
            assert_eq!((e.done, e.total), (terms.len(), 28));
            Ok(())
        });
        (nll.resident(), (report.unwrap(), terms))
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let first = pictures(precision, 7);
        assert!([1, 2, 5].iter().all(|&batch| pictures(precision, batch) == first), "{precision:?}: pictures");
        let (resident, all) = report(precision, 28, None, &[]);
        assert_eq!(all.1.len(), 28);
        assert_eq!(resident, 7);
        for (batch, lacking, at_a_time) in
            [(1, None, 7), (9, None, 7), (28, Some(1), 6), (5, Some(5 * 16), 2), (4, Some(6 * 16), 1)]
        {
            if lacking.is_some() && !on_gpu(precision).is_emulated() {
                continue;
            }
            for known in [0, 1, 8, 13, 28] {
                let (resident, parts) = report(precision, batch, lacking, &all.1[..known]);
                assert_eq!(resident, at_a_time, "{lacking:?} bytes lacking");
                assert!(
                    parts == all,
                    "{precision:?}, batches of {batch}, {resident} images at a time, {known} terms known: others"
                );
            }
        }
    }
}

/// As many pictures at a time as there is memory for, by halves.
#[test]
fn a_batch_of_pictures_fits_the_memory() {
    let (model, diffusion) = tiny();
    let params = Params::new(&model);
    let mut device = Device::emulated().unwrap();
    let plan = |batch| {
        let settings = SampleSettings { batch, ..SampleSettings::default() };
        sampler::plan(&model, &diffusion, &params, &settings, Target::Cuda(Precision::Bf16))
    };
    let room = |device: &Device, batch| device.room(&plan(batch).unwrap()).unwrap();
    let [forty, five] = [40, 5].map(|batch| room(&device, batch).need);
    for (free, fits) in [(forty, Some(40)), (forty - 1, Some(20)), (five, Some(5)), (five - 1, Some(3)), (1, None)] {
        cuda(&mut device).driver().emulator().unwrap().set_memory(1 << 30);
        let used = (1 << 30) - room(&device, 1).free.unwrap();
        cuda(&mut device).driver().emulator().unwrap().set_memory(used + free);
        let batch = device.fitting(40, plan).unwrap().map(|(batch, _)| batch);
        assert_eq!(batch, fits, "{free} bytes are free, 40 pictures need {forty}, 5 {five}");
    }
}

/// Guidance sees every picture twice, the threshold selects from what it says, the solvers remember: whole walks of all together.
#[test]
fn steered_samples_follow_the_processor() {
    let sampled = |mut device: Device, reverse| {
        let (mut model, diffusion) = tiny();
        model.null_class = true;
        let params = Params::new(&model);
        device.write_region(Region::Params, &weights(&params)).unwrap();
        let settings =
            SampleSettings { reverse, clip: true, batch: 2, guidance: Some(2.0), dynamic_threshold: Some(0.9) };
        let sampler = Sampler::new(&mut device, &model, &diffusion, &params, &settings).unwrap();
        let pictures = Pictures { first: 0, seeds: &[1, 2, 3], labels: Some(&[0, 2, 1]) };
        sampler.run(&mut device, pictures, &mut |_| Ok(())).unwrap()
    };
    for reverse in [Reverse::DpmSolver, Reverse::Heun] {
        let images = sampled(Device::cpu(0).unwrap(), reverse);
        assert!(images.iter().all(|x| x.is_finite()));
        // As above, times 3 for the difference that guidance takes.
        for (precision, bound) in [(Precision::F32, 6e-6), (Precision::Bf16, 3.0 * 10f64.sqrt() / 512.0)] {
            let off = distance(&sampled(on_gpu(precision), reverse), &images);
            println!("{reverse:?} {precision:?}: pictures {off:.1e} off");
            assert!(off <= bound, "{reverse:?} {precision:?}: {off:e} off, bound {bound:e}");
        }
    }
}
