//! How a time is taken: warm-up, then blocks of equal numbers of calls until enough of them ran on a quiet machine.
//!
//! A processor's work is timed by its clock, a GPU's by events before and after a block, so that the host may run ahead. The
//! times of an emulated GPU say nothing: they are NaN, which tables show as "-" and records as null.

use super::load::{Load, QUIET};
use crate::device::Device;
use crate::device::driver::Driver;
use crate::error::Result;
use serde::Serialize;
use std::time::Instant;

/// How long to measure.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Effort {
    /// Least seconds of one block.
    pub block_s: f64,
    /// Quiet blocks wanted.
    pub blocks: usize,
    /// Seconds after which no new block starts.
    pub limit_s: f64,
}

impl Default for Effort {
    fn default() -> Self {
        Effort { block_s: 0.25, blocks: 9, limit_s: 12.0 }
    }
}

/// Who says how long work took.
#[derive(Clone)]
pub enum Clock {
    /// The processor's clock, from the start of a call to its end.
    Wall,
    /// Events on a GPU, before and after what a call started there.
    Events(Driver),
    /// Nobody: the GPU is emulated, every time is NaN.
    None,
}

impl Clock {
    /// The one that suits `device`.
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu(_) => Clock::Wall,
            Device::Cuda(gpu) if gpu.driver().is_emulated() => Clock::None,
            Device::Cuda(gpu) => Clock::Events(gpu.driver().clone()),
        }
    }

    /// Seconds of what `f` does or starts.
    ///
    /// # Errors
    /// Those of `f` and of the driver.
    pub fn time(&self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        match self {
            Clock::Wall => {
                let start = Instant::now();
                f().map(|()| start.elapsed().as_secs_f64())
            }
            Clock::Events(driver) => {
                let start = driver.record()?;
                f()?;
                Ok(driver.record()?.elapsed_ms(&start)? * 1e-3)
            }
            Clock::None => f().map(|()| f64::NAN),
        }
    }
}

/// Fewest blocks that a median is taken over.
pub const FEWEST: usize = 3;

/// Times per call over blocks, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timing {
    /// Median over the blocks.
    pub median: f64,
    /// Fastest block.
    pub min: f64,
    /// Slowest block.
    pub max: f64,
    /// Blocks that count: the quiet ones, or all of them if `busy`.
    pub blocks: usize,
    /// Calls in one block.
    pub calls: usize,
    /// Share of the cores that others used, median over the blocks that count; None where the system does not tell.
    pub foreign: Option<f64>,
    /// Others used the machine in all but a few blocks: the figures are not its speed.
    pub busy: bool,
}

/// One block of calls.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Block {
    /// Seconds per call.
    pub seconds: f64,
    /// Calls made.
    pub calls: usize,
    /// Share of the cores that others used meanwhile; None where the system does not tell.
    pub foreign: Option<f64>,
}

impl Block {
    /// Whether others left the machine alone.
    pub fn quiet(&self) -> bool {
        self.foreign.is_none_or(|f| f <= QUIET)
    }

    /// Calls `f` as often as given and takes the time. Who else uses the processor counts where the processor is measured.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn take(clock: &Clock, calls: usize, mut f: impl FnMut() -> Result<()>) -> Result<Self> {
        let before = Load::now();
        let seconds = clock.time(|| (0..calls).try_for_each(|_| f()))? / calls as f64;
        let foreign = if let Clock::Wall = clock { before.foreign(&Load::now()) } else { None };
        Ok(Block { seconds, calls, foreign })
    }
}

/// Calls `f` once or twice, not counted, and returns how many calls fill `block_s` seconds.
///
/// # Errors
/// Those of `f`.
pub fn calls_per_block(clock: &Clock, block_s: f64, mut f: impl FnMut() -> Result<()>) -> Result<usize> {
    let first = clock.time(&mut f)?;
    if first.is_nan() || first >= block_s {
        return Ok(1);
    }
    Ok(((block_s / clock.time(&mut f)?.max(1e-9)).ceil() as usize).max(1))
}

impl Timing {
    /// (max - min)/median.
    pub fn spread(&self) -> f64 {
        (self.max - self.min) / self.median
    }

