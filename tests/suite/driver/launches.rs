//! Launches, memory and graphs on the emulator, or the GPU that is asked for; refusals on the emulator.

use std::sync::Barrier;

use crate::device::driver;
use iddpm::args;
use iddpm::device::driver::{Driver, Launch, Order, Ptr, Schedule};

use super::{download, drivers, integers, upload};

fn message(result: iddpm::error::Result<()>) -> String {
    result.expect_err("an error").to_string()
}

#[test]
fn copy_moves_every_word() {
    for (on, d) in drivers() {
        for n in [1usize, 7, 1024, 5000] {
            let data: Vec<u32> = (0..4 * n as u32).collect();
            let (src, dst) = (upload(&d, &data), d.alloc(16 * n).unwrap());
            d.launch("copy_16", Launch::new([3, 1, 1], [256, 1, 1]), args![dst.ptr(), src.ptr(), n as i64]).unwrap();
            assert_eq!(download::<u32>(&d, &dst, 4 * n), data, "n = {n} on {on}");
        }
    }
}

#[test]
fn fills_copies_and_pinned_memory_keep_the_bytes() {
    let d = driver();
    let data = integers(1000, 1 << 20);
    let (a, b) = (upload(&d, &data), d.alloc_zeroed(4000).unwrap());
    assert_eq!(download::<i32>(&d, &b, 1000), vec![0; 1000]);
    d.copy(b.ptr().offset(400), a.ptr(), 2000).unwrap();
    d.fill(b.ptr(), 0xAB, 400).unwrap();
    let out = download::<u32>(&d, &b, 1000);
    assert!(out[..100].iter().all(|&v| v == 0xABAB_ABAB));
    assert!(out[100..600].iter().zip(&data).all(|(&o, &i)| o == i as u32));
    let mut pinned = d.pinned(2000).unwrap();
    d.read_pinned(b.ptr().offset(400), &mut pinned).unwrap();
    let event = d.record().unwrap();
    event.wait().unwrap();
    assert!(event.passed().unwrap());
    assert_eq!(bytemuck::cast_slice::<u8, i32>(&pinned), &data[..500]);
    d.write_pinned(a.ptr(), &pinned).unwrap();
}

/// What is written is what the source held at the call, in small pieces and large, however far the device is behind.
#[test]
fn a_source_may_change_when_its_write_returns() {
    for (on, d) in drivers() {
        for (n, writes) in [(1usize, 100u32), (1000, 100), (100_000, 5)] {
            let all = d.alloc_zeroed(4 * n * writes as usize).unwrap();
            let mut source = vec![0u32; n];
            for k in 0..writes {
                source.fill(k + 1);
                d.write(all.ptr().offset(4 * n * k as usize), &source).unwrap();
            }
            source.fill(0);
            let got = download::<u32>(&d, &all, n * writes as usize);
            let wrong = got.iter().enumerate().find(|&(i, &x)| x != (i / n) as u32 + 1);
            assert!(wrong.is_none(), "{writes} writes of {n} on {on}: {wrong:?}");
        }
    }
}

