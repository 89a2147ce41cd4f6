//! A training step allocates nothing once the first has run. A binary of its own, because it counts every allocation of
//! the process.

use iddpm::config::{Config, TimestepSampler, VarType};
use iddpm::data::Dataset;
use iddpm::device::Device;
use iddpm::train::Trainer;
use iddpm::train::log::Meter;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps that are counted.
const STEPS: usize = 63;

#[test]
fn a_training_step_allocates_nothing() {
    let n = 1000;
    let data = Dataset {
        n,
        h: 8,
        w: 8,
        c: 1,
        pixels: (0..n * 64).map(|i| (i % 251) as u8).collect(),
        labels: Some((0..n).map(|i| (i % 2) as i32).collect()),
        classes: vec!["even".into(), "odd".into()],
        source: Default::default(),
    };
    let mut c = Config::default();
    c.model.image_size = 8;
    (c.model.in_channels, c.model.out_channels) = (1, 2);
    (c.model.model_channels, c.model.num_res_blocks) = (32, 1);
    (c.model.channel_mult, c.model.attention_resolutions) = (vec![1, 2], vec![2]);
    (c.model.num_classes, c.model.dropout) = (Some(2), 0.1);
    (c.diffusion.var_type, c.diffusion.diffusion_steps) = (VarType::LearnedRange, 50);
    c.train.schedule_sampler = TimestepSampler::LossSecondMoment;
    (c.train.batch_size, c.train.microbatch) = (4, 3);
    let mut t = Trainer::new(c, Device::cpu(2).unwrap(), &data, true).unwrap();
    let mut meter = Meter::default();
    t.step(&mut meter).unwrap();
    let before = CALLS.load(Ordering::Relaxed);
    for _ in 0..STEPS {
        t.step(&mut meter).unwrap();
    }
    let calls = CALLS.load(Ordering::Relaxed) - before;
    // The queue through which work enters the thread pool is a list of blocks of 63 places, one place per step.
    assert!(calls <= 2, "{calls} allocations in {STEPS} steps");
}
