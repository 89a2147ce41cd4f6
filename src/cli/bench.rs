//! `iddpm bench`: measurements, each in [`crate::bench`].

use super::Global;
use super::device::DeviceKind;
use crate::bench::ceilings::Ceilings;
use crate::bench::configs::{self, Named};
use crate::bench::gpu::{Gpu, Watch};
use crate::bench::record::Record;
use crate::bench::timing::Effort;
use crate::bench::{kernels, probes, run, sample, serve, startup, step};
use crate::error::{Error, Result};
use clap::{Args, Subcommand};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

/// What to measure.
#[derive(Subcommand, Clone, Debug)]
pub enum BenchCommand {
    /// A whole training step, and where its time goes
    #[command(
        after_help = "Examples:\n  iddpm bench step\n  iddpm bench step --config cifar10 --batch-size 4 --json step.json"
    )]
    Step(BenchArgs),
    /// Each op of a training step and of sampling, at its shapes
    #[command(after_help = "Example:\n  iddpm bench kernels --config t3")]
    Kernels(BenchArgs),
    /// One reverse step, ancestral and DDIM, and the pictures per second that follow
    #[command(after_help = "Example:\n  iddpm bench sample --config t1,t3 --batches 1,16")]
    Sample {
        #[command(flatten)]
        bench: BenchArgs,
        /// Pictures made at the same time
        #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 128])]
        batches: Vec<usize>,
    },
    /// What the device does at most; on a GPU also caches, gaps of a graph, cost of a tile, clock under load
    #[command(after_help = "Example:\n  iddpm bench ceilings --device cuda --json ceilings.json")]
    Ceilings {
        #[command(flatten)]
        bench: BenchArgs,
        /// Seconds of matrix products without a pause, on a GPU
        #[arg(long, default_value_t = 10.0)]
        sustained_seconds: f64,
    },
    /// From the start of the process to its first training step
    #[command(after_help = "Example:\n  iddpm bench startup --config digits")]
    Startup(BenchArgs),
    /// Planned memory of training, and the most the process held
    #[command(after_help = "Example:\n  iddpm bench memory --config t1,t4")]
    Memory(BenchArgs),
    /// Makes a training step, runs it twice and prints what that took: the process that startup and memory watch
    #[command(hide = true)]
    FirstStep(BenchArgs),
    /// Answers each line of the input with a block of steps: one side of scripts/compare.sh
    #[command(hide = true)]
    Serve {
        #[command(flatten)]
        bench: BenchArgs,
        /// Reverse steps of this kind instead of training steps: ancestral, ddim
        #[arg(long)]
        sampler: Option<String>,
    },
    /// Prints the losses of a short training run: that both sides of scripts/compare.sh learn the same
    #[command(hide = true)]
    Curve {
        #[command(flatten)]
        bench: BenchArgs,
        /// Steps to train
        #[arg(long, default_value_t = 300)]
        steps: usize,
        /// Write the images to this npz file
        #[arg(long)]
        images: Option<PathBuf>,
    },
}

/// Flags of every measurement.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Configurations: t0 to t4 (small), tiny, presets, or `all` [default: t1 to t4, on a GPU cifar10,imagenet64,tiny, on
    /// the emulator t0; kernels and sample: the first of these]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    config: Vec<String>,
    /// Images per step [default: that of the configuration]
    #[arg(long)]
    batch_size: Option<usize>,
    /// Write everything to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Blocks to take on a quiet machine
    #[arg(long, default_value_t = Effort::default().blocks)]
    blocks: usize,
    /// Least seconds of a block
    #[arg(long, default_value_t = Effort::default().block_s)]
    block_seconds: f64,
    /// Seconds per measurement after which no new block starts
    #[arg(long, default_value_t = Effort::default().limit_s)]
    limit_seconds: f64,
}

impl BenchArgs {
    fn configs(&self, default: &[&str]) -> Result<Vec<Named>> {
        let own = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let list = match self.config.first().map(String::as_str) {
            None => own(default),
            Some("all") => own(&configs::names()),
            Some(_) => self.config.clone(),
        };
        configs::named(&list, self.batch_size)
    }

    /// The first configuration asked for.
    fn one(&self) -> Result<Named> {
        Ok(self.configs(&SMALL[..1])?.swap_remove(0))
    }

