//! `bench sample`: one reverse step of a batch, network included, and the pictures per second that follow from it.

use super::ceilings::Ceilings;
use super::configs::Named;
use super::record::{Record, Row, Table, timing_cells};
use super::run::{Memory, Open, precision, weights};
use super::step::floor;
use super::timing::{Clock, Effort, measure};
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::graph::{Graph, Region};
use crate::ops::p_sample::Reverse;
use crate::sampler::{self, Pictures, SampleSettings, Sampler};
use crate::unet::Params;

/// Lengths of the reverse process that pictures per second are given for.
const LENGTHS: [(usize, &str); 3] = [(50, "images_s_50"), (250, "images_s_250"), (1000, "images_s_1000")];

/// Steps of the respaced process that the measured steps go round.
const STEPS: usize = 10;

/// Kinds of reverse step that are measured.
pub const KINDS: [(&str, Reverse); 2] = [("ancestral", Reverse::Ancestral), ("ddim", Reverse::Ddim(0.0))];

/// A sampler of a configuration bound to a device, ready to take steps again and again.
pub struct ReverseStep {
    /// Where it runs.
    pub device: Device,
    /// What it takes.
    pub memory: Memory,
    sampler: Sampler,
    taken: usize,
}

impl ReverseStep {
    /// Records, plans and binds a sampler of `batch` pictures on a device that `open` gives, and starts from noise.
    ///
    /// # Errors
    /// Memory that cannot be had.
    pub fn new(config: &Config, reverse: Reverse, batch: usize, open: Open) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Config("--batches 0: a batch has at least one picture".into()));
        }
        let params = Params::new(&config.model);
        let mut diffusion = config.diffusion.clone();
        diffusion.timestep_respacing = STEPS.to_string();
        let settings = SampleSettings { reverse, batch, ..SampleSettings::default() };
        let mut device = open()?;
        let plan = sampler::plan(&config.model, &diffusion, &params, &settings, device.target())?;
        let memory = Memory::of(&plan, &device)?;
        device.write_region(Region::Params, &weights(&params, config.train.seed))?;
        let sampler = Sampler::new(&mut device, &config.model, &diffusion, &params, &settings)?;
        let seeds: Vec<u64> = (0..batch as u64).collect();
        let labels: Option<Vec<i32>> = config.model.num_classes.map(|n| (0..batch).map(|i| (i % n) as i32).collect());
        sampler.start(&mut device, Pictures { first: 0, seeds: &seeds, labels: labels.as_deref() })?;
        device.capture(sampler.id())?;
        Ok(ReverseStep { device, memory, sampler, taken: 0 })
    }

    /// The recorded list.
    pub fn graph(&self) -> &Graph {
        &self.device.plan(self.sampler.id()).graph
    }

    /// One reverse step, from T-1 down to 0 and round again; on a GPU it is started, not waited for.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(&mut self) -> Result<()> {
        let t = STEPS - 1 - self.taken % STEPS;
        self.taken += 1;
        self.sampler.step(&mut self.device, t)
    }
}

/// Measures the reverse step of each configuration at each batch, ancestral and DDIM.
///
/// # Errors
/// Memory that cannot be had.
pub fn sample(
    record: &mut Record,
    list: &[Named],
    batches: &[usize],
    open: Open,
    effort: &Effort,
    ceilings: &Ceilings,
) -> Result<()> {
    let mut table =
        Table::new("reverse step, network included; images_s_N: pictures per second of N steps, by that time");
    for Named { name, config } in list {
        for &batch in batches {
            for (kind, reverse) in KINDS {
                eprintln!("{name}: {kind}, batch {batch}");
                let mut step = ReverseStep::new(config, reverse, batch, open)?;
                let timing = measure(&Clock::of(&step.device), effort, || step.run())?;
                let (flops, floor) = (step.graph().cost().flops, floor(step.graph(), ceilings));
                let mut row: Row = vec![
                    ("config", name.as_str().into()),
                    ("sampler", kind.into()),
                    ("batch", batch.into()),
                    ("precision", precision(step.graph()).into()),
                    ("ms", (1e3 * timing.median).into()),
                ];
                let images_s = |n: usize| batch as f64 / (timing.median * n as f64);
                row.extend(LENGTHS.map(|(n, column)| (column, images_s(n).into())));
                row.push(("gflop_s", (flops / timing.median / 1e9).into()));
                row.push(("peak_pct", (100.0 * flops / timing.median / 1e9 / ceilings.gflops).into()));
                row.push(("floor_ms", (1e3 * floor).into()));
                row.push(("floor_pct", (100.0 * floor / timing.median).into()));
                row.extend(timing_cells(&timing));
                table.row(row);
                record.keep(&[&table])?;
            }
        }
    }
    record.add(table);
    Ok(())
}
