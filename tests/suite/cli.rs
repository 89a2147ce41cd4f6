//! The program as a user meets it: the reference's flags, a run from start to samples, and every kind of bad input.

use iddpm::checkpoint;
use iddpm::grid::Images;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

/// The program: where the test runner says it is now, or where it was built.
fn program() -> Command {
    let path = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    Command::new(path)
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Longest time a command may take here; it would hang otherwise.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs a command line in `folder`.
fn at(folder: &Path, line: &str) -> Output {
    finish(program().args(words(line)).current_dir(folder), line)
}

/// Runs `command` to its end, or kills it and panics.
fn finish(command: &mut Command, line: &str) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (id, (done, ended)) = (child.id() as i32, mpsc::channel::<()>());
    let watch = std::thread::spawn(move || {
        let hangs = ended.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
        // SAFETY: a signal to a child whose end has not been reported.
        hangs && unsafe { libc::kill(id, libc::SIGKILL) } == 0
    });
    let out = child.wait_with_output().unwrap();
    drop(done);
    assert!(!watch.join().unwrap(), "iddpm {line}: hangs\n{}", text(&out.stderr));
    out
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command line that must succeed; returns what it printed.
pub fn good(folder: &Path, line: &str) -> String {
    let out = at(folder, line);
    assert!(out.status.success(), "iddpm {line}: {:?}\n{}", out.status, text(&out.stderr));
    text(&out.stdout)
}

/// Asserts one clear message with all `parts`, this exit code and no panic.
fn assert_bad(out: &Output, line: &str, code: i32, parts: &[&str]) {
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "iddpm {line}\n{err}");
    assert!(!err.contains("panicked"), "iddpm {line}\n{err}");
    assert_eq!(err.lines().filter(|l| l.starts_with("error:")).count(), 1, "iddpm {line}\n{err}");
    parts.iter().for_each(|p| assert!(err.contains(p), "iddpm {line}\nlacks {p:?}: {err}"));
}

/// Runs a command line that must fail by the user's mistake.
pub fn bad(folder: &Path, line: &str, parts: &[&str]) {
    assert_bad(&at(folder, line), line, 2, parts);
}

/// A network that trains in no time.
pub const SMALL: &str = "--threads 1 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8 \
                     --diffusion_steps 12 --noise_schedule cosine --batch_size 4 --limit 40 --ema_rate 0.5";

/// A folder with a trained run in `run` and a class-conditional one in `cond`; tests copy what they change.
pub fn trained() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let out = good(folder.path(), &format!("train {SMALL} --steps 4 --out run"));
        assert!(out.starts_with("output    run") && out.trim_end().ends_with("output    run"), "{out}");
        good(folder.path(), &format!("train {SMALL} --steps 2 --out cond --class_cond True"));
        folder
    };
    FOLDER.get_or_init(make).path()
}

fn newest(run: &Path) -> PathBuf {
    checkpoint::find(run).unwrap()
}

/// `n` grey PNGs of side 16, named `cat_…` and `dog_…`, or all alike.
fn pictures(folder: &Path, n: usize, labels: bool) {
    let pixels: Vec<u8> = (0..n * 256).map(|i| (i * 7 % 256) as u8).collect();
    Images::new([16, 16, 1], &pixels).write_each(folder, 0).unwrap();
    if labels {
        for i in 0..n {
            let name = format!("{}_{i}.png", if i % 2 == 0 { "cat" } else { "dog" });
            std::fs::rename(folder.join(format!("{i:06}.png")), folder.join(name)).unwrap();
        }
    }
}

