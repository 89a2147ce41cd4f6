//! The emulated driver: the CUDA kernels compiled as C++, run on the CPU.
//!
//! A launch runs to its end before [`super::Driver::launch`] returns, under a [`Schedule`] that decides in which order threads
//! run and when asynchronous copies land. Every access is checked; [`EmulatedDriver::metered`] also counts what the
//! accesses cost. `docs/emulator.md` says what this can show and what not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::library::Library;
use super::schedule::{LaunchTraffic, Schedule};
use super::{DeviceInfo, Event, FunctionInfo, Launch, Packed, Ptr, TensorMap, TensorMapSpec};
use crate::error::{Error, Result};

/// A recorded command.
enum Command {
    Launch { step: String, kernel: String, launch: Launch, args: Mutex<Packed> },
    Copy { dst: Ptr, src: Ptr, bytes: usize },
    Fill { dst: Ptr, value: u8, bytes: usize },
}

/// A recorded list of commands.
pub struct EmulatedGraph {
    commands: Vec<Command>,
}

/// What changes while the driver is used.
struct State {
    schedule: Schedule,
    step: String,
    recording: Option<Vec<Command>>,
    metering: Option<Vec<LaunchTraffic>>,
    /// Memory that the device pretends to have.
    limit: usize,
    used: usize,
    sizes: HashMap<Ptr, usize>,
    /// Events recorded so far, and how many later ones let one pass.
    events: u64,
    lag: u64,
    started: Started,
}

/// What the host has asked for so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Started {
    /// Kernels that belong to no graph.
    pub kernels: usize,
    /// Graphs.
    pub graphs: usize,
    /// Times it waited for everything started to end.
    pub waits: usize,
}

/// A place in the order of events.
pub struct EmulatedEvent {
    driver: Arc<EmulatedDriver>,
    number: u64,
    at: Instant,
}

impl EmulatedEvent {
    /// Whether as many events have followed as [`EmulatedDriver::set_lag`] asks for.
    pub(super) fn passed(&self) -> bool {
        let state = self.driver.state();
        state.events >= self.number + state.lag
    }

    pub(super) fn elapsed_ms(&self, start: &EmulatedEvent) -> f64 {
        (self.at - start.at).as_secs_f64() * 1e3
    }
}

/// What [`super::Driver::Emulated`] holds.
pub struct EmulatedDriver {
    library: Library,
    state: Mutex<State>,
}

// SAFETY: the kernel descriptors are constants, and every C++ function locks what it shares.
unsafe impl Send for EmulatedDriver {}
// SAFETY: as above; the rest is behind a mutex.
unsafe impl Sync for EmulatedDriver {}

impl EmulatedDriver {
    pub(super) fn open() -> Result<EmulatedDriver> {
        let library = match std::env::var_os("IDDPM_EMULATOR_LIB") {
            Some(path) => Library::load(&path)?,
            None => Library::linked(),
        };
        let state = State {
            schedule: Schedule::default(),
            step: String::new(),
            recording: None,
            metering: None,
            limit: 16 << 30,
            used: 0,
            sizes: HashMap::new(),
            events: 0,
            lag: 0,
            started: Started::default(),
        };
        Ok(EmulatedDriver { library, state: Mutex::new(state) })
    }

    /// Plays the following launches out as `schedule` says.
    pub fn set_schedule(&self, schedule: Schedule) {
        self.state().schedule = schedule;
    }

    /// Pretends that the device has `bytes` of memory (16 GiB at first).
    pub fn set_memory(&self, bytes: usize) {
        self.state().limit = bytes;
    }

    /// Pretends that an event passes only when `events` later ones have been recorded, as on a device that is behind its host.
    /// Who waits for it is not kept waiting.
    pub fn set_lag(&self, events: u64) {
        self.state().lag = events;
    }

    /// What was started so far.
    pub fn started(&self) -> Started {
        self.state().started
    }

