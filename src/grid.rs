//! Images out: values to bytes, grids and single PNG files.
//!
//! The network's values x in [-1, 1] become `round((x + 1) · 127.5)` after clamping, so that all 256 levels survive the
//! way in and out; the reference cuts the fraction off, half a level darker on average.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::error::{Error, Result};

/// From (x + 1) · 127.5 to a whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToByte {
    /// To the nearest level.
    Round,
    /// Down, as the reference's sampling scripts do.
    Truncate,
}

/// Values in [-1, 1] (clamped) as bytes. The arithmetic is f32, as the reference's.
pub fn to_bytes(x: &[f32], how: ToByte) -> Vec<u8> {
    let level = |x: &f32| ((x + 1.0) * 127.5).clamp(0.0, 255.0);
    match how {
        ToByte::Round => x.iter().map(|x| level(x).round() as u8).collect(),
        ToByte::Truncate => x.iter().map(|x| level(x) as u8).collect(),
    }
}

/// Images to be written: pixels (n, h, w, c), c = 1 or 3.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// Height in pixels.
    pub h: usize,
    /// Width in pixels.
    pub w: usize,
    /// Channels, 1 (grey) or 3 (RGB).
    pub c: usize,
    /// The values; their number gives n.
    pub pixels: &'a [u8],
}

/// Pixels between and around the images of a grid, after enlargement.
const PADDING: usize = 2;
/// Level of the padding: seen against black and against white images.
const PADDING_LEVEL: u8 = 64;

impl<'a> Images<'a> {
    /// n images of (h, w, c).
    pub fn new([h, w, c]: [usize; 3], pixels: &'a [u8]) -> Self {
        assert!((c == 1 || c == 3) && h * w > 0, "images of {w}x{h}x{c}");
        assert!(pixels.len().is_multiple_of(h * w * c), "{} bytes are no images of {w}x{h}x{c}", pixels.len());
        Images { h, w, c, pixels }
    }

    /// Number of images.
    pub fn n(&self) -> usize {
        self.pixels.len() / (self.h * self.w * self.c)
    }

    fn image(&self, i: usize) -> Images<'a> {
        let len = self.h * self.w * self.c;
        Images { pixels: &self.pixels[i * len..][..len], ..*self }
    }

    /// Whole factor that makes an image at least 64 pixels high, so that small ones can be seen.
    pub fn visible_scale(&self) -> usize {
        64usize.div_ceil(self.h.max(self.w)).max(1)
    }

    /// A grid with ceil(sqrt n) columns; see [`Images::table`].
    pub fn grid(&self, scale: usize) -> (usize, usize, Vec<u8>) {
        self.table((1..).find(|k| k * k >= self.n()).unwrap_or(1), scale)
    }

    /// The images row by row in `columns` columns, each pixel enlarged to `scale` x `scale`, 2 pixels of padding:
    /// (h, w, pixels), with c as here. Places without an image stay in the padding's grey.
    pub fn table(&self, columns: usize, scale: usize) -> (usize, usize, Vec<u8>) {
        let (n, c) = (self.n(), self.c);
        assert!(scale > 0 && n > 0 && columns > 0, "a grid of {n} images in {columns} columns at scale {scale}");
        let (cell_h, cell_w) = (self.h * scale + PADDING, self.w * scale + PADDING);
        let (h, w) = (n.div_ceil(columns) * cell_h + PADDING, columns * cell_w + PADDING);
        let mut out = vec![PADDING_LEVEL; h * w * c];
        for i in 0..n {
            let (top, left) = (i / columns * cell_h + PADDING, i % columns * cell_w + PADDING);
            let image = self.image(i).pixels;
            for y in 0..self.h * scale {
                let row = &image[y / scale * self.w * c..][..self.w * c];
                let line = &mut out[((top + y) * w + left) * c..][..self.w * scale * c];
                for (run, pixel) in line.chunks_exact_mut(scale * c).zip(row.chunks_exact(c)) {
                    run.chunks_exact_mut(c).for_each(|p| p.copy_from_slice(pixel));
                }
            }
        }
        (h, w, out)
    }

    /// Writes the grid as one PNG.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn write_grid(&self, path: &Path, scale: usize) -> Result<()> {
        let (h, w, pixels) = self.grid(scale);
        Images { h, w, c: self.c, pixels: &pixels }.write_png(path)
    }

    /// Writes [`Images::table`] as one PNG.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn write_table(&self, path: &Path, columns: usize, scale: usize) -> Result<()> {
        let (h, w, pixels) = self.table(columns, scale);
        Images { h, w, c: self.c, pixels: &pixels }.write_png(path)
    }

    /// Writes image i as `<folder>/000000.png`, numbered from `first`; the folder is made if need be.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be made or written.
    pub fn write_each(&self, folder: &Path, first: usize) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        (0..self.n()).try_for_each(|i| self.image(i).write_png(&folder.join(numbered(first + i))))
    }

    /// [`Images::write_each`] from 0 on, as all that the folder holds: images that follow, of an earlier and longer run, are removed.
    /// Returns how many.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be made or written.
    pub fn write_all(&self, folder: &Path) -> Result<usize> {
        self.write_each(folder, 0)?;
        let later = (self.n()..).map(|i| folder.join(numbered(i)));
        Ok(later.take_while(|path| std::fs::remove_file(path).is_ok()).count())
    }

    /// Writes the only image as a PNG.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn write_png(&self, path: &Path) -> Result<()> {
        assert!(self.n() == 1, "a PNG of {} images", self.n());
        atomically(path, |file| {
            let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), self.w as u32, self.h as u32);
            encoder.set_color(if self.c == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
            encoder.set_depth(png::BitDepth::Eight);
            let mut writer = encoder.write_header()?;
            writer.write_image_data(self.pixels)?;
            Ok(writer.finish()?)
        })
    }
}

/// The file of image i.
fn numbered(i: usize) -> String {
    format!("{i:06}.png")
}

/// Keeps other processes from holding `file`, which lies at `path`, until it is closed. Where a file system knows no locks, nothing is
/// lost but this check.
///
/// # Errors
/// [`Error::Config`] saying `what` the process that holds it does.
pub fn hold(file: &File, path: &Path, what: &str) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let path = path.display();
            Err(Error::Config(format!("{path}: another process {what}; wait for it, or give another --out")))
        }
        _ => Ok(()),
    }
}

/// Beginning of the name of a file that is being written.
pub const TEMPORARY: &str = ".iddpm-";

/// Lets `fill` write a temporary file beside `path` and renames it to `path` when it is complete; on failure nothing
/// remains and an older file stays as it was. It does not wait for the disk.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn atomically(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let write = || {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        fill(file.as_file_mut())?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(Error::io(path, "write"))
}
