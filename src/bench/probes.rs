//! `bench ceilings`: what a GPU does at most, and what no ceiling tells: caches, the gaps of a graph, the cost of a tile, the clock
//! under load, and a corner of its instructions. Each answer decides how kernels are written.
//!
//! On an emulated GPU everything runs at small sizes and no time is shown; on the processor there are the two ceilings alone.

use super::ceilings::Ceilings;
use super::gpu_rates::Rates;
use super::record::{Cell, Record, Table};
use crate::args;
use crate::device::Device;
use crate::device::driver::{DeviceInfo, Driver, Launch};
use crate::error::Result;
use crate::ops::conv2d::ConvShape;
use crate::ops::conv2d::launch::{FULL, Forward, Types, forward};
use half::bf16;

/// Measures all of it. `sustained_s`: seconds of products without a pause.
///
/// # Errors
/// Those of the driver.
pub fn probe(record: &mut Record, device: &Device, ceilings: &Ceilings, sustained_s: f64) -> Result<()> {
    let mut t = Answers(Table::new("ceilings, and what no ceiling tells"));
    t.row("multiply-adds", ceilings.gflops.into(), "GFLOP/s", ceilings.instructions);
    t.row("copy", ceilings.gb_s.into(), "GB/s", "read and written, beyond the caches");
    if let Device::Cuda(gpu) = device {
        let driver = gpu.driver();
        let info = driver.info()?;
        let probe = Probe { rates: Rates { driver, info: &info }, driver, info: &info, emulated: driver.is_emulated() };
        probe.all(&mut t, sustained_s)?;
    }
    record.add(t.0);
    Ok(())
}

/// Rows of a question with its answer.
struct Answers(Table);

impl Answers {
    fn row(&mut self, what: &str, value: Cell, unit: &str, note: impl Into<String>) {
        self.0.row(vec![("what", what.into()), ("value", value), ("unit", unit.into()), ("note", note.into().into())]);
    }
}

struct Probe<'a> {
    rates: Rates<'a>,
    driver: &'a Driver,
    info: &'a DeviceInfo,
    emulated: bool,
}

