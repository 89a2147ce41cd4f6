//! What the driver hands out: device memory, pinned host memory, events and graphs.

use super::{CudaEvent, CudaGraph, Driver, Ptr};
#[cfg(feature = "emulator")]
use super::{EmulatedEvent, EmulatedGraph};
use crate::error::Result;

/// Device memory, freed when dropped.
pub struct Buffer {
    pub(super) ptr: Ptr,
    pub(super) bytes: usize,
    pub(super) driver: Driver,
}

impl Buffer {
    /// Where it begins.
    pub fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        each!(&self.driver, d => d.free(self.ptr));
    }
}

/// Page-locked host memory, freed when dropped.
pub struct Pinned {
    pub(super) host: *mut u8,
    pub(super) bytes: usize,
    pub(super) driver: Driver,
}

// SAFETY: the memory belongs to this value alone and is freed through a driver that may be used from any thread.
unsafe impl Send for Pinned {}

impl std::ops::Deref for Pinned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: alloc_host returned `bytes` initialised bytes, freed only in drop.
        unsafe { std::slice::from_raw_parts(self.host, self.bytes) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        each!(&self.driver, d => d.free_host(self.host, self.bytes));
    }
}

/// A place in the stream.
pub enum Event {
    /// On a GPU.
    Cuda(CudaEvent),
    /// On the emulator, where everything before it has already ended.
    #[cfg(feature = "emulator")]
    Emulated(EmulatedEvent),
}

impl Event {
    /// The event on a GPU.
    pub(super) fn cuda(&self) -> Option<&CudaEvent> {
        match self {
            Event::Cuda(e) => Some(e),
            #[cfg(feature = "emulator")]
            Event::Emulated(_) => None,
        }
    }

    /// Waits until the work before it has ended.
    ///
    /// # Errors
    /// `Error::Device` when some of it failed.
    pub fn wait(&self) -> Result<()> {
        match self {
            Event::Cuda(e) => e.wait(),
            #[cfg(feature = "emulator")]
            Event::Emulated(_) => Ok(()),
        }
    }

    /// Has the work before it ended?
    ///
    /// # Errors
    /// `Error::Device` when some of it failed.
    pub fn passed(&self) -> Result<bool> {
        match self {
            Event::Cuda(e) => e.passed(),
            #[cfg(feature = "emulator")]
            Event::Emulated(e) => Ok(e.passed()),
        }
    }

    /// Milliseconds of device time from `start` to this event; waits for it.
    ///
    /// # Errors
    /// `Error::Device` when the work between them failed.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f64> {
        match (self, start) {
            (Event::Cuda(end), Event::Cuda(start)) => end.elapsed_ms(start),
            #[cfg(feature = "emulator")]
            (Event::Emulated(end), Event::Emulated(start)) => Ok(end.elapsed_ms(start)),
            #[cfg(feature = "emulator")]
            _ => panic!("events of different kinds of driver"),
        }
    }
}

/// Recorded work, started as a whole by [`Driver::replay`].
pub enum Graph {
    /// A CUDA graph.
    Cuda(CudaGraph),
    /// A list of commands.
    #[cfg(feature = "emulator")]
    Emulated(EmulatedGraph),
}
