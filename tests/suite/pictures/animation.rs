//! Strips and animations hold exactly the frames they were given.

use super::read_png;
use iddpm::animation::{Format, Frames};
use iddpm::grid::{Images, ToByte, to_bytes};
use iddpm::rng;
use std::path::Path;

/// One frame of a GIF as it is shown.
pub struct Shown {
    pub h: usize,
    pub w: usize,
    /// Hundredths of a second.
    pub delay: u16,
    pub pixels: Vec<[u8; 3]>,
}

pub fn read_gif(path: &Path) -> Vec<Shown> {
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::RGBA);
    let mut decoder = options.read_info(std::fs::File::open(path).unwrap()).unwrap();
    let mut frames = Vec::new();
    while let Some(f) = decoder.read_next_frame().unwrap() {
        let pixels = f.buffer.chunks_exact(4).map(|p| [p[0], p[1], p[2]]).collect();
        frames.push(Shown { h: f.height.into(), w: f.width.into(), delay: f.delay, pixels });
    }
    frames
}

/// Pictures after a step of a walk: noise of seed `done`, smaller with every step.
fn values(n: usize, len: usize, done: usize) -> Vec<f32> {
    let mut x = vec![0.0; n * len];
    rng::fill_normal(&mut x, done as u64, 0, 0, rng::op::X_T);
    x.iter_mut().for_each(|x| *x *= 0.5 / done as f32);
    x
}

/// A walk of `steps` steps of 7 pictures in batches of 3, and what its frames must hold, by step.
fn walk(size: [usize; 3], shown: usize, steps: usize, count: usize) -> (Frames, Vec<Vec<u8>>) {
    let len: usize = size.iter().product();
    let mut frames = Frames::new(size, shown, steps, count);
    let all: Vec<Vec<f32>> = (1..=steps).map(|done| values(7, len, done)).collect();
    for first in [0, 3, 6] {
        let batch = first * len..(first + 3).min(7) * len;
        for done in 1..=steps {
            if frames.wants(first, done) {
                frames.add(first, done, &all[done - 1][batch.clone()]);
            }
        }
    }
    (frames, all.iter().map(|x| to_bytes(&x[..shown * len], ToByte::Round)).collect())
}

#[test]
fn an_animated_png_holds_every_frame_and_shows_the_finished_one_first() {
    let folder = tempfile::tempdir().unwrap();
    for (size, shown) in [([4, 6, 3], 7), ([5, 3, 1], 5), ([1, 1, 1], 1)] {
        let (frames, want) = walk(size, shown, 9, 5);
        let path = folder.path().join("walk.png");
        frames.write_animation(&path, Format::Png).unwrap();
        let (h, w, c, images) = read_png(&path);
        let want: Vec<_> = [8, 0, 2, 4, 6, 8]
            .map(|k: usize| {
                let images = Images::new(size, &want[k]);
                images.grid(images.visible_scale())
            })
            .into();
        assert_eq!((h, w, c), (want[0].0, want[0].1, size[2]));
        assert!(images.iter().eq(want.iter().map(|w| &w.2)), "{size:?}");
    }
}

#[test]
fn a_gif_keeps_every_grey_and_comes_close_to_colours() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.gif");
    for (size, steps) in [([8, 8, 1], 6), ([2, 3, 3], 3)] {
        let (frames, want) = walk(size, 4, steps, steps);
        frames.write_animation(&path, Format::Gif).unwrap();
        let shown = read_gif(&path);
        assert_eq!(shown.len(), steps);
        assert_eq!(shown.iter().map(|f| f.delay).max(), Some(200), "the last frame stays");
        for (f, want) in shown.iter().zip(&want) {
            let images = Images::new(size, want);
            let (h, w, want) = images.grid(images.visible_scale());
            assert_eq!((f.h, f.w), (h, w));
            for (have, want) in f.pixels.iter().zip(want.chunks_exact(size[2])) {
                let far = (0..3).map(|i| have[i].abs_diff(want[i % want.len()])).max().unwrap();
                // 72 colours and the padding fit into 256: only colours that share the upper 6 bits become one.
                assert!(far <= if size[2] == 1 { 0 } else { 3 }, "{have:?} for {want:?}");
            }
        }
    }
}

#[test]
fn a_gif_of_many_colours_has_256_of_them_near_the_right_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.gif");
    let (frames, want) = walk([64, 64, 3], 1, 1, 1);
    frames.write_animation(&path, Format::Gif).unwrap();
    let shown = read_gif(&path).remove(0);
    let images = Images::new([64, 64, 3], &want[0]);
    let (_, _, want) = images.grid(1);
    let colours: std::collections::BTreeSet<_> = shown.pixels.iter().collect();
    assert!((200..=256).contains(&colours.len()), "{}", colours.len());
    let square = |(a, b): (&[u8; 3], &[u8])| -> f64 {
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
    };
    let error: f64 = shown.pixels.iter().zip(want.chunks_exact(3)).map(square).sum();
    let rms = (error / want.len() as f64).sqrt();
    // 256 equal boxes would cut each side of the cube of colours into 6.35; an even spread over a box has a deviation of
    // its side over sqrt(12): 256/6.35/3.46 = 11.6. Colours chosen for the pixels must not be worse.
    assert!(rms < 11.6, "{rms}");
}

#[test]
fn a_strip_has_a_row_for_each_picture_and_a_column_for_each_step() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("strip.png");
    let size = [4, 6, 3];
    let (frames, want) = walk(size, 7, 11, 11);
    frames.write_strip(&path, 5, 3).unwrap();
    let (h, w, c, images) = read_png(&path);
    let len = 4 * 6 * 3;
    let cells: Vec<u8> =
        (0..5).flat_map(|p| [0, 5, 10].map(|k: usize| want[k][p * len..][..len].to_vec())).flatten().collect();
    let cells = Images::new(size, &cells);
    assert_eq!((h, w, images[0].clone()), cells.table(3, cells.visible_scale()));
    assert_eq!(c, 3);
}

#[test]
fn the_ending_names_the_format() {
    let of = |name: &str| Format::of(Path::new(name));
    assert_eq!(of("a.GIF").unwrap(), Format::Gif);
    assert_eq!((of("a.png").unwrap(), of("b.apng").unwrap()), (Format::Png, Format::Png));
    for name in ["a.mp4", "gif", ""] {
        assert_eq!(of(name).unwrap_err().exit_code(), 2, "{name}");
    }
}
