//! The command lines of improved-diffusion: their flags, what they become, and each run from end to end.

use clap::ArgMatches;
use iddpm::checkpoint::{self, Checkpoint};
use iddpm::cli::reference::{Environment, Script, Translated, spell_out, translate};
use iddpm::config::preset::preset;
use iddpm::grid::Images;
use iddpm::import::tensor_file::TensorFile;
use iddpm::npz::{self, Array, Values};
use iddpm::train::slots;
use iddpm::unet::Params;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The flags of each script with their defaults, from the reference's `create_argparser`.
const MODEL: &str = "num_channels=128 num_res_blocks=2 num_heads=4 num_heads_upsample=-1 attention_resolutions=16,8 \
    dropout=0.0 learn_sigma=False class_cond=False diffusion_steps=1000 noise_schedule=linear timestep_respacing= \
    use_kl=False predict_xstart=False rescale_timesteps=True rescale_learned_sigmas=True use_checkpoint=False \
    use_scale_shift_norm=True";
const IMAGE: &str = "image_size=64 sigma_small=False";
const SUPER_RES: &str = "large_size=256 small_size=64";
const TRAIN: &str = "data_dir= schedule_sampler=uniform lr=1e-4 weight_decay=0.0 lr_anneal_steps=0 batch_size=1 \
    microbatch=-1 ema_rate=0.9999 log_interval=10 save_interval=10000 resume_checkpoint= use_fp16=False \
    fp16_scale_growth=1e-3";
const SAMPLE: &str = "clip_denoised=True num_samples=10000 batch_size=16 use_ddim=False model_path=";
const NLL: &str = "data_dir= clip_denoised=True num_samples=1000 batch_size=1 model_path=";
const SCRIPTS: [(&str, &[&str]); 5] = [
    ("image_train", &[TRAIN, IMAGE, MODEL]),
    ("image_sample", &[SAMPLE, IMAGE, MODEL]),
    ("image_nll", &[NLL, IMAGE, MODEL]),
    ("super_res_train", &[TRAIN, SUPER_RES, MODEL]),
    ("super_res_sample", &[SAMPLE, "base_samples=", SUPER_RES, MODEL]),
];

fn script(name: &str) -> &'static Script {
    Script::find(name).unwrap_or_else(|| panic!("no script {name}"))
}

/// The command line `line` as the script takes it.
fn parsed(line: &str) -> Result<(&'static Script, ArgMatches), String> {
    let args: Vec<OsString> = ["iddpm"].into_iter().chain(line.split_whitespace()).map(OsString::from).collect();
    let args = spell_out(&args).map_err(|e| e.to_string())?.expect("a script");
    let script = script(args[1].to_str().unwrap());
    // Flags of the whole program, as they reach a script.
    let ours = ["threads", "seed", "out", "device"].map(|name| {
        let arg = clap::Arg::new(name).long(name);
        if name == "out" { arg.value_parser(clap::value_parser!(PathBuf)) } else { arg }
    });
    let m = script.command().args(ours).try_get_matches_from(&args[1..]).map_err(|e| e.to_string())?;
    Ok((script, m))
}

fn translated(line: &str, env: &Environment) -> Translated {
    let (script, m) = parsed(line).unwrap();
    translate(script, &m, env).unwrap()
}

fn logdir() -> Environment {
    Environment { log_dir: Some("log".into()), ..Environment::default() }
}

#[test]
fn flags_and_defaults_are_those_of_the_reference() {
    for (name, groups) in SCRIPTS {
        let mut want: Vec<&str> = groups.iter().flat_map(|g| g.split_whitespace()).collect();
        let (s, m) = parsed(name).unwrap();
        let mut have: Vec<String> = s.flags().iter().map(|f| format!("{}={}", f.name, f.value(&m))).collect();
        want.sort_unstable();
        have.sort_unstable();
        assert_eq!(have, want, "{name}");
        assert!(s.flags().iter().all(|f| !f.given(&m)), "{name}");
    }
}

