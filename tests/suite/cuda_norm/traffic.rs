//! What the norm's kernels move, by the emulator's meter, against what the ops declare.

use super::{Case, PLAIN, Recorded, metered};
use iddpm::ops::Operation;

/// What the launches named `wanted` moved, and the distinct sectors of them, relative to what step `step` of the case's plan declares.
fn ratios(case: Case, step: usize, wanted: &[&str]) -> [f64; 2] {
    let r = Recorded::new(case);
    let (launches, _) = metered(&r.g, |d, id| r.write(d, id));
    let cost = r.g.steps[step].op.cost(&r.g);
    let declared = cost.read + cost.written;
    let (mut moved, mut distinct) = (0.0, 0.0);
    println!("{} x {:?} x {:?}, add {}: declared {declared}", case.n, case.hw, case.channels, case.add);
    for l in launches.iter().filter(|l| wanted.iter().any(|w| l.kernel.starts_with(w))) {
        let t = l.traffic;
        let sectors = (t.read_footprint + t.written_footprint) as f64;
        println!(
            "  {}: {:.3} moved, {:.3} distinct, {:.3} sectors, {} bank conflicts of {}",
            l.kernel,
            t.bytes() as f64 / declared,
            sectors / declared,
            t.sectors_per_ideal(),
            t.bank_conflicts(),
            t.shared_ideal
        );
        moved += t.bytes() as f64 / declared;
        distinct += sectors / declared;
    }
    assert!(moved > 0.0, "no launch of {wanted:?}");
    [moved, distinct]
}

const REAL: Case = Case { half: true, scaled: true, dropout: Some(0.1), ..PLAIN };

#[test]
fn resident_backward_reads_x_and_dy_once() {
    for (hw, channels, n) in
        [([32, 32], [128, 0], 2), ([16, 16], [256, 128], 2), ([8, 8], [256, 256], 4), ([4, 4], [256, 0], 8)]
    {
        for add in [false, true] {
            let case = Case { n, hw, channels, add, ..REAL };
            let [moved, _] = ratios(case, 1, &["group_norm_backward_resident"]);
            assert!(moved <= 1.15, "{case:?}: {moved:.3} of the declared bytes");
        }
    }
    // A slab of 24 channels, 48 bytes: neighbours share a sector, which is one of memory but of two blocks.
    let case = Case { n: 1, hw: [32, 32], channels: [256, 128], ..REAL };
    let [moved, distinct] = ratios(case, 1, &["group_norm_backward_resident"]);
    assert!(moved <= 1.4 && distinct <= 1.05, "{moved:.3} moved, {distinct:.3} distinct");
}

/// Images of 64 x 64: x and dy twice, dx once, five tensors for the three declared; chunks of few images read the partial sums again.
#[test]
fn large_backward_reads_x_and_dy_twice() {
    let case = Case { n: 2, hw: [64, 64], channels: [64, 0], ..REAL };
    let [moved, _] = ratios(case, 1, &["group_norm_backward_sums", "group_norm_backward_apply"]);
    assert!(moved <= 1.1 * 5.0 / 3.0, "{moved:.3} of the declared bytes");
}

/// Without sums from a convolution x is read twice: by the statistics, then by the pass that writes y.
#[test]
fn forward_reads_x_once_after_its_statistics() {
    for (hw, channels, n) in [([32, 32], [128, 0], 16), ([8, 8], [256, 128], 8)] {
        let case = Case { n, hw, channels, ..REAL };
        let [apply, _] = ratios(case, 0, &["group_norm_apply"]);
        assert!(apply <= 1.1, "{case:?}: {apply:.3} of the declared bytes");
        let [all, _] = ratios(case, 0, &["group_norm_apply", "group_norm_sums"]);
        assert!(all <= 1.65, "{case:?}: {all:.3} of the declared bytes");
    }
}
