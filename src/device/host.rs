//! Copies between the host and a device that go on while the host works: page-locked memory, and marks in the device's work
//! that tell when it may be touched again.
//!
//! On the processor a copy has ended when it returns, and every mark has passed.

use super::{Device, PlanId};
use crate::device::driver::{Event, Pinned};
use crate::error::Result;
use crate::graph::{Graph, Place, Region, Val};

/// 64 bytes, so that numbers of every type are aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; 64]);

/// Host memory that a device copies from and to, zero at first.
pub struct HostBuffer(Memory);

enum Memory {
    /// Lines, and the bytes of them that are used.
    Plain(Vec<Line>, usize),
    /// Page-locked.
    Pinned(Pinned),
}

impl std::ops::Deref for HostBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Plain(lines, bytes) => &bytemuck::cast_slice(lines)[..*bytes],
            Memory::Pinned(memory) => memory,
        }
    }
}

impl std::ops::DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Plain(lines, bytes) => &mut bytemuck::cast_slice_mut(lines)[..*bytes],
            Memory::Pinned(memory) => memory,
        }
    }
}

/// A place in a device's work.
#[derive(Default)]
pub struct Mark(Option<Event>);

impl Mark {
    /// Has all the work before it ended?
    ///
    /// # Errors
    /// When some of it failed.
    pub fn passed(&self) -> Result<bool> {
        self.0.as_ref().map_or(Ok(true), Event::passed)
    }

    /// Waits until the work before it has ended.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn wait(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), Event::wait)
    }
}

/// Offset and bytes of `v`, which lies in `region`.
fn span(graph: &Graph, region: Region, v: Val) -> std::ops::Range<usize> {
    let value = &graph[v];
    match value.place {
        Place::Fixed(r, at) if r == region => at..at + value.bytes(),
        place => panic!("{} lies at {place:?}, not in {region:?}", value.name),
    }
}

/// The elements of `v` in a copy of its region.
pub fn part<'a, T: bytemuck::Pod>(graph: &Graph, region: Region, copy: &'a [u8], v: Val) -> &'a [T] {
    bytemuck::cast_slice(&copy[span(graph, region, v)])
}

/// The elements of `v` in a copy of its region, to be written.
pub fn part_mut<'a, T: bytemuck::Pod>(graph: &Graph, region: Region, copy: &'a mut [u8], v: Val) -> &'a mut [T] {
    bytemuck::cast_slice_mut(&mut copy[span(graph, region, v)])
}

impl Device {
    /// Host memory for copies: page-locked where that lets them go on beside the host's work.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn host(&self, bytes: usize) -> Result<HostBuffer> {
        Ok(HostBuffer(match self {
            Device::Cpu(_) => Memory::Plain(vec![Line([0; 64]); bytes.div_ceil(64)], bytes),
            Device::Cuda(d) => Memory::Pinned(d.driver().pinned(bytes)?),
        }))
    }

    /// Starts to write the plan's whole `region`, [`Region::Inputs`] or [`Region::State`]. `data` is not to be changed before
    /// a later mark has passed.
    ///
    /// # Errors
    /// When earlier work failed.
    pub fn start_write(&mut self, id: PlanId, region: Region, data: &HostBuffer) -> Result<()> {
        match self {
            Device::Cpu(d) => d.region_mut(id, region)[..data.len()].copy_from_slice(data),
            Device::Cuda(d) => d.start_write(d.region(id, region), data.pinned())?,
        }
        Ok(())
    }

    /// Starts to read the plan's whole `region`, [`Region::Inputs`] or [`Region::State`]. `out` holds it once a later mark has
    /// passed.
    ///
    /// # Errors
    /// When earlier work failed.
    pub fn start_read(&mut self, id: PlanId, region: Region, out: &mut HostBuffer) -> Result<()> {
        match self {
            Device::Cpu(d) => {
                let bytes = out.len();
                out.copy_from_slice(&d.region_mut(id, region)[..bytes]);
            }
            Device::Cuda(d) => d.start_read(d.region(id, region), out.pinned_mut())?,
        }
        Ok(())
    }

    /// Writes `data` at byte `at` of the model's data, beside the work, once `after` has passed; the mark passes when it is
    /// there. Runs that read it are held back by [`Device::hold_for`].
    ///
    /// # Errors
    /// When earlier work failed.
    pub fn write_data_aside(&mut self, at: usize, data: &HostBuffer, after: &Mark) -> Result<Mark> {
        match self {
            Device::Cpu(d) => {
                d.data_mut()[at..at + data.len()].copy_from_slice(data);
                Ok(Mark(None))
            }
            Device::Cuda(d) => d.write_data_aside(at, data.pinned(), after.0.as_ref()).map(|e| Mark(Some(e))),
        }
    }

    /// Lets what is started from now on begin when `mark` has passed; the host does not wait.
    ///
    /// # Errors
    /// When earlier work failed.
    pub fn hold_for(&mut self, mark: &Mark) -> Result<()> {
        match (self, &mark.0) {
            (Device::Cuda(d), Some(event)) => d.driver().wait_for(event),
            _ => Ok(()),
        }
    }

    /// Marks the end of what has been started so far.
    ///
    /// # Errors
    /// When earlier work failed.
    pub fn mark(&self) -> Result<Mark> {
        match self {
            Device::Cpu(_) => Ok(Mark(None)),
            Device::Cuda(d) => Ok(Mark(Some(d.driver().record()?))),
        }
    }
}

impl HostBuffer {
    fn pinned(&self) -> &Pinned {
        match &self.0 {
            Memory::Pinned(memory) => memory,
            Memory::Plain(..) => panic!("the memory was made for the processor"),
        }
    }

    fn pinned_mut(&mut self) -> &mut Pinned {
        match &mut self.0 {
            Memory::Pinned(memory) => memory,
            Memory::Plain(..) => panic!("the memory was made for the processor"),
        }
    }
}
