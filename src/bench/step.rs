//! `bench step`: the whole training step, from the choice of t to the moving average, and where its time goes.

use super::ceilings::Ceilings;
use super::configs::Named;
use super::record::{Record, Row, Table, timing_cells};
use super::run::{Open, TrainingStep, describe, precision};
use super::timing::{Clock, Effort, measure};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::ops::{Cost, Operation};
use crate::unet::Params;
use std::time::Instant;

/// Measures the training step of each configuration.
///
/// # Errors
/// Memory that cannot be had; [`Error::NonFinite`] when the step computes no finite loss, for then its time means nothing.
pub fn step(record: &mut Record, list: &[Named], open: Open, effort: &Effort, ceilings: &Ceilings) -> Result<()> {
    let mut summary =
        Table::new("training step: choice of t, noising, U-Net, hybrid loss, backward, AdamW, moving average");
    let mut by_op = Vec::new();
    for Named { name, config } in list {
        eprintln!("{name}: {}, batch {}", describe(config), config.train.batch_size);
        let mut run = TrainingStep::new(config, open)?;
        let timing = measure(&Clock::of(&run.device), effort, || run.run())?;
        let loss = run.loss()?;
        if !loss.is_finite() {
            return Err(Error::NonFinite(format!("{name}: the loss is {loss} after the measurement")));
        }
        let seconds = op_seconds(&mut run, effort)?;
        let (cost, floor) = (run.graph().cost(), floor(run.graph(), ceilings));
        let batch = config.train.batch_size;
        let mut row: Row = vec![
            ("config", name.as_str().into()),
            ("batch", batch.into()),
            ("precision", precision(run.graph()).into()),
            ("params", Params::new(&config.model).count().into()),
            ("gflop", (cost.flops / 1e9).into()),
            ("ms", (1e3 * timing.median).into()),
            ("images_s", (batch as f64 / timing.median).into()),
            ("gflop_s", (cost.flops / timing.median / 1e9).into()),
            ("peak_pct", (100.0 * cost.flops / timing.median / 1e9 / ceilings.gflops).into()),
            ("floor_ms", (1e3 * floor).into()),
            ("floor_pct", (100.0 * floor / timing.median).into()),
        ];
        row.extend(timing_cells(&timing));
        summary.row(row);
        by_op.push(op_table(name, run.graph(), &seconds, ceilings));
        record.keep(&[&summary].into_iter().chain(&by_op).collect::<Vec<_>>())?;
    }
    record.add(summary);
    by_op.into_iter().for_each(|t| record.add(t));
    Ok(())
}

/// Least seconds of the list: each step bound by its arithmetic or its bytes, whichever takes longer.
pub fn floor(g: &Graph, ceilings: &Ceilings) -> f64 {
    g.steps.iter().map(|s| s.op.cost(g)).map(|c| ceilings.floor(c.flops, c.read + c.written)).sum()
}

/// Seconds of each step of the list, mean over the runs that fit the effort's limit; NaN where there is no clock.
fn op_seconds(run: &mut TrainingStep, effort: &Effort) -> Result<Vec<f64>> {
    let mut seconds = vec![0.0; run.graph().steps.len()];
    if let Clock::None = Clock::of(&run.device) {
        return Ok(vec![f64::NAN; seconds.len()]);
    }
    let (begin, mut runs) = (Instant::now(), 0);
    while runs == 0 || begin.elapsed().as_secs_f64() < effort.block_s * effort.blocks.min(4) as f64 {
        run.run_timed(&mut seconds)?;
        runs += 1;
    }
    Ok(seconds.into_iter().map(|s| s / f64::from(runs)).collect())
}

/// Time, rates and distance from the floor of each kind of op, longest first.
fn op_table(name: &str, g: &Graph, seconds: &[f64], ceilings: &Ceilings) -> Table {
    let total: f64 = seconds.iter().sum();
    let mut kinds: Vec<(&'static str, usize, f64, Cost, f64)> = Vec::new();
    for (step, s) in g.steps.iter().zip(seconds) {
        let (kind, cost) = (step.op.name(), step.op.cost(g));
        let floor = ceilings.floor(cost.flops, cost.read + cost.written);
        match kinds.iter_mut().find(|k| k.0 == kind) {
            Some(k) => *k = (kind, k.1 + 1, k.2 + s, [k.3, cost].into_iter().sum(), k.4 + floor),
            None => kinds.push((kind, 1, *s, cost, floor)),
        }
    }
    kinds.sort_by(|a, b| b.2.total_cmp(&a.2));
    let mut table = Table::new(format!("{name}: time by op, all of the step's ops one after the other"));
    for (kind, count, s, cost, floor) in kinds {
        table.row(vec![
            ("op", kind.into()),
            ("count", count.into()),
            ("ms", (1e3 * s).into()),
            ("share_pct", (100.0 * s / total).into()),
            ("gflop", (cost.flops / 1e9).into()),
            ("mb", ((cost.read + cost.written) / 1e6).into()),
            ("gflop_s", (cost.flops / s / 1e9).into()),
            ("gb_s", ((cost.read + cost.written) / s / 1e9).into()),
            ("floor_ms", (1e3 * floor).into()),
            ("floor_pct", (100.0 * floor / s).into()),
        ]);
    }
    table
}