#[test]
fn train_sample_and_nll_from_the_file_alone() {
    let run = trained().join("run");
    let folder = tempfile::tempdir().unwrap();
    let model = newest(&run).display().to_string();
    let out =
        good(folder.path(), &format!("sample --model_path {model} --num_samples 5 --batch_size 2 --out a --seed 7"));
    assert!(out.contains("samples_5x16x16x1.npz") && out.contains("mean ± deviation"), "{out}");
    // Picture i has seed S + i, in any batch and on any number of threads.
    good(folder.path(), &format!("sample --model-path {model} --num-samples=3 --seed 9 --threads 1 --out b"));
    for i in 0..3 {
        let read = |run: &str, i: usize| std::fs::read(folder.path().join(format!("{run}/images/{i:06}.png"))).unwrap();
        assert!(read("a", i + 2) == read("b", i), "picture {i}");
    }
    let ddim = "--use_ddim True --timestep_respacing ddim4 --eta 0.5 --clip_denoised no --files False --ema-rate 0";
    good(folder.path(), &format!("sample --model_path {model} --num_samples 2 --out c {ddim}"));
    assert!(!folder.path().join("c/images").exists() && folder.path().join("c/grid.png").exists());

    let out = good(folder.path(), &format!("nll --model_path {model} --num_samples 3 --batch_size 5 --out n"));
    assert!(out.contains("bits/dim") && out.contains("confidence") && out.contains("prior"), "{out}");
    let csv = std::fs::read_to_string(folder.path().join("n/nll.csv")).unwrap();
    assert_eq!(csv.lines().count(), 13, "{csv}");
    // The figure does not depend on the batch.
    let again = good(folder.path(), &format!("nll --model_path {model} --num_samples 3 --batch_size 64 --out m"));
    assert_eq!(out.replace("n/nll.csv", ""), again.replace("m/nll.csv", ""));
}

#[test]
fn a_class_conditional_model_takes_labels() {
    let (run, folder) = (trained().join("cond"), tempfile::tempdir().unwrap());
    let model = run.display().to_string();
    good(folder.path(), &format!("sample --model_path {model} --num_samples 4 --labels 3,5 --out a"));
    let arrays = iddpm::npz::read(&folder.path().join("a/samples_4x16x16x1.npz")).unwrap();
    assert!(matches!(&arrays[1].1.values, iddpm::npz::Values::I64(l) if *l == [3, 5, 3, 5]), "{:?}", arrays[1].0);
    bad(folder.path(), &format!("sample --model_path {model} --labels 10"), &["--labels 10", "0 to 9"]);
    bad(folder.path(), &format!("sample --model_path {model} --labels frog"), &["frog", "0 to 9"]);
    let other = trained().join("run").display().to_string();
    bad(folder.path(), &format!("sample --model_path {other} --labels 1"), &["--labels", "without --class-cond"]);
}

#[test]
fn the_reference_spelling_of_flags_is_understood() {
    let folder = tempfile::tempdir().unwrap();
    let totals = |line: &str| good(folder.path(), &format!("plan --preset reference --totals {line}"));
    let plain = totals("--image_size 32 --num_channels 32 --learn_sigma True --batch_size 2");
    for same in [
        "--image-size=32 --num-channels=32 --learn-sigma --batch-size=2",
        "--image_size=32 --num_channels 32 --learn_sigma=yes --batch_size 2 --sigma_small no --use_fp16 F",
        "--image_size 32 --num_chan 32 --learn-sigma t --batch 2 --microbatch -1 --num_heads_upsample -1",
        "--image_size 32 --num_channels 32 --learn_sigma 1 --batch_size 2 --attention_resolutions 16,8 --lr_anneal_steps 0",
    ] {
        assert_eq!(totals(same), plain, "{same}");
    }
    assert_ne!(totals("--image_size 32 --num_channels 32 --learn_sigma False --batch_size 2"), plain);
    let of = |line: &str, row: &str| -> f64 {
        let text = totals(line);
        let line = text.lines().find(|l| l.starts_with(row)).unwrap_or_else(|| panic!("no {row} in {text}"));
        line[row.len()..].split_whitespace().find_map(|w| w.parse().ok()).unwrap()
    };
    // Half the bytes of every activation, and the optimiser's 38 a parameter, which stay.
    let ratio = of("yes --device cuda", "least traffic") / of("yes --device cuda --precision f32", "least traffic");
    assert!((0.5..0.65).contains(&ratio), "bf16 moves {ratio} of what f32 moves");
    let out = good(folder.path(), "plan --preset cifar10 --batch-size 1 --totals yes");
    assert!(out.contains("52546438 in 446 tensors"), "{out}");
}

