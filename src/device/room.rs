//! Memory that a plan needs and that a device has left, told before anything is allocated.

use super::{Device, Plan};
use crate::error::{Error, Result};
use crate::graph::Region;
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
    /// When the device does not answer.
    pub fn room(&self, plan: &Plan) -> Result<Room> {
        let held = |r: Region| match self {
            _ if r.of_plan() => 0,
            Device::Cpu(d) => d.held(r),
            Device::Cuda(d) => d.held(r),
        };
        let there: usize = Region::ALL.iter().map(|&r| held(r).min(plan.graph.region_bytes(r))).sum();
        let (free, device) = match self {
            Device::Cpu(_) => (free_memory(), "the processor".into()),
            Device::Cuda(d) => d.driver().info().map(|info| (Some(info.free_bytes), info.name))?,
        };
        Ok(Room { need: plan.bytes() - there, free, device })
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
        (flag, n): (&str, usize),
        plan_of: impl Fn(usize) -> Result<Plan>,
    ) -> Result<()> {
        let room = self.room(plan)?;
        if room.is_enough() {
            return Ok(());
        }
        let smaller = if n > 1 { self.fitting(n.div_ceil(2), plan_of)? } else { None };
        Err(Error::Device(match smaller {
            Some((n, fits)) => format!("{what} needs {room}: {flag} {n} would fit ({})", bytes(fits.need)),
            None => format!("{what} needs {room}, too little even for {flag} 1: use another --device"),
        }))
    }

    /// The first of `n`, half of it, and so on for whose plan there is room, and what that needs; none if 1 is too many.
    ///
    /// # Errors
    /// Those of `plan_of`, and when the device does not answer.
    pub fn fitting(&self, mut n: usize, plan_of: impl Fn(usize) -> Result<Plan>) -> Result<Option<(usize, Room)>> {
        loop {
            let room = self.room(&plan_of(n)?)?;
            match room.is_enough() {
                true => return Ok(Some((n, room))),
                false if n <= 1 => return Ok(None),
                false => n = n.div_ceil(2),
            }
        }
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
