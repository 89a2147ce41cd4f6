//! A whole run: steps until the end, with logs, samples and checkpoints on the way, and a clean stop when asked.

use super::log::{Line, Log, Meter};
use super::{Report, Trainer, slots};
use crate::checkpoint;
use crate::device::room::bytes;
use crate::error::{Error, Result};
use crate::graph::Region;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// When a run reports, saves and stops.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the run.
    pub out: PathBuf,
    /// Steps between lines of the log.
    pub log_interval: u64,
    /// Steps between checkpoints.
    pub save_interval: u64,
    /// Steps between grids of samples; 0 is none but at the end.
    pub sample_interval: u64,
    /// Checkpoints kept in the folder.
    pub keep: usize,
    /// Stop after this time, saved, to be resumed.
    pub time_limit: Option<Duration>,
    /// Write event files for TensorBoard too.
    pub tensorboard: bool,
    /// Least seconds of a step on this device, if that was measured: the log tells how near training comes.
    pub floor_s: Option<f64>,
    /// Called with every checkpoint that was written.
    pub saved: Option<fn(&Path) -> Result<()>>,
}

/// Set by Ctrl-C or SIGTERM; the second one kills the process.
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn install() -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset and sets it, the second one finds it set.
            let registered = flag::register_conditional_shutdown(signal, 130, asked.clone())
                .and_then(|_| flag::register(signal, asked.clone()));
            registered.map_err(|e| Error::Device(format!("cannot watch for signal {signal}: {e}")))?;
        }
        Ok(Stop(asked))
    }

    fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a run ended.
enum End {
    Done,
    TimeLimit,
    Interrupted,
}

/// Trains to the last step of the configuration. `preview` is called with the trainer and the path of a grid to write.
///
/// # Errors
/// [`Error::NonFinite`] naming the last good checkpoint, [`Error::Interrupted`] after a signal (all is saved then),
/// [`Error::Io`] when a file cannot be written.
pub fn run(t: &mut Trainer, o: &Options, preview: &mut dyn FnMut(&mut Trainer, &Path) -> Result<String>) -> Result<()> {
    let stop = Stop::install()?;
    let steps = t.config.train.steps;
    let mut log = Log::open(&o.out, t.step, steps)?;
    if o.tensorboard {
        log.tensorboard(&o.out, t.step)?;
    }
    let ended = until_end(t, o, &stop, &mut log, preview);
    log.finish();
    let saved = || checkpoint::list(&o.out).pop().map_or("none".into(), |(_, p)| p.display().to_string());
    let (step, out) = (t.step, o.out.display());
    match ended {
        Err(Error::NonFinite(what)) => Err(Error::NonFinite(format!("{what}. Last good checkpoint: {}", saved()))),
        Err(Error::Device(what)) => Err(Error::Device(format!("{what}. Last checkpoint: {}", saved()))),
        Err(e) => Err(e),
        Ok(End::Interrupted) => Err(Error::Interrupted(format!(
            "stopped at step {step} of {steps}, saved in {}; --resume --out {out} goes on",
            saved()
        ))),
        Ok(End::TimeLimit) => {
            println!("time limit: stopped at step {step} of {steps}; --resume --out {out} goes on");
            Ok(())
        }
        Ok(End::Done) => {
            println!("done: {step} steps, {} images", t.images());
            Ok(())
        }
    }
}

fn until_end(
    t: &mut Trainer,
    o: &Options,
    stop: &Stop,
    log: &mut Log,
    preview: &mut dyn FnMut(&mut Trainer, &Path) -> Result<String>,
) -> Result<End> {
    let (began, steps) = (Instant::now(), t.config.train.steps);
    let sampled = |step: u64| step == steps || is_due(step, o.sample_interval);
    // What a killed run has left behind, and what it still owes to its last checkpoint.
    checkpoint::clear(&o.out)?;
    let last = o.out.join(checkpoint::file_name(t.step));
    if let Some(also) = o.saved.filter(|_| last.exists()) {
        also(&last)?;
    }
    if t.step > 0 && sampled(t.step) && !grid(t, o).exists() {
        sample(t, o, log, preview)?;
    }
    let mut meter = Meter::default();
    let mut since = (Instant::now(), t.step);
    let mut saved = None;
    let first = t.step + 1;
    while t.step < steps {
        t.begin(&mut meter)?;
        log.step(t.step);
        let limit = o.time_limit.is_some_and(|limit| began.elapsed() >= limit);
        let last = t.step == steps || limit || stop.asked();
        let lines = t.step == first || is_due(t.step, o.log_interval) || last;
        let (saves, samples) = (is_due(t.step, o.save_interval) || last, sampled(t.step) || (last && !stop.asked()));
        let report = if lines || saves || samples { t.finish(&mut meter)? } else { Report::default() };
        if lines {
            let seconds = since.0.elapsed().as_secs_f64();
            let per_step = seconds / (t.step - since.1) as f64;
            log.line(&Line {
                step: t.step,
                images: t.images(),
                meter: std::mem::take(&mut meter),
                diffusion_steps: t.process_steps(),
                grad_norm: report.grad_norm,
                param_norm: t.param_norm()?,
                lr: report.lr,
                images_per_s: t.config.train.batch_size as f64 / per_step,
                eta_s: per_step * (steps - t.step) as f64,
                ceiling_pct: o.floor_s.map(|floor| 100.0 * floor / per_step),
            })?;
            since = (Instant::now(), t.step);
        }
        let mut pause = None;
        if saves {
            pause = Some(Instant::now());
            saved = Some(save(t, o)?);
        }
        if samples {
            pause = pause.or(Some(Instant::now()));
            sample(t, o, log, preview)?;
        }
        // Saving and sampling are no part of the speed of training.
        since.0 += pause.map_or(Duration::ZERO, |p| p.elapsed());
        if last {
            break;
        }
    }
    if saved.is_none() && t.step == steps {
        log.say(&format!("already at step {steps}: --steps N goes further"));
    }
    Ok(match (t.step == steps, stop.asked()) {
        (true, _) => End::Done,
        (false, true) => End::Interrupted,
        (false, false) => End::TimeLimit,
    })
}

