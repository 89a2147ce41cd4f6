//! The floors of `docs/architecture.md`: a file uses its own floor and lower ones, and says nothing about how it came to be.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the crate, floor by floor from the bottom.
const FLOORS: [&[&str]; 7] = [
    &["error", "rng", "config"],
    &[
        "schedule",
        "diffusion",
        "timestep",
        "data",
        "grid",
        "plot",
        "animation",
        "tensorboard",
        "npz",
        "checkpoint",
        "import",
    ],
    // The driver, in device/driver, knows nothing of plans: ops launch their kernels through it.
    &["ops", "graph", "autograd", "memory", "driver"],
    &["device"],
    &["unet"],
    &["train", "sampler", "nll", "bench"],
    &["cli", "main", "lib"],
];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            rust_files(&entry, found);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            found.push(entry);
        }
    }
}

/// Names that follow `crate::` in the code of `text`: `crate::a::..` and `crate::{a, b::..}`.
fn used(text: &str) -> Vec<String> {
    let code = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let name = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let rest = if rest.starts_with("device::driver") { &rest["device::".len()..] } else { rest };
        match rest.strip_prefix('{') {
            Some(list) => {
                let (mut depth, mut start) = (0, true);
                for (i, c) in list.char_indices() {
                    match c {
                        '}' if depth == 0 => break,
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && c.is_alphanumeric() => {
                            names.push(name(&list[i..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
            None => names.push(name(rest)),
        }
    }
    names
}

#[test]
fn names_in_use_lines_are_found() {
    assert_eq!(used("use crate::a::b;\n// crate::no\nuse crate::{c::{d, e}, f};"), ["a", "c", "f"]);
}

#[test]
fn files_use_only_their_own_floor_and_lower_ones() {
    let src = root().join("src");
    if !src.is_dir() {
        // A bundle of binaries carries no sources; there is nothing to check in it.
        return;
    }
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let path = file.strip_prefix(&src).unwrap();
        let path = path.strip_prefix("device/driver").map_or(path, |_| Path::new("driver"));
        let module = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some(own) = floor(module) else {
            wrong.push(format!("src/{} stands on no floor", path.display()));
            continue;
        };
        for name in used(&fs::read_to_string(&file).unwrap()) {
            match floor(&name) {
                Some(other) if other > own => wrong.push(format!("src/{} uses crate::{name}", path.display())),
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "upwards on the floors:\n{}", wrong.join("\n"));
}