/// A flag that is left out is not passed on, so the preset must hold the reference's default.
#[test]
fn the_preset_holds_every_default() {
    let settings = preset("reference").unwrap().settings();
    // Passed on always; not a setting; told by several settings.
    let apart = "batch_size save_interval log_interval data_dir resume_checkpoint use_fp16 fp16_scale_growth use_checkpoint \
                 timestep_respacing num_heads_upsample microbatch";
    for flag in script("image_train").flags().iter().filter(|f| !apart.split_whitespace().any(|a| a == f.name)) {
        let name = flag.name.replace('_', "-");
        let (_, have) = settings.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no setting {name}"));
        let same = match (have.parse::<f64>(), flag.default.parse::<f64>()) {
            (Ok(have), Ok(want)) => have == want,
            _ => have.eq_ignore_ascii_case(flag.default),
        };
        assert!(same, "{name}: {have}, the reference has {}", flag.default);
    }
}

#[test]
fn flags_are_written_as_argparse_takes_them() {
    let value = |line: &str, flag: &str| {
        let (s, m) = parsed(&format!("image_train {line}")).unwrap();
        s.flags().iter().find(|f| f.name == flag).unwrap().value(&m)
    };
    for (line, flag, want) in [
        ("--lr=3e-4", "lr", "3e-4"),
        ("--microb -1", "microbatch", "-1"),
        ("--num_heads_u=-1", "num_heads_upsample", "-1"),
        ("--num_heads 2 --num_heads 8", "num_heads", "8"),
        ("--num-res-blocks 3", "num_res_blocks", "3"),
        ("--attention 32,16", "attention_resolutions", "32,16"),
        ("--use_k T", "use_kl", "T"),
        ("--learn", "learn_sigma", "True"),
        ("--data_dir a=b", "data_dir", "a=b"),
    ] {
        assert_eq!(value(line, flag), want, "{line}");
    }
    for (text, want) in [("yes", true), ("True", true), ("t", true), ("Y", true), ("1", true), ("NO", false)]
        .into_iter()
        .chain([("false", false), ("f", false), ("n", false), ("0", false)])
    {
        let (_, m) = parsed(&format!("image_train --class_cond {text}")).unwrap();
        assert_eq!(m.get_one::<bool>("class_cond"), Some(&want), "{text}");
    }
    let bad = |line: &str, parts: &[&str]| {
        let text = parsed(&format!("image_train {line}")).expect_err(line);
        parts.iter().for_each(|p| assert!(text.contains(p), "{line}: lacks {p:?}: {text}"));
    };
    bad("--num 3", &["--num", "--num_channels", "--num_res_blocks", "--num_heads"]);
    bad("--learn_sgima True", &["--learn_sgima", "--learn_sigma"]);
    bad("--class_cond maybe", &["maybe", "True", "False", "yes", "0"]);
    bad("--batch_size many", &["many", "--batch_size"]);
    bad("--lr quick", &["quick", "--lr"]);
    bad("--num_samples 3", &["--num_samples"]);
}

/// `words` as one of the lines, in any order behind the command.
#[track_caller]
fn assert_line(line: &[String], command: &str, words: &str) {
    let n = command.split_whitespace().count();
    assert_eq!(line[..n].join(" "), command);
    let mut have: Vec<&str> = line[n..].iter().map(String::as_str).collect();
    let mut want: Vec<&str> = words.split_whitespace().collect();
    have.sort_unstable();
    want.sort_unstable();
    assert_eq!(have, want);
}

