//! Runs that stop: resumed, killed, interrupted, on a full disk, on a loss that is not finite.

use super::{SMALL, assert_bad, at, bad, copied, finish, good, program, text, trained, words};
use iddpm::checkpoint;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten() {
    let (folder, _path) = copied();
    bad(folder.path(), &format!("train {SMALL} --out ."), &["already holds a run", "--resume", "step 4"]);
    // Nothing to go on from: not to be resumed, and its log is not overwritten either.
    let early = folder.path().join("early");
    std::fs::create_dir(&early).unwrap();
    std::fs::write(early.join("log.jsonl"), "").unwrap();
    bad(folder.path(), &format!("train {SMALL} --out early"), &["early/log.jsonl", "without a checkpoint", "--out"]);
    bad(folder.path(), "train --resume --out early", &["early", "no checkpoint"]);
}

#[test]
fn two_runs_do_not_write_to_one_folder() {
    let (folder, _path) = copied();
    let f = folder.path();
    let log = std::fs::File::options().create(true).append(true).open(f.join("log.jsonl")).unwrap();
    log.lock().unwrap();
    bad(f, "train --resume --out . --steps 5", &["log.jsonl", "another process", "--out"]);
    drop(log);
    good(f, "train --resume --out . --steps 5");
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

#[test]
fn a_run_goes_on_in_smaller_parts() {
    let (folder, _path) = copied();
    let f = folder.path();
    let line = "train --resume --out . --steps 5 --microbatch 3";
    let out = at(f, line);
    assert!(out.status.success() && text(&out.stderr).contains("3 images per pass, where the run had 4"), "{out:?}");
    let (_, path) = checkpoint::list(f).pop().unwrap();
    let train = checkpoint::Checkpoint::open(&path).unwrap().progress.config.train;
    assert_eq!((train.steps, train.microbatches()), (5, vec![3, 1]));
    bad(f, "train --resume --out . --steps 6 --microbatch 5", &["--microbatch 5", "4"]);
}

/// Killed at once after each of its first checkpoints, be it in the middle of a save, of a line or of a picture.
#[test]
fn a_killed_run_ends_with_the_files_of_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let intervals = "--save_interval 1 --log_interval 1 --sample_interval 2 --reference_files";
    let begin = format!("train {SMALL} --steps 8 {intervals} --out");
    good(f, &format!("{begin} whole"));
    let run = f.join("run");
    let newest = || checkpoint::list(&run).pop().map(|(step, _)| step);
    for _ in 0..6 {
        let before = newest();
        let resume = format!("train --resume --threads 1 {intervals} --out");
        let line = format!("{} run", before.map_or(begin.as_str(), |_| resume.as_str()));
        let mut child = program();
        let mut child = child.args(words(&line)).current_dir(f).stdout(Stdio::null()).spawn().unwrap();
        while newest() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(newest() > before, "iddpm {line}: no checkpoint");
    }
    good(f, &format!("train --resume --threads 1 {intervals} --out run"));
    let names = |folder: &str| names(&f.join(folder));
    assert_eq!(names("run"), names("whole"));
    for name in names("run").iter().filter(|n| *n != "log.jsonl") {
        let read = |folder: &str| std::fs::read(f.join(folder).join(name)).unwrap();
        assert!(read("run") == read("whole"), "{name} differs");
    }
    let steps = |folder: &str| {
        let log = std::fs::read_to_string(f.join(folder).join("log.jsonl")).unwrap();
        let step = |l: &str| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap();
        log.lines().map(step).collect::<Vec<_>>()
    };
    assert_eq!(steps("run"), steps("whole"));
}

/// What lies in `folder`.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Killed after its first results, and given again with batches of another size.
#[test]
fn killed_sampling_and_measuring_go_on_with_the_same_result() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let model = trained().join("cond").display().to_string();
    for (i, work) in [
        "sample --labels 3,5 --num_samples 60",
        "sample --interpolate 3,8 --num_samples 60 --sampler heun --files False",
        "encode --num_samples 60",
        "nll --num_samples 60 --reference-files",
    ]
    .into_iter()
    .enumerate()
    {
        let (whole, ended) = (f.join(format!("whole{i}")), f.join(format!("ended{i}")));
        let line = |batch: usize, out: &Path| {
            format!("{work} --model_path {model} --threads 1 --batch_size {batch} --out {}", out.display())
        };
        let out = good(f, &line(16, &whole));
        assert!(!out.contains("going on"), "{out}");
        let mut child = program().args(words(&line(1, &ended))).stdout(Stdio::null()).spawn().unwrap();
        let kept = || {
            let partial = names(&ended).into_iter().find(|n| n.starts_with("partial-"));
            partial.and_then(|n| std::fs::metadata(ended.join(n)).ok()).map_or(0, |m| m.len())
        };
        while kept() < 4096 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "{work}: it was too fast to be killed");
        // Another command in the folder leaves the work as it is.
        let different = match work.starts_with("sample") {
            true => format!("--strip {}.png", ended.display()),
            false => "--timestep_respacing 6".into(),
        };
        let other = at(f, &format!("{} {different}", line(16, &ended)));
        assert!(other.status.success() && text(&other.stderr).contains("unfinished work of another"), "{work}");
        let out = good(f, &line(7, &ended));
        assert!(out.contains("going on"), "{work}\n{out}");
        assert_eq!(names(&ended), names(&whole), "{work}");
        for name in names(&whole).iter().filter(|n| *n != "images") {
            let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
            assert!(read(&ended) == read(&whole), "{work}: {name} differs");
        }
    }
}

/// Limits the size of files a child may write, which ends a write as a full disk does.
fn with_file_limit(command: &mut Command, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let set = move || {
        // SAFETY: the call is allowed between fork and exec.
        let failed = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) } != 0;
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: `set` only calls the function above.
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
