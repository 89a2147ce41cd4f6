//! `bench kernels`: every distinct op of a training step and of sampling, at its shapes.
//!
//! One plan holds each distinct op once, every value in memory of its own, and runs again and again: when an op's turn
//! comes, all others have touched their operands since, so nothing stays in a cache that would not in a real step. A
//! time is the median over blocks of rounds that ran while nobody else used the machine. On an emulated GPU there are no
//! times: the bytes that the kernels move stand beside those that the ops declare.

use super::ceilings::Ceilings;
use super::configs::{self, Named};
use super::load::{Load, QUIET};
use super::record::{Record, Table, condition};
use super::run::{Open, TrainingStep, precision};
use super::timing::{Effort, FEWEST, median};
#[cfg(feature = "emulator")]
use super::traffic;
use crate::config::Config;
use crate::device::{Device, Plan};
use crate::diffusion::gaussian::Output;
use crate::error::Result;
use crate::graph::{DType, Graph, Place, Region, Shape, Val};
use crate::ops::p_sample::{PSample, Reverse};
use crate::ops::vb_terms::VbTerms;
use crate::ops::{Op, Operation};
use crate::rng;
use crate::train;
use half::bf16;
use std::time::Instant;

/// One distinct op, and how often the step has it.
pub struct Kind {
    /// The op.
    pub op: Op,
    /// How often the step has it.
    pub count: usize,
    /// Its outputs and inputs.
    pub shape: String,
}

/// The distinct ops of a configuration, bound to a device.
pub struct Kinds {
    /// Their list as a plan of its own.
    pub step: TrainingStep,
    /// One for each step of the list.
    pub kinds: Vec<Kind>,
    /// Names of ops that the device has no kernel for, each once.
    pub missing: Vec<&'static str>,
}

impl Kinds {
    /// Of `config`, with all inputs filled.
    ///
    /// # Errors
    /// Memory that cannot be had.
    pub fn new(config: &Config, open: Open) -> Result<Self> {
        let (images, device) = (configs::images(config)?, open()?);
        let (plan, vals, params) = train::plan_of(config, images.n, true, device.target())?;
        let (mut graph, mut kinds) = distinct(plan.graph, config, vals.control);
        let mut missing: Vec<&'static str> = Vec::new();
        if let Device::Cuda(_) = device {
            let has_kernel: Vec<bool> = kinds.iter().map(|k| k.op.prepare_cuda(&graph).is_ok()).collect();
            missing = kinds.iter().zip(&has_kernel).filter(|(_, has)| !**has).map(|(k, _)| k.op.name()).collect();
            missing.sort_unstable();
            missing.dedup();
            graph.steps = graph.steps.into_iter().zip(&has_kernel).filter(|(_, has)| **has).map(|(s, _)| s).collect();
            kinds = kinds.into_iter().zip(&has_kernel).filter(|(_, has)| **has).map(|(k, _)| k).collect();
        }
        let mut step = TrainingStep::bind(config, &images, Plan::new(graph, false), vals, &params, device)?;
        fill(&mut step, config.train.seed)?;
        Ok(Kinds { step, kinds, missing })
    }
}

/// Measures the ops of each configuration.
///
/// # Errors
/// Memory that cannot be had.
pub fn kernels(record: &mut Record, list: &[Named], open: Open, effort: &Effort, ceilings: &Ceilings) -> Result<()> {
    for Named { name, config } in list {
        let mut kinds = Kinds::new(config, open)?;
        eprintln!("{name}: {} distinct ops", kinds.kinds.len());
        if !kinds.missing.is_empty() {
            println!("{name}: no kernel for {}", kinds.missing.join(", "));
            record.set("without_kernel", &kinds.missing);
        }
        let title = format!("{name}, batch {}, {}", config.train.batch_size, precision(kinds.step.graph()));
        #[cfg(feature = "emulator")]
        if !ceilings.known() {
            record.add(traffic::table(&title, &mut kinds)?);
            continue;
        }
        kinds.step.device.capture(kinds.step.id)?;
        let rounds = Rounds::measure(&mut kinds.step, effort)?;
        record.add(table(&title, &kinds, &rounds, ceilings));
        record.keep(&[])?;
    }
    Ok(())
}

