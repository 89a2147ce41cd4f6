//! What users get wrong and what files may hold: one clear message each, no panic.

use std::io::Cursor;

use iddpm::{
    data::{self, DataSpec, Labels, Split, decode::decode},
    npz,
};
use proptest::prelude::*;

use super::{error, fixture, gzip, holds, idx, noise, tar_of, write_png};

fn folder_of(images: &[(&str, [usize; 3])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (i, (name, size)) in images.iter().enumerate() {
        write_png(&folder.path().join(name), *size, i as u32);
    }
    folder
}

#[test]
fn missing_and_empty() {
    let folder = tempfile::tempdir().unwrap();
    holds(&error(&DataSpec::new(folder.path().join("nowhere"))), &["nowhere", "no such file", "builtin"]);
    holds(&error(&DataSpec::new(folder.path())), &["no images", ".png", "no files at all"]);
    std::fs::write(folder.path().join("a.tiff"), "x").unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["no images", "1 other files", "a.tiff"]);
    let path = folder.path().join("empty.png");
    std::fs::write(&path, "").unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["empty.png", "empty"]);
    holds(&error(&DataSpec::new(&path)), &["empty.png", "single image", "folder"]);
    holds(&error(&DataSpec::new(folder.path().join("a.tiff"))), &["not a set of images"]);
    let path = folder.path().join("photos.zip");
    std::fs::write(&path, [b"PK\x03\x04".as_slice(), &[0; 22], &[5, 0, 0, 0], b"a.png and more"].concat()).unwrap();
    holds(&error(&DataSpec::new(&path)), &["photos.zip", "a.png is no array", "unpacked"]);
}

#[test]
#[cfg(unix)]
fn unreadable() {
    let folder = folder_of(&[("a.png", [4, 4, 1])]);
    std::os::unix::fs::symlink("/nowhere", folder.path().join("b.png")).unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["b.png", "cannot read"]);
    std::fs::remove_file(folder.path().join("b.png")).unwrap();
    std::os::unix::fs::symlink(".", folder.path().join("loop")).unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["loop", "points back"]);
}

#[test]
fn truncated_images_are_named() {
    for name in ["rgb.png", "rgb.jpg", "progressive.jpg", "animated.gif"] {
        let folder = folder_of(&[("a.png", [13, 11, 3])]);
        let bytes = std::fs::read(fixture("images").join(name)).unwrap();
        std::fs::write(folder.path().join(format!("b-{name}")), &bytes[..bytes.len() * 2 / 3]).unwrap();
        let spec = DataSpec { image_size: Some(8), ..DataSpec::new(folder.path()) };
        holds(&error(&spec), &[&format!("b-{name}"), "damaged or truncated"]);
        std::fs::write(folder.path().join(format!("b-{name}")), "<html>").unwrap();
        holds(&error(&spec), &[&format!("b-{name}"), "not a PNG, JPEG, GIF or WebP"]);
    }
}

#[test]
fn mixed_sizes_and_channels_name_two_files_and_the_remedy() {
    let folder = folder_of(&[("a.png", [8, 8, 3]), ("b.png", [8, 8, 3]), ("c.png", [9, 10, 3])]);
    holds(&error(&DataSpec::new(folder.path())), &["a.png is 8x8", "c.png is 10x9", "--image-size"]);
    assert!(data::open(&DataSpec { image_size: Some(8), ..DataSpec::new(folder.path()) }).is_ok());
    let folder = folder_of(&[("a.png", [8, 8, 3]), ("b.png", [8, 8, 1])]);
    holds(&error(&DataSpec::new(folder.path())), &["a.png is colour", "b.png is grey", "--channels"]);
    for channels in [1, 3] {
        let set = data::open(&DataSpec { channels: Some(channels), ..DataSpec::new(folder.path()) }).unwrap();
        assert_eq!(set.c, channels);
    }
    let folder = folder_of(&[("a.png", [6, 8, 1])]);
    holds(&error(&DataSpec::new(folder.path())), &["a.png", "8x6", "square", "--image-size"]);
}

#[test]
fn fewer_images_than_a_batch() {
    let folder = folder_of(&[("a.png", [4, 4, 1]), ("b.png", [4, 4, 1])]);
    let set = data::open(&DataSpec::new(folder.path())).unwrap();
    let error = set.batches(3, 0, 0).unwrap_err();
    holds(&error.to_string(), &["2 images", "batch of 3", "at most 2", &folder.path().to_string_lossy()]);
    assert_eq!(error.exit_code(), 2);
    assert!(set.batches(0, 0, 0).is_err());
    assert!(set.batches(2, 0, 0).is_ok());
}