#[test]
fn a_plan_is_summed_by_kind_of_step() {
    let folder = tempfile::tempdir().unwrap();
    let out = good(folder.path(), "plan --preset reference --totals --device cuda --ceilings 0.001,1000000");
    let rows: Vec<Vec<&str>> =
        out.lines().skip_while(|l| !l.starts_with("op ")).skip(1).map(|l| l.split_whitespace().collect()).collect();
    let (all, kinds) = rows.split_last().unwrap();
    let sum = |column: usize| kinds.iter().map(|r| r[column].parse::<f64>().unwrap()).sum::<f64>();
    let total = |row: &str| {
        out.lines().find(|l| l.starts_with(row)).unwrap().split_whitespace().rev().nth(5).unwrap().to_string()
    };
    assert_eq!(format!("{}", sum(1)), all[1], "steps");
    let (gflop, floor) = (sum(2), all[2].parse::<f64>().unwrap());
    let whole: f64 = total("work ").parse().unwrap();
    assert!((gflop - whole).abs() < 1e-3 * kinds.len() as f64, "{gflop} of {whole} GFLOP");
    // A machine of 1 GFLOP/s to which bytes are free takes a second for each.
    assert!((floor - 1e3 * gflop).abs() < 1e-3 * floor, "{floor} ms for {gflop} GFLOP");
    bad(folder.path(), "plan --ceilings 798", &["--ceilings", "798", "two positive numbers"]);
}

#[test]
fn every_command_has_help_with_an_example() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["train", "sample", "nll", "plan", "data inspect", "bench step", "doctor"] {
        let out = good(folder.path(), &format!("{command} --help"));
        assert!(out.contains("Example") && out.contains(&format!("iddpm {command}")), "{command}: {out}");
    }
}

#[test]
fn bad_settings_are_told_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    bad(f, "train --noise_schedule foo", &["foo", "linear", "cosine"]);
    bad(f, "train --schedule_sampler foo", &["foo", "uniform", "loss-second-moment"]);
    bad(f, "train --learn_sigma maybe", &["maybe", "True", "False"]);
    bad(f, "train --preset cifar100", &["cifar100", "cifar10-vlb", "digits"]);
    bad(f, "train --preset cifar10", &["cifar10", "--data-dir"]);
    bad(f, "train --no_such_flag 3", &["--no-such-flag"]);
    bad(f, "train --image_size 100000", &["--image-size 100000", "1024"]);
    bad(f, "train --image_size 17 --attention_resolutions 17", &["--image-size 17", "2", "18"]);
    bad(f, "train --num_channels 100", &["100", "32"]);
    bad(f, "train --num_channels 999999999", &["--num-channels 999999999", "8192"]);
    bad(f, "train --batch_size 1000000000", &["--batch-size 1000000000", "65536"]);
    bad(f, "train --batch_size 0", &["--batch-size 0"]);
    bad(f, "train --batch_size x", &["x", "--batch-size"]);
    bad(f, "train --microbatch 64", &["--microbatch 64", "32"]);
    bad(f, "train --num_heads 5", &["--num-heads 5", "64"]);
    bad(f, "train --attention_resolutions 5", &["--attention-resolutions 5", "16, 8"]);
    bad(f, "train --diffusion_steps 1", &["--diffusion-steps 1"]);
    bad(f, "train --timestep_respacing ddim999", &["ddim999", "ddim1000"]);
    bad(f, "train --ema_rate 1.5", &["--ema-rate 1.5"]);
    bad(f, "train --lr nan", &["--lr NaN"]);
    bad(f, "train --lr_anneal_steps 10 --steps 20", &["20", "10"]);
    bad(f, "train --threads 0", &["--threads 0"]);
    bad(f, "train --dropout 1", &["--dropout 1"]);
    bad(f, "train --resume", &["runs/digits"]);
    bad(f, "train --minutes -3", &["--minutes -3"]);
    bad(f, "train --minutes inf", &["--minutes inf"]);
    bad(f, "train --diffusion_steps 20 --noise_schedule linear", &["--diffusion-steps 20", "21", "cosine"]);
    bad(f, "sample", &["runs/digits", "iddpm train"]);
    bad(f, "nll --model_path none.safetensors", &["none.safetensors", "iddpm train"]);
    assert_eq!(std::fs::read_dir(f).unwrap().count(), 0, "something was written");
}

