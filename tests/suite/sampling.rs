//! Objectives and samplers beyond the reference's, as a user meets them.

use crate::cli::{SMALL, bad, good, trained};
use iddpm::checkpoint::{self, Checkpoint};
use iddpm::npz::{self, Array, Values};
use iddpm::rng;
use iddpm::schedule::sigmoid_betas;
use std::path::Path;

/// Trains on v with weighted errors over a sigmoid schedule; the checkpoint knows all of it.
#[test]
fn a_velocity_model_is_trained_and_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let small = SMALL.replace("cosine", "sigmoid");
    let flags = "--predict_v True --loss_weight min-snr:5 --learn_sigma True --sample-interval 0";
    let out = good(f, &format!("train {small} {flags} --steps 3 --out run"));
    for setting in ["predict-v=true", "loss-weight=min-snr:5", "noise-schedule=sigmoid", "predict-xstart=false"] {
        assert!(out.contains(setting), "{setting}: {out}");
    }
    good(f, "sample --model-path run --num-samples 2 --use-ddim --timestep-respacing 4 --out s --ema-rate 0");
    good(f, "sample --model-path run --num-samples 2 --predict-v True --out s --ema-rate 0");
    good(f, "nll --model-path run --num-samples 2 --out n");
    // Diffusers gets the betas themselves; they are recognised without our record of the schedule.
    good(f, "export run --to folder");
    let settings = std::fs::read_to_string(f.join("folder/scheduler_config.json")).unwrap();
    let mut settings: serde_json::Value = serde_json::from_str(&settings).unwrap();
    assert_eq!(settings["prediction_type"], "v_prediction");
    let betas: Vec<f64> = serde_json::from_value(settings["trained_betas"].clone()).unwrap();
    assert_eq!(betas, sigmoid_betas(12));
    good(f, "import folder --to back.safetensors");
    let config = |path: &Path| Checkpoint::open(path).unwrap().progress.config.diffusion;
    let trained = config(&checkpoint::find(&f.join("run")).unwrap());
    assert_eq!(config(&f.join("back.safetensors")), trained);
    let weights = f.join("folder/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    std::fs::write(&weights, safetensors::serialize(tensors.iter(), None).unwrap()).unwrap();
    good(f, "import folder --to other.safetensors");
    let other = config(&f.join("other.safetensors"));
    assert_eq!((other.noise_schedule, other.mean_type), (trained.noise_schedule, trained.mean_type));
    settings["trained_betas"][3] = 0.5.into();
    std::fs::write(f.join("folder/scheduler_config.json"), settings.to_string()).unwrap();
    bad(f, "import folder --to third.safetensors", &["trained_betas", "sigmoid"]);

    bad(f, "sample --model-path run --predict-v False", &["--predict-v false", "true"]);
    bad(f, "sample --model-path run --loss-weight uniform", &["--loss-weight uniform", "min-snr:5"]);
    bad(f, "train --predict_v True --predict_xstart True", &["--predict-v", "--predict-xstart"]);
    bad(f, "train --loss_weight snr", &["snr", "min-snr:5"]);
    bad(f, "train --loss_weight min-snr --use_kl True", &["--loss-weight min-snr:5", "--use-kl"]);
    // A flag for another prediction takes the preset's back; a False leaves a prediction of another kind alone.
    let plan = |flags: &str| good(f, &format!("plan --totals --batch-size 1 {flags}"));
    assert_eq!(plan("--predict_v True --predict_xstart False"), plan("--predict_v True"));
}

/// Every sampler by name, few steps, pictures that depend on their seed alone.
#[test]
fn samplers_are_chosen_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let model = trained().join("run").display().to_string();
    let run = |flags: &str, out: &str| {
        let more = "--num-samples 3 --ema-rate 0 --timestep-respacing logsnr5";
        let strip = format!("--strip {out}.png --frame-of xt --frames 5");
        let told = good(f, &format!("sample --model-path {model} {more} {flags} {strip} --out {out}"));
        // The way there tells samplers apart even where the network has learned nothing yet.
        let strip = std::fs::read(f.join(format!("{out}.png"))).unwrap();
        (told, (strip, iddpm::npz::read(&f.join(out).join("samples_3x16x16x1.npz")).unwrap()))
    };
    let mut all = vec![];
    for (flags, told) in [
        ("--sampler ancestral", "5 ancestral steps\n"),
        ("--sampler ddim", "5 DDIM steps\n"),
        ("--sampler dpm-solver++", "5 DPM-Solver++ steps\n"),
        ("--sampler heun", "5 Heun steps (9 calls of the network)\n"),
    ] {
        let (text, pictures) = run(flags, "a");
        assert!(text.contains(told), "{text}");
        assert!(pictures == run(&format!("{flags} --batch-size 2"), "b").1, "{flags}");
        // This network has learned nothing yet: both slopes of Heun agree, and it goes as DDIM does.
        assert!(flags.contains("heun") || !all.contains(&pictures), "{flags}");
        all.push(pictures);
    }
    assert!(all[0] == run("", "c").1);
    assert!(all[1] == run("--use_ddim True", "c").1);
    assert!(all[1] == run("--sampler ddim --eta 0", "c").1);
    let bad = |flags: &str, parts: &[&str]| bad(f, &format!("sample --model-path {model} {flags}"), parts);
    bad("--sampler euler", &["euler", "dpm-solver++", "heun"]);
    bad("--sampler heun --eta 0.5", &["--eta 0.5", "--sampler ddim", "heun"]);
    bad("--sampler heun --use-ddim True", &["--sampler heun", "--use-ddim true"]);
    bad("--sampler ddim --use-ddim no", &["--sampler ddim", "--use-ddim false"]);
    for eta in ["1.01", "-0.1", "nan"] {
        bad(&format!("--sampler ddim --eta={eta}"), &["--eta", "between 0 and 1"]);
    }
    bad("--timestep-respacing logsnr1 --sampler dpm-solver++", &["logsnr1", "12"]);
}