#[test]
fn wrong_label_names() {
    let folder = folder_of(&[("cat_1.png", [4, 4, 1]), ("dog.png", [4, 4, 1])]);
    let spec = |labels| DataSpec { labels, ..DataSpec::new(folder.path()) };
    holds(&error(&spec(Labels::Prefix)), &["dog.png", "no `_`", "folder"]);
    holds(&error(&spec(Labels::Folder)), &["cat_1.png", "no subfolder", "prefix"]);
    let digits = DataSpec { labels: Labels::Prefix, ..DataSpec::default() };
    holds(&error(&digits), &["names"]);
}

#[test]
fn absent_splits_and_impossible_settings() {
    let folder = folder_of(&[("a.png", [4, 4, 1])]);
    let at = |path: &std::path::Path| DataSpec::new(path);
    for spec in [at(folder.path()), DataSpec::default()] {
        holds(&error(&DataSpec { split: Split::Test, ..spec }), &["no test split"]);
    }
    let spec = at(folder.path());
    holds(&error(&DataSpec { image_size: Some(0), ..spec.clone() }), &["image size 0"]);
    holds(&error(&DataSpec { image_size: Some(99_999), ..spec.clone() }), &["99999", "16384"]);
    holds(&error(&DataSpec { channels: Some(4), ..spec.clone() }), &["4 channels"]);
    holds(&error(&DataSpec { limit: Some(0), ..spec.clone() }), &["limit 0"]);
    holds(&error(&DataSpec { threads: Some(0), ..spec }), &["0 threads"]);
}

#[test]
fn more_than_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train-images-idx3-ubyte");
    std::fs::write(&path, idx(&[u32::MAX, 16_384, 16_384], &[])).unwrap();
    holds(&error(&DataSpec::new(&path)), &["4294967295 images of 16384x16384x1", "1152921504338.4 MB", "limit"]);
}

#[test]
fn damaged_idx_files() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("x-images-idx3-ubyte");
    let labels = folder.path().join("x-labels-idx1-ubyte");
    let good = idx(&[2, 4, 4], &noise(8, 4, 1, 1));
    let spec = DataSpec::new(&images);
    std::fs::write(&images, &good).unwrap();
    holds(&error(&DataSpec { split: Split::Test, ..spec.clone() }), &["no test split"]);
    let refused = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&images, bytes).unwrap();
        holds(&error(&spec), words);
    };
    refused(&good[..40], &["truncated: 24 of the 32"]);
    refused(&gzip(&good)[..30], &["x-images-idx3-ubyte"]);
    refused(&idx(&[0, 4, 4], &[]), &["no images"]);
    refused(&idx(&[1, 70_000, 2], &[]), &["2x70000", "16384"]);
    refused(&idx(&[2], &[1, 2]), &["no idx file of images", "08, 01"]);
    refused(&idx(&[1, 4, 6], &noise(4, 6, 1, 1)), &["6x4", "square"]);
    std::fs::write(&images, &good).unwrap();
    assert_eq!(data::open(&spec).unwrap().labels, None);
    for (bytes, words) in [
        (idx(&[3], &[0, 1, 2]), &["3 labels for 2 images"][..]),
        (idx(&[2], &[0]), &["truncated: 1 of the 2"][..]),
        (good.clone(), &["no idx file of labels"][..]),
    ] {
        std::fs::write(&labels, bytes).unwrap();
        holds(&error(&spec), &[words, &["x-labels-idx1-ubyte"]].concat());
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("t10k-images-idx3-ubyte"), &good).unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["no train images", "t10k"]);
}

#[test]
fn damaged_cifar_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data_batch_1.bin");
    for bytes in [vec![], vec![1; 3000], vec![200; 3073], vec![0; 3073 * 2 + 5]] {
        std::fs::write(&path, bytes).unwrap();
        for path in [folder.path(), &path] {
            holds(&error(&DataSpec::new(path)), &["data_batch_1.bin", "3073"]);
        }
    }
    std::fs::write(&path, vec![1; 3073]).unwrap();
    std::fs::write(folder.path().join("train.bin"), vec![50; 3074]).unwrap();
    holds(&error(&DataSpec::new(folder.path())), &["two kinds", "train.bin"]);
    std::fs::remove_file(folder.path().join("train.bin")).unwrap();
    for path in [folder.path(), &path] {
        holds(&error(&DataSpec { split: Split::Test, ..DataSpec::new(path) }), &["no test"]);
    }
}

