//! Runs on every device there is: steps in flight, failures that are seen late, images that stay on the host, memory that is too
//! small.

#[cfg(feature = "emulator")]
use crate::device::{gpu, on_a_gpu};
#[cfg(feature = "emulator")]
use crate::train::config;
use crate::train::{assert_same, busy, images};
use iddpm::checkpoint::{self, Checkpoint};
use iddpm::config::Config;
#[cfg(feature = "emulator")]
use iddpm::config::Precision;
use iddpm::device::Device;
#[cfg(feature = "emulator")]
use iddpm::device::driver::Started;
use iddpm::graph::{DType, Graph, Region, Shape};
#[cfg(feature = "emulator")]
use iddpm::nll::{Evaluated, Nll, NllSettings};
use iddpm::ops::grad_norm::GradNorm;
#[cfg(feature = "emulator")]
use iddpm::sampler::{self, Pictures, SampleSettings, Sampler};
use iddpm::train::log::Meter;
use iddpm::train::{Trainer, slots};
#[cfg(feature = "emulator")]
use iddpm::unet::Params;

/// The processor, and the CUDA kernels in both precisions: on a GPU if one is asked for, else on an emulated one that is `lag`
/// marks behind its host.
#[cfg(feature = "emulator")]
fn devices(lag: u64) -> Vec<(&'static str, Device)> {
    let open = || if on_a_gpu() { gpu() } else { emulated(lag) };
    let with = |precision| open().with_precision(precision);
    let gpus = [("bf16", with(Precision::Bf16)), ("f32", with(Precision::F32))];
    [("processor", Device::cpu(2).unwrap())].into_iter().chain(gpus).collect()
}

#[cfg(not(feature = "emulator"))]
fn devices(_lag: u64) -> Vec<(&'static str, Device)> {
    vec![("processor", Device::cpu(2).unwrap())]
}

#[cfg(feature = "emulator")]
fn emulated(lag: u64) -> Device {
    let device = Device::emulated().unwrap();
    set(&device, |d| d.set_lag(lag));
    device
}

#[cfg(feature = "emulator")]
fn set(device: &Device, f: impl FnOnce(&iddpm::device::driver::EmulatedDriver)) {
    let Device::Cuda(d) = device else { panic!("not emulated") };
    f(d.driver().emulator().unwrap());
}

/// What `work` starts on the emulator.
#[cfg(feature = "emulator")]
fn started<T>(at: &mut T, device: impl Fn(&T) -> &Device, work: impl FnOnce(&mut T)) -> Started {
    let now = |at: &T| {
        let mut all = None;
        set(device(at), |d| all = Some(d.started()));
        all.unwrap()
    };
    let before = now(at);
    work(at);
    let after = now(at);
    Started {
        kernels: after.kernels - before.kernels,
        graphs: after.graphs - before.graphs,
        waits: after.waits - before.waits,
    }
}

/// A step is one graph, started without waiting; so is a reverse step, and a batch of terms of the bound.
#[cfg(feature = "emulator")]
#[test]
fn a_step_is_one_graph_and_nothing_waits_for_it() {
    let c = tiny(config());
    let mut t = Trainer::open(c.clone(), emulated(9), images(11), true).unwrap();
    // The first step of a bf16 plan rounds the weights, later ones keep them rounded.
    t.step(&mut Meter::default()).unwrap();
    let steps = |t: &mut Trainer| (0..3).for_each(|_| t.begin(&mut Meter::default()).unwrap());
    assert_eq!(started(&mut t, |t| &t.device, steps), Started { kernels: 0, graphs: 3, waits: 0 });
    t.finish(&mut Meter::default()).unwrap();

    // These plans round the weights that training has changed: one kernel.
    let mut process = c.diffusion.clone();
    process.timestep_respacing = "5".into();
    let settings = SampleSettings { batch: 2, ..SampleSettings::default() };
    let sampler = Sampler::new(&mut t.device, &c.model, &process, &t.params, &settings).unwrap();
    let pictures = Pictures { first: 0, seeds: &[1, 2], labels: None };
    let walk = |t: &mut Trainer| drop(sampler.run(&mut t.device, pictures, &mut |_| Ok(())).unwrap());
    let walked = started(&mut t, |t| &t.device, walk);
    // The pictures are waited for at the end.
    assert_eq!(walked, Started { kernels: 1, graphs: 5, waits: 1 });

    let settings = NllSettings { clip: true, batch: 4, seed: 0 };
    let nll = Nll::new(&mut t.device, &c.model, &process, &t.params, 2, &settings).unwrap();
    let pixels = images(2).pixels;
    let terms = |t: &mut Trainer| {
        nll.run(&mut t.device, Evaluated { pixels: &pixels, labels: None }, &[], &mut |_| Ok(())).unwrap();
    };
    // Two images at five steps are three batches of four.
    assert_eq!(started(&mut t, |t| &t.device, terms), Started { kernels: 1, graphs: 3, waits: 0 });
}

