//! What CUDA kernels move on the emulator, held against what their ops declare.
//!
//! `moved` is sectors of 32 bytes after a 32 KiB cache per block, reads and writes; `footprint` counts each sector once per launch:
//! what memory must deliver at the least, the rest being the second-level cache's. Scratch memory between two kernels of an
//! op is moved and not declared.

use super::kernels::Kinds;
use super::record::Table;
use crate::device::Device;
use crate::device::driver::{LaunchTraffic, Traffic};
use crate::error::{Error, Result};
use crate::ops::Operation;

/// The kernels of one op.
struct Moved {
    kernels: Vec<String>,
    traffic: Traffic,
}

/// Runs the list of `kinds` once with the meter on; a row for each of its ops.
///
/// # Errors
/// What the emulator finds wrong; [`Error::Device`] for another device.
pub fn table(title: &str, kinds: &mut Kinds) -> Result<Table> {
    let log = metered(kinds)?;
    let mut table = Table::new(format!("{title}: bytes moved on the emulator against those declared"));
    let mut sum = [0.0; 3];
    for (i, kind) in kinds.kinds.iter().enumerate() {
        let (m, cost) = (of_step(&log, i), kind.op.cost(kinds.step.graph()));
        let declared = cost.read + cost.written;
        let (moved, footprint) =
            (m.traffic.bytes() as f64, (m.traffic.read_footprint + m.traffic.written_footprint) as f64);
        for (sum, bytes) in sum.iter_mut().zip([declared, moved, footprint]) {
            *sum += bytes * kind.count as f64;
        }
        table.row(vec![
            ("op", kind.op.name().into()),
            ("count", kind.count.into()),
            ("declared_kb", (declared / 1e3).into()),
            ("moved_kb", (moved / 1e3).into()),
            ("of_declared", (moved / declared).into()),
            ("footprint_of_declared", (footprint / declared).into()),
            ("sectors_per_ideal", m.traffic.sectors_per_ideal().into()),
            ("bank_conflicts", (m.traffic.bank_conflicts() as usize).into()),
            ("kernels", m.kernels.join(" ").into()),
            ("shape", kind.shape.as_str().into()),
        ]);
    }
    let [declared, moved, footprint] = sum;
    println!(
        "the step's ops, each as often as it occurs: {:.3} MB declared, {:.3} moved, {:.3} footprint",
        declared / 1e6,
        moved / 1e6,
        footprint / 1e6
    );
    Ok(table)
}

fn metered(kinds: &mut Kinds) -> Result<Vec<LaunchTraffic>> {
    let driver = match &kinds.step.device {
        Device::Cuda(gpu) => gpu.driver().clone(),
        Device::Cpu(_) => {
            return Err(Error::Device("traffic is metered on the emulator: use --device emulated".into()));
        }
    };
    let Some(emulator) = driver.emulator() else {
        return Err(Error::Device("traffic is metered on the emulator: use --device emulated".into()));
    };
    Ok(emulator.metered(|| kinds.step.run())?.1)
}

/// The launches of step `i` of the list, added up.
fn of_step(log: &[LaunchTraffic], i: usize) -> Moved {
    let mut all = Moved { kernels: Vec::new(), traffic: Traffic::default() };
    for launch in log.iter().filter(|l| l.step.starts_with(&format!("step {i} "))) {
        all.kernels.push(launch.kernel.clone());
        all.traffic.add(&launch.traffic);
    }
    all
}