#[test]
fn training_becomes_our_training() {
    let t = translated("image_train --data_dir d --image_size 32 --learn_sigma 1 --lr_anneal_steps 20", &logdir());
    assert_line(
        &t.lines[0],
        "train",
        "--data-dir=d --preset=reference --channels=3 --image-size=32 --learn-sigma=1 --lr-anneal-steps=20 --batch-size=1 \
         --save-interval=10000 --labels-from=none --reference-files --out=log",
    );
    assert!(t.lines.len() == 1 && t.notes.is_empty(), "{t:?}");

    let env = Environment { training_test: true, log_format: "stdout,tensorboard".into(), ..Environment::default() };
    let line =
        "super_res_train --data_dir d --class_cond yes --use_fp16 True --save_interval 5 --seed 4 --microbatch 2";
    let t = translated(line, &env);
    assert_line(
        &t.lines[0],
        "super-res train",
        "--data-dir=d --preset=reference --channels=3 --large-size=256 --small-size=64 --class-cond=yes --batch-size=1 \
         --save-interval=5 --microbatch=2 --steps=5 --labels-from=prefix --reference-files --tensorboard --seed=4 \
         --out=runs/super_res_train",
    );
    let notes = t.notes.join("\n");
    ["use_fp16", "OPENAI_LOGDIR", "1000"].iter().for_each(|p| assert!(notes.contains(p), "{notes}"));

    let t = translated("image_train --data_dir d", &logdir());
    assert!(t.notes.len() == 1 && t.notes[0].contains("for ever") && t.notes[0].contains("500000"), "{t:?}");
    let t = translated("image_train --data_dir d --steps 7 --out o", &logdir());
    assert!(t.notes.is_empty() && t.lines[0].contains(&"--steps=7".into()), "{t:?}");
    assert!(t.lines[0].contains(&"--out=o".into()), "{t:?}");

    let t = translated(
        "image_train --data_dir d --lr_anneal_steps 9 --resume_checkpoint run/checkpoint-00000004.safetensors",
        &Environment::default(),
    );
    assert_line(
        &t.lines[0],
        "train",
        "--data-dir=d --lr-anneal-steps=9 --reference-files --resume=run/checkpoint-00000004.safetensors --save-interval=10000",
    );
}

#[test]
fn sampling_and_likelihood_become_ours() {
    let t = translated(
        "image_sample --model_path run --use_ddim True --timestep_respacing ddim25 --num_samples 5",
        &logdir(),
    );
    assert_line(
        &t.lines[0],
        "sample",
        "--model-path=run --use-ddim=True --timestep-respacing=ddim25 --num-samples=5 --out=log",
    );
    // Of a .pt the flags tell what the tensors do not, given or not.
    let t = translated("image_nll --model_path m.pt --data_dir d --dropout 0.3 --class_cond True", &logdir());
    assert_line(
        &t.lines[0],
        "nll",
        "--model-path=m.pt --image-size=64 --num-heads=4 --diffusion-steps=1000 --noise-schedule=linear \
         --rescale-timesteps=True --rescale-learned-sigmas=True --dropout=0.3 --class-cond=True --labels-from=prefix \
         --data-dir=d --num-samples=1000 --reference-files --out=log",
    );
    let t = translated("super_res_sample --model_path m.pt --base_samples s.npz --use_ddim 1", &logdir());
    let line = t.lines[0].join(" ");
    assert!(line.starts_with("super-res sample") && line.contains("--large-size=256 --small-size=64"), "{line}");
    assert!(line.contains("--base-samples=s.npz") && t.notes.join(" ").contains("use_ddim"), "{t:?}");
    for (line, flag) in [
        ("image_sample", "--model_path"),
        ("image_nll --model_path m.pt", "--data_dir"),
        ("image_train", "--data_dir"),
        ("super_res_sample --model_path m.pt", "--base_samples"),
    ] {
        let (script, m) = parsed(line).unwrap();
        let text = translate(script, &m, &logdir()).unwrap_err().to_string();
        assert!(text.contains(flag) && text.contains(script.name), "{text}");
    }
}

fn run(folder: &Path, line: &str, env: &[(&str, &str)]) -> Output {
    let program = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    let clean = ["OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "DIFFUSION_BLOB_LOGDIR", "DIFFUSION_TRAINING_TEST"];
    let mut command = Command::new(program);
    clean.iter().for_each(|name| {
        command.env_remove(name);
    });
    command.current_dir(folder).args(line.split_whitespace()).args(["--threads", "1"]).envs(env.iter().copied());
    command.output().unwrap()
}

/// Runs a command line that must succeed; what it printed, errors too.
fn good(folder: &Path, line: &str, env: &[(&str, &str)]) -> String {
    let out = run(folder, line, env);
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "{line}: {text}");
    text
}