fn table(title: &str, kinds: &Kinds, rounds: &Rounds, ceilings: &Ceilings) -> Table {
    let (machine, n) = (condition(rounds.busy, 0.0), rounds.blocks.len());
    let title = format!("{title}: distinct ops (outputs <- inputs), median of {n} blocks on a {machine} machine");
    let mut table = Table::new(title);
    for (i, kind) in kinds.kinds.iter().enumerate() {
        let seconds = median(&rounds.blocks.iter().map(|b| b[i]).collect::<Vec<_>>());
        let cost = kind.op.cost(kinds.step.graph());
        let bytes = cost.read + cost.written;
        let bound = if ceilings.floor(cost.flops, 0.0) > ceilings.floor(0.0, bytes) { "flops" } else { "bytes" };
        table.row(vec![
            ("op", kind.op.name().into()),
            ("count", kind.count.into()),
            ("us", (1e6 * seconds).into()),
            ("mflop", (cost.flops / 1e6).into()),
            ("mb", (bytes / 1e6).into()),
            ("gflop_s", (cost.flops / seconds / 1e9).into()),
            ("gb_s", (bytes / seconds / 1e9).into()),
            ("bound", bound.into()),
            ("ceiling_pct", (100.0 * ceilings.floor(cost.flops, bytes) / seconds).into()),
            ("shape", kind.shape.as_str().into()),
        ]);
    }
    table
}

/// The list of every distinct op of a training step and of sampling, once each.
fn distinct(mut g: Graph, config: &Config, control: Val) -> (Graph, Vec<Kind>) {
    add_sampling(&mut g, config, control);
    let (mut kinds, mut keys): (Vec<Kind>, Vec<_>) = Default::default();
    for step in std::mem::take(&mut g.steps) {
        let shape = shape(&g, &step.op);
        let key = (step.op.name(), shape.clone(), step.op.cost(&g).flops.to_bits());
        match keys.iter().position(|k| *k == key) {
            Some(i) => kinds[i].count += 1,
            None => {
                keys.push(key);
                kinds.push(Kind { op: step.op.clone(), count: 1, shape });
                g.steps.push(step);
            }
        }
    }
    (g, kinds)
}
/// Appends the reverse step and the terms of the bound, which training does not have.
fn add_sampling(g: &mut Graph, config: &Config, control: Val) {
    let loss = g.steps.iter().find_map(|s| if let Op::HybridLoss(op) = &s.op { Some(op.clone()) } else { None });
    let loss = loss.expect("a training step has a loss");
    let (n, size) = (config.train.batch_size, loss.images.shape(g));
    let mut state = |name, shape| g.fixed(name, shape, DType::F32, Region::State);
    let (x, x_0) = (state("x", size), state("x_0", size));
    let [vb, x_0_mse, eps_mse] = ["vb", "x_0_mse", "eps_mse"].map(|name| state(name, Shape::rows(n, 1)));
    let seeds = g.fixed("seeds", Shape::rows(n, 2), DType::I32, Region::Inputs);
    let d = &config.diffusion;
    let output = Output { mean_type: d.mean_type, var_type: d.var_type };
    let (out, process) = (loss.out, loss.process.clone());
    g.push(PSample {
        x,
        copy: None,
        x_0: Some(x_0),
        out,
        seeds,
        noise: None,
        control,
        reverse: Reverse::Ancestral,
        output,
        guidance: None,
        threshold: None,
        clip: true,
        process,
    });
    let (images, noise, t) = (loss.images, loss.noise, loss.t);
    let (objective, process) = (loss.objective, loss.process);
    g.push(VbTerms { vb, x_0_mse, eps_mse, out, images, noise, t, objective, clip: true, process });
}

