//! What the tensor-core kernels move, by the emulator's meter.
//!
//! The tiles of one head read its keys and values (backward: everything) again, from L2; so the bytes held against the declared ones are
//! those of the distinct sectors of each launch. The backward's first launch reads dout once more, and its sums pass through memory.

use super::{Data, FEW, MANY, driver, kernels, shape};
use iddpm::ops::attention::QkvOrder;

#[test]
fn tensor_core_kernels_move_what_they_declare_without_bank_conflicts() {
    let d = driver();
    let Some(emulator) = d.emulator() else { return };
    for (size, full) in [
        ([2, 256, 1, 64], FEW),
        ([1, 256, 2, 32], MANY),
        ([1, 64, 2, 96], MANY),
        ([1, 128, 1, 128], FEW),
        ([1, 64, 1, 144], MANY),
        ([4, 16, 1, 192], MANY),
        ([2, 16, 4, 64], MANY),
    ] {
        let data = Data::new(shape(size, QkvOrder::Legacy), 1.0, 3);
        let (_, log) = emulator
            .metered(|| {
                kernels(&d, &data, true, full);
                Ok(())
            })
            .unwrap();
        let (values, rows) = (2 * data.dout.len() as u64, 4 * (size[0] * size[1] * size[2]) as u64);
        let declared = [("attention_forward", 4 * values + rows), ("attention_backward", 8 * values + rows)];
        for (pass, declared) in declared {
            let of = |name: &str| name.starts_with(pass) || pass == "attention_backward" && name.contains("delta");
            let launches: Vec<_> = log.iter().filter(|l| of(&l.kernel)).collect();
            let moved: u64 = launches.iter().map(|l| l.traffic.read_footprint + l.traffic.written_footprint).sum();
            let (name, t) = launches.last().map(|l| (&l.kernel, l.traffic)).expect("a launch");
            let ratio = moved as f64 / declared as f64;
            println!("{name} {size:?}: {moved} bytes, {ratio:.3} of declared, {:.3} sectors", t.sectors_per_ideal());
            assert!(ratio <= 1.15, "{name} {size:?}: {moved} bytes are {ratio:.3} of the declared");
            assert_eq!(t.bank_conflicts(), 0, "{name} {size:?}: {} passes through shared memory", t.shared_wavefronts);
            assert!(
                t.sectors_per_ideal() <= 1.25,
                "{name} {size:?}: {:.3} sectors per ideal one",
                t.sectors_per_ideal()
            );
        }
    }
}
