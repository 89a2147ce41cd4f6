//! Saving, loading, and every kind of damage.

use super::*;

const DIMS: [&[usize]; 2] = [&[2, 1, 1, 3], &[2]];

fn slots() -> Vec<Slot<'static>> {
    vec![Slot { name: "a.weight", dims: DIMS[0], offset: 0 }, Slot { name: "a.bias", dims: DIMS[1], offset: 8 }]
}

/// A flat region of 10 elements with a gap of 2.
fn region(first: f32) -> Vec<f32> {
    (0..10).map(|i| if i == 6 || i == 7 { 0.0 } else { first + i as f32 }).collect()
}

fn snapshot() -> Snapshot {
    let mut config = Config::default();
    config.train.ema_rates = vec![0.9999, 0.5];
    let state = StateValue { name: "t".into(), integers: true, bytes: vec![1, 0, 0, 0, 2, 0, 0, 0] };
    Snapshot {
        progress: Progress { step: 7, images: 224, position: 230, config },
        params: region(0.5),
        ema: [region(20.0), region(40.0)].concat(),
        adam_m: region(-9.0),
        adam_v: region(1e-9),
        state: vec![state],
    }
}

fn state() -> [(String, bool, usize); 1] {
    [("t".into(), true, 2)]
}

/// The file of [`snapshot`], its bytes changed, and the message of reading it.
fn message(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&path, &snapshot(), &slots()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    let read = Checkpoint::open(&path).and_then(|c| c.snapshot(&slots(), 10, &state()));
    let error = read.expect_err("a damaged file");
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("text of the header");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn what_was_saved_is_read_and_equal_runs_are_equal_files() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|n| folder.path().join(n));
    save(&a, &snapshot(), &slots()).unwrap();
    save(&b, &snapshot(), &slots()).unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let c = Checkpoint::open(&a).unwrap();
    assert_eq!(c.snapshot(&slots(), 10, &state()).unwrap(), snapshot());
    assert_eq!(c.ema(0.5, &slots(), 10).unwrap(), region(40.0));
    assert!(c.ema(0.7, &slots(), 10).unwrap_err().to_string().contains("0.9999, 0.5"));
}

#[test]
fn every_truncation_is_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    save(&path, &snapshot(), &slots()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for n in (0..bytes.len()).step_by(7) {
        std::fs::write(&path, &bytes[..n]).unwrap();
        let text = Checkpoint::open(&path).err().expect("truncated").to_string();
        assert!(text.contains("truncated"), "{n} bytes: {text}");
    }
}

#[test]
fn damage_is_named() {
    let cases = [
        (message(|b| b[..4].copy_from_slice(b"PK\x03\x04")), vec!["PyTorch", "iddpm import"]),
        (message(|b| *b = b"hello, this is no checkpoint".to_vec()), vec!["not a safetensors file"]),
        (message(|b| replace(b, "iddpm_format\":\"1\"", "iddpm_format\":\"9\"")), vec!["format 9", "reads 1"]),
        (message(|b| replace(b, "iddpm_format", "other_format")), vec!["another program", "adam_m.a."]),
        (message(|b| replace(b, "ema.0.5.a.bias", "ema.0.5.a.bios")), vec!["no tensor ema.0.5.a.bias"]),
        (message(|b| replace(b, "[2,1,1,3]", "[1,2,1,3]")), vec!["adam_m.a.weight", "[2, 1, 1, 3]", "[1, 2, 1, 3]"]),
        (message(|b| replace(b, "\"step\":\"7\"", "\"step\":\"x\"")), vec!["`step`", "\"x\""]),
        (message(|b| replace(b, "diffusion_steps", "diffusion_stops")), vec!["`config`", "diffusion_steps"]),
        (message(|b| replace(b, "model_channels\\\":128", "model_channels\\\":1e8")), vec!["`config`", "100000000"]),
        (message(|b| b.push(0)), vec!["damaged"]),
        (message(|b| *b = other_program("input_blocks.0.0.bias")), vec!["reference", "iddpm import"]),
        (message(|b| *b = other_program("down_blocks.0.bias")), vec!["diffusers", "iddpm import"]),
    ];
    for (text, parts) in cases {
        parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
    }
}

/// A safetensors file of one tensor without metadata.
fn other_program(name: &str) -> Vec<u8> {
    let t = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    safetensors::serialize([(name, t)], None).unwrap()
}

/// A configuration may ask for any network; memory is taken for one that the file holds.
#[test]
fn a_network_that_is_not_in_the_file_takes_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    save(&path, &snapshot(), &slots()).unwrap();
    let c = Checkpoint::open(&path).unwrap();
    let dims = [1 << 40, 1 << 20];
    let huge = [slots()[0], Slot { name: "a.bias", dims: &dims, offset: 8 }];
    let text = c.weights(&huge, 1 << 60).unwrap_err().to_string();
    assert!(text.contains("model.a.bias") && text.contains("[1099511627776, 1048576]"), "{text}");
    let mut s = snapshot();
    s.progress.config.model.num_classes = Some(usize::MAX);
    save(&path, &s, &slots()).unwrap();
    let text = Checkpoint::open(&path).err().expect("too many classes").to_string();
    assert!(text.contains("number of classes") && text.contains("1048576"), "{text}");
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let mut bad = snapshot();
    bad.params[3] = f32::NAN;
    save(&path, &bad, &slots()).unwrap();
    let text = Checkpoint::open(&path).unwrap().weights(&slots(), 10).unwrap_err().to_string();
    assert!(text.contains("model.a.weight holds NaN"), "{text}");
}

#[test]
fn a_failed_save_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sub");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("inside"), "old").unwrap();
    let error = save(&path, &snapshot(), &slots()).unwrap_err();
    assert!(error.exit_code() == 1 && error.to_string().contains(&path.display().to_string()), "{error}");
    assert_eq!(std::fs::read(path.join("inside")).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn the_newest_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for step in [10, 20, 100_000_000, 30] {
        std::fs::write(folder.path().join(file_name(step)), "").unwrap();
    }
    for half in [".saving-checkpoint-00000040.safetensors-x", ".saving-model000040.pt-x", ".iddpm-x"] {
        std::fs::write(folder.path().join(half), "").unwrap();
    }
    prune(folder.path(), 2).unwrap();
    assert_eq!(list(folder.path()).iter().map(|(s, _)| *s).collect::<Vec<_>>(), [30, 100_000_000]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 5);
    clear(folder.path()).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    assert!(find(folder.path()).unwrap().ends_with("checkpoint-100000000.safetensors"));
    assert!(find(&folder.path().join("none")).unwrap_err().to_string().contains("no such checkpoint"));
}
