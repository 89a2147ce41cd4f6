//! `iddpm bench` from the outside: records, children, answers to a comparison, messages for bad input. No times are tested.

use serde_json::Value;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn iddpm(args: &[&str]) -> Command {
    // At run time first: the tests also run where they were not built.
    let program = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    let mut command = Command::new(program);
    command.arg("bench").args(args);
    command
}

/// One short block of everything, on one image.
const SHORT: [&str; 8] = ["--batch-size", "1", "--blocks", "1", "--block-seconds", "0", "--limit-seconds", "0"];

fn record(what: &str, more: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("record.json");
    let out = iddpm(&[what]).args(SHORT).args(more).arg("--json").arg(&path).output().unwrap();
    assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
}

/// The rows of the `k`-th table.
fn rows(record: &Value, k: usize) -> &Vec<Value> {
    record["tables"][k]["rows"].as_array().unwrap()
}

fn positive(row: &Value, column: &str) -> f64 {
    let x = row[column].as_f64().unwrap_or_else(|| panic!("{column}: {row}"));
    assert!(x > 0.0, "{column}: {row}");
    x
}

#[test]
fn step_records_the_machine_the_rates_and_the_ops() {
    let r = record("step", &["--config", "t1,digits", "--threads", "1"]);
    assert_eq!((r["threads"].as_u64(), r["device"].as_str()), (Some(1), Some("cpu")));
    assert!(r["date"].as_str().unwrap().ends_with('Z') && r["machine"]["cpu"].is_string() && r["commit"].is_string());
    assert!(r["ceilings"]["gflops"].as_f64().unwrap() > 0.0 && r["configurations"]["t1"]["model"].is_object());
    assert_eq!(rows(&r, 0).len(), 2);
    for row in rows(&r, 0) {
        let rate = positive(row, "gflop") / positive(row, "ms") * 1e3;
        assert!((rate / positive(row, "gflop_s") - 1.0).abs() < 1e-9, "{row}");
    }
    let shares: f64 = rows(&r, 1).iter().map(|row| row["share_pct"].as_f64().unwrap()).sum();
    assert!((shares - 100.0).abs() < 1e-6, "{shares}");
    let ops: Vec<_> = rows(&r, 1).iter().map(|row| row["op"].as_str().unwrap()).collect();
    for op in ["TimestepDist", "QSample", "Conv2dBackwardWeight", "HybridLoss", "GradNorm", "AdamwEma"] {
        assert!(ops.contains(&op), "{op} is not in {ops:?}");
    }
}

#[test]
fn kernels_are_each_measured_once() {
    let r = record("kernels", &["--config", "t1"]);
    let keys: Vec<String> =
        rows(&r, 0).iter().map(|row| format!("{} {} {}", row["op"], row["shape"], row["mflop"])).collect();
    let distinct: std::collections::HashSet<_> = keys.iter().collect();
    assert_eq!(distinct.len(), keys.len());
    assert!(
        rows(&r, 0).iter().any(|row| row["op"] == "PSample") && rows(&r, 0).iter().all(|row| positive(row, "us") > 0.0)
    );
}

#[test]
fn sampling_gives_pictures_per_second() {
    let r = record("sample", &["--config", "t1", "--batches", "1,2"]);
    assert_eq!(rows(&r, 0).len(), 4);
    for row in rows(&r, 0) {
        let expected = positive(row, "batch") / (positive(row, "ms") * 1e-3 * 250.0);
        assert!((positive(row, "images_s_250") / expected - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn startup_and_memory_watch_a_process_of_their_own() {
    let r = record("startup", &["--config", "t1"]);
    let row = &rows(&r, 0)[0];
    assert!(positive(row, "first_step_done_ms") >= positive(row, "first_step_ms"), "{row}");
    let r = record("memory", &["--config", "t1"]);
    let row = &rows(&r, 0)[0];
    positive(row, "planned_mb");
    if cfg!(target_os = "linux") {
        positive(row, "measured_mb");
    }
}

#[test]
fn serve_answers_every_line_with_a_block() {
    for more in [&[][..], &["--sampler", "ddim"]] {
        let mut child = iddpm(&["serve", "--config", "t1"])
            .args(SHORT)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"\n\n\n").unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 4, "{out}");
        assert_eq!((lines[0]["ready"].as_bool(), lines[0]["params"].as_u64()), (Some(true), Some(757_030)));
        assert!(lines[1..].iter().all(|l| l["s"].as_f64().unwrap() > 0.0), "{out}");
    }
}

#[test]
fn the_curve_falls() {
    let out = iddpm(&["curve", "--config", "t1", "--batch-size", "4", "--steps", "60"]).output().unwrap();
    let line: Value = serde_json::from_slice(&out.stdout).unwrap();
    let losses: Vec<f64> = line["losses"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    // The first loss of a network that starts from zeros is the mean of eps², 1, plus its bound's term.
    assert!(losses.len() == 6 && losses[0] > 0.8 && losses[5] < losses[0], "{losses:?}");
}

fn refused(args: &[&str]) -> String {
    let Output { status, stderr, .. } = iddpm(args).output().unwrap();
    assert_eq!(status.code(), Some(2), "{args:?}");
    String::from_utf8(stderr).unwrap()
}

#[test]
fn bad_input_is_named() {
    for (args, parts) in [
        (&["step", "--config", "t9"][..], &["t9", "t1", "cifar10"][..]),
        (&["step", "--config", "t1", "--batch-size", "0"], &["--batch-size 0"]),
        (&["step", "--blocks", "0"], &["--blocks 0"]),
        (&["step", "--block-seconds", "nan"], &["--block-seconds NaN"]),
        (&["serve", "--sampler", "heun"], &["heun", "ancestral", "ddim"]),
        (&["sample", "--config", "t1", "--batches", "0", "--blocks", "1", "--limit-seconds", "0"], &["batch", "0"]),
        (&["step", "--json", "/nonexistent/x.json"], &["/nonexistent"]),
    ] {
        let message = refused(args);
        parts.iter().for_each(|p| assert!(message.contains(p), "{args:?}: {message:?} lacks {p:?}"));
    }
}