/// "outputs <- inputs", small vectors left out.
fn shape(g: &Graph, op: &Op) -> String {
    let list = |vals: Vec<Val>| {
        let large = |s: &Shape| s.h * s.w > 1 || s.n > 1;
        let mut shapes: Vec<String> = vals.iter().map(|&v| g.shape(v)).filter(large).map(|s| s.to_string()).collect();
        if shapes.is_empty() {
            shapes = vals.iter().map(|&v| g.shape(v).to_string()).collect();
        }
        shapes.join(" ")
    };
    format!("{} <- {}", list(op.outputs()), list(op.inputs()))
}

/// Normal numbers that are drawn; a larger value has them again and again, each value from another one on.
const NORMALS: usize = 1 << 20;

/// Writes normal numbers to every value that an op reads and none may write: tens of gigabytes on a GPU, so few are drawn.
fn fill(step: &mut TrainingStep, seed: u64) -> Result<()> {
    let g = step.graph().clone();
    let mut normals = vec![0.0; NORMALS];
    rng::fill_normal(&mut normals, seed, 0, 0, rng::op::PARAM_INIT);
    let rounded: Vec<bf16> = normals.iter().copied().map(bf16::from_f32).collect();
    let (mut x, mut half, mut filled) = (Vec::new(), Vec::new(), vec![false; g.values.len()]);
    for (k, v) in g.steps.iter().flat_map(|s| s.op.inputs()).enumerate() {
        let own = matches!(g[v].place, Place::Arena | Place::Fixed(Region::State, _));
        let own = own && !std::mem::replace(&mut filled[v.index()], true);
        let (len, from) = (g.shape(v).len(), k * 4099 % NORMALS);
        match g[v].dtype {
            DType::F32 if own => {
                repeat(&mut x, &normals, from, len);
                step.device.write(step.id, v, &x)?;
            }
            DType::Bf16 if own => {
                repeat(&mut half, &rounded, from, len);
                step.device.write(step.id, v, &half)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Fills `out` with `len` entries of `table`, round and round from the entry `from`.
fn repeat<T: Copy>(out: &mut Vec<T>, table: &[T], mut from: usize, len: usize) {
    out.clear();
    while out.len() < len {
        let n = (table.len() - from).min(len - out.len());
        out.extend_from_slice(&table[from..from + n]);
        from = 0;
    }
}

/// Seconds of each op of the list, by block.
struct Rounds {
    blocks: Vec<Vec<f64>>,
    /// Others used the machine in all but a few blocks.
    busy: bool,
}

impl Rounds {
    /// Runs the list again and again; a block is the median over the rounds that fill it.
    fn measure(step: &mut TrainingStep, effort: &Effort) -> Result<Self> {
        step.run()?;
        let ops = step.graph().steps.len();
        let (mut all, mut quiet) = (Vec::new(), Vec::new());
        let begin = Instant::now();
        while quiet.len() < effort.blocks.max(1)
            && (all.len() < FEWEST || begin.elapsed().as_secs_f64() < effort.limit_s)
        {
            let (before, start) = (Load::now(), Instant::now());
            let mut rounds = Vec::new();
            while rounds.is_empty() || start.elapsed().as_secs_f64() < effort.block_s {
                let mut seconds = vec![0.0; ops];
                step.run_timed(&mut seconds)?;
                rounds.push(seconds);
            }
            let on_gpu = matches!(step.device, Device::Cuda(_));
            let is_quiet = on_gpu || before.foreign(&Load::now()).is_none_or(|f| f <= QUIET);
            let of = |i: usize| median(&rounds.iter().map(|s: &Vec<f64>| s[i]).collect::<Vec<_>>());
            let block: Vec<f64> = (0..ops).map(of).collect();
            if is_quiet {
                quiet.push(block.clone());
            }
            all.push(block);
        }
        let busy = quiet.len() < FEWEST;
        Ok(Rounds { blocks: if busy { all } else { quiet }, busy })
    }
}

#[cfg(test)]
mod tests {
    use super::repeat;

    #[test]
    fn a_table_is_repeated_from_any_entry() {
        let mut out = vec![9];
        repeat(&mut out, &[1, 2, 3], 2, 8);
        assert_eq!(out, [3, 1, 2, 3, 1, 2, 3, 1]);
        repeat(&mut out, &[1, 2, 3], 1, 1);
        assert_eq!(out, [2]);
    }
}
