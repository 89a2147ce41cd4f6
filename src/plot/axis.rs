//! Axes: the range of the values, the place of a value in it, and ticks at round numbers.

use super::Scale;

/// Values beyond this are not drawn, so that differences of any two stay finite.
const LARGEST: f64 = 1e300;
/// Labels an axis should have at most.
const LABELS: f64 = 7.0;

/// An axis with the range that its values need.
#[derive(Clone, Debug, PartialEq)]
pub struct Range {
    scale: Scale,
    /// Ends of the range; their logarithms to base 10 on a logarithmic axis.
    lo: f64,
    hi: f64,
    /// Whether any value can be drawn.
    pub filled: bool,
}

/// A mark at an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// Place, 0 at the low end and 1 at the high end.
    pub at: f64,
    /// Text, if it has one: the number, and the exponent of a power of ten.
    pub label: Option<(String, String)>,
}

impl Range {
    /// The range of `values`, with `margin` of its length added at both ends. A linear range that begins low above 0
    /// begins at 0.
    pub fn of(scale: Scale, margin: f64, values: impl Iterator<Item = f64>) -> Self {
        let mut range = Range { scale, lo: f64::INFINITY, hi: f64::NEG_INFINITY, filled: false };
        for v in values.filter_map(|v| range.coordinate(v)).collect::<Vec<_>>() {
            (range.lo, range.hi, range.filled) = (range.lo.min(v), range.hi.max(v), true);
        }
        if !range.filled {
            (range.lo, range.hi) = (0.0, 1.0);
            return range;
        }
        let size = range.lo.abs().max(range.hi.abs());
        let from_zero = scale == Scale::Linear && range.lo >= 0.0 && range.lo <= range.hi / 2.0;
        if from_zero && range.hi > 0.0 {
            range.lo = 0.0;
        } else if range.hi - range.lo <= 1e-9 * size || size == 0.0 {
            let half = if size == 0.0 { 1.0 } else { 0.05 * size.max(if scale == Scale::Log { 10.0 } else { 0.0 }) };
            (range.lo, range.hi) = (range.lo - half, range.hi + half);
        }
        let space = margin * (range.hi - range.lo);
        range.lo -= if range.lo == 0.0 && from_zero { 0.0 } else { space };
        range.hi += space;
        range
    }

    /// The value as the axis counts it, if it can be drawn.
    fn coordinate(&self, v: f64) -> Option<f64> {
        match self.scale {
            Scale::Linear if v.abs() < 1.0 / LARGEST => Some(0.0),
            Scale::Linear => (v.abs() <= LARGEST).then_some(v),
            Scale::Log => (v > 0.0 && v <= LARGEST).then(|| v.log10()),
        }
    }

    /// Place of `v`, 0 at the low end and 1 at the high end, if it can be drawn.
    pub fn place(&self, v: f64) -> Option<f64> {
        self.coordinate(v).map(|v| (v - self.lo) / (self.hi - self.lo))
    }

    /// Marks at round numbers, low to high.
    pub fn ticks(&self) -> Vec<Tick> {
        match self.scale {
            Scale::Linear => self.labelled(round_numbers(self.lo, self.hi)),
            Scale::Log => self.log_ticks(),
        }
    }

    fn tick(&self, v: f64, label: Option<(String, String)>) -> Option<Tick> {
        self.place(v).filter(|at| (-1e-9..=1.0 + 1e-9).contains(at)).map(|at| Tick { at, label })
    }

    fn labelled(&self, (values, step): (Vec<f64>, f64)) -> Vec<Tick> {
        let most = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let tick = |&v: &f64| self.tick(v, Some((number(v, step, most), String::new())));
        values.iter().filter_map(tick).collect()
    }

    /// Powers of ten; below two of them 1, 2, 5; below two of those round differences.
    fn log_ticks(&self) -> Vec<Tick> {
        let (first, last) = ((self.lo - 1e-9).ceil(), (self.hi + 1e-9).floor());
        let powers = last - first + 1.0;
        if powers >= 2.0 {
            return self.powers(first as i32, last as i32);
        }
        let (low, high) = (self.lo.floor() as i32, self.hi.floor() as i32);
        let values = (low..=high).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)));
        let ticks: Vec<Tick> = values.filter_map(|v| self.tick(v, Some((number(v, v, v), String::new())))).collect();
        if ticks.len() >= 3 {
            return ticks;
        }
        self.labelled(round_numbers(10f64.powf(self.lo), 10f64.powf(self.hi)))
    }

    fn powers(&self, first: i32, last: i32) -> Vec<Tick> {
        let stride = (f64::from(last - first + 1) / LABELS).ceil() as i32;
        let plain = first >= -2 && last <= 3;
        let mut ticks = Vec::new();
        // Over a hundred powers, ticks without a label would run into each other.
        let every = if stride > 10 { stride } else { 1 };
        for e in (first - 1..=last).filter(|e| e.rem_euclid(every) == 0) {
            let label = match e.rem_euclid(stride) {
                0 if plain => Some((format!("{}", 10f64.powi(e)), String::new())),
                0 => Some(("10".into(), e.to_string().replace('-', "−"))),
                _ => None,
            };
            ticks.extend(self.tick(10f64.powi(e), label));
            let between = if stride == 1 { 2..10 } else { 0..0 };
            ticks.extend(between.filter_map(|m| self.tick(f64::from(m) * 10f64.powi(e), None)));
        }
        ticks
    }
}

