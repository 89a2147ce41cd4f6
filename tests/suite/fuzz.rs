//! A short, repeatable run of the entry points of `fuzz/fuzz_targets` over mutations of the seed corpus.
//!
//! A reader may accept or refuse a damaged file; it must not panic, hang or ask for memory that the file does not justify.

use std::io::Cursor;
use std::path::{Path, PathBuf};

/// Mutations of each seed.
const ROUNDS: u64 = 400;

/// What a target does with the bytes of a file.
type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 7] = [
    ("tensor_file", |b| drop(iddpm::import::tensor_file::parse(b))),
    ("safetensors", |b| {
        drop(iddpm::import::tensor_file::parse(b));
        drop(iddpm::checkpoint::parse(b).map(|p| iddpm::unet::Params::new(&p.config.model)));
    }),
    ("pickle", |b| drop(iddpm::import::pickle::read(b))),
    ("zip", |b| {
        if let Ok(entries) = iddpm::import::zip::entries(b) {
            entries.values().for_each(|e| _ = iddpm::import::zip::intact(b, e));
        }
    }),
    ("npz", |b| drop(iddpm::npz::read_from(Path::new("fuzz.npz"), Cursor::new(b)))),
    ("idx", |b| {
        drop(iddpm::data::idx::images(Path::new("fuzz"), b));
        drop(iddpm::data::idx::labels(Path::new("fuzz"), b));
    }),
    ("image", |b| drop(iddpm::data::decode::decode(b))),
];

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// One to four changes: a byte, an extreme number, a piece repeated or taken out, the end cut off.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => {
                let extreme = [[0xff; 4], [0xff, 0xff, 0xff, 0x7f], [0; 4], [0, 0, 0, 0x80]][random.below(4)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&extreme[..end - at]);
            }
            3 => {
                let piece = bytes[at..(at + 1 + random.below(64)).min(bytes.len())].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            4 => drop(bytes.drain(at..(at + 1 + random.below(16)).min(bytes.len()))),
            _ => bytes.truncate(at),
        }
    }
}

/// What lies in `folder` of `fuzz`.
fn files(folder: &str) -> Vec<PathBuf> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let folder = Path::new(&root).join("fuzz").join(folder);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    found.sort();
    assert!(!found.is_empty(), "{}: no files", folder.display());
    found
}

#[test]
fn every_target_runs_here() {
    let mut names = TARGETS.map(|(name, _)| name);
    names.sort_unstable();
    for folder in ["fuzz_targets", "corpus"] {
        let found: Vec<String> = files(folder).iter().map(|p| p.file_stem().unwrap().display().to_string()).collect();
        assert_eq!(found, names, "{folder}");
    }
}

#[test]
fn damaged_files_never_panic() {
    for (name, target) in TARGETS {
        for (k, seed) in files(&format!("corpus/{name}")).iter().enumerate() {
            let bytes = std::fs::read(seed).unwrap();
            target(&bytes);
            for round in 0..ROUNDS {
                let mut random = Random(1 + round * 977 + k as u64 * 7919);
                let mut damaged = bytes.clone();
                mutate(&mut damaged, &mut random);
                let run = std::panic::catch_unwind(|| target(&damaged));
                assert!(run.is_ok(), "{name}: {} with mutation {round} panics", seed.display());
            }
        }
    }
}
