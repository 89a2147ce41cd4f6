//! Marks as pixels, [`SCALE`] to a unit of the sheet: strokes by the distance of a pixel to the nearest segment, areas
//! by the part of a pixel that lies inside.

use super::font;
use super::layout::{Anchor, Colour, Mark, Sheet, Text};

/// Pixels per unit of the sheet.
const SCALE: f64 = 2.0;
/// Length of the dashes of a broken line and of the gaps between them.
const DASH: [f64; 2] = [5.0, 3.0];
/// Lines of a pixel at which the inside of an area is found.
const PARTS: usize = 4;

type Point = (f64, f64);

/// A picture and the mask of the mark that is being drawn.
struct Canvas {
    w: usize,
    h: usize,
    pixels: Vec<u8>,
    /// Part of each pixel that the mark covers.
    mask: Vec<f32>,
    /// Rows of the mask that are not all 0.
    touched: std::ops::Range<usize>,
}

/// The sheet as (h, w, RGB).
pub fn draw(sheet: &Sheet) -> (usize, usize, Vec<u8>) {
    let [h, w] = [sheet.h, sheet.w].map(|x| (SCALE * x).ceil() as usize);
    let mut canvas = Canvas { w, h, pixels: vec![255; h * w * 3], mask: vec![0.0; h * w], touched: 0..0 };
    for mark in &sheet.marks {
        match mark {
            Mark::Line { points, colour, width, dashed, opacity } => {
                let (segments, width) = match points.as_slice() {
                    [p] => (vec![[*p; 2]], 3.0 * width),
                    _ if *dashed => (dashes(points), *width),
                    _ => (points.windows(2).map(|p| [p[0], p[1]]).collect(), *width),
                };
                segments.iter().for_each(|s| canvas.stroke(*s, width));
                canvas.paint(*colour, *opacity);
            }
            Mark::Area { points, colour, opacity } => {
                canvas.fill(points);
                canvas.paint(*colour, *opacity);
            }
            Mark::Text(t) => canvas.text(t),
        }
    }
    (h, w, canvas.pixels)
}

/// The segments of a broken line.
fn dashes(points: &[Point]) -> Vec<[Point; 2]> {
    let (mut segments, mut left, mut on) = (Vec::new(), DASH[0], true);
    for p in points.windows(2) {
        let (dx, dy) = (p[1].0 - p[0].0, p[1].1 - p[0].1);
        let (length, mut done) = (dx.hypot(dy), 0.0);
        while done < length {
            let end = (done + left).min(length);
            let at = |s: f64| (p[0].0 + dx * s / length, p[0].1 + dy * s / length);
            if on {
                segments.push([at(done), at(end)]);
            }
            left -= end - done;
            done = end;
            if left <= 1e-9 {
                on = !on;
                left = DASH[usize::from(!on)];
            }
        }
    }
    segments
}

impl Canvas {
    /// Whole pixels from `lo` to `hi` of an axis with `n`.
    fn span(lo: f64, hi: f64, n: usize) -> std::ops::Range<usize> {
        let place = |x: f64| x.clamp(0.0, n as f64) as usize;
        place(lo.floor())..place(hi.ceil())
    }

    /// Notes that rows of the mask change.
    fn touch(&mut self, rows: &std::ops::Range<usize>) {
        let t = &self.touched;
        self.touched = if t.is_empty() { rows.clone() } else { t.start.min(rows.start)..t.end.max(rows.end) };
    }

    /// Adds a round-ended stroke to the mask.
    fn stroke(&mut self, [a, b]: [Point; 2], width: f64) {
        let (a, b) = ((a.0 * SCALE, a.1 * SCALE), (b.0 * SCALE, b.1 * SCALE));
        let (dx, dy, r) = (b.0 - a.0, b.1 - a.1, 0.5 * width * SCALE);
        let reach = r + 1.0;
        let rows = Self::span(a.1.min(b.1) - reach, a.1.max(b.1) + reach, self.h);
        self.touch(&rows);
        for y in rows {
            for x in Self::span(a.0.min(b.0) - reach, a.0.max(b.0) + reach, self.w) {
                let (px, py) = (x as f64 + 0.5 - a.0, y as f64 + 0.5 - a.1);
                let square = dx * dx + dy * dy;
                let along = if square > 0.0 { ((px * dx + py * dy) / square).clamp(0.0, 1.0) } else { 0.0 };
                let distance = (px - along * dx).hypot(py - along * dy);
                let covered = (r + 0.5 - distance).clamp(0.0, 1.0) as f32;
                let mask = &mut self.mask[y * self.w + x];
                *mask = mask.max(covered);
            }
        }
    }

    /// Adds the inside of a closed line to the mask (even-odd rule).
    fn fill(&mut self, points: &[Point]) {
        let height = |best: fn(f64, f64) -> f64, from| points.iter().map(|p| SCALE * p.1).fold(from, best);
        let rows = Self::span(height(f64::min, f64::INFINITY), height(f64::max, f64::NEG_INFINITY), self.h);
        self.touch(&rows);
        for line in rows.start * PARTS..rows.end * PARTS {
            let y = (line as f64 + 0.5) / (PARTS as f64 * SCALE);
            let next = points.iter().skip(1).chain(points.first());
            let crossed = points.iter().zip(next).filter(|(a, b)| (a.1 > y) != (b.1 > y));
            let mut xs: Vec<f64> =
                crossed.map(|(a, b)| (a.0 + (y - a.1) / (b.1 - a.1) * (b.0 - a.0)) * SCALE).collect();
            xs.sort_by(f64::total_cmp);
            for pair in xs.chunks_exact(2) {
                for x in Self::span(pair[0], pair[1], self.w) {
                    let inside = pair[1].min(x as f64 + 1.0) - pair[0].max(x as f64);
                    self.mask[line / PARTS * self.w + x] += inside.max(0.0) as f32 / PARTS as f32;
                }
            }
        }
    }

    /// Lays the colour over the pixels of the mask, and clears it.
    fn paint(&mut self, colour: Colour, opacity: f64) {
        let rows = std::mem::take(&mut self.touched);
        let (pixels, mask) = (&mut self.pixels[3 * self.w * rows.start..], &mut self.mask[self.w * rows.start..]);
        for (pixel, mask) in pixels.chunks_exact_mut(3).zip(mask).take(self.w * rows.len()) {
            if *mask > 0.0 {
                let part = mask.min(1.0) * opacity as f32;
                for (p, c) in pixel.iter_mut().zip(colour) {
                    *p = (f32::from(*p) + part * (f32::from(c) - f32::from(*p))).round() as u8;
                }
                *mask = 0.0;
            }
        }
    }

    fn text(&mut self, t: &Text) {
        let raised = 0.72 * t.size;
        let whole = t.size * font::width(&t.text) + raised * font::width(&t.raised);
        let start = match t.anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => -0.5 * whole,
            Anchor::End => -whole,
        };
        let parts = [(&t.text, 0.0, 0.0, t.size), (&t.raised, t.size * font::width(&t.text), -0.42 * t.size, raised)];
        for (text, right, down, size) in parts {
            let place = |p: Point| {
                let (x, y) = (start + right + size * p.0, down + size * p.1);
                if t.upright { (t.at.0 + y, t.at.1 - x) } else { (t.at.0 + x, t.at.1 + y) }
            };
            let width = size * if t.bold { 0.13 } else { 0.09 };
            font::strokes(text).into_iter().for_each(|s| self.stroke(s.map(place), width));
        }
        self.paint([38; 3], 1.0);
    }
}