/// Multiples of 1, 2, 2.5 or 5 times a power of ten between `lo` and `hi`, and their difference.
fn round_numbers(lo: f64, hi: f64) -> (Vec<f64>, f64) {
    let least = (hi - lo) / LABELS;
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= least).unwrap_or(least);
    let (first, last) = ((lo / step - 1e-9).ceil(), (hi / step + 1e-9).floor());
    let count = (last - first) as usize;
    ((0..=count).map(|k| (first + k as f64) * step).collect(), step)
}

/// `v` with the digits that a step of `step` needs; thousands and millions as k and M, where the largest value is
/// `most`.
fn number(v: f64, step: f64, most: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    let (unit, suffix) = match most {
        _ if !(1e-4..1e15).contains(&most) || (step < 1e-4 && most < 1.0) => return exponential(v, step),
        1e4..1e6 => (1e3, "k"),
        1e6..1e9 => (1e6, "M"),
        1e9..1e12 => (1e9, "G"),
        1e12.. => (1e12, "T"),
        _ => (1.0, ""),
    };
    let step = step / unit;
    let decimals = (0..16).find(|&d| is_whole(step * 10f64.powi(d))).unwrap_or(16) as usize;
    format!("{:.decimals$}{suffix}", v / unit).replace('-', "−")
}

/// `v` as `2.5e-5`.
fn exponential(v: f64, step: f64) -> String {
    let digits = (v.abs().log10().floor() - step.abs().log10().floor()).clamp(0.0, 15.0) as i32;
    let unit = 10f64.powf(step.abs().log10().floor());
    let digits = digits + i32::from(!is_whole(step / unit));
    let text = format!("{v:.*e}", digits as usize);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    format!("{mantissa}e{exponent}").replace('-', "−")
}

fn is_whole(x: f64) -> bool {
    (x - x.round()).abs() <= 1e-6 * x.abs().max(1e-3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, values: &[f64]) -> Vec<String> {
        let range = Range::of(scale, 0.0, values.iter().copied());
        range
            .ticks()
            .into_iter()
            .filter_map(|t| t.label)
            .map(|(n, e)| if e.is_empty() { n } else { format!("{n}^{e}") })
            .collect()
    }

    #[test]
    fn ticks_stand_at_round_numbers() {
        assert_eq!(labels(Scale::Linear, &[0.0, 1.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(Scale::Linear, &[-3.0, 3.0]), ["−3", "−2", "−1", "0", "1", "2", "3"]);
        assert_eq!(labels(Scale::Linear, &[0.0, 1e-4]), ["0", "2e−5", "4e−5", "6e−5", "8e−5", "1e−4"]);
        assert_eq!(labels(Scale::Linear, &[0.0, 500_000.0]), ["0", "100k", "200k", "300k", "400k", "500k"]);
        assert_eq!(labels(Scale::Linear, &[99.5, 100.5]).len(), 5);
        assert_eq!(labels(Scale::Log, &[0.1, 100.0]), ["0.1", "1", "10", "100"]);
        assert_eq!(labels(Scale::Log, &[1e-5, 1.0]), ["10^−5", "10^−4", "10^−3", "10^−2", "10^−1", "10^0"]);
        assert_eq!(labels(Scale::Log, &[1.5, 9.0]), ["2", "4", "6", "8"]);
    }

    #[test]
    fn odd_ranges_have_finite_places_and_few_ticks() {
        let odd: [&[f64]; 9] = [
            &[],
            &[f64::NAN, f64::INFINITY],
            &[0.0],
            &[-5.0],
            &[7.0, 7.0],
            &[1e15, 1e15 + 1.0],
            &[-1e300, 1e300],
            &[1e-300, 1e300],
            &[5e-324],
        ];
        for values in odd {
            for scale in [Scale::Linear, Scale::Log] {
                let range = Range::of(scale, 0.04, values.iter().copied());
                let ticks = range.ticks();
                assert!(!ticks.is_empty() && ticks.len() < 100, "{values:?} {scale:?}: {ticks:?}");
                assert!(ticks.iter().all(|t| (-1e-6..=1.000_001).contains(&t.at)), "{values:?} {scale:?}: {ticks:?}");
                assert!(ticks.windows(2).all(|t| t[0].at < t[1].at), "{values:?} {scale:?}: {ticks:?}");
                let inside = values.iter().filter_map(|v| range.place(*v)).all(|at| (0.0..=1.0).contains(&at));
                assert!(inside, "{values:?} {scale:?}: {range:?}");
            }
        }
    }
}
