//! The small images of super-resolution: made from large ones by averaging, and enlarged again for the network.
//!
//! Both follow the reference's `F.interpolate`: "area" is the mean of the pixels under a small pixel; "bilinear" takes
//! half-pixel centres, `position = max(0, (i + ½)·small/large - ½)`, and repeats the last pixel at the edge.

use super::Dataset;
use crate::diffusion::to_unit;

/// Small images in [-1, 1], (n, small, small, c).
#[derive(Clone, Debug, PartialEq)]
pub struct LowRes {
    /// The pixels.
    pub pixels: Vec<f32>,
    /// Height and width.
    pub small: usize,
    /// Channels.
    pub c: usize,
}

impl LowRes {
    /// The images of `data`, each averaged to `small` pixels; its size must be a multiple of that.
    pub fn of(data: &Dataset, small: usize) -> Self {
        assert!(data.h == data.w && data.h.is_multiple_of(small), "{}x{} pixels to {small}", data.h, data.w);
        let (large, c, factor) = (data.h, data.c, data.h / small);
        let mut pixels = Vec::with_capacity(data.n * small * small * c);
        for n in 0..data.n {
            let image = data.image(n);
            for (y, x) in (0..small).flat_map(|y| (0..small).map(move |x| (y, x))) {
                for k in 0..c {
                    let rows = (0..factor).map(|dy| ((y * factor + dy) * large + x * factor) * c + k);
                    let under = rows.flat_map(|at| image[at..].iter().step_by(c).take(factor));
                    let sum: f64 = under.map(|&b| f64::from(to_unit(b))).sum();
                    pixels.push((sum / (factor * factor) as f64) as f32);
                }
            }
        }
        LowRes { pixels, small, c }
    }

    /// The images of `data` as they are, which must be `small` pixels wide and high.
    pub fn exactly(data: &Dataset) -> Self {
        LowRes { pixels: data.pixels.iter().map(|&b| to_unit(b)).collect(), small: data.h, c: data.c }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.pixels.len() / self.image_len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    fn image_len(&self) -> usize {
        self.small * self.small * self.c
    }

    /// Image `i`, enlarged to (large, large, c), into `out`.
    pub fn enlarge(&self, i: usize, large: usize, out: &mut [f32]) {
        let image = &self.pixels[i * self.image_len()..][..self.image_len()];
        bilinear(out, image, [self.small, self.small], [large, large], self.c);
    }
}

/// The two neighbours of each of `large` positions among `small`, and the weight of the second.
fn neighbours(small: usize, large: usize) -> Vec<(usize, usize, f32)> {
    let scale = small as f32 / large as f32;
    let one = |i: usize| {
        let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
        let first = (at as usize).min(small - 1);
        (first, (first + 1).min(small - 1), at - first as f32)
    };
    (0..large).map(one).collect()
}

/// Enlarges `image` of size `from` (height, width) to `to`.   image: (h, w, c), out: (H, W, c)
pub fn bilinear(out: &mut [f32], image: &[f32], from: [usize; 2], to: [usize; 2], c: usize) {
    assert_eq!((image.len(), out.len()), (from[0] * from[1] * c, to[0] * to[1] * c), "bilinear: sizes");
    let (rows, columns) = (neighbours(from[0], to[0]), neighbours(from[1], to[1]));
    for (out, &(y0, y1, wy)) in out.chunks_exact_mut(to[1] * c).zip(&rows) {
        for (out, &(x0, x1, wx)) in out.chunks_exact_mut(c).zip(&columns) {
            for (k, out) in out.iter_mut().enumerate() {
                let at = |y: usize, x: usize| image[(y * from[1] + x) * c + k];
                let top = (1.0 - wx) * at(y0, x0) + wx * at(y0, x1);
                let bottom = (1.0 - wx) * at(y1, x0) + wx * at(y1, x1);
                *out = (1.0 - wy) * top + wy * bottom;
            }
        }
    }
}