    /// Names of all kernels, sorted.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.library.names()
    }

    /// Runs `work` with the traffic meter on: its result, and each launch with what it cost. Slower than a plain run.
    ///
    /// # Errors
    /// What `work` returns.
    pub fn metered<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<LaunchTraffic>)> {
        self.state().metering = Some(Vec::new());
        let result = work();
        let log = self.state().metering.take().unwrap_or_default();
        Ok((result?, log))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_step(&self, step: &str) {
        self.state().step = step.into();
    }

    pub(super) fn info(&self) -> Result<DeviceInfo> {
        let state = self.state();
        Ok(DeviceInfo {
            name: "emulated GPU (the CUDA kernels as C++ on this CPU)".into(),
            compute_capability: (9, 0),
            driver_version: 0,
            multiprocessors: 4,
            l2_bytes: 50 << 20,
            max_shared_bytes: 227 << 10,
            total_bytes: state.limit,
            free_bytes: state.limit.saturating_sub(state.used),
        })
    }

    pub(super) fn function_info(&self, name: &str) -> Result<Option<FunctionInfo>> {
        self.library.kernel(name).map(|_| None)
    }

    // ---- launches ----

    pub(super) fn launch(&self, name: &str, launch: Launch, mut args: Packed) -> Result<()> {
        self.library.check_args(name, args.shapes())?;
        let mut state = self.state();
        let step = state.step.clone();
        if let Some(list) = state.recording.as_mut() {
            list.push(Command::Launch { step, kernel: name.into(), launch, args: Mutex::new(args) });
            return Ok(());
        }
        state.started.kernels += 1;
        drop(state);
        self.run(&step, name, launch, &mut args)
    }

    fn run(&self, step: &str, name: &str, launch: Launch, args: &mut Packed) -> Result<()> {
        let (schedule, metered) = {
            let state = self.state();
            (state.schedule, state.metering.is_some())
        };
        let at = if step.is_empty() { String::new() } else { format!("{step}: ") };
        let traffic = self
            .library
            .launch(name, launch, args, schedule, metered)
            .map_err(|e| Error::Device(format!("{at}{name}: {e}")))?;
        if let Some(log) = self.state().metering.as_mut() {
            log.push(LaunchTraffic { step: step.into(), kernel: name.into(), traffic });
        }
        Ok(())
    }

    pub(super) fn begin_capture(&self) -> Result<()> {
        let mut state = self.state();
        if state.recording.is_some() {
            return Err(Error::Device("a graph is already being captured".into()));
        }
        state.recording = Some(Vec::new());
        Ok(())
    }

    pub(super) fn end_capture(&self) -> Result<EmulatedGraph> {
        Ok(EmulatedGraph { commands: self.state().recording.take().unwrap_or_default() })
    }

    pub(super) fn replay(&self, graph: &EmulatedGraph) -> Result<()> {
        self.state().started.graphs += 1;
        for command in &graph.commands {
            match command {
                Command::Launch { step, kernel, launch, args } => {
                    let mut args = args.lock().unwrap_or_else(PoisonError::into_inner);
                    self.run(step, kernel, *launch, &mut args)?;
                }
                Command::Copy { dst, src, bytes } => self.copy(*dst, *src, *bytes)?,
                Command::Fill { dst, value, bytes } => self.fill(*dst, *value, *bytes)?,
            }
        }
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.state().started.waits += 1;
        Ok(())
    }

    pub(super) fn record(self: &Arc<Self>) -> Result<Event> {
        let mut state = self.state();
        state.events += 1;
        let number = state.events;
        drop(state);
        Ok(Event::Emulated(EmulatedEvent { driver: self.clone(), number, at: Instant::now() }))
    }

    // ---- memory ----

    pub(super) fn alloc(&self, bytes: usize) -> Result<Ptr> {
        let mut state = self.state();
        let free = state.limit.saturating_sub(state.used);
        let ptr = if bytes <= free { self.library.alloc(bytes) } else { None };
        let ptr = ptr.ok_or_else(|| super::out_of_memory(bytes, free, state.limit))?;
        state.used += bytes;
        state.sizes.insert(ptr, bytes);
        Ok(ptr)
    }

    pub(super) fn free(&self, ptr: Ptr) {
        let mut state = self.state();
        let bytes = state.sizes.remove(&ptr).expect("freed memory came from alloc");
        state.used -= bytes;
        assert!(self.library.free(ptr), "the C++ side knows every allocation");
    }

    pub(super) fn alloc_host(&self, bytes: usize) -> Result<*mut u8> {
        // SAFETY: the size is not 0.
        let host = unsafe { std::alloc::alloc_zeroed(host_layout(bytes)) };
        if host.is_null() {
            return Err(Error::Device(format!("no {bytes} bytes of host memory are free: use a smaller --batch-size")));
        }
        Ok(host)
    }

    pub(super) fn free_host(&self, host: *mut u8, bytes: usize) {
        // SAFETY: the pair came from alloc_host, which asked for the same layout.
        unsafe { std::alloc::dealloc(host, host_layout(bytes)) };
    }

    fn refuse_in_capture(&self, what: &str) -> Result<()> {
        if self.state().recording.is_none() {
            return Ok(());
        }
        Err(Error::Device(format!("{what} the host does not belong in a captured graph: do it before or after")))
    }

    pub(super) fn write(&self, dst: Ptr, src: *const u8, bytes: usize) -> Result<()> {
        self.refuse_in_capture("a copy from")?;
        self.library.check_range("copy to the device", dst, bytes)?;
        // SAFETY: the range was checked; the caller's slice holds `bytes` bytes.
        unsafe { std::ptr::copy_nonoverlapping(src, dst.0 as *mut u8, bytes) };
        Ok(())
    }

    pub(super) fn read(&self, dst: *mut u8, src: Ptr, bytes: usize) -> Result<()> {
        self.refuse_in_capture("a copy to")?;
        self.library.check_range("copy from the device", src, bytes)?;
        // SAFETY: the range was checked; the caller's slice holds `bytes` bytes.
        unsafe { std::ptr::copy_nonoverlapping(src.0 as *const u8, dst, bytes) };
        Ok(())
    }

    pub(super) fn copy(&self, dst: Ptr, src: Ptr, bytes: usize) -> Result<()> {
        self.library.check_range("copy source", src, bytes)?;
        self.library.check_range("copy destination", dst, bytes)?;
        if let Some(list) = self.state().recording.as_mut() {
            list.push(Command::Copy { dst, src, bytes });
            return Ok(());
        }
        // SAFETY: both ranges were checked.
        unsafe { std::ptr::copy(src.0 as *const u8, dst.0 as *mut u8, bytes) };
        Ok(())
    }

    pub(super) fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<()> {
        self.library.check_range("fill", dst, bytes)?;
        if let Some(list) = self.state().recording.as_mut() {
            list.push(Command::Fill { dst, value, bytes });
            return Ok(());
        }
        // SAFETY: the range was checked.
        unsafe { std::ptr::write_bytes(dst.0 as *mut u8, value, bytes) };
        Ok(())
    }

    pub(super) fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.library.tensor_map(spec)
    }
}

/// Host memory starts at a page, as pinned memory does.
fn host_layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes.max(1), 4096).expect("fewer bytes than an address counts")
}