#[test]
fn bad_images_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let train = |data: &str| format!("train {SMALL} --image_size 16 --out out --data_dir {data}");
    bad(f, &train("nowhere"), &["nowhere"]);
    std::fs::create_dir(f.join("empty")).unwrap();
    bad(f, &train("empty"), &["empty"]);
    pictures(&f.join("few"), 3, false);
    bad(f, &train("few"), &["few", "3", "4"]);
    bad(
        f,
        &format!("{} --class_cond True", train("few").replace("--batch_size 4", "--batch_size 2")),
        &["few", "label"],
    );
    pictures(&f.join("cut"), 5, true);
    let one = f.join("cut/cat_2.png");
    let whole = std::fs::read(&one).unwrap();
    std::fs::write(&one, &whole[..whole.len() / 2]).unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    std::fs::write(&one, "no picture").unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    std::fs::remove_file(&one).unwrap();
    std::os::unix::fs::symlink("/nowhere", &one).unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    pictures(&f.join("mixed"), 4, false);
    Images::new([8, 8, 1], &[9; 64]).write_each(&f.join("mixed"), 4).unwrap();
    bad(f, "data inspect --data-dir mixed", &["mixed", "16", "8"]);
    let out = good(f, "data inspect --data-dir mixed --image-size 16");
    assert!(out.contains('5'), "{out}");
    assert!(!f.join("out").exists(), "a run was begun");
}

/// Copies the newest checkpoint of [`trained`] to a folder of its own.
fn copied() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let from = newest(&trained().join("run"));
    let to = folder.path().join(from.file_name().unwrap());
    std::fs::copy(from, &to).unwrap();
    (folder, to)
}

#[test]
fn bad_checkpoints_are_named() {
    let (folder, path) = copied();
    let (f, name) = (folder.path(), path.file_name().unwrap().to_str().unwrap());
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1000]).unwrap();
    for line in ["sample --model_path .", "nll --model_path .", "train --resume ."] {
        bad(f, line, &[name, "truncated"]);
    }
    std::fs::write(&path, "PK\x03\x04 and more").unwrap();
    bad(f, "sample --model_path .", &[name, ".pt"]);
    std::fs::write(&path, "").unwrap();
    bad(f, "sample --model_path .", &[name, "truncated"]);
    let tensor = br#"{"input_blocks.0.0.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    "#;
    std::fs::write(&path, [&(tensor.len() as u64).to_le_bytes()[..], tensor, &[0; 4]].concat()).unwrap();
    bad(f, "sample --model_path .", &[name, "reference", "input_blocks.0.0.weight"]);
    bad(f, "train --resume_checkpoint gone.safetensors", &["gone.safetensors"]);
}

