//! Training as a whole: resuming, microbatches, determinism, failure. Small networks on synthetic images.

use crate::device::device;
use iddpm::checkpoint::{self, Checkpoint, Snapshot};
use iddpm::config::{Config, LossType, Schedule, TimestepSampler, VarType};
use iddpm::data::Dataset;
use iddpm::device::Device;
use iddpm::graph::Region;
use iddpm::train::log::Meter;
use iddpm::train::run::{Options, run};
use iddpm::train::{Trainer, slots};
use std::time::Duration;

/// 8x8 grey images of a square whose place and brightness depend on the image; two classes.
pub fn images(n: usize) -> Dataset {
    let pixel = |i: usize, y: usize, x: usize| {
        let inside = (y as i32 - (i % 3) as i32 - 2).abs() < 2 && (x as i32 - (i % 5) as i32 - 1).abs() < 2;
        if inside { (150 + 13 * i % 100) as u8 } else { 20 }
    };
    let all = (0..n).flat_map(|i| (0..64).map(move |p| pixel(i, p / 8, p % 8)));
    Dataset {
        n,
        h: 8,
        w: 8,
        c: 1,
        pixels: all.collect(),
        labels: Some((0..n).map(|i| (i % 2) as i32).collect()),
        classes: vec!["even".into(), "odd".into()],
        source: Default::default(),
    }
}

pub fn config() -> Config {
    let mut c = Config::default();
    c.model.image_size = 8;
    c.model.in_channels = 1;
    c.model.out_channels = 2;
    c.model.model_channels = 32;
    c.model.num_res_blocks = 1;
    c.model.channel_mult = vec![1, 2];
    c.model.attention_resolutions = vec![2];
    c.diffusion.var_type = VarType::LearnedRange;
    c.diffusion.diffusion_steps = 20;
    c.diffusion.noise_schedule = Schedule::Cosine;
    c.train.lr = 1e-3;
    c.train.batch_size = 6;
    c.train.steps = 8;
    c.train.ema_rates = vec![0.9, 0.99];
    c.train.seed = 3;
    c
}

/// Everything that can depend on randomness or history, at once; 3 steps of the process fill the loss history early.
pub fn busy() -> Config {
    let mut c = config();
    c.model.num_classes = Some(2);
    c.model.dropout = 0.2;
    c.diffusion.diffusion_steps = 3;
    c.diffusion.loss_type = LossType::RescaledKl;
    c.train.schedule_sampler = TimestepSampler::LossSecondMoment;
    c.train.flip = true;
    c.train.microbatch = 4;
    c.train.warmup_steps = 3;
    c.train.lr_anneal_steps = 20;
    c.train.steps = 20;
    c.train.grad_clip = 1.0;
    c.train.weight_decay = 0.01;
    c
}

fn trainer(config: Config) -> Trainer {
    Trainer::new(config, device(), &images(11), true).unwrap()
}

/// Mean losses of the next `n` steps, as bits.
fn steps(t: &mut Trainer, n: usize) -> Vec<u64> {
    let mut step = || {
        let mut meter = Meter::default();
        let report = t.step(&mut meter).unwrap();
        let mean = meter.mean(None).unwrap();
        [mean.loss, mean.mse, mean.vb, report.grad_norm].map(f64::to_bits)
    };
    (0..n).flat_map(|_| step()).collect()
}

/// The same in every number to the bit, and as files.
pub fn assert_same(a: &Snapshot, b: &Snapshot, what: &str) {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (name, x, y) in [
        ("weights", &a.params, &b.params),
        ("averages", &a.ema, &b.ema),
        ("m", &a.adam_m, &b.adam_m),
        ("v", &a.adam_v, &b.adam_v),
    ] {
        assert!(bits(x) == bits(y), "{what}: {name} differ");
    }
    assert_eq!(a, b, "{what}");
}

