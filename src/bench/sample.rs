//! `bench sample`: one reverse step of a batch, network included, and the pictures per second that follow from it.

use super::ceilings::Ceilings;
use super::configs::Named;
use super::record::{Record, Row, Table, timing_cells};
use super::run::weights;
use super::timing::{Effort, measure};
use crate::device::Device;
use crate::error::Result;
use crate::graph::Region;
use crate::ops::p_sample::Reverse;
use crate::sampler::{self, Pictures, SampleSettings, Sampler};
use crate::unet::Params;

/// Lengths of the reverse process that pictures per second are given for.
const LENGTHS: [(usize, &str); 3] = [(50, "images_s_50"), (250, "images_s_250"), (1000, "images_s_1000")];

/// Reverse steps of one timed walk; drawing x_T and reading the pictures are in its time.
const WALK: usize = 10;

/// Measures the reverse step of each configuration at each batch, ancestral and DDIM.
///
/// # Errors
/// Memory that cannot be had.
pub fn sample(
    record: &mut Record,
    list: &[Named],
    batches: &[usize],
    threads: usize,
    effort: &Effort,
    ceilings: &Ceilings,
) -> Result<()> {
    let mut table = Table::new(format!(
        "reverse step, mean over walks of {WALK}; images_s_N: pictures per second of N steps, by that time"
    ));
    for Named { name, config } in list {
        let params = Params::new(&config.model);
        let mut diffusion = config.diffusion.clone();
        diffusion.timestep_respacing = WALK.to_string();
        for &batch in batches {
            for (kind, reverse) in [("ancestral", Reverse::Ancestral), ("ddim", Reverse::Ddim(0.0))] {
                eprintln!("{name}: {kind}, batch {batch}");
                let settings = SampleSettings { reverse, clip: true, batch };
                let cost = sampler::plan(&config.model, &diffusion, &params, &settings)?.graph.cost();
                let mut device = Device::cpu(threads)?;
                device.write_region(Region::Params, &weights(&params, config.train.seed))?;
                let sampler = Sampler::new(&mut device, &config.model, &diffusion, &params, &settings)?;
                let seeds: Vec<u64> = (0..batch as u64).collect();
                let labels = config.model.num_classes.map(|n| (0..batch).map(|i| (i % n) as i32).collect::<Vec<_>>());
                let pictures = Pictures { seeds: &seeds, labels: labels.as_deref() };
                let walk = measure(effort, || sampler.run(&mut device, pictures, &mut |_| Ok(())).map(drop))?;
                let timing = walk.per(WALK);
                let mut row: Row = vec![
                    ("config", name.as_str().into()),
                    ("sampler", kind.into()),
                    ("batch", batch.into()),
                    ("ms", (1e3 * timing.median).into()),
                ];
                let images_s = |n: usize| batch as f64 / (timing.median * n as f64);
                row.extend(LENGTHS.map(|(n, column)| (column, images_s(n).into())));
                row.push(("gflop_s", (cost.flops / timing.median / 1e9).into()));
                row.push(("peak_pct", (100.0 * cost.flops / timing.median / 1e9 / ceilings.gflops).into()));
                row.extend(timing_cells(&timing));
                table.row(row);
            }
        }
    }
    record.add(table);
    Ok(())
}
