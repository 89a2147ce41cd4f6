//! The driver: what it says where there is no GPU; and, on the emulator, launches, memory, graphs, checks and traffic.

mod messages;

#[cfg(feature = "emulator")]
mod bugs;
#[cfg(feature = "emulator")]
mod hopper;
#[cfg(feature = "emulator")]
mod launches;
#[cfg(feature = "emulator")]
mod traffic;
#[cfg(feature = "emulator")]
mod warp;

/// Devices to run a kernel test on: the emulator under every schedule, or the one that `IDDPM_TEST_DEVICE=cuda` asks for.
#[cfg(feature = "emulator")]
fn drivers() -> Vec<(String, iddpm::device::driver::Driver)> {
    use iddpm::device::driver::{Driver, Schedule};
    if std::env::var("IDDPM_TEST_DEVICE").is_ok_and(|d| d == "cuda") {
        return vec![("cuda".into(), Driver::cuda(0).unwrap())];
    }
    let on = |schedule: Schedule| {
        let d = Driver::emulated().unwrap();
        d.emulator().unwrap().set_schedule(schedule);
        (format!("{schedule:?}"), d)
    };
    Schedule::sweep().into_iter().map(on).collect()
}

/// A buffer that holds `data`.
#[cfg(feature = "emulator")]
fn upload<T: bytemuck::NoUninit>(d: &iddpm::device::driver::Driver, data: &[T]) -> iddpm::device::driver::Buffer {
    let buffer = d.alloc(std::mem::size_of_val(data)).unwrap();
    d.write(buffer.ptr(), data).unwrap();
    buffer
}

/// The first `n` values of a buffer.
#[cfg(feature = "emulator")]
fn download<T: bytemuck::Pod>(
    d: &iddpm::device::driver::Driver,
    buffer: &iddpm::device::driver::Buffer,
    n: usize,
) -> Vec<T> {
    let mut out = vec![T::zeroed(); n];
    d.read(buffer.ptr(), &mut out).unwrap();
    out
}

/// Integers that look random, the same on every run.
#[cfg(feature = "emulator")]
fn integers(n: usize, range: i32) -> Vec<i32> {
    (0..n)
        .map(|i| iddpm::rng::below(iddpm::rng::philox([i as u32, 1, 2, 3], 9)[0], 2 * range as u32) as i32 - range)
        .collect()
}