/// A conditional model with a null class goes through training, sampling, export and import; one without is refused by name.
#[test]
fn guidance_needs_and_uses_a_null_class() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let flags = "--class_cond True --label_dropout 0.5 --sample-interval 0";
    let out = good(f, &format!("train {SMALL} {flags} --steps 3 --out run"));
    assert!(out.contains("null-class=true") && out.contains("label-dropout=0.5"), "{out}");
    let run = checkpoint::find(&f.join("run")).unwrap();
    let config = Checkpoint::open(&run).unwrap().progress.config;
    assert_eq!((config.model.num_classes, config.model.class_rows()), (Some(10), Some(11)));
    let sample = |model: &str, flags: &str, out: &str| {
        let more = "--num-samples 3 --ema-rate 0 --timestep-respacing 4 --labels 3,5 --frame-of xt --frames 4";
        good(f, &format!("sample --model-path {model} {more} {flags} --strip {out}.png --out {out}"));
        std::fs::read(f.join(format!("{out}.png"))).unwrap()
    };
    let plain = sample("run", "", "a");
    assert!(plain == sample("run", "--guidance 1", "b"));
    let guided = sample("run", "--guidance 4 --batch-size 2", "c");
    assert!(guided == sample("run", "--guidance 4", "d"));
    sample("run", "--guidance 2.5 --sampler heun --dynamic-threshold 0.9", "e");
    good(f, "nll --model-path run --num-samples 2 --out n");

    good(f, "export run --to m.pt --ema-rate 0");
    let told = "--image_size 16 --num_heads 4 --diffusion_steps 12 --noise_schedule cosine --rescale_timesteps True";
    good(f, &format!("import m.pt {told} --null-class True --to back.safetensors"));
    good(f, &format!("import m.pt {told} --to classes.safetensors"));
    let model = |name: &str| Checkpoint::open(&f.join(name)).unwrap().progress.config.model;
    let (back, classes) = (model("back.safetensors"), model("classes.safetensors"));
    assert_eq!((back.num_classes, back.null_class), (Some(10), true));
    assert_eq!((classes.num_classes, classes.null_class), (Some(11), false));
    assert!(sample("back.safetensors", "--guidance 4", "g") == guided);
    good(f, "export run --to m.safetensors");
    good(f, "import m.safetensors --to whole.safetensors");
    assert_eq!(model("whole.safetensors"), config.model);

    let cond = trained().join("cond").display().to_string();
    bad(f, &format!("sample --model-path {cond} --guidance 3"), &["--guidance 3", "null class", "--label-dropout"]);
    bad(f, "sample --model-path run --guidance=-1", &["--guidance -1", "0 and 100"]);
    bad(f, "sample --model-path run --guidance=1e9", &["--guidance 1000000000", "100"]);
    bad(f, "sample --model-path run --labels 10", &["--labels 10", "0 to 9"]);
    bad(f, "sample --model-path run --dynamic-threshold 1.5", &["--dynamic-threshold 1.5", "0 and 1"]);
    bad(f, "sample --model-path run --dynamic-threshold 0.9 --clip-denoised no", &["--dynamic-threshold 0.9"]);
    bad(f, "train --label_dropout 0.1", &["--label-dropout", "--class-cond"]);
    bad(f, "train --label_dropout 1 --class_cond True", &["--label-dropout 1", "0.99"]);
    bad(f, "train --null_class True", &["--null-class", "--class-cond"]);
    bad(f, "train --label_dropout 0.1 --class_cond True --null-class no", &["--label-dropout 0.1", "--null-class"]);
    bad(f, &format!("train --resume {cond} --label_dropout 0.1"), &["--null-class true", "false"]);
}

