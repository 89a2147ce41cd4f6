//! `bench sample`: one reverse step of a batch, network included, and the pictures per second that follow from it.

use super::ceilings::Ceilings;
use super::configs::Named;
use super::record::{Record, Row, Table, timing_cells};
use super::run::{Open, weights};
use super::timing::{Effort, measure};
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
use crate::graph::Region;
use crate::ops::p_sample::Reverse;
use crate::sampler::{self, Pictures, SampleSettings, Sampler};
use crate::unet::Params;

/// Lengths of the reverse process that pictures per second are given for.
const LENGTHS: [(usize, &str); 3] = [(50, "images_s_50"), (250, "images_s_250"), (1000, "images_s_1000")];

/// Reverse steps of one timed walk; drawing x_T and reading the pictures are in its time.
pub const WALK: usize = 10;

/// Kinds of reverse step that are measured.
pub const KINDS: [(&str, Reverse); 2] = [("ancestral", Reverse::Ancestral), ("ddim", Reverse::Ddim(0.0))];

/// A sampler of a configuration bound to a device, ready to walk again and again.
pub struct Walks {
    device: Device,
    sampler: Sampler,
    seeds: Vec<u64>,
    labels: Option<Vec<i32>>,
    /// Least FLOPs of one reverse step.
    pub flops: f64,
}

impl Walks {
    /// Records, plans and binds a sampler of `batch` pictures on a device that `open` gives.
    ///
    /// # Errors
    /// Memory that cannot be had.
    pub fn new(config: &Config, reverse: Reverse, batch: usize, open: Open) -> Result<Self> {
        let params = Params::new(&config.model);
        let mut diffusion = config.diffusion.clone();
        diffusion.timestep_respacing = WALK.to_string();
        let settings = SampleSettings { reverse, batch, ..SampleSettings::default() };
        let mut device = open()?;
        let plan = sampler::plan(&config.model, &diffusion, &params, &settings, device.target())?;
        let flops = plan.graph.cost().flops;
        device.write_region(Region::Params, &weights(&params, config.train.seed))?;
        let sampler = Sampler::new(&mut device, &config.model, &diffusion, &params, &settings)?;
        let seeds = (0..batch as u64).collect();
        let labels = config.model.num_classes.map(|n| (0..batch).map(|i| (i % n) as i32).collect());
        Ok(Walks { device, sampler, seeds, labels, flops })
    }

    /// One walk of [`WALK`] reverse steps.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(&mut self) -> Result<()> {
        let pictures = Pictures { seeds: &self.seeds, labels: self.labels.as_deref() };
        self.sampler.run(&mut self.device, pictures, &mut |_| Ok(())).map(drop)
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
    let mut table = Table::new(format!(
        "reverse step, mean over walks of {WALK}; images_s_N: pictures per second of N steps, by that time"
    ));
    for Named { name, config } in list {
        for &batch in batches {
            for (kind, reverse) in KINDS {
                eprintln!("{name}: {kind}, batch {batch}");
                let mut walks = Walks::new(config, reverse, batch, open)?;
                let timing = measure(effort, || walks.run())?.per(WALK);
                let mut row: Row = vec![
                    ("config", name.as_str().into()),
                    ("sampler", kind.into()),
                    ("batch", batch.into()),
                    ("ms", (1e3 * timing.median).into()),
                ];
                let images_s = |n: usize| batch as f64 / (timing.median * n as f64);
                row.extend(LENGTHS.map(|(n, column)| (column, images_s(n).into())));
                row.push(("gflop_s", (walks.flops / timing.median / 1e9).into()));
                row.push(("peak_pct", (100.0 * walks.flops / timing.median / 1e9 / ceilings.gflops).into()));
                row.extend(timing_cells(&timing));
                table.row(row);
            }
        }
    }
    record.add(table);
    Ok(())
}