/// The one message of a command line that fails by the user's mistake.
fn refused(folder: &Path, line: &str, parts: &[&str]) {
    let out = run(folder, line, &[]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{line}: {text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("error:")).count(), 1, "{line}: {text}");
    parts.iter().for_each(|p| assert!(text.contains(p), "{line}: lacks {p:?}: {text}"));
}

/// A state dict that PyTorch saved: 16 pixels, 32 channels, learned variance, attention at 8 pixels.
fn golden() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/golden/11_pt/state_zip.pt")
}

/// `n` colour pictures of side `size`, `cat_…` and `dog_…`.
fn pictures(folder: &Path, n: usize, size: usize) {
    let pixels: Vec<u8> = (0..n * size * size * 3).map(|i| (i * 31 % 251) as u8).collect();
    Images::new([size, size, 3], &pixels).write_each(folder, 0).unwrap();
    for i in 0..n {
        let name = format!("{}_{i}.png", if i % 2 == 0 { "cat" } else { "dog" });
        std::fs::rename(folder.join(format!("{i:06}.png")), folder.join(name)).unwrap();
    }
}

/// A network that trains in no time.
const SMALL: &str = "--num_channels 32 --num_res_blocks 1 --attention_resolutions 8 --diffusion_steps 12 \
                     --noise_schedule cosine --learn_sigma True --batch_size 4 --ema_rate 0.5,0.9 --lr_anneal_steps 3";

/// The tensors of `a`, which are those of `b` bit for bit.
fn assert_same_tensors(a: &Path, b: &Path) {
    let (a, b) = (TensorFile::open(a).unwrap(), TensorFile::open(b).unwrap());
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    for (name, t) in &a.tensors {
        assert!(a.bytes(t) == b.bytes(&b.tensors[name]), "{name}");
    }
}

