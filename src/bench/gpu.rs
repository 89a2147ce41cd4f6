//! What the measured GPU is and how it ran: figures under different clocks, or while others used it, are not comparable.
//!
//! The driver's tool `nvidia-smi` is asked twice a second while a benchmark runs. Where it is missing, the record says nothing of
//! clocks.

use crate::device::Device;
use crate::error::Result;
use serde::Serialize;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

/// The device of a record.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Name as the vendor gives it.
    pub name: String,
    /// Such as "9.0".
    pub compute_capability: String,
    /// CUDA version that the driver supports, such as "13.0".
    pub driver: String,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Second-level cache.
    pub l2_bytes: usize,
    /// Memory.
    pub total_bytes: usize,
    /// The kernels ran as C++ on the processor: nothing was timed.
    pub emulated: bool,
}

impl Gpu {
    /// The GPU behind `device`; None for the processor.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn of(device: &Device) -> Result<Option<Self>> {
        let Device::Cuda(gpu) = device else { return Ok(None) };
        let (info, emulated) = (gpu.driver().info()?, gpu.driver().is_emulated());
        let (major, minor) = info.compute_capability;
        Ok(Some(Gpu {
            name: info.name,
            compute_capability: format!("{major}.{minor}"),
            driver: format!("{}.{}", info.driver_version / 1000, info.driver_version % 1000 / 10),
            multiprocessors: info.multiprocessors,
            l2_bytes: info.l2_bytes,
            total_bytes: info.total_bytes,
            emulated,
        }))
    }
}

/// What one answer of `nvidia-smi` says.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    sm_mhz: f64,
    memory_mhz: f64,
    power_w: f64,
    temperature_c: f64,
    /// Bits of `clocks_event_reasons.active`: 1 is an idle GPU.
    reasons: u64,
}

const QUERY: &str = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active";

/// `1980, 2619, 512.30, 61, 0x0000000000000000`; None for a line of another form.
fn sample(line: &str) -> Option<Sample> {
    let mut fields = line.split(',').map(str::trim);
    let mut number = || fields.next()?.parse::<f64>().ok();
    let (sm_mhz, memory_mhz, power_w, temperature_c) = (number()?, number()?, number()?, number()?);
    let reasons = u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok()?;
    Some(Sample { sm_mhz, memory_mhz, power_w, temperature_c, reasons })
}

/// Least, middle and largest value of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// Least.
    pub min: f64,
    /// Middle.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Range {
    fn of(values: &[f64]) -> Self {
        let end = |pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick).unwrap_or(f64::NAN);
        Range { min: end(f64::min), median: super::timing::median(values), max: end(f64::max) }
    }
}

/// How the GPU ran while something was measured, over the answers at which it was not idle.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Clocks {
    /// Answers taken.
    pub samples: usize,
    /// Clock of the multiprocessors.
    pub sm_mhz: Range,
    /// Clock of the memory.
    pub memory_mhz: Range,
    /// Power drawn.
    pub power_w: Range,
    /// Temperature.
    pub temperature_c: Range,
    /// Bits of all reasons for a lower clock that were given.
    pub reasons: String,
}

/// A clock that moved by more than this share of itself makes two figures incomparable.
pub const STEADY: f64 = 0.05;

impl Clocks {
    fn of(samples: &[Sample]) -> Option<Self> {
        let busy: Vec<Sample> = samples.iter().copied().filter(|s| s.reasons & 1 == 0).collect();
        if busy.is_empty() {
            return None;
        }
        let range = |f: fn(&Sample) -> f64| Range::of(&busy.iter().map(f).collect::<Vec<_>>());
        Some(Clocks {
            samples: busy.len(),
            sm_mhz: range(|s| s.sm_mhz),
            memory_mhz: range(|s| s.memory_mhz),
            power_w: range(|s| s.power_w),
            temperature_c: range(|s| s.temperature_c),
            reasons: format!("{:#x}", busy.iter().fold(0, |all, s| all | s.reasons)),
        })
    }

    /// What a reader must know before comparing: the clock moved. None if it stood.
    pub fn warning(&self) -> Option<String> {
        let r = self.sm_mhz;
        ((r.max - r.min) > STEADY * r.max).then(|| {
            format!(
                "the clock of the multiprocessors moved between {:.0} and {:.0} MHz (reasons {}): these times are of no one clock",
                r.min, r.max, self.reasons
            )
        })
    }
}

/// Watches a GPU until it is stopped.
pub struct Watch {
    child: Child,
    reader: JoinHandle<Vec<Sample>>,
}

impl Watch {
    /// Starts watching; None where there is no `nvidia-smi`, or `device` is no GPU.
    pub fn start(device: &Device, ordinal: usize) -> Option<Self> {
        matches!(device, Device::Cuda(gpu) if !gpu.driver().is_emulated()).then_some(())?;
        // Drivers before 535 call the events throttling.
        let older = QUERY.replace("event", "throttle");
        let known = smi(ordinal, QUERY).output().ok()?.status.success();
        let mut child = smi(ordinal, if known { QUERY } else { &older })
            .arg("--loop-ms=500")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let lines =
            |out: ChildStdout| BufReader::new(out).lines().map_while(|l| l.ok()).filter_map(|l| sample(&l)).collect();
        let out = child.stdout.take()?;
        Some(Watch { child, reader: std::thread::spawn(move || lines(out)) })
    }

    /// Stops; how the GPU ran, or None if it did not answer.
    pub fn stop(mut self) -> Option<Clocks> {
        // A child that has ended already is as good as one that is ended here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        Clocks::of(&self.reader.join().unwrap_or_default())
    }
}

fn smi(ordinal: usize, query: &str) -> Command {
    let mut command = Command::new("nvidia-smi");
    command.args(["--id", &visible(ordinal), &format!("--query-gpu={query}"), "--format=csv,noheader,nounits"]);
    command
}

/// Name for `nvidia-smi` of the GPU that CUDA calls `ordinal`: an entry of `CUDA_VISIBLE_DEVICES` if that is set.
fn visible(ordinal: usize) -> String {
    let list = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    list.split(',')
        .nth(ordinal)
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .map_or_else(|| ordinal.to_string(), str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_idle_ones_left_out() {
        let lines = [
            "345, 2619, 70.10, 30, 0x0000000000000001",
            "1980, 2619, 512.30, 61, 0x0000000000000000",
            "1755, 2619, 699.00, 66, 0x0000000000000004",
            "Unable to determine the device handle",
            "[N/A], 2619, 1, 1, 0x0",
        ];
        let samples: Vec<Sample> = lines.iter().filter_map(|l| sample(l)).collect();
        assert_eq!(samples.len(), 3);
        let clocks = Clocks::of(&samples).unwrap();
        assert_eq!((clocks.samples, clocks.sm_mhz.min, clocks.sm_mhz.max), (2, 1755.0, 1980.0));
        assert_eq!((clocks.power_w.max, clocks.reasons.as_str()), (699.0, "0x4"));
        assert!(clocks.warning().is_some_and(|w| w.contains("1755") && w.contains("1980")));
        assert_eq!(Clocks::of(&samples[1..2]).unwrap().warning(), None);
        assert_eq!(Clocks::of(&samples[..1]), None);
    }
}
