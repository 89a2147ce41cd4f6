//! Guidance and dynamic thresholds on a GPU, against the ops on the processor.

use super::*;
use iddpm::diffusion::steer;
use iddpm::ops::dynamic_threshold::DynamicThreshold;
use iddpm::ops::p_sample::{PSample, Reverse};

/// A plan of one reverse step of 3 pictures, steered.
struct Steered {
    g: Graph,
    op: PSample,
}

fn steered(
    half: bool,
    [h, w, c]: [usize; 3],
    process: &Arc<Process>,
    output: Output,
    reverse: Reverse,
    guidance: Option<f64>,
    quantile: Option<f64>,
) -> Steered {
    let mut g = Graph::new();
    let pictures = Shape::new(3, h, w, c);
    let seen = Shape { n: if guidance.is_some() { 6 } else { 3 }, ..pictures };
    let mut fixed = |name: &str, shape, dtype, region| g.fixed(name, shape, dtype, region);
    let control = fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let seeds = fixed("seeds", Shape::rows(3, 2), DType::I32, Region::Inputs);
    let dtype = if half { DType::Bf16 } else { DType::F32 };
    let out = fixed("out", Shape { c: output.channels(c), ..seen }, dtype, Region::Inputs);
    let x = fixed("x", seen, DType::F32, Region::State);
    let copy = half.then(|| fixed("copy", seen, DType::Bf16, Region::State));
    let x_0 = Some(fixed("x_0", pictures, DType::F32, Region::State));
    let threshold = quantile.map(|_| fixed("threshold", Shape::rows(3, 1), DType::F32, Region::State));
    let (noise, clip, process) = (None, threshold.is_none(), process.clone());
    let mut op =
        PSample { x, copy, x_0, out, seeds, noise, control, reverse, output, guidance, clip, threshold: None, process };
    if let (Some(threshold), Some(quantile)) = (threshold, quantile) {
        g.push(DynamicThreshold { threshold, quantile, step: op.clone() });
        op.threshold = Some(threshold);
    }
    g.push(op.clone());
    Steered { g, op }
}

/// Multiples of 1/64, many of them equal; sums of a few with small whole factors are exact in f32.
fn coarse(n: usize, stream: u32) -> Vec<f32> {
    normals(n, stream).into_iter().map(|x| (64.0 * x).round() / 64.0).collect()
}

impl Steered {
    fn write(&self, t: usize, d: &mut Device, id: PlanId) {
        let s = self.g.shape(self.op.x);
        let pictures = self.g.shape(self.op.x_0.unwrap()).len();
        d.write(id, self.op.seeds, &[5, 0, 6, 1, 7, 2]).unwrap();
        d.write(id, self.op.control, &[Control { t: t as u32, ..CONTROL }]).unwrap();
        write(d, id, self.op.x, &coarse(pictures, 1).repeat(s.len() / pictures));
        write(d, id, self.op.out, &round(&coarse(self.g.shape(self.op.out).len(), 2)));
        write(d, id, self.op.x_0.unwrap(), &coarse(pictures, 3));
    }

    fn thresholds(&self, device: &Device, id: PlanId) -> Vec<f32> {
        self.op.threshold.map_or(vec![], |v| read(device, id, v))
    }
}

/// Learned variances, each with its own label; the halves of x stay alike.
#[test]
fn guided_steps_match_the_processor() {
    let process = &processes()[2];
    for (k, output) in outputs().filter(|o| o.mean_type != MeanType::PreviousX).enumerate() {
        for (j, reverse) in [Reverse::Ancestral, Reverse::Ddim(0.3), Reverse::DpmSolver].into_iter().enumerate() {
            let (weight, t) = ([0.0, 3.0, 7.5][(k + j) % 3], [0, 12, 24][(k + 2 * j) % 3]);
            let size = SIZES[(k + j) % 4];
            let there = |half| {
                let s = steered(half, size, process, output, reverse, Some(weight), None);
                let (device, id) = run(gpu(), &s.g, |d, id| s.write(t, d, id));
                let x = read(&device, id, s.op.x);
                assert_eq!(x[..x.len() / 2], x[x.len() / 2..], "{output:?} {reverse:?}");
                assert!(s.op.copy.is_none_or(|copy| read(&device, id, copy) == round(&x)));
                [x, read(&device, id, s.op.x_0.unwrap())]
            };
            let s = steered(false, size, process, output, reverse, Some(weight), None);
            let (device, id) = run(Device::cpu(1).unwrap(), &s.g, |d, id| s.write(t, d, id));
            let here = [read(&device, id, s.op.x), read(&device, id, s.op.x_0.unwrap())];
            let c = process.at(t);
            for half in [false, true] {
                let there = there(half);
                for (a, b) in here.concat().iter().zip(there.concat()) {
                    // A guided output of up to 60 is rounded to f32, which the prediction magnifies; the step itself is good to 1e-6.
                    let allowed = 60.0 * 6e-8 * (1.0 + c.sqrt_recipm1_alpha_bar) + 3e-6 * (1.0 + f64::from(a.abs()));
                    let off = f64::from((a - b).abs());
                    assert!(off <= allowed, "{output:?} {reverse:?} t {t} w {weight} half {half}: {a} {b}");
                }
            }
        }
    }
}

