//! The driver on the emulator: launches, memory, checks, traffic; and what it says where there is no GPU.
#![cfg(feature = "emulator")]

use iddpm::args;
use iddpm::device::driver::{Driver, Launch};

#[test]
fn copy_moves_every_word() {
    let d = Driver::emulated().unwrap();
    for n in [1usize, 7, 1024, 5000] {
        let data: Vec<u32> = (0..4 * n as u32).collect();
        let (src, dst) = (d.alloc(16 * n).unwrap(), d.alloc(16 * n).unwrap());
        d.write(src.ptr(), &data).unwrap();
        d.launch("copy_16", Launch::new([3, 1, 1], [256, 1, 1]), args![dst.ptr(), src.ptr(), n as i64]).unwrap();
        let mut out = vec![0u32; 4 * n];
        d.read(dst.ptr(), &mut out).unwrap();
        assert_eq!(out, data, "n = {n}");
    }
}
