//! Runs of one plan in flight: each takes its inputs from a page of its own and leaves its state there, so that the host fills
//! the next page, and reads the last ones, while the device computes.
//!
//! ```text
//! page        inputs  -> device, run, state -> page, mark
//! in flight   the oldest is taken when its mark has passed
//! ```
//!
//! The page of the run before the one taken last is kept as well: from it the device can be brought back to where that
//! run began.

use super::host::{HostBuffer, Mark, part, part_mut};
use super::{Device, PlanId};
use crate::error::Result;
use crate::graph::{DType, Graph, Region, Val};
use std::collections::VecDeque;

/// Runs in flight on a device that works beside the host.
const RUNS: usize = 4;

/// See the module. A run is known by a tag of its owner's.
pub struct Ring<T> {
    id: PlanId,
    pages: Vec<Page>,
    /// Page, end and tag of the runs in flight, oldest first.
    flight: VecDeque<(usize, Mark, T)>,
    /// The page to be filled next.
    next: usize,
    /// The page of the run taken last.
    last: usize,
}

/// Copies of two regions of the plan.
pub struct Page {
    inputs: HostBuffer,
    state: HostBuffer,
}

impl Page {
    /// The elements of the input `v`.
    pub fn input<T: bytemuck::Pod>(&self, graph: &Graph, v: Val) -> &[T] {
        part(graph, Region::Inputs, &self.inputs, v)
    }

    /// The elements of the input `v`, to be written.
    pub fn input_mut<T: bytemuck::Pod>(&mut self, graph: &Graph, v: Val) -> &mut [T] {
        part_mut(graph, Region::Inputs, &mut self.inputs, v)
    }

    /// Writes floats to the input `v` from element `first` on, rounded where it is bf16.
    pub fn write_floats(&mut self, graph: &Graph, v: Val, first: usize, x: &[f32]) {
        match graph[v].dtype {
            DType::Bf16 => {
                let out = &mut self.input_mut::<half::bf16>(graph, v)[first..first + x.len()];
                out.iter_mut().zip(x).for_each(|(out, &x)| *out = half::bf16::from_f32(x));
            }
            _ => self.input_mut::<f32>(graph, v)[first..first + x.len()].copy_from_slice(x),
        }
    }

    /// The elements of `v` of the state after the run.
    pub fn state<T: bytemuck::Pod>(&self, graph: &Graph, v: Val) -> &[T] {
        part(graph, Region::State, &self.state, v)
    }
}

impl<T> Ring<T> {
    /// Pages for the plan `id`.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(device: &mut Device, id: PlanId) -> Result<Self> {
        let runs = if matches!(device, Device::Cpu(_)) { 1 } else { RUNS };
        let graph = &device.plan(id).graph;
        let [inputs, state] = [Region::Inputs, Region::State].map(|r| graph.region_bytes(r));
        let page = |_| Ok(Page { inputs: device.host(inputs)?, state: device.host(state)? });
        let pages = (0..=runs).map(page).collect::<Result<_>>()?;
        let mut ring = Ring { id, pages, flight: VecDeque::new(), next: 0, last: runs };
        ring.start_over(device)?;
        Ok(ring)
    }

    /// Takes the plan's present state for that before the next run. No run is in flight.
    ///
    /// # Errors
    /// When the device fails.
    pub fn start_over(&mut self, device: &mut Device) -> Result<()> {
        assert!(self.is_empty(), "runs are in flight");
        device.start_read(self.id, Region::State, &mut self.pages[self.last].state)?;
        device.mark()?.wait()
    }

    /// Whether no run is in flight.
    pub fn is_empty(&self) -> bool {
        self.flight.is_empty()
    }

    /// Whether a run must be taken before the next one can be started.
    pub fn is_full(&self) -> bool {
        self.flight.len() + 1 == self.pages.len()
    }

    /// The page of the next run, whose inputs are to be filled in. It holds those of an earlier run.
    pub fn page(&mut self) -> &mut Page {
        assert!(!self.is_full(), "take a run first");
        &mut self.pages[self.next]
    }

    /// Starts a run on the inputs of [`Ring::page`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn start(&mut self, device: &mut Device, tag: T) -> Result<()> {
        assert!(!self.is_full(), "take a run first");
        let page = &mut self.pages[self.next];
        device.start_write(self.id, Region::Inputs, &page.inputs)?;
        device.run(self.id)?;
        device.start_read(self.id, Region::State, &mut page.state)?;
        self.flight.push_back((self.next, device.mark()?, tag));
        self.next = (self.next + 1) % self.pages.len();
        Ok(())
    }

    /// Takes the oldest run in flight, with its page, if it has ended; waits for it if told to.
    ///
    /// # Errors
    /// When the device failed.
    pub fn take(&mut self, wait: bool) -> Result<Option<(T, &Page)>> {
        let Some((_, mark, _)) = self.flight.front() else { return Ok(None) };
        if wait {
            mark.wait()?;
        } else if !mark.passed()? {
            return Ok(None);
        }
        let Some((page, _, tag)) = self.flight.pop_front() else { return Ok(None) };
        self.last = page;
        Ok(Some((tag, &self.pages[page])))
    }

    /// Forgets the runs in flight and the one taken last: the next run is that one again. See [`Ring::restore`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn rewind(&mut self, device: &mut Device) -> Result<()> {
        device.sync()?;
        self.flight.clear();
        self.next = self.last;
        self.last = (self.last + self.pages.len() - 1) % self.pages.len();
        self.restore(device)
    }

    /// Brings inputs and state to what the next run begins with, after [`Ring::rewind`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn restore(&mut self, device: &mut Device) -> Result<()> {
        assert!(self.is_empty(), "runs are in flight");
        device.start_write(self.id, Region::State, &self.pages[self.last].state)?;
        device.start_write(self.id, Region::Inputs, &self.pages[self.next].inputs)?;
        device.mark()?.wait()
    }
}
