//! What a run of the benchmarks leaves: tables for people, and the same rows as JSON with all that decided them.

use super::ceilings::Ceilings;
use super::gpu::{Clocks, Gpu};
use super::timing::{Effort, Timing};
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// One entry of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// A name.
    Text(String),
    /// A whole number.
    Count(u64),
    /// A measured or counted number, shown to three figures.
    Number(f64),
    /// Not measured.
    None,
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.into())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Cell::Text(text)
    }
}

impl From<usize> for Cell {
    fn from(n: usize) -> Self {
        Cell::Count(n as u64)
    }
}

impl From<f64> for Cell {
    /// What is not finite was not measured.
    fn from(x: f64) -> Self {
        if x.is_finite() { Cell::Number(x) } else { Cell::None }
    }
}

impl From<Option<f64>> for Cell {
    fn from(x: Option<f64>) -> Self {
        x.map_or(Cell::None, Cell::from)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cell::Text(text) => f.pad(text),
            Cell::Count(n) => f.pad(&n.to_string()),
            Cell::Number(x) => f.pad(&figures(*x)),
            Cell::None => f.pad("-"),
        }
    }
}

/// `x` to three figures: 0.0123, 1.23, 12.3, 123, 12345.
fn figures(x: f64) -> String {
    let digits = if x == 0.0 { 0 } else { (2 - x.abs().log10().floor() as i64).clamp(0, 6) };
    format!("{x:.*}", digits as usize)
}

/// One row: column names with their entries.
pub type Row = Vec<(&'static str, Cell)>;

/// The columns that say how a time was taken.
pub fn timing_cells(t: &Timing) -> Row {
    vec![
        ("spread_pct", (100.0 * t.spread()).into()),
        ("min_ms", (1e3 * t.min).into()),
        ("blocks", t.blocks.into()),
        ("foreign_pct", t.foreign.map(|f| 100.0 * f).into()),
        ("machine", condition(t.busy, t.median).into()),
    ]
}

/// In what state the machine was while a time was taken.
pub fn condition(busy: bool, seconds: f64) -> &'static str {
    match (seconds.is_nan(), busy) {
        (true, _) => "emulated",
        (false, true) => "busy",
        (false, false) => "quiet",
    }
}

/// Rows under one name; every row has the columns of the first.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// What the rows are.
    pub name: String,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Table {
    /// An empty table.
    pub fn new(name: impl Into<String>) -> Self {
        Table { name: name.into(), rows: Vec::new() }
    }

    /// Appends a row.
    pub fn row(&mut self, row: Row) {
        let columns = |r: &Row| r.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        if let Some(first) = self.rows.first() {
            assert_eq!(columns(first), columns(&row), "{}: columns differ", self.name);
        }
        self.rows.push(row);
    }

    fn json(&self) -> Value {
        let row = |r: &Row| r.iter().map(|(k, v)| (k.to_string(), json!(v))).collect::<Map<_, _>>();
        json!({ "name": self.name, "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.name)?;
        let Some(first) = self.rows.first() else { return Ok(()) };
        let texts: Vec<Vec<String>> =
            self.rows.iter().map(|r| r.iter().map(|(_, v)| v.to_string()).collect()).collect();
        let width = |i: usize, name: &str| texts.iter().map(|r| r[i].chars().count()).fold(name.len(), usize::max);
        let widths: Vec<usize> = first.iter().enumerate().map(|(i, (name, _))| width(i, name)).collect();
        let names: Vec<String> = first.iter().map(|(name, _)| name.to_string()).collect();
        for (k, line) in std::iter::once(&names).chain(&texts).enumerate() {
            for (i, text) in line.iter().enumerate() {
                let left = matches!(first[i].1, Cell::Text(_));
                let gap = if i == 0 { "  " } else { "   " };
                match left {
                    true => write!(f, "{gap}{text:<0$}", widths[i])?,
                    false => write!(f, "{gap}{text:>0$}", widths[i])?,
                }
            }
            writeln!(f)?;
            if k == 0 {
                writeln!(f, "  {}", "-".repeat(widths.iter().sum::<usize>() + 3 * (widths.len() - 1)))?;
            }
        }
        Ok(())
    }
}

/// The machine and the program, as the record names them.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// Cores the system shows.
    pub cores: usize,
    /// Instruction sets of the processor that matter here.
    pub flags: Vec<&'static str>,
    /// Architecture and operating system.
    pub system: String,
}

impl Machine {
    /// This machine.
    pub fn here() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, v)| v.trim()));
        Machine {
            cpu: model.unwrap_or("unknown").into(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            flags: flags(),
            system: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn flags() -> Vec<&'static str> {
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn flags() -> Vec<&'static str> {
    Vec::new()
}

/// `IDDPM_COMMIT`, or the commit of the working folder, with "-dirty" if it has changes; "unknown" without git or a repository.
fn commit() -> String {
    if let Ok(id) = std::env::var("IDDPM_COMMIT") {
        return id;
    }
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let Some(id) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    let clean = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| text.is_empty());
    if clean { id } else { id + "-dirty" }
}

/// `seconds` since 1970 as 2024-02-29T12:34:56Z, by the Gregorian calendar.
fn date(seconds: u64) -> String {
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{:02}-{:02}T{h:02}:{m:02}:{s:02}Z", month + 1, day + 1)
}

/// Everything one run measured.
#[derive(Clone, Debug)]
pub struct Record {
    head: Map<String, Value>,
    tables: Vec<Table>,
    file: Option<PathBuf>,
}