#[test]
fn image_train_leaves_the_files_of_the_reference_and_goes_on_from_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("data"), 6, 16);
    let line =
        format!("image_train --data_dir data --image_size 16 {SMALL} --class_cond True --log_interval 1 --save_int 2");
    let text = good(at, &line, &[("OPENAI_LOGDIR", "log")]);
    assert!(text.contains("same as: iddpm train") && text.contains("2 classes") && text.contains("not 1000"), "{text}");
    let log = at.join("log");
    for step in [2, 3] {
        let names = [format!("model{step:06}.pt"), format!("ema_0.5_{step:06}.pt"), format!("ema_0.9_{step:06}.pt")];
        for name in names.into_iter().chain([format!("opt{step:06}.pt"), checkpoint::file_name(step)]) {
            assert!(log.join(&name).exists(), "{name}");
        }
    }
    // The files hold what the checkpoint holds.
    let c = Checkpoint::open(&log.join(checkpoint::file_name(3))).unwrap();
    let params = Params::new(&c.progress.config.model);
    let average = c.ema(0.9, &slots(&params), params.len).unwrap();
    let file = TensorFile::open(&log.join("ema_0.9_000003.pt")).unwrap();
    let bias = params.list.iter().find(|p| p.name == "out.2.bias").unwrap();
    let theirs = file.f32s(file.get("out.2.bias").unwrap()).unwrap();
    assert_eq!(theirs, average[bias.offset..bias.offset + bias.len()]);
    assert_eq!(file.get("label_emb.weight").unwrap().dims, [2, 128]);
    let optimizer = TensorFile::open(&log.join("opt000003.pt")).unwrap();
    assert_eq!((optimizer.numbers["state.0.step"], optimizer.numbers["param_groups.0.eps"]), (3.0, 1e-8));
    assert_eq!(optimizer.numbers["param_groups.0.betas.1"], 0.999);

    let csv = std::fs::read_to_string(log.join("progress.csv")).unwrap();
    let head = csv.lines().next().unwrap();
    assert!(head.starts_with("grad_norm,loss") && head.contains(",samples,step,vb"), "{head}");
    assert_eq!(csv.lines().count(), 4, "{csv}");
    let cell = |line: usize, name: &str| -> f64 {
        let column = head.split(',').position(|n| n == name).unwrap();
        csv.lines().nth(line).unwrap().split(',').nth(column).unwrap().parse().unwrap()
    };
    assert_eq!((cell(3, "step"), cell(3, "samples")), (3.0, 12.0));
    // The hybrid loss is their sum: all three are means over the same images.
    assert!((cell(2, "loss") - cell(2, "mse") - cell(2, "vb")).abs() < 1e-5 * cell(2, "loss"), "{csv}");

    // Beside the checkpoint: the checkpoint goes on, to the bit.
    let more = line.replace("--lr_anneal_steps 3", "--lr_anneal_steps 3 --resume_checkpoint log/model000002.pt");
    std::fs::create_dir(at.join("again")).unwrap();
    let text = good(at, &format!("{more} --out again"), &[]);
    assert!(text.contains("--resume=log/checkpoint-00000002.safetensors"), "{text}");
    assert_same_tensors(&at.join("again/opt000003.pt"), &log.join("opt000003.pt"));

    // The files alone: they come in, with the moments.
    let copied = at.join("copied");
    std::fs::create_dir(&copied).unwrap();
    for name in ["model000002.pt", "ema_0.5_000002.pt", "ema_0.9_000002.pt", "opt000002.pt"] {
        std::fs::copy(log.join(name), copied.join(name)).unwrap();
    }
    let more = more.replace("log/model", "copied/model");
    let text = good(
        at,
        &format!("{more} --weight_decay 0.1"),
        &[("OPENAI_LOGDIR", "new"), ("DIFFUSION_BLOB_LOGDIR", "blobs")],
    );
    assert!(text.contains("state of AdamW") && text.contains("from step 2"), "{text}");
    assert!(text.contains("order of the images"), "{text}");
    assert!(at.join("blobs/model000003.pt").exists() && !at.join("new/model000003.pt").exists());
    let c = Checkpoint::open(&at.join("new").join(checkpoint::file_name(3))).unwrap();
    assert_eq!((c.progress.step, c.progress.config.train.weight_decay), (3, 0.1));
    refused(at, &format!("{more} --out new"), &["new", "already"]);
    // Training that cannot begin takes the import back: the next attempt finds an empty place.
    refused(at, &format!("{more} --data_dir nowhere --out fresh"), &["nowhere"]);
    assert!(!at.join("fresh").exists());
}

#[test]
fn image_sample_makes_pictures_of_a_pt() {
    let folder = tempfile::tempdir().unwrap();
    let (at, model) = (folder.path(), golden().display().to_string());
    let flags = "--image_size 16 --noise_schedule cosine --num_samples 3 --batch_size 2";
    let line = format!("image_sample --model_path {model} {flags} --timestep_respacing 4");
    let text = good(at, &line, &[("OPENAI_LOGDIR", "log")]);
    assert!(text.contains("rounded") && text.contains("4 ancestral steps"), "{text}");
    // What the training images looked like is not in the file.
    let colour = text.lines().find(|l| l.starts_with("colour")).unwrap();
    assert!(colour.matches('±').count() == 4 && !colour.contains("training"), "{colour}");
    let arrays = npz::read(&at.join("log/samples_3x16x16x3.npz")).unwrap();
    assert_eq!((arrays.len(), arrays[0].0.as_str(), arrays[0].1.shape.as_slice()), (1, "arr_0", &[3, 16, 16, 3][..]));
    // The same as by way of a checkpoint.
    let told = "--image_size 16 --num_heads 4 --diffusion_steps 1000 --noise_schedule cosine --rescale_timesteps True";
    good(at, &format!("import {model} --to m.safetensors {told}"), &[]);
    good(at, "image_sample --model_path m.safetensors --num_sam 3 --timestep_respacing 4 --out b", &[]);
    assert_eq!(npz::read(&at.join("b/samples_3x16x16x3.npz")).unwrap(), arrays);
    let ddim = "--use_ddim True --timestep_respacing ddim4 --clip_denoised False --out c";
    let text = good(at, &format!("image_sample --model_path {model} {flags} {ddim}"), &[]);
    assert!(text.contains("4 DDIM steps"), "{text}");
    refused(at, &format!("{line} --num_channels 64"), &["state_zip.pt", "num-channels 64", "num-channels 32"]);
    refused(at, &format!("{line} --class_cond True"), &["class-cond true", "class-cond false"]);
    refused(at, "image_sample --model_path none.pt", &["none.pt"]);
    let optimizer = "image_sample --model_path run/opt000002.pt";
    refused(at, optimizer, &["run/opt000002.pt"]);
}

