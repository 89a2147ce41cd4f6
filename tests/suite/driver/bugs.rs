//! Planted bugs: each must be found, by the checks of one launch or by the results of the schedules together. What only
//! AddressSanitizer, UndefinedBehaviourSanitizer or ThreadSanitizer can find is in `scripts/sanitize.sh`.

use half::bf16;
use iddpm::args;
use iddpm::device::driver::{Driver, Element, Launch, Schedule, Swizzle, TensorMap, TensorMapMode, TensorMapSpec};
use iddpm::error::Result;

use super::{download, upload};

/// Runs a planted bug on `in = 1..=128` under one schedule: its output, or what the checks said.
fn run(name: &str, schedule: Schedule, blocks: u32, n: i32) -> Result<Vec<u32>> {
    let d = Driver::emulated().unwrap();
    d.emulator().unwrap().set_schedule(schedule);
    let input: Vec<f32> = (1..=128).map(|i| i as f32).collect();
    let (x, y) = (upload(&d, &input), d.alloc_zeroed(512).unwrap());
    let shared = if name == "bug_dynamic_shared_past_end" { 512 } else { 0 };
    let launch = Launch::new([blocks, 1, 1], [128, 1, 1]).shared(shared);
    d.launch(name, launch, args![y.ptr(), x.ptr(), n])?;
    Ok(download(&d, &y, 128))
}

/// Bugs that the checks of a single launch report, under every schedule, and what they say.
#[test]
fn checks_find_wrong_accesses_and_wrong_meetings() {
    let cases = [
        ("bug_global_read_past_end", "global read of 4 bytes out of bounds: it ends 4 bytes past the end"),
        ("bug_global_write_past_end", "global write of 4 bytes out of bounds"),
        ("bug_misaligned_vector", "misaligned global read of 16 bytes"),
        ("bug_shared_read_past_end", "shared read of 4 bytes out of bounds"),
        ("bug_dynamic_shared_past_end", "shared write of 4 bytes out of bounds"),
        ("bug_dynamic_shared_not_given", "the kernel takes 4096 bytes, the launch gave 0"),
        ("bug_uninitialised_shared", "read of uninitialised shared memory"),
        ("bug_host_pointer", "not device memory"),
        ("bug_divergent_barrier", "divergent barrier"),
        ("bug_exit_before_barrier", "127 of 128 threads wait at barrier 0"),
        ("bug_divergent_shuffle", "wait in a warp collective"),
        ("bug_shuffle_from_absent_lane", "reads lane 20, which does not take part"),
        ("bug_cp_async_no_wait", "before its asynchronous copies"),
    ];
    for (name, part) in cases {
        for schedule in Schedule::sweep() {
            let eager = schedule.copies != iddpm::device::driver::Copies::Lazy;
            match run(name, schedule, 1, 128) {
                Err(e) => assert!(e.to_string().contains(part), "{name} under {schedule:?}: {e}"),
                Ok(_) => assert!(name == "bug_cp_async_no_wait" && eager, "{name} under {schedule:?} was not found"),
            }
        }
    }
}

/// Bugs of order: some schedule fails a check, or the schedules differ in a bit.
#[test]
fn schedules_find_missing_barriers_and_waits() {
    for name in
        ["bug_missing_barrier", "bug_missing_second_barrier", "bug_missing_syncwarp", "bug_cp_async_wait_too_weak"]
    {
        let outcomes: Vec<_> = Schedule::sweep().into_iter().map(|s| run(name, s, 1, 128).ok()).collect();
        let found = outcomes.iter().any(Option::is_none) || outcomes.windows(2).any(|w| w[0] != w[1]);
        assert!(found, "{name} was not found");
    }
}

fn tile_map(d: &Driver, rows: u64, swizzle: Swizzle) -> (iddpm::device::driver::Buffer, TensorMap) {
    let x: Vec<bf16> = (0..rows * 64).map(|i| bf16::from_f32((i % 251) as f32)).collect();
    let buffer = upload(d, &x);
    let spec = TensorMapSpec {
        element: Element::Bf16,
        address: buffer.ptr(),
        dims: vec![64, rows],
        strides_bytes: vec![128],
        element_strides: vec![1, 1],
        swizzle,
        mode: TensorMapMode::Tile { sizes: vec![64, 8] },
    };
    let map = d.tensor_map(&spec).unwrap();
    (buffer, map)
}

fn run_tile(name: &str, schedule: Schedule, threads: u32) -> Result<Vec<f32>> {
    let d = Driver::emulated().unwrap();
    d.emulator().unwrap().set_schedule(schedule);
    let (_held, map) = tile_map(&d, 48, if name == "bug_wrong_swizzle" { Swizzle::B128 } else { Swizzle::None });
    let out = d.alloc_zeroed(4 * 48 * 64).unwrap();
    d.launch(name, Launch::new([1, 1, 1], [threads, 1, 1]).shared(4096), args![out.ptr(), &map])?;
    Ok(download(&d, &out, 48 * 64))
}

#[test]
fn pipelines_with_wrong_barriers_are_found() {
    for schedule in Schedule::sweep() {
        let text = run_tile("bug_mbarrier_never_completes", schedule, 128).expect_err("a deadlock").to_string();
        assert!(text.contains("deadlock") && text.contains("spin on an mbarrier"), "{text}");
        let got = run_tile("bug_wrong_swizzle", schedule, 128).unwrap();
        assert!((0..512).any(|i| got[i] != (i % 251) as f32), "the wrong swizzle was not found");
    }
    let reverse = Schedule { order: iddpm::device::driver::Order::Reverse, ..Schedule::default() };
    let text = run_tile("bug_mbarrier_before_init", reverse, 128).expect_err("an early wait").to_string();
    assert!(text.contains("mbarrier used before mbar_init") || text.contains("uninitialised"), "{text}");
}

/// Only a large skew between warps shows this one: eager copies, or random schedules.
#[test]
fn a_stage_released_too_early_is_found() {
    let right: Vec<f32> = (0..48 * 64).map(|i| (i % 251) as f32).collect();
    let random = (1..=20).map(|seed| Schedule {
        order: iddpm::device::driver::Order::Random,
        copies: iddpm::device::driver::Copies::Random,
        seed,
        workers: 1,
    });
    let found = Schedule::sweep()
        .into_iter()
        .chain(random)
        .any(|s| run_tile("bug_stage_released_early", s, 256).ok() != Some(right.clone()));
    assert!(found);
}
