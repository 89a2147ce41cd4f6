//! `bench startup` and `bench memory`: what a fresh process needs until its first training step is done, in seconds and in bytes.
//!
//! Both are measured on a child process, so that nothing an earlier measurement left counts: the time runs from the
//! moment the child is started, its memory is the most it ever held.

use super::configs::Named;
use super::load::peak_memory;
use super::record::{Record, Table};
use super::run::{Open, TrainingStep};
use super::timing::{Effort, median};
use crate::device::Device;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What the child process reports.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FirstStep {
    /// Seconds for recording, planning, allocating and filling, the images included.
    pub build_s: f64,
    /// Seconds of the first step.
    pub first_s: f64,
    /// Seconds of the second step.
    pub second_s: f64,
    /// Bytes of the plan: weights, averages, gradients, moments, data, inputs, state and arena.
    pub planned: u64,
    /// Bytes of the device held after two steps; on the processor those the process took meanwhile.
    pub used: Option<u64>,
    /// Most memory the process held before the plan was made.
    pub before: Option<u64>,
    /// Most memory the process held after two steps.
    pub peak: Option<u64>,
}

/// The child's part: makes the step, runs it twice, prints what it took as one line of JSON.
///
/// # Errors
/// Those of the step.
pub fn child(named: &Named, open: Open) -> Result<()> {
    let before = peak_memory();
    let start = Instant::now();
    let mut run = TrainingStep::new(&named.config, open)?;
    let build_s = start.elapsed().as_secs_f64();
    let mut timed = || {
        let start = Instant::now();
        run.run()?;
        run.device.sync().map(|()| start.elapsed().as_secs_f64())
    };
    let (first_s, second_s) = (timed()?, timed()?);
    let (planned, peak) = (run.memory.planned as u64, peak_memory());
    let used = match &run.device {
        Device::Cpu(_) => peak.zip(before).map(|(peak, before)| peak.saturating_sub(before)),
        Device::Cuda(_) => run.memory.used(&run.device)?,
    };
    let report = FirstStep { build_s, first_s, second_s, planned, used, before, peak };
    println!("{}", serde_json::to_string(&report).expect("numbers"));
    Ok(())
}

/// Runs the child with `flags` added; returns its report and the seconds from its start to its end.
fn spawn(named: &Named, batch: usize, flags: &[String]) -> Result<(FirstStep, f64)> {
    let program = std::env::current_exe().map_err(Error::io("iddpm", "find the program"))?;
    let start = Instant::now();
    let mut command = Command::new(&program);
    command.args(["bench", "first-step", "--config", &named.name, "--batch-size", &batch.to_string()]);
    command.args(flags);
    let out = command.stderr(Stdio::inherit()).output().map_err(Error::io(&program, "start"))?;
    let seconds = start.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&out.stdout);
    match serde_json::from_str(text.trim()) {
        Ok(report) if out.status.success() => Ok((report, seconds)),
        _ => Err(Error::Device(format!(
            "{}: the child process ended with {} and printed {text:?}",
            named.name, out.status
        ))),
    }
}

/// Measures the seconds from process start to the first step; with `emulated` they are not shown, for they say nothing.
///
/// # Errors
/// A child process that fails.
pub fn startup(record: &mut Record, list: &[Named], flags: &[String], effort: &Effort, emulated: bool) -> Result<()> {
    let ms = |seconds: f64| if emulated { f64::NAN } else { 1e3 * seconds };
    let mut table = Table::new("from the start of the process to the end of the first training step, medians");
    for named in list {
        eprintln!("{}: starting", named.name);
        let batch = named.config.train.batch_size;
        let runs: Vec<_> = (0..effort.blocks.max(1)).map(|_| spawn(named, batch, flags)).collect::<Result<_>>()?;
        // The child's life holds a second step, which is taken off again.
        let total: Vec<f64> = runs.iter().map(|(r, s)| s - r.second_s).collect();
        let of = |f: fn(&FirstStep) -> f64| median(&runs.iter().map(|(r, _)| f(r)).collect::<Vec<_>>());
        table.row(vec![
            ("config", named.name.as_str().into()),
            ("batch", batch.into()),
            ("first_step_done_ms", ms(median(&total)).into()),
            ("slowest_ms", ms(total.iter().copied().fold(0.0, f64::max)).into()),
            ("build_ms", ms(of(|r| r.build_s)).into()),
            ("first_step_ms", ms(of(|r| r.first_s)).into()),
            ("second_step_ms", ms(of(|r| r.second_s)).into()),
            ("runs", runs.len().into()),
        ]);
    }
    record.add(table);
    Ok(())
}

/// Compares the planned memory with what the device gave.
///
/// # Errors
/// A child process that fails.
pub fn memory(record: &mut Record, list: &[Named], flags: &[String]) -> Result<()> {
    let mut table = Table::new("memory of training: planned before step 1, and what it took of the device");
    for named in list {
        eprintln!("{}: two steps", named.name);
        let batch = named.config.train.batch_size;
        let (r, _) = spawn(named, batch, flags)?;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let used = r.used.map(mb);
        table.row(vec![
            ("config", named.name.as_str().into()),
            ("batch", batch.into()),
            ("planned_mb", mb(r.planned).into()),
            ("measured_mb", used.into()),
            ("measured_by_planned", used.map(|u| u / mb(r.planned)).into()),
            ("process_peak_mb", r.peak.map(mb).into()),
            ("process_before_mb", r.before.map(mb).into()),
        ]);
    }
    record.add(table);
    Ok(())
}
