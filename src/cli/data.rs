//! `iddpm data inspect`: what a set of images holds, before a run depends on it.

use std::io::Write;

use crate::{
    data::{self, DataSpec, Dataset, LICENCE},
    error::{Error, Result},
};

/// Classes listed one by one.
const LISTED: usize = 20;

/// Loads the set as training would and writes a summary: kind, number, sizes, memory, classes with their counts, mean and
/// deviation of each channel in [-1, 1], exact duplicates, first names, first indices of the order.
///
/// # Errors
/// Those of [`data::open`]; [`Error::Io`] when `out` cannot be written.
pub fn inspect(spec: &DataSpec, out: &mut impl Write) -> Result<()> {
    let set = data::open(spec)?;
    let mut lines = vec![
        ("data", format!("{} ({})", set.source.path.display(), set.source.kind)),
        ("images", images(&set)),
        ("before", sizes(&set)),
        ("memory", format!("{:.1} MB", set.pixels.len() as f64 / 1e6)),
        ("classes", classes(&set)),
    ];
    let names: &[&str] = if set.c == 1 { &["grey"] } else { &["red", "green", "blue"] };
    for (name, (mean, std)) in names.iter().zip(moments(&set)) {
        lines.push((name, format!("mean {mean:+.4}, std {std:.4} (of values in [-1, 1])")));
    }
    lines.push(("duplicates", format!("{} images equal an earlier one", set.duplicates())));
    if !set.source.first_names.is_empty() {
        lines.push(("first", set.source.first_names.join(", ")));
    }
    lines.push(("order", order(&set)?));
    if set.source.kind == "built-in digits" {
        lines.push(("licence", LICENCE.into()));
    }
    let text: String = lines.iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect();
    out.write_all(text.as_bytes()).map_err(Error::io("output", "write"))
}

fn images(set: &Dataset) -> String {
    let mut text = format!("{} of {}x{}x{}", set.n, set.w, set.h, set.c);
    if set.source.found != set.n {
        text += &format!(", evenly spaced from {}", set.source.found);
    }
    if set.source.skipped > 0 {
        text += &format!("; {} other files passed over", set.source.skipped);
    }
    text
}

fn sizes(set: &Dataset) -> String {
    let ((w, h), (max_w, max_h)) = (set.source.min_size, set.source.max_size);
    match (w, h) == (max_w, max_h) {
        true => format!("{w}x{h} pixels"),
        false => format!("width {w} to {max_w}, height {h} to {max_h} pixels"),
    }
}

fn classes(set: &Dataset) -> String {
    let Some(labels) = &set.labels else { return "none".into() };
    let mut counts = vec![0usize; set.classes.len()];
    labels.iter().for_each(|&l| counts[l as usize] += 1);
    let listed: Vec<_> = set.classes.iter().zip(&counts).take(LISTED).map(|(c, n)| format!("{c} {n}")).collect();
    let more = match counts.len() > LISTED {
        true => {
            let (least, most) = (counts.iter().min(), counts.iter().max());
            format!(", … ({} to {} images each)", least.unwrap_or(&0), most.unwrap_or(&0))
        }
        false => String::new(),
    };
    format!("{}: {}{more}", counts.len(), listed.join(", "))
}

/// Mean and standard deviation of v/127.5 - 1 in each channel; the sums are whole numbers, so exact.
fn moments(set: &Dataset) -> Vec<(f64, f64)> {
    let mut sums = vec![(0u64, 0u64); set.c];
    for pixel in set.pixels.chunks_exact(set.c) {
        for ((sum, squares), &v) in sums.iter_mut().zip(pixel) {
            *sum += u64::from(v);
            *squares += u64::from(v) * u64::from(v);
        }
    }
    let count = (set.n * set.h * set.w) as f64;
    let moments = |(sum, squares): (u64, u64)| {
        let mean = sum as f64 / count;
        let variance = (squares as f64 / count - mean * mean).max(0.0);
        (mean / 127.5 - 1.0, variance.sqrt() / 127.5)
    };
    sums.into_iter().map(moments).collect()
}

fn order(set: &Dataset) -> Result<String> {
    let shown = set.n.min(8);
    let mut batches = set.batches(shown, 0, 0)?;
    let indices: Vec<_> = batches.next().iter().map(u32::to_string).collect();
    Ok(format!("seed 0 begins with {}; an epoch is {} images", indices.join(", "), set.n))
}