    /// A single time, measured in another way than by blocks.
    pub fn one(seconds: f64) -> Self {
        Timing { median: seconds, min: seconds, max: seconds, blocks: 1, calls: 1, foreign: None, busy: false }
    }

    fn of(blocks: &[Block]) -> Self {
        let quiet: Vec<Block> = blocks.iter().copied().filter(Block::quiet).collect();
        let busy = quiet.len() < FEWEST;
        let used = if busy { blocks } else { &quiet };
        let seconds: Vec<f64> = used.iter().map(|b| b.seconds).collect();
        let foreign: Vec<f64> = used.iter().filter_map(|b| b.foreign).collect();
        Timing {
            median: median(&seconds),
            min: seconds.iter().copied().reduce(f64::min).unwrap_or(f64::NAN),
            max: seconds.iter().copied().reduce(f64::max).unwrap_or(f64::NAN),
            blocks: used.len(),
            calls: used[0].calls,
            foreign: (!foreign.is_empty()).then(|| median(&foreign)),
            busy,
        }
    }
}

/// The middle of `x`, or the mean of the two middle values; NaN of nothing.
pub fn median(x: &[f64]) -> f64 {
    let mut x = x.to_vec();
    x.sort_by(f64::total_cmp);
    match x.len() {
        0 => f64::NAN,
        n => (x[(n - 1) / 2] + x[n / 2]) / 2.0,
    }
}

/// Times `f` after a call that is not counted.
///
/// Blocks are taken until `effort.blocks` of them were quiet, at most `effort.limit_s` seconds, and at least [`FEWEST`]; one where
/// there is no clock.
///
/// # Errors
/// Those of `f`.
pub fn measure(clock: &Clock, effort: &Effort, mut f: impl FnMut() -> Result<()>) -> Result<Timing> {
    let calls = calls_per_block(clock, effort.block_s, &mut f)?;
    if let Clock::None = clock {
        return Ok(Timing::of(&[Block::take(clock, calls, f)?]));
    }
    let (begin, mut blocks, mut quiet) = (Instant::now(), Vec::new(), 0);
    while quiet < effort.blocks.max(1) && (blocks.len() < FEWEST || begin.elapsed().as_secs_f64() < effort.limit_s) {
        let block = Block::take(clock, calls, &mut f)?;
        quiet += usize::from(block.quiet());
        blocks.push(block);
    }
    Ok(Timing::of(&blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(of: &[(f64, f64)]) -> Vec<Block> {
        of.iter().map(|&(seconds, foreign)| Block { seconds, calls: 7, foreign: Some(foreign) }).collect()
    }

    #[test]
    fn only_quiet_blocks_count() {
        let t = Timing::of(&blocks(&[(1.0, 0.0), (9.0, 0.5), (3.0, 0.01), (2.0, 0.02)]));
        assert_eq!((t.median, t.min, t.max, t.blocks, t.calls, t.busy), (2.0, 1.0, 3.0, 3, 7, false));
        assert_eq!(t.foreign, Some(0.01));
        assert_eq!(t.spread(), 1.0);
    }

    #[test]
    fn too_few_quiet_blocks_make_it_busy() {
        let t = Timing::of(&blocks(&[(1.0, 0.0), (9.0, 0.5), (3.0, 0.3), (2.0, 0.02)]));
        assert_eq!((t.median, t.blocks, t.busy), (2.5, 4, true));
    }

    #[test]
    fn a_block_has_as_many_calls_as_fill_it() {
        let mut calls = 0;
        let effort = Effort { block_s: 0.02, blocks: 3, limit_s: 0.2 };
        let t = measure(&Clock::Wall, &effort, || {
            calls += 1;
            std::thread::sleep(std::time::Duration::from_millis(2));
            Ok(())
        })
        .unwrap();
        assert!(t.median >= 0.002 && t.calls >= 2 && calls >= 2 + FEWEST * t.calls, "{t:?} after {calls} calls");
    }

    #[test]
    fn without_a_clock_no_time_is_a_number() {
        let mut calls = 0;
        let t = measure(&Clock::None, &Effort::default(), || {
            calls += 1;
            Ok(())
        });
        let t = t.unwrap();
        assert!(t.median.is_nan() && t.min.is_nan() && t.max.is_nan() && t.spread().is_nan() && calls == 2, "{t:?}");
    }
}
