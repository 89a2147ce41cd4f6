//! `iddpm plot`: charts of schedules, training, loss by timestep and bits/dim, as SVG or PNG.

use super::Global;
use crate::checkpoint::{self, Checkpoint};
use crate::config::{DiffusionConfig, Schedule, TimestepSampler};
use crate::error::{Error, Result};
use crate::plot::charts::{self, Curves};
use crate::plot::table::Table;
use crate::plot::{Chart, Figure};
use crate::schedule::Process;
use crate::timestep::{HISTORY, LossHistory, TimestepDist};
use clap::{Args, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};

/// What can be plotted.
#[derive(Subcommand, Clone, Debug)]
pub enum PlotCommand {
    /// Noise schedules: alpha-bar, beta, the range of the learned variance, its ratio
    #[command(
        after_help = "Panels: alpha-bar, beta, variances, ratio\nExamples:\n  iddpm plot schedule\n  iddpm plot \
        schedule --noise-schedule cosine --diffusion-steps 100,1000,4000 --panels ratio --out ratio.svg"
    )]
    Schedule(ScheduleArgs),
    /// Training curves of one or several runs
    #[command(
        after_help = "Panels: loss, mse, vb, grad-norm, lr, speed\nExamples:\n  iddpm plot log\n  iddpm plot log \
        runs/linear runs/cosine --smooth 0.95 --panels loss,vb --out compare.png"
    )]
    Log(LogArgs),
    /// Loss by timestep: quarters of the process over training, and the loss history of the newest checkpoint
    #[command(after_help = "Panels: loss, vb, history, probability (the last two of a run with --schedule-sampler \
        loss-second-moment)\nExample:\n  iddpm plot timesteps runs/digits")]
    Timesteps(TimestepsArgs),
    /// Terms of the bound by timestep, from what `iddpm nll` has written
    #[command(after_help = "Panels: terms, sum, x-0-mse, eps-mse\nExamples:\n  iddpm plot nll\n  iddpm plot nll \
        runs/linear runs/cosine --panels terms,sum --format png")]
    Nll(NllArgs),
}

/// Formats of a plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines and text, sharp at any size.
    Svg,
    /// Pixels, two per unit.
    Png,
}

/// Flags of every plot. It is written to the folder --out, or to --out itself if that ends in .svg or .png.
#[derive(Args, Clone, Debug)]
pub struct Output {
    /// Panels to draw [default: all]
    #[arg(long, value_delimiter = ',')]
    panels: Option<Vec<String>>,
    /// Format, where --out is a folder; it may also be a file that ends in .svg or .png
    #[arg(long, value_enum, default_value_t = Format::Svg)]
    format: Format,
}

/// Flags of `iddpm plot schedule`.
#[derive(Args, Clone, Debug)]
pub struct ScheduleArgs {
    /// Noise schedules
    #[arg(long, value_enum, value_delimiter = ',', default_value = "linear,cosine")]
    noise_schedule: Vec<Schedule>,
    /// Steps T of the process; several are compared
    #[arg(long, value_delimiter = ',', default_value = "1000")]
    diffusion_steps: Vec<usize>,
    /// Steps to use: 250, 10,15,20, ddim50 or logsnr20 [default: all]
    #[arg(long)]
    timestep_respacing: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// How curves over training are drawn.
#[derive(Args, Clone, Debug)]
pub struct CurveFlags {
    /// Weight of the past in a moving average, 0 to below 1; 0: the values alone [default: about a fiftieth of the run]
    #[arg(long, value_name = "WEIGHT")]
    smooth: Option<f64>,
    /// Over images rather than steps
    #[arg(long)]
    by_images: bool,
    /// Linear axes for losses and norms
    #[arg(long)]
    linear: bool,
}

/// Flags of `iddpm plot log`.
#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    /// Folders of runs, or their log.jsonl
    #[arg(default_value = "runs/digits")]
    runs: Vec<PathBuf>,
    #[command(flatten)]
    curves: CurveFlags,
    #[command(flatten)]
    output: Output,
}

/// Flags of `iddpm plot timesteps`.
#[derive(Args, Clone, Debug)]
pub struct TimestepsArgs {
    /// Folder of a run
    #[arg(default_value = "runs/digits")]
    run: PathBuf,
    #[command(flatten)]
    curves: CurveFlags,
    #[command(flatten)]
    output: Output,
}

/// Flags of `iddpm plot nll`.
#[derive(Args, Clone, Debug)]
pub struct NllArgs {
    /// Folders of runs, or their nll.csv
    #[arg(default_value = "runs/digits")]
    runs: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Plots.
///
/// # Errors
/// [`Error::Config`] for flags, [`Error::Data`] for files that hold nothing to plot, [`Error::Io`].
pub fn main(command: &PlotCommand, g: &Global) -> Result<()> {
    match command {
        PlotCommand::Schedule(a) => a.output.write(schedules(a)?, "schedule", Path::new(""), g),
        PlotCommand::Log(a) => {
            let curves = a.curves.curves()?;
            let logs = a.runs.iter().map(|run| read_log(run)).collect::<Result<Vec<_>>>()?;
            a.output.write(curves.training(&logs), "log", folder(&a.runs[0]), g)
        }
        PlotCommand::Timesteps(a) => {
            let mut charts = a.curves.curves()?.quarters(&read_log(&a.run)?);
            let history = newest_history(folder(&a.run))?;
            charts.extend(history.iter().flat_map(charts::loss_history));
            a.output.write(charts, "timesteps", folder(&a.run), g)
        }
        PlotCommand::Nll(a) => {
            let tables = a.runs.iter().map(|run| read_terms(run)).collect::<Result<Vec<_>>>()?;
            a.output.write(charts::terms(&tables), "nll", folder(&a.runs[0]), g)
        }
    }
}

impl Output {
    /// Writes the chosen charts as one figure.
    fn write(&self, charts: Vec<Chart>, name: &str, run: &Path, g: &Global) -> Result<()> {
        let charts = self.chosen(charts)?;
        let path = match &g.out {
            Some(out) if ending(out).is_some() => out.clone(),
            out => {
                let folder = out.clone().unwrap_or_else(|| run.join("plots"));
                folder.join(format!("{name}.{}", if self.format == Format::Png { "png" } else { "svg" }))
            }
        };
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            super::create_folder(folder)?;
        }
        Figure::new(charts).write(&path)?;
        println!("written   {}", path.display());
        Ok(())
    }

