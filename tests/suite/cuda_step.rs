//! Whole training steps on a GPU or its emulation: against the processor, against themselves however they are run, and by the meter.

use crate::cuda_ops::{cuda, gpu};
use crate::half::Plain;
use iddpm::config::preset::preset;
use iddpm::config::{Config, Precision};
use iddpm::device::{Device, PlanId};
use iddpm::graph::{Region, Target};
use iddpm::ops::Control;
use iddpm::train::plan::TrainVals;
use iddpm::train::{plan, plan_of};
use iddpm::unet::Params;

const IMAGES: usize = 11;

/// 4x4 pixels, two levels, attention at the lower, few images: a step that the emulator runs in a quarter of a second.
fn small(mut c: Config) -> Config {
    c.model.image_size = 4;
    c.model.channel_mult = vec![1, 1];
    c.model.attention_resolutions = vec![2];
    c.train.lr = 1e-4;
    (c.train.batch_size, c.train.microbatch) = (3, c.train.microbatch.min(2));
    c
}

fn config() -> Config {
    small(crate::train::config())
}

/// Everything that a step can have, at once: labels, dropout, flips, drawn t by loss, two microbatches, clipping, decay.
fn busy() -> Config {
    small(crate::train::busy())
}

/// The pixels of all images.
fn pixels() -> Vec<u8> {
    (0..IMAGES * 16).map(|i| (40 + 23 * (i / 16) * (i % 16) % 190) as u8).collect()
}

/// What the host writes before step `k`.
fn inputs(config: &Config, k: u32) -> (Control, Vec<i32>, Vec<i32>) {
    let hyper = plan::hyper(config);
    let bias = |beta: f64| (1.0 - beta.powi(k as i32 + 1)) as f32;
    let (bias1, bias2) = (bias(hyper.beta1), bias(hyper.beta2));
    let lr = config.train.lr as f32;
    let index: Vec<i32> = (0..config.train.batch_size).map(|i| ((i * 4 + k as usize) % IMAGES) as i32).collect();
    let labels = index.iter().map(|i| i % 2).collect();
    (Control { seed: 5, step: k, lr, bias1, bias2, ..Control::default() }, index, labels)
}

/// The weights at the start, none of them 0, so that every path carries something.
fn weights(params: &Params) -> Vec<f32> {
    let mut flat = params.init(3);
    for (i, x) in flat.iter_mut().enumerate().filter(|(_, x)| **x == 0.0) {
        *x = 0.02 * (0.7 * i as f32).sin();
    }
    flat
}

/// A recorded training step on a device.
struct Run {
    device: Device,
    id: PlanId,
    vals: TrainVals,
    config: Config,
    len: usize,
    k: u32,
}

impl Run {
    fn new(config: &Config, mut device: Device, reuse: bool) -> Self {
        let (plan, vals, params) = plan_of(config, IMAGES, reuse, device.target()).unwrap();
        let id = device.bind(plan).unwrap();
        let flat = weights(&params);
        device.write_region(Region::Data, &pixels()).unwrap();
        device.write_region(Region::Params, &flat).unwrap();
        device.write_region(Region::Ema, &flat.repeat(config.train.ema_rates.len())).unwrap();
        Run { device, id, vals, config: config.clone(), len: params.len, k: 0 }
    }

    /// One step; the loss of each image.
    fn step(&mut self) -> Vec<f32> {
        self.write();
        self.device.run(self.id).unwrap();
        let mut loss = vec![f32::NAN; self.config.train.batch_size];
        self.device.read(self.id, self.vals.terms.loss, &mut loss).unwrap();
        loss
    }

    fn write(&mut self) {
        let (control, index, labels) = inputs(&self.config, self.k);
        self.k += 1;
        self.device.write(self.id, self.vals.control, &[control]).unwrap();
        self.device.write(self.id, self.vals.index, &index).unwrap();
        if let Some(v) = self.vals.labels {
            self.device.write(self.id, v, &labels).unwrap();
        }
    }

    /// Bits of everything that steps leave behind.
    fn bits(&self) -> Vec<u32> {
        let mut all = Vec::new();
        for (region, rows) in [
            (Region::Params, 1),
            (Region::Ema, self.config.train.ema_rates.len()),
            (Region::Grads, 1),
            (Region::AdamM, 1),
            (Region::AdamV, 1),
        ] {
            let mut x = vec![0u32; rows * self.len];
            self.device.read_region(region, &mut x).unwrap();
            all.extend(x);
        }
        all
    }
}

fn on_gpu(precision: Precision) -> Device {
    gpu().with_precision(precision)
}

fn mean(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64
}

/// Sums are taken in another order: 1e-7 at each, which training of so few steps multiplies by less than a thousand.
#[test]
fn twenty_steps_in_f32_follow_the_processor() {
    let config = busy();
    let mut cpu = Run::new(&config, Device::cpu(0).unwrap(), true);
    let mut gpu = Run::new(&config, on_gpu(Precision::F32), true);
    let mut worst = 0.0f64;
    for k in 0..20 {
        let (want, got) = (mean(&cpu.step()), mean(&gpu.step()));
        let off = (got - want).abs() / want.abs();
        worst = worst.max(off);
        assert!(off <= 1e-4, "step {k}: loss {got} for {want}, off {off:e}");
    }
    println!("f32: at most {worst:.1e} off in 20 steps");
}

