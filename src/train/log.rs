//! What a run reports: means since the last line, as JSON lines in `log.jsonl` and on the terminal.
//!
//! `loss`, `mse` and `vb_bpd` are means over the images since the last line, each term with its importance weight, as in
//! the reference; `_q0` to `_q3` are the means over the images whose t lies in that quarter of the process. The term
//! of the bound is given times T, so that it reads as an estimate of the whole bound in bits/dim.

use crate::error::{Error, Result};
use crate::grid::{atomically, hold};
use crate::tensorboard::Events;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Loss, squared error and bound term of some images.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// What is minimised.
    pub loss: f64,
    /// Mean squared error of the prediction.
    pub mse: f64,
    /// Term of the bound, bits/dim.
    pub vb: f64,
}

/// Sums of terms by quarter of the process.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    sums: [Terms; 4],
    count: [u64; 4],
}

impl Meter {
    /// Adds the weighted terms of an image at step `t` of `steps`.
    pub fn add(&mut self, t: usize, steps: usize, weight: f64, terms: Terms) {
        let q = 4 * t / steps;
        self.count[q] += 1;
        let s = &mut self.sums[q];
        (s.loss, s.mse, s.vb) = (s.loss + weight * terms.loss, s.mse + weight * terms.mse, s.vb + weight * terms.vb);
    }

    /// Mean over all images, or over those of one quarter; None without images.
    pub fn mean(&self, quarter: Option<usize>) -> Option<Terms> {
        let quarters = quarter.map_or(0..4, |q| q..q + 1);
        let n = self.count[quarters.clone()].iter().sum::<u64>() as f64;
        let sum = |f: fn(&Terms) -> f64| self.sums[quarters.clone()].iter().map(f).sum::<f64>() / n;
        (n > 0.0).then(|| Terms { loss: sum(|t| t.loss), mse: sum(|t| t.mse), vb: sum(|t| t.vb) })
    }
}

/// One line of the log.
#[derive(Clone, Debug)]
pub struct Line {
    /// Optimiser steps done.
    pub step: u64,
    /// Images trained on.
    pub images: u64,
    /// Sums since the last line.
    pub meter: Meter,
    /// T, by which the bound term is multiplied.
    pub diffusion_steps: usize,
    /// Norm of the gradients at the last step, before clipping.
    pub grad_norm: f64,
    /// Norm of the weights.
    pub param_norm: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Images per second since the last line.
    pub images_per_s: f64,
    /// Seconds to the end at that rate.
    pub eta_s: f64,
    /// The rate in percent of what the device could do at its measured ceilings.
    pub ceiling_pct: Option<f64>,
}

impl Line {
    /// The line as JSON.
    pub fn json(&self) -> String {
        let mut fields = vec![("step".to_string(), json!(self.step)), ("images".into(), json!(self.images))];
        for quarter in [None, Some(0), Some(1), Some(2), Some(3)] {
            let Some(mean) = self.meter.mean(quarter) else { continue };
            let suffix = quarter.map_or(String::new(), |q| format!("_q{q}"));
            fields.push((format!("loss{suffix}"), json!(mean.loss)));
            fields.push((format!("mse{suffix}"), json!(mean.mse)));
            fields.push((format!("vb_bpd{suffix}"), json!(mean.vb * self.diffusion_steps as f64)));
        }
        let rest = [
            ("grad_norm", self.grad_norm),
            ("param_norm", self.param_norm),
            ("lr", self.lr),
            ("images_per_s", self.images_per_s),
            ("eta_s", self.eta_s),
        ];
        fields.extend(rest.map(|(name, x)| (name.to_string(), json!(x))));
        fields.extend(self.ceiling_pct.map(|x| ("ceiling_pct".to_string(), json!(x))));
        let fields: Vec<String> = fields.iter().map(|(name, x)| format!("\"{name}\":{x}")).collect();
        format!("{{{}}}", fields.join(","))
    }

    /// The line for people.
    pub fn text(&self) -> String {
        let mean = self.meter.mean(None).unwrap_or_default();
        let vb = mean.vb * self.diffusion_steps as f64;
        let ceiling = self.ceiling_pct.map_or(String::new(), |x| format!(" ({x:.0} % of the ceiling)"));
        format!(
            "loss {:.4}  mse {:.4}  vb {vb:.3} bits/dim  grad {:.3}  {:.1} images/s{ceiling}",
            mean.loss, mean.mse, self.grad_norm, self.images_per_s
        )
    }
}

/// Where lines go.
pub struct Log {
    file: File,
    path: PathBuf,
    bar: Option<ProgressBar>,
    steps: u64,
    printed: Option<Instant>,
    events: Option<Events>,
}

/// Opens the log at `path` and keeps other processes from doing so.
fn held(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path, "write"))?;
    hold(&file, path, "trains in this folder")?;
    Ok(file)
}

