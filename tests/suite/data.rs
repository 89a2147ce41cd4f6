//! Data in and images out: decoding and resizing against Pillow, every kind of set, every bad input, order, grids, npz.

mod bad_input;
mod output;
mod pixels;
mod sets;

use std::path::{Path, PathBuf};

use iddpm::{data::DataSpec, grid::Images};

/// A file or folder under tests/data.
fn fixture(name: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("tests/data").join(name)
}

/// The bytes of scripts/make-data-fixtures.py `noise`.
fn noise(h: usize, w: usize, c: usize, seed: u32) -> Vec<u8> {
    let (mut x, mut values) = (seed, Vec::new());
    for (i, j, k) in (0..h * w * c).map(|at| (at / (w * c), at / c % w, at % c)) {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values.push(if i % 3 == 0 { (x >> 24) as u8 } else { ((7 * i + 5 * j + 40 * k) % 256) as u8 });
    }
    values
}

/// Writes a PNG of `noise(h, w, c, seed)` and gives its pixels back.
fn write_png(path: &Path, [h, w, c]: [usize; 3], seed: u32) -> Vec<u8> {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let pixels = noise(h, w, c, seed);
    let folder = tempfile::tempdir().unwrap();
    Images::new([h, w, c], &pixels).write_each(folder.path(), 0).unwrap();
    std::fs::copy(folder.path().join("000000.png"), path).unwrap();
    pixels
}

/// The files of a folder as a tar, its entries in the order given.
fn tar_of(folder: &Path, names: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for name in names {
        builder.append_path_with_name(folder.join(name), name).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    std::io::copy(&mut flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()), &mut out).unwrap();
    out
}

/// An idx file of images or labels.
fn idx(sizes: &[u32], body: &[u8]) -> Vec<u8> {
    let header = [0x800 + sizes.len() as u32].into_iter().chain(sizes.iter().copied());
    header.flat_map(u32::to_be_bytes).chain(body.iter().copied()).collect()
}

/// The message of the error that opening `spec` gives.
fn error(spec: &DataSpec) -> String {
    let error = iddpm::data::open(spec).expect_err("this set must be refused");
    assert_eq!(error.exit_code(), 2, "a user's mistake: {error}");
    error.to_string()
}

/// Asserts that a message holds every one of the words.
fn holds(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
}
