//! `iddpm plan`: the recorded training step as a table, before anything is allocated.

use super::Global;
use super::flags::{ModelFlags, TrainFlags};
use crate::config::preset::preset;
use crate::device::{Plan, room};
use crate::error::{Error, Result};
use crate::graph::{Place, Region};
use crate::ops::Operation;
use crate::train::plan_of;
use clap::Args;
use std::io::Write;

/// Flags of `iddpm plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    train: TrainFlags,
    #[command(flatten)]
    model: ModelFlags,
    /// Images in the data set [default: one batch]
    #[arg(long)]
    images: Option<usize>,
    /// Number of classes of --class-cond
    #[arg(long, default_value_t = 10)]
    classes: usize,
    /// Only the totals
    #[arg(long, value_name = super::flags::BOOL)]
    totals: Option<bool>,
}

/// Prints the plan.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit together.
pub fn main(a: &PlanArgs, g: &Global) -> Result<()> {
    let mut config = preset(a.train.preset.as_deref().unwrap_or("digits"))?;
    a.train.apply(g.seed, &mut config);
    a.model.apply(&mut config)?;
    // A preset knows its classes; --class-cond alone does not.
    config.model.num_classes = config.model.num_classes.map(|n| if n == 0 { a.classes } else { n });
    let images = a.images.unwrap_or(config.train.batch_size);
    let (plan, _, params) = plan_of(&config, images, true, g.device.target()?)?;
    let mut text = String::new();
    if a.totals != Some(true) {
        text += &table(&plan);
    }
    let cost = plan.graph.cost();
    let batch = config.train.batch_size;
    let per_image = cost.flops / batch as f64;
    text += &format!("parameters        {} in {} tensors\n", params.count(), params.list.len());
    text += &format!("steps             {}\n", plan.graph.steps.len());
    for region in Region::ALL {
        let bytes = plan.graph.region_bytes(region);
        if bytes > 0 {
            text += &format!("{:<17} {}\n", format!("{region:?}").to_lowercase(), room::bytes(bytes));
        }
    }
    text += &format!("arena             {}\n", room::bytes(plan.layout.bytes));
    if plan.beside > 0 {
        text += &format!("scratch, tables   {}\n", room::bytes(plan.beside));
    }
    text += &format!("peak memory       {} ({} bytes)\n", room::bytes(plan.bytes()), plan.bytes());
    text += &format!(
        "work              {:.4} GFLOP per image, {:.3} GFLOP per step of {batch}\n",
        per_image / 1e9,
        cost.flops / 1e9
    );
    text += &format!(
        "least traffic     {:.3} GB per step: {:.3} read, {:.3} written\n",
        (cost.read + cost.written) / 1e9,
        cost.read / 1e9,
        cost.written / 1e9
    );
    let scratch = plan.graph.scratch_traffic();
    if plan.beside > 0 {
        text += &format!("scratch traffic   {:.3} GB per step, which a cache can hold\n", scratch / 1e9);
    }
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("output", "write"))
}

/// One row per step: number, module, operation, shape of its first output, bytes it writes, FLOPs, place.
fn table(plan: &Plan) -> String {
    let g = &plan.graph;
    let mut text = format!(
        "{:>5} {:<28} {:<22} {:>16} {:>12} {:>12}  {}\n",
        "step", "module", "op", "shape", "bytes", "MFLOP", "offset"
    );
    for (i, step) in g.steps.iter().enumerate() {
        let Some(&out) = step.op.outputs().first() else { continue };
        let bytes: usize = step.op.outputs().iter().map(|&v| g[v].bytes()).sum();
        let place = match g[out].place {
            Place::Arena => format!("{}", plan.layout.offsets[out.index()]),
            Place::Fixed(region, at) => format!("{region:?}+{at}").to_lowercase(),
        };
        let flops = step.op.cost(g).flops / 1e6;
        text += &format!(
            "{i:>5} {:<28} {:<22} {:>16} {bytes:>12} {flops:>12.3}  {place}\n",
            step.scope,
            step.op.name(),
            g.shape(out)
        );
    }
    text
}