impl Log {
    /// Opens `log.jsonl` in `folder` for a run that has done `done` of `steps` steps; later lines of an earlier run
    /// are dropped, the others survive whatever happens meanwhile. A terminal gets a progress bar.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read or written; [`Error::Config`] while another process trains in the folder.
    pub fn open(folder: &Path, done: u64, steps: u64) -> Result<Self> {
        let path = folder.join("log.jsonl");
        let mut file = held(&path)?;
        let old = std::fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
        let step = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
        let kept: String =
            old.lines().filter(|l| step(l).is_some_and(|s| s <= done)).map(|l| format!("{l}\n")).collect();
        if kept != old {
            atomically(&path, |file| file.write_all(kept.as_bytes()))?;
            file = held(&path)?;
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{elapsed_precise} {bar:30} {pos}/{len} steps  {msg}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(steps).with_style(style).with_position(done);
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Ok(Log { file, path, bar, steps, printed: None, events: None })
    }

    /// Writes everything for TensorBoard too, into a file of its own in `folder`, for a run that has done `done` steps.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn tensorboard(&mut self, folder: &Path, done: u64) -> Result<()> {
        self.events = Some(Events::create(folder, done)?);
        Ok(())
    }

    /// Shows the grid of samples at `path` to TensorBoard.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn samples(&mut self, step: u64, path: &Path) -> Result<()> {
        self.events.as_mut().map_or(Ok(()), |events| events.png(step, "samples", path))
    }

    /// Moves the bar.
    pub fn step(&self, step: u64) {
        self.bar.iter().for_each(|b| b.set_position(step));
    }

    /// Writes a line; without a terminal it is printed at most every ten seconds, and at the end.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn line(&mut self, line: &Line) -> Result<()> {
        let json = line.json();
        writeln!(self.file, "{json}").map_err(Error::io(&self.path, "write"))?;
        if let Some(events) = &mut self.events {
            let tags = tags(&json);
            events.scalars(line.step, tags.iter().map(|(tag, x)| (tag.as_str(), *x)))?;
        }
        let eta = duration(line.eta_s);
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}  ETA {eta}", line.text()));
        } else if line.step == self.steps || self.printed.is_none_or(|t| t.elapsed() > Duration::from_secs(10)) {
            self.printed = Some(Instant::now());
            println!("step {}/{}  {}  ETA {eta}", line.step, self.steps, line.text());
        }
        Ok(())
    }

    /// Prints a message above the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.iter().for_each(|b| b.finish_and_clear());
    }
}

/// The numbers of a line as TensorBoard groups them: `train/loss`, `quarters/loss_q0`; neither the step nor the time left.
fn tags(json: &str) -> Vec<(String, f64)> {
    let fields = serde_json::from_str::<Map<String, Value>>(json).unwrap_or_default();
    let tag = |(name, x): (&String, &Value)| {
        let quarter = (0..4).any(|q| name.ends_with(&format!("_q{q}")));
        let group = if quarter { "quarters" } else { "train" };
        let told = !["step", "eta_s"].contains(&name.as_str());
        told.then(|| Some((format!("{group}/{name}"), x.as_f64()?))).flatten()
    };
    fields.iter().filter_map(tag).collect()
}

/// `3h05m`, `4m10s`, `12s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "unknown".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..172_800 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{} days", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Line {
        let mut meter = Meter::default();
        meter.add(0, 8, 1.0, Terms { loss: 1.0, mse: 2.0, vb: 0.5 });
        meter.add(7, 8, 2.0, Terms { loss: 3.0, mse: 1.0, vb: 0.25 });
        let (grad_norm, param_norm, lr, images_per_s, eta_s) = (1.5, 30.0, 1e-4, 100.0, 61.0);
        let ceiling_pct = (step == 2).then_some(62.5);
        Line {
            step,
            images: 64,
            meter,
            diffusion_steps: 8,
            grad_norm,
            param_norm,
            lr,
            images_per_s,
            eta_s,
            ceiling_pct,
        }
    }

    #[test]
    fn means_are_weighted_and_by_quarter() {
        let v: Value = serde_json::from_str(&line(2).json()).unwrap();
        assert_eq!([&v["loss"], &v["mse"], &v["vb_bpd"]].map(|x| x.as_f64().unwrap()), [3.5, 2.0, 4.0]);
        assert_eq!([&v["loss_q0"], &v["loss_q3"]].map(|x| x.as_f64().unwrap()), [1.0, 6.0]);
        assert!(v.get("loss_q1").is_none());
    }

    #[test]
    fn the_ceiling_is_told_where_it_was_measured() {
        assert!(line(2).text().ends_with("100.0 images/s (62 % of the ceiling)"), "{}", line(2).text());
        assert!(line(1).text().ends_with("100.0 images/s"));
        let ceiling = |step| serde_json::from_str::<Value>(&line(step).json()).unwrap().get("ceiling_pct").cloned();
        assert_eq!((ceiling(2), ceiling(1)), (Some(json!(62.5)), None));
    }

    #[test]
    fn a_resumed_log_has_no_later_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), 0, 10).unwrap();
        (1..=4).for_each(|step| log.line(&line(step)).unwrap());
        drop(log);
        Log::open(folder.path(), 2, 10).unwrap().line(&line(3)).unwrap();
        let text = std::fs::read_to_string(folder.path().join("log.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn times_for_people() {
        assert_eq!([duration(9.6), duration(250.0), duration(11_100.0)], ["10s", "4m10s", "3h05m"]);
        assert_eq!(duration(f64::NAN), "unknown");
    }
}
