//! The state of AdamW as PyTorch saves it: `state.<i>.exp_avg`, `exp_avg_sq` and `step`, i in registration order.

use super::export::{Pickle, write_archive};
use super::reference::{check_tensor, read, reference_dims, to_reference};
use super::tensor_file::TensorFile;
use crate::checkpoint::Slot;
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use std::path::Path;

/// The two moments of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// `exp_avg`.
    First,
    /// `exp_avg_sq`.
    Second,
}

/// The moment of parameter `i`, in our order.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensor.
pub fn moment(file: &TensorFile, i: usize, which: Moment) -> Result<Vec<f32>> {
    let name = name(i, which);
    read(file, &name, file.get(&name)?)
}

fn name(i: usize, which: Moment) -> String {
    format!("state.{i}.{}", if which == Moment::First { "exp_avg" } else { "exp_avg_sq" })
}

/// Checks that `file` is the state of the parameters `slots`, all after the same number of steps, which is returned.
///
/// # Errors
/// [`Error::Checkpoint`] naming what is missing, left over, of another size, or out of step.
pub fn check(file: &TensorFile, slots: &[Slot]) -> Result<u64> {
    let bad = |what: String| Error::checkpoint(&file.path, what);
    let states = file.tensors.keys().filter(|k| k.ends_with(".exp_avg")).count();
    if states != slots.len() {
        let hint = if states <= 2 { " (a run with use_fp16 keeps one flat vector, which cannot be split)" } else { "" };
        return Err(bad(format!("optimiser state of {states} tensors, the model has {}{hint}", slots.len())));
    }
    let mut steps = None;
    for (i, s) in slots.iter().enumerate() {
        for which in [Moment::First, Moment::Second] {
            let name = name(i, which);
            check_tensor(file, &format!("{name} ({})", s.name), file.get(&name)?, &reference_dims(s), false)?;
        }
        let step = step(file, i)?;
        match steps {
            Some(known) if known != step => {
                return Err(bad(format!("state.{i}.step ({}): {step}, but {known} for those before it", s.name)));
            }
            _ => steps = Some(step),
        }
    }
    steps.ok_or_else(|| bad("no optimiser state in it".into()))
}

/// Number of steps of parameter `i`, a number or a tensor of one.
fn step(file: &TensorFile, i: usize) -> Result<u64> {
    let name = format!("state.{i}.step");
    let value = match (file.numbers.get(&name), file.tensors.get(&name)) {
        (Some(&n), _) => Some(n),
        (None, Some(t)) if t.len() == 1 => file.f32s(t).map(|v| f64::from(v[0])),
        _ => None,
    };
    let whole = value.filter(|v| *v >= 0.0 && v.fract() == 0.0 && *v < f64::from(u32::MAX));
    let what = || Error::checkpoint(&file.path, format!("{name}: expected a number of steps, found {value:?}"));
    whole.map(|v| v as u64).ok_or_else(what)
}

/// Writes the state of AdamW after `step` steps as `optimizer.state_dict()` of PyTorch: the flat `moments` lie at `slots`.
///
/// # Errors
/// [`Error::Config`] for more than a `.pt` holds, [`Error::Io`]; nothing is left at `path` then.
pub fn write(path: &Path, slots: &[Slot], moments: &[Vec<f32>; 2], step: u64, t: &TrainConfig) -> Result<()> {
    let len = |s: &Slot| s.dims.iter().product::<usize>();
    let sizes: Vec<usize> = slots.iter().flat_map(|s| [len(s); 2]).collect();
    let values = |i: usize| {
        let s = &slots[i / 2];
        to_reference(&moments[i % 2][s.offset..s.offset + len(s)], s.dims)
    };
    write_archive(path, &state_dict(slots, step, t), &sizes, &values)
}

/// `{"state": {i: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [{.., "params": [0, 1, ..]}]}`.
fn state_dict(slots: &[Slot], step: u64, t: &TrainConfig) -> Pickle {
    let mut p = Pickle(b"\x80\x02}(".to_vec());
    p.text("state");
    p.0.extend_from_slice(b"}(");
    for (i, s) in slots.iter().enumerate() {
        p.number(i);
        p.0.extend_from_slice(b"}(");
        p.text("step");
        p.number(step as usize);
        for (k, name) in ["exp_avg", "exp_avg_sq"].into_iter().enumerate() {
            p.text(name);
            p.tensor(2 * i + k, &reference_dims(s));
        }
        p.0.push(b'u');
    }
    p.0.push(b'u');
    p.text("param_groups");
    p.0.extend_from_slice(b"](}(");
    for (name, x) in [("lr", t.lr_at(step)), ("eps", 1e-8), ("weight_decay", t.weight_decay)] {
        p.text(name);
        p.float(x);
    }
    p.text("betas");
    p.float(0.9);
    p.float(0.999);
    p.0.push(b'\x86');
    p.text("amsgrad");
    p.0.push(b'\x89');
    p.text("params");
    p.0.extend_from_slice(b"](");
    (0..slots.len()).for_each(|i| p.number(i));
    p.0.extend_from_slice(b"eueu.");
    p
}
