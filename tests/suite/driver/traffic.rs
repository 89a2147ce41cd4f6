//! The traffic meter: figures of kernels whose cost is known, and waste that it must show.

use iddpm::args;
use iddpm::device::driver::{Driver, Launch, Schedule, Traffic};

use super::upload;

fn metered(name: &str, elements: usize, blocks: u32, n: i32) -> Traffic {
    let d = Driver::emulated().unwrap();
    let (x, y) = (upload(&d, &vec![1.0f32; elements]), d.alloc_zeroed(4 * elements).unwrap());
    let run = || d.launch(name, Launch::new([blocks, 1, 1], [128, 1, 1]), args![y.ptr(), x.ptr(), n]);
    let (_, log) = d.emulator().unwrap().metered(run).unwrap();
    assert_eq!((log.len(), log[0].kernel.as_str()), (1, name));
    log[0].traffic
}

/// A copy moves each byte once in and once out, in whole sectors, for any schedule and number of host threads.
#[test]
fn a_copy_moves_each_byte_once_each_way() {
    let n = 10_000usize;
    for (i, schedule) in Schedule::sweep().into_iter().enumerate() {
        let d = Driver::emulated().unwrap();
        d.emulator().unwrap().set_schedule(Schedule { workers: i as u32 % 3, ..schedule });
        let (src, dst) = (upload(&d, &vec![7u32; 4 * n]), d.alloc(16 * n).unwrap());
        let run = || d.launch("copy_16", Launch::new([5, 1, 1], [256, 1, 1]), args![dst.ptr(), src.ptr(), n as i64]);
        let (_, log) = d.emulator().unwrap().metered(run).unwrap();
        let (t, bytes) = (log[0].traffic, 16 * n as u64);
        assert_eq!((t.requested_read, t.requested_written), (bytes, bytes), "{schedule:?}");
        assert_eq!((t.read_bytes, t.written_bytes), (bytes, bytes), "{schedule:?}");
        assert_eq!((t.read_footprint, t.written_footprint), (bytes, bytes), "{schedule:?}");
        assert_eq!((t.read_sectors, t.write_sectors, t.ideal_sectors), (bytes / 32, bytes / 32, bytes / 16));
        t.within("copy_16", 2 * bytes).unwrap();
        assert!(t.within("copy_16", 2 * bytes * 94 / 100).is_err(), "1.064 times the declared bytes");
    }
}

#[test]
fn strided_reads_touch_a_sector_for_each_word() {
    let t = metered("waste_strided", 1024, 1, 1024);
    assert_eq!(t.read_sectors, 128); // 128 threads, 32 bytes apart
    assert_eq!((t.write_sectors, t.requested_read), (16, 512));
    assert_eq!(t.sectors_per_ideal(), (128.0 + 16.0) / 32.0);
    assert!(t.within("waste_strided", 512 + 512).is_err());
}

/// Twice through 256 KiB is 512 KiB; twice through 8 KiB stays in the cache of the block.
#[test]
fn a_second_pass_over_a_large_tensor_counts_again() {
    let large = metered("waste_read_twice", 65_536, 1, 65_536);
    assert_eq!((large.read_bytes, large.read_footprint), (2 * 262_144, 262_144));
    assert!(large.within("waste_read_twice", 262_144 + 512).is_err());
    let small = metered("waste_read_twice", 2048, 1, 2048);
    assert_eq!(small.read_bytes, 8192);
}

/// Four scalar stores a thread fill each sector over time, but every one of them touches every sector of the warp.
#[test]
fn scalar_accesses_take_four_times_the_sectors_of_vectors() {
    let t = metered("waste_scalar_stores", 512, 1, 512);
    assert_eq!((t.written_bytes, t.write_sectors, t.read_sectors), (2048, 256, 256));
    assert_eq!(t.sectors_per_ideal(), 4.0);
}

/// A column of a 32 x 32 tile lies in one bank: 32 passes instead of one; a pitch of 33 words has no conflicts.
#[test]
fn bank_conflicts_are_counted() {
    let bad = metered("waste_bank_conflicts", 1024, 1, 1024);
    assert_eq!((bad.shared_ideal, bad.shared_wavefronts, bad.bank_conflicts()), (64, 32 + 32 * 32, 31 * 32));
    let good = metered("waste_none", 1024, 1, 1024);
    assert_eq!((good.shared_wavefronts, good.bank_conflicts()), (64, 0));
}

/// Asynchronous and bulk copies are counted as well.
#[test]
fn asynchronous_copies_are_counted() {
    let d = Driver::emulated().unwrap();
    let (x, y) = (upload(&d, &vec![1u32; 1024]), d.alloc(4096).unwrap());
    let run = || d.launch("test_cp_async", Launch::new([1, 1, 1], [32, 1, 1]), args![y.ptr(), x.ptr(), 256]);
    let (_, log) = d.emulator().unwrap().metered(run).unwrap();
    let t = log[0].traffic;
    assert_eq!((t.read_bytes, t.written_bytes, t.read_sectors), (4096, 4096, 128));
    assert_eq!(t.bank_conflicts(), 0);
    // Twelve matrices by ldmatrix, their rows side by side: one pass each, and one each of the four that fill the 512 bytes.
    let out = d.alloc(4 * 384).unwrap();
    let run = || d.launch("test_ldmatrix", Launch::new([1, 1, 1], [32, 1, 1]), args![out.ptr(), x.ptr()]);
    let (_, log) = d.emulator().unwrap().metered(run).unwrap();
    assert_eq!((log[0].traffic.shared_wavefronts, log[0].traffic.shared_ideal), (16, 16));
}

/// The meter only watches.
#[test]
fn metering_changes_no_bits_and_names_the_step() {
    let d = Driver::emulated().unwrap();
    let n = 500usize;
    let data: Vec<u32> = (0..4 * n as u32).collect();
    let (x, y) = (upload(&d, &data), d.alloc(16 * n).unwrap());
    d.set_step("forward 3");
    let run = || d.launch("copy_16", Launch::over(n, 128), args![y.ptr(), x.ptr(), n as i64]);
    let (_, log) = d.emulator().unwrap().metered(run).unwrap();
    assert_eq!(log[0].step, "forward 3");
    assert_eq!(super::download::<u32>(&d, &y, 4 * n), data);
    run().unwrap();
    let ((), log) = d.emulator().unwrap().metered(|| Ok(())).unwrap();
    assert!(log.is_empty(), "a launch outside the meter is not logged");
}
