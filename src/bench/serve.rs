//! `bench serve`: this side of an interleaved comparison.
//!
//! A comparison starts one process per side and asks them in turn for blocks, so that both are timed within the same
//! seconds. The process prints a line of JSON when it is ready, one per line it reads from its input, and ends with it.

use super::ceilings::Ceilings;
use super::configs::Named;
use super::run::{Memory, Open, TrainingStep, precision, threads};
use super::sample::{KINDS, ReverseStep};
use super::step::floor;
use super::timing::{Block, Clock, Effort, calls_per_block};
use crate::data::{self, DataSpec};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::npz::{self, Array};
use crate::train::Trainer;
use crate::train::log::Meter;
use crate::unet::Params;
use serde_json::{Value, json};
use std::io::BufRead;
use std::path::Path;

/// What is run again and again.
enum Work {
    Training(Box<TrainingStep>),
    Sampling(Box<ReverseStep>),
}

impl Work {
    fn new(named: &Named, sampler: Option<&str>, open: Open) -> Result<Self> {
        let Some(name) = sampler else {
            return Ok(Work::Training(Box::new(TrainingStep::new(&named.config, open)?)));
        };
        let kind = KINDS.iter().find(|(kind, _)| *kind == name);
        let unknown = || Error::Config(format!("--sampler {name}: no such sampler; there are ancestral, ddim"));
        let reverse = kind.ok_or_else(unknown)?.1;
        let step = ReverseStep::new(&named.config, reverse, named.config.train.batch_size, open)?;
        Ok(Work::Sampling(Box::new(step)))
    }

    fn run(&mut self) -> Result<()> {
        match self {
            Work::Training(step) => step.run(),
            Work::Sampling(step) => step.run(),
        }
    }

    /// Where it runs, what it runs, what it takes.
    fn parts(&self) -> (&Device, &Graph, &Memory) {
        match self {
            Work::Training(step) => (&step.device, step.graph(), &step.memory),
            Work::Sampling(step) => (&step.device, step.graph(), &step.memory),
        }
    }

    /// The first line: that the step runs, what it is, its floor at the ceilings measured just now, its memory.
    fn head(&self, named: &Named) -> Result<Value> {
        let (device, graph, memory) = self.parts();
        // Before the ceilings, whose buffers are larger than a small network.
        let used = memory.used(device)?;
        let ceilings = Ceilings::measure(device, &Effort { block_s: 0.1, blocks: 3, limit_s: 2.0 })?;
        Ok(json!({
            "ready": true, "params": Params::new(&named.config.model).count(), "batch": named.config.train.batch_size,
            "threads": threads(device), "precision": precision(graph), "floor_ms": 1e3 * floor(graph, &ceilings),
            "ceilings": { "gflops": ceilings.gflops, "gb_s": ceilings.gb_s, "instructions": ceilings.instructions },
            "planned_bytes": memory.planned, "used_bytes": used,
        }))
    }
}

/// Answers every line of the input with a block of training steps, or of reverse steps if a sampler is named.
///
/// # Errors
/// A sampler of no known name, memory that cannot be had, an input that cannot be read.
pub fn serve(named: &Named, sampler: Option<&str>, open: Open, block_s: f64) -> Result<()> {
    let mut work = Work::new(named, sampler, open)?;
    let clock = Clock::of(work.parts().0);
    let calls = calls_per_block(&clock, block_s, || work.run())?;
    println!("{}", work.head(named)?);
    for line in std::io::stdin().lock().lines() {
        line.map_err(Error::io("standard input", "read"))?;
        let block = Block::take(&clock, calls, || work.run())?;
        println!("{}", json!({ "s": block.seconds, "calls": calls, "foreign": block.foreign }));
    }
    Ok(())
}

/// Trains from the initial weights on all built-in images and prints the mean loss of every ten steps, as one line of JSON. The
/// images, as they are trained on, are written to the npz file `images` if one is named: the other side takes the same.
///
/// # Errors
/// Those of training, a file that cannot be written.
pub fn curve(named: &Named, open: Open, steps: usize, images: Option<&Path>) -> Result<()> {
    let m = &named.config.model;
    let spec = DataSpec { image_size: Some(m.image_size), channels: Some(m.in_channels), ..DataSpec::default() };
    let set = data::open(&spec)?;
    if let Some(path) = images {
        npz::write(path, &[("arr_0", &Array::images([set.n, set.h, set.w, set.c], set.pixels.clone()))])?;
    }
    let mut trainer = Trainer::new(named.config.clone(), open()?, &set, true)?;
    let mut losses = Vec::new();
    for _ in 0..steps / 10 {
        let mut meter = Meter::default();
        for _ in 0..10 {
            trainer.step(&mut meter)?;
        }
        losses.push(meter.mean(None).map(|t| t.loss));
    }
    println!(
        "{}",
        json!({
            "losses": losses, "lr": named.config.train.lr, "batch": named.config.train.batch_size,
            "precision": precision(&trainer.plan().graph),
        })
    );
    Ok(())
}