#[test]
fn a_resumed_run_continues_to_the_bit() {
    for (name, config, half) in [("plain", config(), 4), ("everything", busy(), 10)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("half.safetensors");
        let mut whole = trainer(config.clone());
        let mut losses = steps(&mut whole, 2 * half);
        let mut first = trainer(config.clone());
        assert_eq!(steps(&mut first, half), losses.drain(..4 * half).collect::<Vec<_>>(), "{name}: first half");
        checkpoint::save(&path, &first.snapshot().unwrap(), &slots(&first.params)).unwrap();
        drop(first);
        let mut second = trainer(config);
        second.restore(&Checkpoint::open(&path).unwrap()).unwrap();
        assert_eq!(steps(&mut second, half), losses, "{name}: second half");
        assert_same(&whole.snapshot().unwrap(), &second.snapshot().unwrap(), name);
        let [a, b] = ["a", "b"].map(|n| folder.path().join(n));
        checkpoint::save(&a, &whole.snapshot().unwrap(), &slots(&whole.params)).unwrap();
        checkpoint::save(&b, &second.snapshot().unwrap(), &slots(&second.params)).unwrap();
        assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap(), "{name}: the files differ");
    }
}

#[test]
fn the_loss_history_is_in_use_when_the_run_is_resumed() {
    let mut t = trainer(busy());
    steps(&mut t, 10);
    let state = t.snapshot().unwrap().state;
    let counts = state.iter().find(|v| v.name == "counts").unwrap();
    let counts: &[u32] = bytemuck::cast_slice(&counts.bytes);
    assert!(counts.iter().all(|&n| n == 10), "the history is not warm: {counts:?}");
}

#[test]
fn bits_do_not_depend_on_threads_memory_reuse_recomputation_or_the_run() {
    let images = images(11);
    let mut one = Trainer::new(busy(), Device::cpu(1).unwrap(), &images, true).unwrap();
    let losses = steps(&mut one, 5);
    let snapshot = one.snapshot().unwrap();
    let mut recompute = busy();
    recompute.train.recompute = true;
    for (name, config, threads, reuse) in [
        ("the same again", busy(), 1, true),
        ("four threads", busy(), 4, true),
        ("no reuse of memory", busy(), 2, false),
        ("recomputation", recompute, 2, true),
    ] {
        let mut other = Trainer::new(config, Device::cpu(threads).unwrap(), &images, reuse).unwrap();
        assert_eq!(steps(&mut other, 5), losses, "{name}");
        let mut after = other.snapshot().unwrap();
        after.progress.config.train.recompute = false;
        assert_same(&snapshot, &after, name);
    }
}

#[test]
fn recomputation_needs_less_memory() {
    let arena = |recompute| {
        let mut c = config();
        c.train.recompute = recompute;
        trainer(c).plan().layout.bytes
    };
    let (plain, less) = (arena(false), arena(true));
    assert!(less < plain, "{less} bytes rather than {plain}");
}

/// Gradients after one step with this microbatch.
fn gradients(microbatch: usize) -> Vec<f32> {
    let mut c = config();
    c.train.microbatch = microbatch;
    let mut t = trainer(c);
    t.step(&mut Meter::default()).unwrap();
    let mut grads = vec![0.0; t.params.len];
    t.device.read_region(Region::Grads, &mut grads).unwrap();
    grads
}

/// The reference sums the mean losses of its microbatches: k equal parts give k times the gradient of the whole.
#[test]
fn gradients_of_equal_microbatches_add_up() {
    let whole = gradients(0);
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    for (size, parts) in [(3, 2.0), (2, 3.0), (1, 6.0)] {
        let summed = gradients(size);
        let difference: Vec<f32> = summed.iter().zip(&whole).map(|(s, w)| s - parts * w).collect();
        // Sums of f32 in another order: a few units of 2^-24 per addition, over the norm far below 1e-5.
        let error = norm(&difference) / norm(&summed);
        assert!(error < 1e-5, "microbatch {size}: relative error {error}");
    }
}

#[test]
fn losses_fall() {
    let mut c = config();
    c.train.lr = 2e-3;
    let mut t = trainer(c);
    let mut mean = |n: usize| {
        let mut meter = Meter::default();
        for _ in 0..n {
            t.step(&mut meter).unwrap();
        }
        meter.mean(None).unwrap()
    };
    let first = mean(5);
    mean(60);
    let last = mean(20);
    assert!(last.mse < 0.5 * first.mse, "mse {} after {}", last.mse, first.mse);
    assert!(last.loss < 0.5 * first.loss, "loss {} after {}", last.loss, first.loss);
}

