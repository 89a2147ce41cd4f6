//! Samplers on data whose exact predictor is known: N(m, s²) in every element.
//!
//! The best prediction of x_0 from x_t is `(a s² x_t + b² m)/v²` with `a = sqrt(alpha_bar)`, `b² = 1 - alpha_bar`, `v² = a² s² + b²`; along the
//! exact path `(x_t - a m)/v` does not change, so a walk from x_T must end at `m + s (x_T - a m)/v`, and its error tells the order.

use iddpm::config::{DiffusionConfig, MeanType, Schedule, VarType};
use iddpm::device::{Device, Plan};
use iddpm::diffusion::Output;
use iddpm::diffusion::gaussian;
use iddpm::graph::{DType, Graph, Region, Shape};
use iddpm::ops::Control;
use iddpm::ops::p_sample::{PSample, Reverse};
use iddpm::schedule::{Coefs, Process};
use std::sync::Arc;

pub const MEAN: f64 = 0.1;
pub const DEVIATION: f64 = 0.3;

/// What the perfect network says of `x_t`.
fn perfect(c: &Coefs, mean_type: MeanType, x_t: f64) -> f64 {
    let spread = c.alpha_bar * DEVIATION.powi(2) + 1.0 - c.alpha_bar;
    let x_0 = (c.sqrt_alpha_bar * DEVIATION.powi(2) * x_t + (1.0 - c.alpha_bar) * MEAN) / spread;
    gaussian::target(c, mean_type, x_0, x_t, gaussian::eps_from_x_0(c, x_t, x_0))
}

/// Deviation of x_t at a step.
fn deviation(c: &Coefs) -> f64 {
    (c.alpha_bar * DEVIATION.powi(2) + 1.0 - c.alpha_bar).sqrt()
}

/// Walks of one image each that start at `x`, by the op on `device`: (x, x_0) after each pass.
fn walk(mut device: Device, reverse: Reverse, mean_type: MeanType, process: &Process, x: &[f32]) -> Vec<[Vec<f32>; 2]> {
    let mut g = Graph::new();
    let s = Shape::new(1, 1, x.len(), 1);
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let seeds = g.fixed("seeds", Shape::rows(1, 2), DType::I32, Region::Inputs);
    let out = g.fixed("out", s, DType::F32, Region::Inputs);
    let [state, x_0] = ["x", "x_0"].map(|name| g.fixed(name, s, DType::F32, Region::State));
    let output = Output { mean_type, var_type: VarType::FixedLarge };
    g.push(PSample {
        x: state,
        copy: None,
        x_0: Some(x_0),
        out,
        seeds,
        noise: None,
        control,
        reverse,
        output,
        guidance: None,
        threshold: None,
        clip: false,
        process: Arc::new(process.clone()),
    });
    let id = device.bind(Plan::new(g, true)).unwrap();
    // What a walk before has left behind must not be looked at.
    device.write(id, x_0, &vec![f32::NAN; x.len()]).unwrap();
    device.write(id, state, x).unwrap();
    let mut x = x.to_vec();
    let mut passes = vec![];
    for pass in reverse.passes(process.steps()) {
        let c = process.at(pass.t);
        let said: Vec<f32> = x.iter().map(|&x| perfect(&c, mean_type, x.into()) as f32).collect();
        device.write(id, out, &said).unwrap();
        device.write(id, control, &[Control { t: pass.row as u32, ..Control::default() }]).unwrap();
        device.run(id).unwrap();
        let read = |v| {
            let mut x = vec![f32::NAN; x.len()];
            device.read(id, v, &mut x).unwrap();
            x
        };
        passes.push([read(state), read(x_0)]);
        x.clone_from(&passes.last().unwrap()[0]);
    }
    passes
}

const STARTS: [f32; 3] = [-1.7, 0.2, 1.1];

fn respaced(schedule: Schedule, steps: usize, respacing: &str) -> Process {
    let config = DiffusionConfig {
        noise_schedule: schedule,
        diffusion_steps: steps,
        timestep_respacing: respacing.into(),
        ..DiffusionConfig::default()
    };
    Process::from_config(&config).unwrap()
}

fn cpu() -> Device {
    Device::cpu(1).unwrap()
}

/// Largest error of a walk's end.
fn error(reverse: Reverse, mean_type: MeanType, process: &Process) -> f64 {
    let last = process.at(process.steps() - 1);
    let ends = walk(cpu(), reverse, mean_type, process, &STARTS).pop().unwrap();
    let off = STARTS.iter().zip(&ends[0]).map(|(&start, &end)| {
        let truth = MEAN + DEVIATION * (f64::from(start) - last.sqrt_alpha_bar * MEAN) / deviation(&last);
        (f64::from(end) - truth).abs()
    });
    off.fold(0.0, f64::max)
}

