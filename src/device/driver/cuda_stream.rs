//! The streams of the real driver: waiting, events, graphs, and copies beside the work.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::cuda::{CudaDriver, Mode};
use super::cuda_objects::{CudaEvent, CudaGraph};
use super::{Event, Ptr};
use crate::error::Result;

impl CudaDriver {
    pub(super) fn sync(&self) -> Result<()> {
        self.bind("waiting for the GPU")?;
        self.check("waiting for the GPU", self.copies.synchronize())?;
        self.check("waiting for the GPU", self.stream.synchronize())
    }

    pub(super) fn record(self: &Arc<Self>) -> Result<Event> {
        self.bind("recording an event")?;
        self.event_on(self.stream.cu_stream())
    }

    fn event_on(self: &Arc<Self>, stream: sys::CUstream) -> Result<Event> {
        let handle = self.check("making an event", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?;
        let event = CudaEvent { handle, driver: self.clone() };
        // SAFETY: the event was just made, the stream lives as long as the driver.
        let done = unsafe { result::event::record(handle, stream) };
        self.check("recording an event", done)?;
        Ok(Event::Cuda(event))
    }

    pub(super) fn write_aside(
        self: &Arc<Self>,
        dst: Ptr,
        src: *const u8,
        bytes: usize,
        after: Option<&CudaEvent>,
    ) -> Result<Event> {
        self.refuse_in_capture("a copy from")?;
        self.bind("copying to the GPU")?;
        let stream = self.copies.cu_stream();
        if let Some(event) = after {
            self.order("copying to the GPU", stream, event)?;
        }
        // SAFETY: `src` holds `bytes` bytes of pinned memory, which the caller keeps until the event has passed.
        let done = unsafe { result::memcpy_htod_async(dst.0, std::slice::from_raw_parts(src, bytes), stream) };
        self.check(&format!("copying {bytes} bytes to the GPU"), done)?;
        self.event_on(stream)
    }

    pub(super) fn wait_for(&self, event: &CudaEvent) -> Result<()> {
        self.bind("waiting for a copy")?;
        self.order("waiting for a copy", self.stream.cu_stream(), event)
    }

    /// Lets what `stream` is given from now on begin when `event` has passed.
    fn order(&self, what: &str, stream: sys::CUstream, event: &CudaEvent) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are alive.
        self.check(what, unsafe { result::stream::wait_event(stream, event.handle, flags) })
    }

    /// From here to [`CudaDriver::end_load`] launches only load their kernels.
    pub(super) fn begin_load(&self) {
        self.state().mode = Mode::Load;
    }

    pub(super) fn end_load(&self) {
        self.state().mode = Mode::Run;
    }

    pub(super) fn begin_capture(&self) -> Result<()> {
        self.bind("capturing a graph")?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and is not the default one, which cannot be captured.
        let begun = unsafe { result::stream::begin_capture(self.stream.cu_stream(), mode) };
        self.check("capturing a graph", begun)?;
        self.state().mode = Mode::Capture;
        Ok(())
    }

    pub(super) fn end_capture(self: &Arc<Self>) -> Result<CudaGraph> {
        self.state().mode = Mode::Run;
        self.bind("ending a graph")?;
        // SAFETY: the stream is being captured since begin_capture.
        let graph = self.check("ending a graph", unsafe { result::stream::end_capture(self.stream.cu_stream()) })?;
        // SAFETY: the graph was just made; its executable form does not refer to it afterwards.
        let exec = unsafe {
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            self.check("preparing a graph", exec)?
        };
        let graph = CudaGraph { exec, driver: self.clone() };
        // SAFETY: both handles are alive.
        self.check("uploading a graph", unsafe { result::graph::upload(exec, self.stream.cu_stream()) })?;
        Ok(graph)
    }

    pub(super) fn replay(&self, graph: &CudaGraph) -> Result<()> {
        self.bind("starting a graph")?;
        // SAFETY: the graph is alive while borrowed.
        self.check("starting a graph", unsafe { result::graph::launch(graph.exec, self.stream.cu_stream()) })?;
        if self.sync_each {
            self.check("running a graph", self.stream.synchronize())?;
        }
        Ok(())
    }
}
