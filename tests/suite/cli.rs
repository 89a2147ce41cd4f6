//! The program as a user meets it: the reference's flags, a run from start to samples, and every kind of bad input.

mod bad_input;
#[cfg(feature = "emulator")]
mod emulated;
mod stops;

use iddpm::checkpoint;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

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

/// Copies the newest checkpoint of [`trained`] to a folder of its own.
fn copied() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let from = newest(&trained().join("run"));
    let to = folder.path().join(from.file_name().unwrap());
    std::fs::copy(from, &to).unwrap();
    (folder, to)
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