/// Twice the steps: half the error for DDIM, a quarter for the solvers of second order, whatever the network predicts.
#[test]
fn solvers_converge_with_their_order() {
    for mean_type in [MeanType::Epsilon, MeanType::XStart, MeanType::V] {
        for (reverse, order) in [(Reverse::Ddim(0.0), 1.0), (Reverse::DpmSolver, 2.0), (Reverse::Heun, 2.0)] {
            let of = |n: usize| {
                // So many original steps that rounding to one of them does not count, nor the step from the first to the clean image.
                error(reverse, mean_type, &respaced(Schedule::Linear, 1_000_000, &format!("logsnr{n}")))
            };
            let errors = [20, 40, 80, 160].map(of);
            let rates: Vec<f64> = errors.windows(2).map(|e| (e[0] / e[1]).log2()).collect();
            // The errors' next term is one order higher: at these sizes a few tenths of an order.
            assert!(
                rates.iter().all(|r| (r - order).abs() < 0.35),
                "{reverse:?} {mean_type:?}: {errors:?}, orders {rates:?}"
            );
        }
    }
}

/// With 10 to 50 of the steps of a real schedule the solvers of second order are nearer the exact path than DDIM with as many.
#[test]
fn few_steps_suffice_for_solvers_of_second_order() {
    for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::Sigmoid] {
        for n in [10, 20, 50] {
            let even = respaced(schedule, 1000, &n.to_string());
            let by_snr = respaced(schedule, 1000, &format!("logsnr{n}"));
            let of = |reverse, process| error(reverse, MeanType::Epsilon, process);
            let (ddim, dpm, heun) =
                (of(Reverse::Ddim(0.0), &even), of(Reverse::DpmSolver, &by_snr), of(Reverse::Heun, &even));
            assert!(dpm < 0.3 * ddim && heun < 0.85 * ddim, "{schedule:?} {n}: {ddim} {dpm} {heun}");
        }
    }
}

/// The end of every deterministic walk is the exact one: in the limit they agree.
#[test]
fn all_solvers_have_one_limit() {
    let process = respaced(Schedule::Linear, 100_000, "logsnr2000");
    for reverse in [Reverse::Ddim(0.0), Reverse::DpmSolver, Reverse::Heun] {
        let off = error(reverse, MeanType::Epsilon, &process);
        // DDIM's 0.08 at 20 steps falls as 1/steps; the others are at the rounding of x to f32, 2,000 times over.
        assert!(off < if reverse == Reverse::Ddim(0.0) { 1.5e-3 } else { 1e-5 }, "{reverse:?}: {off}");
    }
}

/// From images to noise and back: the way back meets the image the better the more steps there are, in proportion.
#[test]
fn ddim_returns_the_image_it_encoded() {
    let images = [-0.6f32, 0.1, 0.5];
    let round_trip = |process: &Process| {
        let [noise, _] = walk(cpu(), Reverse::DdimReverse, MeanType::Epsilon, process, &images).pop().unwrap();
        // The noise of an image is its number of deviations from the mean.
        for (x, noise) in images.iter().zip(&noise) {
            let exact = (f64::from(*x) - MEAN) / DEVIATION;
            assert!((f64::from(*noise) - exact).abs() < 0.12 * exact.abs() + 1e-3, "{x}: {noise}, {exact}");
        }
        let [back, _] = walk(cpu(), Reverse::Ddim(0.0), MeanType::Epsilon, process, &noise).pop().unwrap();
        images.iter().zip(back).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
    };
    let errors = [250, 500, 1000, 2000].map(|n| round_trip(&respaced(Schedule::Cosine, 8000, &n.to_string())));
    assert!(errors[3] < 4e-3, "{errors:?}");
    assert!(errors.windows(2).all(|e| (e[0] / e[1] - 2.0).abs() < 0.3), "{errors:?}");
}

/// The kernel walks where the specification walks.
#[cfg(feature = "emulator")]
#[test]
fn the_kernel_takes_the_same_walks() {
    for reverse in [Reverse::Ddim(0.0), Reverse::DpmSolver, Reverse::Heun, Reverse::DdimReverse] {
        for mean_type in [MeanType::Epsilon, MeanType::V] {
            let process = respaced(Schedule::Cosine, 1000, "12");
            let here = walk(cpu(), reverse, mean_type, &process, &STARTS);
            let there = walk(crate::device::gpu(), reverse, mean_type, &process, &STARTS);
            for (pass, (a, b)) in here.iter().zip(&there).enumerate() {
                for (a, b) in a.concat().iter().zip(b.concat()) {
                    // 1e-6 of the terms of each step (cuda_ops), which at the ends of the process are some tens.
                    assert!((a - b).abs() <= 1e-4, "{reverse:?} {mean_type:?} pass {pass}: {a} {b}");
                }
            }
        }
    }
}
