//! Memory that a plan needs and that a device has left, told before anything is allocated.

use super::{Device, Plan};
use crate::error::{Error, Result};
use crate::graph::{ALIGN, Region};
use crate::ops::Operation;
use std::fmt::{Display, Formatter};

/// What a plan needs on a device, and what is free there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes to be allocated.
    pub need: usize,
    /// Bytes that are free, where the system tells.
    pub free: Option<usize>,
    /// The device.
    pub device: String,
}

impl Room {
    /// Whether the plan can be bound, as far as is known.
    pub fn is_enough(&self) -> bool {
        self.free.is_none_or(|free| self.need <= free)
    }
}

/// `4.1 GiB of memory on the processor, 2.0 GiB are free`.
impl Display for Room {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of memory on {}", bytes(self.need), self.device)?;
        self.free.map_or(Ok(()), |free| write!(f, ", {} are free", bytes(free)))
    }
}

/// `12.3 MiB`.
pub fn bytes(n: usize) -> String {
    let (mut x, mut unit) = (n as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if x < 1024.0 {
            break;
        }
        (x, unit) = (x / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{x:.1} {unit}") }
}

impl Device {
    /// What `plan` needs here beyond the model's regions that are there already, and what is free.
    ///
    /// # Errors
    /// When the device does not answer, or has no kernel for a step.
    pub fn room(&self, plan: &Plan) -> Result<Room> {
        let regions = |held: &dyn Fn(Region) -> usize| -> usize {
            let more = |&r: &Region| plan.graph.region_bytes(r).saturating_sub(if r.of_plan() { 0 } else { held(r) });
            Region::ALL.iter().map(more).sum()
        };
        Ok(match self {
            Device::Cpu(d) => Room {
                need: plan.layout.bytes + regions(&|r| d.held(r)),
                free: free_memory(),
                device: "the processor".into(),
            },
            Device::Cuda(d) => {
                let info = d.driver().info()?;
                let mut tables = 0;
                for step in &plan.graph.steps {
                    tables += step.op.prepare_cuda(&plan.graph)?.len().next_multiple_of(ALIGN);
                }
                let workspace = plan.graph.steps.iter().map(|s| s.op.workspace(&plan.graph)).max().unwrap_or(0);
                let need = plan.layout.bytes + tables + workspace + regions(&|r| d.held(r));
                Room { need, free: Some(info.free_bytes), device: info.name }
            }
        })
    }

    /// Refuses the plan of `what` for `n` images at a time if it needs more memory than is free; `plan_of` gives that for
    /// another number, which `flag` sets.
    ///
    /// # Errors
    /// [`Error::Device`] with need, rest and the number that would fit.
    pub fn check_room(
        &self,
        what: &str,
        plan: &Plan,
        (flag, mut n): (&str, usize),
        plan_of: impl Fn(usize) -> Result<Plan>,
    ) -> Result<()> {
        let room = self.room(plan)?;
        if room.is_enough() {
            return Ok(());
        }
        while n > 1 {
            n = n.div_ceil(2);
            let smaller = self.room(&plan_of(n)?)?;
            if smaller.is_enough() {
                let fits = bytes(smaller.need);
                return Err(Error::Device(format!("{what} needs {room}: {flag} {n} would fit ({fits})")));
            }
        }
        Err(Error::Device(format!("{what} needs {room}, too little even for {flag} 1: use another --device")))
    }
}

/// Memory that new allocations can have, where the system tells.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!([bytes(1), bytes(1536), bytes(5 << 30)], ["1 B", "1.5 KiB", "5.0 GiB"]);
    }
}
