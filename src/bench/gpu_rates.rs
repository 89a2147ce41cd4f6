//! What a GPU can do at most, measured now: copying beyond its caches, and matrix products that touch registers and shared memory only.
//! [`super::probes`] asks for more.

use crate::args;
use crate::device::driver::{DeviceInfo, Driver, Event, Launch, Ptr};
use crate::error::Result;

/// Turns of the inner loop of the products.
const ROUNDS: i32 = 4096;

/// Rates of a GPU: the best of a few timed runs after a warm-up.
pub struct Rates<'a> {
    /// How the GPU is reached.
    pub driver: &'a Driver,
    /// What it is.
    pub info: &'a DeviceInfo,
}

impl Rates<'_> {
    /// Best time of `launch` in seconds.
    pub(super) fn seconds(&self, launch: impl Fn() -> Result<()>) -> Result<f64> {
        launch()?;
        let mut best = f64::INFINITY;
        for _ in 0..10 {
            let start: Event = self.driver.record()?;
            launch()?;
            best = best.min(self.driver.record()?.elapsed_ms(&start)? * 1e-3);
        }
        Ok(best)
    }

    /// Bytes per second of a copy far larger than the second-level cache, read and write together.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn copy(&self) -> Result<f64> {
        let bytes = (self.info.l2_bytes * 8).max(64 << 20).min(self.info.free_bytes / 4) / 16 * 16;
        let (src, dst) = (self.driver.alloc_zeroed(bytes)?, self.driver.alloc(bytes)?);
        let words = (bytes / 16) as i64;
        let time =
            self.seconds(|| self.driver.launch("copy_16", self.striding(), args![dst.ptr(), src.ptr(), words]))?;
        Ok(2.0 * bytes as f64 / time)
    }

    /// A grid that fills the GPU and strides over its items.
    pub(super) fn striding(&self) -> Launch {
        Launch::new([self.info.multiprocessors as u32 * 16, 1, 1], [256, 1, 1])
    }

    /// FLOPs per second of mma.sync: 8 warps in each of 4 blocks per multiprocessor.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn mma(&self) -> Result<f64> {
        let blocks = self.info.multiprocessors * 4;
        let out = self.driver.alloc(4 * blocks)?;
        let grid = Launch::new([blocks as u32, 1, 1], [256, 1, 1]);
        let time = self.seconds(|| self.driver.launch("mma_rate", grid, args![out.ptr(), ROUNDS]))?;
        Ok((blocks * 8 * 16) as f64 * 2.0 * 2048.0 * f64::from(ROUNDS) / time)
    }

    /// FLOPs per second of wgmma: 2 warpgroups in one block per multiprocessor.
    ///
    /// # Errors
    /// Those of the driver; where there is no wgmma, that of the launch.
    pub fn wgmma(&self) -> Result<f64> {
        let out = self.driver.alloc(4 * self.info.multiprocessors)?;
        let time = self.seconds(|| self.start_wgmma(out.ptr(), ROUNDS))?;
        Ok(self.wgmma_flops(ROUNDS) / time)
    }

    /// Starts `rounds` turns of the products that [`Self::wgmma`] times. out: (multiprocessors) f32.
    pub(super) fn start_wgmma(&self, out: Ptr, rounds: i32) -> Result<()> {
        let blocks = self.info.multiprocessors as u32;
        let grid = Launch::new([blocks, 1, 1], [256, 1, 1]).shared((2 * 64 + 256) * 128);
        self.driver.launch("wgmma_rate", grid, args![out, rounds])
    }

    /// FLOPs of that.
    pub(super) fn wgmma_flops(&self, rounds: i32) -> f64 {
        (self.info.multiprocessors * 2 * 4) as f64 * 2.0 * (64 * 256 * 16) as f64 * f64::from(rounds)
    }
}
