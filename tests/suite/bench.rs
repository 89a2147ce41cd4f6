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
        assert!(positive(row, "floor_pct") > 0.0 && row["precision"] == "f32", "{row}");
        let expected = positive(row, "batch") / (positive(row, "ms") * 1e-3 * 250.0);
        assert!((positive(row, "images_s_250") / expected - 1.0).abs() < 1e-9, "{row}");
    }
}

/// On the emulator: every part runs, counts are numbers, times are not.
#[cfg(feature = "emulator")]
mod emulated {
    use super::*;

    const EMULATED: [&str; 4] = ["--device", "emulated", "--config", "t0"];

    fn null(row: &Value, columns: &[&str]) {
        columns.iter().for_each(|c| assert!(row[c].is_null(), "{c}: {row}"));
    }

    #[test]
    fn steps_have_floors_and_times_of_nothing() {
        let r = record("step", &EMULATED);
        assert_eq!((r["gpu"]["emulated"].as_bool(), r["ceilings"]["gflops"].is_null()), (Some(true), true));
        let row = &rows(&r, 0)[0];
        null(row, &["ms", "images_s", "gflop_s", "peak_pct", "floor_ms", "floor_pct", "spread_pct", "min_ms"]);
        assert_eq!((row["precision"].as_str(), row["machine"].as_str()), (Some("bf16"), Some("emulated")));
        assert!(positive(row, "gflop") > 0.0 && rows(&r, 1).iter().all(|row| row["ms"].is_null()), "{r}");
        let r = record("sample", &["--device", "emulated", "--config", "t0", "--batches", "2", "--precision", "f32"]);
        assert_eq!(rows(&r, 0).len(), 2);
        rows(&r, 0).iter().for_each(|row| null(row, &["ms", "images_s_50", "floor_ms"]));
        assert_eq!(rows(&r, 0)[0]["precision"], "f32");
    }

    #[test]
    fn kernels_move_about_what_they_declare() {
        for precision in ["f32", "bf16"] {
            let r = record("kernels", &[&EMULATED[..], &["--precision", precision]].concat());
            let ops: Vec<_> = rows(&r, 0).iter().map(|row| row["op"].as_str().unwrap()).collect();
            for op in ["TimestepEmbedding", "GroupNorm", "Attention", "HybridLoss", "AdamwEma", "PSample", "VbTerms"] {
                assert!(ops.contains(&op), "{precision}: {op} is not in {ops:?}");
            }
            assert!(r["without_kernel"].is_null(), "{precision}: {}", r["without_kernel"]);
            for row in rows(&r, 0) {
                assert!(row["kernels"].as_str().is_some_and(|k| !k.is_empty()), "{precision}: {row}");
                positive(row, "moved_kb");
            }
            let adamw = rows(&r, 0).iter().find(|row| row["op"] == "AdamwEma").unwrap();
            assert!((positive(adamw, "of_declared") - 1.0).abs() < 0.05, "{adamw}");
        }
    }

    #[test]
    fn what_no_ceiling_tells_is_asked() {
        let r = record("ceilings", &["--device", "emulated"]);
        let value = |what: &str| {
            rows(&r, 0).iter().filter(|row| row["what"] == what).map(|row| &row["value"]).collect::<Vec<_>>()
        };
        for what in
            ["copy", "read", "gap between the nodes of a graph", "the same, started early", "fill and drain of a tile"]
        {
            assert!(!value(what).is_empty() && value(what).iter().all(|v| v.is_null()), "{what}: {r}");
        }
        // The emulator places swizzled chunks by their address, so it needs no base offset.
        assert_eq!(value("wgmma from a shifted row"), [&Value::from(8), &Value::from(8)]);
    }

    #[test]
    fn memory_is_what_the_plan_says() {
        let r = record("memory", &EMULATED);
        let of_planned = positive(&rows(&r, 0)[0], "measured_by_planned");
        // Tables, scratch memory, pages of a step's inputs and a copy of the weights in bf16 are beyond the plan.
        assert!((1.0..1.5).contains(&of_planned), "{of_planned}");
        let r = record("startup", &EMULATED);
        null(&rows(&r, 0)[0], &["first_step_done_ms", "slowest_ms", "build_ms", "first_step_ms", "second_step_ms"]);
    }

    #[test]
    fn serve_names_its_precision_and_gives_no_time() {
        let more = [&["serve"], &EMULATED[..], &SHORT].concat();
        let mut child = iddpm(&more).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((lines[0]["precision"].as_str(), lines[0]["params"].as_u64()), (Some("bf16"), Some(197_702)));
        assert!(lines[0]["used_bytes"].as_u64() >= lines[0]["planned_bytes"].as_u64(), "{out}");
        assert!(lines.len() == 2 && lines[1]["s"].is_null() && lines[0]["floor_ms"].is_null(), "{out}");
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
        assert_eq!(lines[0]["precision"], "f32");
        assert!(positive(&lines[0], "floor_ms") > 0.0 && positive(&lines[0], "planned_bytes") > 0.0);
        assert!(lines[1..].iter().all(|l| l["s"].as_f64().unwrap() > 0.0), "{out}");
    }
}

#[test]
fn the_curve_falls() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images.npz");
    let args = ["curve", "--config", "t1", "--batch-size", "4", "--steps", "60", "--images"];
    let out = iddpm(&args).arg(&images).output().unwrap();
    let line: Value = serde_json::from_slice(&out.stdout).unwrap();
    let losses: Vec<f64> = line["losses"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    // The first loss of a network that starts from zeros is the mean of eps², 1, plus its bound's term.
    assert!(losses.len() == 6 && losses[0] > 0.8 && losses[5] < losses[0], "{losses:?}");
    let written = iddpm::npz::read(&images).unwrap();
    assert_eq!(written[0].1.shape[1..], [16, 16, 3]);
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