#[test]
fn a_class_conditional_sample_has_labels() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("data"), 4, 16);
    let line = format!("image_train --data_dir data --image_size 16 {SMALL} --class_cond True");
    good(at, &line, &[("OPENAI_LOGDIR", "log"), ("DIFFUSION_TRAINING_TEST", "")]);
    let flags = "--image_size 16 --noise_schedule cosine --diffusion_steps 12 --class_cond True --num_samples 4";
    let text = good(at, &format!("image_sample --model_path log/ema_0.5_000003.pt {flags} --out s"), &[]);
    assert!(text.contains("in turn"), "{text}");
    let arrays = npz::read(&at.join("s/samples_4x16x16x3.npz")).unwrap();
    assert_eq!(arrays[1].0, "arr_1");
    assert!(matches!(&arrays[1].1.values, Values::I64(l) if *l == [0, 1, 0, 1]), "{:?}", arrays[1]);
}

#[test]
fn image_nll_writes_the_terms() {
    let folder = tempfile::tempdir().unwrap();
    let (at, model) = (folder.path(), golden().display().to_string());
    pictures(&at.join("data"), 5, 16);
    let flags = "--image_size 16 --noise_schedule cosine --learn_sigma True --timestep_respacing 6 --num_samples 4";
    let line = format!("image_nll --data_dir data --model_path {model} {flags}");
    let text = good(at, &line, &[("OPENAI_LOGDIR", "log")]);
    assert!(text.contains("4 of 5 images") && text.contains("evenly") && text.contains("bits/dim"), "{text}");
    let csv = std::fs::read_to_string(at.join("log/nll.csv")).unwrap();
    let column = |k: usize| -> Vec<f32> {
        csv.lines().skip(1).map(|l| l.split(',').nth(k).unwrap().parse::<f64>().unwrap() as f32).collect()
    };
    for (name, k) in [("vb", 1), ("xstart_mse", 2), ("mse", 3)] {
        let arrays = npz::read(&at.join(format!("log/{name}_terms.npz"))).unwrap();
        // From t = T-1 down to 0.
        let want: Vec<f32> = column(k).into_iter().rev().collect();
        assert_eq!(arrays, [("arr_0".to_string(), Array { shape: vec![6], values: Values::F32(want) })], "{name}");
    }
}

#[test]
fn super_resolution_is_trained_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("data"), 4, 16);
    let line = format!("super_res_train --data_dir data --large_size 16 --small_size 8 {SMALL}");
    good(at, &line, &[("OPENAI_LOGDIR", "log")]);
    let small = Array::images([2, 8, 8, 3], (0..384).map(|i| (i % 256) as u8).collect());
    npz::write(&at.join("small.npz"), &[("arr_0", &small)]).unwrap();
    let sizes = "--large_size 16 --small_size 8 --noise_schedule cosine --diffusion_steps 12 --learn_sigma True";
    let sample = "super_res_sample --base_samples small.npz --num_samples 3 --batch_size 2 --timestep_respacing 3";
    let text = good(at, &format!("{sample} --model_path log/model000003.pt {sizes} --out a"), &[]);
    assert!(text.contains("same as: iddpm super-res sample"), "{text}");
    let arrays = npz::read(&at.join("a/samples_3x16x16x3.npz")).unwrap();
    assert_eq!(arrays[0].1.shape, [3, 16, 16, 3]);
    good(at, &format!("{sample} --model_path log --out b"), &[]);
    refused(at, &format!("{sample} --model_path log/model000003.pt --large_size 16 --noise cosine"), &["64", "16"]);
}