/// A captured graph runs nothing while it is recorded, and gives the same bits as the launches it holds.
#[test]
fn graphs_replay_what_was_recorded() {
    let d = driver();
    let n = 777usize;
    let data: Vec<u32> = (0..4 * n as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let (a, b, c) = (upload(&d, &data), d.alloc_zeroed(16 * n).unwrap(), d.alloc_zeroed(16 * n).unwrap());
    let graph = d
        .capture(|| {
            d.launch("copy_16", Launch::over(n, 256), args![b.ptr(), a.ptr(), n as i64])?;
            d.copy(c.ptr(), b.ptr(), 16 * n)?;
            d.fill(b.ptr(), 0, 8)
        })
        .unwrap();
    assert_eq!(download::<u32>(&d, &b, 4 * n), vec![0; 4 * n], "recording runs nothing");
    for round in 0..3u32 {
        let shifted: Vec<u32> = data.iter().map(|v| v.wrapping_add(round)).collect();
        d.write(a.ptr(), &shifted).unwrap();
        d.replay(&graph).unwrap();
        assert_eq!(download::<u32>(&d, &c, 4 * n), shifted);
        assert_eq!(download::<u32>(&d, &b, 4 * n)[..2], [0, 0]);
    }
    let text = message(d.capture(|| d.write(a.ptr(), &data)).map(|_| ()));
    assert!(text.contains("graph"), "{text}");
    d.write(a.ptr(), &data).unwrap();
}

#[test]
fn launches_that_cannot_be_are_refused_with_both_values() {
    let d = Driver::emulated().unwrap();
    let buffer = d.alloc_zeroed(4096).unwrap();
    let p = buffer.ptr();
    let launch = |l: Launch| message(d.launch("copy_16", l, args![p, p, 1i64]));
    assert!(launch(Launch::new([1, 1, 1], [512, 1, 1])).contains("__launch_bounds__ allows 256"));
    assert!(launch(Launch::new([1, 1, 1], [2048, 1, 1])).contains("at most 1024"));
    assert!(launch(Launch::new([0, 1, 1], [32, 1, 1])).contains("no dimension can be 0"));
    assert!(launch(Launch::new([1, 70000, 1], [32, 1, 1])).contains("65535"));
    assert!(launch(Launch::new([1, 1, 1], [32, 1, 1]).shared(300 << 10)).contains("232448"));
    assert!(launch(Launch::new([3, 1, 1], [32, 1, 1]).cluster(2)).contains("clusters of 2"));
    let one = Launch::new([1, 1, 1], [32, 1, 1]);
    let text = message(d.launch("copy_16", one, args![p, p]));
    assert!(text.contains("2 arguments for 3 parameters"), "{text}");
    let text = message(d.launch("copy_16", one, args![p, p, 1i32]));
    assert!(text.contains("argument 2 is an integer of 4 bytes, the kernel takes an integer of 8 bytes"), "{text}");
    let text = message(d.launch("copy_16", one, args![p, 8u64, 1i64]));
    assert!(text.contains("argument 1 is an integer of 8 bytes, the kernel takes a pointer"), "{text}");
    let text = message(d.launch("no_such_kernel", one, args![]));
    assert!(text.contains("no_such_kernel"), "{text}");
}

#[test]
fn memory_that_runs_out_is_named_with_need_and_rest() {
    let d = Driver::emulated().unwrap();
    d.emulator().unwrap().set_memory(10 << 20);
    let held = d.alloc(8 << 20).unwrap();
    let text = d.alloc(4 << 20).err().unwrap().to_string();
    assert!(text.contains("4.0 MiB needed") && text.contains("2.0 of 10.0 MiB free"), "{text}");
    drop(held);
    assert_eq!(d.info().unwrap().free_bytes, 10 << 20);
    assert!(d.alloc(9 << 20).is_ok());
}

#[test]
fn host_copies_outside_an_allocation_are_refused() {
    let d = Driver::emulated().unwrap();
    let buffer = d.alloc(100).unwrap();
    let text = message(d.write(buffer.ptr().offset(60), &[0u8; 50]));
    assert!(text.contains("10 bytes past the end of an allocation of 100 bytes"), "{text}");
    let mut out = [0u8; 8];
    assert!(message(d.read(Ptr::NULL, &mut out)).contains("not device memory"));
    let gone = buffer.ptr();
    drop(buffer);
    assert!(message(d.read(gone, &mut out)).contains("no live allocation"));
}

/// A failed launch names the step, the kernel, the block and the thread, and does not disturb the next one.
#[test]
fn errors_name_step_kernel_block_and_thread() {
    let d = Driver::emulated().unwrap();
    let (a, b) = (d.alloc_zeroed(16 * 64).unwrap(), d.alloc_zeroed(16 * 63).unwrap());
    d.set_step("step 12 (conv2d)");
    let text = message(d.launch("copy_16", Launch::over(64, 32), args![b.ptr(), a.ptr(), 64i64]));
    for part in
        ["step 12 (conv2d)", "copy_16", "block (1,0,0)", "thread (31,0,0)", "global write of 16 bytes out of bounds"]
    {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    d.launch("copy_16", Launch::over(63, 32), args![b.ptr(), a.ptr(), 63i64]).unwrap();
}

/// Drivers in several threads, some of whose launches fail, do not meet.
#[test]
fn parallel_launches_keep_their_own_schedule_and_errors() {
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let start = &start;
            scope.spawn(move || {
                let d = Driver::emulated().unwrap();
                let order = [Order::Forward, Order::Reverse, Order::Random, Order::Random][thread as usize];
                d.emulator().unwrap().set_schedule(Schedule { order, seed: thread, ..Schedule::default() });
                let n = 4000 + thread as usize;
                let data: Vec<u32> = (0..4 * n as u32).collect();
                let (src, dst) = (upload(&d, &data), d.alloc(16 * n).unwrap());
                start.wait();
                for round in 0..20 {
                    let too_many = i64::try_from(n).unwrap() + i64::from(round % 2 == 1);
                    let done =
                        d.launch("copy_16", Launch::new([8, 1, 1], [128, 1, 1]), args![dst.ptr(), src.ptr(), too_many]);
                    assert_eq!(done.is_err(), round % 2 == 1, "thread {thread}, round {round}");
                }
                assert_eq!(download::<u32>(&d, &dst, 4 * n), data);
            });
        }
    });
}

/// What nvcc reports of the kernels in this binary: no spilled registers anywhere.
#[test]
fn no_kernel_spills_registers() {
    let spilled: Vec<_> = iddpm::device::driver::RESOURCES.iter().filter(|r| r.spilled_bytes > 0).collect();
    assert!(spilled.is_empty(), "{spilled:?}");
}
