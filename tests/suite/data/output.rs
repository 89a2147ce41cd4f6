//! Grids, single images, npz files and the summary of `data inspect`.

use std::io::Cursor;

use iddpm::{
    cli::data::inspect,
    data::{self, DataSpec, Labels, decode::decode},
    grid::{Images, ToByte, to_bytes},
    npz::{self, Array, Values},
};

use super::{fixture, holds, noise};

#[test]
fn a_grid_places_enlarges_and_pads() {
    let pixels: Vec<u8> = (1..=12).collect();
    let images = Images::new([1, 2, 2 / 2], &pixels[..6]);
    let (h, w, grid) = images.grid(2);
    assert_eq!((h, w), (2 * (2 + 2) + 2, 2 * (4 + 2) + 2));
    let at = |y: usize, x: usize| grid[y * w + x];
    assert_eq!([at(0, 0), at(1, 1), at(2, 1), at(2, 6)], [64; 4]);
    assert_eq!([at(2, 2), at(3, 3), at(2, 4), at(3, 5)], [1, 1, 2, 2]);
    assert_eq!([at(2, 8), at(3, 11)], [3, 4], "second column");
    assert_eq!([at(6, 2), at(7, 5)], [5, 6], "second row");
    assert_eq!(at(6, 8), 64, "the place of a fourth image stays empty");
    let colour = Images::new([1, 1, 3], &pixels);
    let (_, w, grid) = colour.grid(1);
    assert_eq!(grid[3 * (2 * w + 2)..][..3], [1, 2, 3]);
    assert_eq!(grid[3 * (2 * w + 5)..][..3], [4, 5, 6]);
}

#[test]
fn small_images_are_enlarged_to_be_seen() {
    let scale = |side: usize| Images::new([side, side, 1], &vec![0; side * side]).visible_scale();
    assert_eq!([scale(8), scale(16), scale(28), scale(32), scale(64), scale(256)], [8, 4, 3, 2, 1, 1]);
}

#[test]
fn written_images_read_back_and_leave_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    for c in [1, 3] {
        let pixels = noise(5 * 4, 3, c, 5);
        let images = Images::new([4, 3, c], &pixels);
        let each = folder.path().join(format!("each{c}"));
        images.write_each(&each, 10).unwrap();
        for i in 0..5 {
            let bytes = std::fs::read(each.join(format!("{:06}.png", 10 + i))).unwrap();
            assert_eq!(decode(&bytes).unwrap().pixels, pixels[i * 12 * c..][..12 * c]);
        }
        assert_eq!(std::fs::read_dir(&each).unwrap().count(), 5);
        let path = folder.path().join("grid.png");
        images.write_grid(&path, 3).unwrap();
        let picture = decode(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((picture.h, picture.w, picture.pixels), images.grid(3));
    }
}

#[test]
fn images_of_an_earlier_and_longer_run_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("000007.png"), "not in line").unwrap();
    let write = |n: u8| {
        let pixels: Vec<u8> = (0..n).collect();
        let removed = Images::new([1, 1, 1], &pixels).write_all(folder.path()).unwrap();
        (removed, std::fs::read_dir(folder.path()).unwrap().count())
    };
    assert_eq!([write(5), write(2), write(3)], [(0, 6), (3, 3), (0, 4)]);
}

#[test]
fn a_failed_write_names_the_file_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing/grid.png");
    let error = Images::new([1, 1, 1], &[7]).write_grid(&path, 1).unwrap_err();
    holds(&error.to_string(), &["missing/grid.png", "cannot write"]);
    let path = folder.path().join("kept.npz");
    std::fs::write(&path, "old").unwrap();
    let full = || Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
    assert!(iddpm::grid::atomically(&path, |_| full()).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Rounding keeps all 256 levels; the reference's truncation loses 63 of them.
#[test]
fn bytes_survive_the_way_in_and_out() {
    let levels: Vec<u8> = (0..=255).collect();
    let x: Vec<f32> = levels.iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
    assert_eq!(to_bytes(&x, ToByte::Round), levels);
    let lost = to_bytes(&x, ToByte::Truncate).iter().zip(&levels).filter(|(a, b)| a != b).count();
    assert_eq!(lost, 63);
    assert_eq!(to_bytes(&[-7.0, 7.0, 0.0], ToByte::Round), [0, 255, 128]);
    assert_eq!(to_bytes(&[-7.0, 7.0, 0.0], ToByte::Truncate), [0, 255, 127]);
}

#[test]
fn npz_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let arrays = [
        ("arr_0", Array::images([2, 3, 4, 3], noise(6, 4, 3, 1))),
        ("arr_1", Array::labels(&[3, -1])),
        ("terms", Array::from_f64(vec![1.5, -0.0, f64::MAX])),
        ("scalar", Array { shape: vec![], values: Values::F32(vec![2.5]) }),
        ("empty", Array { shape: vec![0, 5], values: Values::F64(vec![]) }),
    ];
    npz::write(&path, &arrays.each_ref().map(|(n, a)| (*n, a))).unwrap();
    let found = npz::read(&path).unwrap();
    assert_eq!(found, arrays.map(|(n, a)| (n.to_string(), a)));
}

