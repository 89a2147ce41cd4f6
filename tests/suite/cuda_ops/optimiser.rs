//! grad_norm and adamw_ema against their specification.

use super::*;
use iddpm::ops::adamw_ema::{AdamwEma, Hyper, step_cpu};
use iddpm::ops::grad_norm::GradNorm;

/// Sizes of one element, odd, across a chunk of the norm, and a multiple of 4.
const LENGTHS: [usize; 5] = [1, 7, 1024, 16_385, 40_004];

#[test]
fn grad_norm_matches_the_specification() {
    for len in LENGTHS {
        // Numbers whose squares neither f32 nor a careless sum can hold.
        for scale in [1.0f32, 1e-25, 1e25] {
            let x: Vec<f32> = normals(len, 3).iter().map(|x| (x - 2.3) * scale).collect();
            let mut g = Graph::new();
            let grads = g.at("grads", Shape::rows(1, len), DType::F32, Region::Grads, 0);
            let norm = GradNorm::record(&mut g, grads);
            let (device, id) = run(gpu(), &g, |d, id| write(d, id, grads, &x));
            let want = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let got = f64::from(read(&device, id, norm)[0]);
            // One rounding to f32.
            assert!((got - want).abs() <= 6.1e-8 * want, "{len} elements of size {scale}: {got} {want}");
        }
    }
}

#[test]
fn grad_norm_moves_what_it_must() {
    let len = 100_000;
    let mut g = Graph::new();
    let grads = g.at("grads", Shape::rows(1, len), DType::F32, Region::Grads, 0);
    let norm = GradNorm::record(&mut g, grads);
    let fill = |d: &mut Device, id| write(d, id, grads, &normals(len, 3));
    let (launches, _) = traffic(&g, fill);
    assert_eq!(launches.len(), 2);
    same_bits(&g, &[norm], fill);
}

struct Optimiser {
    g: Graph,
    op: AdamwEma,
}

fn optimiser(len: usize, hyper: Hyper, half: bool) -> Optimiser {
    let mut g = Graph::new();
    let rates = hyper.ema_rates.len();
    let mut all = |region, rows| g.at("all", Shape::rows(rows, len), DType::F32, region, 0);
    let [params, m, v, grads] = [Region::Params, Region::AdamM, Region::AdamV, Region::Grads].map(|r| all(r, 1));
    let ema = (rates > 0).then(|| all(Region::Ema, rates));
    let copy = half.then(|| g.fixed("copy", Shape::rows(1, len), DType::Bf16, Region::State));
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let norm = g.fixed("norm", Shape::rows(1, 1), DType::F32, Region::Inputs);
    let op = AdamwEma { params, m, v, ema, copy, grads, norm, control, hyper };
    g.push(op.clone());
    Optimiser { g, op }
}

/// Weights, moments, averages and gradients before the step.
fn state(len: usize, rates: usize) -> [Vec<f32>; 5] {
    let second: Vec<f32> = normals(len, 2).iter().map(|x| x * x * 1e-3).collect();
    let mut all = [normals(len, 0), normals(len, 1), second, normals(len * rates, 3), normals(len, 4)];
    // Some gradients are 0, some tiny, some large.
    all[4].iter_mut().enumerate().for_each(|(i, g)| *g *= [1.0, 0.0, 1e-12, 1e4][i % 4]);
    all
}

const STEP: Control = Control { lr: 1e-3, bias1: 0.271, bias2: 0.002_997_001, ..CONTROL };

impl Optimiser {
    fn write(&self, norm: f32, d: &mut Device, id: PlanId) {
        let op = &self.op;
        let [p, m, v, ema, grads] = state(self.g.shape(op.params).len(), op.hyper.ema_rates.len());
        for (val, x) in [(op.params, &p), (op.m, &m), (op.v, &v), (op.grads, &grads)] {
            write(d, id, val, x);
        }
        if let Some(val) = op.ema {
            write(d, id, val, &ema);
        }
        write(d, id, op.norm, &[norm]);
        d.write(id, op.control, &[STEP]).unwrap();
    }
}

#[test]
fn adamw_ema_matches_the_specification() {
    for len in LENGTHS {
        for (rates, max_norm) in [(vec![], None), (vec![0.9999], Some(1.0)), (vec![0.99, 0.9999, 0.5], None)] {
            for norm in [0.3f32, 25.0, f32::NAN, f32::INFINITY] {
                let hyper = Hyper { weight_decay: 0.05, max_norm, ema_rates: rates.clone(), ..Hyper::default() };
                check_optimiser(len, hyper, norm);
            }
        }
    }
}

fn check_optimiser(len: usize, hyper: Hyper, norm: f32) {
    let o = optimiser(len, hyper.clone(), true);
    let (device, id) = run(gpu(), &o.g, |d, id| o.write(norm, d, id));
    let [before, m0, v0, ema0, grads] = state(len, hyper.ema_rates.len());
    let (mut p, mut m, mut v, mut ema) = (before.clone(), m0, v0, ema0);
    step_cpu(&mut p, (&mut m, &mut v), &mut ema, &grads, norm, &STEP, &hyper);
    let mut pairs = vec![(o.op.params, &p), (o.op.m, &m), (o.op.v, &v)];
    pairs.extend(o.op.ema.map(|val| (val, &ema)));
    for (val, want) in pairs {
        for (i, (got, want)) in read(&device, id, val).iter().zip(want).enumerate() {
            assert_eq!(got.to_bits(), want.to_bits(), "{len} {hyper:?} norm {norm}, element {i}: {got} {want}");
        }
    }
    let copy = read(&device, id, o.op.copy.unwrap());
    if norm.is_finite() {
        assert_eq!(copy, round(&read(&device, id, o.op.params)));
        assert!(p != before, "a step moves");
    } else {
        assert!(p == before && copy.iter().all(|&c| c == 0.0), "a bad norm leaves everything as it was");
    }
}

/// 38 bytes per parameter with one average and the bf16 copy, 8 for each further average.
#[test]
fn adamw_ema_moves_what_it_must() {
    let len = 20_000;
    for (rates, each) in [(vec![0.9999], 38.0), (vec![0.99, 0.9999], 46.0)] {
        let o = optimiser(len, Hyper { ema_rates: rates, ..Hyper::default() }, true);
        let (launches, moved) = traffic(&o.g, |d, id| o.write(1.0, d, id));
        assert_eq!(launches.len(), 1);
        assert!(moved <= 1.05 * each * len as f64, "{moved} bytes for {len} parameters");
        same_bits(&o.g, &outputs_of(&o.g), |d, id| o.write(1.0, d, id));
    }
}