    fn effort(&self) -> Result<Effort> {
        let effort = Effort { block_s: self.block_seconds, blocks: self.blocks, limit_s: self.limit_seconds };
        let usable = |x: f64| x.is_finite() && x >= 0.0;
        if effort.blocks == 0 || !usable(effort.block_s) || !usable(effort.limit_s) {
            return Err(Error::Config(format!(
                "--blocks {}, --block-seconds {}, --limit-seconds {}: at least one block and no negative time is needed",
                effort.blocks, effort.block_s, effort.limit_s
            )));
        }
        Ok(effort)
    }
}

const SMALL: [&str; 4] = ["t1", "t2", "t3", "t4"];

/// Measures.
///
/// # Errors
/// Those of the measurement.
pub fn main(command: &BenchCommand, global: &Global) -> Result<()> {
    let open = || global.open_device();
    let (name, args) = match command {
        BenchCommand::Step(a) => ("step", a),
        BenchCommand::Kernels(a) => ("kernels", a),
        BenchCommand::Sample { bench, .. } => ("sample", bench),
        BenchCommand::Ceilings { bench, .. } => ("ceilings", bench),
        BenchCommand::Startup(a) => ("startup", a),
        BenchCommand::Memory(a) => ("memory", a),
        BenchCommand::FirstStep(a) => return startup::child(&a.one()?, &open),
        BenchCommand::Serve { bench, sampler } => {
            return serve::serve(&bench.one()?, sampler.as_deref(), &open, bench.effort()?.block_s);
        }
        BenchCommand::Curve { bench, steps, images } => {
            return serve::curve(&bench.one()?, &open, *steps, images.as_deref());
        }
    };
    let device = open()?;
    let gpu = Gpu::of(&device)?;
    let all: &[&str] = match &gpu {
        None => &SMALL,
        Some(gpu) if gpu.emulated => &["t0"],
        Some(_) => &["cifar10", "imagenet64", "tiny"],
    };
    let one = matches!(command, BenchCommand::Kernels(_) | BenchCommand::Sample { .. });
    let (list, effort) = (args.configs(if one { &all[..1] } else { all })?, args.effort()?);
    if let Some(path) = &args.json {
        // Before minutes of measuring, not after.
        File::options().create(true).append(true).open(path).map_err(Error::io(path, "write"))?;
    }
    let kind = global.device.kind().to_string();
    let mut flags = global.device.given();
    flags.extend(global.threads.map(|n| format!("--threads={n}")));
    // Seconds and bytes of a process are compared with nothing that the machine could do at most.
    let whole = matches!(command, BenchCommand::Startup(_) | BenchCommand::Memory(_));
    let short = Effort { limit_s: effort.limit_s.min(4.0), ..effort };
    let ordinal = if let DeviceKind::Cuda(n) = global.device.kind() { n } else { 0 };
    let watch = Watch::start(&device, ordinal);
    let ceilings = if whole { None } else { Some(Ceilings::measure(&device, &short)?) };
    let record = Record::new(name, &kind, run::threads(&device), &effort, ceilings.as_ref());
    let mut record = record.kept_in(args.json.as_deref());
    let settings: BTreeMap<_, _> = list.iter().map(|n| (n.name.clone(), &n.config)).collect();
    record.set("configurations", settings);
    record.gpu(gpu.as_ref());
    let emulated = gpu.is_some_and(|g| g.emulated);
    match (command, &ceilings) {
        (BenchCommand::Step(_), Some(c)) => step::step(&mut record, &list, &open, &effort, c)?,
        (BenchCommand::Kernels(_), Some(c)) => kernels::kernels(&mut record, &list, &open, &effort, c)?,
        (BenchCommand::Sample { batches, .. }, Some(c)) => {
            sample::sample(&mut record, &list, batches, &open, &effort, c)?;
        }
        (BenchCommand::Ceilings { sustained_seconds, .. }, Some(c)) => {
            probes::probe(&mut record, &device, c, *sustained_seconds)?;
        }
        (BenchCommand::Memory(_), _) => startup::memory(&mut record, &list, &flags)?,
        _ => startup::startup(&mut record, &list, &flags, &effort, emulated)?,
    }
    record.clocks(watch.and_then(Watch::stop).as_ref());
    record.keep(&[])
}
