//! `bench serve`: this side of an interleaved comparison.
//!
//! A comparison starts one process per side and asks them in turn for blocks, so that both are timed within the same
//! seconds. The process prints a line of JSON when it is ready, one per line it reads from its input, and ends with it.

use super::configs::Named;
use super::run::{Open, TrainingStep, threads};
use super::sample::{KINDS, WALK, Walks};
use super::timing::{Block, calls_per_block};
use crate::data::{self, DataSpec};
use crate::error::{Error, Result};
use crate::train::Trainer;
use crate::train::log::Meter;
use crate::unet::Params;
use serde_json::json;
use std::io::BufRead;

/// Answers every line of the input with a block of training steps, or of reverse steps if a sampler is named.
///
/// # Errors
/// A sampler of no known name, memory that cannot be had, an input that cannot be read.
pub fn serve(named: &Named, sampler: Option<&str>, open: Open, block_s: f64) -> Result<()> {
    let params = Params::new(&named.config.model).count();
    let batch = named.config.train.batch_size;
    let (parts, mut run): (usize, Box<dyn FnMut() -> Result<()>>) = match sampler {
        None => {
            let mut step = TrainingStep::new(&named.config, open)?;
            (1, Box::new(move || step.run()))
        }
        Some(name) => {
            let kind = KINDS.iter().find(|(kind, _)| *kind == name);
            let known = || Error::Config(format!("--sampler {name}: no such sampler; there are ancestral, ddim"));
            let mut walks = Walks::new(&named.config, kind.ok_or_else(known)?.1, batch, open)?;
            (WALK, Box::new(move || walks.run()))
        }
    };
    let calls = calls_per_block(block_s, &mut run)?;
    let threads = threads(&open()?);
    println!("{}", json!({ "ready": true, "params": params, "batch": batch, "threads": threads }));
    for line in std::io::stdin().lock().lines() {
        line.map_err(Error::io("standard input", "read"))?;
        let block = Block::take(calls, &mut run)?;
        println!("{}", json!({ "s": block.seconds / parts as f64, "calls": calls * parts, "foreign": block.foreign }));
    }
    Ok(())
}

/// Trains from the initial weights on all built-in images and prints the mean loss of every ten steps, as one line of JSON.
///
/// # Errors
/// Those of training.
pub fn curve(named: &Named, open: Open, steps: usize) -> Result<()> {
    let m = &named.config.model;
    let spec = DataSpec { image_size: Some(m.image_size), channels: Some(m.in_channels), ..DataSpec::default() };
    let mut trainer = Trainer::new(named.config.clone(), open()?, &data::open(&spec)?, true)?;
    let mut losses = Vec::new();
    for _ in 0..steps / 10 {
        let mut meter = Meter::default();
        for _ in 0..10 {
            trainer.step(&mut meter)?;
        }
        losses.push(meter.mean(None).map(|t| t.loss));
    }
    println!("{}", json!({ "losses": losses, "lr": named.config.train.lr, "batch": named.config.train.batch_size }));
    Ok(())
}