#[test]
fn damaged_archives() {
    let folder = folder_of(&[("a.png", [40, 40, 3]), ("b.png", [40, 40, 3])]);
    let good = tar_of(folder.path(), &["a.png", "b.png"]);
    let path = folder.path().join("set.tar");
    let spec = DataSpec::new(&path);
    let packed = gzip(&good);
    for bytes in [&good[..2000], &good[..good.len() / 2], &packed[..packed.len() / 2]] {
        std::fs::write(&path, bytes).unwrap();
        holds(&error(&spec), &["set.tar", "damaged or truncated"]);
    }
    let mut bad_image = good.clone();
    bad_image[512 + 60] ^= 0xFF;
    std::fs::write(&path, bad_image).unwrap();
    holds(&error(&spec), &["set.tar/a.png", "damaged"]);
    std::fs::write(folder.path().join("notes.txt"), "none").unwrap();
    std::fs::write(&path, tar_of(folder.path(), &["notes.txt"])).unwrap();
    holds(&error(&spec), &["set.tar", "among its 1 files"]);
}

/// Bytes of a good file with some of them changed and the end cut off.
fn damaged(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = good.len();
    let changes = proptest::collection::vec((0..len, any::<u8>()), 0..8);
    (changes, prop_oneof![Just(len), 0..len]).prop_map(move |(changes, end)| {
        let mut bytes = good.clone();
        changes.into_iter().for_each(|(at, value)| bytes[at] = value);
        bytes.truncate(end);
        bytes
    })
}

/// A damaged one of the fixture images.
fn damaged_image() -> impl Strategy<Value = Vec<u8>> {
    let entries = std::fs::read_dir(fixture("images")).unwrap();
    let mut paths: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    proptest::sample::select(paths).prop_flat_map(|path| damaged(std::fs::read(path).unwrap()))
}

/// Opens `bytes` as a file of that name in an empty folder, and the folder; the answer does not matter, returning does.
fn open_as(name: &str, bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    for path in [&path, folder.path()] {
        let spec = DataSpec { image_size: Some(4), channels: Some(3), threads: None, ..DataSpec::new(path) };
        if let Ok(set) = data::open(&spec) {
            assert_eq!(set.pixels.len(), set.n * 4 * 4 * 3);
        }
    }
}

const NAMES: [&str; 6] =
    ["x.tar", "x.bin", "data_batch_1.bin", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "x.npz"];

fn good_tar() -> Vec<u8> {
    tar_of(&fixture("images"), &["rgb.png", "grey.jpg", "part.gif"])
}

fn good_idx() -> Vec<u8> {
    idx(&[3, 5, 5], &noise(15, 5, 1, 2))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoders_survive_damage(bytes in damaged_image()) {
        if let Ok(picture) = decode(&bytes) {
            prop_assert_eq!(picture.pixels.len(), picture.h * picture.w * picture.c);
        }
    }

    #[test]
    fn readers_survive_noise(name in proptest::sample::select(&NAMES[..]), bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        open_as(name, &bytes);
    }

    #[test]
    fn tar_survives_damage(bytes in damaged(good_tar()), gz in damaged(gzip(&good_tar()))) {
        open_as("x.tar", &bytes);
        open_as("x.tar.gz", &gz);
    }

    #[test]
    fn idx_survives_damage(bytes in damaged(good_idx()), gz in damaged(gzip(&good_idx()))) {
        open_as("train-images-idx3-ubyte", &bytes);
        open_as("train-images-idx3-ubyte.gz", &gz);
    }

    #[test]
    fn npz_survives_damage(bytes in damaged(std::fs::read(fixture("resized.npz")).unwrap())) {
        let _ = npz::read_from("x.npz".as_ref(), Cursor::new(&bytes));
    }

    #[test]
    fn npz_survives_noise_behind_a_directory(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let end = [&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &(bytes.len() as u32).to_le_bytes(), &[0; 6]].concat();
        let _ = npz::read_from("x.npz".as_ref(), Cursor::new([bytes, end].concat()));
    }
}
