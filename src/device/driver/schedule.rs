//! How an emulated launch is played out, and what its accesses cost.

use crate::error::{Error, Result};

/// Order in which the threads of a block, and the blocks, run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Order {
    /// Thread 0 first, each until it must wait.
    Forward = 0,
    /// The last one first.
    Reverse = 1,
    /// As the seed says, with large skews between warps.
    Random = 2,
}

/// When an asynchronous copy lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Copies {
    /// When it is started.
    Eager = 0,
    /// As late as the program allows.
    Lazy = 1,
    /// As the seed says.
    Random = 2,
}

/// How a launch is played out. No result may depend on it; tests run kernels under several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Order of threads and blocks.
    pub order: Order,
    /// Fate of asynchronous copies.
    pub copies: Copies,
    /// Seed of the random choices.
    pub seed: u64,
    /// Host threads; 0 takes all cores.
    pub workers: u32,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { order: Order::Forward, copies: Copies::Lazy, seed: 0, workers: 0 }
    }
}

impl Schedule {
    /// The schedules that together found every planted bug: forward and reverse, each eager and lazy, and random ones.
    pub fn sweep() -> Vec<Schedule> {
        let mut all = Vec::new();
        for order in [Order::Forward, Order::Reverse] {
            for copies in [Copies::Eager, Copies::Lazy] {
                all.push(Schedule { order, copies, ..Schedule::default() });
            }
        }
        all.extend((1..=3).map(|seed| Schedule { order: Order::Random, copies: Copies::Random, seed, workers: 0 }));
        all
    }
}

/// What the accesses of a launch cost the memory system. All figures but the shared ones are of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Traffic {
    /// Bytes that the threads asked to read; a value that a whole warp reads counts 32 times.
    pub requested_read: u64,
    /// Bytes that the threads asked to write.
    pub requested_written: u64,
    /// 32-byte sectors that the reads of each warp touch, summed.
    pub read_sectors: u64,
    /// 32-byte sectors that the writes of each warp touch, summed.
    pub write_sectors: u64,
    /// Sectors the same accesses would touch if each were contiguous and aligned.
    pub ideal_sectors: u64,
    /// Bytes read after a 32 KiB cache per block: the figure to hold against a declared cost.
    pub read_bytes: u64,
    /// Bytes written after a 32 KiB cache per block.
    pub written_bytes: u64,
    /// Bytes of the distinct sectors read by the whole launch.
    pub read_footprint: u64,
    /// Bytes of the distinct sectors written by the whole launch.
    pub written_footprint: u64,
    /// Passes through shared memory.
    pub shared_wavefronts: u64,
    /// Passes through shared memory if there were no bank conflicts.
    pub shared_ideal: u64,
}

impl Traffic {
    /// Bytes that the memory system moves, read and written.
    pub fn bytes(&self) -> u64 {
        self.read_bytes + self.written_bytes
    }

    /// Passes through shared memory lost to bank conflicts.
    pub fn bank_conflicts(&self) -> u64 {
        self.shared_wavefronts - self.shared_ideal
    }

    /// Sectors touched for each one needed: 1 is perfectly coalesced, 8 is one 4-byte word per sector.
    pub fn sectors_per_ideal(&self) -> f64 {
        (self.read_sectors + self.write_sectors) as f64 / self.ideal_sectors.max(1) as f64
    }

    /// Holds the bytes moved against an op's declared cost.
    ///
    /// # Errors
    /// [`Error::Device`] with both figures when more than 1.05 times the declared bytes move.
    pub fn within(&self, what: &str, declared_bytes: u64) -> Result<()> {
        let ratio = self.bytes() as f64 / declared_bytes.max(1) as f64;
        if ratio <= 1.05 {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{what}: moves {} bytes ({} read, {} written), {ratio:.3} times the declared {declared_bytes}; at most 1.05",
            self.bytes(),
            self.read_bytes,
            self.written_bytes
        )))
    }

    /// Adds the figures of another launch.
    pub fn add(&mut self, other: &Traffic) {
        self.requested_read += other.requested_read;
        self.requested_written += other.requested_written;
        self.read_sectors += other.read_sectors;
        self.write_sectors += other.write_sectors;
        self.ideal_sectors += other.ideal_sectors;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.read_footprint += other.read_footprint;
        self.written_footprint += other.written_footprint;
        self.shared_wavefronts += other.shared_wavefronts;
        self.shared_ideal += other.shared_ideal;
    }
}

/// One launch and what it cost.
#[derive(Debug, Clone)]
pub struct LaunchTraffic {
    /// The step set by [`super::Driver::set_step`], or empty.
    pub step: String,
    /// Name of the kernel.
    pub kernel: String,
    /// What its accesses cost.
    pub traffic: Traffic,
}
