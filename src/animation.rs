//! How pictures come out of noise: frames of a sampling walk as a strip (rows of pictures, columns of steps) and as an
//! animation of a grid, GIF or animated PNG.

mod palette;

use crate::error::{Error, Result};
use crate::grid::{Images, ToByte, atomically, to_bytes};
use palette::Palette;
use std::fs::File;
use std::path::Path;

/// Time that the frames of an animation take together, without the last, and the time that the last one stays, in
/// hundredths of a second.
const MOVING: usize = 400;
const STILL: u16 = 200;

/// Formats of an animation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// GIF: at most 256 colours, shown everywhere.
    Gif,
    /// Animated PNG: every colour; a viewer that does not animate shows the finished pictures.
    Png,
}

impl Format {
    /// The format that the ending of `path` names.
    ///
    /// # Errors
    /// [`Error::Config`] for any other ending.
    pub fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase().as_str() {
            "gif" => Ok(Format::Gif),
            "png" | "apng" => Ok(Format::Png),
            _ => Err(Error::Config(format!("{}: an animation is written as .gif or .png", path.display()))),
        }
    }
}

/// Frames of a sampling walk: some pictures after some of the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Frames {
    size: [usize; 3],
    pictures: usize,
    /// Steps done at each frame, ascending; the last is the whole walk.
    steps: Vec<usize>,
    /// Of each frame all pictures, (n, h, w, c).
    pixels: Vec<Vec<u8>>,
}

/// `count` evenly spaced numbers of `0..n`, the first and the last among them; all of them if there are no more.
fn evenly(n: usize, count: usize) -> Vec<usize> {
    let count = count.clamp(1, n);
    (0..count).map(|k| if count == 1 { n - 1 } else { (k * (n - 1) + (count - 1) / 2) / (count - 1) }).collect()
}

impl Frames {
    /// Room for `count` evenly spaced frames of a walk of `steps` steps: the first `pictures` pictures, each of
    /// (h, w, c).
    pub fn new(size: [usize; 3], pictures: usize, steps: usize, count: usize) -> Self {
        assert!(pictures > 0 && steps > 0, "frames of {pictures} pictures and {steps} steps");
        let steps: Vec<usize> = evenly(steps, count).into_iter().map(|k| k + 1).collect();
        let frame = vec![0; pictures * size.iter().product::<usize>()];
        Frames { size, pictures, pixels: vec![frame; steps.len()], steps }
    }

    /// Whether a batch whose first picture is `first` belongs to a frame when `done` of its steps are done.
    pub fn wants(&self, first: usize, done: usize) -> bool {
        first < self.pictures && self.steps.binary_search(&done).is_ok()
    }

    /// Takes the pictures of a batch, values (n, h, w, c) in [-1, 1], the first of which is picture `first`, after
    /// `done` steps. It must be wanted; pictures beyond those that are shown are left out.
    pub fn add(&mut self, first: usize, done: usize, x: &[f32]) {
        assert!(self.wants(first, done), "frame of picture {first} after {done} steps");
        let frame = self.steps.partition_point(|s| *s < done);
        let out = &mut self.pixels[frame][first * self.size.iter().product::<usize>()..];
        let n = out.len().min(x.len());
        out[..n].copy_from_slice(&to_bytes(&x[..n], ToByte::Round));
    }

    /// Writes the first `rows` pictures as a PNG, one in each row, at most `columns` steps from left to right.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn write_strip(&self, path: &Path, rows: usize, columns: usize) -> Result<()> {
        let chosen = evenly(self.pixels.len(), columns);
        let len = self.size.iter().product::<usize>();
        let cells = (0..self.pictures.min(rows)).flat_map(|p| chosen.iter().map(move |f| (p, *f)));
        let pixels: Vec<u8> = cells.flat_map(|(p, f)| &self.pixels[f][p * len..][..len]).copied().collect();
        let images = Images::new(self.size, &pixels);
        let (h, w, pixels) = images.table(chosen.len(), images.visible_scale());
        Images::new([h, w, self.size[2]], &pixels).write_png(path)
    }

    /// Writes all frames as an animation that repeats; its last frame stays for two seconds.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written, [`Error::Config`] for sides beyond what the format can hold.
    pub fn write_animation(&self, path: &Path, format: Format) -> Result<()> {
        let grids: Vec<_> = self.pixels.iter().map(|frame| Images::new(self.size, frame)).collect();
        let grids: Vec<_> = grids.iter().map(|images| images.grid(images.visible_scale())).collect();
        let film = Film {
            h: grids[0].0,
            w: grids[0].1,
            c: self.size[2],
            delay: (MOVING / grids.len()).clamp(4, 50) as u16,
            frames: grids.into_iter().map(|(_, _, pixels)| pixels).collect(),
        };
        match format {
            Format::Gif => {
                let (Ok(h), Ok(w)) = (u16::try_from(film.h), u16::try_from(film.w)) else {
                    let (path, h, w) = (path.display(), film.h, film.w);
                    return Err(Error::Config(format!("{path}: a GIF has sides below 65,536, not {w}x{h}: use .png")));
                };
                atomically(path, |file| film.gif(file, h, w))
            }
            Format::Png => atomically(path, |file| film.png(file)),
        }
    }
}

/// Frames of (h, w, c), each shown for `delay` hundredths of a second.
struct Film {
    h: usize,
    w: usize,
    c: usize,
    delay: u16,
    frames: Vec<Vec<u8>>,
}

impl Film {
    /// Each frame with its time.
    fn timed(&self) -> impl Iterator<Item = (&[u8], u16)> {
        let time = |i| if i + 1 == self.frames.len() { STILL } else { self.delay };
        self.frames.iter().enumerate().map(move |(i, frame)| (frame.as_slice(), time(i)))
    }

    fn gif(&self, file: &mut File, height: u16, width: u16) -> std::io::Result<()> {
        let palette = Palette::of(self.frames.iter().map(Vec::as_slice), self.c);
        let out = std::io::BufWriter::new(file);
        let mut encoder = gif::Encoder::new(out, width, height, &palette.colours()).map_err(std::io::Error::other)?;
        encoder.set_repeat(gif::Repeat::Infinite).map_err(std::io::Error::other)?;
        for (frame, delay) in self.timed() {
            let buffer = palette.indices(frame, self.c).into();
            let frame = gif::Frame { width, height, delay, buffer, ..gif::Frame::default() };
            encoder.write_frame(&frame).map_err(std::io::Error::other)?;
        }
        std::io::Write::flush(&mut encoder.into_inner().map_err(std::io::Error::other)?)
    }

    fn png(&self, file: &mut File) -> std::io::Result<()> {
        let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), self.w as u32, self.h as u32);
        encoder.set_color(if self.c == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_animated(self.frames.len() as u32, 0)?;
        encoder.set_sep_def_img(true)?;
        encoder.set_frame_delay(self.delay, 100)?;
        let mut writer = encoder.write_header()?;
        if let Some(finished) = self.frames.last() {
            writer.write_image_data(finished)?;
        }
        for (frame, delay) in self.timed() {
            writer.set_frame_delay(delay, 100)?;
            writer.write_image_data(frame)?;
        }
        Ok(writer.finish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_evenly_spaced_with_both_ends() {
        assert_eq!(evenly(1000, 5), [0, 250, 500, 749, 999]);
        assert_eq!(evenly(10, 10), (0..10).collect::<Vec<_>>());
        assert_eq!((evenly(3, 60), evenly(7, 1), evenly(1, 4)), (vec![0, 1, 2], vec![6], vec![0]));
    }
}
