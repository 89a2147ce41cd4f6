//! Kinds 06_samplers and 07_bpd: walks and the bound, with an affine stand-in for the network and stored noise.
//!
//! `out[o] = Σ_c (A[o,c] + τ B[o,c]) x[c] + b[o] + τ s[o]` at every pixel, τ = the time told to the network / tdiv.

use iddpm::config::{FirstStep, LossType, LossWeight};
use iddpm::diffusion::{Objective, Output, bound_terms, clip, ddim, ddim_reverse, p_sample, prior_bpd, q_sample};
use iddpm::schedule::Process;
use serde_json::Value;

use super::vectors::{Tensor, VectorFile, channels_first, mean_type, process, var_type};

/// The stand-in network of one case.
pub struct StandIn<'a> {
    weights: [&'a Tensor; 4],
    tdiv: f64,
}

impl<'a> StandIn<'a> {
    pub fn of(file: &'a VectorFile, name: &str, case: &Value) -> Self {
        let weights = ["A", "B", "b", "s"].map(|part| file.get(&format!("{name}/model.{part}")));
        StandIn { weights, tdiv: case["tdiv"].as_f64().expect("tdiv") }
    }

    /// Output (pixels, O) for an image x (pixels, C).
    pub fn run(&self, x: &[f32], time: f32) -> Vec<f32> {
        let [a, b_time, b, s] = self.weights.map(|w| &w.values);
        let (outputs, channels) = (self.weights[0].shape[0], self.weights[0].shape[1]);
        let tau = f64::from(time) / self.tdiv;
        let at = |pixel: &[f32], o: usize| {
            let row = o * channels;
            let sum: f64 = (0..channels).map(|c| (a[row + c] + tau * b_time[row + c]) * f64::from(pixel[c])).sum();
            (sum + b[o] + tau * s[o]) as f32
        };
        x.chunks_exact(channels).flat_map(|pixel| (0..outputs).map(move |o| at(pixel, o))).collect()
    }
}

pub fn output(case: &Value) -> Output {
    let name = |key: &str| case[key].as_str().unwrap_or_else(|| panic!("`{key}` of {case}"));
    Output { mean_type: mean_type(name("mean")), var_type: var_type(name("var")) }
}

/// File 06: whole trajectories of the ancestral, DDIM and reverse DDIM walks.
pub fn check(file: &VectorFile) {
    for (name, case) in &file.cases {
        walk(file, name, case, &process(case));
    }
}

fn walk(file: &VectorFile, name: &str, case: &Value, process: &Process) {
    let model = StandIn::of(file, name, case);
    let (start, steps) = (file.get(&format!("{name}/x_init")), process.steps());
    let (batch, channels) = (start.shape[0], start.shape[1]);
    let kind = case["kind"].as_str().expect("kind");
    let (clipped, damped) = (case["clip_denoised"] == true, case["denoised_fn"] == true);
    let x_0_map = |x: f64| clip(clipped)(if damped { 0.9 * x + 0.05 } else { x });
    let eta = case["eta"].as_f64().unwrap_or(0.0);
    let output = output(case);
    let mut images: Vec<Vec<f32>> = (0..batch).map(|n| start.sub(n).channels_last().f32s()).collect();
    let (mut times, mut xs, mut x_0s) = (vec![], vec![], vec![]);
    for call in 0..steps {
        let t = if kind == "ddim reverse" { call } else { steps - 1 - call };
        let c = process.at(t);
        let time = process.time_value(t, case["rescale_timesteps"] == true);
        times.push(time);
        for (n, x) in images.iter_mut().enumerate() {
            let out = model.run(x, time);
            let (mut next, mut x_0) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            let noise = || file.get(&format!("{name}/noise")).sub(call).sub(n).channels_last().f32s();
            match kind {
                "ancestral" => p_sample(output, &c, channels, x_0_map, &mut next, &mut x_0, x, &out, &noise()),
                "ddim" => ddim(output, &c, channels, eta, x_0_map, &mut next, &mut x_0, x, &out, &noise()),
                "ddim reverse" => ddim_reverse(output, &c, channels, x_0_map, &mut next, &mut x_0, x, &out),
                other => panic!("{name}: unknown sampler {other}"),
            }
            xs.extend(planar(&next, channels));
            x_0s.extend(planar(&x_0, channels));
            *x = next;
        }
    }
    file.compare_f32(&format!("{name}/t_model"), &times);
    file.compare(&format!("{name}/x"), &xs);
    file.compare(&format!("{name}/pred_xstart"), &x_0s);
}

pub fn planar(image: &[f32], channels: usize) -> Vec<f64> {
    channels_first(&image.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), channels)
}

/// File 07: every term of the bound, from t = T-1 down to 0, the prior and the total.
pub fn bound(file: &VectorFile) {
    for (name, case) in &file.cases {
        let process = process(case);
        let model = StandIn::of(file, name, case);
        let objective = Objective {
            output: output(case),
            loss_type: LossType::Kl,
            first_step: FirstStep::Nll,
            weight: LossWeight::Uniform,
        };
        let (x_0, noise) = (file.get(&format!("{name}/x_start")), file.get(&format!("{name}/noise")));
        let channels = x_0.shape[1];
        let (mut vb, mut x_0_mse, mut mse, mut prior, mut total) = (vec![], vec![], vec![], vec![], vec![]);
        for n in 0..x_0.shape[0] {
            let x_0 = x_0.sub(n).channels_last().f32s();
            let first = vb.len();
            for (call, t) in (0..process.steps()).rev().enumerate() {
                let c = process.at(t);
                let eps = noise.sub(call).sub(n).channels_last().f32s();
                let mut x_t = vec![f32::NAN; x_0.len()];
                q_sample(&c, &mut x_t, &x_0, &eps);
                let out = model.run(&x_t, process.time_value(t, case["rescale_timesteps"] == true));
                let x_0_map = clip(case["clip_denoised"] == true);
                let terms = bound_terms(&objective, &c, channels, x_0_map, &x_0, &eps, &out);
                vb.push(terms.vb_bpd);
                x_0_mse.push(terms.x_0_mse);
                mse.push(terms.eps_mse);
            }
            prior.push(prior_bpd(&process, &x_0));
            total.push(vb[first..].iter().sum::<f64>() + prior[n]);
        }
        let results = [("vb", vb), ("xstart_mse", x_0_mse), ("mse", mse), ("prior_bpd", prior), ("total_bpd", total)];
        for (part, got) in results {
            file.compare(&format!("{name}/{part}"), &got);
        }
    }
}