    fn chosen(&self, mut charts: Vec<Chart>) -> Result<Vec<Chart>> {
        let Some(panels) = &self.panels else { return Ok(charts) };
        let keys: Vec<&str> = charts.iter().map(|c| c.key).collect();
        if let Some(unknown) = panels.iter().find(|p| !keys.contains(&p.as_str())) {
            return Err(Error::Config(format!("--panels {unknown}: there are {}", keys.join(", "))));
        }
        let place = |c: &Chart| panels.iter().position(|p| p == c.key);
        charts.retain(|c| place(c).is_some());
        charts.sort_by_key(place);
        Ok(charts)
    }
}

impl CurveFlags {
    fn curves(&self) -> Result<Curves> {
        if let Some(weight) = self.smooth.filter(|w| !(0.0..1.0).contains(w)) {
            return Err(Error::Config(format!("--smooth {weight}: must be at least 0 and below 1")));
        }
        Ok(Curves { smooth: self.smooth, by_images: self.by_images, linear: self.linear })
    }
}

/// The format that a path names, if it does.
fn ending(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "svg" => Some(Format::Svg),
        "png" => Some(Format::Png),
        _ => None,
    }
}

/// Every schedule with every number of steps.
fn schedules(a: &ScheduleArgs) -> Result<Vec<Chart>> {
    let mut processes = Vec::new();
    for &noise_schedule in &a.noise_schedule {
        for &diffusion_steps in &a.diffusion_steps {
            let timestep_respacing = a.timestep_respacing.clone().unwrap_or_default();
            let config =
                DiffusionConfig { noise_schedule, diffusion_steps, timestep_respacing, ..DiffusionConfig::default() };
            let kind = noise_schedule.to_possible_value().map_or(String::new(), |v| v.get_name().to_string());
            let name = if a.diffusion_steps.len() > 1 { format!("{kind}, T = {diffusion_steps}") } else { kind };
            processes.push((name, Process::from_config(&config)?));
        }
    }
    Ok(charts::schedules(&processes))
}

/// The folder of a run that is named by its folder or by a file in it.
fn folder(run: &Path) -> &Path {
    if run.is_dir() { run } else { run.parent().unwrap_or(Path::new(".")) }
}

fn read_log(run: &Path) -> Result<Table> {
    let path = if run.is_dir() { run.join("log.jsonl") } else { run.into() };
    if !path.exists() {
        return Err(Error::data(&path, "no such log: give the folder of a run that `iddpm train` has written"));
    }
    let log = Table::json_lines(&path, &run.display().to_string())?;
    if log.column("step").is_none() || log.column("loss").is_none() {
        return Err(Error::data(&path, "its lines hold no step and loss: give the log.jsonl of a run"));
    }
    Ok(log)
}

fn read_terms(run: &Path) -> Result<Table> {
    let candidates = [run.join("nll").join("nll.csv"), run.join("nll.csv")];
    let path = if run.is_dir() { candidates.iter().find(|p| p.exists()).cloned() } else { Some(run.into()) };
    let Some(path) = path.filter(|p| p.exists()) else {
        return Err(Error::data(run, "no nll.csv here: run `iddpm nll` with this model first"));
    };
    let table = Table::csv(&path, &run.display().to_string())?;
    for name in ["t", "vb_bpd"] {
        if table.column(name).is_none() {
            let have = table.names().collect::<Vec<_>>().join(", ");
            return Err(Error::data(
                &path,
                format!("no column {name}, only {have}: give what `iddpm nll` has written"),
            ));
        }
    }
    Ok(table)
}

/// The loss history of the newest checkpoint of a run, if it has one.
fn newest_history(run: &Path) -> Result<Option<LossHistory>> {
    let Some((_, path)) = checkpoint::list(run).pop() else { return Ok(None) };
    let checkpoint = Checkpoint::open(&path)?;
    let config = &checkpoint.progress.config;
    if config.train.schedule_sampler != TimestepSampler::LossSecondMoment {
        return Ok(None);
    }
    let steps = Process::from_config(&config.diffusion)?.steps();
    let wanted = [("losses".to_string(), false, steps * HISTORY), ("counts".to_string(), true, steps)];
    let state = checkpoint.snapshot(&[], 0, &wanted)?.state;
    let losses = state[0].bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
    let counts = state[1].bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
    let mut dist = TimestepDist::new(TimestepSampler::LossSecondMoment, steps);
    dist.restore(losses, counts)?;
    Ok(dist.history().cloned())
}
