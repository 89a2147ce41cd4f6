//! How much of the processor others use while a time is taken: a time counts only on a quiet machine.
//!
//! `foreign = (busy - own)/(wall·cores)`, where `busy` is all processor time of the machine, the time stolen from a
//! virtual machine included, and `own` that of this process.

use std::time::Instant;

/// Blocks with more foreign load than this do not count. Two cores over a quarter of a second are 50 ticks of the
/// system's clock, so one tick is 0.02: the limit lies three ticks above nothing.
pub const QUIET: f64 = 0.06;

/// Processor time used so far, by everybody and by this process, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    at: Instant,
    own: f64,
    /// All processes, and the number of cores; None where the system does not tell.
    all: Option<(f64, usize)>,
}

impl Load {
    /// The present state.
    pub fn now() -> Self {
        let all = std::fs::read_to_string("/proc/stat").ok().and_then(|text| busy(&text, ticks_per_second()));
        Load { at: Instant::now(), own: process_seconds(), all }
    }

    /// Share of the cores that others used between `self` and `later`, 0 to 1; None where the system does not tell.
    pub fn foreign(&self, later: &Load) -> Option<f64> {
        let ((before, cores), (after, _)) = (self.all?, later.all?);
        let wall = later.at.duration_since(self.at).as_secs_f64();
        Some((((after - before) - (later.own - self.own)) / (wall * cores as f64)).max(0.0))
    }
}

/// Busy seconds of all cores together, and their number, from the text of `/proc/stat`.
fn busy(text: &str, ticks: f64) -> Option<(f64, usize)> {
    let mut first = text.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace();
    let mut next = || first.next()?.parse::<f64>().ok();
    let [user, nice, system, _idle, _wait, irq, soft, steal] =
        [next()?, next()?, next()?, next()?, next()?, next()?, next()?, next().unwrap_or(0.0)];
    let cores = text.lines().skip(1).take_while(|l| l.starts_with("cpu")).count();
    Some(((user + nice + system + irq + soft + steal) / ticks, cores))
}

#[cfg(unix)]
fn ticks_per_second() -> f64 {
    // SAFETY: sysconf only reads its argument.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as f64 }
}

#[cfg(not(unix))]
fn ticks_per_second() -> f64 {
    100.0
}

/// Processor time of this process, all threads together, in seconds.
#[cfg(unix)]
pub fn process_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

/// Processor time of this process; unknown on this system.
#[cfg(not(unix))]
pub fn process_seconds() -> f64 {
    0.0
}

/// The most memory this process has held so far, in bytes; None where the system does not tell.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_and_waiting() {
        let text = "cpu  100 10 40 9999 50 2 3 5 7 0\ncpu0 50 5 20 1 1 1 1 1 1 0\ncpu1 50 5 20 1 1 1 1 1 1 0\nintr 5\n";
        assert_eq!(busy(text, 100.0), Some((1.6, 2)));
        assert_eq!(busy("intr 5\n", 100.0), None);
    }

    #[test]
    fn foreign_load_is_what_this_process_did_not_use() {
        let start = Instant::now();
        let at = |s: f64, own: f64, all: f64| Load {
            at: start + std::time::Duration::from_secs_f64(s),
            own,
            all: Some((all, 2)),
        };
        assert!((at(0.0, 1.0, 10.0).foreign(&at(1.0, 2.5, 12.0)).unwrap() - 0.25).abs() < 1e-9);
        assert_eq!(at(0.0, 1.0, 10.0).foreign(&at(1.0, 2.5, 11.0)), Some(0.0), "ticks are coarse: never negative");
    }
}
