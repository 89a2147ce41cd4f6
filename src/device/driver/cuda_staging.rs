//! Copies from memory that is not page-locked. When the driver reads such memory it does not promise: some systems do so long after the call.
//!
//! So small ones go through slots of page-locked memory, without a wait as long as a slot is free, and larger ones are waited for.

use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::Ptr;
use super::cuda::CudaDriver;
use crate::error::Result;

/// Slots, and bytes of each.
const SLOTS: usize = 16;
const SLOT_BYTES: usize = 16 << 10;

/// Page-locked slots that take turns, each with the end of the last copy out of it. Made at first use.
pub(super) struct Staging {
    host: *mut u8,
    copied: Vec<sys::CUevent>,
    next: usize,
}

// SAFETY: the memory and the events belong to this value alone and may be used from any thread.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) const EMPTY: Staging = Staging { host: std::ptr::null_mut(), copied: Vec::new(), next: 0 };
}

impl CudaDriver {
    /// Copies `bytes` bytes from `src`, which may change on return.
    pub(super) fn write(&self, dst: Ptr, src: *const u8, bytes: usize) -> Result<()> {
        self.refuse_in_capture("a copy from")?;
        self.bind("copying to the GPU")?;
        if bytes > SLOT_BYTES {
            self.start_write(dst, src, bytes)?;
            return self.check("waiting for a copy", self.stream.synchronize());
        }
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.host.is_null() {
            staging.host = self.alloc_host(SLOTS * SLOT_BYTES)?;
        }
        while staging.copied.len() < SLOTS {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            staging.copied.push(self.check("making an event", result::event::create(flags))?);
        }
        let slot = staging.next;
        staging.next = (slot + 1) % SLOTS;
        let copied = staging.copied[slot];
        // SAFETY: the event is alive; one that was never recorded has passed. The slot holds `bytes` bytes that no copy reads any more,
        // and `src` has as many.
        let (waited, host) = unsafe { (result::event::synchronize(copied), staging.host.add(slot * SLOT_BYTES)) };
        self.check("waiting for an earlier copy", waited)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(src, host, bytes) };
        self.start_write(dst, host, bytes)?;
        // SAFETY: event and stream are alive.
        self.check("recording an event", unsafe { result::event::record(copied, self.stream.cu_stream()) })
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        let staging = self.staging.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (host, copied) = (staging.host, std::mem::take(&mut staging.copied));
        if !host.is_null() {
            self.free_host(host, SLOTS * SLOT_BYTES);
        }
        for event in copied {
            // SAFETY: made above and destroyed once; an error belongs to an earlier launch.
            let _ = self.context.bind_to_thread().and_then(|()| unsafe { result::event::destroy(event) });
        }
    }
}