#[test]
fn flags_that_disagree_with_the_checkpoint_name_both_values() {
    let (folder, _path) = copied();
    let f = folder.path();
    bad(f, "sample --model_path . --diffusion_steps 50", &["--diffusion-steps 50", "12"]);
    bad(f, "nll --model_path . --learn_sigma False", &["--learn-sigma false", "true"]);
    bad(f, "sample --model_path . --image_size 32", &["--image-size 32", "16"]);
    bad(f, "train --resume . --lr 0.5", &["--lr 0.5", "0.001"]);
    bad(f, "train --resume . --seed 5", &["--seed 5", "0"]);
    bad(f, "train --resume . --preset mnist", &["--image-size 28", "16"]);
    good(f, "sample --model_path . --num_samples 1 --learn_sigma True --image_size 16 --num_channels 32");
    bad(f, "sample --model_path . --ema_rate 0.9", &["0.9", "0.5"]);
    bad(f, "sample --model_path . --eta 1", &["--eta 1", "--use-ddim"]);
    bad(f, "sample --model_path . --timestep_respacing 13", &["13", "12"]);
    bad(f, "train --resume . --limit 30 --steps 9", &["fingerprint", "40", "30"]);
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten() {
    let (folder, _path) = copied();
    bad(folder.path(), &format!("train {SMALL} --out ."), &["already holds a run", "--resume", "step 4"]);
}

#[test]
fn resuming_gives_the_bytes_of_the_uninterrupted_run() {
    let (folder, path) = copied();
    let f = folder.path();
    std::fs::rename(path, f.join("checkpoint-00000004.safetensors")).unwrap();
    good(f, "train --resume --out . --steps 7");
    good(f, &format!("train {SMALL} --steps 7 --out whole"));
    let read = |p: &str| std::fs::read(f.join(p).join("checkpoint-00000007.safetensors")).unwrap();
    assert!(read(".") == read("whole"), "the checkpoints differ");
}

/// Limits the size of files a child may write, which ends a write as a full disk does.
fn with_file_limit(command: &mut Command, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let set = move || {
        // SAFETY: both calls are allowed between fork and exec.
        let failed = unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN) == libc::SIG_ERR
                || libc::setrlimit(libc::RLIMIT_FSIZE, &limit) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: `set` only calls the two functions above.
    unsafe { command.pre_exec(set) };
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_whole() {
    let (folder, path) = copied();
    let f = folder.path();
    let before = std::fs::read(&path).unwrap();
    let line = "train --resume --out . --steps 6";
    let mut command = program();
    command.args(words(line)).current_dir(f);
    with_file_limit(&mut command, 1 << 20);
    let out = finish(&mut command, line);
    assert_bad(&out, line, 1, &["checkpoint-00000006.safetensors", "untouched", "--resume"]);
    assert!(std::fs::read(&path).unwrap() == before, "the old checkpoint has changed");
    let left = std::fs::read_dir(f).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|n| !n.starts_with('.')), "a temporary file is left");
    good(f, line);
}

#[test]
fn a_signal_stops_saves_and_can_be_resumed() {
    interrupted("cpu");
}

#[cfg(feature = "emulator")]
#[test]
fn a_signal_stops_a_run_on_the_emulator() {
    interrupted("emulated");
}

fn interrupted(device: &str) {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let small = SMALL.replace("--batch_size 4", "--batch_size 1");
    let line = format!("train {small} --sample_interval 0 --device {device} --steps 1000000 --out run");
    let mut child =
        program().args(words(&line)).current_dir(f).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while std::fs::metadata(f.join("run/log.jsonl")).map_or(0, |m| m.len()) == 0 {
        assert!(began.elapsed() < Duration::from_secs(120), "no step in two minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let status = child.wait().unwrap();
    let mut err = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut err).unwrap();
    assert_eq!(status.code(), Some(130), "{err}");
    assert!(err.contains("stopped at step") && err.contains("--resume"), "{err}");
    let step = checkpoint::list(&f.join("run")).pop().unwrap().0;
    good(f, &format!("train --resume --out run --steps {} --device {device}", step + 1));
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let line = format!("train {SMALL} --lr 10 --warmup_steps 0 --grad_clip 0 --steps 2000 --save_interval 1 --out run");
    let out = at(f, &line);
    assert_bad(&out, &line, 1, &["step ", "not finite", "--lr", "checkpoint"]);
    for (_, path) in checkpoint::list(&f.join("run")) {
        let c = checkpoint::Checkpoint::open(&path).unwrap();
        let params = iddpm::unet::Params::new(&c.progress.config.model);
        c.weights(&iddpm::train::slots(&params), params.len).expect("saved weights are finite");
    }
}

/// Mean losses of the lines of a run's log.
#[cfg(feature = "emulator")]
fn losses(run: &Path) -> Vec<f64> {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap()).collect()
}