/// The cheapest network: 4 images of 8x8 in flight.
fn tiny(mut c: Config) -> Config {
    c.model.attention_resolutions = vec![];
    c.train.batch_size = 2;
    c.train.microbatch = 0;
    c
}

#[test]
fn images_on_the_host_give_the_bits_of_images_on_the_device() {
    for ((name, one), (_, other)) in devices(0).into_iter().zip(devices(5)) {
        let mut resident = Trainer::new(tiny(busy()), one, &images(11), true).unwrap();
        let mut streamed = Trainer::open(tiny(busy()), other, images(11), true).unwrap();
        assert!(streamed.streams() && !resident.streams());
        let data = |t: &Trainer| t.plan().graph.region_bytes(Region::Data);
        assert_eq!((data(&resident), data(&streamed)), (11 * 64, 4 * 64), "{name}");
        let (mut a, mut b) = (Meter::default(), Meter::default());
        for _ in 0..4 {
            resident.step(&mut a).unwrap();
            streamed.begin(&mut b).unwrap();
        }
        streamed.finish(&mut b).unwrap();
        assert_eq!(a.mean(None), b.mean(None), "{name}");
        assert_same(&resident.snapshot().unwrap(), &streamed.snapshot().unwrap(), name);
        assert_eq!(resident.param_norm().unwrap().to_bits(), streamed.param_norm().unwrap().to_bits(), "{name}");
    }
}

/// Saved after two steps, resumed with the images on the host, twice as far: the bits of an uninterrupted run.
#[test]
fn a_run_is_resumed_to_the_bit_on_every_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for ((name, one), ((_, other), (_, third))) in devices(5).into_iter().zip(devices(2).into_iter().zip(devices(0))) {
        let mut meter = Meter::default();
        let mut whole = Trainer::new(tiny(busy()), one, &images(11), true).unwrap();
        let mut half = Trainer::new(tiny(busy()), other, &images(11), true).unwrap();
        (0..4).for_each(|_| whole.begin(&mut meter).unwrap());
        (0..2).for_each(|_| half.begin(&mut meter).unwrap());
        half.finish(&mut meter).unwrap();
        whole.finish(&mut meter).unwrap();
        checkpoint::save(&path, &half.snapshot().unwrap(), &slots(&half.params)).unwrap();
        let mut resumed = Trainer::open(tiny(busy()), third, images(11), true).unwrap();
        resumed.restore(&Checkpoint::open(&path).unwrap()).unwrap();
        (0..2).for_each(|_| resumed.begin(&mut meter).unwrap());
        resumed.finish(&mut meter).unwrap();
        assert_same(&whole.snapshot().unwrap(), &resumed.snapshot().unwrap(), name);
    }
}