/// A network that predicts x_0 itself leaves no rounding: the selected quantile has the bits of the sorted one.
#[test]
fn thresholds_are_those_of_sorting() {
    let process = &processes()[2];
    for size in SIZES {
        for (k, quantile) in [0.0, 0.3, 0.5, 0.9, 0.995, 1.0].into_iter().enumerate() {
            for guidance in [None, Some(2.0)] {
                let var_type = VARIANCES[k % 4];
                let output = Output { mean_type: MeanType::XStart, var_type };
                let half = k % 2 == 1;
                let s = steered(half, size, process, output, Reverse::Ddim(0.0), guidance, Some(quantile));
                let (device, id) = run(gpu(), &s.g, |d, id| s.write(7, d, id));
                let s_here = steered(false, size, process, output, Reverse::Ddim(0.0), guidance, Some(quantile));
                let (here, here_id) = run(Device::cpu(1).unwrap(), &s_here.g, |d, id| s_here.write(7, d, id));
                let got = s.thresholds(&device, id);
                assert_eq!(got, s_here.thresholds(&here, here_id), "{size:?} {quantile} {guidance:?}");
                // By the definition: sort, and go along the line between two neighbours.
                let out = round(&coarse(s.g.shape(s.op.out).len(), 2));
                let (pixels, stride) = (size[0] * size[1], output.channels(size[2]));
                for (n, &got) in got.iter().enumerate() {
                    let at = |n: usize, i: usize| out[(n * pixels + i / size[2]) * stride + i % size[2]];
                    let mean = |i| guidance.map_or(at(n, i), |w| at(n + 3, i) + w as f32 * (at(n, i) - at(n + 3, i)));
                    let mut sorted: Vec<f32> = (0..pixels * size[2]).map(|i| mean(i).abs()).collect();
                    sorted.sort_by(f32::total_cmp);
                    let (rank, fraction) = steer::quantile_place(quantile, sorted.len());
                    let next = sorted[(rank + 1).min(sorted.len() - 1)];
                    let want = fraction.mul_add(next - sorted[rank], sorted[rank]).max(1.0);
                    assert_eq!(got, want, "{size:?} {quantile} {guidance:?} image {n}");
                }
                let (x_0, x_0_here) =
                    (read(&device, id, s.op.x_0.unwrap()), read(&here, here_id, s_here.op.x_0.unwrap()));
                assert!(x_0.iter().all(|x| x.abs() <= 1.0));
                // One division of equal numbers, rounded once and twice.
                assert!(x_0.iter().zip(&x_0_here).all(|(a, b)| (a - b).abs() <= 1.2e-7 * b.abs()), "{size:?}");
            }
        }
    }
}

/// Predictions from eps and v: the threshold is as good as x_0.
#[test]
fn thresholded_steps_match_the_processor() {
    for process in processes() {
        for mean_type in [MeanType::Epsilon, MeanType::V] {
            for t in steps_of(&process) {
                let output = Output { mean_type, var_type: VarType::LearnedRange };
                let s = steered(false, [33, 31, 3], &process, output, Reverse::Ancestral, None, Some(0.995));
                let (there, id) = run(gpu(), &s.g, |d, id| s.write(t, d, id));
                let (here, here_id) = run(Device::cpu(1).unwrap(), &s.g, |d, id| s.write(t, d, id));
                let close = |a: &[f32], b: &[f32], what: &str| {
                    // x_0 is good to 3e-7 of itself, and so is the quantile; a step is a sum of three such numbers.
                    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
                    assert!(off <= 3e-6, "{what} {mean_type:?} t {t}: {off}");
                };
                close(&s.thresholds(&there, id), &s.thresholds(&here, here_id), "thresholds");
                for v in [s.op.x, s.op.x_0.unwrap()] {
                    close(&read(&there, id, v), &read(&here, here_id, v), "pictures");
                }
            }
        }
    }
}

#[test]
fn steered_steps_have_the_same_bits_on_any_grid() {
    let output = Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange };
    let process = &processes()[2];
    let s = steered(true, [33, 31, 3], process, output, Reverse::Ancestral, Some(3.0), Some(0.9));
    same_bits(&s.g, &outputs_of(&s.g), |d, id| s.write(9, d, id));
}

/// Guidance reads the other half of the outputs and writes x and its copy twice.
#[test]
fn guided_steps_move_what_they_must() {
    let output = Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange };
    let s = steered(true, [32, 32, 3], &processes()[0], output, Reverse::Ddim(0.0), Some(3.0), None);
    let (launches, moved) = traffic(&s.g, |d, id| s.write(500, d, id));
    let elements = s.g.shape(s.op.x_0.unwrap()).len() as f64;
    assert_eq!(launches.len(), 1);
    // x read, x twice and its copy twice written, x_0 written, two outputs of 2C read.
    assert!(moved <= 1.05 * (4.0 + 8.0 + 4.0 + 4.0 + 8.0) * elements, "{moved} bytes for {elements} elements");
}
