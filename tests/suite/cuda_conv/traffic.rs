//! What the tensor-core kernels move, by the emulator's meter.
//!
//! An implicit GEMM reads its gathered operand under every tap; L2 serves all but the first. So the bytes held against the
//! declared ones are those of the distinct sectors of a launch.

use super::{BF16, Data, FEW, MANY, PASSES, Pass, conv, driver, kernels, metered};
use iddpm::device::driver::LaunchTraffic;
use iddpm::ops::conv2d::ConvShape;

/// Bytes of the operands of a pass's main launch: activations in bf16, weights as the kernel reads or writes them.
fn declared(s: &ConvShape, pass: Pass, written: u64) -> u64 {
    let (x, y) = (s.in_pixels() * s.c() * 2, s.out_pixels() * s.oc * 2);
    let weights = s.oc * s.c() * if s.upsample { 16 } else { s.k * s.k };
    match pass {
        // Shift rows, bias; residual and result.
        Pass::Forward => (x + weights * 2 + s.oc * (2 * s.n + 4) + 2 * y) as u64,
        Pass::Data => (y + weights * 2 + 2 * x) as u64,
        // Partial sums, or dw read and written.
        Pass::Weight if written > 5 * weights as u64 || s.upsample => (x + y) as u64 + written,
        Pass::Weight => (x + y + 2 * 4 * weights) as u64,
    }
}

fn is_tile(launch: &&LaunchTraffic) -> bool {
    let name = launch.kernel.rsplit('_').next().unwrap_or("");
    name.split_once('x').is_some_and(|(m, n)| m.parse::<u32>().is_ok() && n.parse::<u32>().is_ok())
}

#[test]
fn tensor_core_kernels_move_what_they_declare_without_bank_conflicts() {
    let d = driver();
    for (s, full) in [
        (conv(4, [8, 8], [128, 0, 128], 3, 1, false), FEW),
        (conv(2, [16, 16], [64, 32, 64], 3, 1, false), MANY),
        (conv(2, [8, 8], [32, 0, 32], 3, 1, true), FEW),
        (conv(2, [16, 16], [32, 0, 64], 3, 2, false), FEW),
        (conv(2, [8, 8], [64, 0, 64], 1, 1, false), FEW),
    ] {
        let data = Data::new(s, 3);
        for pass in PASSES {
            let Some(log) = metered(&d, || drop(kernels(&d, &data, pass, BF16, full))) else { return };
            let launch = log.iter().find(is_tile).expect("one launch is a tile of the GEMM");
            let (name, t) = (&launch.kernel, launch.traffic);
            let moved = t.read_footprint + t.written_footprint;
            let ratio = moved as f64 / declared(&s, pass, t.written_footprint) as f64;
            println!("{name} {s:?}: {moved} bytes, {ratio:.3} of declared, {:.3} sectors", t.sectors_per_ideal());
            assert!(ratio <= 1.15, "{name} {s:?}: {moved} bytes are {ratio:.3} of the declared");
            assert_eq!(t.bank_conflicts(), 0, "{name} {s:?}: {} passes through shared memory", t.shared_wavefronts);
            // Whole sectors, but for the time shift and a few row sums.
            assert!(t.sectors_per_ideal() <= 1.25, "{name} {s:?}: {:.3} sectors per ideal one", t.sectors_per_ideal());
        }
    }
}
