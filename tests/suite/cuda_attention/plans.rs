//! The ops in recorded plans: forward and gradient as the processor has them, and what is refused.

use super::uniform;
use crate::device::gpu;
use half::bf16;
use iddpm::autograd;
use iddpm::device::{Device, Plan};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::attention::{Attention, QkvOrder};

/// out and dqkv of a plan of two images of 5 x 6 pixels, 2 heads of 24 channels.
fn run(mut device: Device, half: bool) -> [Vec<f32>; 2] {
    let mut g = Graph::new();
    g.half = half;
    let dtype = if half { DType::Bf16 } else { DType::F32 };
    let qkv = g.fixed("qkv", Shape::new(2, 5, 6, 144), dtype, Region::Inputs);
    let out = Attention::record(&mut g, qkv, 2, QkvOrder::New);
    let dout = g.fixed("dout", g.shape(out), dtype, Region::Inputs);
    let dqkv = autograd::backward(&mut g, 0..1, out, dout, &[qkv])[0].unwrap();
    [out, dqkv].into_iter().for_each(|v| g.keep(v));
    assert_eq!((g[out].dtype, g[dqkv].dtype), (dtype, dtype));
    let id = device.bind(Plan::new(g.clone(), true)).unwrap();
    for (seed, v) in [qkv, dout].into_iter().enumerate() {
        let data: Vec<bf16> = uniform(g.shape(v).len(), seed as u64).iter().map(|&x| bf16::from_f32(x)).collect();
        let wide: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
        if half { device.write(id, v, &data).unwrap() } else { device.write(id, v, &wide).unwrap() }
    }
    device.run(id).unwrap();
    [out, dqkv].map(|v: Val| {
        let (mut halves, mut wide) = (vec![bf16::ZERO; g.shape(v).len()], vec![0f32; g.shape(v).len()]);
        if half {
            device.read(id, v, &mut halves).unwrap();
            return halves.iter().map(|x| x.to_f32()).collect();
        }
        device.read(id, v, &mut wide).unwrap();
        wide
    })
}

#[test]
fn plans_follow_the_processor() {
    let cpu = run(Device::cpu(1).unwrap(), false);
    // f32: sums of tens of products in another order. bf16: operands are rounded already; p or ds, out in delta, and the result are
    // rounded by 2^-8 at most each.
    for (half, bound) in [(false, 1e-5), (true, 3.0 / 256.0)] {
        for (got, want) in run(gpu(), half).iter().zip(&cpu) {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let off = norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied());
            assert!(off <= bound, "half {half}: relative difference {off:e}, bound {bound:e}");
        }
    }
}

#[test]
fn what_no_kernel_covers_is_refused_by_name() {
    let refused = |dtype: DType, shape: Shape| {
        let mut g = Graph::new();
        let qkv = g.fixed("qkv", shape, dtype, Region::Inputs);
        Attention::record(&mut g, qkv, 2, QkvOrder::Legacy);
        gpu().bind(Plan::new(g, true)).unwrap_err().to_string()
    };
    for (dtype, shape, parts) in [
        (DType::Bf16, Shape::new(1, 4, 4, 48), ["attention", "Bf16", "s: 16", "--device cpu"]),
        (DType::F32, Shape::new(1, 1 << 15, 1 << 15, 6), ["attention", "6442450944", "d: 1", "--device cpu"]),
    ] {
        let message = refused(dtype, shape);
        parts.iter().for_each(|part| assert!(message.contains(part), "{part}: {message}"));
    }
}
