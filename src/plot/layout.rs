//! From charts to marks: where each line, area and text of a figure lies on the sheet.
//!
//! The sheet's unit is one pixel of the SVG; x grows to the right, y downwards.

use super::axis::{Range, Tick};
use super::{Chart, Figure, Look, Series};

/// Red, green, blue.
pub type Colour = [u8; 3];

/// Colours of series that are told apart with any colour vision (Okabe & Ito 2008), yellow left out.
const PALETTE: [Colour; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [60, 60, 60]];
const INK: Colour = [38, 38, 38];
const GRID: Colour = [228, 228, 228];
const WHITE: Colour = [255, 255, 255];

/// Size of a panel.
const PANEL: (f64, f64) = (460.0, 320.0);
/// Height of the text of ticks and legends, of axis labels, of headings.
const SMALL: f64 = 11.0;
const MEDIUM: f64 = 12.0;
const LARGE: f64 = 13.0;
/// Length of a labelled tick.
const TICK: f64 = 4.5;
/// Characters of a name in the legend; longer ones lose their middle.
const NAME: usize = 36;

/// Everything that a figure shows, in the order of drawing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sheet {
    /// Width of the sheet.
    pub w: f64,
    /// Height of the sheet.
    pub h: f64,
    /// What is on it.
    pub marks: Vec<Mark>,
}

/// Where a text lies relative to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The text begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

/// A text; its place is on the base line.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// Place.
    pub at: (f64, f64),
    /// What it says.
    pub text: String,
    /// A raised small addition: the exponent.
    pub raised: String,
    /// Height.
    pub size: f64,
    /// Which part of it is at the place.
    pub anchor: Anchor,
    /// Turned left by a right angle.
    pub upright: bool,
    /// Heavier.
    pub bold: bool,
}

/// A thing that can be drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum Mark {
    /// Points joined by a line; a single one is a dot.
    Line {
        /// The points.
        points: Vec<(f64, f64)>,
        /// Its colour.
        colour: Colour,
        /// Its width.
        width: f64,
        /// Broken.
        dashed: bool,
        /// 1 hides what is behind it.
        opacity: f64,
    },
    /// The inside of a closed line.
    Area {
        /// The closed line.
        points: Vec<(f64, f64)>,
        /// Its colour.
        colour: Colour,
        /// 1 hides what is behind it.
        opacity: f64,
    },
    /// A text in the colour of ink.
    Text(Text),
}

/// Lays the figure out.
pub fn sheet(figure: &Figure) -> Sheet {
    let columns = figure.columns.clamp(1, figure.panels.len().max(1));
    let rows = figure.panels.len().div_ceil(columns).max(1);
    let mut sheet = Sheet { w: columns as f64 * PANEL.0, h: rows as f64 * PANEL.1, marks: Vec::new() };
    for (i, chart) in figure.panels.iter().enumerate() {
        let corner = ((i % columns) as f64 * PANEL.0, (i / columns) as f64 * PANEL.1);
        Panel::new(chart, corner).draw(&mut sheet.marks);
    }
    sheet
}

/// Width of a text, about.
fn width(text: &str, size: f64) -> f64 {
    0.58 * size * text.chars().count() as f64
}