/// The commands with the CUDA kernels, on the emulator: 20 steps follow those of the processor, pictures and bits/dim come of
/// them, and a run begun on one device goes on on the other.
#[cfg(feature = "emulator")]
fn train_sample_and_nll_emulated(precision: &str, tolerance: f64) {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let device = format!("--device emulated --precision {precision}");
    let network =
        "--num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 4 --learn_sigma True";
    let tiny = format!(
        "--image_size 8 {network} --diffusion_steps 2 --noise_schedule cosine --batch_size 2 --lr 1e-3 --ema_rate 0.5 \
         --limit 8 --log_interval 1 --save_interval 20"
    );
    good(f, &format!("train {tiny} --steps 20 --threads 1 --out cpu"));
    let out = good(f, &format!("train {tiny} --steps 20 --stream-data --out run {device}"));
    assert!(
        out.contains(&format!("device    emulated GPU (the CUDA kernels as C++ on this CPU), {precision}")),
        "{out}"
    );
    assert!(out.contains("sent batch by batch") && out.contains("done: 20 steps"), "{out}");
    let (have, want) = (losses(&f.join("run")), losses(&f.join("cpu")));
    assert_eq!((have.len(), want.len()), (20, 20));
    for (step, (have, want)) in have.iter().zip(&want).enumerate() {
        let error = (have - want).abs() / want;
        assert!(error <= tolerance, "{precision}, step {step}: loss {have}, on the processor {want}: {error} apart");
    }
    let out = good(f, &format!("sample --model_path run --num_samples 2 {device}"));
    assert!(out.contains("samples_2x8x8x1.npz"), "{out}");
    let bpd = |device: &str| {
        let out = good(f, &format!("nll --model_path run --num_samples 1 --batch_size 3 {device}"));
        out.lines().find_map(|l| l.strip_prefix("bits/dim  ")?.split(' ').next()?.parse::<f64>().ok()).unwrap()
    };
    let (have, want) = (bpd(&device), bpd("--device cpu"));
    assert!((have - want).abs() <= tolerance * want + 5e-5, "{precision}: {have} bits/dim, on the processor {want}");
    good(f, "train --resume --out run --steps 22 --device cpu");
}

/// Sums of a few hundred f32 products in other orders, 20 optimiser steps on.
#[cfg(feature = "emulator")]
#[test]
fn train_sample_and_nll_on_the_emulator_in_f32() {
    train_sample_and_nll_emulated("f32", 1e-4);
}

/// Each of some 60 roundings to bf16 on the way, 2^-9 of a value, moves the loss in a direction of its own: sqrt(60)/512.
#[cfg(feature = "emulator")]
#[test]
fn train_sample_and_nll_on_the_emulator_in_bf16() {
    train_sample_and_nll_emulated("bf16", 1.5e-2);
}

#[test]
fn devices_that_cannot_be_are_told_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    bad(f, "train --device gpu", &["gpu", "cpu, cuda, cuda:N"]);
    bad(f, "train --precision f16", &["f16", "bf16", "f32"]);
    bad(f, "train --precision bf16", &["--precision bf16", "--device cuda"]);
    let model = newest(&trained().join("run")).display().to_string();
    // No driver, no kernels in the program, or no GPU of this number.
    for line in ["train".into(), format!("sample --model_path {model}"), format!("nll --model_path {model}")] {
        let line = format!("{line} --device cuda:4096");
        assert_bad(&at(f, &line), &line, 1, &["--device cpu"]);
    }
    if !cfg!(feature = "emulator") {
        assert_bad(&at(f, "train --device emulated"), "train", 1, &["--features emulator", "--device cpu"]);
    }
    assert_eq!(std::fs::read_dir(f).unwrap().count(), 0, "something was written");
}

#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program();
    command.args(["plan"]).current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(!text(&out.stderr).contains("panicked"), "{}", text(&out.stderr));
}
