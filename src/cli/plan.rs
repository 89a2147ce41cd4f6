//! `iddpm plan`: the recorded training step as a table, before anything is allocated.

use super::Global;
use super::flags::{ModelFlags, TrainFlags};
use crate::config::preset::preset;
use crate::device::{Plan, room};
use crate::error::{Error, Result};
use crate::graph::{Graph, Place, Region, Target};
use crate::ops::Operation;
use crate::train::plan_of;
use crate::unet::Params;
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
    /// Speed of a machine: TFLOP/s of products and GB/s of copies (`iddpm doctor` measures them); adds what each kind of
    /// operation takes at least
    #[arg(long, value_name = "TFLOPS,GB_S", value_parser = ceilings)]
    ceilings: Option<[f64; 2]>,
}

/// `798,3000` as FLOP/s and bytes/s.
fn ceilings(text: &str) -> std::result::Result<[f64; 2], String> {
    let numbers: Vec<f64> = text.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    match numbers[..] {
        [tflops, gb_s] if tflops > 0.0 && gb_s > 0.0 => Ok([1e12 * tflops, 1e9 * gb_s]),
        _ => Err("two positive numbers are needed, TFLOP/s and GB/s, such as 798,3000".into()),
    }
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
    let table = if a.totals == Some(true) { String::new() } else { table(&plan) };
    let text = table + &totals(&plan, &params, config.train.batch_size) + &by_op(&plan.graph, a.ceilings);
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("output", "write"))
}

/// Memory, work and traffic of the whole step on `batch` images.
fn totals(plan: &Plan, params: &Params, batch: usize) -> String {
    let (g, cost) = (&plan.graph, plan.graph.cost());
    let mut text = format!("parameters        {} in {} tensors\n", params.count(), params.list.len());
    text += &format!("steps             {}\n", g.steps.len());
    let regions = Region::ALL.map(|r| (format!("{r:?}").to_lowercase(), g.region_bytes(r)));
    let rest = [("arena", plan.layout.bytes), ("scratch", plan.scratch), ("tables", plan.tables)];
    for (name, bytes) in regions.into_iter().chain(rest.map(|(name, bytes)| (name.to_string(), bytes))) {
        if bytes > 0 {
            text += &format!("{name:<17} {}\n", room::bytes(bytes));
        }
    }
    text += &format!("peak memory       {} ({} bytes)\n", room::bytes(plan.bytes()), plan.bytes());
    let (per_image, gflop) = (cost.flops / 1e9 / batch as f64, cost.flops / 1e9);
    text += &format!("work              {per_image:.4} GFLOP per image, {gflop:.3} GFLOP per step of {batch}\n");
    let [read, written] = [cost.read, cost.written].map(|bytes| bytes / 1e9);
    text += &format!("least traffic     {:.3} GB per step: {read:.3} read, {written:.3} written\n", read + written);
    if g.target != Target::Cpu {
        let scratch = g.scratch_traffic() / 1e9;
        text += &format!("scratch traffic   {scratch:.3} GB per step, which a cache can hold\n");
    }
    text
}

/// One row per kind of operation: how often, its FLOPs and bytes, and the longer of both at the ceilings (FLOP/s, bytes/s), step by
/// step.
fn by_op(g: &Graph, ceilings: Option<[f64; 2]>) -> String {
    let mut kinds: Vec<(&'static str, usize, [f64; 3], f64)> = Vec::new();
    for step in &g.steps {
        let (name, c) = (step.op.name(), step.op.cost(g));
        let floor = ceilings.map_or(0.0, |[flops, bytes]| (c.flops / flops).max((c.read + c.written) / bytes));
        let row = match kinds.iter().position(|k| k.0 == name) {
            Some(at) => &mut kinds[at],
            None => {
                kinds.push((name, 0, [0.0; 3], 0.0));
                kinds.last_mut().expect("just added")
            }
        };
        row.1 += 1;
        row.2 = std::array::from_fn(|i| row.2[i] + [c.flops, c.read, c.written][i] / 1e9);
        row.3 += floor * 1e3;
    }
    kinds.sort_by(|a, b| (b.3, b.2[0]).partial_cmp(&(a.3, a.2[0])).expect("finite costs"));
    let floor = |ms: f64| ceilings.map_or(String::new(), |_| format!(" {ms:>10.3}"));
    let head = if ceilings.is_some() { "   floor ms" } else { "" };
    let mut text =
        format!("\n{:<22} {:>6} {:>12} {:>9} {:>10}{head}\n", "op", "steps", "GFLOP", "GB read", "GB written");
    for (name, steps, [gflop, read, written], ms) in &kinds {
        text += &format!("{name:<22} {steps:>6} {gflop:>12.3} {read:>9.3} {written:>10.3}{}\n", floor(*ms));
    }
    if ceilings.is_some() {
        let sum: f64 = kinds.iter().map(|k| k.3).sum();
        text += &format!("{:<22} {:>6} {:>12} {:>9} {:>10}{}\n", "all", g.steps.len(), "", "", "", floor(sum));
    }
    text
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
