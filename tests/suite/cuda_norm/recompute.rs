//! Residual blocks computed anew in the backward pass, with statistics from the epilogues of their convolutions.

use super::uniform;
use crate::cuda_ops::{CONTROL, gpu, write};
use iddpm::autograd;
use iddpm::config::{ModelConfig, Precision};
use iddpm::device::{Device, Plan};
use iddpm::graph::{DType, Graph, Region, Shape};
use iddpm::ops::{Op, Operation};
use iddpm::unet::{self, DropoutRun, Params};

fn tiny() -> ModelConfig {
    ModelConfig {
        image_size: 8,
        in_channels: 3,
        out_channels: 3,
        model_channels: 32,
        num_res_blocks: 1,
        channel_mult: vec![1, 2],
        attention_resolutions: vec![2],
        num_heads: 2,
        dropout: 0.3,
        ..ModelConfig::default()
    }
}

/// The output and every gradient, on a device of this precision.
fn gradients(precision: Precision, recompute: bool, reuse: bool) -> (Vec<u8>, Vec<f32>) {
    let (config, n) = (tiny(), 2);
    let mut device = gpu().with_precision(precision);
    let (params, mut g) = (Params::new(&config), Graph::on(device.target()));
    let vals = params.declare(&mut g);
    let float = g.float();
    let size = Shape::new(n, config.image_size, config.image_size, config.in_channels);
    let x = g.fixed("x", size, float, Region::Inputs);
    let t = g.fixed("t", Shape::rows(n, 1), DType::F32, Region::Inputs);
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let dropout = Some(DropoutRun { p: config.dropout, first_image: 0, control });
    let net = unet::record(&mut g, &config, &vals, x.into(), t, None, dropout);
    let (out, steps) = (net.out, g.steps.len());
    let dout = g.fixed("dout", g.shape(out), g[out].dtype, Region::Inputs);
    if recompute {
        unet::backward_with_recompute(&mut g, &vals, &net, dropout, 0..steps, dout);
    } else {
        autograd::backward(&mut g, 0..steps, out, dout, &[]);
    }
    g.keep(out);
    check_order(&g);
    let id = device.bind(Plan::new(g.clone(), reuse)).unwrap();
    // Zeros would hide what a block gives to its output.
    let flat: Vec<f32> = params.init(3).iter().zip(uniform(params.len, 4)).map(|(w, u)| w + 0.05 * u).collect();
    device.write_region(Region::Params, &flat).unwrap();
    if g.half {
        let half: Vec<half::bf16> = flat.iter().map(|&w| half::bf16::from_f32(w)).collect();
        device.write_region(Region::Compute, &half).unwrap();
    }
    write(&mut device, id, x, &uniform(size.len(), 1));
    write(&mut device, id, t, &[7.0, 107.0]);
    write(&mut device, id, dout, &uniform(g.shape(out).len(), 2));
    device.write(id, control, &[CONTROL]).unwrap();
    device.run(id).unwrap();
    (bytes(&device, id, out), region(&device, params.len))
}

fn bytes(device: &Device, id: iddpm::device::PlanId, v: iddpm::graph::Val) -> Vec<u8> {
    let mut out = vec![0; device.plan(id).graph[v].bytes()];
    device.read(id, v, &mut out).unwrap();
    out
}

fn region(device: &Device, len: usize) -> Vec<f32> {
    let mut grads = vec![0.0; len];
    device.read_region(Region::Grads, &mut grads).unwrap();
    grads
}

/// Every norm after a convolution has its statistics from it, and every step reads what an earlier one wrote.
fn check_order(g: &Graph) {
    let mut written: Vec<bool> = g.values.iter().map(|v| v.place != iddpm::graph::Place::Arena).collect();
    for (i, step) in g.steps.iter().enumerate() {
        for v in step.op.inputs() {
            assert!(written[v.index()], "step {i} ({}) reads {} before it is written", step.op.name(), g[v].name);
        }
        step.op.outputs().into_iter().for_each(|v| written[v.index()] = true);
        if let Op::GroupNorm(norm) = &step.op {
            for (v, sums) in norm.x.vals().zip(norm.sums) {
                let by_conv = |s: &iddpm::graph::Step| matches!(&s.op, Op::Conv2d(c) if c.y == v);
                assert_eq!(g.steps.iter().any(by_conv), sums.is_some(), "step {i}: {}", g[v].name);
            }
        }
    }
}

#[test]
fn recomputing_and_reusing_memory_change_no_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (out, grads) = gradients(precision, false, true);
        assert!(grads.iter().all(|g| g.is_finite()) && grads.iter().any(|g| *g != 0.0), "{precision:?}");
        for (recompute, reuse) in [(true, true), (false, false)] {
            let (out2, grads2) = gradients(precision, recompute, reuse);
            let what = format!("{precision:?}, recompute {recompute}, reuse {reuse}");
            assert!(out == out2, "{what}: another output");
            assert!(bytemuck::cast_slice::<f32, u32>(&grads) == bytemuck::cast_slice::<f32, u32>(&grads2), "{what}");
        }
    }
}