#[test]
fn a_bad_weight_stops_the_step_names_the_place_and_changes_nothing() {
    for config in [config(), busy()] {
        let mut t = trainer(config);
        steps(&mut t, 2);
        let mut weights = t.snapshot().unwrap().params;
        let bad = t.params.list.iter().find(|p| p.name == "middle_block.0.in_layers.2.weight").unwrap().clone();
        weights[bad.offset] = f32::NAN;
        t.device.write_region(Region::Params, &weights).unwrap();
        let error = t.step(&mut Meter::default()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        for part in ["step 2", "t of the images", "Conv2d of middle_block.0", "--lr"] {
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
        let text = t.snapshot().unwrap_err().to_string();
        assert!(text.contains(&bad.name) && text.contains("not saved"), "{text}");
        let mut after = vec![0.0f32; weights.len()];
        t.device.read_region(Region::Params, &mut after).unwrap();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&after) == bits(&weights), "the failed step changed the weights");
    }
}

#[test]
fn other_images_are_refused_when_resuming() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let data = images(11);
    let mut c = config();
    (c.data.images, c.data.fingerprint) = (data.n, data.fingerprint());
    let t = Trainer::new(c.clone(), device(), &data, true).unwrap();
    checkpoint::save(&path, &t.snapshot().unwrap(), &slots(&t.params)).unwrap();
    c.data.fingerprint += 1;
    let mut other = Trainer::new(c, device(), &data, true).unwrap();
    let error = other.restore(&Checkpoint::open(&path).unwrap()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("fingerprint"), "{error}");
}

#[test]
fn another_network_is_refused_when_resuming() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let t = trainer(config());
    checkpoint::save(&path, &t.snapshot().unwrap(), &slots(&t.params)).unwrap();
    let mut c = config();
    c.model.channel_mult = vec![1, 1];
    let text = trainer(c).restore(&Checkpoint::open(&path).unwrap()).unwrap_err().to_string();
    assert!(text.contains("expected F32 [") && text.contains("found F32 ["), "{text}");
}

/// A run in a folder of its own: log, grids by the callback, a bounded number of checkpoints.
#[test]
fn a_run_logs_saves_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = Options {
        out: folder.path().into(),
        log_interval: 2,
        save_interval: 1,
        sample_interval: 4,
        keep: 2,
        time_limit: None,
        tensorboard: false,
        floor_s: None,
        saved: None,
    };
    let mut grids = Vec::new();
    let mut t = trainer(config());
    run(&mut t, &options, &mut |t, path| {
        grids.push((t.step, path.file_name().unwrap().to_string_lossy().into_owned()));
        Ok("a grid".into())
    })
    .unwrap();
    assert_eq!(grids, [(4, "samples-00000004.png".to_string()), (8, "samples-00000008.png".into())]);
    assert_eq!(checkpoint::list(folder.path()).iter().map(|(s, _)| *s).collect::<Vec<_>>(), [7, 8]);
    let log = std::fs::read_to_string(folder.path().join("log.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4, 6, 8]);
    for key in ["images", "loss", "mse", "vb_bpd", "grad_norm", "param_norm", "lr", "images_per_s", "eta_s"] {
        assert!(lines.iter().all(|l| l[key].is_number()), "{key} is missing");
    }
    assert_eq!(lines[4]["images"], 48);

    // A time limit stops after one step, saved.
    let mut c = config();
    c.train.steps = 1000;
    options.time_limit = Some(Duration::ZERO);
    options.out = folder.path().join("limited");
    std::fs::create_dir(&options.out).unwrap();
    run(&mut trainer(c), &options, &mut |_, _| Ok(String::new())).unwrap();
    assert_eq!(checkpoint::list(&options.out).iter().map(|(s, _)| *s).collect::<Vec<_>>(), [1]);
}