/// As many labels fall as asked for; a place of a batch is a function of seed and step alone.
#[test]
fn labels_are_dropped_with_their_probability() {
    let dropped = |p: f64| (0..20_000).filter(|i| rng::drops_label(p, 3, i % 100, i / 100)).count() as f64;
    assert_eq!(dropped(0.0), 0.0);
    for p in [0.1f64, 0.5, 0.99] {
        let (mean, deviation) = (20_000.0 * p, (20_000.0 * p * (1.0 - p)).sqrt());
        assert!((dropped(p) - mean).abs() < 4.0 * deviation, "{p}: {}", dropped(p));
    }
    // Streams of other uses are others.
    let both = (0..2000)
        .filter(|&i| rng::drops_label(0.5, 3, i, 0) == (rng::philox([0, i, 0, rng::op::FLIP], 3)[0] >> 31 == 0));
    assert!((both.count() as f64 - 1000.0).abs() < 200.0);
}

/// From images to latents and from those to pictures; latents of seeds, and rows between them.
#[test]
fn latents_are_written_read_and_interpolated() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let cond = trained().join("cond").display().to_string();
    let encode = |flags: &str, out: &str| {
        good(
            f,
            &format!(
                "encode --model-path {cond} --num-samples 5 --timestep-respacing 4 --ema-rate 0 {flags} --out {out}"
            ),
        );
        npz::read(&f.join(out).join("latents_5x16x16x1.npz")).unwrap()
    };
    let latents = encode("", "z");
    assert_eq!(latents, encode("--batch-size 2", "y"));
    assert_eq!((latents[0].1.shape.as_slice(), latents[1].1.shape.as_slice()), (&[5, 16, 16, 1][..], &[5][..]));
    let Values::I64(labels) = &latents[1].1.values else { panic!("labels") };

    let more = "--ema-rate 0 --timestep-respacing 4";
    let sample = |flags: &str, name: &str, out: &str| {
        let told = good(f, &format!("sample --model-path {cond} {more} {flags} --out {out}"));
        let arrays = npz::read(&f.join(out).join(name)).unwrap();
        let (Values::U8(pixels), Values::I64(labels)) = (&arrays[0].1.values, &arrays[1].1.values) else {
            panic!("{name}")
        };
        (pixels.clone(), labels.clone(), told)
    };
    let file = "--latents z/latents_5x16x16x1.npz";
    let (all, own, told) = sample(file, "samples_5x16x16x1.npz", "a");
    assert!(own == *labels && told.contains("DDIM"), "{told}");
    let (first, ..) = sample(&format!("{file} --num-samples 2"), "samples_2x16x16x1.npz", "b");
    assert_eq!(first, all[..2 * 256]);

    // A row between seeds ends in their own pictures.
    let row = "--interpolate 3,8,5 --num-samples 4 --labels 2,6 --sampler dpm-solver++";
    let (pictures, labels, _) = sample(row, "samples_8x16x16x1.npz", "c");
    assert_eq!(labels, [2, 2, 2, 2, 6, 6, 6, 6]);
    assert!(f.join("c/interpolation.png").exists() && !f.join("c/grid.png").exists());
    for (seed, label, at) in [(3, 2, 0), (8, 2, 3), (8, 6, 4), (5, 6, 7)] {
        let one = format!("--seed {seed} --num-samples 1 --labels {label} --sampler dpm-solver++");
        let (one, ..) = sample(&one, "samples_1x16x16x1.npz", "d");
        assert!(one == pictures[at * 256..][..256], "seed {seed}");
    }
    let (row, labels, _) = sample(&format!("{file} --interpolate 4,0 --num-samples 3"), "samples_3x16x16x1.npz", "e");
    assert!(row[..256] == all[4 * 256..] && labels == [own[4]; 3]);

    let bad = |flags: &str, parts: &[&str]| bad(f, &format!("sample --model-path {cond} {flags}"), parts);
    bad(&format!("{file} --sampler ancestral"), &["ancestral", "ddim", "heun"]);
    bad("--interpolate 1,2 --use-ddim --eta 0.5", &["--eta 0.5"]);
    bad("--interpolate 1", &["1 latents"]);
    bad("--interpolate 1,2 --num-samples 1", &["1 pictures a row"]);
    bad(&format!("{file} --interpolate 0,5"), &["--interpolate 5", "0 to 4"]);
    bad(&format!("{file} --num-samples 6"), &["--num-samples 6", "5 latents"]);
    bad("--latents a/samples_5x16x16x1.npz", &["float32", "16, 16, 1"]);
    bad("--latents gone.npz", &["gone.npz"]);
    npz::write(
        &f.join("nan.npz"),
        &[("arr_0", &Array { shape: vec![1, 16, 16, 1], values: Values::F32(vec![f32::NAN; 256]) })],
    )
    .unwrap();
    bad("--latents nan.npz", &["NaN"]);
}