#[test]
fn every_script_has_help_with_an_example() {
    let folder = tempfile::tempdir().unwrap();
    for (name, groups) in SCRIPTS {
        let text = good(folder.path(), &format!("{name} --help"), &[]);
        assert!(text.contains("Example") && text.contains(&format!("iddpm {name}")), "{text}");
        for flag in groups.iter().flat_map(|g| g.split_whitespace()) {
            let flag = format!("--{}", flag.split('=').next().unwrap());
            assert!(text.contains(&flag), "{name} lacks {flag}");
        }
    }
    assert!(good(folder.path(), "--help", &[]).contains("image_sample"));
    refused(folder.path(), "image_train --data_dir d --learn_sigma maybe", &["maybe", "True", "False"]);
    refused(folder.path(), "image_sample --num_sample_s 3", &["--num_sample_s", "--num_samples"]);
    refused(folder.path(), "image_sample --num 3", &["--num_samples", "--num_channels"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");
    // A script's name as a value makes no script of another command.
    let args = |line: &str| line.split_whitespace().map(OsString::from).collect::<Vec<_>>();
    assert_eq!(spell_out(&args("iddpm sample --out image_sample --num-s 3")).unwrap(), None);
    let spelled = spell_out(&args("iddpm --threads 2 --seed=1 image_sample --num-s=3")).unwrap();
    assert_eq!(spelled, Some(args("iddpm --threads 2 --seed=1 image_sample --num_samples=3")));
}

/// The bytes of the images of `tests/data/nll_terms.npz`, (n, h, w, c).
fn measured_pixels() -> Vec<u8> {
    let at = |i: usize| {
        let (c, x, y, n) = (i % 3, i / 3 % 16, i / 48 % 16, i / 768);
        (n * 37 + y * (5 + n) + x * 11 + c * 60 + x * y * c) as u8
    };
    (0..6 * 768).map(at).collect()
}

/// The terms that the reference's own code computed (scripts/make-nll-fixture.py) with the noise that this seed gives.
#[test]
fn image_nll_gives_the_terms_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let (at, model) = (folder.path(), golden().display().to_string());
    Images::new([16, 16, 3], &measured_pixels()).write_each(&at.join("data"), 0).unwrap();
    let flags = "--image_size 16 --noise_schedule cosine --learn_sigma True --timestep_respacing 8 --num_samples 6";
    let text = good(at, &format!("image_nll --data_dir data --model_path {model} {flags} --seed 5 --out log"), &[]);
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let wanted = npz::read(&Path::new(&root).join("tests/data/nll_terms.npz")).unwrap();
    let values = |arrays: &[(String, Array)], name: &str| -> Vec<f64> {
        match &arrays.iter().find(|(n, _)| n == name).unwrap().1.values {
            Values::F32(v) => v.iter().map(|x| f64::from(*x)).collect(),
            other => panic!("{name}: {other:?}"),
        }
    };
    for name in ["vb", "mse", "xstart_mse"] {
        let have = values(&npz::read(&at.join(format!("log/{name}_terms.npz"))).unwrap(), "arr_0");
        for (i, (have, want)) in have.iter().zip(values(&wanted, name)).enumerate() {
            // Both sum up in f32: 1e-5 of the term, or of 1 where it is smaller.
            assert!((have - want).abs() <= 1e-5 * want.abs().max(1.0), "{name} {i}: {have}, reference {want}");
        }
    }
    let line = text.lines().find_map(|l| l.strip_prefix("bits/dim")).unwrap();
    let numbers: Vec<f64> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    let (total, interval) = (numbers[0], numbers[1]);
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    assert!((total - mean(&values(&wanted, "total_bpd"))).abs() < 1e-4, "{line}");
    // With noise of its own, four times anew, the reference lands within the interval.
    let other = mean(&values(&wanted, "other_total_bpd"));
    assert!((total - other).abs() < interval, "{line}, with other noise {other}");
}