/// A chart with its ranges and the rectangle between its axes.
struct Panel<'a> {
    chart: &'a Chart,
    corner: (f64, f64),
    x: Range,
    y: Range,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl<'a> Panel<'a> {
    fn new(chart: &'a Chart, corner: (f64, f64)) -> Self {
        let points = || chart.series.iter().flat_map(|s| &s.points);
        let (in_x, in_y) = (
            Range::of(chart.x.scale, 0.0, points().map(|p| p.0)),
            Range::of(chart.y.scale, 0.0, points().map(|p| p.1)),
        );
        // Only points that can be drawn on both axes count.
        let drawn = || points().filter(|p| in_x.place(p.0).is_some() && in_y.place(p.1).is_some());
        let x = Range::of(chart.x.scale, 0.0, drawn().map(|p| p.0));
        let y = Range::of(chart.y.scale, 0.04, drawn().map(|p| p.1));
        let label = |t: &Tick| t.label.as_ref().map_or(0.0, |(n, e)| width(n, SMALL) + width(e, 0.72 * SMALL));
        let widest = y.ticks().iter().map(label).fold(0.0, f64::max);
        let (left, right) = (corner.0 + 30.0 + widest + TICK, corner.0 + PANEL.0 - 22.0);
        let (top, bottom) = (corner.1 + 34.0, corner.1 + PANEL.1 - 46.0);
        Panel { chart, corner, x, y, left, right, top, bottom }
    }

    fn draw(&self, marks: &mut Vec<Mark>) {
        self.axes(marks);
        if !(self.x.filled && self.y.filled) {
            let at = ((self.left + self.right) / 2.0, (self.top + self.bottom) / 2.0);
            marks.push(text("no values to show", at, MEDIUM, Anchor::Middle));
        }
        for look in [Look::Area, Look::Faint, Look::Dashed, Look::Solid] {
            self.chart.series.iter().filter(|s| s.look == look).for_each(|s| {
                let colour = PALETTE[s.colour % PALETTE.len()];
                let lines = self.lines(&s.points);
                marks.extend(lines.into_iter().map(|points| match look {
                    Look::Area => Mark::Area { points, colour, opacity: 0.2 },
                    Look::Faint => Mark::Line { points, colour, width: 1.0, dashed: false, opacity: 0.25 },
                    Look::Dashed | Look::Solid => {
                        Mark::Line { points, colour, width: 1.6, dashed: is_dashed(s), opacity: 1.0 }
                    }
                }));
            });
        }
        self.legend(marks);
    }

    fn axes(&self, marks: &mut Vec<Mark>) {
        let (x, y, chart) = (self.x.ticks(), self.y.ticks(), self.chart);
        let across = |at: f64| self.left + at * (self.right - self.left);
        let up = |at: f64| self.bottom - at * (self.bottom - self.top);
        let length = |t: &Tick| if t.label.is_some() { TICK } else { 0.55 * TICK };
        let labelled = |ticks: &[Tick]| ticks.iter().filter(|t| t.label.is_some()).map(|t| t.at).collect::<Vec<_>>();
        marks.extend(labelled(&x).iter().map(|at| line([(across(*at), self.top), (across(*at), self.bottom)], GRID)));
        marks.extend(labelled(&y).iter().map(|at| line([(self.left, up(*at)), (self.right, up(*at))], GRID)));
        for t in &x {
            let x = across(t.at);
            marks.push(line([(x, self.bottom), (x, self.bottom + length(t))], INK));
            marks.extend(t.label.as_ref().map(|l| label(l, (x, self.bottom + TICK + 12.0), Anchor::Middle)));
        }
        for t in &y {
            let y = up(t.at);
            marks.push(line([(self.left - length(t), y), (self.left, y)], INK));
            marks.extend(t.label.as_ref().map(|l| label(l, (self.left - TICK - 3.5, y + 0.36 * SMALL), Anchor::End)));
        }
        let frame = [(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)];
        marks.push(line(frame, INK));
        let (middle_x, middle_y) = ((self.left + self.right) / 2.0, (self.top + self.bottom) / 2.0);
        marks.push(text(&chart.x.label, (middle_x, self.corner.1 + PANEL.1 - 12.0), MEDIUM, Anchor::Middle));
        let mut upright = Text { upright: true, ..words(&chart.y.label, (self.corner.0 + 17.0, middle_y), MEDIUM) };
        upright.anchor = Anchor::Middle;
        marks.push(Mark::Text(upright));
        let heading = Text { bold: true, ..words(&chart.title, (middle_x, self.top - 12.0), LARGE) };
        marks.push(Mark::Text(Text { anchor: Anchor::Middle, ..heading }));
    }

    /// The runs of points that can be drawn, thinned to what can be seen.
    fn lines(&self, points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
        let place = |&(x, y): &(f64, f64)| {
            let (x, y) = (self.x.place(x)?, self.y.place(y)?);
            Some((self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)))
        };
        let placed: Vec<Option<(f64, f64)>> = points.iter().map(place).collect();
        placed.split(Option::is_none).filter(|run| !run.is_empty()).map(|run| thin(run.iter().flatten())).collect()
    }

    /// Names and samples of the series, in the corner with the fewest points of a line.
    fn legend(&self, marks: &mut Vec<Mark>) {
        let named: Vec<_> = self.chart.series.iter().filter(|s| !s.name.is_empty()).collect();
        if named.len() < 2 {
            return;
        }
        let names: Vec<String> = named.iter().map(|s| shortened(&s.name)).collect();
        let w = 40.0 + names.iter().map(|n| width(n, SMALL)).fold(0.0, f64::max);
        let h = 8.0 + 16.0 * names.len() as f64;
        let (xs, ys) = ([self.right - w - 6.0, self.left + 8.0], [self.top + 4.0, self.bottom - h - 6.0]);
        let corners = ys.iter().flat_map(|y| xs.map(|x| (x, *y)));
        let (x, y) = corners.min_by_key(|c| self.covered(*c, (w, h))).unwrap_or((xs[0], ys[0]));
        let points = vec![(x, y), (x + w, y), (x + w, y + h), (x, y + h)];
        marks.push(Mark::Area { points, colour: WHITE, opacity: 0.85 });
        for (i, (s, name)) in named.iter().zip(&names).enumerate() {
            let (colour, y) = (PALETTE[s.colour % PALETTE.len()], y + 12.0 + 16.0 * i as f64);
            marks.push(match s.look {
                Look::Area => Mark::Area {
                    points: vec![(x + 6.0, y - 5.0), (x + 28.0, y - 5.0), (x + 28.0, y + 5.0), (x + 6.0, y + 5.0)],
                    colour,
                    opacity: 0.2,
                },
                _ => Mark::Line {
                    points: vec![(x + 6.0, y), (x + 28.0, y)],
                    colour,
                    width: 1.6,
                    dashed: is_dashed(s),
                    opacity: 1.0,
                },
            });
            marks.push(text(name, (x + 34.0, y + 0.36 * SMALL), SMALL, Anchor::Start));
        }
    }

    /// How much of the lines lies in the box of size `size` at `corner`: points, four for each segment.
    fn covered(&self, corner: (f64, f64), size: (f64, f64)) -> usize {
        let inside = |p: (f64, f64)| {
            (corner.0..=corner.0 + size.0).contains(&p.0) && (corner.1..=corner.1 + size.1).contains(&p.1)
        };
        let lines = self.chart.series.iter().flat_map(|s| self.lines(&s.points));
        lines
            .flat_map(|line| {
                let between = |p: &[(f64, f64)]| {
                    let (a, b) = (p[0], p[p.len() - 1]);
                    [0.0, 0.25, 0.5, 0.75].map(|k| (a.0 + k * (b.0 - a.0), a.1 + k * (b.1 - a.1)))
                };
                line.windows(line.len().min(2)).flat_map(between).collect::<Vec<_>>()
            })
            .filter(|p| inside(*p))
            .count()
    }
}

