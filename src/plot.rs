//! Charts as SVG and PNG: line charts with linear or logarithmic axes, ticks, a legend, several panels on one sheet.
//!
//! A [`Figure`] is plain data. It is laid out once as marks (lines, areas, text) at places on the sheet, and the marks
//! are written as SVG or drawn as pixels, so both pictures are the same. [`charts`] makes the figures of this program,
//! [`table`] reads the logs and tables they are made from.
//!
//! A value that cannot be drawn (NaN, infinity, beyond 1e300, not positive on a logarithmic axis) leaves a gap in its
//! line; a point between two gaps is drawn as a dot.

mod axis;
pub mod charts;
mod font;
mod layout;
mod raster;
mod svg;
pub mod table;

use crate::error::Result;
use crate::grid;
use std::io::Write;
use std::path::Path;

/// Spacing of an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences are equal lengths.
    #[default]
    Linear,
    /// Equal ratios are equal lengths.
    Log,
}

/// One axis of a chart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// What it shows, with the unit.
    pub label: String,
    /// Spacing.
    pub scale: Scale,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Look {
    /// A line.
    #[default]
    Solid,
    /// A broken line.
    Dashed,
    /// A thin pale line, behind the others.
    Faint,
    /// The pale area inside the points, in their order.
    Area,
}

/// Points joined in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Name in the legend; none if empty.
    pub name: String,
    /// (x, y).
    pub points: Vec<(f64, f64)>,
    /// Number of its colour; series of one thing share it.
    pub colour: usize,
    /// How it is drawn.
    pub look: Look,
}

/// One panel: series over a pair of axes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// Short name, by which it is picked from several.
    pub key: &'static str,
    /// Heading.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// What is shown.
    pub series: Vec<Series>,
}

/// Panels side by side, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figure {
    /// The panels.
    pub panels: Vec<Chart>,
    /// Panels in a row.
    pub columns: usize,
}

impl Axis {
    /// A linear axis.
    pub fn linear(label: &str) -> Self {
        Axis { label: label.into(), scale: Scale::Linear }
    }

    /// A logarithmic axis.
    pub fn log(label: &str) -> Self {
        Axis { label: label.into(), scale: Scale::Log }
    }
}

impl Figure {
    /// Panels in one, two or three columns, depending on their number.
    pub fn new(panels: Vec<Chart>) -> Self {
        let columns = match panels.len() {
            0..=1 => 1,
            2..=4 => 2,
            _ => 3,
        };
        Figure { panels, columns }
    }

    /// The figure as the text of an SVG file.
    pub fn svg(&self) -> String {
        svg::text(&layout::sheet(self))
    }

    /// The figure as pixels: (h, w, RGB), twice as many per unit as the SVG has.
    pub fn pixels(&self) -> (usize, usize, Vec<u8>) {
        raster::draw(&layout::sheet(self))
    }

    /// Writes the figure to `path`: pixels if its name ends in `.png`, else SVG.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`] when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
            let (h, w, pixels) = self.pixels();
            return grid::Images::new([h, w, 3], &pixels).write_png(path);
        }
        grid::atomically(path, |file| file.write_all(self.svg().as_bytes()))
    }
}