impl Probe<'_> {
    fn all(&self, t: &mut Answers, sustained_s: f64) -> Result<()> {
        let hopper = self.info.compute_capability.0 == 9;
        for mb in [16, 33, 64, 256] {
            let note =
                format!("{mb} MB, read again and again; the second-level cache has {} MB", self.info.l2_bytes >> 20);
            t.row("read", (self.read(mb)? / 1e9).into(), "GB/s", note);
        }
        let plain = Launch::new([1, 1, 1], [32, 1, 1]);
        t.row(
            "gap between the nodes of a graph",
            self.nodes("node", plain)?.into(),
            "us",
            "kernels of one warp, one after the other",
        );
        if self.info.compute_capability.0 >= 9 {
            let us = self.nodes("node_overlapped", plain.overlapping())?;
            t.row("the same, started early", us.into(), "us", "programmatic dependent launch");
        }
        let (fixed_us, tflops) = self.tile()?;
        let note = "1x1 convolution, one 128x128 tile per multiprocessor: its time at no products, by 4 lengths";
        t.row("fill and drain of a tile", fixed_us.into(), "us", note);
        t.row("rate of such a tile", tflops.into(), "TFLOP/s", "by the same line");
        if hopper {
            let (first, last) = self.sustained(sustained_s)?;
            t.row("wgmma, first second", first.into(), "TFLOP/s", format!("of {sustained_s} without a pause"));
            t.row("wgmma, last second", last.into(), "TFLOP/s", "the clocks of the whole run stand below");
            for (name, own) in [("0", false), ("the row modulo 8", true)] {
                let right = self.shifted(own)?;
                let note = format!("descriptor's base offset {name}: products right from rows {right:?} of 0 to 7");
                t.row("wgmma from a shifted row", right.len().into(), "of 8", note);
            }
        }
        Ok(())
    }

    /// The time, or NaN of an emulated device.
    fn seconds(&self, launch: impl Fn() -> Result<()>) -> Result<f64> {
        if self.emulated { launch().map(|()| f64::NAN) } else { self.rates.seconds(launch) }
    }

    /// Bytes per second of reading the same `mb` megabytes again and again.
    fn read(&self, mb: usize) -> Result<f64> {
        let bytes = if self.emulated { 1 << 16 } else { mb * 1_000_000 };
        let (src, grid) = (self.driver.alloc_zeroed(bytes)?, self.rates.striding());
        let out = self.driver.alloc(4 * grid.grid[0] as usize)?;
        let words = (bytes / 16) as i64;
        // The first reading, which seconds() does not count, brings it in.
        Ok(bytes as f64 / self.seconds(|| self.driver.launch("read_16", grid, args![out.ptr(), src.ptr(), words]))?)
    }

    /// Microseconds per node of a graph of small kernels, each after the one before.
    fn nodes(&self, kernel: &str, launch: Launch) -> Result<f64> {
        let count = if self.emulated { 10 } else { 1000 };
        let x = self.driver.alloc_zeroed(128)?;
        let start = || self.driver.launch(kernel, launch, args![x.ptr()]);
        let graph = self.driver.capture(|| (0..count).try_for_each(|_| start()))?;
        let seconds = self.seconds(|| self.driver.replay(&graph))?;
        Ok(1e6 * seconds / f64::from(count))
    }

    /// Microseconds of a launch of one tile per multiprocessor without any product, and TFLOP/s of the products, from a line
    /// through the times at several lengths.
    fn tile(&self) -> Result<(f64, f64)> {
        let (n, repeat) = if self.emulated { (1, 1) } else { (self.info.multiprocessors, 20) };
        let lengths = if self.emulated { [32, 64, 96, 128] } else { [256, 512, 1024, 2048] };
        let shape = |ca| ConvShape { n, h: 8, w: 16, ca, cb: 0, oc: 128, k: 1, stride: 1, pad: 0, upsample: false };
        let largest = shape(lengths[3]);
        let buffers = [largest.in_pixels() * largest.ca, largest.weights(), largest.out_pixels() * largest.oc]
            .map(|len| self.driver.alloc(2 * len));
        let [x, w, y] = buffers;
        let (x, w, y) = (x?, w?, y?);
        for buffer in [&x, &w] {
            self.driver.fill(buffer.ptr(), 0x3c, buffer.bytes())?; // bf16 0x3c3c: 0.0115
        }
        let mut points = Vec::new();
        for ca in lengths {
            let (s, t) = (shape(ca), Types { half: true, half_weights: true });
            let f = Forward { y: y.ptr(), x: [x.ptr(), Default::default()], w: w.ptr(), ..Forward::default() };
            let one = || forward(self.driver, &s, t, FULL, &f, Default::default());
            let graph = self.driver.capture(|| (0..repeat).try_for_each(|_| one()))?;
            points.push((ca as f64, self.seconds(|| self.driver.replay(&graph))? / f64::from(repeat)));
        }
        let (fixed, slope) = line(&points);
        Ok((1e6 * fixed, 2.0 * (largest.out_pixels() * largest.oc) as f64 / slope / 1e12))
    }

    /// TFLOP/s of the first and of the last second of wgmma without a pause.
    fn sustained(&self, seconds: f64) -> Result<(f64, f64)> {
        let out = self.driver.alloc(4 * self.info.multiprocessors)?;
        if self.emulated {
            self.rates.start_wgmma(out.ptr(), 1)?;
            return Ok((f64::NAN, f64::NAN));
        }
        let rounds = 1 << 14;
        let per_launch = self.rates.seconds(|| self.rates.start_wgmma(out.ptr(), rounds))?;
        let per_second = (1.0 / per_launch).ceil() as usize;
        let mut events = vec![self.driver.record()?];
        for _ in 0..seconds.ceil().max(1.0) as usize {
            (0..per_second).try_for_each(|_| self.rates.start_wgmma(out.ptr(), rounds))?;
            events.push(self.driver.record()?);
        }
        let tflops = |i: usize| {
            let ms = events[i + 1].elapsed_ms(&events[i])?;
            Ok(self.rates.wgmma_flops(rounds) * per_second as f64 / ms / 1e9)
        };
        Ok((tflops(0)?, tflops(events.len() - 2)?))
    }

    /// The rows from which wgmma multiplies rightly; `own`: with the row modulo 8 as the descriptor's base offset, else with 0.
    fn shifted(&self, own: bool) -> Result<Vec<usize>> {
        let digit = |i: usize, m: usize| (i * m % 13) as f32 - 6.0;
        let numbers = |len: usize, m: usize| (0..len).map(|i| bf16::from_f32(digit(i, m))).collect::<Vec<_>>();
        let (a, b) = (numbers(72 * 64, 7), numbers(64 * 64, 5));
        let [x, y, c] = [2 * a.len(), 2 * b.len(), 4 * 64 * 64].map(|bytes| self.driver.alloc(bytes));
        let (x, y, c) = (x?, y?, c?);
        self.driver.write(x.ptr(), &a)?;
        self.driver.write(y.ptr(), &b)?;
        let launch = Launch::new([1, 1, 1], [128, 1, 1]).shared((72 + 64) * 128);
        let mut right = Vec::new();
        for shift in 0..8usize {
            let base = if own { shift as i32 } else { 0 };
            self.driver.launch("wgmma_shifted", launch, args![c.ptr(), x.ptr(), y.ptr(), shift as i32, base])?;
            let mut got = vec![0.0f32; 64 * 64];
            self.driver.read(c.ptr(), &mut got)?;
            let product = |i: usize| {
                (0..64).map(|k| digit((i / 64 + shift) * 64 + k, 7) * digit(i % 64 * 64 + k, 5)).sum::<f32>()
            };
            if (0..64 * 64).all(|i| got[i] == product(i)) {
                right.push(shift);
            }
        }
        Ok(right)
    }
}

/// Value at 0 and slope of the line of least squares through `points`.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    let (x, y) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>()
        / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
    (y - slope * x, slope)
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_line_is_found_through_its_points() {
        let (at_0, slope) = line(&[(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]);
        assert!((at_0 - 3.0).abs() < 1e-12 && (slope - 2.0).abs() < 1e-12);
    }
}
