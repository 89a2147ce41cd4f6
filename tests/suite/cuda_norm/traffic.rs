//! What the norm's kernels move, by the emulator's meter, against what the ops declare.

use super::{Case, PLAIN, Recorded, metered};
use iddpm::ops::Operation;

/// Bytes declared and moved by the launches that `wanted` names, of step `step` of the plan.
fn ratio(r: &Recorded, step: usize, wanted: &str) -> f64 {
    let (launches, _) = metered(&r.g, |d, id| r.write(d, id));
    let moved: f64 = launches.iter().filter(|l| l.kernel.contains(wanted)).map(|l| l.traffic.bytes() as f64).sum();
    let cost = r.g.steps[step].op.cost(&r.g);
    let (declared, case) = (cost.read + cost.written, r.case);
    println!(
        "{wanted} {:?} x {:?}: declared {declared}, moved {moved} ({:.3})",
        case.hw,
        case.channels,
        moved / declared
    );
    for l in launches.iter().filter(|l| l.kernel.contains(wanted)) {
        println!("  {}: {} bytes, {:.3} sectors", l.kernel, l.traffic.bytes(), l.traffic.sectors_per_ideal());
    }
    moved / declared
}

#[test]
fn resident_backward_reads_x_and_dy_once() {
    for (hw, channels, n) in
        [([32, 32], [128, 0], 2), ([16, 16], [256, 128], 2), ([8, 8], [256, 256], 4), ([4, 4], [256, 0], 8)]
    {
        for add in [false, true] {
            let case = Case { n, hw, channels, half: true, scaled: true, dropout: Some(0.1), add, ..PLAIN };
            let got = ratio(&Recorded::new(case), 1, "backward_resident");
            assert!(got <= 1.15, "{case:?}: {got:.3} of the declared bytes");
        }
    }
}