/// Of the points that follow each other in one half of a pixel's column only the first, the highest, the lowest and the
/// last: the drawn line stays the same.
fn thin<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.copied().collect();
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| (2.0 * a.0).floor() == (2.0 * b.0).floor()) {
        let by_height = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let ends = [Some(0), (0..column.len()).min_by(by_height), (0..column.len()).max_by(by_height)];
        let mut places: Vec<usize> = ends.into_iter().flatten().chain([column.len() - 1]).collect();
        places.sort_unstable();
        places.dedup();
        kept.extend(places.into_iter().map(|i| column[i]));
    }
    kept
}

/// Whether the line is broken, because it is asked for or because the colours have been used up.
fn is_dashed(s: &Series) -> bool {
    s.look == Look::Dashed || s.colour >= PALETTE.len()
}

/// The name, its middle left out if it is long.
fn shortened(name: &str) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= NAME {
        return name.into();
    }
    let (head, tail) = (&chars[..NAME / 3], &chars[chars.len() - (NAME - NAME / 3 - 1)..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

fn line<const N: usize>(points: [(f64, f64); N], colour: Colour) -> Mark {
    Mark::Line { points: points.to_vec(), colour, width: 1.0, dashed: false, opacity: 1.0 }
}

fn words(text: &str, at: (f64, f64), size: f64) -> Text {
    Text { at, text: text.into(), raised: String::new(), size, anchor: Anchor::Start, upright: false, bold: false }
}

fn text(text: &str, at: (f64, f64), size: f64, anchor: Anchor) -> Mark {
    Mark::Text(Text { anchor, ..words(text, at, size) })
}

fn label((number, exponent): &(String, String), at: (f64, f64), anchor: Anchor) -> Mark {
    Mark::Text(Text { anchor, raised: exponent.clone(), ..words(number, at, SMALL) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_outline() {
        let zigzag: Vec<(f64, f64)> = (0..1000).map(|i| (1.0 + i as f64 * 1e-4, f64::from(i * 7 % 13))).collect();
        let kept = thin(zigzag.iter());
        assert!(kept.len() <= 4, "{kept:?}");
        assert_eq!((kept[0], kept[kept.len() - 1]), (zigzag[0], zigzag[999]));
        let heights = kept.iter().map(|p| p.1);
        assert_eq!((heights.clone().fold(9.0, f64::min), heights.fold(0.0, f64::max)), (0.0, 12.0));
        let sparse = [(0.0, 1.0), (5.0, 2.0), (9.0, 0.0)];
        assert_eq!(thin(sparse.iter()), sparse);
    }

    #[test]
    fn long_names_lose_their_middle() {
        let name = format!("runs/{}/cosine", "x".repeat(60));
        let short = shortened(&name);
        assert_eq!(short.chars().count(), NAME);
        assert!(short.starts_with("runs/") && short.ends_with("/cosine"));
    }
}