/// resized.npz is written by savez_compressed, decoded.npz by savez.
#[test]
fn npz_of_numpy() {
    for name in ["resized.npz", "decoded.npz"] {
        let arrays = npz::read(&fixture(name)).unwrap();
        assert!(
            arrays
                .iter()
                .all(|(_, a)| matches!(&a.values, Values::U8(v) if v.len() == a.shape.iter().product::<usize>()))
        );
    }
}

#[test]
fn a_damaged_npz_is_refused() {
    let good = std::fs::read(fixture("decoded.npz")).unwrap();
    let read =
        |bytes: &[u8]| npz::read_from("x.npz".as_ref(), Cursor::new(bytes)).map(|a| a.len()).map_err(|e| e.to_string());
    assert_eq!(read(&good), Ok(27));
    holds(&read(&good[..good.len() - 30]).unwrap_err(), &["x.npz", "directory"]);
    holds(&read(&good[..0]).unwrap_err(), &["x.npz", "truncated"]);
    let mut flipped = good.clone();
    let at = good.windows(6).position(|w| w == b"\x93NUMPY").unwrap() + 128 + 40;
    flipped[at] ^= 1;
    holds(&read(&flipped).unwrap_err(), &["checksum"]);
    let mut shape = good.clone();
    let at = good.windows(10).position(|w| w == b"'shape': (").unwrap() + 10;
    shape[at..at + 2].copy_from_slice(b"99");
    holds(&read(&shape).unwrap_err(), &["shape [99", "more than"]);
}

/// Many entries of the directory that name the same bytes: a small file would become any number of arrays.
#[test]
fn an_npz_of_repeated_entries_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    npz::write(&path, &[("arr_0", &Array::images([1, 64, 64, 1], vec![0; 4096]))]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let start = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let end = bytes.windows(4).position(|w| w == b"PK\x06\x06").unwrap();
    let entries = bytes[start..end].repeat(1000);
    let sizes = [entries.len() as u32, start as u32].map(u32::to_le_bytes).concat();
    let bomb = [&bytes[..start], &entries, b"PK\x05\x06\0\0\0\0\xe8\x03\xe8\x03", &sizes, &[0; 2]].concat();
    let text = npz::read_from("x.npz".as_ref(), Cursor::new(bomb)).unwrap_err().to_string();
    holds(&text, &["x.npz", "more than the"]);
}

/// What was found and what is needed, for each array.
#[test]
fn an_npz_of_other_arrays_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let refused = |arrays: &[(&str, &Array)], parts: &[&str]| {
        npz::write(&path, arrays).unwrap();
        holds(&data::open(&DataSpec::new(&path)).unwrap_err().to_string(), &[&["a.npz"], parts].concat());
    };
    let images = Array::images([2, 4, 4, 3], vec![9; 96]);
    let floats = Array { shape: vec![2, 4, 4, 3], values: Values::F32(vec![0.0; 96]) };
    refused(&[("arr_0", &floats)], &["arr_0 is float32 of [2, 4, 4, 3]", "uint8 of (n, h, w, 1 or 3)"]);
    refused(&[("arr_0", &Array::images([2, 4, 4, 2], vec![9; 64]))], &["uint8 of [2, 4, 4, 2]"]);
    refused(&[("images", &images)], &["no arr_0", "images"]);
    let labels = Array::from_f64(vec![0.0, 1.0]);
    refused(&[("arr_0", &images), ("arr_1", &labels)], &["arr_1 is float64 of [2]", "int64 of [2]"]);
    refused(&[("arr_0", &images), ("arr_1", &Array::labels(&[0, 1, 2]))], &["int64 of [3]", "labels of 2 images"]);
    refused(&[("arr_0", &images), ("arr_1", &Array::labels(&[0, -1]))], &["arr_1 holds -1"]);
}

#[test]
fn samples_are_a_set_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.npz");
    let pixels = noise(3 * 8, 8, 3, 4);
    let (images, labels) = (Array::images([3, 8, 8, 3], pixels.clone()), Array::labels(&[0, 2, 1]));
    npz::write(&path, &[("arr_0", &images), ("arr_1", &labels)]).unwrap();
    let set = data::open(&DataSpec::new(&path)).unwrap();
    assert_eq!((set.pixels, set.labels), (pixels, Some(vec![0, 2, 1])));
}

fn inspected(spec: &DataSpec) -> String {
    let mut out = Vec::new();
    inspect(spec, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn inspect_tells_what_a_run_needs_to_know() {
    let text = inspected(&DataSpec::default());
    println!("{text}");
    let words = ["built-in digits", "10000 of 16x16x1", "2.6 MB", "10: 0 1001", "0 images equal", "CC BY-SA", "seed 0"];
    holds(&text, &words);
    let spec = DataSpec { image_size: Some(8), channels: Some(3), ..DataSpec::new(fixture("images")) };
    let text = inspected(&spec);
    println!("{text}");
    holds(&text, &["image folder", "27 of 8x8x3", "width 9 to 40, height 8 to 30", "none", "blue", "animated.gif"]);
}

/// Two images, one black and one white: mean 0, deviation 1.
#[test]
fn inspect_computes_moments() {
    let folder = tempfile::tempdir().unwrap();
    let pixels: Vec<u8> = [vec![0; 16], vec![255; 16]].concat();
    Images::new([4, 4, 1], &pixels).write_each(folder.path(), 0).unwrap();
    let text = inspected(&DataSpec { labels: Labels::None, ..DataSpec::new(folder.path()) });
    holds(&text, &["mean +0.0000, std 1.0000"]);
}