impl Record {
    /// A record of `bench` on `threads` threads of this machine; prints what it will be compared with.
    pub fn new(bench: &str, device: &str, threads: usize, effort: &Effort, ceilings: Option<&Ceilings>) -> Self {
        let machine = Machine::here();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (commit, date) = (commit(), date(now));
        println!(
            "iddpm {} ({commit}) bench {bench}, {date}\n{} of {} cores, {}, {} [{}]",
            env!("CARGO_PKG_VERSION"),
            threads,
            machine.cores,
            machine.cpu,
            machine.system,
            machine.flags.join(" ")
        );
        if ceilings.is_some_and(|c| !c.known()) {
            println!("emulated: no times; what is shown are counts");
        }
        if let Some(c) = ceilings.filter(|c| c.known()) {
            println!(
                "ceilings measured now: {:.0} GFLOP/s ({} multiply-adds), {:.1} GB/s (copy, read + written){}",
                c.gflops,
                c.instructions,
                c.gb_s,
                if c.arithmetic.busy || c.copy.busy { "; others were using the machine" } else { "" }
            );
        }
        let head = json!({
            "program": "iddpm", "version": env!("CARGO_PKG_VERSION"), "commit": commit, "date": date, "bench": bench,
            "device": device, "threads": threads, "machine": machine, "effort": effort, "ceilings": ceilings,
        });
        let Value::Object(head) = head else { unreachable!("an object was written") };
        Record { head, tables: Vec::new(), file: None }
    }

    /// With a file that keeps what there is whenever a row is measured: a measurement that is cut off leaves the rows before.
    pub fn kept_in(mut self, file: Option<&Path>) -> Self {
        self.file = file.map(Path::to_path_buf);
        self
    }

    /// Keeps `tables`, which have a new row, beside those that are complete.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn keep(&self, tables: &[&Table]) -> Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        let mut all = self.head.clone();
        all.insert("tables".into(), self.tables.iter().chain(tables.iter().copied()).map(Table::json).collect());
        let text = serde_json::to_string_pretty(&Value::Object(all)).expect("strings and numbers") + "\n";
        std::fs::write(path, text).map_err(Error::io(path, "write"))
    }

    /// Prints `table` and keeps it.
    pub fn add(&mut self, table: Table) {
        println!("\n{table}");
        self.tables.push(table);
    }

    /// Prints and keeps what the GPU is, if there is one.
    pub fn gpu(&mut self, gpu: Option<&Gpu>) {
        let Some(g) = gpu else { return };
        if g.emulated {
            println!("{}", g.name);
        } else {
            let (name, capability, driver, count) = (&g.name, &g.compute_capability, &g.driver, g.multiprocessors);
            println!("{name}, compute capability {capability}, {count} multiprocessors, driver of CUDA {driver}");
        }
        self.set("gpu", g);
    }

    /// Prints and keeps how the GPU ran, if that is known.
    pub fn clocks(&mut self, clocks: Option<&Clocks>) {
        let Some(c) = clocks else { return };
        let (sm, power, temperature) = (c.sm_mhz, c.power_w, c.temperature_c);
        println!(
            "\nclock of the multiprocessors {:.0} to {:.0} MHz, median {:.0}; up to {:.0} W, {:.0} degrees; reasons {}",
            sm.min, sm.max, sm.median, power.max, temperature.max, c.reasons
        );
        if let Some(warning) = c.warning() {
            println!("{warning}");
        }
        self.set("clocks", c);
    }

    /// Keeps a fact about the run.
    pub fn set(&mut self, key: &str, value: impl Serialize) {
        self.head.insert(key.into(), json!(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_825_599), "2000-02-29T11:59:59Z");
        assert_eq!(date(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(date(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn what_is_measured_so_far_is_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let mut record = Record::new("test", "cpu", 1, &Effort::default(), None).kept_in(Some(&path));
        let table = |name, rows: usize| {
            let mut t = Table::new(name);
            (0..rows).for_each(|i| t.row(vec![("row", i.into())]));
            t
        };
        record.add(table("complete", 2));
        record.keep(&[&table("under way", 1)]).unwrap();
        let read = || serde_json::from_str::<Value>(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(read()["tables"].as_array().map(Vec::len), Some(2));
        assert_eq!(read()["tables"][1], json!({"name": "under way", "rows": [{"row": 0}]}));
        record.add(table("under way", 3));
        record.keep(&[]).unwrap();
        assert_eq!(read()["tables"][1]["rows"].as_array().map(Vec::len), Some(3));
        let nowhere = record.kept_in(Some(&folder.path().join("none").join("r.json")));
        assert!(nowhere.keep(&[]).unwrap_err().to_string().contains("r.json"));
    }

    #[test]
    fn numbers_have_three_figures() {
        let shown = [0.0, 0.01234, 1.234, 12.34, 123.4, 12345.6].map(figures);
        assert_eq!(shown, ["0", "0.0123", "1.23", "12.3", "123", "12346"]);
    }

    #[test]
    fn a_table_is_aligned_and_becomes_rows_of_json() {
        let mut t = Table::new("times");
        t.row(vec![("config", "t1".into()), ("ms", 1.5.into()), ("foreign", None.into())]);
        t.row(vec![("config", "long name".into()), ("ms", 150.0.into()), ("foreign", 2.0.into())]);
        let text = t.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "  config        ms   foreign");
        assert_eq!(lines[4], "  long name    150      2.00");
        assert_eq!(t.json()["rows"][0], json!({"config": "t1", "ms": 1.5, "foreign": null}));
    }
}