/// Class 1 has an embedding that is not finite: the first image of class 1 fails, and nothing after it counts.
#[test]
fn a_failed_step_is_found_late_and_loses_nothing() {
    for ((name, device), (_, twin)) in devices(20).into_iter().zip(devices(0)) {
        let mut c = tiny(busy());
        c.train.batch_size = 1;
        let mut t = Trainer::open(c.clone(), device, images(11), true).unwrap();
        let mut weights = t.snapshot().unwrap().params;
        let table = t.params.list.iter().find(|p| p.name == "label_emb.weight").unwrap().clone();
        let row = table.offset + table.dims[1];
        weights[row] = f32::INFINITY;
        t.device.write_region(Region::Params, &weights).unwrap();
        // The classes of the first images: even and odd.
        let order =
            images(11).batches(1, c.train.seed, 0).map(|mut b| (0..8).map(|_| b.next()[0] % 2).collect::<Vec<_>>());
        let order = order.unwrap();
        let bad = order.iter().position(|&class| class == 1).unwrap();
        assert!(order[bad + 1..bad + 3].contains(&0), "a good step follows soon: {order:?}");
        let (mut meter, mut good) = (Meter::default(), Meter::default());
        let mut other = Trainer::new(c, twin, &images(11), true).unwrap();
        other.device.write_region(Region::Params, &weights).unwrap();
        for _ in 0..bad {
            other.step(&mut good).unwrap();
        }
        let error = (0..8).find_map(|_| t.begin(&mut meter).err()).or_else(|| t.finish(&mut meter).err()).unwrap();
        for part in [format!("step {bad}:"), "emb + label_emb".into(), "--lr".into()] {
            assert!(error.to_string().contains(&part), "{name}: {error} lacks {part}");
        }
        assert_eq!((t.step, good.mean(None)), (bad as u64, meter.mean(None)), "{name}");
        for region in [Region::Params, Region::Ema, Region::AdamM, Region::AdamV] {
            let read = |t: &Trainer| {
                let mut flat = vec![0.0f32; t.params.len];
                t.device.read_region(region, &mut flat).unwrap();
                flat.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert!(read(&t) == read(&other), "{name}: {region:?} differs from that before the failed step");
        }
        // The step fails again when it is tried again.
        let again = t.step(&mut meter).unwrap_err();
        assert_eq!(again.to_string(), error.to_string(), "{name}");
    }
}

#[test]
fn a_guarded_norm_stays_bad() {
    for (_, mut device) in devices(0) {
        let mut g = Graph::on(device.target());
        let grads = g.at("grads", Shape::rows(1, 5), DType::F32, Region::Grads, 0);
        let loss = g.fixed("loss", Shape::rows(300, 1), DType::F32, Region::State);
        let norm = GradNorm::record_guarded(&mut g, grads, loss);
        let id = device.bind(iddpm::device::Plan::new(g, true)).unwrap();
        device.write(id, grads, &[2.0f32, 0.0, 0.0, 0.0, 0.0]).unwrap();
        let mut run = |losses: &[f32]| {
            device.write(id, loss, losses).unwrap();
            device.run(id).unwrap();
            let mut out = [0.0f32];
            device.read(id, norm, &mut out).unwrap();
            out[0]
        };
        let good = vec![1.0; 300];
        assert_eq!(run(&good), 2.0);
        let mut bad = good.clone();
        bad[277] = f32::INFINITY;
        assert!(run(&bad).is_nan());
        assert!(run(&good).is_nan(), "the next norm is good, but the one before was not");
    }
}

#[cfg(feature = "emulator")]
#[test]
fn memory_that_is_too_small_is_told_with_what_would_fit() {
    let mut c = config();
    c.train.batch_size = 8;
    let planned = |c: &Config, target| iddpm::train::plan_of(c, 16, true, target).unwrap().0.bytes();
    let device = emulated(0);
    let mut half = c.clone();
    half.train.microbatch = 4;
    let (whole, part) = (planned(&c, device.target()), planned(&half, device.target()));
    assert!(part < whole, "{part} of {whole}");
    set(&device, |d| d.set_memory(part));
    let text = Trainer::open(c.clone(), device, images(20), false).err().unwrap().to_string();
    let sizes = [whole, part].map(iddpm::device::room::bytes);
    for part in [format!("needs {} of memory", sizes[0]), format!("{} are free", sizes[1]), "--microbatch 4".into()] {
        assert!(text.contains(&part), "{text} lacks {part}");
    }
    let device = emulated(0);
    set(&device, |d| d.set_memory(1 << 20));
    let text = Trainer::open(c, device, images(20), false).err().unwrap().to_string();
    assert!(text.contains("not even --microbatch 1") && text.contains("1.0 MiB are free"), "{text}");
}

#[cfg(feature = "emulator")]
#[test]
fn a_batch_that_is_too_large_is_told_with_one_that_fits() {
    let (c, params) = (config(), Params::new(&config().model));
    let settings = |batch| SampleSettings { batch, ..SampleSettings::default() };
    let mut device = emulated(0);
    let plan = |batch| sampler::plan(&c.model, &c.diffusion, &params, &settings(batch), device.target()).unwrap();
    let memory = plan(16).bytes();
    assert!(plan(32).bytes() > memory);
    set(&device, |d| d.set_memory(memory));
    let sampler = Sampler::new(&mut device, &c.model, &c.diffusion, &params, &settings(64));
    let text = sampler.err().unwrap().to_string();
    for part in ["sampling needs", "are free", "--batch-size 16 would fit"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    Sampler::new(&mut device, &c.model, &c.diffusion, &params, &settings(16)).unwrap();
    let nll = NllSettings { clip: true, batch: 4096, seed: 0 };
    let text = Nll::new(&mut device, &c.model, &c.diffusion, &params, 2, &nll).err().unwrap().to_string();
    assert!(text.contains("the evaluation needs") && text.contains("too little even for --batch-size 1"), "{text}");
}

/// A set that the device has no room for stays on the host without being asked.
#[cfg(feature = "emulator")]
#[test]
fn a_set_that_does_not_fit_is_streamed() {
    let (c, device) = (tiny(config()), emulated(0));
    let need = iddpm::train::plan_of(&c, 4, true, device.target()).unwrap().0.bytes();
    // The set has 640 KB; what is free beyond the plan has less, and the norm of the weights needs little.
    set(&device, |d| d.set_memory(need + (300 << 10)));
    let mut t = Trainer::open(c, device, images(10_000), false).unwrap();
    assert!(t.streams());
    t.step(&mut Meter::default()).unwrap();
}
