//! What is plotted, read from files: the JSON lines of a run and comma-separated tables.
//!
//! Both become columns of numbers by name. A run that was killed may have left half a last line, which is passed over.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Rows of numbers, by column; a number that is missing is NaN.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Name in a legend.
    pub name: String,
    columns: BTreeMap<String, Vec<f64>>,
    rows: usize,
}

impl Table {
    /// An empty table.
    pub fn new(name: &str) -> Self {
        Table { name: name.into(), ..Table::default() }
    }

    /// Adds a row of named numbers.
    pub fn push<'a>(&mut self, row: impl Iterator<Item = (&'a str, f64)>) {
        for (name, x) in row {
            let column = self.columns.entry(name.into()).or_default();
            column.resize(self.rows, f64::NAN);
            column.push(x);
        }
        self.rows += 1;
        self.columns.values_mut().for_each(|c| c.resize(self.rows, f64::NAN));
    }

    /// The column `name`, if there is one.
    pub fn column(&self, name: &str) -> Option<&[f64]> {
        self.columns.get(name).map(Vec::as_slice)
    }

    /// Names of all columns.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.keys().map(String::as_str)
    }

    /// The points of the columns `x` and `y`, rows without a number for either left out; none without the columns.
    ///
    /// Left out rather than a gap: a line of the log holds a quarter's loss only if an image fell into it.
    pub fn points(&self, x: &str, y: &str) -> Vec<(f64, f64)> {
        let (Some(x), Some(y)) = (self.column(x), self.column(y)) else { return Vec::new() };
        x.iter().copied().zip(y.iter().copied()).filter(|(x, y)| !x.is_nan() && !y.is_nan()).collect()
    }

    /// Reads JSON lines: one object each, numbers by name. Other values are passed over.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Data`] for a line but the last that is no object and for a
    /// file without lines.
    pub fn json_lines(path: &Path, name: &str) -> Result<Self> {
        let text = read(path)?;
        let mut table = Table::new(name);
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            match serde_json::from_str::<Map<String, Value>>(line) {
                Ok(row) => table.push(row.iter().filter_map(|(name, x)| Some((name.as_str(), x.as_f64()?)))),
                Err(_) if line.trim().is_empty() || i + 1 == lines.len() => {}
                Err(e) => {
                    let what = format!("line {} is not an object of JSON ({e}): give the log.jsonl of a run", i + 1);
                    return Err(Error::data(path, what));
                }
            }
        }
        table.not_empty(path)
    }

    /// Reads a comma-separated table with a head line of names.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Data`] naming the line that has no number or too many or
    /// too few.
    pub fn csv(path: &Path, name: &str) -> Result<Self> {
        let text = read(path)?;
        let mut lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        let names: Vec<&str> = lines.next().map_or("", |(_, head)| head).split(',').map(str::trim).collect();
        let mut table = Table::new(name);
        for (i, line) in lines {
            let bad = |what: String| Error::data(path, format!("line {}: {what}", i + 1));
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            if fields.len() != names.len() {
                return Err(bad(format!("{} fields, the head line names {}", fields.len(), names.len())));
            }
            let number = |f: &&str| f.parse::<f64>().map_err(|_| bad(format!("\"{f}\" is not a number")));
            let numbers = fields.iter().map(number).collect::<Result<Vec<_>>>()?;
            table.push(names.iter().copied().zip(numbers));
        }
        table.not_empty(path)
    }

    fn not_empty(self, path: &Path) -> Result<Self> {
        if self.rows == 0 {
            return Err(Error::data(path, "holds no rows yet: nothing to plot"));
        }
        Ok(self)
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    String::from_utf8(bytes).map_err(|_| Error::data(path, "is not text: give the log or the table of a run"))
}

/// Exponential moving average that starts without a bias: `s_i = Σ_k w^{i-k} y_k / Σ_k w^{i-k}`. A weight of 0 changes
/// nothing; values that are not finite keep their place and do not enter the average.
pub fn smooth(points: &[(f64, f64)], weight: f64) -> Vec<(f64, f64)> {
    let (mut sum, mut weights) = (0.0, 0.0);
    let average = |&(x, y): &(f64, f64)| {
        if !y.is_finite() {
            return (x, y);
        }
        (sum, weights) = (weight * sum + y, weight * weights + 1.0);
        (x, sum / weights)
    };
    points.iter().map(average).collect()
}