/// The deviation from f32 grows from step to step as the roundings accumulate in the weights: that of a plain bf16 implementation
/// is the measure.
#[test]
fn twenty_steps_in_bf16_stay_as_near_as_a_plain_implementation() {
    let config = config();
    let mut cpu = Run::new(&config, Device::cpu(0).unwrap(), true);
    let mut gpu = Run::new(&config, on_gpu(Precision::Bf16), true);
    let (planned, vals, params) = plan_of(&config, IMAGES, true, Target::Cuda(Precision::Bf16)).unwrap();
    let mut plain = Plain::new(&planned.graph);
    plain.write(vals_data(&planned.graph), &pixels());
    plain.write_region(Region::Params, &weights(&params));
    plain.write_region(Region::Ema, &weights(&params).repeat(config.train.ema_rates.len()));
    let (mut ours, mut theirs) = (0.0f64, 0.0f64);
    for k in 0..20 {
        let (control, index, _) = inputs(&config, k);
        plain.write(vals.control, &[control]);
        plain.write(vals.index, &index);
        plain.run();
        let (want, got, rounded) = (mean(&cpu.step()), mean(&gpu.step()), mean(plain.read(vals.terms.loss)));
        println!("step {k}: loss {want:.5}, off {:.1e}, plain {:.1e}", (got - want) / want, (rounded - want) / want);
        ours += ((got - want) / want).powi(2);
        theirs += ((rounded - want) / want).powi(2);
    }
    let [ours, theirs] = [ours, theirs].map(|x| (x / 20.0).sqrt());
    println!("bf16: {ours:.2e} off, plain {theirs:.2e}");
    assert!(theirs <= 1e-2, "losses of the plain implementation are {theirs:e} off: it is no measure");
    assert!(ours <= 2.0 * theirs, "losses are {ours:e} off, those of a plain implementation {theirs:e}");
}

fn vals_data(g: &iddpm::graph::Graph) -> iddpm::graph::Val {
    let images = g.steps.iter().find_map(|s| match &s.op {
        iddpm::ops::Op::QSample(op) => Some(op.images.data),
        _ => None,
    });
    images.expect("a training step noises images")
}

/// Each is also a run of its own: two runs have the same bits.
#[test]
fn every_way_to_run_a_step_gives_the_same_bits() {
    let recomputed = |mut c: Config| {
        c.train.recompute = true;
        c
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let bits = |config: &Config, reuse: bool, graph: bool| {
            let mut run = Run::new(config, on_gpu(precision), reuse);
            if graph {
                run.device.capture(run.id).unwrap();
            }
            let mut all: Vec<u32> = (0..2).flat_map(|_| run.step()).map(f32::to_bits).collect();
            all.extend(run.bits());
            all
        };
        let config = busy();
        let first = bits(&config, true, false);
        assert!(bits(&config, false, false) == first, "{precision:?}: memory of their own gives other bits");
        assert!(bits(&config, true, true) == first, "{precision:?}: a captured graph has other bits");
        assert!(bits(&recomputed(config), true, true) == first, "{precision:?}: recomputed blocks have other bits");
    }
}

/// Every launch reads and writes each sector of memory at least once: what the plan declares, and what it says of scratch memory.
/// Whole sectors for small tensors, counters and tables make up the rest.
#[test]
fn a_step_moves_what_its_plan_declares() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut run = Run::new(&config(), Device::emulated().unwrap().with_precision(precision), true);
        run.step();
        run.write();
        let driver = cuda(&mut run.device).driver().clone();
        let ((), launches) = driver.emulator().unwrap().metered(|| run.device.run(run.id)).unwrap();
        let moved: u64 = launches.iter().map(|l| l.traffic.read_footprint + l.traffic.written_footprint).sum();
        let g = &run.device.plan(run.id).graph;
        let (cost, scratch) = (g.cost(), g.scratch_traffic());
        let declared = cost.read + cost.written + scratch;
        let ratio = moved as f64 / declared;
        println!("{precision:?}: declared {declared} bytes, {scratch} of them scratch, moved {moved}: {ratio:.3}");
        assert!(ratio <= 1.15, "{precision:?}: {moved} bytes moved, {declared} declared");
    }
}

/// The CIFAR-10 configuration of the paper at batch 128: what its plan for CUDA promises.
#[test]
fn the_plan_for_cifar_10_keeps_its_promises() {
    let mut config = preset("cifar10").unwrap();
    config.train.batch_size = 128;
    let (plan, ..) = plan_of(&config, 50_000, true, Target::Cuda(Precision::Bf16)).unwrap();
    let (cost, scratch) = (plan.graph.cost(), plan.graph.scratch_traffic());
    let declared = cost.read + cost.written;
    println!(
        "declared {:.2} GB, scratch {:.2} GB, peak {:.2} GB",
        declared / 1e9,
        scratch / 1e9,
        plan.bytes() as f64 / 1e9
    );
    assert!(declared <= 24e9, "{declared} bytes per step");
    assert!(plan.bytes() < 5_000_000_000, "{} bytes of memory", plan.bytes());
}