/// Whether something that is done every `interval` steps, or never with 0, is done after `step` steps.
fn is_due(step: u64, interval: u64) -> bool {
    interval > 0 && step.is_multiple_of(interval)
}

/// Where the samples of this step go.
fn grid(t: &Trainer, o: &Options) -> PathBuf {
    o.out.join(format!("samples-{:08}.png", t.step))
}

/// Writes a grid of samples and tells so.
fn sample(
    t: &mut Trainer,
    o: &Options,
    log: &mut Log,
    preview: &mut dyn FnMut(&mut Trainer, &Path) -> Result<String>,
) -> Result<()> {
    let grid = grid(t, o);
    let text = preview(t, &grid)?;
    log.say(&text);
    if grid.exists() { log.samples(t.step, &grid) } else { Ok(()) }
}

/// Writes a checkpoint and removes those that are too old.
fn save(t: &Trainer, o: &Options) -> Result<PathBuf> {
    let path = o.out.join(checkpoint::file_name(t.step));
    checkpoint::save(&path, &t.snapshot()?, &slots(&t.params)).map_err(|e| match e {
        Error::Io { path, action, source } => {
            let kind = source.kind();
            let kept = "earlier checkpoints are untouched: free some space or choose another --out, then --resume";
            Error::Io { path, action, source: std::io::Error::new(kind, format!("{source}; {kept}")) }
        }
        e => e,
    })?;
    checkpoint::prune(&o.out, o.keep)?;
    o.saved.map_or(Ok(()), |also| also(&path))?;
    Ok(path)
}

/// What the run is, for people: data, settings, parameters, memory, work and end.
pub fn describe(t: &Trainer) -> String {
    let (c, plan) = (&t.config, t.plan());
    let of = |r| bytes(plan.graph.region_bytes(r));
    let settings: Vec<String> = c.settings().into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    let d = &c.data;
    let classes = if d.classes.is_empty() { "no labels".into() } else { format!("{} classes", d.classes.len()) };
    let side = c.model.image_size;
    let step = plan.graph.cost().flops / 1e9;
    format!(
        "device    {}\n\
         data      {}: {} images of {side}x{side}x{}, {classes}{}\n\
         settings  {}\n\
         network   {} parameters in {} tensors\n\
         memory    {}: weights {}, gradients {}, optimiser {}, averages {}, images {}, activations {}\n\
         work      {:.3} GFLOP per image, {step:.2} per step\n\
         end       at step {}, from step {}",
        t.device.describe(),
        d.source,
        d.images,
        c.model.in_channels,
        if t.streams() { ", sent batch by batch" } else { "" },
        wrap(&settings, 100, "          "),
        t.params.count(),
        t.params.list.len(),
        bytes(plan.bytes()),
        of(Region::Params),
        of(Region::Grads),
        bytes(2 * plan.graph.region_bytes(Region::AdamM)),
        of(Region::Ema),
        of(Region::Data),
        bytes(plan.layout.bytes),
        step / c.train.batch_size as f64,
        c.train.steps,
        t.step,
    )
}

/// Words in lines of at most `width` characters, later lines indented.
fn wrap(words: &[String], width: usize, indent: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in words {
        if column > 0 && column + word.len() >= width {
            text += &format!("\n{indent}");
            column = 0;
        } else if column > 0 {
            text.push(' ');
        }
        text += word;
        column += word.len() + 1;
    }
    text
}

/// The moving average to sample from: the slowest that has passed its half-life; None means the live weights.
pub fn ready_average(rates: &[f64], step: u64) -> Option<usize> {
    let ready = |i: &usize| rates[*i].powf(step as f64) <= 0.5;
    (0..rates.len()).filter(ready).max_by(|&a, &b| rates[a].total_cmp(&rates[b]))
}

/// Steps after which a moving average has forgotten half of the initial weights.
pub fn half_life(rate: f64) -> u64 {
    (0.5f64.ln() / rate.ln()).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_used_when_they_have_passed_their_half_life() {
        assert_eq!((half_life(0.9999), half_life(0.99)), (6932, 69));
        let rates = [0.99, 0.9999];
        assert_eq!([10, 69, 6931, 6932].map(|s| ready_average(&rates, s)), [None, Some(0), Some(0), Some(1)]);
    }

    #[test]
    fn words_are_wrapped() {
        let words = ["aa", "bb", "cc"].map(String::from);
        assert_eq!(wrap(&words, 6, "  "), "aa bb\n  cc");
    }
}
